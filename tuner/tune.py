"""`autotune`: enumerate, predict, compile, try, record, for every workload of a run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import check_supported
from tilewright.kernels.problem import Problem
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuner.gpu_runner import equal_gpus
from tilewright.tuner.pool import MOST_JOBS
from tilewright.tuner.results import Progress, Reporter, Results
from tilewright.tuner.storage import Storage
from tilewright.tuner.suites import SUITES, Workload
from tilewright.tuner.tuning_run import Budget, TuningRun
from tilewright.tuning_db.env import database_dir, refuse_compiler_switches
from tilewright.tuning_db.errors import DatabaseCorruptError, ProblemError, UsageError
from tilewright.tuning_db.store import TuningDB

PREDICTED_TRIALS = 12
"""Configurations tried per workload where they are only predicted: the model has ranked them before, and what they cost
is compiling. The default suite then takes about two minutes on 2 cores."""

MEASURED_TRIALS = 48
"""Where they are measured: a minute a workload or less."""


MOST_SEED = 2**32 - 1
"""NumPy's own limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningOptions:
    """How to tune: the arguments of `autotune` of these names.

    Raises:
        UsageError: one is no such number, or out of range, or two exclude each other.
    """

    trials: int | None = None
    timeout: float | None = None
    jobs: int | None = None
    workers: int = 1
    db: str | os.PathLike[str] | None = None
    storage: str | None = None
    retune: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for what is no such number, or out of range."""
        limits = {"trials": (1, None), "jobs": (1, MOST_JOBS), "workers": (1, None), "seed": (0, MOST_SEED)}
        for name, (least, most) in limits.items():
            _check_integer(name, getattr(self, name), least, most, optional=name in ("trials", "jobs"))
        timeout = self.timeout
        if timeout is not None and not (_is_a(Real, timeout) and timeout > 0):
            raise UsageError(f"{timeout=} must be more than 0 seconds, as a number")
        if self.storage is not None and self.retune:
            raise UsageError(
                "retune and storage (--retune, --storage) exclude each other: what others have tried in a storage is "
                "not tried again"
            )


def _check_integer(name: str, value: Any, least: int, most: int | None, *, optional: bool) -> None:
    if value is None and optional:
        return
    if not _is_a(Integral, value) or value < least or (most and value > most):
        wanted = f"from {least} to {most}" if most else f"of at least {least}"
        raise UsageError(f"{name}={value!r} must be an integer {wanted}")


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is a number of that kind, as NumPy's are; True is not."""
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """What a run is to do, all of it checked."""

    start: float  # of `time.monotonic`: the time limit counts from there
    device: Device
    gpus: tuple[Device, ...]
    workloads: tuple[Workload, ...]
    options: TuningOptions


def autotune(
    device: str | Device,
    *,
    kernels: Sequence[str] | None = None,
    problems: Iterable[Problem | Workload | str] | None = None,
    trials: int | None = None,
    timeout: float | None = None,
    jobs: int | None = None,
    workers: int = 1,
    db: str | os.PathLike[str] | None = None,
    storage: str | None = None,
    retune: bool = False,
    seed: int = 0,
    progress: Callable[[Progress], None] = lambda event: None,
) -> Results:
    """Tune workloads for a device and keep every outcome in its database, from which calls in this process are served.

    On a live GPU configurations are measured; for an absent one they are compiled for it and predicted, and results say
    so. What is on record already is not tried again.

    Args:
        device: a name as `resolve_device` takes it ("sm_86", "rtx3090", "cuda:0"), or a Device.
        kernels: names of the ops to tune; all by default.
        problems: what to tune: problems, workloads, or texts as `"M=4096,N=4096,K=4096,dtype=fp16"` (of the one op in
            `kernels`, gemm by default). The default suite if left out.
        trials: configurations to have tried per workload, those of earlier runs included; by default 12 or, on a live
            GPU, at most 48 and as many as promise an improvement of 0.1 % or more.
        timeout: seconds for the whole run, shared out among the workloads. One whose share is over before anything was
            tried has a few configurations tried all the same, as long as the run's time is not up: the same call goes
            on from there. Trials in flight are finished, which takes one trial's timeout at most, and on a GPU the
            default of a workload that was begun, and what is predicted to be best, are measured even then unless one of
            those hangs (not with a storage). A workload whose turn never came is answered from what is on record, or
            has status `timeout`.
        jobs: compiling processes; by default one per processor this process may use.
        workers: measuring processes, each with a GPU of its own: the device's and others of the same board.
        db: folder of the databases; by default `$TILEWRIGHT_DB_DIR`, else `tilewright` in the user's data folder.
        storage: URL of a database, as SQLAlchemy takes it (`postgresql+psycopg://user@host/database`), in which this
            run and others, on any host with a GPU of this board, share the searches. Each configuration is tried by one
            of them, `trials` counts those of all, and each run ends with all outcomes in its own database.
        retune: try again what is on record; not with a storage. Of one that was interrupted or whose time was up, and
            that began within a day, the same call tries only what is left.
        seed: of the search.
        progress: called as a workload starts, after every outcome, as a wait for other runs that have the GPU begins,
            and as the workload ends, in the calling thread.

    Raises:
        UsageError: unknown names, malformed problems, numbers out of range.
        MissingDependencyError: the device is a live GPU ("cuda:0"), and CuPy isn't installed.
        DatabaseError: the database or the storage can't be used, or that has records of another device; finished
            outcomes are kept.
        WorkerError: no worker process can be started.
        MachineError: the machine failed a trial, as by a full disk; finished outcomes are kept.
    """
    options = TuningOptions(
        trials=trials,
        timeout=timeout,
        jobs=jobs,
        workers=workers,
        db=db,
        storage=storage,
        retune=retune,
        seed=seed,
    )
    return tune(planned(device, options, kernels, problems), progress)


def planned(
    device: str | Device,
    options: TuningOptions,
    kernels: Sequence[str] | None = None,
    problems: Iterable[Problem | Workload | str] | None = None,
) -> PlannedRun:
    """The run of `autotune` with these arguments; nothing is begun.

    Raises:
        UsageError: as `autotune`.
    """
    start = time.monotonic()
    if not isinstance(device, str | Device):
        raise UsageError(f"{device=} must be the name of a device, such as 'sm_86', or a Device")
    refuse_compiler_switches("nothing is tuned")
    target = resolve_device(device) if isinstance(device, str) else device
    gpus = equal_gpus(target, options.workers)
    return PlannedRun(start, target, gpus, resolve_workloads(target, kernels, problems), options)


def tune(plan: PlannedRun, progress: Callable[[Progress], None] = lambda event: None) -> Results:
    """Does what is planned. The next call of each problem in this process asks the databases again.

    Raises:
        DatabaseError, WorkerError, MachineError: as `autotune`.
    """
    device, workloads, options = plan.device, plan.workloads, plan.options
    # Asked for a number, a search makes that many trials; by default it ends before where nothing more is expected.
    stop_early = options.trials is None and bool(device.live)
    usual = MEASURED_TRIALS if device.live else PREDICTED_TRIALS
    trials = usual if options.trials is None else options.trials
    budget = Budget(trials, stop_early, options.retune, options.seed)
    jobs = options.jobs if options.jobs is not None else len(os.sched_getaffinity(0))
    deadline = None if options.timeout is None else plan.start + options.timeout
    with contextlib.ExitStack() as stack:
        stack.callback(forget_plans)
        # Before the database is made: a URL that can't be opened leaves nothing behind.
        storage = None if options.storage is None else stack.enter_context(Storage(options.storage))
        database = stack.enter_context(TuningDB.open(device.key, database_dir(options.db)))
        with contextlib.suppress(DatabaseCorruptError):  # told, and the file set aside, when a damaged page is needed
            database.refuse_other_devices()
        results = Results(device, database.path, set_aside=database.set_aside)
        problems = [workload.problem for workload in workloads]
        with TuningRun(device, database, jobs, plan.gpus, storage, problems, budget) as run:
            for index, workload in enumerate(workloads):
                share = None
                if deadline is not None:
                    # What one workload leaves of its share, the rest divide.
                    share = time.monotonic() + max(0.0, deadline - time.monotonic()) / (len(workloads) - index)
                report = Reporter(progress, workload.name, index, len(workloads), trials)
                report.started()
                result = run.tune(workload, share, deadline, report)
                results.results.append(result)
                report.finished(result)
            results.compiled, results.lost_workers = run.compiled, run.lost_workers
        results.elapsed_s = time.monotonic() - plan.start
    return results


def resolve_workloads(
    device: Device, kernels: Sequence[str] | None = None, problems: Iterable[Problem | Workload | str] | None = None
) -> tuple[Workload, ...]:
    """What `autotune` tunes for these arguments.

    Raises:
        UsageError: unknown names, malformed problems, or one that this device can't run: a mistake to be told of before
            minutes are spent on the others.
    """
    if isinstance(kernels, str):
        kernels = [kernels]
    if isinstance(problems, str | Problem | Workload):
        problems = [problems]
    chosen = list({kernel.name: kernel for kernel in map(find_kernel, kernels or ())}.values())
    if problems is None:
        names = {kernel.name for kernel in chosen}
        problems = [workload for workload in SUITES["default"] if not names or workload.op in names]
    workloads = []
    for problem in problems:
        if isinstance(problem, str):
            if len(chosen) > 1:
                ops = ", ".join(kernel.name for kernel in chosen)
                raise UsageError(f"the problem {problem!r} is of one op: name it alone, not {ops}")
            problem = _parsed(problem, chosen[0] if chosen else None)
        elif not isinstance(problem, Problem | Workload):
            raise UsageError(
                f"{problem!r} is no problem: pass a Problem, a Workload or a text such as 'M=64,N=64,K=64'"
            )
        workloads.append(problem if isinstance(problem, Workload) else Workload(str(problem), problem))
    if not workloads:
        raise UsageError("there is nothing to do: no workload of these kernels")
    for workload in workloads:
        kernel = find_kernel(workload.op)
        check_supported(kernel, workload.problem, device)
        kernel.space.check(workload.problem, kernel.default(workload.problem, device), device)
    return tuple(workloads)


def _parsed(text: str, kernel: Kernel[Any, Any] | None) -> Problem:
    """The problem that a text says, of this kernel; without one, of `gemm`.

    Raises:
        ProblemError: it is not a valid one; for want of a kernel's name, the message has those that it may be of.
    """
    gemm = find_kernel("gemm")
    try:
        problem: Problem = (kernel or gemm).problem.parse(text)
        return problem
    except ProblemError as error:
        names = {part.partition("=")[0].strip() for part in text.split(",")}
        others = [
            other.name
            for other in KERNELS
            if other is not gemm and names <= {field.name for field in dataclasses.fields(other.problem)}
        ]
        if kernel is not None or not others:
            raise
        hint = " or ".join(f"--kernel {other}" for other in others)
        raise ProblemError(f"{error}; a problem of another op than gemm needs its name: {hint}") from None

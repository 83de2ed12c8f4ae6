"""Making a pack: choose, compile on the pool, check the limits, write. `tilewright.kernels.pack` is the format."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.kernels.compile import Binary, over_limits, ptxas_version, triton_version
from tilewright.kernels.constants import checked_constant
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Kernel, Launch
from tilewright.kernels.lookup import Choice, all_ranked, code_hash
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem, as_gemm
from tilewright.kernels.pack import Entry, Facts, Pack, specialization_digest, write_pack
from tilewright.kernels.problem import Problem
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuner.pool import Pool
from tilewright.tuner.requests import BuildReply, BuildRequest
from tilewright.tuner.runner import COMPILE_TIMEOUT_S
from tilewright.tuner.suites import Workload
from tilewright.tuner.tune import resolve_workloads
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.env import database_dir, refuse_compiler_switches, refuse_if_frozen
from tilewright.tuning_db.errors import ProblemError, RunError, UsageError
from tilewright.tuning_db.record import Provenance, Resources, Status
from tilewright.tuning_db.store import TuningDB
from tilewright.tuning_db.version import installed_version

PackedConstants = Mapping[str, Sequence[float]]
"""By name, the values to pack beside the default of each constexpr that callers choose: `{"EPS": [1e-5]}`."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What a pack holds."""

    path: Path
    device: str
    sha256: str  # of the file
    bytes: int
    kernels: int
    entries: list[Entry]

    def counts(self) -> dict[Provenance, int]:
        """How many problems there are of each provenance."""
        return {each: sum(entry.provenance is each for entry in self.entries) for each in Provenance}


def problems_on_record(device: Device, folder: Path, ops: Sequence[str] = ()) -> list[Problem]:
    """Every problem that a device's own database has a result for, of those that these kernels know. Of shipped records
    none.

    Raises:
        DatabaseError: the database can't be read, or has records of another device.
    """
    known = {kernel.name: kernel for kernel in KERNELS if not ops or kernel.name in ops}
    found: dict[Problem, None] = {}
    with TuningDB.open(device.key, folder, read_only=True) as database:
        database.refuse_other_devices()
        for record in database.best_of_each():
            kernel = known.get(record.key.op)
            if kernel is None:
                continue
            try:
                problem = kernel.problem.from_json(record.key.problem)
            except ProblemError:
                continue  # of another revision, with other fields
            if kernel.supported(problem, device) is None:
                found[problem] = None
    return list(found)


def build_pack(
    device: str | Device,
    output: str | os.PathLike[str],
    *,
    kernels: Sequence[str] | None = None,
    problems: Iterable[Problem | Workload | str] | None = None,
    constants: PackedConstants | None = None,
    jobs: int | None = None,
    db: str | os.PathLike[str] | None = None,
) -> Packed:
    """Compile what a program on a device would run for each problem, and write the pack.

    The choice is that of `tilewright.kernels.choose`: the best record, else a prediction, else the default; what turns
    out not to fit once it is compiled gives way to the next. Beside a convolution of one tap goes the GEMM that Python
    runs it as. The file is written whole or not at all, and equal choices, code and versions give equal bytes.

    Args:
        device: as `autotune` takes it.
        output: the file; one that is there is replaced.
        kernels: names of the ops of the problems; all by default.
        problems: as `autotune` takes them; by default every problem that the device's own database has a result for.
        constants: further values of numbers that are compiled in, beside their defaults: `{"EPS": [1e-5]}`.
        jobs: compiling processes; by default one per processor this process may use.
        db: folder of the databases; by default as `autotune` has it.

    Raises:
        UsageError: nothing to pack, unknown names, a problem that the device can't run, a constant that no problem
            takes or no call, or a file that can't be written.
        DatabaseError: the device's database can't be read, or has records of another.
        RunError: no configuration of a problem compiles within the limits.
        WorkerError: no worker process can be started.
        MachineError: the machine failed one, as by a full disk.
    """
    refuse_if_frozen("no pack is made")
    refuse_compiler_switches("no pack is made")
    device = resolve_device(device) if isinstance(device, str) else device
    output, folder = Path(output), database_dir(db)
    if problems is not None:
        chosen = [workload.problem for workload in resolve_workloads(device, kernels, problems)]
    else:
        ops = [find_kernel(name).name for name in kernels or ()]
        chosen = problems_on_record(device, folder, ops)
        if not chosen:
            of_ops = f" of {', '.join(ops)}" if ops else ""
            nothing = f"there is nothing to pack: no result{of_ops} for {device.key} is on record in {folder}"
            raise UsageError(f"{nothing}: tune the device first, or name problems or a suite")
    called = dict.fromkeys(each for problem in chosen for each in _as_called(problem, device))
    tasks = [_Task(find_kernel(problem.op), problem, device, folder) for problem in called]
    if output.exists() and not output.is_file() and not output.is_dir():  # a folder is refused with what is to be done
        raise UsageError(
            f"a pack is a file that programs open by its name: the output can't be {output}, a pipe or a device"
        )
    values = _checked(constants or {}, tasks)
    # A program goes on without a database that it can't read; what is packed must not hang on that unsaid.
    with TuningDB.open(device.key, folder, read_only=True) as database:
        database.refuse_other_devices()
    binaries: dict[str, Binary] = {}
    jobs = jobs if jobs is not None else len(os.sched_getaffinity(0))
    with whole_file(output) as stream:
        with Pool(min(jobs, len(tasks))) as pool:
            _compile_all(pool, device, tasks, values, binaries)
        facts = Facts(
            device=device.key,
            arch=device.arch,
            tilewright=installed_version(),
            triton=triton_version(),
            ptxas=ptxas_version(device.arch),
            revisions={task.kernel.name: code_hash(task.kernel) for task in tasks},
        )
        write_pack(stream, facts, [task.entry() for task in tasks], binaries)
        stream.flush()
        # What is told is of these bytes: once the file has its name, it may be another's, packed meanwhile.
        written = Path(stream.name)
        content, pack = written.read_bytes(), Pack(written)
    return Packed(
        output, device.key, hashlib.sha256(content).hexdigest(), len(content), len(pack.specializations), pack.entries
    )


def _as_called(problem: Problem, device: Device) -> Iterator[Problem]:
    """A problem, and behind it the one that a call of its op runs in its place: `conv2d` runs one tap as a GEMM, unless
    it is told a convolution's configuration."""
    yield problem
    if isinstance(problem, Conv2dProblem) and problem.pointwise:
        product = as_gemm(problem)
        if find_kernel(product.op).supported(product, device) is None:
            yield product


@dataclass
class _Task:
    """One problem on its way into the pack."""

    kernel: Kernel[Any, Any]
    problem: Problem
    device: Device
    folder: Path
    choice: Choice | None = None
    refusal: str = ""  # of the latest choice

    def __post_init__(self) -> None:
        self.choices: Iterator[Choice] = all_ranked(self.kernel, self.problem, self.device, self.folder)

    def advance(self) -> None:
        """Takes the next choice.

        Raises:
            RunError: there is none left.
        """
        self.choice = next(self.choices, None)
        if self.choice is None:
            raise RunError(f'no configuration of {self.kernel.name} "{self.problem}" can be packed: {self.refusal}')

    def entry(self) -> Entry:
        assert self.choice is not None
        assert self.choice.provenance is not None
        return Entry(
            op=self.kernel.name,
            problem=self.problem.to_json(),
            config=self.choice.config.to_json(),
            provenance=self.choice.provenance,
            reason=self.choice.reason,
            time_us=self.choice.time_us,
        )


def _checked(constants: PackedConstants, tasks: Sequence[_Task]) -> PackedConstants:
    taken = {name for task in tasks for name in task.kernel.constants(task.problem)}
    for name, values in constants.items():
        if name not in taken:
            known = ", ".join(sorted(each.lower() for each in taken)) or "none"
            raise UsageError(f"no problem to pack takes a constant {name.lower()!r} (they take: {known})")
        for value in values:
            checked_constant(name, value)
    return constants


def _compile_all(
    pool: Pool, device: Device, tasks: Sequence[_Task], constants: PackedConstants, binaries: dict[str, Binary]
) -> None:
    """Gives every task a choice that compiles within limits, and `binaries` its code, by specialization."""
    futures: dict[tuple[str, ...], Future[BuildReply]] = {}
    pending = list(tasks)
    while pending:
        builds = []
        for task in pending:
            task.advance()
            builds += [_Build(task, variant) for variant in _variants(constants, task)]
        for build in builds:
            if build.digests not in futures:  # problems of different shapes often need the same code
                futures[build.digests] = pool.submit(build.request(device.arch), COMPILE_TIMEOUT_S)
        for future in as_completed({futures[build.digests] for build in builds}):
            future.result()  # raises for a pool that can't work
        refused: dict[int, _Task] = {}
        for build in builds:
            refusal, build.built = _outcome(futures[build.digests].result(), device)
            if refusal:
                build.task.refusal = refusal
                refused[id(build.task)] = build.task
        for build in builds:
            if id(build.task) not in refused:
                binaries.update(zip(build.digests, build.built, strict=True))
        pending = list(refused.values())


@dataclass
class _Build:
    """One choice of one problem with one set of constants."""

    task: _Task
    constants: tuple[tuple[str, float], ...]
    built: list[Binary] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.task.choice is not None
        launches: tuple[Launch, ...] = self.task.kernel.launches(self.task.problem, self.task.choice.config)
        self.digests = tuple(specialization_digest(launch.with_constants(self.constants)) for launch in launches)

    def request(self, arch: int) -> BuildRequest:
        assert self.task.choice is not None
        return {
            "do": "build",
            "op": self.task.kernel.name,
            "problem": self.task.problem.to_dict(),
            "config": self.task.choice.config.to_dict(),
            "constants": dict(self.constants),
            "arch": arch,
        }


def _variants(constants: PackedConstants, task: _Task) -> Iterator[tuple[tuple[str, float], ...]]:
    """Every combination of the defaults and the values given, of the constants that this problem takes."""
    names = [name for name in task.kernel.constants(task.problem) if name in constants]
    for values in itertools.product(*((None, *constants[name]) for name in names)):
        yield tuple((name, value) for name, value in zip(names, values, strict=True) if value is not None)


def _outcome(reply: BuildReply, device: Device) -> tuple[str, list[Binary]]:
    """Why what a worker compiled can't be packed, "" if it can; and its binaries."""
    if reply["status"] != Status.OK:
        return str(reply.get("message") or reply["status"]), []
    binaries = [
        Binary(
            **{**fields, "cubin": base64.b64decode(fields["cubin"]), "resources": Resources(**fields["resources"])},
            arch=device.arch,
            ptx="",
        )
        for fields in reply["binaries"]
    ]
    limits = (over_limits(binary.resources, device, binary.num_warps) for binary in binaries)
    return next((limit for limit in limits if limit is not None), ""), binaries

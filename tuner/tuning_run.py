"""One run of `autotune` on one device: for each workload, search, try, record, and compare the finalists."""

from __future__ import annotations

import contextlib
import math
import platform
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from tilewright.kernels.compile import ptxas_version, triton_version
from tilewright.kernels.device import Device
from tilewright.kernels.devices import driver_versions
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import TIMING_PROTOCOL, prediction_protocol, record_key, remember
from tilewright.kernels.prediction import roofline_us
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import gpu_runner
from tilewright.tuner.gpu_runner import GpuRunner
from tilewright.tuner.installation import objection
from tilewright.tuner.outlook import Outlook
from tilewright.tuner.pool import Pool
from tilewright.tuner.results import Reporter, Result
from tilewright.tuner.runner import Compiler, Outcome, PredictionRunner, Runner, is_past
from tilewright.tuner.search import Candidates, Evidence, Search
from tilewright.tuner.shared import MOST_LOST, Claim, SharedSearch
from tilewright.tuner.storage import Storage
from tilewright.tuner.suites import Workload
from tilewright.tuning_db.errors import ProblemError
from tilewright.tuning_db.record import Environment, Key, Record, Status
from tilewright.tuning_db.store import TuningDB

SHARED_POLL_S = 1.0
"""Between two looks at what others in a storage have under way, when nothing is left to begin."""

BATCH_PER_JOB = 2
"""Configurations asked for at a time, per compiling process: enough that none waits for another's end."""

ROUNDS = 4
"""Batches of a search on a GPU at the least."""

FINALISTS = 4
"""Configurations measured again, interleaved, at the end: the least of several noisy medians is 1 to 3 % too good. The
default is measured again with them, for it stays unless it is beaten beyond noise."""

FINALIST_ROUNDS = 3
"""How often at the most: after the first, another that was measured once may seem the best."""

LEAST_EVIDENCE = 8
"""Configurations measured elsewhere that are enough to learn from."""

MOST_EVIDENCE = 4
"""Sources of evidence, the nearest ones: each costs a tenth of a second, and weights are fitted to few trials."""


class TuningRun:
    """One run on one device: its processes start with the first trial, so that a cached run pays for none.

    Used as a context manager, it ends its processes with the block.

    Args:
        device: whose outcomes are recorded.
        database: where they are recorded.
        jobs: compiling processes.
        gpus: that measure; none where times are predicted.
        storage: of studies shared with other runs; None for a search of its own.
        problems: all that it will tune, in order.
    """

    def __init__(
        self,
        device: Device,
        database: TuningDB,
        jobs: int,
        gpus: Sequence[Device],
        storage: Storage | None,
        problems: Sequence[Problem],
    ) -> None:
        self._outlook = Outlook(device, problems)
        self._storage = storage
        self._device = device
        self._database = database
        self._jobs = jobs
        self._gpus = gpus
        self._pool: Pool | None = None
        self._compiler: Compiler | None = None
        self._runner: Runner | None = None
        self._run_id: int | None = None

    def __enter__(self) -> TuningRun:
        return self

    def __exit__(self, *_: object) -> None:
        self._outlook.close()
        if self._runner is not None:
            self._runner.close()
        if self._pool is not None:
            self._pool.close()

    @property
    def compiled(self) -> int:
        """Distinct kernels that compiled so far."""
        return self._compiler.compiled if self._compiler is not None else 0

    @property
    def lost_workers(self) -> tuple[str, ...]:
        """Why measuring processes were given up."""
        return self._runner.lost_workers if self._runner is not None else ()

    def tune(
        self,
        workload: Workload,
        trials: int,
        stop_early: bool,
        deadline: float | None,
        retune: bool,
        seed: int,
        report: Reporter,
    ) -> Result:
        """Tunes a workload, as far as records don't answer already; its best configuration.

        Args:
            workload: what to tune.
            trials: configurations to try, those on record included.
            stop_early: whether to end before where nothing more is expected.
            deadline: seconds of `time.monotonic` after which nothing is begun.
            retune: whether to try again what is on record.
            seed: of the search.
            report: hears of every outcome.

        Raises:
            DatabaseError, StorageError, WorkerError: as `autotune`.
        """
        kernel, problem = find_kernel(workload.op), workload.problem
        protocol = TIMING_PROTOCOL if self._device.live else prediction_protocol(kernel)
        key = record_key(kernel, problem, self._device, protocol)
        remember(kernel, self._device, self._database)
        known = {} if retune else self._known(kernel, key)
        progress = _SearchProgress(self._database, kernel, key)
        default = kernel.default(problem, self._device)
        # In a storage there may be outcomes of others, and others may wait for ours: it is asked in any case.
        alone = self._storage is None
        if alone and (len(known) >= trials or (known and stop_early and progress.at_plateau)):
            if self._device.live and progress.interrupted and not is_past(deadline):
                self._compare_finalists(kernel, problem, key, default, deadline, progress.ended())
            return self._result(workload, kernel, key, cached=True)
        if deadline is not None and time.monotonic() >= deadline:
            # Ranking takes a few tenths of a second: a turn that never came doesn't pay for it.
            return self._result(workload, kernel, key, cached=bool(known))
        scored = self._outlook.of(problem)
        configs = [config for _, config in scored]
        if alone and not set(configs).union((default,)) - known.keys():
            return self._result(workload, kernel, key, cached=True)
        candidates = Candidates(
            kernel.space.axes,
            configs,
            default,
            predicted_us=[prediction.prior_us for prediction, _ in scored],
            evidence=self._evidence(kernel, problem, key) if self._device.live else (),
            exploring=bool(self._device.live),
            seed=seed,
        )
        if self._storage is not None:
            with SharedSearch(self._storage, key, candidates) as shared:
                tried, plateau = self._search_shared(
                    shared, kernel, problem, key, trials, stop_early, deadline, progress, report
                )
            # On a GPU of this run's own: those of others differ by a percent or two, and one must compare all.
            if progress.interrupted and not is_past(deadline):
                self._compare_finalists(kernel, problem, key, default, deadline, progress.ended(plateau=plateau))
            return self._result(workload, kernel, key, cached=not tried)
        report.done = len(known)
        runner = self._started()
        search = Search(candidates)
        progress.began()
        tried, proposed, outcomes = len(known), 0, set(known)
        batch = self._batch(trials)
        while tried < trials and not (stop_early and search.finished) and not is_past(deadline):
            asked = search.ask(min(trials - proposed, batch))
            if not asked:
                break
            proposed += len(asked)
            # The search begins anew in every run, and what it proposes that is on record is answered from there. So a
            # run that was killed goes the way on which it was, with outcomes told in the order of the proposals.
            times = {config: known.pop(config) for _, config in asked if config in known}
            new = [config for _, config in asked if config not in times][: trials - tried]
            if new:
                search.learn(known)  # of other runs, with other budgets or seeds
                known = {}
            for config, outcome in runner.run(kernel, problem, new, deadline):
                self._keep(key, config, outcome)
                outcomes.add(config)
                times[config] = outcome.times.median_us if outcome.times else None
                report.outcome(outcome)
            for trial, config in asked:
                if config in times:
                    search.tell(trial, times[config])
            tried += len(new)
        if self._device.live and proposed and is_past(deadline):
            # Small tiles compile first, and what is measured is answered before what isn't, however bad it is.
            missing = [config for config in dict.fromkeys((*configs[:1], default)) if config not in outcomes]
            # Unless a trial in flight has held that up: a run is late by one trial, not by two.
            grace = (deadline or 0.0) + gpu_runner.MEASURE_TIMEOUT_S / 4
            for config, outcome in runner.run(kernel, problem, missing, grace):
                self._keep(key, config, outcome)
                report.outcome(outcome)
        if not is_past(deadline):
            ended = progress.ended(plateau=stop_early and search.finished)
            self._compare_finalists(kernel, problem, key, default, deadline, ended)
        return self._result(workload, kernel, key, cached=False)

    def _batch(self, trials: int) -> int:
        """Proposals at a time: work for all compilers, but of what is measured no more than leaves the search `ROUNDS`
        times to learn from outcomes. A host of many processors would else propose all before it hears of any."""
        batch = BATCH_PER_JOB * max(self._jobs, len(self._gpus))
        if not self._gpus:
            return batch
        return min(batch, max(BATCH_PER_JOB * len(self._gpus), math.ceil(trials / ROUNDS)))

    def _search_shared(
        self,
        search: SharedSearch,
        kernel: Kernel[Any, Any],
        problem: Problem,
        key: Key,
        trials: int,
        stop_early: bool,
        deadline: float | None,
        progress: _SearchProgress,
        report: Reporter,
    ) -> tuple[int, bool]:
        """This run's part of a search in a storage, until `trials` configurations were tried by all runs in it; how
        many it tried, and whether it ended because no improvement is expected."""
        config_of = kernel.space.config.from_json
        search.publish({config_of(text): entry for text, entry in self._database.entries(key).items()})
        self._bring(search, key, progress)
        # Proposals that others wait for the outcome of are out of their reach: no more than this run is busy with.
        batch = BATCH_PER_JOB * len(self._gpus) if self._gpus else self._jobs
        tried = 0
        while not is_past(deadline):
            report.done = search.tried
            claims = search.ask(batch, trials, only_lost=stop_early and search.at_plateau())
            if not claims:
                if not search.waiting():
                    break
                # For their outcomes, or to retry what they are lost with.
                left = SHARED_POLL_S if deadline is None else min(SHARED_POLL_S, deadline - time.monotonic())
                time.sleep(max(0.0, left))
                continue
            runner = self._started()
            progress.began()
            by_config = {claim.config: claim for claim in claims if claim.lost < MOST_LOST}
            given_up = [(claim, _lost(claim.lost)) for claim in claims if claim.lost >= MOST_LOST]
            for claim, outcome in given_up:
                self._tell(search, key, claim, outcome, report)
            for config, outcome in runner.run(kernel, problem, list(by_config), deadline):
                self._tell(search, key, by_config[config], outcome, report)
                tried += 1
            search.withdraw(claims)
        self._bring(search, key, progress)
        return tried, stop_early and search.at_plateau()

    def _tell(self, search: SharedSearch, key: Key, claim: Claim, outcome: Outcome, report: Reporter) -> None:
        """Keeps an outcome here, and then where the others see it."""
        self._keep(key, claim.config, outcome)
        search.tell(claim, self._database.entry(key, claim.config.to_json()))
        report.outcome(outcome)

    def _bring(self, search: SharedSearch, key: Key, progress: _SearchProgress) -> None:
        """Brings what others have tried, and is not on record here, into the database."""
        here = {record.config for record in self._database.records(key)}
        new = [entry for config, entry in search.outcomes().items() if config.to_json() not in here]
        if not new:
            return

        def foreign(record: Record) -> str | None:
            return objection(record) if record.key == key else "it is of another key than the study it was found in"

        place = f"study {search.name!r} (`optuna delete-study` removes it)"
        self._database.bring(new, place, foreign)
        # The best of all may be among them, and its time that of another GPU.
        progress.began()

    def _compare_finalists(
        self,
        kernel: Kernel[Any, Any],
        problem: Problem,
        key: Key,
        default: Config,
        deadline: float | None,
        ended: Mapping[str, str],
    ) -> None:
        """Measures the best few and the default again, side by side, until the best of all is among those; notes with
        the outcomes that the search has ended."""
        runner, compared = self._started(), set[Config]()
        for _ in range(FINALIST_ROUNDS):
            best = [kernel.space.config.from_json(record.config) for record in self._database.top(key, FINALISTS)]
            if best and best[0] in compared:
                return
            kept = self._database.get(key, default.to_json())
            finalists = list(
                dict.fromkeys((*best, *([default] if kept is not None and kept.times is not None else [])))
            )
            outcomes = list(runner.finalists(kernel, problem, finalists, deadline))
            if outcomes or not is_past(deadline):
                self._keep_all(key, outcomes, ended)
            if not outcomes:
                return
            compared.update(finalists)

    def _evidence(self, kernel: Kernel[Any, Any], problem: Problem, key: Key) -> list[Evidence]:
        """What was measured on other boards, of near shapes and by earlier revisions, as far as its configurations are
        of this revision's kind."""
        found = []
        near = kernel.near(problem)
        for reason, records in self._database.evidence(key, near=near, least=LEAST_EVIDENCE, most=MOST_EVIDENCE):
            times_us = {}
            for record in records:
                with contextlib.suppress(ProblemError):  # of another revision, with other fields
                    config = kernel.space.config.from_json(record.config)
                    assert record.times is not None
                    times_us[config] = record.times.median_us
            if times_us:
                found.append(Evidence(reason, times_us))
        return found

    def _known(self, kernel: Kernel[Any, Any], key: Key) -> dict[Config, float | None]:
        return {
            kernel.space.config.from_json(record.config): record.times.median_us if record.times else None
            for record in self._database.records(key)
        }

    def _started(self) -> Runner:
        if self._runner is None:
            self._pool = Pool(self._jobs)
            self._compiler = Compiler(self._pool, self._device)
            self._runner = _make_runner(self._compiler, self._device, self._gpus)
            self._run_id = self._database.start_run(_environment(self._device, self._runner))
        return self._runner

    def _keep(self, key: Key, config: Config, outcome: Outcome) -> None:
        self._keep_all(key, [(config, outcome)], {})

    def _keep_all(self, key: Key, outcomes: Iterable[tuple[Config, Outcome]], notes: Mapping[str, str]) -> None:
        assert self._runner is not None
        assert self._run_id is not None
        records = [
            Record(
                key=key,
                config=config.to_json(),
                status=outcome.status,
                provenance=self._runner.provenance,
                times=outcome.times,
                resources=outcome.resources,
                message=outcome.message,
                predicted_us=outcome.predicted_us,
            )
            for config, outcome in outcomes
        ]
        self._database.add_many(records, self._run_id, notes)

    def _result(self, workload: Workload, kernel: Kernel[Any, Any], key: Key, *, cached: bool) -> Result:
        problem = workload.problem
        records = self._database.records(key)
        blank = Result(workload.name, workload.op, problem.to_dict(), trials=len(records), cached=cached)
        default = kernel.default(problem, self._device)
        top = self._database.top(key, 1, incumbent=default.to_json())
        if not top:
            if not records:
                return replace(blank, status=Status.TIMEOUT, message="the time was up before anything was tried")
            return replace(blank, status=records[-1].status, message=records[-1].message)
        record = top[0]
        assert record.times is not None
        assert record.resources is not None
        time_us = record.times.median_us
        return replace(
            blank,
            config=kernel.space.config.from_json(record.config).to_dict(),
            time_us=time_us,
            tflops=problem.flops() / time_us / 1e6,
            roofline_fraction=roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, self._device) / time_us,
            registers=record.resources.registers,
            spills=record.resources.spill_bytes,
            shared_bytes=record.resources.shared_bytes,
            provenance=record.provenance,
            status=record.status,
        )


class _SearchProgress:
    """How far the search under a key came, noted in the database: an aid to the next run, never evidence."""

    def __init__(self, database: TuningDB, kernel: Kernel[Any, Any], key: Key) -> None:
        self._database = database
        self._stamp = f"search {key.digest()}"
        # A plateau is one of this very space and prediction.
        self._plateau = f"plateau {prediction_protocol(kernel)}"
        self._noted = database.noted(self._stamp)

    @property
    def interrupted(self) -> bool:
        """Whether a run, this or an earlier one, began to try configurations and has not compared the finalists."""
        return self._noted == "began"

    @property
    def at_plateau(self) -> bool:
        """Whether a run ended because it expected no improvement."""
        return self._noted == self._plateau

    def began(self) -> None:
        """Notes that configurations are being tried."""
        self._noted = "began"
        self._database.note({self._stamp: self._noted})

    def ended(self, *, plateau: bool = False) -> dict[str, str]:
        """The note that the search has ended, to be kept with its last outcomes."""
        return {self._stamp: self._plateau if plateau else "ended"}


def _lost(times: int) -> Outcome:
    return Outcome(Status.RUNTIME_ERROR, message=f"the process that tried it was lost, {times} times: not tried again")


def _make_runner(compiler: Compiler, device: Device, gpus: Sequence[Device]) -> Runner:
    return GpuRunner(compiler, device, gpus) if gpus else PredictionRunner(compiler, device)


def _environment(device: Device, runner: Runner) -> Environment:
    driver, cuda = driver_versions() if device.live else ("", "")
    return Environment(
        tilewright=version("tilewright"),
        triton=triton_version(),
        ptxas=ptxas_version(device.arch),
        python=platform.python_version(),
        host=socket.gethostname(),
        protocol=runner.protocol,
        driver=driver,
        cuda=cuda,
        extra={"device": device.name, "source": device.source},
    )

"""One run of `autotune` on one device: for each workload, search, try, record, and compare the finalists."""

from __future__ import annotations

import contextlib
import math
import platform
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.compile import ptxas_version, triton_version
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.live import driver_versions
from tilewright.kernels.lookup import TIMING_PROTOCOL, prediction_protocol, record_key, remember
from tilewright.kernels.prediction import roofline_us
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import gpu_runner
from tilewright.tuner.gpu_runner import GpuRunner
from tilewright.tuner.installation import is_answerable, objection
from tilewright.tuner.notes import Retune, SearchProgress
from tilewright.tuner.outlook import Outlook, Ranked
from tilewright.tuner.pool import Pool
from tilewright.tuner.results import Reporter, Result
from tilewright.tuner.runner import Compiler, Outcome, PredictionRunner, Runner, is_past
from tilewright.tuner.search import Candidates, Evidence, Search
from tilewright.tuner.shared import MOST_LOST, Claim, SharedSearch
from tilewright.tuner.storage import Storage
from tilewright.tuner.suites import Workload
from tilewright.tuning_db.errors import ProblemError, StorageError
from tilewright.tuning_db.record import Environment, Key, Record, Status
from tilewright.tuning_db.store import TuningDB
from tilewright.tuning_db.version import installed_version

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


@dataclass(frozen=True, slots=True)
class Budget:
    """What is spent on each workload of a run."""

    trials: int  # configurations to try, those on record included
    stop_early: bool = False  # whether to end before where nothing more is expected
    retune: bool = False  # whether to try again what is on record
    seed: int = 0  # of the searches


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
        budget: of each.
    """

    def __init__(
        self,
        device: Device,
        database: TuningDB,
        jobs: int,
        gpus: Sequence[Device],
        storage: Storage | None,
        problems: Sequence[Problem],
        budget: Budget,
    ) -> None:
        self._outlook = Outlook(device, problems)
        self._retune = Retune(database, [_key(device, problem) for problem in problems]) if budget.retune else None
        self._budget = budget
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

    def tune(self, workload: Workload, share: float | None, deadline: float | None, report: Reporter) -> Result:
        """Tunes a workload, as far as records don't answer already; its best configuration.

        Args:
            workload: what to tune.
            share: seconds of `time.monotonic` after which nothing is begun, once something was tried.
            deadline: of the run: as `share`, whatever was tried.
            report: hears of every outcome.

        Raises:
            DatabaseError, StorageError, WorkerError, MachineError: as `autotune`.
        """
        job = self._job(workload, share, deadline, report)
        remember(job.kernel, self._device, self._database)
        if self._storage is not None:
            self._tune_shared(job, self._storage)
        elif self._tune_alone(job) and self._retune is not None:
            self._retune.ended(job.key)
        return self._result(job)

    def _job(self, workload: Workload, share: float | None, deadline: float | None, report: Reporter) -> _Job:
        kernel, problem = find_kernel(workload.op), workload.problem
        key = _key(self._device, problem)
        default = kernel.default(problem, self._device)
        progress = SearchProgress(self._database, kernel, key)
        return _Job(workload, kernel, key, default, share, deadline, progress, report)

    def _tune_alone(self, job: _Job) -> bool:
        """Searches by this run's own trials, unless records answer; whether the search has come to its end."""
        budget = self._budget
        known = self._known(job)
        if len(known) >= budget.trials or (known and budget.stop_early and job.progress.at_plateau):
            if self._device.live and job.progress.interrupted and not is_past(job.share):
                self._compare_finalists(job)
            return True
        if is_past(job.deadline):
            # Ranking takes a few tenths of a second: a turn that never came doesn't pay for it.
            return False
        ranked = self._outlook.of(job.problem)
        if not {job.default, *(config for _, config in ranked)} - known.keys():
            return True
        search = Search(self._candidates(job, ranked))
        outcomes = self._search_alone(job, search, known)
        if self._device.live and is_past(job.share):
            # Small tiles compile first, and what is measured is answered before what isn't, however bad it is.
            wanted = [*(config for _, config in ranked[:1]), job.default]
            self._measure_late(job, [config for config in dict.fromkeys(wanted) if config not in outcomes])
        if is_past(job.share):
            return False
        self._compare_finalists(job, plateau=budget.stop_early and search.finished)
        return True

    def _tune_shared(self, job: _Job, storage: Storage) -> None:
        """Searches with other runs, in a study of the storage.

        There may be outcomes of others there, and others may wait for ours: it is asked whatever is on record here.
        """
        if is_past(job.deadline):
            return
        ranked = self._outlook.of(job.problem)
        with SharedSearch(storage, job.key, self._candidates(job, ranked)) as search:
            self._search_shared(job, search)
            plateau = self._budget.stop_early and search.at_plateau()
        # On a GPU of this run's own: those of others differ by a percent or two, and one must compare all.
        if job.progress.interrupted and not is_past(job.share):
            self._compare_finalists(job, plateau=plateau)

    def _candidates(self, job: _Job, ranked: Ranked) -> Candidates:
        return Candidates(
            job.kernel.space.axes,
            [config for _, config in ranked],
            job.default,
            predicted_us=[prediction.prior_us for prediction, _ in ranked],
            evidence=self._evidence(job) if self._device.live else (),
            exploring=bool(self._device.live),
            seed=self._budget.seed,
        )

    def _search_alone(self, job: _Job, search: Search, known: Mapping[Config, float | None]) -> set[Config]:
        """Tries what the search proposes until the budget is used up; the configurations with an outcome, those known
        before included."""
        budget, batch = self._budget, self._batch()
        self._started(job)
        job.progress.began()
        job.report.done = len(known)
        untold, outcomes = dict(known), set(known)
        tried, proposed = len(known), 0
        while tried < budget.trials and not (budget.stop_early and search.finished) and job.has_time:
            asked = search.ask(min(budget.trials - proposed, batch))
            if not asked:
                break
            proposed += len(asked)
            # The search begins anew in every run, and what it proposes that is on record is answered from there. So a
            # run that was killed goes the way on which it was, with outcomes told in the order of the proposals.
            times = {config: untold.pop(config) for _, config in asked if config in untold}
            new = [config for _, config in asked if config not in times][: budget.trials - tried]
            if new:
                search.learn(untold)  # of other runs, with other budgets or seeds
                untold = {}
            for config, outcome in self._try(job, new):
                self._keep(job.key, config, outcome)
                outcomes.add(config)
                times[config] = outcome.times.median_us if outcome.times else None
                job.report.outcome(outcome)
            for trial, config in asked:
                if config in times:
                    search.tell(trial, times[config])
            tried += len(new)
        return outcomes

    def _try(self, job: _Job, configs: Sequence[Config]) -> Iterator[tuple[Config, Outcome]]:
        """The outcomes of those whose turn comes within the workload's share of the time, or of the first few.

        Ranking, or a GPU's first compilation, may take longer than a share: a run that then tried nothing would be no
        further the next time either.
        """
        if not is_past(job.share):
            yield from self._outcomes(job, configs, job.share)
        if is_past(job.share) and job.has_time:
            # As many as are tried at a time, the default and the best predicted among the first.
            few = max(2, len(self._gpus)) if self._gpus else self._jobs
            yield from self._outcomes(job, configs[:few], job.deadline)

    def _outcomes(
        self, job: _Job, configs: Sequence[Config], deadline: float | None
    ) -> Iterator[tuple[Config, Outcome]]:
        for config, outcome in self._started(job).run(job.kernel, job.problem, configs, deadline):
            job.tried += 1
            yield config, outcome

    def _measure_late(self, job: _Job, missing: Sequence[Config]) -> None:
        """Measures what no run goes without, although the time is up."""
        # Unless a trial in flight has held that up: a run is late by one trial, not by two.
        grace = (job.deadline or 0.0) + gpu_runner.MEASURE_TIMEOUT_S / 4
        for config, outcome in self._outcomes(job, missing, grace):
            self._keep(job.key, config, outcome)
            job.report.outcome(outcome)

    def _batch(self) -> int:
        """Proposals at a time: work for all compilers, but of what is measured no more than leaves the search `ROUNDS`
        times to learn from outcomes. A host of many processors would else propose all before it hears of any."""
        batch = BATCH_PER_JOB * max(self._jobs, len(self._gpus))
        if not self._gpus:
            return batch
        return min(batch, max(BATCH_PER_JOB * len(self._gpus), math.ceil(self._budget.trials / ROUNDS)))

    def _search_shared(self, job: _Job, search: SharedSearch) -> None:
        """This run's part of a search in a storage, until all runs in it together have used up the budget."""
        budget = self._budget
        known, config_of = self._known(job), job.kernel.space.config.from_json
        entries = {config_of(text): entry for text, entry in self._database.entries(job.key).items()}
        search.publish({config: entry for config, entry in entries.items() if config in known})
        self._bring(job, search)
        # Proposals that others wait for the outcome of are out of their reach: no more than this run is busy with.
        batch = BATCH_PER_JOB * len(self._gpus) if self._gpus else self._jobs
        while job.has_time:
            job.report.done = search.tried
            claims = search.ask(batch, budget.trials, only_lost=budget.stop_early and search.at_plateau())
            if not claims:
                if not search.waiting() or is_past(job.share):
                    break
                # For their outcomes, or to retry what they are lost with.
                left = SHARED_POLL_S if job.share is None else min(SHARED_POLL_S, job.share - time.monotonic())
                time.sleep(max(0.0, left))
                continue
            self._started(job)
            job.progress.began()
            by_config = {claim.config: claim for claim in claims if claim.lost < MOST_LOST}
            given_up = [(claim, _lost(claim.lost)) for claim in claims if claim.lost >= MOST_LOST]
            for claim, outcome in given_up:
                self._tell(job, search, claim, outcome)
            failure: StorageError | None = None
            under_way = len(self._gpus) or self._jobs
            for config, outcome in self._try(job, list(by_config)):
                if failure is None:
                    try:
                        self._tell(job, search, by_config[config], outcome)
                    except StorageError as error:
                        failure = error
                else:  # what was under way is kept here: the next run tells the others
                    under_way -= 1
                    self._keep(job.key, config, outcome)
                if failure is not None and not under_way:
                    break
            if failure is not None:
                raise failure
            search.withdraw(claims)
        self._bring(job, search)

    def _tell(self, job: _Job, search: SharedSearch, claim: Claim, outcome: Outcome) -> None:
        """Keeps an outcome here, and then where the others see it."""
        self._keep(job.key, claim.config, outcome)
        search.tell(claim, self._database.entry(job.key, claim.config.to_json()))
        job.report.outcome(outcome)

    def _bring(self, job: _Job, search: SharedSearch) -> None:
        """Brings what others have tried, and is not on record here, into the database."""
        here = {record.config for record in self._database.records(job.key)}
        new = [entry for config, entry in search.outcomes().items() if config.to_json() not in here]
        if not new:
            return

        def foreign(record: Record) -> str | None:
            return objection(record) if record.key == job.key else "it is of another key than the study it was found in"

        place = f"study {search.name!r} (`optuna delete-study` removes it)"
        self._database.bring(new, place, foreign)
        # The best of all may be among them, and its time that of another GPU.
        job.progress.began()

    def _compare_finalists(self, job: _Job, *, plateau: bool = False) -> None:
        """Measures the best few and the default again, side by side, until the best of all is among those; notes with
        the outcomes that the search has ended, and whether because no improvement is expected."""
        runner, compared = self._started(job), set[Config]()
        for _ in range(FINALIST_ROUNDS):
            top = self._database.top(job.key, FINALISTS)
            best = [self._config(job, record) for record in top]
            if best and best[0] in compared:
                return
            kept = self._database.get(job.key, job.default.to_json())
            measured = [job.default] if kept is not None and kept.times is not None else []
            finalists = list(dict.fromkeys((*best, *measured)))
            outcomes = list(runner.finalists(job.kernel, job.problem, finalists, job.share))
            if outcomes or not is_past(job.share):
                self._keep_all(job.key, outcomes, job.progress.ended(plateau=plateau))
            if not outcomes:
                return
            compared.update(finalists)

    def _evidence(self, job: _Job) -> list[Evidence]:
        """What was measured on other boards, of near shapes and by earlier revisions, as far as its configurations are
        of this revision's kind."""
        found = []
        near = job.kernel.near(job.problem)
        for reason, records in self._database.evidence(job.key, near=near, least=LEAST_EVIDENCE, most=MOST_EVIDENCE):
            times_us = {}
            for record in records:
                with contextlib.suppress(ProblemError):  # of another revision, with other fields
                    config = job.kernel.space.config.from_json(record.config)
                    assert record.times is not None
                    times_us[config] = record.times.median_us
            if times_us:
                found.append(Evidence(reason, times_us))
        return found

    def _known(self, job: _Job) -> dict[Config, float | None]:
        """What this run need not try; of a retune, what is on record since it began.

        What has a time and is no answer, as of a file that was merged, is left out: it would end a search without one.
        """
        since = "" if self._retune is None else self._retune.since
        return {
            self._config(job, record): record.times.median_us if record.times else None
            for record in self._database.records(job.key)
            if record.created_at >= since and (record.status is not Status.OK or is_answerable(record))
        }

    def _config(self, job: _Job, record: Record) -> Config:
        """The configuration of a record of the workload's key.

        Raises:
            DatabaseCorruptError: it is not valid for this kernel: someone edited the row.
        """
        try:
            config: Config = job.kernel.space.config.from_json(record.config)
        except ProblemError as error:
            raise self._database.no_record(record, error) from None
        return config

    def _started(self, job: _Job) -> Runner:
        if self._runner is None:
            self._pool = Pool(self._jobs)
            self._compiler = Compiler(self._pool, self._device)
            self._runner = _make_runner(self._compiler, self._device, self._gpus)
            self._run_id = self._database.start_run(_environment(self._device, self._runner))
        self._runner.tell_wait = job.report.waiting
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

    def _result(self, job: _Job) -> Result:
        problem = job.problem
        records = self._database.records(job.key)
        cached = any(record.status is not Status.OK or is_answerable(record) for record in records) and not job.tried
        blank = Result(job.workload.name, job.workload.op, problem.to_dict(), trials=len(records), cached=cached)
        top = self._database.top(job.key, 1, incumbent=job.default.to_json())
        if not top:
            failed = [record for record in records if record.status is not Status.OK]
            if not failed:
                return replace(blank, status=Status.TIMEOUT, message="the time was up before anything was tried")
            return replace(blank, status=failed[-1].status, message=failed[-1].message)
        record = top[0]
        assert record.times is not None
        assert record.resources is not None
        time_us = record.times.median_us
        return replace(
            blank,
            config=self._config(job, record).to_dict(),
            time_us=time_us,
            tflops=problem.flops() / time_us / 1e6,
            roofline_fraction=roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, self._device) / time_us,
            registers=record.resources.registers,
            spills=record.resources.spill_bytes,
            shared_bytes=record.resources.shared_bytes,
            provenance=record.provenance,
            status=record.status,
        )


@dataclass(slots=True, eq=False)
class _Job:
    """A workload on its way through a run."""

    workload: Workload
    kernel: Kernel[Any, Any]
    key: Key  # of its outcomes
    default: Config
    share: float | None  # seconds of `time.monotonic` after which nothing is begun, once something was tried
    deadline: float | None  # of the run: as `share`, whatever was tried
    progress: SearchProgress
    report: Reporter
    tried: int = 0  # configurations, by this run

    @property
    def problem(self) -> Problem:
        return self.workload.problem

    @property
    def has_time(self) -> bool:
        """Whether anything may be begun."""
        return not is_past(self.share) or not (self.tried or is_past(self.deadline))


def _key(device: Device, problem: Problem) -> Key:
    """Of the outcomes of a problem on a device that is here, or not."""
    kernel = find_kernel(problem.op)
    protocol = TIMING_PROTOCOL if device.live else prediction_protocol(kernel)
    return record_key(kernel, problem, device, protocol)


def _lost(times: int) -> Outcome:
    return Outcome(Status.RUNTIME_ERROR, message=f"the process that tried it was lost, {times} times: not tried again")


def _make_runner(compiler: Compiler, device: Device, gpus: Sequence[Device]) -> Runner:
    return GpuRunner(compiler, device, gpus) if gpus else PredictionRunner(compiler, device)


def _environment(device: Device, runner: Runner) -> Environment:
    driver, cuda = driver_versions() if device.live else ("", "")
    return Environment(
        tilewright=installed_version(),
        triton=triton_version(),
        ptxas=ptxas_version(device.arch),
        python=platform.python_version(),
        host=socket.gethostname(),
        protocol=runner.protocol,
        driver=driver,
        cuda=cuda,
        extra={"device": device.name, "source": device.source},
    )

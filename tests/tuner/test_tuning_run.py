"""One run: its runner, its evidence, its end, and the finalists."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.tuner.counting import DEVICE, SMALL, CountingRunner, MeasuringRunner
from tilewright.kernels.device import Device
from tilewright.kernels.lookup import predictions, recorded_choice
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.tuner import notes, search, tune, tuning_run
from tilewright.tuner.installation import objection
from tilewright.tuner.results import Progress
from tilewright.tuner.tune import autotune
from tilewright.tuning_db.env import SHIPPED
from tilewright.tuning_db.errors import DatabaseCorruptError
from tilewright.tuning_db.record import Provenance, Status, Times
from tilewright.tuning_db.store import TuningDB
from tilewright.tuning_db.upkeep import check

LIVE = replace(DEVICE, live="cuda:0")


def absent(distribution: str) -> str:
    raise PackageNotFoundError(distribution)


@pytest.fixture
def measured(counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch) -> type[CountingRunner]:
    def runner(compiler: Any, device: Device, gpus: Any) -> CountingRunner:
        return MeasuringRunner(compiler, device) if gpus else CountingRunner(compiler, device)

    monkeypatch.setattr(tuning_run, "_make_runner", runner)
    monkeypatch.setattr(tune, "equal_gpus", lambda device, workers: (device,) if device.live else ())
    return counted


class LateRunner(MeasuringRunner):
    """The time is up before the first two of a batch come out of the compiler: the default and the best predicted."""

    late: ClassVar[list[bool]] = []

    def run(self, kernel: Any, problem: Any, configs: Any, deadline: Any = None) -> Any:
        if self.late:
            yield from super().run(kernel, problem, configs, deadline)
            return
        yield from super().run(kernel, problem, configs[2:])
        self.late.append(True)


@pytest.mark.parametrize("retune", [False, True])
def test_where_time_is_up_the_default_and_the_best_predicted_are_measured_all_the_same(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch, retune: bool
) -> None:
    problem = GemmProblem.parse(SMALL)
    default = GEMM.default(problem, DEVICE)
    best = min(predictions(GEMM, problem, LIVE), key=lambda pair: pair[0].time_us)[1]
    if retune:
        autotune(LIVE, problems=[SMALL], trials=8, jobs=1, db=tmp_path)
        measured.asked.clear()
    monkeypatch.setattr(LateRunner, "late", [])
    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: LateRunner(compiler, device))
    monkeypatch.setattr(tuning_run, "is_past", lambda deadline: deadline is not None and bool(LateRunner.late))
    autotune(LIVE, problems=[SMALL], trials=40, timeout=1000, jobs=8, db=tmp_path, retune=retune)
    tried = [config for _, config in measured.asked]
    assert set(tried[-2:]) == {best, default}
    assert len(tried) == len(set(tried)) > 2


def rank_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    now, ranked = [0.0], tuning_run.Outlook.of

    def slowly(self: Any, problem: Any) -> Any:
        now[0] += 1.0
        return ranked(self, problem)

    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(tuning_run.Outlook, "of", slowly)


@pytest.mark.parametrize("device", [LIVE, DEVICE], ids=["measured", "predicted"])
def test_where_ranking_takes_longer_than_a_share_of_the_time_each_run_comes_further(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    """On a clock that only ranking moves, by a second: of ten workloads, five are ranked in five seconds."""
    rank_slowly(monkeypatch)
    problems = [GemmProblem(M=16, N=32, K=32 * place) for place in range(1, 11)]
    for run in (1, 2):
        results = autotune(device, problems=problems, trials=12, timeout=5.0, jobs=1, db=tmp_path)
        tried = [result.trials for result in results]
        least = 2 * run if device.live else run
        assert all(each >= least for each in tried[:4]), tried
        assert set(tried[5:]) == {0}
        assert results.results[5].status is Status.TIMEOUT
    if device.live:
        for problem in problems[:5]:
            asked = [config for each, config in measured.asked if each == problem]
            best = min(predictions(GEMM, problem, LIVE), key=lambda pair: pair[0].time_us)[1]
            assert {best, GEMM.default(problem, LIVE)} <= set(asked)


def test_where_ranking_takes_longer_than_a_share_a_shared_search_comes_further_too(
    tmp_path: Path, counted: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_slowly(monkeypatch)
    problems = [GemmProblem(M=16, N=32, K=32 * place) for place in range(1, 5)]
    storage = f"sqlite:///{tmp_path / 'studies.sqlite'}"
    for run in (1, 2):
        results = autotune(DEVICE, problems=problems, timeout=2.0, jobs=1, db=tmp_path, storage=storage)
        assert [result.trials for result in results] == [run, 0, 0, 0]


def test_a_search_on_a_gpu_hears_of_outcomes_however_many_compile(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    class Noting(MeasuringRunner):
        def run(self, kernel: Any, problem: Any, configs: Any, deadline: Any = None) -> Any:
            batches.append(len(configs))
            return super().run(kernel, problem, configs, deadline)

    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: Noting(compiler, device))
    autotune(LIVE, problems=[SMALL], trials=40, jobs=64, db=tmp_path)
    assert batches == [10] * 4
    assert tuning_run.ROUNDS == 4
    batches.clear()
    autotune(LIVE, problems=["M=32,N=32,K=64"], trials=8, jobs=1, db=tmp_path)
    assert batches == [2] * 4


def test_a_search_that_expects_nothing_more_ends_and_is_not_begun_again(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "PLATEAU", 1e9)  # nothing that is expected is enough
    (first,) = autotune(LIVE, problems=[SMALL], jobs=1, db=tmp_path)
    assert 4 < first.trials == len(measured.asked) < tune.MEASURED_TRIALS
    (second,) = autotune(LIVE, problems=[SMALL], jobs=1, db=tmp_path)
    assert second == replace(first, cached=True)
    assert len(measured.asked) == first.trials
    # A number that was asked for is made.
    (third,) = autotune(LIVE, problems=[SMALL], trials=first.trials + 3, jobs=1, db=tmp_path)
    assert len(measured.asked) == third.trials == first.trials + 3


def test_a_plateau_of_another_space_is_none(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "PLATEAU", 1e9)
    (first,) = autotune(LIVE, problems=[SMALL], jobs=1, db=tmp_path)
    begun: list[Any] = []

    class NotedSearch(search.Search):
        def __init__(self, candidates: Any) -> None:
            begun.append(candidates)
            super().__init__(candidates)

    monkeypatch.setattr(tuning_run, "Search", NotedSearch)
    autotune(LIVE, problems=[SMALL], jobs=1, db=tmp_path)
    assert not begun
    monkeypatch.setattr(notes, "prediction_protocol", lambda kernel: "another")
    autotune(LIVE, problems=[SMALL], jobs=1, db=tmp_path)
    assert first.trials < tune.MEASURED_TRIALS
    assert len(begun) == 1


def test_a_run_on_a_gpu_notes_the_driver_and_any_that_no_version_is_known(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_run, "driver_versions", lambda: ("580.65.06", "13.0"))
    monkeypatch.setattr("tilewright.tuning_db.version.version", absent)
    for device, noted in ((LIVE, ("580.65.06", "13.0")), (DEVICE, ("", ""))):
        folder = tmp_path / (device.live or "absent")
        autotune(device, problems=[SMALL], trials=1, jobs=1, db=folder)
        with TuningDB.open(device.key, folder, read_only=True) as database:
            ((_, environment),) = database.runs().values()
        assert (environment.driver, environment.cuda) == noted
        assert environment.tilewright == "0+unknown"


@pytest.fixture
def evidence_given(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each search from now on was given as evidence, oldest first."""
    given: list[Any] = []

    class SeenCandidates(search.Candidates):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            given.append(options["evidence"])
            super().__init__(*arguments, **options)

    monkeypatch.setattr(tuning_run, "Candidates", SeenCandidates)
    return given


def test_what_was_measured_of_near_shapes_is_evidence(
    tmp_path: Path, measured: type[CountingRunner], evidence_given: list[Any]
) -> None:
    autotune(LIVE, problems=[SMALL], trials=12, jobs=1, db=tmp_path)
    autotune(LIVE, problems=["M=128,N=64,K=128"], trials=2, jobs=1, db=tmp_path)
    autotune(LIVE, problems=["M=128,N=128,K=128"], trials=2, jobs=1, db=tmp_path)
    nothing, (near,), (farther,) = evidence_given
    assert not nothing
    assert near.reason == "near shape M=128→64"
    assert near.times_us == {config: 1.0 + config.BLOCK_M for _, config in measured.asked[:12]}
    assert farther.reason == "near shape M=128→64 N=128→64"  # two trials of another are no evidence


def test_shipped_records_are_evidence_for_a_search_that_measures_anew(
    tmp_path: Path,
    measured: type[CountingRunner],
    evidence_given: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    autotune(LIVE, problems=[SMALL], trials=12, jobs=1, db=tmp_path / "shipped")
    (best,) = autotune(LIVE, problems=[SMALL], trials=12, jobs=1, db=tmp_path / "shipped")
    shipped = list(measured.asked)
    monkeypatch.setenv(SHIPPED, str(tmp_path / "shipped"))
    measured.asked.clear()
    evidence_given.clear()
    (result,) = autotune(LIVE, problems=[SMALL], trials=4, jobs=1, db=tmp_path / "own")
    ((evidence,),) = evidence_given
    assert evidence.reason == "exact, shipped"
    assert set(evidence.times_us) == {config for _, config in shipped}
    assert not result.cached
    assert result.trials == len(measured.asked) == 4
    assert result.config["BLOCK_M"] == best.config["BLOCK_M"]  # as fast as the best: evidence recommends it


def test_predictions_are_searched_without_evidence(tmp_path: Path, counted: type[CountingRunner]) -> None:
    for problem in (SMALL, "M=128,N=64,K=128"):
        autotune(DEVICE, problems=[problem], trials=9, jobs=1, db=tmp_path)
    assert len(counted.asked) == 18


@pytest.mark.parametrize("device", [LIVE, DEVICE], ids=["measured", "predicted"])
@pytest.mark.parametrize(
    "options", [{"trials": 2}, {"trials": 3}, {"trials": 2, "retune": True}, {"storage": "sqlite"}]
)
def test_a_row_whose_configuration_is_none_is_named(
    tmp_path: Path, measured: type[CountingRunner], device: Device, options: dict[str, Any]
) -> None:
    path = autotune(device, problems=[SMALL], trials=2, jobs=1, db=tmp_path / "db").db
    with closing(sqlite3.connect(path)) as other, other:
        other.execute("UPDATE records SET config = '{}', median_us = 0.1, p10_us = 0.1 WHERE id = 2")
    if "storage" in options:
        options = {"storage": f"sqlite:///{tmp_path / 'studies.sqlite'}"}
    with pytest.raises(DatabaseCorruptError) as caught:
        autotune(device, problems=[SMALL], jobs=1, db=tmp_path / "db", **options)
    reason = "GemmConfig is missing BLOCK_M, BLOCK_N, BLOCK_K"
    assert str(caught.value) == f"{path}: record 2 is no record ({reason}): delete that row"
    assert check(path, objection) == [f"record 2: {reason}"]


@pytest.mark.parametrize(
    "changes", ["spill_bytes = 8", "registers = NULL, spill_bytes = NULL, stack_bytes = NULL, shared_bytes = NULL"]
)
def test_what_has_a_time_and_is_no_answer_is_no_trial(
    tmp_path: Path, measured: type[CountingRunner], changes: str
) -> None:
    path = autotune(DEVICE, problems=[SMALL], trials=1, jobs=1, db=tmp_path).db
    with closing(sqlite3.connect(path)) as other, other:
        other.execute(f"UPDATE records SET {changes}")
    (late,) = autotune(DEVICE, problems=[SMALL], trials=1, timeout=1e-9, jobs=1, db=tmp_path)
    assert (late.status, late.config, late.cached) == (Status.TIMEOUT, None, False)
    (result,) = autotune(DEVICE, problems=[SMALL], trials=1, jobs=1, db=tmp_path)
    assert (result.status, result.cached) == (Status.OK, False)
    assert result.config is not None
    assert len(set(measured.asked)) == 1
    assert len(measured.asked) == 2


def test_a_wait_for_other_runs_is_an_event(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waiting(MeasuringRunner):
        def run(self, *given: Any) -> Any:
            self.tell_wait("others measure")
            return super().run(*given)

    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: Waiting(compiler, device))
    events: list[Progress] = []
    problems = ["M=16,N=32,K=64", "M=16,N=32,K=128"]
    autotune(LIVE, problems=problems, trials=1, jobs=1, db=tmp_path, progress=events.append)
    assert [(event.index, event.done) for event in events if event.waits == "others measure"] == [(0, 0), (1, 0)]


class NoisyRunner(MeasuringRunner):
    """Everything takes 10 µs, give or take one; but the default, which takes a little longer."""

    compared: ClassVar[list[list[GemmConfig]]] = []
    default_us: ClassVar[float] = 10.1

    def _times(self, config: GemmConfig) -> Times:
        median_us = self.default_us if config == GEMM.default(GemmProblem.parse(SMALL), DEVICE) else 10.0
        return Times(median_us, median_us - 1, median_us + 1, 20)

    def run(self, kernel: Any, problem: Any, configs: Any, deadline: Any = None) -> Any:
        for config, outcome in super().run(kernel, problem, configs, deadline):
            yield config, replace(outcome, times=self._times(config))

    def finalists(self, kernel: Any, problem: Any, configs: Any, deadline: Any = None) -> Any:
        self.compared.append(configs)
        yield from self.run(kernel, problem, configs, deadline)


@pytest.mark.parametrize(("default_us", "stays"), [(10.1, True), (13.0, False)])
def test_the_default_stays_unless_it_is_beaten_beyond_noise(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch, default_us: float, stays: bool
) -> None:
    monkeypatch.setattr(NoisyRunner, "compared", [])
    monkeypatch.setattr(NoisyRunner, "default_us", default_us)
    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: NoisyRunner(compiler, device))
    problem = GemmProblem.parse(SMALL)
    default = GEMM.default(problem, DEVICE)
    (result,) = autotune(LIVE, problems=[SMALL], trials=8, jobs=1, db=tmp_path)
    assert (result.config == default.to_dict()) == stays
    assert default in NoisyRunner.compared[0]
    assert len(NoisyRunner.compared[0]) == tuning_run.FINALISTS + 1
    choice = recorded_choice(GEMM, problem, DEVICE, tmp_path)
    assert choice is not None
    assert (choice.config == default) == stays
    assert choice.provenance is Provenance.MEASURED


def test_one_that_only_seems_the_best_after_the_comparison_is_compared_too(
    tmp_path: Path, measured: type[CountingRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first measurements flatter: all that is measured again turns out slower than the rest."""

    class FlatteringRunner(NoisyRunner):
        def _times(self, config: GemmConfig) -> Times:
            again = any(config in finalists for finalists in self.compared)
            return Times.single(20.0 + config.BLOCK_M if again else 10.0 + config.BLOCK_M / 100)

    monkeypatch.setattr(NoisyRunner, "compared", [])
    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: FlatteringRunner(compiler, device))
    autotune(LIVE, problems=[SMALL], trials=30, jobs=1, db=tmp_path)
    assert len(NoisyRunner.compared) == tuning_run.FINALIST_ROUNDS
    assert all(len(each) >= tuning_run.FINALISTS for each in NoisyRunner.compared)
    assert not set(NoisyRunner.compared[0][:4]) & set(NoisyRunner.compared[1][:4])

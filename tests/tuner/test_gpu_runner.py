from __future__ import annotations

import math
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.simulated_worker import Scenario, read_journal, time_us
from tests.tuner.simulation import GPUS, simulated, space
from tests.tuner.simulation import PROBLEM as SMALL
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import TIMING_PROTOCOL
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import gpu_runner
from tilewright.tuner.gpu_runner import MEASURE_TIMEOUT_S, Effort, GpuRunner, equal_gpus
from tilewright.tuner.runner import Compiler
from tilewright.tuner.timing import BUDGET_S, CLEARLY_SLOWER
from tilewright.tuner.tune import autotune
from tilewright.tuning_db.errors import MachineError, UsageError, WorkerError
from tilewright.tuning_db.record import Provenance, Status
from tilewright.tuning_db.store import TuningDB

pytestmark = pytest.mark.smoke

GEMM = find_kernel("gemm")
DEVICE = replace(resolve_device("h200"), live="cuda:1")
PROBLEM = GemmProblem(M=1024, N=1024, K=1024)
FINE = {"registers": 100, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 32768}
TIMES = {"p10_us": 1.0, "p90_us": 999.0, "samples": 20}


class FakePool:
    jobs = 2

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.closed = False

    def submit(self, request: dict[str, Any], timeout: float) -> Future[dict[str, Any]]:
        self.requests.append(request)
        future: Future[dict[str, Any]] = Future()
        future.set_result(self.answer(request))
        return future

    def close(self) -> None:
        self.closed = True


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    if request["config"]["BLOCK_M"] == 256:
        return {"status": "compile_error", "message": "no"}
    return {"status": "ok", "resources": FINE, "num_warps": request["config"]["num_warps"]}


def measured(request: dict[str, Any]) -> dict[str, Any]:
    if "finalists" in request:
        timed = [{"status": "ok", "times": {"median_us": 7.0 + i, **TIMES}} for i in range(len(request["finalists"]))]
        return {"status": "ok", "finalists": timed}
    block = request["config"]["BLOCK_M"]
    if block == 16:
        return {"status": "incorrect", "message": "out[0, 3] is 1, should be 2"}
    return {"status": "ok", "times": {"median_us": float(block), **TIMES}}


@pytest.fixture
def runner() -> GpuRunner:
    compiler = Compiler(FakePool(compiled), DEVICE)  # type: ignore[arg-type]
    return GpuRunner(compiler, DEVICE, workers=FakePool(measured))  # type: ignore[arg-type]


def test_what_compiles_is_checked_and_measured(runner: GpuRunner) -> None:
    configs = [GemmConfig(m, 64, 32) for m in (16, 64, 128, 256)]
    found = {config.BLOCK_M: outcome for config, outcome in runner.run(GEMM, PROBLEM, configs)}
    assert {m: outcome.status for m, outcome in found.items()} == {
        16: Status.INCORRECT,
        64: Status.OK,
        128: Status.OK,
        256: Status.COMPILE_ERROR,
    }
    assert found[16].times is None
    assert found[16].message == "out[0, 3] is 1, should be 2"
    assert found[64].times.median_us == 64
    assert found[64].resources.registers == 100
    assert found[64].predicted_us > 0
    asked = runner._workers.requests  # type: ignore[attr-defined]
    assert sorted(request["config"]["BLOCK_M"] for request in asked) == [16, 64, 128]
    assert all(request["do"] == "measure" and request["check"] and not request["skip_ragged"] for request in asked)
    assert runner.provenance is Provenance.MEASURED
    assert runner.protocol == TIMING_PROTOCOL


def test_clearly_slower_ones_may_stop_early(runner: GpuRunner) -> None:
    for config in (GemmConfig(64, 64, 32), GemmConfig(128, 64, 32), GemmConfig(32, 64, 32)):
        list(runner.run(GEMM, PROBLEM, [config]))
    limits = [request["give_up_above_us"] for request in runner._workers.requests]  # type: ignore[attr-defined]
    assert limits == [None, 64 * CLEARLY_SLOWER, 64 * CLEARLY_SLOWER]


def test_a_survey_asks_for_less(runner: GpuRunner) -> None:
    list(runner.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32)]))
    workers, compilers = FakePool(measured), FakePool(compiled)
    effort = Effort(check=False, ragged=False, clearly_slower=20.0, budget_s=0.05)
    survey = GpuRunner(Compiler(compilers, DEVICE), DEVICE, workers=workers, effort=effort)  # type: ignore[arg-type]
    list(survey.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32)]))
    list(survey.run(GEMM, PROBLEM, [GemmConfig(32, 64, 32)]))
    usual, one, other = (*runner._workers.requests, *workers.requests)  # type: ignore[attr-defined]
    assert (usual["check"], usual["skip_ragged"], usual["budget_s"]) == (True, "", BUDGET_S)
    assert (one["check"], one["skip_ragged"], one["budget_s"]) == (False, "not wanted", 0.05)
    assert (one["give_up_above_us"], other["give_up_above_us"]) == (None, 64 * 20.0)
    assert [request["problem"] for request in compilers.requests] == [PROBLEM.to_dict()] * 2  # no ragged one


@pytest.mark.parametrize("check", [True, False])
def test_finalists_are_checked_as_their_trials_are(check: bool) -> None:
    workers = FakePool(measured)
    compiler = Compiler(FakePool(compiled), DEVICE)  # type: ignore[arg-type]
    runner = GpuRunner(compiler, DEVICE, workers=workers, effort=Effort(check=check))  # type: ignore[arg-type]
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    list(runner.run(GEMM, PROBLEM, configs))
    list(runner.finalists(GEMM, PROBLEM, configs))
    assert [request["check"] for request in workers.requests] == [check] * 3


def test_finalists_are_measured_again_together(runner: GpuRunner) -> None:
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    found = dict(runner.finalists(GEMM, PROBLEM, configs))
    assert [found[config].times.median_us for config in configs] == [7, 8]
    assert not list(runner.finalists(GEMM, PROBLEM, configs[:1]))


def test_a_finalist_that_fails_the_second_time_is_an_outcome(runner: GpuRunner) -> None:
    wrong = {"status": "incorrect", "message": "out[0, 0] is 3, should be 2"}
    right = {"status": "ok", "times": {"median_us": 7.0, **TIMES}}
    runner._workers.answer = lambda request: {"status": "ok", "finalists": [wrong, right]}  # type: ignore[attr-defined]
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    found = dict(runner.finalists(GEMM, PROBLEM, configs))
    assert found[configs[0]].status is Status.INCORRECT
    assert found[configs[0]].times is None
    assert found[configs[0]].message == wrong["message"]
    assert found[configs[1]].status is Status.OK


def test_a_comparison_that_fails_as_a_whole_takes_nothing_back(runner: GpuRunner) -> None:
    runner._workers.answer = lambda request: {"status": "timeout", "message": "killed"}  # type: ignore[attr-defined]
    assert not list(runner.finalists(GEMM, PROBLEM, [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]))


def test_a_ragged_problem_that_breaks_the_compiler_does_not_break_the_measuring_process_too(
    runner: GpuRunner,
) -> None:
    def ragged_hangs(request: dict[str, Any]) -> dict[str, Any]:
        hangs = request["problem"] != PROBLEM.to_dict() and request["config"]["BLOCK_M"] == 64
        return {"status": "timeout", "message": "no answer in 60 s: killed"} if hangs else compiled(request)

    runner._compiler._pool.answer = ragged_hangs  # type: ignore[attr-defined]
    found = dict(runner.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]))
    assert {outcome.status for outcome in found.values()} == {Status.OK}
    asked = runner._workers.requests  # type: ignore[attr-defined]
    assert {request["config"]["BLOCK_M"]: request["skip_ragged"] for request in asked} == {
        64: "no answer in 60 s: killed",
        128: "",
    }


BUSY = {"status": "timeout", "busy": True, "message": "others measure on 0000:17:00.0 since 20 s"}


def test_a_gpu_that_others_have_is_waited_for(runner: GpuRunner) -> None:
    left = [3]

    def busy_at_first(request: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        return BUSY if left[0] >= 0 else measured(request)

    runner._workers.answer = busy_at_first  # type: ignore[attr-defined]
    config = GemmConfig(64, 64, 32)
    ((_, outcome),) = runner.run(GEMM, PROBLEM, [config])
    assert (outcome.status, outcome.times.median_us) == (Status.OK, 64)
    left[0] = 2
    configs = [config, GemmConfig(128, 64, 32)]
    assert [outcome.times.median_us for _, outcome in runner.finalists(GEMM, PROBLEM, configs)] == [7, 8]
    assert all("locks" in request for request in runner._workers.requests)  # type: ignore[attr-defined]


def test_a_wait_for_a_gpu_is_told_as_it_begins(runner: GpuRunner) -> None:
    told: list[str] = []
    runner.tell_wait = told.append
    left = [3]

    def busy_at_first(request: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        return BUSY if left[0] >= 0 else measured(request)

    runner._workers.answer = busy_at_first  # type: ignore[attr-defined]
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    list(runner.run(GEMM, PROBLEM, configs))
    assert told == [BUSY["message"]]
    left[0] = 2
    list(runner.finalists(GEMM, PROBLEM, configs))
    assert told == [BUSY["message"]] * 2


def test_when_the_time_is_up_a_busy_gpu_is_no_outcome(runner: GpuRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def past_after_asking(deadline: float | None) -> bool:
        return bool(asked)

    def busy(request: dict[str, Any]) -> dict[str, Any]:
        asked.append(request)
        return BUSY

    monkeypatch.setattr(gpu_runner, "is_past", past_after_asking)
    runner._workers.answer = busy  # type: ignore[attr-defined]
    assert list(runner.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32)], time.monotonic() + 60)) == []
    assert len(asked) == 1


KILLED = {"status": "runtime_error", "message": "the measurement was killed (SIGKILL)", "killed": True}


def test_a_process_that_somebody_has_killed_gets_a_second_try(runner: GpuRunner) -> None:
    def killed_at_first(request: dict[str, Any]) -> dict[str, Any]:
        begun = [each["config"] for each in runner._workers.requests]  # type: ignore[attr-defined]
        block = request["config"]["BLOCK_M"]
        return KILLED if block == 64 or begun.count(request["config"]) == 1 else measured(request)

    runner._workers.answer = killed_at_first  # type: ignore[attr-defined]
    configs = [GemmConfig(m, 64, 32) for m in (16, 64, 128)]
    found = {config.BLOCK_M: outcome for config, outcome in runner.run(GEMM, PROBLEM, configs)}
    assert {m: (outcome.status, outcome.message) for m, outcome in found.items()} == {
        16: (Status.INCORRECT, f"out[0, 3] is 1, should be 2; at first, {KILLED['message']}"),
        64: (Status.RUNTIME_ERROR, KILLED["message"]),
        128: (Status.OK, f"at first, {KILLED['message']}"),
    }
    assert found[128].times.median_us == 128
    assert len(runner._workers.requests) == 6  # type: ignore[attr-defined]


def test_what_the_pool_has_compiled_twice_is_not_tried_again(runner: GpuRunner) -> None:
    killed = {"status": "compile_error", "message": "`ptxas` failed with error code -9", "killed": True}
    runner._workers.answer = lambda request: killed  # type: ignore[attr-defined]
    ((_, outcome),) = runner.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32)])
    assert (outcome.status, outcome.message) == (Status.COMPILE_ERROR, killed["message"])
    assert len(runner._workers.requests) == 1  # type: ignore[attr-defined]


def test_a_process_that_dies_by_itself_gets_no_second_try(runner: GpuRunner) -> None:
    aborted = {"status": "runtime_error", "message": "the measurement aborted (SIGABRT)"}
    runner._workers.answer = lambda request: aborted  # type: ignore[attr-defined]
    ((_, outcome),) = runner.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32)])
    assert outcome.message == aborted["message"]
    assert len(runner._workers.requests) == 1  # type: ignore[attr-defined]


class HeldPool(FakePool):
    """Answers when it is told to, and not before."""

    def __init__(self, answer: Any) -> None:
        super().__init__(answer)
        self.held: list[tuple[dict[str, Any], Future[dict[str, Any]]]] = []

    def submit(self, request: dict[str, Any], timeout: float) -> Future[dict[str, Any]]:
        self.requests.append({**request, "timeout": timeout})
        future: Future[dict[str, Any]] = Future()
        self.held.append((request, future))
        return future

    def let_go(self) -> None:
        while not self.held:  # who asks may be slow to
            time.sleep(0.001)
        request, future = self.held.pop(0)
        if future.set_running_or_notify_cancel():
            future.set_result(self.answer(request))


def test_a_gpu_gets_its_next_trial_when_the_last_outcome_was_taken() -> None:
    pool = HeldPool(measured)
    gpus = [replace(DEVICE, live=f"cuda:{ordinal}") for ordinal in (1, 0)]
    runner = GpuRunner(Compiler(FakePool(compiled), DEVICE), DEVICE, gpus, pool)  # type: ignore[arg-type]
    outcomes = runner.run(GEMM, PROBLEM, [GemmConfig(m, 64, 32) for m in (16, 32, 64, 128)])
    taken = []
    for begun in (2, 3, 4, 4):
        threading.Timer(0.05, pool.let_go).start()
        taken.append(next(outcomes))
        assert len(pool.requests) == begun  # the next one is not begun before this one can be put on record
    assert not list(outcomes)
    assert len({config for config, _ in taken}) == 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which only the test moves."""
    now = [0.0]
    monkeypatch.setattr(gpu_runner.time, "monotonic", lambda: now[0])
    return now


def test_after_the_deadline_only_what_is_being_measured_is_finished(clock: list[float]) -> None:
    def slowly(request: dict[str, Any]) -> dict[str, Any]:
        clock[0] += 4.0
        return measured(request)

    compilers, pool = HeldPool(compiled), FakePool(slowly)
    runner = GpuRunner(Compiler(compilers, DEVICE), DEVICE, workers=pool)  # type: ignore[arg-type]
    compiling = [GemmConfig(m, 64, 32) for m in (32, 64, 128, 16)]
    for config in compiling[:3]:
        runner._compile(GEMM, PROBLEM, config)
    while compilers.held:
        compilers.let_go()
    # Three are compiled and one, the last, is in the queue. The third is begun after 8 s of 10.
    outcomes = list(runner.run(GEMM, PROBLEM, compiling[3:] + compiling[:3], deadline=10.0))
    assert [config for config, _ in outcomes] == compiling[:3]
    assert len(pool.requests) == 3
    assert len(compilers.held) == 2
    assert all(future.cancelled() for _, future in compilers.held)


@pytest.mark.parametrize("seconds", [1e10, math.inf])
def test_a_deadline_may_be_as_far_off_as_one_likes(seconds: float) -> None:
    compilers = HeldPool(compiled)
    runner = GpuRunner(Compiler(compilers, DEVICE), DEVICE, workers=FakePool(measured))  # type: ignore[arg-type]
    timer = threading.Timer(0.05, lambda: [compilers.let_go() for _ in range(2)])
    outcomes = runner.run(GEMM, PROBLEM, [GemmConfig(64, 64, 32)], time.monotonic() + seconds)
    timer.start()
    ((_, outcome),) = outcomes
    assert outcome.status is Status.OK


def test_nothing_is_begun_when_the_deadline_came_while_an_outcome_was_taken(
    runner: GpuRunner, clock: list[float]
) -> None:
    outcomes = runner.run(GEMM, PROBLEM, [GemmConfig(256, 64, 32), GemmConfig(64, 64, 32)], deadline=10.0)
    config, outcome = next(outcomes)
    assert (config.BLOCK_M, outcome.status) == (256, Status.COMPILE_ERROR)
    clock[0] = 11.0
    assert not list(outcomes)
    assert not runner._workers.requests  # type: ignore[attr-defined]


def test_the_last_comparison_is_within_the_trial_that_may_overrun(runner: GpuRunner) -> None:
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    runner._workers = pool = HeldPool(measured)  # type: ignore[assignment]
    now = time.monotonic()
    for deadline, least, most in (
        (None, 2 * MEASURE_TIMEOUT_S, 2 * MEASURE_TIMEOUT_S),
        (now + 1e6, 2 * MEASURE_TIMEOUT_S, 2 * MEASURE_TIMEOUT_S),
        (now + 5, MEASURE_TIMEOUT_S, MEASURE_TIMEOUT_S + 5),
        (now - 20, MEASURE_TIMEOUT_S - 30, MEASURE_TIMEOUT_S - 20),
    ):
        threading.Timer(0.05, pool.let_go).start()
        assert dict(runner.finalists(GEMM, PROBLEM, configs, deadline))
        assert least <= pool.requests[-1]["timeout"] <= most
    assert not list(runner.finalists(GEMM, PROBLEM, configs, now - MEASURE_TIMEOUT_S - 1))
    assert len(pool.requests) == 4


# Several GPUs


FULL = MachineError("the machine failed the worker: no space left on device")


class FailingPool(FakePool):
    """One whose answers may be errors: from the future, or raised at once where a pool knows by then."""

    def __init__(self, answer: Any, at_once: bool = False) -> None:
        super().__init__(answer)
        self.at_once = at_once

    def submit(self, request: dict[str, Any], timeout: float) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        answer = self.answer(request)
        if isinstance(answer, Exception):
            if self.at_once:
                raise answer
            future.set_exception(answer)
        else:
            future.set_result(answer)
        return future


def kept_of(compilers: FakePool, workers: FakePool, blocks: tuple[int, ...], error: type[Exception]) -> set[int]:
    """The configurations with an outcome, by BLOCK_M, of a run on two GPUs that ends in an error."""
    gpus = [replace(DEVICE, live=f"cuda:{ordinal}") for ordinal in (0, 1)]
    runner = GpuRunner(Compiler(compilers, DEVICE), DEVICE, gpus, workers)  # type: ignore[arg-type]
    kept: list[int] = []
    outcomes = runner.run(GEMM, PROBLEM, [GemmConfig(block, 64, 32) for block in blocks])
    with pytest.raises(error):
        kept.extend(config.BLOCK_M for config, _ in outcomes)  # one after another, up to the error
    return set(kept)


def test_what_is_measured_beside_one_that_the_machine_failed_is_kept() -> None:
    workers = FailingPool(lambda request: FULL if request["config"]["BLOCK_M"] == 64 else measured(request))
    assert kept_of(FakePool(compiled), workers, (64, 128), MachineError) == {128}


@pytest.mark.parametrize("ragged", [False, True])
def test_what_is_measured_beside_a_compilation_that_the_machine_failed_is_kept(ragged: bool) -> None:
    def full(request: dict[str, Any]) -> Any:
        of_ragged = request["problem"] != PROBLEM.to_dict()
        return FULL if request["config"]["BLOCK_M"] == 64 and of_ragged == ragged else compiled(request)

    # One is measured, one was refused by the compiler, and the GPU that is free is for the one in between.
    assert kept_of(FailingPool(full), FakePool(measured), (128, 64, 256), MachineError) == {128, 256}


def test_what_is_measured_when_no_worker_is_left_is_kept() -> None:
    gone = WorkerError("a worker process can't be started")
    workers = FailingPool(lambda request: gone if request["config"]["BLOCK_M"] == 64 else measured(request), True)
    assert kept_of(FakePool(compiled), workers, (128, 64), WorkerError) == {128}


TWO_OF_A_KIND = (
    replace(DEVICE, live="cuda:0"),
    replace(resolve_device("a10"), live="cuda:1"),
    replace(DEVICE, live="cuda:2"),
)


def test_each_worker_has_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(gpu_runner, "Pool", lambda jobs, arguments: made.append((jobs, arguments)))
    compiler = Compiler(FakePool(compiled), DEVICE)  # type: ignore[arg-type]
    GpuRunner(compiler, DEVICE)
    GpuRunner(compiler, DEVICE, [TWO_OF_A_KIND[2], TWO_OF_A_KIND[0]])
    assert made == [(1, [("--gpu", "1")]), (2, [("--gpu", "2"), ("--gpu", "0")])]


def test_gpus_of_the_same_board_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_runner, "live_devices", lambda: TWO_OF_A_KIND)
    first, stranger, last = TWO_OF_A_KIND
    assert equal_gpus(last, 1) == (last,)
    assert equal_gpus(last, 2) == (last, first)
    with pytest.raises(UsageError) as caught:
        equal_gpus(first, 3)
    assert str(caught.value) == (
        "workers=3 need as many GPUs of h200-132sm: here are cuda:0, cuda:2 (cuda:1 is a10-72sm)"
    )
    with pytest.raises(UsageError, match="workers=2 need as many GPUs of a10-72sm: here are cuda:1 "):
        equal_gpus(stranger, 2)


def test_workers_need_a_gpu() -> None:
    absent = resolve_device("h200")
    assert equal_gpus(absent, 1) == ()
    with pytest.raises(UsageError, match="workers=2 need a GPU each, and h200 is not here"):
        equal_gpus(absent, 2)
    with pytest.raises(UsageError, match="workers=0 must be at least 1"):
        equal_gpus(absent, 0)


def test_several_gpus_measure_at_once_and_each_configuration_once(tmp_path: Path) -> None:
    compiling = Scenario(str(tmp_path / "compiling"))
    measuring = Scenario(str(tmp_path / "measuring"), together=3)  # each waits until there are three
    with simulated(compiling, measuring, tmp_path):
        results = autotune(GPUS[1], problems=[SMALL], trials=25, jobs=2, workers=3, db=tmp_path / "db")
    notes = read_journal(tmp_path / "measuring")
    trials = [note for note in notes if note["config"] and note["moment"] == "begin"]
    assert {note["ordinal"] for note in trials[:3]} == {0, 1, 2}
    assert len({(note["pid"], note["ordinal"]) for note in notes}) == 3
    measured_configs = [GemmConfig.from_dict(note["config"]) for note in trials]
    assert len(measured_configs) == 25
    assert set(measured_configs) == set(space())
    assert results.results[0].config == min((config.to_dict() for config in space()), key=time_us)
    # Compilers are shared: no more of them than were asked for.
    assert len({note["pid"] for note in read_journal(tmp_path / "compiling")}) <= 2


@pytest.mark.parametrize("absent", [[0], [0, 1]])
def test_a_gpu_that_cannot_be_had_is_no_fault_of_the_configurations(tmp_path: Path, absent: list[int]) -> None:
    scenario = Scenario(str(tmp_path / "journal"), absent=absent)
    with simulated(scenario, scenario, tmp_path):
        if absent == [0]:  # the other one does all the work
            results = autotune(GPUS[0], problems=[SMALL], trials=6, jobs=1, workers=2, db=tmp_path / "db")
            (lost,) = results.lost_workers
            assert "--gpu 0" in lost
            assert lost.endswith("CUDARuntimeError: cuda:0 is busy or unavailable")
        else:
            with pytest.raises(WorkerError, match=r"CUDARuntimeError: cuda:[01] is busy or unavailable"):
                autotune(GPUS[0], problems=[SMALL], trials=6, jobs=1, workers=2, db=tmp_path / "db")
    with TuningDB.open(GPUS[0].key, tmp_path / "db", read_only=True) as database:
        assert [record.status for record in database.find()] == ([Status.OK] * 6 if absent == [0] else [])


def test_closing_ends_the_worker(runner: GpuRunner) -> None:
    runner.close()
    assert runner._workers.closed  # type: ignore[attr-defined]

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.prediction import MODEL, predict
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import runner as runner_module
from tilewright.tuner.runner import Compiler, PredictionRunner
from tilewright.tuning_db.record import Provenance, Resources, Status

pytestmark = pytest.mark.smoke

GEMM = find_kernel("gemm")
DEVICE = resolve_device("rtx3090")
PROBLEM = GemmProblem(M=1024, N=1024, K=1024)
FINE = {"registers": 100, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 32768}


class FakePool:
    """Answers as a pool of workers would, from a table of BLOCK_M; counts what it is asked."""

    jobs = 2

    def __init__(self, replies: dict[int, dict[str, Any]] | None = None) -> None:
        self.replies = replies or {}
        self.requests: list[dict[str, Any]] = []

    def submit(self, request: dict[str, Any], timeout: float) -> Future[dict[str, Any]]:
        self.requests.append(request)
        future: Future[dict[str, Any]] = Future()
        good = {"status": "ok", "resources": FINE, "num_warps": request["config"]["num_warps"]}
        future.set_result(self.replies.get(request["config"]["BLOCK_M"], good))
        return future


def outcomes(pool: FakePool, configs: list[GemmConfig]) -> dict[int, Any]:
    runner = PredictionRunner(Compiler(pool, DEVICE), DEVICE)  # type: ignore[arg-type]
    return {config.BLOCK_M: outcome for config, outcome in runner.run(GEMM, PROBLEM, configs)}


def test_every_configuration_gets_one_outcome_whatever_becomes_of_it() -> None:
    pool = FakePool(
        {
            32: {"status": "compile_error", "message": "ptxas refused"},
            64: {"status": "timeout", "message": "no answer in 60 s: killed"},
            128: {"status": "ok", "resources": {**FINE, "spill_bytes": 8}, "num_warps": 4},
            256: {"status": "ok", "resources": {**FINE, "shared_bytes": 200_000}, "num_warps": 4},
        }
    )
    found = outcomes(pool, [GemmConfig(m, 64, 32) for m in (16, 32, 64, 128, 256)])
    assert {m: outcome.status for m, outcome in found.items()} == {
        16: Status.OK,
        32: Status.COMPILE_ERROR,
        64: Status.TIMEOUT,
        128: Status.OUT_OF_RESOURCES,
        256: Status.OUT_OF_RESOURCES,
    }
    assert found[32].message == "ptxas refused"
    assert "8 B a thread spill" in found[128].message
    assert "200000 B of shared memory are over the 101376 B" in found[256].message
    assert all(found[m].times is None for m in (32, 64, 128, 256))


def test_the_prediction_is_from_the_compiled_resources() -> None:
    config = GemmConfig(64, 64, 32)
    heavy = {**FINE, "registers": 250}
    time_us = outcomes(FakePool({64: {"status": "ok", "resources": heavy, "num_warps": 4}}), [config])[64].times
    expected = predict(GEMM.work(PROBLEM, config), Resources(**heavy), DEVICE).time_us
    assert time_us.median_us == expected
    assert expected != predict(GEMM.work(PROBLEM, config), Resources(**FINE), DEVICE).time_us
    assert PredictionRunner.provenance is Provenance.PREDICTED
    assert PredictionRunner.protocol == MODEL


def test_problems_that_need_the_same_code_compile_it_once() -> None:
    pool = FakePool()
    compiler = Compiler(pool, DEVICE)  # type: ignore[arg-type]
    config = GemmConfig(64, 64, 32)
    for m in (1024, 2048, 4096):
        compiler.submit(GEMM, GemmProblem(M=m, N=1024, K=1024), config)
    assert len(pool.requests) == 1
    compiler.submit(GEMM, GemmProblem(M=1000, N=1024, K=1024), config)  # rows need a mask: other code
    assert len(pool.requests) == 2
    assert compiler.compiled == 2


def test_refused_configurations_do_not_count_as_compiled() -> None:
    pool = FakePool({32: {"status": "compile_error", "message": "no"}})
    compiler = Compiler(pool, DEVICE)  # type: ignore[arg-type]
    for m in (32, 64):
        compiler.submit(GEMM, PROBLEM, GemmConfig(m, 64, 32))
    assert compiler.compiled == 1


class SlowPool(FakePool):
    """Answers one request after 0.4 s; the others stay in its queue."""

    def submit(self, request: dict[str, Any], timeout: float) -> Future[dict[str, Any]]:
        answered = super().submit(request, timeout).result()
        future: Future[dict[str, Any]] = Future()
        if len(self.requests) == 1:
            future.set_running_or_notify_cancel()
            threading.Timer(0.4, future.set_result, [answered]).start()
        return future


def test_no_more_is_begun_than_there_are_workers_for_until_outcomes_are_taken() -> None:
    pool = FakePool()
    runner = PredictionRunner(Compiler(pool, DEVICE), DEVICE)  # type: ignore[arg-type]
    outcomes = runner.run(GEMM, PROBLEM, [GemmConfig(m, 64, 32) for m in (16, 32, 64, 128)])
    for taken in range(4):
        next(outcomes)
        assert len(pool.requests) <= taken + 2
    assert not list(outcomes)
    assert len(pool.requests) == 4


def test_after_the_deadline_only_what_is_being_compiled_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(runner_module.time, "monotonic", lambda: now[0])
    pool = FakePool()
    runner = PredictionRunner(Compiler(pool, DEVICE), DEVICE)  # type: ignore[arg-type]
    configs = [GemmConfig(m, 64, 32) for m in (16, 32, 64, 128)]
    found = []
    for config, outcome in runner.run(GEMM, PROBLEM, configs, deadline=10.0):
        assert outcome.status is Status.OK
        found.append(config)
        now[0] += 11.0
    assert sorted(config.BLOCK_M for config in found) == [16, 32]
    assert len(pool.requests) == 2
    assert not list(runner.run(GEMM, PROBLEM, configs, deadline=10.0))


def test_what_a_worker_has_taken_up_is_not_taken_back() -> None:
    compiler = Compiler(SlowPool(), DEVICE)  # type: ignore[arg-type]
    running = compiler.submit(GEMM, PROBLEM, GemmConfig(32, 64, 32))
    waiting = compiler.submit(GEMM, PROBLEM, GemmConfig(64, 64, 32))
    assert not compiler.withdraw(running)
    assert compiler.withdraw(waiting)
    assert running.result()["status"] == "ok"
    assert waiting.cancelled()

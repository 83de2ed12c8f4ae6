from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import TIMING_PROTOCOL
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.gpu_runner import GpuRunner
from tilewright.tuner.runner import Compiler
from tilewright.tuner.timing import CLEARLY_SLOWER
from tilewright.tuning_db.record import Provenance, Status

pytestmark = pytest.mark.smoke

GEMM = find_kernel("gemm")
DEVICE = replace(resolve_device("h200"), live="cuda:1")
PROBLEM = GemmProblem(M=1024, N=1024, K=1024)
FINE = {"registers": 100, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 32768}
TIMES = {"p10_us": 1.0, "p90_us": 99.0, "samples": 20}


class FakePool:
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
    return GpuRunner(compiler, DEVICE, FakePool(measured))  # type: ignore[arg-type]


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
    asked = runner._worker.requests  # type: ignore[attr-defined]
    assert sorted(request["config"]["BLOCK_M"] for request in asked) == [16, 64, 128]
    assert all(request["do"] == "measure" and request["ordinal"] == 1 and request["check"] for request in asked)
    assert runner.provenance is Provenance.MEASURED
    assert runner.protocol == TIMING_PROTOCOL


def test_clearly_slower_ones_may_stop_early(runner: GpuRunner) -> None:
    for config in (GemmConfig(64, 64, 32), GemmConfig(128, 64, 32), GemmConfig(32, 64, 32)):
        list(runner.run(GEMM, PROBLEM, [config]))
    limits = [request["give_up_above_us"] for request in runner._worker.requests]  # type: ignore[attr-defined]
    assert limits == [None, 64 * CLEARLY_SLOWER, 64 * CLEARLY_SLOWER]


def test_finalists_are_measured_again_together(runner: GpuRunner) -> None:
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    found = dict(runner.finalists(GEMM, PROBLEM, configs))
    assert [found[config].times.median_us for config in configs] == [7, 8]
    assert not list(runner.finalists(GEMM, PROBLEM, configs[:1]))


def test_a_finalist_that_fails_the_second_time_is_an_outcome(runner: GpuRunner) -> None:
    wrong = {"status": "incorrect", "message": "out[0, 0] is 3, should be 2"}
    right = {"status": "ok", "times": {"median_us": 7.0, **TIMES}}
    runner._worker.answer = lambda request: {"status": "ok", "finalists": [wrong, right]}  # type: ignore[attr-defined]
    configs = [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]
    found = dict(runner.finalists(GEMM, PROBLEM, configs))
    assert found[configs[0]].status is Status.INCORRECT
    assert found[configs[0]].times is None
    assert found[configs[0]].message == wrong["message"]
    assert found[configs[1]].status is Status.OK


def test_a_comparison_that_fails_as_a_whole_takes_nothing_back(runner: GpuRunner) -> None:
    runner._worker.answer = lambda request: {"status": "timeout", "message": "killed"}  # type: ignore[attr-defined]
    assert not list(runner.finalists(GEMM, PROBLEM, [GemmConfig(64, 64, 32), GemmConfig(128, 64, 32)]))


def test_closing_ends_the_worker(runner: GpuRunner) -> None:
    runner.close()
    assert runner._worker.closed  # type: ignore[attr-defined]

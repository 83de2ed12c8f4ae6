"""Whether requests and replies have the fields that are declared of them: mypy sees what is made here, not what comes
as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NotRequired, get_args, get_origin, get_type_hints

import pytest

from tests.tuner.measuring import compare_request, measure_request
from tests.tuner.simulated_gpu import SimulatedGpu
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.tuner import measure, requests, timing
from tilewright.tuner.gpu_runner import GpuRunner
from tilewright.tuner.requests import (
    CompileReply,
    CompileRequest,
    FinalistsReply,
    FinalistsRequest,
    MeasureReply,
    MeasureRequest,
)
from tilewright.tuner.runner import Compiler
from tilewright.tuner.worker import TASKS, compile_task

pytestmark = pytest.mark.smoke

PROBLEM = GemmProblem(M=40, N=48, K=64)
CONFIGS = [GemmConfig(32, 32, 32, num_stages=2), GemmConfig(16, 32, 32, num_stages=2)]
WRONG = replace(CONFIGS[0], BLOCK_K=8)


class NotingPool:
    """Keeps what it is asked, and has no answer."""

    jobs = 1

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Any]] = []

    def submit(self, request: Mapping[str, Any], timeout: float) -> Future[Any]:
        self.asked.append(request)
        future: Future[Any] = Future()
        future.set_result({"status": "runtime_error", "message": "no answer"})
        return future


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    monkeypatch.setattr(timing, "MOST_SETTLE_S", 0.0)  # there is no power limit to wait for
    measure.forget()
    yield SimulatedGpu()
    measure.forget()


def conforms(message: Mapping[str, Any], kind: Any) -> bool:
    hints = get_type_hints(kind, include_extras=True)
    needed = {name for name, hint in hints.items() if get_origin(hint) is not NotRequired}
    return needed <= message.keys() <= hints.keys()


def test_there_is_a_request_for_every_task() -> None:
    kinds = [kind for name, kind in vars(requests).items() if name.endswith("Request")]
    assert {get_args(get_type_hints(kind)["do"])[0] for kind in kinds} == TASKS.keys()


def test_a_runner_asks_for_what_is_declared() -> None:
    compiling, measuring = NotingPool(), NotingPool()
    device = replace(resolve_device("a100"), live="cuda:0")
    compiler = Compiler(compiling, device)  # type: ignore[arg-type]
    runner = GpuRunner(compiler, device, workers=measuring)  # type: ignore[arg-type]
    trial = runner._compile(GEMM, PROBLEM, CONFIGS[0])
    runner._measure(GEMM, PROBLEM, trial)
    list(runner.finalists(GEMM, PROBLEM, CONFIGS))
    assert compiling.asked
    assert all(conforms(request, CompileRequest) for request in compiling.asked)
    assert conforms(measuring.asked[0], MeasureRequest)
    assert conforms(measuring.asked[1], FinalistsRequest)


@pytest.mark.parametrize("config", [CONFIGS[0], WRONG], ids=["ok", "invalid"])
def test_a_measurement_replies_what_is_declared(gpu: SimulatedGpu, config: GemmConfig) -> None:
    reply = measure.measure_on(gpu, measure_request("gemm", PROBLEM, config))  # type: ignore[arg-type]
    assert conforms(reply, MeasureReply), reply
    reply = measure.measure_on(gpu, compare_request("gemm", PROBLEM, [*CONFIGS, config]))  # type: ignore[arg-type]
    assert conforms(reply, FinalistsReply), reply
    assert all(conforms(each, MeasureReply) for each in reply["finalists"])


def test_a_failed_compilation_replies_what_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.kernels import compile as compiling
    from tilewright.tuning_db.errors import CompileError

    def refuse(*_: object) -> None:
        raise CompileError("no")

    monkeypatch.setattr(compiling, "compile_launch", refuse)
    request = {"do": "compile", "op": "gemm", "arch": 80}
    reply = compile_task({**request, "problem": PROBLEM.to_dict(), "config": CONFIGS[0].to_dict()})
    assert (reply["status"], conforms(reply, CompileReply)) == ("compile_error", True)

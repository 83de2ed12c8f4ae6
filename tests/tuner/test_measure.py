"""What the measuring process answers, on a simulated GPU: host memory, interpreted kernels, and invented times."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.tuner.in_place import HALVE, HalveConfig, HalveProblem, lazy_kernel
from tests.tuner.measuring import compare_request, measure_request
from tests.tuner.simulated_gpu import CudaError, SimulatedGpu
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Kernel, Launch
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.registry import KERNELS
from tilewright.kernels.runtime import InterpretedPlan, Plan, Run
from tilewright.tuner import measure as module
from tilewright.tuner import timing
from tilewright.tuner.measure import Bench, measure, measure_on
from tilewright.tuning_db.errors import CompileError, LaunchError, ProblemError, UnknownKernelError, UnsupportedError
from tilewright.tuning_db.record import Resources, Times

PROBLEM = GemmProblem(M=40, N=48, K=64, bias="fp16", activation="relu")
CONFIG = GemmConfig(32, 32, 32, num_stages=2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpu]:
    simulated = SimulatedGpu()
    monkeypatch.setattr(module, "_gpus", {0: simulated})
    monkeypatch.setattr(timing, "MOST_SETTLE_S", 0.0)  # there is no power limit to wait for
    module.forget()
    yield simulated
    module.forget()


def request(problem: GemmProblem = PROBLEM, config: GemmConfig = CONFIG, **more: Any) -> dict[str, Any]:
    return measure_request("gemm", problem, config, **more)


def test_a_right_configuration_is_checked_and_timed(gpu: SimulatedGpu) -> None:
    reply = measure(request(seed=1, give_up_above_us=None, check=True))
    assert json.loads(json.dumps(reply)) == {
        "status": "ok",
        "resources": {"registers": 64, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 8192},
        "times": {"median_us": 10.0, "p10_us": 10.0, "p90_us": 10.0, "samples": 10},
        "gave_up": False,
        "settled": True,
        "method": "replay",
        "ragged": "passed",
        "clocks": {"sm_mhz": 1410},
    }
    assert Times(**reply["times"]).median_us == 10.0
    assert Resources(**reply["resources"]).registers == 64


def test_the_samples_take_the_budget_that_is_asked_for(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def time_one(sampler: Any, **options: Any) -> Any:
        asked.append(options)
        return timing.time_one(sampler, **options)

    monkeypatch.setattr(module, "time_one", time_one)
    measure(request())
    measure(request(budget_s=0.05, give_up_above_us=20.0))
    assert asked == [
        {"give_up_above_us": None, "budget_s": timing.BUDGET_S},
        {"give_up_above_us": 20.0, "budget_s": 0.05},
    ]


SHAPES = {
    "plain": {},
    "bf16": {"dtype": "bf16", "residual": "bf16"},
    "fp8": {"dtype": "fp8e5m2", "out_dtype": "fp16"},
    "fp32": {"dtype": "fp32", "precision": "tf32", "alpha": True},
    "columns": {"a_layout": "col", "b_layout": "col"},
    "batch": {"batch": 2, "a_broadcast": True, "residual": "fp32", "residual_broadcast": True},
    "strided": {"strided": True, "batch": 2, "b_layout": "col", "residual": "fp16"},
    "strided, unaligned": {"strided": True, "aligned": False, "batch": 2, "b_broadcast": True, "dtype": "bf16"},
    "strided, one row": {"strided": True, "M": 1, "residual": "fp16"},
    "unaligned": {"aligned": False, "bias": "fp32", "N": 33},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_every_kind_of_array_finds_its_place(gpu: SimulatedGpu, changes: dict[str, Any]) -> None:
    problem = GemmProblem(**{"M": 20, "N": 32, "K": 40, **changes})
    reply = measure(request(problem, GemmConfig(16, 32, 32, num_stages=2)))
    assert reply["status"] == "ok", reply["message"]
    assert reply["ragged"] in ("passed", "none")


FEATURES = [(kernel, problem) for kernel in KERNELS for _, problem, _ in kernel.feature_cases[::3]]


@pytest.mark.parametrize(("kernel", "problem"), FEATURES, ids=[f"{kernel.name} {each}" for kernel, each in FEATURES])
def test_every_op_is_measured_alike(gpu: SimulatedGpu, kernel: Kernel[Any, Any], problem: Any) -> None:
    if kernel.supported(problem, gpu.device) is not None:
        gpu.device = replace(resolve_device("h200"), l2_bytes=4096)
    config = kernel.default(problem, gpu.device)
    reply = measure(measure_request(kernel.name, problem, config))
    assert reply["status"] == "ok", reply["message"]


def test_arrays_are_aligned_in_device_memory_as_the_problem_says(gpu: SimulatedGpu) -> None:
    for aligned in (True, False):
        bench = Bench(gpu, GEMM, replace(PROBLEM, aligned=aligned, end_aligned=aligned, dtype="bf16"), 0)
        bench.place()
        addresses = [array.ctypes.data % 16 for array in bench._pointers[0].values()]
        assert all((address == 0) == aligned for address in addresses), addresses


# The gate's verdicts


def no_activation(launch: Launch) -> Launch:
    return replace(launch, constexprs=tuple((k, "none" if k == "ACTIVATION" else v) for k, v in launch.constexprs))


def test_a_wrong_result_is_incorrect_and_has_no_times(gpu: SimulatedGpu) -> None:
    gpu.replace = no_activation
    reply = measure(request())
    assert reply["status"] == "incorrect"
    assert "elements" in reply["message"]
    assert "are off, worst at" in reply["message"]
    assert "times" not in reply
    assert reply["resources"]["registers"] == 64
    assert gpu.copies == []  # what is wrong is not timed


def test_a_wrong_tail_is_found_on_the_ragged_problem(gpu: SimulatedGpu) -> None:
    even = replace(PROBLEM, M=32, N=64)
    gpu.replace = lambda launch: launch if dict(launch.constexprs)["EVEN_K"] else no_activation(launch)
    reply = measure(request(even))
    assert reply["status"] == "incorrect"
    assert reply["ragged"] == "failed"
    assert reply["message"].startswith("on M=16,N=48,K=48,bias=fp16,activation=relu: ")
    assert "times" not in reply


def test_a_ragged_problem_whose_code_does_not_fit_is_skipped(gpu: SimulatedGpu) -> None:
    load = gpu.load

    def picky(launches: tuple[Launch, ...]) -> InterpretedPlan:
        if not dict(launches[0].constexprs)["EVEN_K"]:
            raise UnsupportedError("8 B a thread spill to local memory")
        return load(launches)

    gpu.load = picky  # type: ignore[method-assign]
    reply = measure(request())
    assert reply["status"] == "ok"
    assert reply["ragged"] == "skipped: 8 B a thread spill to local memory"


def test_a_ragged_problem_whose_code_is_known_not_to_compile_is_never_loaded(gpu: SimulatedGpu) -> None:
    reply = measure(request(skip_ragged="no answer in 60 s: killed"))
    assert reply["status"] == "ok"
    assert reply["ragged"] == "skipped: no answer in 60 s: killed"
    assert len(gpu.loads) == 1


def test_without_the_gate_nothing_is_looked_at(gpu: SimulatedGpu) -> None:
    gpu.replace = no_activation
    reply = measure(request(check=False))
    assert reply["status"] == "ok"
    assert "ragged" not in reply


def test_a_clearly_slower_configuration_is_given_up(gpu: SimulatedGpu) -> None:
    reply = measure(request(give_up_above_us=6.0))
    assert reply["status"] == "ok"
    assert reply["gave_up"]
    assert reply["times"] == {"median_us": 10.0, "p10_us": 10.0, "p90_us": 10.0, "samples": 3}
    assert "ragged" not in reply
    assert len(gpu.loads) == 1


# Refusals


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (UnsupportedError("999 B of shared memory are over …"), "out_of_resources"),
        (CompileError("ptxas: no"), "compile_error"),
        (LaunchError("the driver refused gemm_kernel for sm_80: CUDA_ERROR_INVALID_IMAGE"), "runtime_error"),
    ],
)
def test_a_refusal_has_its_status(gpu: SimulatedGpu, refusal: Exception, status: str) -> None:
    gpu.refusal = refusal
    reply = measure(request())
    assert (reply["status"], reply["message"]) == (status, str(refusal))
    assert not reply.get("killed")


def test_a_ptxas_that_somebody_killed_is_told(gpu: SimulatedGpu) -> None:
    gpu.refusal = CompileError("PTXASError: `ptxas` failed with error code -9")
    gpu.refusal.__cause__ = subprocess.CalledProcessError(-9, "ptxas")
    assert measure(request())["killed"] is True


def test_what_the_machine_fails_in_is_no_outcome(gpu: SimulatedGpu) -> None:
    gpu.refusal = CompileError("OSError: [Errno 28] No space left on device")
    gpu.refusal.__cause__ = OSError(28, "No space left on device")
    with pytest.raises(CompileError):
        measure(request())


def test_a_configuration_that_breaks_a_limit_is_invalid(gpu: SimulatedGpu) -> None:
    reply = measure(request(config=replace(CONFIG, BLOCK_K=8)))
    assert reply["status"] == "invalid"
    assert "the smallest tile" in reply["message"]
    assert gpu.loads == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"op": "gem"}, UnknownKernelError),
        ({"problem": {"M": 1}}, ProblemError),
        ({"config": {"BLOCK_M": "x"}}, ProblemError),
    ],
)
def test_a_malformed_request_is_the_callers_mistake(
    gpu: SimulatedGpu, changes: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        measure({**request(), **changes})


@pytest.mark.parametrize("make", [request, lambda: compare_request("gemm", PROBLEM, [CONFIG])], ids=["one", "several"])
def test_every_field_of_a_request_is_needed(gpu: SimulatedGpu, make: Callable[[], dict[str, Any]]) -> None:
    for name in make().keys() - {"do", "finalists"}:
        with pytest.raises(KeyError, match=name):
            measure({key: value for key, value in make().items() if key != name})


# Faults


def test_out_of_memory_costs_one_reply(gpu: SimulatedGpu) -> None:
    gpu.limit = 1000
    reply = measure(request())
    assert reply["status"] == "runtime_error"
    assert reply["message"].startswith("Out of memory allocating")
    gpu.limit = 1 << 40
    assert measure(request())["status"] == "ok"


def test_copies_that_do_not_fit_in_memory_leave_the_events(gpu: SimulatedGpu) -> None:
    bench = Bench(gpu, GEMM, PROBLEM, 0)
    bench.place()
    gpu.limit = gpu.allocated + 30_000
    _, method = bench.sampler(InterpretedPlan(GEMM.launches(PROBLEM, CONFIG)))
    assert method == "events"
    assert len(bench._pointers) == 1
    gpu.limit = 1 << 40
    _, method = bench.sampler(InterpretedPlan(GEMM.launches(PROBLEM, CONFIG)))
    assert method == "events"  # all configurations of a problem in one way


def test_a_fault_that_stays_ends_the_process(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def end(reason: str) -> None:
        said.append(reason)
        raise SystemExit

    monkeypatch.setattr(module, "end_process", end)
    gpu.refusal = CudaError("an illegal memory access\n was encountered")
    monkeypatch.setattr(gpu, "alive", lambda: False)
    with pytest.raises(SystemExit):
        measure(request())
    assert said == ["an illegal memory access was encountered"]


# What a pool makes of a dead GPU: `test_faults`.


# What is kept between requests


def test_inputs_are_made_once_per_problem_and_only_the_latest_are_kept(gpu: SimulatedGpu) -> None:
    for config in (CONFIG, replace(CONFIG, GROUP_M=1), replace(CONFIG, BLOCK_N=16)):
        measure(request(config=config, check=False))
    assert gpu.uploads == 1
    measure(request(seed=5, check=False))
    assert (gpu.uploads, gpu.releases) == (2, 1)
    measure(request(replace(PROBLEM, M=8), check=False))
    measure(request(check=False))
    assert (gpu.uploads, gpu.releases) == (4, 3)


def test_every_copy_that_replays_rotate_over_gives_the_same_result(gpu: SimulatedGpu) -> None:
    bench = Bench(gpu, GEMM, PROBLEM, 0)
    bench.place()
    plan = InterpretedPlan(GEMM.launches(PROBLEM, CONFIG))
    _, method = bench.sampler(plan)
    assert method == "replay"
    assert gpu.copies == [3]  # 4 × 4096 B of L2 over 14 kB touched, and the one in use
    outs = [pointers["out_ptr"] for pointers in bench._pointers]
    assert len({out.ctypes.data for out in outs}) == len(outs) == 3
    assert all(np.array_equal(out, outs[0]) for out in outs)
    assert GEMM.reference(PROBLEM, PROBLEM.inputs(0))["out"].reshape(-1) == pytest.approx(
        outs[0].astype(float), abs=4e-3
    )


# Finalists


def test_finalists_are_compared_and_the_wrong_ones_left_out(gpu: SimulatedGpu) -> None:
    gpu.times_us = iter((30.0, 20.0))
    configs = [CONFIG, replace(CONFIG, BLOCK_K=8), replace(CONFIG, GROUP_M=1), replace(CONFIG, BLOCK_M=16)]
    gpu.replace = lambda launch: no_activation(launch) if dict(launch.constexprs)["BLOCK_M"] == 16 else launch
    reply = measure(compare_request("gemm", PROBLEM, configs))
    assert reply["status"] == "ok"
    assert [each["status"] for each in reply["finalists"]] == ["ok", "invalid", "ok", "incorrect"]
    assert [each["times"]["median_us"] for each in reply["finalists"] if "times" in each] == [30.0, 20.0]
    assert reply["finalists"][0]["times"]["samples"] == reply["finalists"][2]["times"]["samples"]
    json.dumps(reply)


def test_no_finalist_that_passes_is_no_failure(gpu: SimulatedGpu) -> None:
    reply = measure_on(gpu, compare_request("gemm", PROBLEM, [replace(CONFIG, BLOCK_K=8)]))  # type: ignore[arg-type]
    assert [each["status"] for each in reply["finalists"]] == ["invalid"]


def test_finalists_are_checked_as_the_request_says(gpu: SimulatedGpu) -> None:
    gpu.replace = no_activation
    found = {}
    for check in (True, False):
        reply = measure(compare_request("gemm", PROBLEM, [CONFIG, replace(CONFIG, GROUP_M=1)], check=check))
        found[check] = {each["status"] for each in reply["finalists"]}
    assert found == {True: {"incorrect"}, False: {"ok"}}


# Ops that overwrite an input


IN_PLACE = measure_request("halve", HalveProblem(100), HalveConfig(32))


@pytest.fixture
def seen(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Copies of what every launch of `halve` found in its array."""
    found: list[Any] = []
    load = gpu.load

    class Watching(Plan):
        def __init__(self, plan: Plan) -> None:
            self.plan = plan

        def bind(self, names: Any, strides: Any) -> Run:
            bound = self.plan.bind(names, strides)

            def run(arrays: Any, stream: int) -> None:
                found.append(arrays[names.index("x_ptr")].copy())
                bound(arrays, stream)

            return run

    monkeypatch.setattr(module, "find_kernel", lambda name: HALVE)
    monkeypatch.setattr(gpu, "load", lambda launches: Watching(load(launches)))
    return found


def test_what_an_op_overwrites_is_restored_before_every_run(gpu: SimulatedGpu, seen: list[Any]) -> None:
    reply = measure(IN_PLACE)
    assert reply["status"] == "ok", reply["message"]
    assert reply["ragged"] == "passed"
    assert reply["method"] == "events"  # a graph of launches could not restore it
    original = HalveProblem(100).inputs(0)["x"]
    whole = [each for each in seen if each.size == 100]
    assert len(whole) > 2 + reply["times"]["samples"]  # the gate's two, and warm-up
    assert all(np.array_equal(each, original) for each in whole)
    assert len(seen) == len(whole) + 2  # the gate's two on the ragged problem


def test_finalists_that_overwrite_an_input_find_it_whole_in_every_round(gpu: SimulatedGpu, seen: list[Any]) -> None:
    gpu.times_us = iter((30.0, 20.0))
    reply = measure(compare_request("halve", HalveProblem(100), [HalveConfig(32), HalveConfig(64)]))
    assert [each["times"]["median_us"] for each in reply["finalists"]] == [30.0, 20.0]
    original = HalveProblem(100).inputs(0)["x"]
    assert all(np.array_equal(each, original) for each in seen)


def test_an_op_that_overwrites_half_of_its_input_is_incorrect(gpu: SimulatedGpu, seen: list[Any]) -> None:
    gpu.replace = lambda launch: replace(launch, fn=lazy_kernel)
    reply = measure(IN_PLACE)
    assert reply["status"] == "incorrect"
    assert reply["message"].startswith("50 of 100 elements (50.00%) are off")


def test_without_restoring_two_runs_would_differ(
    gpu: SimulatedGpu, seen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the kernel used here would show it."""
    upload, memories = gpu.upload, []

    def once(memory: Any, data: Any) -> None:
        if memory.ctypes.data not in memories:
            memories.append(memory.ctypes.data)
            upload(memory, data)

    monkeypatch.setattr(gpu, "upload", once)
    reply = measure(IN_PLACE)
    assert reply["status"] == "incorrect"

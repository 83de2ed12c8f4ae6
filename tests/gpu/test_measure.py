"""Measuring on a GPU: the gate and the timing on real kernels, and planted faults, each in a worker that may die."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.measuring import compare_request, measure_request
from tilewright.kernels.device import Device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem, supported
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.prediction import roofline_us
from tilewright.tuner.pool import Pool
from tilewright.tuning_db.env import compiling_environment

pytestmark = pytest.mark.gpu

TIMEOUT = 120.0
FAULTS = Path(__file__).with_name("faulty_kernels.py")


@pytest.fixture(scope="module")
def worker(board: Device) -> Iterator[Pool]:
    with Pool(1) as pool:
        yield pool


@pytest.fixture
def faulty(board: Device) -> Iterator[Pool]:
    """A worker that spoils the kernel as a request's `fault` says."""
    root = str(Path(__file__).parents[2])
    environment = {**compiling_environment(), "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    with Pool(1, command=(sys.executable, "-P", str(FAULTS)), environment=environment) as pool:
        yield pool


def ask(pool: Pool, problem: GemmProblem, config: GemmConfig, timeout: float = TIMEOUT, **more: Any) -> Any:
    return pool.submit(measure_request("gemm", problem, config, **more), timeout).result()


def default(problem: GemmProblem, board: Device) -> GemmConfig:
    config: GemmConfig = GEMM.default(problem, board)
    return config


PROBLEMS = [
    GemmProblem(M=512, N=512, K=512),
    GemmProblem(M=512, N=768, K=1024, dtype="bf16", b_layout="col", bias="bf16", activation="gelu_erf"),
    GemmProblem(M=256, N=512, K=256, dtype="bf16", a_layout="col", residual="fp32", activation="silu", alpha=True),
    GemmProblem(M=129, N=127, K=513, dtype="fp16", b_layout="col"),
    GemmProblem(M=1, N=4096, K=4096, dtype="fp16", b_layout="col"),
    GemmProblem(M=333, N=256, K=200, dtype="fp32"),
    GemmProblem(M=256, N=256, K=512, dtype="fp32", precision="tf32", bias="fp32"),
    GemmProblem(M=128, N=256, K=256, dtype="fp8e5m2", b_layout="col"),
    GemmProblem(M=128, N=256, K=256, dtype="fp8e4m3", b_layout="col", out_dtype="fp16"),
    GemmProblem(M=100, N=64, K=96, batch=5, b_broadcast=True, residual="fp16", residual_broadcast=True),
    GemmProblem(M=100, N=72, K=96, batch=3, strided=True, b_layout="col", residual="fp16"),
    GemmProblem(M=100, N=72, K=96, dtype="bf16", strided=True, aligned=False),
    GemmProblem(M=4096, N=4096, K=4096, dtype="bf16", b_layout="col"),  # checked in part
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_a_configuration_passes_the_gate_and_has_a_plausible_time(
    worker: Pool, board: Device, problem: GemmProblem
) -> None:
    reason = supported(problem, board)
    if reason is not None:
        pytest.skip(reason)
    reply = ask(worker, problem, default(problem, board))
    assert reply["status"] == "ok", reply.get("message")
    times = reply["times"]
    assert 0 < times["p10_us"] <= times["median_us"] <= times["p90_us"]
    floor_us = roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, board)
    assert times["median_us"] > 0.9 * floor_us  # nothing is faster than the board
    assert times["median_us"] < 1e5
    assert reply["ragged"] in ("passed", "none") or reply["ragged"].startswith("skipped")
    assert 16 <= reply["resources"]["registers"] <= 255
    assert reply["resources"]["spill_bytes"] == 0


@pytest.mark.parametrize("split_k", [1, 2, 4, 16])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_split_k_passes_and_is_deterministic(worker: Pool, board: Device, dtype: str, split_k: int) -> None:
    problem = GemmProblem(M=16, N=512, K=4096, dtype=dtype, b_layout="col")
    reply = ask(worker, problem, GemmConfig(16, 64, 64, GROUP_M=1, SPLIT_K=split_k))
    assert reply["status"] == "ok", reply.get("message")


# Honest times

APART = 0.15
"""By how much, relative to it, a time may differ from one taken later: by the board's clocks, which its power limit and
temperature decide (`timing` has the figures). In turns, it falls on both alike."""


@pytest.mark.alone
@pytest.mark.parametrize(
    "problem",
    [
        GemmProblem(M=1, N=4096, K=4096, dtype="fp16", b_layout="col"),  # by replay
        GemmProblem(M=1024, N=1024, K=1024, dtype="fp16"),  # likewise
        GemmProblem(M=8192, N=8192, K=8192, dtype="fp16", b_layout="col"),  # by events
    ],
    ids=str,
)
def test_the_same_configuration_twice_differs_within_its_spread_in_turns_and_by_the_clocks_apart(
    worker: Pool, board: Device, problem: GemmProblem
) -> None:
    config = default(problem, board)
    apart = [ask(worker, problem, config) for _ in range(2)]
    turns = worker.submit(compare_request("gemm", problem, [config] * 2), TIMEOUT).result()
    clocks = [reply["clocks"] for reply in (*apart, turns)]  # what a difference is from: MHz, W, reasons to throttle
    for (one, other), least in ((turns["finalists"], 0.01), (apart, APART)):
        one, other = one["times"], other["times"]
        spread = max(one["p90_us"] - one["p10_us"], other["p90_us"] - other["p10_us"])
        difference = abs(one["median_us"] - other["median_us"])
        assert difference <= max(2 * spread, least * one["median_us"]), (one, other, clocks)


@pytest.mark.alone
def test_inputs_are_cold(worker: Pool, board: Device) -> None:
    problem = GemmProblem(M=1, N=4096, K=4096, dtype="fp16", b_layout="col")  # 32 MiB: much of it would stay in L2
    reply = ask(worker, problem, default(problem, board))
    assert reply["times"]["median_us"] >= 0.9 * problem.bytes_moved() / (board.bandwidth_gbs * 1e3)


def test_a_configuration_that_cannot_win_is_given_up(worker: Pool, board: Device) -> None:
    reply = ask(worker, PROBLEMS[-1], default(PROBLEMS[-1], board), give_up_above_us=1.0)
    assert reply["status"] == "ok"
    assert reply["gave_up"]
    assert reply["times"]["samples"] == 3


# Faults


SMALL = GemmProblem(M=256, N=256, K=256, bias="fp16", activation="relu")
FITTING = GemmConfig(64, 64, 32, num_stages=3)


def test_too_much_shared_memory_is_out_of_resources_or_invalid(worker: Pool, board: Device) -> None:
    reply = ask(worker, SMALL, GemmConfig(256, 256, 256, num_warps=16, num_stages=5))
    assert reply["status"] in ("invalid", "out_of_resources")


@pytest.mark.parametrize("fault", ["activation skipped", "out of bounds", "last tile missing"])
def test_a_wrong_kernel_is_incorrect_and_the_worker_goes_on(faulty: Pool, board: Device, fault: str) -> None:
    # 240 rows of 64-row tiles: the last one is cut.
    problem = replace(SMALL, M=240)
    assert ask(faulty, problem, FITTING, fault=fault)["status"] == "incorrect"
    assert ask(faulty, problem, FITTING)["status"] == "ok"
    assert faulty.starts == 1


def test_an_illegal_address_is_a_runtime_error_and_the_next_process_works(faulty: Pool, board: Device) -> None:
    reply = ask(faulty, SMALL, FITTING, fault="illegal address")
    assert reply["status"] == "runtime_error"
    assert "illegal" in reply["message"].lower()
    assert ask(faulty, SMALL, FITTING)["status"] == "ok"
    assert faulty.starts == 2


def test_an_endless_kernel_is_a_timeout_and_the_next_process_works(faulty: Pool, board: Device) -> None:
    assert ask(faulty, SMALL, FITTING)["status"] == "ok"
    assert ask(faulty, SMALL, FITTING, timeout=10, fault="endless")["status"] == "timeout"
    assert ask(faulty, SMALL, FITTING)["status"] == "ok"
    assert faulty.starts == 2


def test_a_want_of_memory_is_a_runtime_error_and_costs_nothing_else(faulty: Pool, board: Device) -> None:
    reply = ask(faulty, SMALL, FITTING, fault="out of memory")
    assert reply["status"] == "runtime_error"
    assert "memory" in reply["message"].lower()
    assert ask(faulty, SMALL, FITTING)["status"] == "ok"
    assert faulty.starts == 1


def test_importing_the_tuner_does_not_touch_the_gpu(board: Device) -> None:
    code = "import sys, tilewright.tuner.measure; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=compiling_environment(), check=False).returncode == 0


def test_numpy_knows_the_same_numbers(board: Device) -> None:
    """The reference the gate uses, against an independent one."""
    arrays = SMALL.inputs(0)
    sums = np.einsum("bmk,bkn->bmn", arrays["a"].astype(float), arrays["b"].astype(float))
    np.testing.assert_allclose(GEMM.reference(SMALL, arrays)["out"], np.maximum(sums + arrays["bias"].astype(float), 0))

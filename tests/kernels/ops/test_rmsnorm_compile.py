"""The fused RMSNorm, compiled for GPUs that are not here: instructions, spills, estimated resources."""

from __future__ import annotations

import random

import pytest

from tests.kernels.compiling import archs, assert_clean, compiled, described
from tests.kernels.conformance import every_value, pairwise
from tests.kernels.ops.rmsnorm_cases import LLAMA, RESULTS
from tilewright.kernels import RmsNormConfig, RmsNormProblem, resolve_device
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.problem import INPUT_DTYPES
from tilewright.kernels.ops.rmsnorm.space import SPACE
from tilewright.kernels.ops.rmsnorm.work import estimate


def test_rows_are_read_and_written_sixteen_bytes_at_a_time():
    dense, odd = LLAMA, RmsNormProblem(M=4096, N=4095, weight="fp16")
    one_row = RmsNormConfig(1, 4096, 16)
    walk = RmsNormConfig(1, 1024, 4, 3)
    wide, narrow, pipelined, plain = compiled(
        90, [("rmsnorm", dense, one_row), ("rmsnorm", odd, one_row), ("rmsnorm", dense, walk), ("rmsnorm", odd, walk)]
    )
    assert wide["instructions"]["wide loads"] == 3  # x, residual, weight: one each
    assert wide["instructions"]["narrow loads"] == 0
    assert narrow["instructions"]["wide loads"] == 0
    assert narrow["instructions"]["narrow loads"] == 16  # 8 elements a thread, of x and of the weight
    assert pipelined["instructions"]["cp.async"] > 0
    assert pipelined["instructions"]["wide loads"] == 0
    assert plain["instructions"]["cp.async"] == 0
    assert pipelined["estimate"] == pipelined["resources"]["shared_bytes"] == 2 * 3 * 2048
    assert wide["resources"]["registers"] <= 40


SHAPES = {
    "a row": {"M": 1, "N": 4096},
    "heads": {"M": 65536, "N": 128},
    "rows": {"M": 4096, "N": 8192},
    "wide rows": {"M": 4096, "N": 16384},
    "ragged": {"M": 4095, "N": 5104},
    "odd": {"M": 4095, "N": 8191},
    "long": {"M": 64, "N": 65536},
    "long and odd": {"M": 64, "N": 65535},
    "strided": {"M": 4096, "N": 4096, "strided": True},
    "strided, unaligned": {"M": 4096, "N": 4096, "strided": True, "aligned": False},
}
MATRIX = {
    "shape": tuple(SHAPES),
    "dtype": INPUT_DTYPES,
    "weight": (None, *INPUT_DTYPES),
    "residual": (None, *INPUT_DTYPES),
    "result": tuple(RESULTS),
}


def matrix(arch, rows):
    """The problems of rows of MATRIX that an arch has, each machine code once."""
    device, seen = resolve_device(f"sm_{arch}"), set()
    for row in rows:
        problem = RmsNormProblem(
            **SHAPES[row["shape"]],
            dtype=row["dtype"],
            weight=row["weight"],
            residual=row["residual"],
            residual_out=row["residual"] is not None,
            **RESULTS[row["result"]],
        )
        if RMSNORM.supported(problem, device) is None:
            code = RMSNORM.launches(problem, RMSNORM.default(problem, device))[0].specialization
            if code not in seen:
                seen.add(code)
                yield problem


@pytest.mark.parametrize("arch", archs(86, 90, smoke=(86,)))
def test_the_default_compiles_without_spills(arch):
    # Every value occurs; more of their combinations are a slow test.
    problems = matrix(arch, every_value(MATRIX, seed=arch))
    assert_clean(compiled(arch, [("rmsnorm", problem, None) for problem in problems]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
def test_the_default_compiles_without_spills_whatever_the_problem(arch):
    problems = list(matrix(arch, pairwise(MATRIX, seed=1)))
    assert_clean(compiled(arch, [("rmsnorm", problem, None) for problem in problems]))


def estimates_hold(arch, problems):
    """The share of register estimates within a quarter, for random configurations; shared memory is never over."""
    draw, device = random.Random(arch), resolve_device(f"sm_{arch}")
    jobs = [(problem, draw.choice(SPACE.configs(problem, device))) for problem in problems]
    replies = compiled(arch, [("rmsnorm", problem, config) for problem, config in jobs])
    near = 0
    for (problem, config), reply in zip(jobs, replies, strict=True):
        assert "error" not in reply, f"{described(reply)}: {reply.get('error')}"
        real, guess = reply["resources"], estimate(problem, config, device)
        assert guess.shared_bytes <= real["shared_bytes"], described(reply)
        near += abs(guess.registers - real["registers"]) <= max(8, real["registers"] / 4)
    return near / len(jobs)


def test_estimates_are_near_what_the_compiler_says():
    rows = [row for row in pairwise(MATRIX, seed=3) if row["shape"] in ("heads", "rows", "long", "strided")]
    assert estimates_hold(80, list(matrix(80, rows))[:10]) >= 0.7


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_estimates_are_near_what_the_compiler_says_of_a_larger_sample(arch):
    assert estimates_hold(arch, list(matrix(arch, pairwise(MATRIX, seed=2)))[:60]) >= 0.65

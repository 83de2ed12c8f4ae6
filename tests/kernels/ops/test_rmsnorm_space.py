"""The fused RMSNorm's problems and configurations: what is refused, what is tried, what the compiler makes of it."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from tests.kernels.compiling import assert_clean, compiled, described
from tests.kernels.conformance import every_value, pairwise
from tests.kernels.ops.rmsnorm_cases import RESULTS, conforms
from tilewright.kernels import RmsNormConfig, RmsNormProblem, predict, resolve_device
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.lookup import check_supported
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.problem import INPUT_DTYPES, reference, tolerance
from tilewright.kernels.ops.rmsnorm.space import AXES, SPACE, elements, fits, ragged, useful, whole
from tilewright.kernels.ops.rmsnorm.work import estimate, work
from tilewright.kernels.prediction import roofline_us
from tilewright.tuning_db.errors import ProblemError, UnsupportedError

LLAMA = RmsNormProblem(M=4096, N=4096, weight="fp16", residual="fp16", residual_out=True)
A100 = resolve_device("a100")

# Problems


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"M": 0}, "M=0 must be from 1"),
        ({"N": 2**31}, "N=2147483648 must be from 1"),
        ({"dtype": "fp8e4m3"}, "dtype='fp8e4m3': rmsnorm takes fp16, bf16, fp32"),
        ({"dtype": "half"}, "unknown dtype='half'"),
        ({"weight": "int8"}, "weight='int8': rmsnorm takes"),
        ({"residual": "fp8e5m2"}, "residual='fp8e5m2': rmsnorm takes"),
        ({"residual_out": True}, "residual_out needs a residual"),
        ({"row_scale": True}, "out_scale is for a result of int8, fp8e4m3, fp8e5m2, not out_dtype='fp16'"),
        ({"out_dtype": "int8"}, "needs out_scale"),
        ({"out_dtype": "int32"}, "out_dtype='int32' is for sums of int8"),
        ({"bias": "fp16"}, "bias='fp16': rmsnorm has no bias"),
        ({"activation": "relu"}, "activation='relu': rmsnorm has no activation"),
        ({"alpha": True}, "alpha=True: rmsnorm has no alpha"),
    ],
    ids=str,
)
def test_what_can_not_be_is_refused(fields, message):
    with pytest.raises(ProblemError) as raised:
        RmsNormProblem(**{"M": 4, "N": 8} | fields)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_scale_a_row_is_a_scale():
    problem = RmsNormProblem(M=4, N=8, out_dtype="int8", row_scale=True)
    assert problem.out_scale
    assert str(problem) == "M=4,N=8,row_scale=true,out_dtype=int8"
    assert RmsNormProblem.parse(str(problem)) == problem
    assert list(problem.inputs(0)) == ["x"]
    assert list(problem.outputs()) == ["out", "row_scale"]


def test_bytes_are_of_every_array_once():
    problem = RmsNormProblem(
        M=5, N=7, dtype="bf16", weight="fp32", residual="fp32", residual_out=True, out_dtype="int8", row_scale=True
    )
    assert problem.bytes_moved() == 35 * (2 + 4 + 1 + 4) + 7 * 4 + 5 * 4
    arrays = problem.inputs(0)
    results = {name: output.shape for name, output in problem.outputs().items()}
    assert {name: array.shape for name, array in reference(problem, arrays).items()} == results


@pytest.mark.parametrize(
    ("device", "fields", "reason"),
    [
        ("sm_75", {"dtype": "bf16"}, "bf16 needs sm_80 or newer, and t4 is sm_75"),
        ("sm_75", {"weight": "bf16"}, "bf16 needs sm_80"),
        ("sm_75", {"residual": "bf16"}, "bf16 needs sm_80"),
        ("sm_86", {"out_dtype": "fp8e4m3"}, "fp8e4m3 needs sm_89 or newer, and rtx3090 is sm_86"),
        ("sm_75", {"out_dtype": "int8", "row_scale": True}, "int8 needs sm_80 or newer"),
    ],
)
def test_dtypes_that_a_device_lacks(device, fields, reason):
    with pytest.raises(UnsupportedError) as raised:
        check_supported(RMSNORM, RmsNormProblem(16, 64, **fields), resolve_device(device))
    assert reason in str(raised.value)


def test_a_part_of_a_result_is_that_of_whole_rows():
    problem = RmsNormProblem(
        M=3000, N=33, weight="fp16", residual="fp16", residual_out=True, out_dtype="int8", row_scale=True
    )
    arrays = problem.inputs(0)
    part, chosen, index = problem.part(arrays, np.random.default_rng(1))
    rows = index["out"][0]
    assert rows[0] == 0
    assert rows[-1] == 2999
    assert np.diff(rows).max() < 2 * 3000 / 256 + 1
    assert part.M == len(rows) < 300
    full, some = reference(problem, arrays), reference(part, chosen)
    for name, expected in full.items():
        np.testing.assert_array_equal(some[name], expected[np.ix_(*index[name])])


def test_distance_is_of_the_shape_alone():
    near = RmsNormProblem(M=8192, N=4096, weight="fp16", residual="fp16", residual_out=True)
    assert RMSNORM.distance(LLAMA, LLAMA) == 0
    assert RMSNORM.distance(LLAMA, near) == RMSNORM.distance(near, LLAMA) == 1
    for other in ({"M": 16}, {"N": 4097}, {"N": 64}, {"weight": "fp32"}, {"residual_out": False}):
        assert RMSNORM.distance(LLAMA, RmsNormProblem(**{**LLAMA.to_dict(), **other})) is None


def test_tolerance_grows_with_the_row_and_stays_below_what_a_wrong_one_shows():
    short, long = (tolerance(RmsNormProblem(1, n, dtype="fp32"))["out"].relative for n in (16, 2**16))
    assert short < long < 2e-5  # one element of 65536 left out changes the mean by 1.5e-5
    assert tolerance(RmsNormProblem(1, 16))["out"].relative == pytest.approx(2**-10, rel=2e-2)


# Configurations


@pytest.mark.parametrize(
    ("config", "problem", "reason"),
    [
        (RmsNormConfig(1, 4096, 4, 2), LLAMA, "more than 1 stage changes nothing"),
        (RmsNormConfig(1, 8192, 8), LLAMA, "mostly padding"),
        (RmsNormConfig(8, 1024, 8), RmsNormProblem(M=4, N=2048), "a block of 8 over a size of 4 is mostly padding"),
        (RmsNormConfig(1, 128, 1), LLAMA, "in pieces of less than 256"),
        (RmsNormConfig(64, 512, 16), LLAMA, "leave some of 108 SMs without any of 4096"),
        (RmsNormConfig(1, 256, 4), LLAMA, "half of 4 warps would do"),
        (RmsNormConfig(1, 1024, 2), RmsNormProblem(M=16, N=8192), "2 warps, alone on their SM, leave some of its 4"),
        (RmsNormConfig(1, 4096, 1), LLAMA, "leave none of its 255 registers"),
        (RmsNormConfig(1, 2048, 8, 4), LLAMA, "num_stages=4 is more than the tiles of a row"),
    ],
    ids=str,
)
def test_what_can_not_be_the_best(config, problem, reason):
    assert fits(problem, config, A100) is None
    assert reason in useful(problem, config, A100)


def test_copies_are_held_to_shared_memory():
    problem = RmsNormProblem(M=4096, N=65536, dtype="fp32", weight="fp32", residual="fp32")
    config = RmsNormConfig(1, 8192, 16, 4)
    assert "294912 B of shared memory are over the 166912 B" in fits(problem, config, A100)
    assert fits(problem, config, resolve_device("t4")) is None  # nothing is copied there
    assert fits(problem, RmsNormConfig(1, 4096, 16, 4), A100) is None


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_a_space_is_of_tens_to_hundreds_and_has_the_default(device):
    for problem in (LLAMA, RmsNormProblem(1, 4096), RmsNormProblem(262144, 128), RmsNormProblem(64, 65536)):
        configs = SPACE.configs(problem, device)
        coarse = SPACE.configs(problem, device, coarse=True)
        assert 10 < len(configs) < 500
        assert 2 < len(coarse) <= 60
        assert SPACE.config is RmsNormConfig
        assert RMSNORM.default(problem, device) in configs


def test_the_default_is_near_the_best_by_prediction():
    for device, problem in itertools.product(
        CATALOGUE, (LLAMA, RmsNormProblem(65536, 128), RmsNormProblem(512, 16384))
    ):

        def time(config, problem=problem, device=device):
            return predict(work(problem, config), estimate(problem, config, device), device).time_us

        best = min(map(time, SPACE.configs(problem, device)))
        assert roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, device) <= best
        assert time(RMSNORM.default(problem, device)) <= 1.25 * best, (device.board, str(problem))


@pytest.mark.parametrize("n", [1, 15, 16, 100, 4096, 4097, 70_000])
@pytest.mark.parametrize("config", [RmsNormConfig(1, 64), RmsNormConfig(16, 1024, 8), RmsNormConfig(4, 16)], ids=str)
def test_a_ragged_problem_runs_the_same_code_and_ends_within_a_tile(n, config):
    problem = RmsNormProblem(M=4096, N=n, weight="fp16")
    other = ragged(problem, config)
    assert (other.N % 16 == 0) == (n % 16 == 0)
    assert whole(other, config) == whole(problem, config)
    assert config.BLOCK_M == 1 or other.M % config.BLOCK_M
    assert config.BLOCK_N == 16 or n == 1 or other.N % config.BLOCK_N
    assert other.M * other.N <= 3 * 32 * 1024
    conforms(other, config)


def test_work_is_what_the_blocks_read_and_write():
    problem = RmsNormProblem(M=37, N=1000, dtype="bf16", weight="fp32", residual="fp32", residual_out=True)
    for config in (RmsNormConfig(4, 1024), RmsNormConfig(4, 256), RmsNormConfig(1, 512, num_stages=3)):
        found = work(problem, config)
        walks = 1 if whole(problem, config) else 2
        assert found.blocks == math.prod(RMSNORM.launches(problem, config)[0].grid)
        assert found.iterations == walks * math.ceil(1000 / config.BLOCK_N)
        read = 37_000 * (2 + 4)
        assert found.load_bytes * found.iterations * found.blocks == pytest.approx(
            walks * read + found.blocks * 1000 * 4
        )
        assert found.panel_a.bytes * found.blocks == pytest.approx(walks * read)
        assert found.panel_b.bytes == 4000
        assert found.epilogue_bytes * found.blocks == pytest.approx(37_000 * (2 + 4))
        assert found.dots == ()


# Compiled code


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


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.smoke), 89])
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


def test_elements_are_counted_by_thread():
    assert elements(RmsNormConfig(2, 1024, 4)) == 16
    assert all(value & (value - 1) == 0 for name in ("BLOCK_M", "BLOCK_N", "num_warps") for value in AXES[name])

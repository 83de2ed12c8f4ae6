"""The fused RMSNorm's problems: what is refused, their bytes, their parts and their tolerance."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.ops.rmsnorm_cases import LLAMA
from tilewright.kernels import RmsNormProblem, resolve_device
from tilewright.kernels.lookup import check_supported
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.problem import reference, tolerance
from tilewright.tuning_db.errors import ProblemError, UnsupportedError


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
        ({"residual": "fp16", "residual_last": True}, "residual_last=True: rmsnorm adds its residual first"),
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

"""RMSNorm's plugins: which problem tensors make, and that launches for all sizes are right for each."""

from __future__ import annotations

import pytest

from tests.kernels.tensorrt.cases import case, check_launches, check_results
from tilewright.kernels import RmsNormConfig, RmsNormProblem
from tilewright.tuning_db.errors import ProblemError, UsageError

M = [1, 64, 4096]


def test_any_number_of_rows():
    found = case("FusedRmsNormWeight", [((M, 7, 512), "bf16"), ((512,), "fp32")], eps=1e-5)
    problem = {"N": 512, "dtype": "bf16", "weight": "fp32"}
    assert check_launches(found, lambda m: RmsNormProblem(M=7 * m, **problem), [(1,), (16,), (33,), (4096,)]) >= 5
    assert dict(found.variant.operation.constants(found.tensors, found.attributes))["EPS"] == 1e-5


def test_the_sum_is_a_second_result():
    found = case(
        "FusedRmsNormResidualOutScale", [((M, 512), "fp16"), ((M, 512), "fp32"), ((1,), "fp32")], out_dtype="int8"
    )
    assert [(tensor.name, tensor.dtype) for tensor in found.outputs] == [("out", "int8"), ("residual_out", "fp32")]
    problem = {"N": 512, "residual": "fp32", "residual_out": True, "out_dtype": "int8", "out_scale": True}
    assert check_launches(found, lambda m, _: RmsNormProblem(M=m, **problem), [(1, 1), (100, 100)]) >= 4


def test_code_for_all_sizes_is_right_for_each():
    found = case("FusedRmsNormResidualWeight", [((M, 96), "bf16"), ((M, 96), "bf16"), ((96,), "fp16")])
    problem = {"N": 96, "dtype": "bf16", "residual": "bf16", "weight": "fp16", "residual_out": True}
    check_results(
        found,
        lambda m, _: RmsNormProblem(M=m, **problem),
        [(1, 1), (8, 8), (13, 13)],
        RmsNormConfig(BLOCK_M=4, BLOCK_N=128),
    )


@pytest.mark.parametrize(
    ("plugin", "inputs", "attributes", "message"),
    [
        ("FusedRmsNorm", [((8, M), "fp16")], {}, "N, dimension 1 of x, must be static"),
        ("FusedRmsNormWeight", [((8, 64), "fp16"), ((32,), "fp16")], {}, "weight is (32,) and must be (64,)"),
        ("FusedRmsNorm", [((8, 64), "int8")], {}, "rmsnorm takes fp16"),
        ("FusedRmsNorm", [((8, 64), "fp16")], {"eps": -1.0}, "eps=-1.0 must be a finite number of at least 0"),
        ("FusedRmsNorm", [((8, 64), "fp16")], {"weight_offset": 1e39}, "weight_offset=1e+39 must be a finite number"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(plugin, inputs, attributes, message):
    with pytest.raises((ProblemError, UsageError)) as caught:
        case(plugin, inputs, **attributes).check()
    assert message in str(caught.value)

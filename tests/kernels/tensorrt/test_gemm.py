"""The GEMM's plugins: which problem tensors make, and that launches for all sizes are right for each."""

from __future__ import annotations

import pytest

from tests.kernels.tensorrt.cases import case, check_launches, check_results
from tilewright.kernels import GemmConfig, GemmProblem
from tilewright.tuning_db.errors import ProblemError, UsageError

M = [1, 128, 1000]


def test_a_layer_with_any_number_of_rows():
    found = case("FusedGemmBias", [((M, 256), "fp16"), ((256, 192), "fp16"), ((192,), "fp16")], activation="relu")
    checked = check_launches(
        found,
        lambda m: GemmProblem(M=m, N=192, K=256, bias="fp16", activation="relu"),
        [(size,) for size in (1, 15, 16, 17, 127, 128, 129, 1000)],
    )
    assert checked >= 20


def test_leading_dimensions_under_one_matrix_are_rows():
    found = case("FusedGemm", [((M, 7, 256), "bf16"), ((256, 192), "bf16")])
    assert check_launches(found, lambda b: GemmProblem(M=7 * b, N=192, K=256, dtype="bf16"), [(1,), (16,), (33,)]) >= 20
    found = case("FusedGemm", [((M, M, 256), "fp16"), ((1, 1, 256, 192), "fp16")])
    assert check_launches(found, lambda b, s: GemmProblem(M=b * s, N=192, K=256), [(1, 1), (3, 5), (16, 64)]) >= 20


def test_scales_of_all_rows_of_leading_dimensions():
    rows = [5, 35, 42]
    found = case("FusedGemmAScale", [(([1, 5, 6], [5, 7, 7], 64), "fp16"), ((64, 32), "fp16"), ((rows,), "fp32")])
    sizes = [(1, 5, 5), (2, 6, 12), (6, 7, 42)]
    assert check_launches(found, lambda b, s, m: GemmProblem(M=b * s, N=32, K=64, a_scale="row"), sizes) >= 10


def test_all_sizes_may_be_dynamic():
    found = case("FusedGemm", [((M, M), "fp16"), ((M, M), "fp16")])
    sizes = [(1, 1, 1, 1), (128, 64, 64, 256), (1000, 100, 100, 999), (33, 1000, 1000, 16)]
    assert check_launches(found, lambda m, k, _, n: GemmProblem(M=m, N=n, K=k), sizes) >= 10


@pytest.mark.parametrize("turned", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_transposed_operands_in_a_batch(turned):
    a = (64, 96) if turned[0] else (96, 64)
    b = (80, 64) if turned[1] else (64, 80)
    found = case("FusedGemm", [((M, *a), "fp16"), ((M, *b), "fp16")], trans_a=turned[0], trans_b=turned[1])
    layouts = {name: "col" if flag else "row" for name, flag in zip(("a_layout", "b_layout"), turned, strict=True)}
    problem = {"M": 96, "N": 80, "K": 64, **layouts}
    assert check_launches(found, lambda n, _: GemmProblem(batch=n, **problem), [(2, 2), (3, 3), (64, 64)]) >= 10
    assert found.problem(found.profile.min) == GemmProblem(**problem)  # one of a batch that may be larger


def test_broadcast_operands_and_residual():
    found = case(
        "FusedGemmResidual", [((1, 96, 64), "fp16"), ((M, 64, 80), "fp16"), ((1, 96, 80), "bf16")], activation="silu"
    )
    problem = {"M": 96, "N": 80, "K": 64, "a_broadcast": True, "residual": "bf16", "residual_broadcast": True}
    assert check_launches(found, lambda n: GemmProblem(batch=n, activation="silu", **problem), [(2,), (1000,)]) >= 10
    found = case("FusedGemm", [((M, 64, 96), "fp16"), ((64, 80), "fp16")], trans_a=1)
    problem = {"M": 96, "N": 80, "K": 64, "a_layout": "col", "b_broadcast": True}
    assert check_launches(found, lambda n: GemmProblem(batch=n, **problem), [(2,), (17,)]) >= 10


def test_gated_columns_halve_the_result():
    found = case("FusedGemm", [((M, 64), "fp16"), ((64, 256), "fp16")], gated="halves", activation="silu")
    assert found.outputs[0].dims[1] == 128
    problem = {"N": 256, "K": 64, "gated": "halves", "activation": "silu"}
    assert check_launches(found, lambda m: GemmProblem(M=m, **problem), [(1,), (128,), (77,)]) >= 10


def test_scales_say_their_axis_by_their_shape():
    def fields(a_scale, b_scale):
        inputs = [((M, 64), "int8"), ((64, 32), "int8"), (a_scale, "fp32"), (b_scale, "fp32")]
        found = case("FusedGemmAScaleBScale", inputs, out_dtype="fp16")
        problem = found.problem(found.profile.opt | dict.fromkeys(found.profile.opt, 128))
        return problem.a_scale, problem.b_scale

    assert fields((1,), (1,)) == ("tensor", "tensor")
    assert fields((), (32,)) == ("tensor", "column")
    assert fields((M,), (32,)) == ("row", "column")


def test_weights_of_fewer_bits():
    inputs = [((M, 128), "fp16"), ((64, 32), "int8"), ((2, 32), "bf16"), ((2, 32), "int8")]
    found = case("FusedGemmBScaleBZero", inputs, weights="int4", group_size=64)
    assert found.problem(found.profile.opt) == GemmProblem(
        M=128, N=32, K=128, b_dtype="int4", b_scale="group", group_size=64, b_scale_dtype="bf16", b_zero=True
    )
    found = case("FusedGemmBScale", [((M, 128), "bf16"), ((32, 128), "int8"), ((32,), "fp32")], trans_b=1)
    assert found.problem(found.profile.opt) == GemmProblem(
        M=128, N=32, K=128, dtype="bf16", b_dtype="int8", b_layout="col", b_scale="column"
    )


def test_a_quantised_result():
    inputs = [((M, 64), "fp8e4m3"), ((64, 32), "fp8e4m3"), ((1,), "fp32"), ((1,), "fp32"), ((1,), "fp32")]
    found = case("FusedGemmAScaleBScaleOutScale", inputs, out_dtype="fp8e4m3")
    assert check_launches(
        found,
        lambda m: GemmProblem(
            M=m, N=32, K=64, dtype="fp8e4m3", a_scale="tensor", b_scale="tensor", out_dtype="fp8e4m3", out_scale=True
        ),
        [(1,), (500,)],
        board="rtx4090",
    )


def test_a_bias_of_rows():
    found = case("FusedGemmBias", [((64, 96), "fp16"), ((96, 80), "fp16"), ((64, 1), "fp16")])
    assert found.problem({}) == GemmProblem(M=64, N=80, K=96, bias="fp16", bias_axis="m")


@pytest.mark.parametrize("turned", [0, 1])
@pytest.mark.parametrize("b", [(96, 80), (M, 96, 80)])
def test_a_bias_of_rows_is_that_of_every_matrix_of_a_batch(turned, b):
    a = (96, 64) if turned else (64, 96)
    found = case("FusedGemmBias", [((M, *a), "fp16"), (b, "fp16"), ((64, 1), "fp16")], trans_a=turned)
    problem = {"M": 64, "N": 80, "K": 96, "bias": "fp16", "bias_axis": "m", "b_broadcast": len(b) == 2}
    problem["a_layout"] = "col" if turned else "row"
    sizes = [(2,), (17,), (1000,)]
    checked = check_launches(
        found, lambda n, _=0: GemmProblem(batch=n, **problem), sizes if len(b) == 2 else [2 * size for size in sizes]
    )
    assert checked >= 10


@pytest.mark.parametrize("residual", [(96, 80), (1, 96, 80)])
def test_a_residual_for_every_matrix_of_a_batch_under_one_matrix(residual):
    found = case("FusedGemmResidual", [((M, 96, 64), "fp16"), ((64, 80), "fp16"), (residual, "bf16")])
    problem = {"M": 96, "N": 80, "K": 64, "b_broadcast": True, "residual": "bf16", "residual_broadcast": True}
    assert check_launches(found, lambda n: GemmProblem(batch=n, **problem), [(2,), (1000,)]) >= 10


@pytest.mark.parametrize(
    "config", [GemmConfig(32, 32, 32, num_stages=2), GemmConfig(32, 32, 32, PERSISTENT=True)], ids=str
)
def test_code_for_all_sizes_is_right_for_each(config):
    small = [1, 33, 64]
    found = case("FusedGemmBias", [((small, small), "fp16"), ((small, 48), "fp16"), ((48,), "fp32")], activation="relu")
    check_results(
        found,
        lambda m, k, _: GemmProblem(M=m, N=48, K=k, bias="fp32", activation="relu"),
        [(1, 1, 1), (32, 64, 64), (33, 40, 40), (64, 33, 33)],
        config,
    )
    found = case("FusedGemmResidual", [((small, 40, 32), "bf16"), ((small, 32, 16), "bf16"), ((small, 40, 16), "bf16")])
    check_results(
        found,
        lambda n, *_: GemmProblem(M=40, N=16, K=32, batch=n, dtype="bf16", residual="bf16"),
        [(1, 1, 1), (3, 3, 3)],
        config,
    )


@pytest.mark.parametrize(
    ("plugin", "inputs", "attributes", "message"),
    [
        ("FusedGemm", [((8,), "fp16"), ((8, 8), "fp16")], {}, "a has 1 dimensions and must be"),
        ("FusedGemm", [((8, 16), "fp16"), ((8, 8), "fp16")], {}, "b must have 16 rows for K=16"),
        ("FusedGemm", [((2, 8, 8), "fp16"), ((3, 8, 8), "fp16")], {}, "leading dimensions must be equal"),
        ("FusedGemm", [((2, 8, 8), "fp16"), ((2, 2, 8, 8), "fp16")], {}, "a has 3 dimensions and b 4"),
        ("FusedGemm", [((8, 8), "fp16"), ((8, 8), "bf16")], {}, "dtype='fp16' with b_dtype='bf16'"),
        ("FusedGemm", [((8, 8), "int32"), ((8, 8), "int32")], {}, "gemm takes fp16"),
        ("FusedGemm", [((8, 8), "fp16"), ((8, 8), "fp16")], {"activation": "rely"}, "rely"),
        # As of an exporter that lost the text: were it "none", the engine would be wrong without a word.
        ("FusedGemm", [((8, 8), "fp16"), ((8, 8), "fp16")], {"activation": ""}, "activation='' is no name"),
        (
            "FusedGemm",
            [((8, 8), "fp16"), ((8, 8), "fp16")],
            {"gated": "both"},
            "gated='both' must be one of none, halves",
        ),
        ("FusedGemm", [((8, 8), "fp16"), ((8, 8), "fp16")], {"trans_a": 2}, "trans_a=2 must be 0 or 1"),
        ("FusedGemm", [((8, 8), "fp16"), ((4, 8), "fp16")], {"weights": "int4"}, "packed in bytes"),
        ("FusedGemmBias", [((8, 8), "fp16"), ((8, 8), "fp16"), ((7,), "fp16")], {}, "bias is (7,) and must be (8,)"),
        ("FusedGemmResidual", [((8, 8), "fp16"), ((8, 8), "fp16"), ((4, 8), "fp16")], {}, "residual is (4, 8)"),
        (
            "FusedGemmResidual",
            [((2, 8, 8), "fp16"), ((8, 8), "fp16"), ((1, 1, 8, 8), "fp16")],
            {},
            "residual is (1, 1, 8, 8) and must be (2, 8, 8)",
        ),
        (
            "FusedGemmBias",
            [((2, 8, 8), "fp16"), ((8, 6), "fp16"), ((16, 1), "fp16")],
            {},
            "bias is (16, 1) and must be (6,) or (8, 1)",
        ),
        (
            "FusedGemmAScale",
            [((8, 8), "fp16"), ((8, 8), "fp16"), ((1,), "fp16")],
            {},
            "a_scale is fp16 and must be fp32",
        ),
        (
            "FusedGemm",
            [((8, 8), "fp16"), ((8, M), "fp16")],
            {"gated": "halves"},
            "N of gated columns, dimension 1 of b",
        ),
        (
            "FusedGemmBScale",
            [((8, M), "fp16"), ((64, 8), "int8"), ((8,), "fp32")],
            {},
            "K of quantised weights, dimension 1 of a, must be static: it is dynamic",
        ),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(plugin, inputs, attributes, message):
    with pytest.raises((ProblemError, UsageError)) as caught:
        case(plugin, inputs, **attributes).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

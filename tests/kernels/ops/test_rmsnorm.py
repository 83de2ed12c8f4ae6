"""The fused RMSNorm in the interpreter, against float64 and against ONNX Runtime."""

from __future__ import annotations

import itertools

import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.kernels.conformance import SIZES, assert_every_pair, pairwise
from tests.kernels.ops.rmsnorm_cases import RESULTS, WALKS, conforms, near, norm, random_array, run
from tilewright.kernels import RmsNormConfig, RmsNormProblem, rmsnorm
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.problem import INPUT_DTYPES, reference

# Every dtype, result, layout and size, in pairs

CONFIGS = (
    None,
    RmsNormConfig(1, 256),
    RmsNormConfig(4, 256, num_warps=8),
    RmsNormConfig(1, 32, num_stages=3),
    RmsNormConfig(2, 64, num_warps=1, num_stages=2),
    RmsNormConfig(8, 16),
)

AXES = {
    "dtype": INPUT_DTYPES,
    "weight": (None, *INPUT_DTYPES),
    "residual": (None, *INPUT_DTYPES),
    "residual_out": (False, True),
    "result": tuple(RESULTS),
    "memory": ("dense", "unaligned", "strided", "strided unaligned"),
    "M": (1, 2, 7),
    "N": (*SIZES, 8, 64, 256),
    "config": CONFIGS,
}


def problem_of(row):
    """The problem that a row of AXES describes."""
    return RmsNormProblem(
        M=row["M"],
        N=row["N"],
        dtype=row["dtype"],
        weight=row["weight"],
        residual=row["residual"],
        residual_out=row["residual_out"] and row["residual"] is not None,
        strided="strided" in row["memory"],
        aligned="unaligned" not in row["memory"],
        **RESULTS[row["result"]],
    )


def described(row):
    config = row["config"]
    tile = "default" if config is None else f"{config.BLOCK_M}x{config.BLOCK_N}"
    return f"{problem_of(row)} on {tile}"


ROWS = list(pairwise(AXES))


def test_rows_cover_every_pair():
    assert_every_pair(ROWS, AXES)


@pytest.mark.parametrize("row", ROWS, ids=described)
def test_equals_the_reference(row):
    conforms(problem_of(row), row["config"])


@pytest.mark.smoke
@pytest.mark.parametrize("kind", INPUT_DTYPES)
@pytest.mark.parametrize("result", RESULTS)
def test_equals_the_reference_with_all_that_can_be_fused(kind, result):
    fused = RmsNormProblem(M=3, N=79, dtype=kind, weight="fp32", residual="bf16", residual_out=True, **RESULTS[result])
    conforms(fused)
    conforms(fused, RmsNormConfig(2, 32))


@pytest.mark.parametrize("size", SIZES)
def test_one_size_at_a_time(size):
    for problem in (
        RmsNormProblem(M=size, N=17, dtype="fp32", weight="fp32"),
        RmsNormProblem(M=3, N=size, dtype="fp32", weight="fp32", residual="fp32", residual_out=True),
    ):
        conforms(problem)
        conforms(problem, RmsNormConfig(4, 16))


@pytest.mark.parametrize("length", [8192, 8193, 65536, 65537, 100_000])
def test_long_rows(length):
    conforms(RmsNormProblem(M=2, N=length, weight="fp16", residual="fp16", residual_out=True))


@pytest.mark.parametrize(("m", "n"), [*itertools.product((4, 5), (64, 63))])
def test_exact_multiples_need_no_mask_and_others_do(m, n):
    problem = RmsNormProblem(M=m, N=n, dtype="fp32", weight="fp32")
    config = RmsNormConfig(2, 16)
    flags = dict(RMSNORM.launches(problem, config)[0].constexprs)
    assert (flags["EVEN_M"], flags["EVEN_N"], flags["WHOLE"]) == (m == 4, n == 64, False)
    conforms(problem, config)


small = st.integers(1, 40)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_small_problem_with_any_configuration(data):
    residual = data.draw(st.sampled_from([None, *INPUT_DTYPES]))
    problem = RmsNormProblem(
        M=data.draw(small),
        N=data.draw(st.integers(1, 200)),
        dtype=data.draw(st.sampled_from(INPUT_DTYPES)),
        weight=data.draw(st.sampled_from([None, *INPUT_DTYPES])),
        residual=residual,
        residual_out=residual is not None and data.draw(st.booleans()),
        strided=data.draw(st.booleans()),
        aligned=data.draw(st.booleans()),
        **RESULTS[data.draw(st.sampled_from(list(RESULTS)))],
    )
    config = RmsNormConfig(
        data.draw(st.sampled_from([1, 4, 16, 64])),
        data.draw(st.sampled_from([16, 64, 256])),
        num_warps=data.draw(st.sampled_from([4, 8])),
        num_stages=data.draw(st.integers(1, 4)),
    )
    conforms(problem, config, seed=data.draw(st.integers(0, 2**32 - 1)))


# Numbers


def by_onnx(operator, arrays, outputs, *, domain, **attributes):
    """What ONNX Runtime computes."""
    node = helper.make_node(operator, [*arrays], [each or "" for each in outputs], domain=domain, **attributes)
    kinds = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}
    kind = kinds[str(arrays["x"].dtype)]
    graph = helper.make_graph(
        [node],
        "norm",
        [helper.make_tensor_value_info(name, kinds[str(each.dtype)], each.shape) for name, each in arrays.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs if name],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)


@pytest.mark.parametrize("config", WALKS, ids=["whole rows", "walk"])
def test_equals_onnx_runtime(config):
    x, r, w = random_array((2, 3, 100)), random_array((2, 3, 100), seed=1), random_array((100,))
    (expected,) = by_onnx("SimplifiedLayerNormalization", {"x": x, "scale": w}, ["y"], domain="", axis=-1, epsilon=1e-5)
    near(rmsnorm(x, w, eps=1e-5, config=config), expected)
    arrays = {"x": x, "skip": r, "gamma": w}
    expected, total = by_onnx(
        "SkipSimplifiedLayerNormalization", arrays, ["y", None, None, "sum"], domain="com.microsoft", epsilon=1e-5
    )
    out, h = rmsnorm(x, w, residual=r, return_residual=True, eps=1e-5, config=config)
    near(out, expected)
    np.testing.assert_array_equal(h, total)


@pytest.mark.parametrize("config", WALKS, ids=["whole rows", "walk"])
def test_the_sum_is_normalised_before_it_is_rounded(config):
    # In fp16 256 + 1/16 is 256, and 256 + 3/16 is 256.25: rounded first, the results would be further apart.
    x = np.full((1, 32), 256, np.float16)
    r = np.tile(np.array([1 / 16, 3 / 16], np.float16), (1, 16))
    out, h = rmsnorm(x, residual=r, return_residual=True, out_dtype="fp32", config=config)
    np.testing.assert_array_equal(h, np.tile(np.array([256, 256.25], np.float16), (1, 16)))
    near(out, norm(x.astype(float) + r), relative=1e-6)
    assert not np.allclose(out, norm(h), rtol=1e-5)


@pytest.mark.parametrize("config", WALKS, ids=["whole rows", "walk"])
@pytest.mark.parametrize("kind", ["int8", "fp8e4m3", "fp8e5m2"])
def test_a_rows_scale_takes_its_largest_to_the_types_largest(kind, config):
    x, w = random_array((5, 75)), random_array((75,))
    x[0] *= 1e4
    x[3] = 0
    out, scale = rmsnorm(x, w, out_dtype=kind, out_scale="row", config=config)
    largest = {"int8": 127, "fp8e4m3": 448, "fp8e5m2": 57344}[kind]
    wide = out.astype(np.float64)
    assert np.abs(wide).max(1).tolist() == [largest, largest, largest, 0, largest]
    expected = norm(x) * w
    assert scale.shape == (5, 1)
    near(scale[[0, 1, 2, 4], 0], np.abs(expected).max(1)[[0, 1, 2, 4]] / largest)
    assert scale[3, 0] == 1
    step = {"int8": 0, "fp8e4m3": 2.0**-4, "fp8e5m2": 2.0**-3}[kind]
    assert (np.abs(wide * scale - expected) <= step * np.abs(expected) + 0.501 * scale).all()


@pytest.mark.parametrize("config", WALKS, ids=["whole rows", "walk"])
def test_nan_and_infinity_stay_in_their_row(config):
    x, w = random_array((4, 50)), random_array((50,))
    x[1, 7], x[2, 9] = np.nan, np.inf
    expected = norm(np.delete(x, [1, 2], 0)) * w
    out = rmsnorm(x, w, config=config)
    near(out[[0, 3]], expected)
    assert np.isnan(out[1]).all()
    assert np.isnan(out[2, 9])
    assert (np.delete(out[2], 9) == 0).all()
    quantised, scale = rmsnorm(x, w, out_dtype="fp8e4m3", out_scale="row", config=config)
    assert np.isnan(scale[1:3]).all()
    assert np.isnan(quantised[1:3].astype(float)).all()
    near(scale[[0, 3], 0], np.abs(expected).max(1) / 448)


@pytest.mark.parametrize("config", [RmsNormConfig(2, 16), RmsNormConfig(2, 64)], ids=["walk", "whole rows"])
@pytest.mark.parametrize("kind", ["int8", "fp8e4m3"])
def test_rows_of_next_to_nothing_are_rows_of_zeros(config, kind):
    x = np.tile(np.array([1, 0, 0.5, -0.25, 1], np.float32), (3, 6)) * np.array([[1e-37], [1e-20], [0]], np.float32)
    quantised, scale = rmsnorm(x, out_dtype=kind, out_scale="row", config=config)
    assert (quantised[[0, 2]].astype(float) == 0).all()
    assert (scale[[0, 2]] == 1).all()
    most = 127 if kind == "int8" else 448
    np.testing.assert_allclose(quantised[1].astype(float), most * np.array([1, 0, 0.5, -0.25, 1] * 6), atol=1)


@pytest.mark.parametrize("config", [RmsNormConfig(2, 16), RmsNormConfig(2, 64)], ids=["walk", "whole rows"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 127), ("fp8e4m3", 448), ("fp8e5m2", 57344)])
def test_a_row_whose_scaling_passes_fp32_has_scale_1(config, kind, most):
    # h is multiplied by most / max|h · weight|, which is more than fp32 has in the second row, and less in the first.
    row = np.array([1, -0.5, 0.25, 0.125] * 5, np.float32)
    x, w = np.stack([4 * row, row]) * np.float32(1e-17), np.full(20, most * 1.5e-22, np.float32)
    problem = RmsNormProblem(M=2, N=20, dtype="fp32", weight="fp32", out_dtype=kind, row_scale=True)
    expected = reference(problem, {"x": x, "weight": w}, eps=0.0)
    quantised, scale = rmsnorm(x, w, eps=0.0, out_dtype=kind, out_scale="row", config=config)
    assert scale[1] == expected["row_scale"][1] == 1
    assert (quantised[1].astype(float) == 0).all()
    near(scale[:, 0] / expected["row_scale"], np.ones(2))
    np.testing.assert_allclose(quantised[0].astype(float), most * row, rtol=0.04, atol=0.51)


@pytest.mark.smoke
@pytest.mark.parametrize("config", [None, RmsNormConfig(2, 32, num_stages=3)], ids=["whole rows", "walk"])
def test_two_runs_give_the_same_bits(config):
    problem = RmsNormProblem(
        M=5, N=300, weight="fp16", residual="fp16", residual_out=True, row_scale=True, out_dtype="int8"
    )
    arrays = problem.inputs(3)
    first, second = (run(problem, arrays, {}, config) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.tobytes() == other.tobytes()

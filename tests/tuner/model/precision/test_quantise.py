"""Quantised layers compute what integer arithmetic says, and refuse what kernels can't do."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import (
    convolutions,
    dtypes,
    every_layer,
    fused,
    node,
    operators,
    output,
    perceptron,
    plan_of,
    single,
)
from tests.tuner.model.graphs import model_of, normal, relative_error
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import (
    constant,
    dtype_name,
    fused_nodes,
    plugin_inputs,
    plugin_settings,
    static_shape,
)
from tilewright.tuner.model.precision.quantise import (
    LayerPrecision,
    Weights,
    apply_precision,
    channel_scales,
    eligible,
    quantise_weights,
)
from tilewright.tuning_db.errors import ModelError, UsageError


def layer(model: ir.Model, name: str) -> ir.Node:
    return next(each for each in fused_nodes(model) if each.name == name)


def on_int8(x: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(np.rint(x / np.float32(scale)), -128, 127).astype(np.int64)


def test_a_gemm_is_integer_arithmetic_with_scales() -> None:
    a, b, bias = normal(0, 5, 48), normal(1, 48, 24), normal(2, 24)
    model = single("gemm", {"a": a, "b": b, "bias": bias}, ("a",), activation="relu")
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {"a": 0.02})}, base="fp32")
    columns = np.abs(b).max(axis=0) / np.float32(127)
    products = on_int8(a, 0.02) @ np.rint(b / columns).astype(np.int64)
    wanted = np.maximum(np.float32(0.02) * columns.astype(np.float64) * products + bias, 0)
    np.testing.assert_allclose(output(mixed, {"a": a}), wanted, rtol=1e-5, atol=1e-5)
    assert layer(mixed, "layer").op_type == "FusedGemmAScaleBScaleBias"


@pytest.mark.parametrize("turned", ["trans_a", "trans_b"])
def test_turned_operands_have_the_scales_of_their_columns(turned: str) -> None:
    a, b = normal(0, 16, 48), normal(1, 48, 24) * np.arange(1, 25, dtype=np.float32)
    inputs = {"a": a.T.copy() if turned == "trans_a" else a, "b": b.T.copy() if turned == "trans_b" else b}
    model = single("gemm", inputs, ("a",), **{turned: 1})
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {"a": 0.03})}, base="fp32")
    columns = np.abs(b).max(axis=0) / np.float32(127)
    wanted = np.float32(0.03) * columns * (on_int8(a, 0.03) @ np.rint(b / columns).astype(np.int64))
    np.testing.assert_allclose(output(mixed, {"a": inputs["a"]}), wanted, rtol=1e-5, atol=1e-4)


def test_rows_of_more_dimensions_meet_turned_weights() -> None:
    """As a `Gemm` is whose rows were reshaped."""
    a, b = normal(0, 2, 3, 16), normal(1, 24, 16)
    mixed = apply_precision(
        single("gemm", {"a": a, "b": b}, ("a",), trans_b=1), {"layer": LayerPrecision("int8", {"a": 0.03})}, base="fp32"
    )
    columns = np.abs(b).max(axis=1) / np.float32(127)
    wanted = np.float32(0.03) * columns * (on_int8(a, 0.03) @ np.rint(b.T / columns).astype(np.int64))
    np.testing.assert_allclose(output(mixed, {"a": a}), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("op", ["gemm", "conv2d"])
def test_a_computed_bias_is_added_as_it_is(op: str) -> None:
    x, w = (normal(0, 5, 48), normal(1, 48, 24)) if op == "gemm" else (normal(0, 1, 48, 6, 6), normal(1, 24, 48, 1, 1))
    names, bias = ("a", "b") if op == "gemm" else ("x", "w"), normal(2, 24)
    model = single(op, {names[0]: x, names[1]: w, "bias": bias}, (names[0], "bias"))
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {names[0]: 0.03})}, base="fp32")
    along = bias if op == "gemm" else bias[:, None, None]
    without = output(mixed, {names[0]: x, "bias": np.zeros_like(bias)})
    np.testing.assert_allclose(output(mixed, {names[0]: x, "bias": bias}), without + along, rtol=1e-5, atol=1e-5)
    assert len(mixed.graph.inputs) == 2


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_convolution_has_a_scale_for_each_filter(groups: int) -> None:
    x, w = (
        normal(0, 2, 16, 7, 7),
        normal(1, 32, 16 // groups, 3, 3) * np.arange(1, 33, dtype=np.float32)[:, None, None, None],
    )
    settings = {"groups": groups, "pad_top": 1, "pad_left": 1, "stride_h": 2}
    model = single("conv2d", {"x": x, "w": w, "bias": normal(2, 32)}, ("x",), **settings)
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {"x": 0.03})}, base="fp32")
    filters = np.abs(w).max(axis=(1, 2, 3)) / np.float32(127)
    exact = single(
        "conv2d",
        {"x": x, "w": np.rint(w / filters[:, None, None, None]) * filters[:, None, None, None], "bias": normal(2, 32)},
        ("x",),
        **settings,
    )
    rounded = (on_int8(x, 0.03) * np.float32(0.03)).astype(np.float32)
    np.testing.assert_allclose(output(mixed, {"x": x}), output(exact, {"x": rounded}), rtol=1e-4, atol=1e-3)
    assert dtype_name(plugin_inputs(layer(mixed, "layer"))["w"]) == "int8"


def test_fp8_rounds_to_e4m3() -> None:
    a, b = normal(0, 5, 48), normal(1, 48, 24)
    model = single("gemm", {"a": a, "b": b}, ("a",))
    mixed = apply_precision(model, {"layer": LayerPrecision("fp8", {"a": 0.01})}, base="fp32")
    kind = ml_dtypes.float8_e4m3fn
    columns = np.abs(b).max(axis=0) / np.float32(448)
    rounded = (a / np.float32(0.01)).astype(kind).astype(np.float32), (b / columns).astype(kind).astype(np.float32)
    wanted = np.float32(0.01) * columns * (rounded[0] @ rounded[1])
    np.testing.assert_allclose(output(mixed, {"a": a}), wanted, rtol=1e-4, atol=1e-4)


def test_attention_takes_fp8_with_a_scale_for_each_operand() -> None:
    arrays = {name: normal(index, 1, 4, 32, 32) for index, name in enumerate("qkv")}
    model = single("attention", arrays, ("q", "k", "v"))
    scales = {name: float(np.abs(array).max()) / 448 for name, array in arrays.items()}
    mixed = apply_precision(model, {"layer": LayerPrecision("fp8", scales)}, base="fp16")
    assert layer(mixed, "layer").op_type == "FusedAttentionScales"
    assert 1e-3 < relative_error(output(mixed, arrays), output(model, arrays)) < 0.1


def test_a_scale_that_a_layer_has_already_stays_in_the_product() -> None:
    a, b = normal(0, 5, 48), normal(1, 48, 24)
    model = single("gemm", {"a": a, "b": b, "a_scale": np.full(1, 0.5, np.float32)}, ("a",))
    scale = float(np.abs(a).max()) / 127
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {"a": scale})}, base="fp32")
    assert relative_error(output(mixed, {"a": a}), 0.5 * (a @ b)) < 0.02


@pytest.mark.parametrize("base", ["fp32", "fp16", "bf16"])
def test_bias_residual_and_result_have_the_base_type(base: str) -> None:
    inputs = {"a": normal(0, 6, 32), "b": normal(1, 32, 16), "bias": normal(2, 16), "residual": normal(3, 6, 16)}
    model = single("gemm", inputs, ("a", "residual"))
    # Not the graph's output: that leaves the kernel in fp32.
    edit = Editor(model)
    last = edit.node("Relu", [model.graph.outputs[0]], model.graph.outputs[0], ir.DataType.FLOAT, base="z")
    model.graph.append(last)
    model.graph.outputs[0] = last.outputs[0]
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {"a": 0.03})}, base=base)
    made = layer(mixed, "layer")
    kinds = {name: dtype_name(each) for name, each in plugin_inputs(made).items()}
    assert kinds == {"a": "int8", "b": "int8", "a_scale": "fp32", "b_scale": "fp32", "bias": base, "residual": base}
    assert dtype_name(made.outputs[0]) == base
    assert {"a": inputs["a"], "residual": inputs["residual"]}.keys() == {each.name for each in mixed.graph.inputs}
    assert (
        relative_error(
            output(mixed, {name: inputs[name] for name in ("a", "residual")}),
            output(model, {name: inputs[name] for name in ("a", "residual")}),
        )
        < 0.05
    )


def test_a_graph_output_leaves_the_kernel_in_its_own_type() -> None:
    model = perceptron()
    mixed = apply_precision(model, {}, base="fp16")
    assert plugin_settings(layer(mixed, "last"))["out_dtype"] == "fp32"
    assert operators(mixed).count("Cast") == 1  # of the input


def test_layers_share_the_step_that_quantises_their_input() -> None:
    model = convolutions()
    feeds = [{"x": normal(9, 2, 3, 16, 16)}]
    plan = plan_of(model, feeds)
    mixed = apply_precision(model, plan, base="fp32", fold=False)
    assert operators(mixed).count("QuantizeLinear") == 2  # of p0, for two layers, and of joined
    apart = {**plan, "left": LayerPrecision("int8", {"x": plan["left"].scales["x"] * 2})}
    assert operators(apply_precision(model, apart, base="fp32", fold=False)).count("QuantizeLinear") == 3


def test_the_model_given_stays_as_it_is() -> None:
    model = convolutions()
    feeds = [{"x": normal(9, 2, 3, 16, 16)}]
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    for base in ("fp32", "fp16", "bf16"):
        mixed = apply_precision(model, plan_of(model, feeds), base=base)
        assert [each.name for each in fused_nodes(mixed)] == [each.name for each in fused_nodes(model)]
        assert [(each.name, dtype_name(each), static_shape(each)) for each in mixed.graph.outputs] == [
            (each.name, dtype_name(each), static_shape(each)) for each in model.graph.outputs
        ]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("kind", "base", "most"), [("int8", "fp32", 0.02), ("int8", "bf16", 0.03), ("fp8", "fp16", 0.06)]
)
def test_a_whole_network_stays_near(kind: str, base: str, most: float) -> None:
    model = convolutions()
    feed = {"x": normal(9, 2, 3, 16, 16)}
    error = relative_error(
        output(apply_precision(model, every_layer(model, [feed], kind), base=base), feed), output(model, feed)
    )
    assert 1e-4 < error < most


def test_a_model_in_half_precision_is_quantised_from_it() -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"], name="layer"), node("Relu", ["m"], ["y"], name="relu")]
    model = fused(nodes, {"x": (4, 32)}, ["y"], {"w": normal(0, 32, 16, dtype=np.float16)}, dtype="fp16")
    feed = {"x": normal(1, 4, 32, dtype=np.float16)}
    mixed = apply_precision(model, {"layer": LayerPrecision("int8", {"a": 0.03})}, base="fp32")
    assert dtypes(mixed)["y"] == "fp16"
    assert relative_error(output(mixed, feed), output(model, feed).astype(np.float64)) < 0.03


def test_weights_are_rounded_to_even_within_127() -> None:
    w = np.array([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.0, 3.0, 254.0]], np.float32)
    found = quantise_weights(w, 0, "int8")
    np.testing.assert_array_equal(found.scales, np.array([1, 1, 2], np.float32))
    np.testing.assert_array_equal(found.values, np.array([[127, 0, 2, -2], [0, 0, 0, 0], [-127, 0, 2, 127]], np.int8))


def test_scales_are_normal_numbers_however_small_the_weights() -> None:
    scales = channel_scales(np.array([[1e-44, 0], [3e38, -3.4e38]], np.float32), 0, "int8")
    assert (scales >= np.finfo(np.float32).tiny).all()
    assert np.isfinite(scales).all()


def test_large_weights_are_rounded_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal(0, 40, 30)
    whole = [quantise_weights(w, axis, "int8") for axis in (0, 1)]
    monkeypatch.setattr("tilewright.tuner.model.precision.quantise._CHUNK", 64)
    for axis in (0, 1):
        pieces = quantise_weights(w, axis, "int8")
        np.testing.assert_array_equal(pieces.values, whole[axis].values)


def test_given_weights_and_shifts_are_used() -> None:
    a, b = normal(0, 5, 48), normal(1, 48, 24)
    model = single("gemm", {"a": a, "b": b}, ("a",))
    ones = Weights(np.ones(b.shape, np.int8), np.full(24, 0.25, np.float32))
    shift = np.arange(24, dtype=np.float32)
    plan = {"layer": LayerPrecision("int8", {"a": 1.0})}
    mixed = apply_precision(model, plan, base="fp32", weights={"layer": ones}, shifts={"layer": shift})
    wanted = 0.25 * on_int8(a, 1.0).sum(axis=1, keepdims=True) - shift
    np.testing.assert_allclose(output(mixed, {"a": a}), wanted, atol=1e-5)
    with pytest.raises(UsageError, match="node 'layer': quantised weights of int8"):
        apply_precision(model, plan, base="fp32", weights={"layer": Weights(ones.values.T, ones.scales)})
    with pytest.raises(UsageError, match="must be one for each of 24"):
        apply_precision(model, plan, base="fp32", shifts={"layer": shift[:3]})


def test_infinite_weights_are_refused() -> None:
    b = normal(1, 48, 24)
    b[3, 4] = np.nan
    model = single("gemm", {"a": normal(0, 5, 48), "b": b}, ("a",))
    with pytest.raises(ModelError, match="node 'layer': its weights 'b' have infinite or NaN"):
        apply_precision(model, {"layer": LayerPrecision("int8", {"a": 1.0})}, base="fp32")


SQUARE = {"a": normal(0, 32, 32), "b": normal(1, 32, 32)}


@pytest.mark.parametrize(
    ("model", "kind", "reason"),
    [
        (single("gemm", SQUARE, ("a", "b")), "int8", "both operands are activations"),
        (single("gemm", {**SQUARE, "a_scale": normal(2, 32)}, ("a",)), "int8", "a_scale is one for each row"),
        (single("gemm", {**SQUARE, "a_scale": normal(2, 1)}, ("a", "a_scale")), "int8", "a_scale is computed"),
        (single("gemm", SQUARE, ("b",)), "int8", "a is a constant"),
        (
            single("attention", {name: normal(0, 1, 1, 32, 32) for name in "qkv"}, ("q", "k", "v")),
            "int8",
            "attention takes",
        ),
        (
            single("attention", {name: normal(0, 1, 1, 32, 16) for name in "qkv"}, ("q", "k", "v")),
            "fp8",
            "D=16 must be",
        ),
    ],
)
def test_what_kernels_can_not_take_has_a_reason(model: ir.Model, kind: str, reason: str) -> None:
    found = eligible(layer(model, "layer"), kind)
    assert found is not None
    assert reason in found
    names = ("q", "k", "v") if "q" in plugin_inputs(layer(model, "layer")) else ("a",)
    with pytest.raises(UsageError, match=f"node 'layer' can't be {kind}"):
        apply_precision(model, {"layer": LayerPrecision(kind, dict.fromkeys(names, 1.0))}, base="fp32")


@pytest.mark.parametrize(
    ("op", "shapes", "settings"),
    [
        ("gemm", lambda depth: {"a": (1, depth), "b": (depth, 16)}, {}),
        ("gemm", lambda depth: {"a": (1, depth), "b": (16, depth)}, {"trans_b": 1}),
        ("conv2d", lambda depth: {"x": (1, depth // 2, 2, 1), "w": (16, depth // 2, 2, 1)}, {}),
        ("conv2d", lambda depth: {"x": (1, 2 * depth, 1, 1), "w": (16, depth, 1, 1)}, {"groups": 2}),
    ],
)
def test_sums_that_int32_has_no_room_for_are_not_int8(
    op: str, shapes: Callable[[int], dict[str, tuple[int, ...]]], settings: dict[str, int]
) -> None:
    def reason(depth: int, kind: str) -> str | None:
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes(depth).items()}
        return eligible(layer(single(op, arrays, tuple(arrays)[:1], **settings), "layer"), kind)

    assert reason(131_072, "int8") == "its sums are of 131072 products, and int32 has room for 131071 of int8"
    assert reason(131_056, "int8") is None  # 16 less: rows are of whole 16 bytes
    assert reason(131_072, "fp8") is None


def test_quantised_layers_and_other_nodes_have_a_reason_too() -> None:
    model = perceptron()
    mixed = apply_precision(model, plan_of(model, [{"x": normal(9, 8, 32)}]), base="fp32")
    assert eligible(layer(mixed, "middle"), "int8") == "a is int8 already"
    assert eligible(layer(mixed, "first"), "int8") == "its result is quantised already"
    plain = model_of([node("Relu", ["x"], ["y"], name="relu")], {"x": (2, 2)}, ["y"], {})
    assert eligible(plain.graph[0], "int8") == "Relu is no fused node"
    with pytest.raises(UsageError, match="'fp16' must be int8 or fp8"):
        eligible(layer(model, "middle"), "fp16")


@pytest.mark.parametrize(
    ("plan", "base", "message"),
    [
        ({}, "int8", "base='int8' must be one of fp32, fp16, bf16"),
        ({"nowhere": LayerPrecision("fp16")}, "fp32", "the plan has a node 'nowhere'"),
        ({"middle": LayerPrecision("int8")}, "fp32", "'middle' has scales of nothing and needs those of a"),
        ({"middle": LayerPrecision("int8", {"x": 1.0})}, "fp32", "has scales of x and needs those of a"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan: dict[str, LayerPrecision], base: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply_precision(perceptron(), plan, base=base)


@pytest.mark.parametrize(
    ("kind", "scales", "message"),
    [
        ("int4", {}, "'int4' must be one of fp32, fp16, bf16, int8, fp8"),
        ("int8", {"a": 0.0}, "the scale of a, 0.0"),
        ("int8", {"a": float("nan")}, "the scale of a, nan"),
        ("int8", {"a": float("inf")}, "the scale of a, inf"),
    ],
)
def test_precisions_that_can_not_be_are_refused(kind: str, scales: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LayerPrecision(kind, scales)


def test_a_layer_may_stay_in_fp32() -> None:
    model = perceptron()
    mixed = apply_precision(model, {"middle": LayerPrecision("fp32")}, base="fp16")
    kinds = {name: dtype_name(each) for name, each in plugin_inputs(layer(mixed, "middle")).items()}
    assert set(kinds.values()) == {"fp32"}
    assert dtype_name(plugin_inputs(layer(mixed, "last"))["a"]) == "fp16"
    assert constant(plugin_inputs(layer(mixed, "last"))["b"]).dtype == np.float16  # type: ignore[union-attr]

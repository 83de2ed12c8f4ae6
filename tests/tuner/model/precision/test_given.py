"""Layers that a model came with in 8 bits compute what they did, of the integers."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import node, operators, output
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tests.tuner.model.qdq import quantised
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs
from tilewright.tuner.model.precision.given import Given, given_layers, weights_on_grid
from tilewright.tuner.model.precision.quantise import Weights, apply_precision, dequantised, quantise_weights

FEED = {"x": normal(0, 2, 8, 8, 8)}


def network(*, pads: int = 0) -> onnx.ModelProto:
    """Three convolutions with a BatchNorm, a pooling and a residual, and a classifier."""
    around = [pads] * 4
    nodes = [
        node("Conv", ["x", "w0"], ["c0"], name="first", pads=around),
        node("BatchNormalization", ["c0", "gain", "shift", "mean", "var"], ["n0"], name="norm"),
        node("Relu", ["n0"], ["r0"], name="relu0"),
        node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        node("Conv", ["p0", "w1", "b1"], ["c1"], name="left"),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["r1", "w2"], ["c2"], name="right"),
        node("Add", ["c2", "p0"], ["s"], name="add"),
        node("GlobalAveragePool", ["s"], ["g"], name="average"),
        node("Flatten", ["g"], ["f"], name="flatten"),
        node("Gemm", ["f", "w3", "b3"], ["y"], name="classifier", transB=1),
    ]
    constants = {
        "w0": normal(1, 16, 8, 3, 3) / 9,
        "w1": normal(2, 24, 16, 1, 1) / 4,
        "w2": normal(3, 16, 24, 1, 1) / 5,
        "w3": normal(4, 12, 16) / 4,
        "b1": normal(5, 24),
        "b3": normal(6, 12),
        "gain": 1 + normal(7, 16) / 4,
        "shift": normal(8, 16) / 4,
        "mean": normal(9, 16) / 4,
        "var": 1 + normal(10, 16) ** 2,
    }
    return ir.to_proto(model_of(nodes, {"x": (2, 8, 8, 8)}, ["y"], constants, opset=20))


def prepared(model: onnx.ModelProto) -> tuple[ir.Model, ir.Model]:
    """A model as it is read, and fused."""
    shaped = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    original, made = ir.from_proto(shaped), ir.from_proto(shaped)
    fold(made)
    fuse(made)
    return original, made


def in_8_bits(model: onnx.ModelProto, device: str = "sm_89") -> tuple[Given, ir.Model, float]:
    """The layers that a model came with in 8 bits, the model in which they are, and its error in fp32."""
    original, made = prepared(model)
    found = given_layers(made, resolve_device(device))
    mixed = apply_precision(made, found.plan, base="fp32", weights=found.weights)
    return found, mixed, relative_error(output(mixed, FEED), output(original, FEED))


@pytest.mark.parametrize("dtype", ["int8", "fp8e4m3"])
@pytest.mark.parametrize("integers", [True, False])
def test_every_layer_takes_the_integers_that_are_there(dtype: str, integers: bool) -> None:
    found, mixed, error = in_8_bits(quantised(network(pads=1), FEED, dtype=dtype, integers=integers))
    assert set(found.plan) == {"first", "left", "right", "classifier"}
    assert {each.kind for each in found.plan.values()} == {"int8" if dtype == "int8" else "fp8"}
    assert not found.reasons
    assert error < 1e-6
    for layer in fused_nodes(mixed):
        assert {"x_scale", "w_scale"} <= set(plugin_inputs(layer)) or {"a_scale", "b_scale"} <= set(
            plugin_inputs(layer)
        )
    if dtype == "int8":  # of the input, of the pooling, which the residual reads as well, and of the mean
        assert operators(mixed).count("QuantizeLinear") == 3
        assert "DequantizeLinear" not in operators(mixed)


@pytest.mark.parametrize(("dtype", "zero"), [("int8", 0), ("int8", -20), ("uint8", 128), ("uint8", 90)])
def test_zero_points_go_into_biases(dtype: str, zero: int) -> None:
    found, mixed, error = in_8_bits(quantised(network(), FEED, dtype=dtype, zero=zero))
    assert set(found.plan) == {"first", "left", "right", "classifier"}
    assert error < 1e-5
    assert not any(len(each.inputs) > 2 and np.any(each.inputs[2].const_value.numpy()) for each in steps(mixed))


def steps(model: ir.Model) -> list[ir.Node]:
    return [each for each in model.graph if each.op_type in ("QuantizeLinear", "DequantizeLinear")]


def test_a_zero_point_and_padding_leave_a_layer_as_it_is() -> None:
    found, _, error = in_8_bits(quantised(network(pads=1), FEED, zero=-20))
    assert set(found.plan) == {"left", "right", "classifier"}
    assert found.reasons == {"first": "with the zero point -20 of x it must have no padding (quantise symmetrically)"}
    assert error < 1e-5


def test_a_device_without_the_type_has_none() -> None:
    found, _, error = in_8_bits(quantised(network(), FEED, dtype="fp8e4m3"), "sm_86")
    assert not found.plan
    assert set(found.reasons.values()) == {"the model has it in fp8e4m3, which needs sm_89"}
    assert error < 1e-6


def test_weights_off_a_grid_leave_a_layer_as_it_is() -> None:
    model = quantised(network(), FEED, integers=False)
    conv = next(each for each in model.graph.node if each.name == "left")
    conv.input[1] = "w1"
    found, _, error = in_8_bits(model)
    assert set(found.plan) == {"first", "right", "classifier"}
    assert found.reasons["left"].endswith("w is not int8 with one scale for each channel and no zero point")
    assert error < 1e-6


def test_a_scale_for_each_channel_of_activations_leaves_a_layer_as_it_is() -> None:
    model = quantised(network(), FEED)
    for name, array in (("p0_scale", np.full(16, 0.05, np.float32)), ("p0_zero", np.zeros(16, np.int8))):
        tensor = next(each for each in model.graph.initializer if each.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    found, _, error = in_8_bits(model)
    assert "left" not in found.plan
    assert "not one constant scale" in found.reasons["left"]
    assert error < 1e-6


def small(*between: Any, last: str = "d", dtype: str = "int8", zero: Any = 0, opset: int = 21, **more: Any) -> Any:
    """x → steps → what is between → product of weights on a grid, as it is read and fused."""
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dequantise"),
        *between,
        node("DequantizeLinear", ["w", "sw"], ["v"], axis=1, name="weights"),
        node("MatMul", [last, "v"], ["y"], name="layer"),
    ]
    rng = np.random.default_rng(0)
    columns = more.pop("columns", 16)
    stored = ml_dtypes.float8_e4m3fn if dtype == "fp8e4m3" else np.int8
    constants = {
        "s": np.array(more.pop("scale", 1 / 16), np.float32),
        "z": np.asarray(zero, stored),
        "w": rng.integers(-127, 128, (columns, 24)).astype(stored),
        "sw": (0.01 + rng.random(24) / 50).astype(np.float32),
        **more,
    }
    used = {name for each in nodes for name in each.input}
    return prepared(
        ir.to_proto(
            model_of(nodes, {"x": (8, 16)}, ["y"], {n: a for n, a in constants.items() if n in used}, opset=opset)
        )
    )


@pytest.mark.parametrize("opset", [19, 21])
@pytest.mark.parametrize("dtype", ["int8", "fp8e4m3"])
def test_numbers_may_be_moved_between_step_and_layer(dtype: str, opset: int) -> None:
    original, made = small(node("Transpose", ["d"], ["t"], perm=[1, 0]), last="t", columns=8, dtype=dtype, opset=opset)
    found = given_layers(made, resolve_device("sm_89"))
    assert set(found.plan) == {"layer"}
    mixed = apply_precision(made, found.plan, base="fp16", weights=found.weights)
    feed = {"x": normal(0, 8, 16)}
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_parts_of_one_grid_are_joined_and_of_two_are_not() -> None:
    other = [
        node("QuantizeLinear", ["x", "other", "z"], ["r"], name="again"),
        node("DequantizeLinear", ["r", "other", "z"], ["e"], name="back"),
        node("Concat", ["d", "e"], ["j"], axis=1, name="join"),
    ]
    for scale, given in ((1 / 16, True), (1 / 8, False)):
        original, made = small(*other, last="j", columns=32, other=np.array(scale, np.float32))
        found = given_layers(made, resolve_device("sm_86"))
        assert bool(found.plan) == given
        assert given or "not one constant scale" in found.reasons["layer"]
        mixed = apply_precision(made, found.plan, base="fp32", weights=found.weights)
        feed = {"x": normal(0, 8, 16)}
        assert relative_error(output(mixed, feed), output(original, feed)) < 1e-6


def test_what_is_averaged_behind_the_step_leaves_a_layer_as_it_is() -> None:
    _, made = small(node("Clip", ["d", "low", "high"], ["c"]), last="c", low=np.float32(-1), high=np.float32(1))
    found = given_layers(made, resolve_device("sm_86"))
    assert found.reasons == {"layer": "a is quantised in front of Clip, and not behind"}


@pytest.mark.parametrize("scale", [0, -1, np.inf, 1e-39])
def test_scales_that_are_none_leave_a_layer_as_it_is(scale: float) -> None:
    found = given_layers(small(scale=scale)[1], resolve_device("sm_86"))
    assert "is no positive normal number of fp32" in found.reasons["layer"]


def test_integers_that_are_an_output_are_no_hindrance() -> None:
    original, made = small()
    for model in (original, made):
        integers = next(each for each in model.graph if each.name == "quantise").outputs[0]
        model.graph.outputs.append(integers)
    found = given_layers(made, resolve_device("sm_86"))
    mixed = apply_precision(made, found.plan, base="fp32", weights=found.weights)
    feed = {"x": normal(0, 8, 16)}
    for got, wanted in zip(results(mixed, feed), results(original, feed), strict=True):
        assert relative_error(got, wanted) < 1e-6


def test_layers_that_share_weights_share_the_integers() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        node("QuantizeLinear", ["x", "t", "z"], ["r"]),
        node("DequantizeLinear", ["r", "t", "z"], ["e"]),
        node("DequantizeLinear", ["w", "s"], ["v"]),
        node("MatMul", ["d", "v"], ["a"], name="first"),
        node("MatMul", ["e", "v"], ["b"], name="second"),
        node("Concat", ["a", "b"], ["y"], axis=1),
    ]
    constants = {
        "s": np.array(1 / 16, np.float32),
        "t": np.array(1 / 8, np.float32),
        "z": np.array(0, np.int8),
        "w": np.random.default_rng(0).integers(-127, 128, (16, 24), np.int8),
    }
    _, made = prepared(ir.to_proto(model_of(nodes, {"x": (8, 16)}, ["y"], constants)))
    found = given_layers(made, resolve_device("sm_86"))
    mixed = apply_precision(made, found.plan, base="fp16", weights=found.weights)
    first, second = fused_nodes(mixed)
    assert plugin_inputs(first)["b"] is plugin_inputs(second)["b"]


def test_half_precision_has_its_grids_too() -> None:
    for kind in ("int8", "fp8"):
        array, made = rounded(kind, 0)
        factors = np.exp(normal(1, len(array))).astype(np.float16)[:, None]
        half = (array.astype(np.float16) * factors).astype(np.float16)
        found = weights_on_grid(half, 0, kind)
        np.testing.assert_array_equal(found.values.astype(np.float32), made.values.astype(np.float32))
        np.testing.assert_allclose(found.scales, made.scales * factors[:, 0], rtol=5e-4)
        assert weights_on_grid(normal(4, 24, 40).astype(np.float16), 0, kind) is None


def test_a_model_without_steps_has_none() -> None:
    assert given_layers(prepared(network())[1], resolve_device("sm_89")) == Given()


def rounded(kind: str, axis: int, seed: int = 0) -> tuple[np.ndarray, Weights]:
    made = quantise_weights(normal(seed, 24, 40), axis, kind)
    return dequantised(made, axis), made


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_grid_of_each_channel_is_found(kind: str, axis: int) -> None:
    array, made = rounded(kind, axis)
    factors = np.exp(normal(1, array.shape[axis])).astype(np.float32)  # as BatchNorm's
    found = weights_on_grid(array * (factors[:, None] if axis == 0 else factors), axis, kind)
    np.testing.assert_array_equal(found.values.astype(np.float32), made.values.astype(np.float32))
    np.testing.assert_allclose(found.scales, made.scales * factors, rtol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_one_scale_for_all_channels_will_do(kind: str) -> None:
    largest = {"int8": 127, "fp8": 448}[kind]
    over = normal(2, 24, 40) * np.exp(normal(3, 24))[:, None]
    over *= np.float32(largest) / np.abs(over).max()
    values = np.rint(over) if kind == "int8" else over.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    array = (values * np.float32(0.0123)).astype(np.float32)
    found = weights_on_grid(array, 0, kind)
    assert relative_error(dequantised(found, 0), array) < 1e-6


def test_the_least_integer_and_channels_of_zeros_are_on_a_grid() -> None:
    values = np.int8([[-128, 127, 3], [0, 0, 0], [1, -1, 0]])
    found = weights_on_grid(values * np.float32(0.3), 0, "int8")
    np.testing.assert_array_equal(dequantised(found, 0), values * np.float32(0.3))
    assert found.values[0].tolist() == [-128, 127, 3]
    assert found.scales[1] == 1


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_other_weights_are_on_none(kind: str) -> None:
    array, _ = rounded(kind, 0)
    for place, number in ((7, np.nan), (7, np.inf), (0, array[0].max() * np.float32(1.7))):
        off = array.copy()
        off[place, 3] = number
        assert weights_on_grid(off, 0, kind) is None
    assert weights_on_grid(normal(4, 24, 40), 0, kind) is None
    unsigned = np.random.default_rng(5).integers(0, 256, (24, 40)) - 90  # a zero point, and 255 steps
    unsigned[:, 0], unsigned[:, 1] = 165, -90
    assert weights_on_grid((unsigned * 0.1).astype(np.float32), 0, kind) is None


def test_large_weights_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.tuner.model.precision.given._BLOCK", 100)
    array, made = rounded("int8", 1)
    found = weights_on_grid(array, 1, "int8")
    np.testing.assert_array_equal(found.values, made.values)


def test_results_do_not_depend_on_who_folds() -> None:
    """Steps that layers take over give the integers that the steps gave."""
    _, made = prepared(quantised(network(pads=1), FEED))
    found: Any = given_layers(made, resolve_device("sm_89"))
    apart, whole = (
        apply_precision(made, found.plan, base="fp32", weights=found.weights, fold=fold) for fold in (False, True)
    )
    assert operators(apart).count("QuantizeLinear") > operators(whole).count("QuantizeLinear")
    np.testing.assert_array_equal(*(results(each, FEED)[0] for each in (apart, whole)))

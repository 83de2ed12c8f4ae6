"""Layers that quantise their own result give the very integers that a step behind them would."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import convolutions, dtypes, every_layer, fused, node, operators, output, plan_of
from tests.tuner.model.graphs import normal, relative_error
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.precision.quantise import LayerPrecision, apply_precision

X = (2, 8, 8, 8)


def chain(*between: object, last: str = "r0", channels: int = 16, outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    """Convolution and ReLU (`r0`), what is between, and a convolution that reads `last`."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1], name="before"),
        node("Relu", ["c0"], ["r0"], name="relu"),
        *between,
        node("Conv", [last, "w1"], ["y"], name="behind"),
    ]
    constants = {
        "w0": normal(0, 16, 8, 3, 3) * np.float32(0.2),
        "b0": normal(1, 16),
        "w1": normal(2, 12, channels, 1, 1),
        "one": np.ones(1, np.float32),
        "grouped": np.array([2, 4, 4, 8, 8]),
        "back": np.array([2, 16, 8, 8]),
        "starts": np.array([0]),
        "ends": np.array([8]),
        "axis": np.array([1]),
    }
    used = {name for each in nodes for name in each.input}
    return fused(nodes, {"x": X}, outputs, {name: array for name, array in constants.items() if name in used})


SHUFFLE = (
    node("Reshape", ["r0", "grouped"], ["g"], name="apart"),
    node("Transpose", ["g"], ["t"], perm=[0, 2, 1, 3, 4], name="turn"),
    node("Reshape", ["t", "back"], ["s"], name="together"),
)
POOL = node("MaxPool", ["r0"], ["p"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], name="pool")
EXACT = {
    "directly": chain(),
    "through MaxPool": chain(POOL, last="p"),
    "through a shuffle": chain(*SHUFFLE, last="s"),
    "through Slice": chain(node("Slice", ["r0", "starts", "ends", "axis"], ["s"], name="slice"), last="s", channels=8),
    "through Concat": chain(node("Concat", ["r0", "r0"], ["twice"], axis=1, name="join"), last="twice", channels=32),
}


@pytest.mark.parametrize("what", EXACT)
def test_the_integers_are_the_same(what: str) -> None:
    model, feed = EXACT[what], {"x": normal(9, *X)}
    plan = {name: each for name, each in every_layer(model, [feed]).items() if name == "behind"}
    folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
    assert operators(apart).count("QuantizeLinear") == 1
    assert operators(folded).count("QuantizeLinear") == 0
    assert dtypes(folded)["r0"] == "int8"
    np.testing.assert_array_equal(output(folded, feed), output(apart, feed))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_norm_gives_integers_to_all_that_read_it(kind: str) -> None:
    nodes = [
        node("RMSNormalization", ["x", "gain"], ["n"], name="norm"),
        node("MatMul", ["n", "w0"], ["a"], name="left"),
        node("MatMul", ["n", "w1"], ["b"], name="right"),
        node("Mul", ["a", "b"], ["y"], name="mul"),
    ]
    constants = {"gain": 1 + normal(0, 32) / 4, "w0": normal(1, 32, 32) / 8, "w1": normal(2, 32, 32) / 8}
    model = fused(nodes, {"x": (4, 6, 32)}, ["y"], constants, opset=23)
    feed = {"x": normal(3, 4, 6, 32)}
    scale = 3 / 127 if kind == "int8" else 3 / 448
    plan = {name: LayerPrecision(kind, {"a": scale}) for name in ("left", "right")}
    folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
    assert operators(apart) == ["FusedRmsNormWeight", "QuantizeLinear", *["FusedGemmAScaleBScale"] * 2, "Mul"]
    assert operators(folded) == ["FusedRmsNormWeightOutScale", *["FusedGemmAScaleBScale"] * 2, "Mul"]
    np.testing.assert_array_equal(output(folded, feed), output(apart, feed))
    half = apply_precision(model, plan, base="fp16")
    assert relative_error(output(half, feed), output(apart, feed)) < 5e-2


def test_a_norm_that_gives_its_sum_as_well() -> None:
    nodes = [
        node("Sigmoid", ["x"], ["s"], name="side"),
        node("Add", ["x", "s"], ["h"], name="add"),
        node("RMSNormalization", ["h", "gain"], ["n"], name="norm"),
        node("MatMul", ["n", "w"], ["m"], name="mm"),
        node("Add", ["m", "h"], ["y"], name="out"),
    ]
    constants = {"gain": 1 + normal(0, 32) / 4, "w": normal(1, 32, 32) / 8}
    model = fused(nodes, {"x": (4, 6, 32)}, ["y"], constants, opset=23)
    feed = {"x": normal(3, 4, 6, 32)}
    plan = {"mm": LayerPrecision("int8", {"a": 3 / 127})}
    folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
    assert "FusedRmsNormResidualWeightOutScale" in operators(folded)
    np.testing.assert_array_equal(output(folded, feed), output(apart, feed))
    half = apply_precision(model, plan, base="fp16")
    assert (dtypes(half)["n"], dtypes(half)["h"]) == ("int8", "fp32")
    assert relative_error(output(half, feed), output(apart, feed)) < 5e-2


def test_in_half_precision_only_the_base_type_is_skipped() -> None:
    model, feed = EXACT["through MaxPool"], {"x": normal(9, *X)}
    plan = {name: each for name, each in every_layer(model, [feed]).items() if name == "behind"}
    folded, apart, exact = (
        apply_precision(model, plan, base=base, fold=fold)
        for base, fold in (("fp16", True), ("fp16", False), ("fp32", True))
    )
    errors = [np.abs(output(each, feed) - output(exact, feed)).max() for each in (folded, apart)]
    assert errors[0] < 0.1  # a step of the integers here and there
    assert dtypes(folded)["p"] == "int8"
    assert dtypes(apart)["p"] == "fp16"
    assert errors[1] < 0.1


def test_a_whole_network_computes_the_same() -> None:
    model, feed = convolutions(), {"x": normal(9, 2, 3, 16, 16)}
    for plan in (plan_of(model, [feed]), every_layer(model, [feed])):
        folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
        np.testing.assert_array_equal(output(folded, feed), output(apart, feed))
    plugins = {
        each.name: each.op_type for each in fused_nodes(apply_precision(model, plan_of(model, [feed]), base="fp16"))
    }
    assert plugins["stem"] == "FusedConv2dBiasOutScale"  # itself in fp16
    assert plugins["left"] == "FusedConv2dBiasXScaleWScaleOutScale"


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (chain(outputs=("y", "r0")), "the result is the model's, too"),
        (chain(node("Sigmoid", ["r0"], ["z"], name="other"), outputs=("y", "z")), "another operator reads it"),
        (chain(node("AveragePool", ["r0"], ["p"], kernel_shape=[2, 2], name="mean"), last="p"), "a mean is no integer"),
    ],
)
def test_values_that_others_need_stay(model: ir.Model, why: str) -> None:
    feed = {"x": normal(9, *X)}
    plan = {name: each for name, each in every_layer(model, [feed]).items() if name == "behind"}
    mixed = apply_precision(model, plan, base="fp32")
    assert dtypes(mixed)["r0"] == "fp32", why
    assert operators(mixed).count("QuantizeLinear") == 1


def test_two_scales_need_two_steps() -> None:
    model, feed = convolutions(), {"x": normal(9, 2, 3, 16, 16)}
    plan = plan_of(model, [feed])
    plan["left"] = LayerPrecision("int8", {"x": plan["left"].scales["x"] * 2})
    mixed = apply_precision(model, plan, base="fp32")
    assert dtypes(mixed)["r0"] == dtypes(mixed)["p0"] == "fp32"
    assert operators(mixed).count("QuantizeLinear") == 2


def test_steps_do_not_move_to_where_there_is_more_to_quantise() -> None:
    # The pool's input is four times as large, and nothing before it can give integers.
    nodes = [
        node("Sigmoid", ["x"], ["s"], name="sigmoid"),
        node("MaxPool", ["s"], ["p"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        node("Conv", ["p", "w"], ["y"], name="behind"),
    ]
    model = fused(nodes, {"x": X}, ["y"], {"w": normal(2, 12, 8, 1, 1)})
    mixed = apply_precision(model, {"behind": LayerPrecision("int8", {"x": 0.01})}, base="fp32")
    assert operators(mixed)[:3] == ["Sigmoid", "MaxPool", "QuantizeLinear"]


def test_fp8_goes_only_through_what_knows_it() -> None:
    feed = {"x": normal(9, *X)}
    for what, steps in (("through a shuffle", 0), ("through MaxPool", 1), ("directly", 0)):
        model = EXACT[what]
        plan = {name: each for name, each in every_layer(model, [feed], "fp8").items() if name == "behind"}
        folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
        assert operators(folded).count("QuantizeLinear") == steps, what
        np.testing.assert_array_equal(output(folded, feed), output(apart, feed))

"""What stays fp32 for its numbers: those beyond the range, constants that vanish, and whole numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.fused_nets import dtypes, fused, node
from tests.tuner.model.graphs import model_of, normal, relative_error
from tilewright.tuner.model.graph import copy_of, dtype_name, fused_nodes, plugin_inputs
from tilewright.tuner.model.precision.half import lower
from tilewright.tuner.model.precision.kept import kept
from tilewright.tuner.model.precision.quantise import apply_precision
from tilewright.tuner.model.session import run


def cast(used: str, made: str, to: str) -> Any:
    return helper.make_node("Cast", [used], [made], to=getattr(TensorProto, to), name=f"cast_{made}")


def output(model: ir.Model, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output, with fp16 values rounded."""
    return next(iter(run(model, [feed])))[str(model.graph.outputs[0].name)]


def both(model: ir.Model, feed: Mapping[str, np.ndarray], base: str = "fp16") -> tuple[np.ndarray, np.ndarray]:
    """What a model gives as it is, and lowered."""
    lowered = copy_of(model)
    lower(lowered, {}, base)
    return output(model, feed), output(lowered, feed)


def test_a_divisor_beyond_the_range() -> None:
    """Images of 16 bits."""
    nodes = [
        node("Div", ["x", "scale"], ["n"], name="scale"),
        node("Conv", ["n", "w"], ["c"], name="conv"),
        node("Relu", ["c"], ["y"], name="relu"),
    ]
    constants = {"scale": np.array(65535, np.float32), "w": normal(0, 4, 2, 3, 3)}
    model = fused(nodes, {"x": (1, 2, 8, 8)}, ["y"], constants)
    mixed = apply_precision(model, {}, base="fp16")
    assert dtypes(mixed)["n"] == "fp32"
    feed = {"x": np.random.default_rng(0).integers(0, 65536, (1, 2, 8, 8)).astype(np.float32)}
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3


@pytest.mark.parametrize("operator", ["Mul", "Add", "Sub", "Div"])
def test_constants_beyond_the_range_that_are_no_masks(operator: str) -> None:
    nodes = [node(operator, ["x", "c"], ["s"], name="it"), node("Relu", ["s"], ["y"], name="relu")]
    for number in (70000, -70000):
        model = model_of(nodes, {"x": (2, 3)}, ["y"], {"c": np.array([number, 1, 1], np.float32)})
        assert lower(model, {}, "fp16")["it"] == f"{number} is beyond the range of fp16"
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"c": np.array([-np.inf, 1, 1], np.float32)})
    assert lower(model, {}, "fp16") == {}


def test_a_layer_with_a_constant_beyond_the_range() -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"], name="mm"), node("Add", ["m", "b"], ["y"], name="add")]
    constants = {"w": normal(0, 3, 4), "b": np.array([1e5, 0, 0, 0], np.float32)}
    model = fused(nodes, {"x": (2, 3)}, ["y"], constants)
    reasons = kept(model, "fp16").reasons
    assert list(reasons.values()) == ["100000 is beyond the range of fp16"]
    assert not kept(model, "bf16").reasons
    bias = frozenset([model.graph.initializers["b"]])
    assert not kept(model, "fp16", pinned=bias).reasons
    mixed = apply_precision(model, {}, base="fp16")
    feed = {"x": normal(1, 2, 3)}
    np.testing.assert_allclose(output(mixed, feed), output(model, feed), rtol=1e-6)


def test_masks_that_go_elsewhere_are_numbers() -> None:
    nodes = [
        node("Add", ["x", "mask"], ["s"], name="mask"),
        node("Transpose", ["s"], ["t"], perm=[1, 0], name="turn"),
        node("Softmax", ["t"], ["y"], name="softmax"),
    ]
    mask = np.array([0, -1e9, 0], np.float32)
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"mask": mask})
    assert set(lower(model, {}, "fp16")) == {"softmax"}
    also = [*nodes, node("Relu", ["t"], ["z"], name="relu")]
    model = model_of(also, {"x": (2, 3)}, ["y", "z"], {"mask": mask})
    assert "mask" in lower(model, {}, "fp16")


def test_factors_that_vanish() -> None:
    tiny = np.array([1e-6, 2e-6, 0], np.float32)
    mixed = np.array([1e-6, 1, 1], np.float32)
    for operator, array, stays in (
        ("Mul", tiny, True),
        ("Mul", mixed, False),  # beside the others it is nothing
        ("Div", mixed + np.float32(1e-9), True),
        ("Add", tiny, False),
    ):
        nodes = [node(operator, ["x", "c"], ["s"], name="it"), node("Relu", ["s"], ["y"], name="relu")]
        model = model_of(nodes, {"x": (2, 3)}, ["y"], {"c": array})
        assert ("it" in lower(model, {}, "fp16")) == stays, (operator, array)
    layer = fused([node("MatMul", ["x", "w"], ["y"])], {"x": (2, 3)}, ["y"], {"w": normal(0, 3, 4) * np.float32(1e-6)})
    feed = {"x": np.float32(1e4) * normal(1, 2, 3)}
    lowered = apply_precision(layer, {}, base="fp16")
    assert relative_error(output(lowered, feed), output(layer, feed)) < 1e-6
    norm = fused([node("RMSNormalization", ["x", "c"], ["y"])], {"x": (2, 3)}, ["y"], {"c": tiny}, opset=23)
    assert relative_error(output(apply_precision(norm, {}, base="fp16"), feed), output(norm, feed)) < 1e-6


def squares() -> ir.Model:
    """y = relu((x·x·1e-3) @ w) @ w: of x in 200..400 squares pass fp16's range."""
    nodes = [
        node("Mul", ["x", "x"], ["s"], name="square"),
        node("Mul", ["s", "small"], ["n"], name="scale"),
        node("MatMul", ["n", "w"], ["h"], name="first"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["y"], name="second"),
    ]
    constants = {"small": np.array(1e-3, np.float32), "w": np.abs(normal(0, 16, 16))}
    return fused(nodes, {"x": (4, 16)}, ["y"], constants)


def test_values_near_the_ranges_end_are_computed_and_read_in_fp32() -> None:
    model = squares()
    feed = {"x": np.random.default_rng(0).uniform(200, 400, (4, 16)).astype(np.float32)}
    with np.errstate(over="ignore"):
        assert not np.isfinite(output(apply_precision(model, {}, base="fp16"), feed)).any()
    mixed = apply_precision(
        model, {}, base="fp16", extremes={"s": (0, 160e3), "n": (0, 160), "r": (0, 2000), "y": (0, 30000)}
    )
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3
    kinds = dtypes(mixed)
    assert (kinds["s"], kinds["n"], kinds["r"]) == ("fp32", "fp32", "fp16")
    reasons = kept(model, "fp16", {"s": (0, 160e3)}).reasons
    assert set(reasons.values()) == {"its numbers come to 1.6e+05, and fp16 ends at 6.55e+04"}
    assert not kept(model, "bf16", {"s": (0, 160e3)}).reasons


def test_values_that_vanish_are_computed_and_read_in_fp32() -> None:
    """Squares of numbers around 1e-4, which come back to 1."""
    nodes = [
        node("Mul", ["x", "small"], ["n"], name="scale"),
        node("Mul", ["n", "n"], ["s"], name="square"),
        node("Mul", ["s", "large"], ["t"], name="back"),
        node("Mul", ["t", "large"], ["u"], name="again"),
        node("MatMul", ["u", "w"], ["y"], name="mm"),
    ]
    constants = {"small": np.array(1e-4, np.float32), "large": np.array(1e4, np.float32), "w": normal(0, 16, 16)}
    model = fused(nodes, {"x": (4, 16)}, ["y"], constants)
    feed = {"x": normal(1, 4, 16)}
    assert relative_error(output(apply_precision(model, {}, base="fp16"), feed), output(model, feed)) > 0.1
    seen = {"x": (-3, 3), "n": (-3e-4, 3e-4), "s": (0, 9e-8), "t": (0, 9e-4), "u": (0, 9)}
    mixed = apply_precision(model, {}, base="fp16", extremes=seen)
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3
    assert dtypes(mixed)["s"] == "fp32"
    reasons = {each.name: reason for each, reason in kept(model, "fp16", seen).reasons.items()}
    assert reasons == dict.fromkeys(
        ("square", "back"), "its numbers only come to 9e-08, and fp16 loses digits below 6.104e-05"
    )
    assert not kept(model, "bf16", seen).reasons
    # Twice the least normal number is room for smaller ones; what is 0 throughout stays so.
    for most, stays in ((1.2e-4, True), (1.3e-4, False), (0.0, False)):
        assert bool(kept(model, "fp16", {"s": (-most, 0.0)}).reasons) == stays


def test_a_layer_whose_result_vanishes_gives_it_in_fp32() -> None:
    mixed = apply_precision(squares(), {}, base="fp16", extremes={"r": (0, 1e-6)})
    assert dtypes(mixed)["r"] == "fp32"
    first, second = (each for each in mixed.graph if each.op_type.startswith("Fused"))
    assert [dtype_name(each.inputs[0]) for each in (first, second) if each.inputs[0] is not None] == ["fp16", "fp32"]


def test_a_layer_whose_result_is_large_gives_it_in_fp32() -> None:
    model = squares()
    mixed = apply_precision(model, {}, base="fp16", extremes={"r": (0, 40000)})
    layers = {each.name: each for each in mixed.graph if each.op_type.startswith("Fused")}
    first, second = layers["first"], layers["second"]
    kinds = dtypes(mixed)
    assert kinds["r"] == "fp32"
    assert [each.dtype for each in first.inputs if each is not None][:2] == [ir.DataType.FLOAT16] * 2
    assert [each.dtype for each in second.inputs if each is not None][:2] == [ir.DataType.FLOAT] * 2


def test_a_norm_of_large_numbers_takes_them_in_fp32() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="first"),
        node("RMSNormalization", ["h", "gain"], ["n"], name="norm"),
        node("MatMul", ["n", "w"], ["y"], name="second"),
    ]
    constants = {"w": np.abs(normal(0, 16, 16)), "gain": normal(1, 16)}
    model = fused(nodes, {"x": (4, 16)}, ["y"], constants, opset=23)
    feed = {"x": np.random.default_rng(0).uniform(9e3, 2e4, (4, 16)).astype(np.float32)}
    mixed = apply_precision(model, {}, base="fp16", extremes={"h": (0, 3e5)})
    kinds = dtypes(mixed)
    assert (kinds["h"], kinds["n"]) == ("fp32", "fp16")
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3
    # What the model is given may be as large, and no node keeps that in fp32: the norm does.
    alone = fused(nodes[1:2], {"h": (4, 16)}, ["n"], {"gain": constants["gain"]}, opset=23)
    feed = {"h": np.float32(1e5) * normal(2, 4, 16)}
    mixed = apply_precision(alone, {}, base="fp16", extremes={"h": (-4e5, 4e5)})
    assert relative_error(output(mixed, feed), output(alone, feed)) < 2e-3


def test_a_small_term_of_a_sum_that_is_not_small_is_nothing_to_keep() -> None:
    """A branch that a LayerScale makes small: what it loses, the sum loses too. Read by others, it is."""
    nodes = [
        node("Tanh", ["x"], ["t"], name="tanh"),
        node("Mul", ["t", "scale"], ["s"], name="small"),
        node("Add", ["x", "s"], ["y"], name="sum"),
    ]
    constants = {"scale": np.array(7e-5, np.float32)}
    seen = {"x": (-3.0, 3.0), "t": (-1.0, 1.0), "s": (-7e-5, 7e-5), "y": (-3.0, 3.0)}
    assert not kept(model_of(nodes, {"x": (4, 16)}, ["y"], constants), "fp16", seen).reasons
    again = [*nodes, node("Mul", ["s", "big"], ["z"], name="back")]
    model = model_of(again, {"x": (4, 16)}, ["y", "z"], constants | {"big": np.array(1e4, np.float32)})
    assert {each.name for each in kept(model, "fp16", seen | {"z": (-0.7, 0.7)}).reasons} == {"small", "back"}


def test_a_large_sum_of_small_numbers_is_given_in_fp32() -> None:
    nodes = [
        node("Relu", ["x"], ["r"], name="relu"),
        node("Abs", ["x"], ["a"], name="abs"),
        node("Add", ["r", "a"], ["h"], name="add"),
        node("RMSNormalization", ["h", "gain"], ["n"], name="norm"),
        node("Mul", ["n", "h"], ["y"], name="mul"),
    ]
    model = fused(nodes, {"x": (4, 16)}, ["y"], {"gain": normal(1, 16)}, opset=23)
    feed = {"x": np.random.default_rng(0).uniform(3e4, 5e4, (4, 16)).astype(np.float32)}
    seen = {"x": (0, 3e4), "r": (0, 3e4), "a": (0, 3e4), "h": (0, 1e5), "y": (-2e5, 2e5)}
    mixed = apply_precision(model, {}, base="fp16", extremes=seen)
    assert dtypes(mixed)["h"] == "fp32"
    norm = next(each for each in mixed.graph if each.name == "norm")
    assert [dtype_name(value) for value in norm.inputs if value is not None] == ["fp16", "fp32", "fp16"]
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3


def test_a_norm_whose_result_is_large_gives_it_in_fp32() -> None:
    nodes = [
        node("RMSNormalization", ["x", "gain"], ["n"], name="norm"),
        node("MatMul", ["n", "w"], ["y"], name="mm"),
    ]
    constants = {"w": normal(0, 16, 16) / 16, "gain": np.float32(5e4) * (1 + np.abs(normal(1, 16)) / 9)}
    model = fused(nodes, {"x": (4, 16)}, ["y"], constants, opset=23)
    feed = {"x": normal(2, 4, 16)}
    assert np.abs(output(model, feed)).max() < 6e4
    mixed = apply_precision(model, {}, base="fp16", extremes={"n": (-2e5, 2e5)})
    assert dtypes(mixed)["n"] == "fp32"
    assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3


def test_masks_are_not_large() -> None:
    nodes = [
        node("Mul", ["hide", "least"], ["bias"], name="to_bias"),
        node("Add", ["x", "bias"], ["s"], name="mask"),
        node("Softmax", ["s"], ["y"], name="softmax"),
    ]
    model = model_of(nodes, {"x": (2, 3), "hide": (2, 3)}, ["y"], {"least": np.array(-1e9, np.float32)})
    reasons = lower(model, {}, "fp16", extremes={"bias": (-1e9, 0), "s": (-1e9, 3), "x": (-3, 3)})
    assert set(reasons) == {"softmax"}


@pytest.mark.parametrize("least", [-50000.0, -65504.0])
@pytest.mark.parametrize("way", ["Identity", "ScatterND"])
def test_masks_that_are_seen_are_not_large(least: float, way: str) -> None:
    """Inside the range, and as an input of the model; what is as large above 0 is no mask."""
    moved = [node("Identity", ["bias"], ["b"])] if way == "Identity" else [node("ScatterND", ["bias", "i", "u"], ["b"])]
    nodes = [*moved, node("Add", ["x", "b"], ["s"], name="mask"), node("Softmax", ["s"], ["y"], name="softmax")]
    constants = {} if way == "Identity" else {"i": np.array([[0]]), "u": np.zeros((1, 3), np.float32)}
    for sign, stay in ((1, {"softmax"}), (-1, {"softmax", "mask"})):
        model = model_of(nodes, {"x": (2, 3), "bias": (2, 3)}, ["y"], constants)
        seen = (least, 0.0) if sign > 0 else (0.0, -least)
        assert set(lower(model, {}, "fp16", extremes={"bias": seen, "b": seen, "s": seen, "x": (-3, 3)})) >= stay
        again = model_of(nodes, {"x": (2, 3), "bias": (2, 3)}, ["y"], constants)
        reasons = kept(again, "fp16", {"b": seen, "s": seen}).reasons
        assert bool(reasons) == (sign < 0)


WHOLE = np.array([[2000, 2049, 4097, 30001]], np.int64)


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "nodes",
    [
        [node("Mod", ["f", "ten"], ["m"], fmod=1), cast("m", "y", "INT64")],
        [node("Div", ["f", "ten"], ["d"]), node("Floor", ["d"], ["m"]), cast("m", "y", "INT64")],
        [node("Equal", ["f", "one"], ["e"]), cast("e", "y", "INT64")],
        [node("Reshape", ["f", "flat"], ["r"]), node("Greater", ["r", "one"], ["e"]), cast("e", "y", "INT64")],
        [node("Transpose", ["f"], ["t"], perm=[1, 0]), cast("t", "d", "DOUBLE"), cast("d", "y", "INT64")],
    ],
)
def test_whole_numbers_stay_exact(nodes: Sequence[Any], base: str) -> None:
    constants = {"ten": np.array(10, np.float32), "one": np.array([30000.5], np.float32), "flat": np.array([-1])}
    if any(each.op_type == "Equal" for each in nodes):
        constants["one"] = np.array([30001], np.float32)
    used = {name for each in nodes for name in each.input}
    constants = {name: array for name, array in constants.items() if name in used}
    after = model_of([cast("i", "f", "FLOAT"), *nodes], {"i": (1, 4)}, ["y"], constants, dtype="int64")
    exact, got = both(after, {"i": WHOLE}, base)
    np.testing.assert_array_equal(got, exact)
    if any(each.op_type == "Greater" for each in nodes):
        return
    # Floats that are fed and become integers are no less exact.
    floats = model_of([*nodes, cast("y", "z", "FLOAT")], {"f": (1, 4)}, ["z"], constants)
    exact, got = both(floats, {"f": WHOLE.astype(np.float32)}, base)
    np.testing.assert_array_equal(got, exact)


def test_floats_that_become_indices_are_exact_from_where_they_are_made() -> None:
    nodes = [
        node("Mul", ["x", "length"], ["place"], name="place"),
        node("Floor", ["place"], ["floor"], name="floor"),
        node("Squeeze", ["floor"], ["flat"], name="flat"),
        cast("flat", "index", "INT64"),
        node("Gather", ["table", "index"], ["y"], name="look_up"),
    ]
    constants = {"length": np.array(5000, np.float32), "table": np.arange(5000, dtype=np.float32) % 7}
    model = model_of(nodes, {"x": (1, 64)}, ["y"], constants)
    exact, got = both(model, {"x": np.random.default_rng(0).uniform(0, 0.99, (1, 64)).astype(np.float32)})
    np.testing.assert_array_equal(got, exact)


def test_what_never_becomes_an_integer_is_lowered() -> None:
    nodes = [
        node("Reshape", ["x", "flat"], ["r"], name="flat"),
        node("Floor", ["r"], ["f"], name="floor"),
        node("Sigmoid", ["f"], ["g"], name="sigmoid"),
        cast("g", "b", "BOOL"),
        cast("b", "y", "FLOAT"),
    ]
    model = model_of(nodes, {"x": (2, 3)}, ["y"], {"flat": np.array([-1])})
    assert lower(model, {}, "fp16") == {}


LEAST = float(np.finfo(np.float32).min)

HIDES = [
    node("Greater", ["m", "zero"], ["seen"], name="seen"),
    node("Where", ["seen", "s", "fill"], ["h"], name="hide"),
]
BAND_LESS = np.random.default_rng(0).random((1, 1, 8, 8)) < 0.5
BAND_LESS[..., 2, :] = False

MASKED: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "alone": (HIDES, ()),
    "and a position is added": ([*HIDES, node("Add", ["h", "position"], ["a"], name="add")], ("position",)),
    "and a constant is added": ([*HIDES, node("Add", ["h", "places"], ["a"], name="add")], ()),
    "before another that is constant": (
        [*HIDES, node("Where", ["cells", "h", "fill"], ["a"], name="other")],
        (),
    ),
    "that is constant": ([node("Where", ["cells", "s", "fill"], ["h"], name="hide")], ()),
}
"""Nodes that hide keys, of `m` (2, 1, 1, 8) or constant, and other inputs that they read."""


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("what", "fill"),
    [("alone", -1e4), ("that is constant", -1e4), *((what, LEAST) for what in MASKED)],
)
def test_a_row_that_sees_no_key_gives_what_it_did(base: str, what: str, fill: float) -> None:
    """Of 8 keys a query of the second batch sees none, or one of every eight: fp16 has no number that takes all of a
    score."""
    masks, others = MASKED[what]
    nodes = [
        node("MatMul", ["q", "k"], ["s"], name="scores"),
        *masks,
        node("Softmax", [masks[-1].output[0]], ["p"], name="softmax"),
        node("MatMul", ["p", "v"], ["y"], name="values"),
    ]
    shapes = {"q": (2, 4, 8, 16), "k": (2, 4, 16, 8), "v": (2, 4, 8, 16)}
    shapes |= {"m": (2, 1, 1, 8)} if masks[0].op_type == "Greater" else {}
    shapes |= dict.fromkeys(others, (1, 4, 8, 8))
    constants = {
        "zero": np.array(0, np.float32),
        "fill": np.array(fill, np.float32),
        "places": normal(9, 1, 4, 8, 8),
        "cells": BAND_LESS,
    }
    used = {name for each in nodes for name in each.input}
    model = fused(nodes, shapes, ["y"], {name: array for name, array in constants.items() if name in used})
    mixed = apply_precision(model, {}, base=base)
    (attention,) = fused_nodes(mixed)
    assert attention.op_type == "FusedAttentionBias"
    assert dtype_name(plugin_inputs(attention)["bias"]) == ("fp32" if base == "fp16" else base)
    feed = {name: normal(index, *shape) for index, (name, shape) in enumerate(shapes.items())}
    if "m" in feed:
        feed["m"] = np.stack([np.arange(8) - 5.0, np.full(8, -1.0)]).reshape(2, 1, 1, 8).astype(np.float32)
    assert relative_error(output(mixed, feed), output(model, feed)) < (4e-3 if base == "fp16" else 3e-2)

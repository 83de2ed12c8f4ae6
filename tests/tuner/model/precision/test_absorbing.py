"""Factors that are taken in by constants divide the value, and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import fused, node, output, single
from tests.tuner.model.graphs import normal, results
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import fused_nodes, static_shape
from tilewright.tuner.model.precision.absorbing import absorb, along, carry_out, reduced

CONSTANTS: dict[str, np.ndarray] = {
    "gain": normal(0, 16),
    "shift": normal(1, 16),
    "w": normal(2, 16, 16),
    "bias": normal(3, 16),
    "filters": normal(4, 8, 4, 3, 3),
    "f_bias": normal(5, 8),
    "depthwise": normal(6, 8, 1, 3, 3),
    "grouped": np.array([1, 2, 4, 6, 6]),
    "back": np.array([1, 8, 6, 6]),
    "flat": np.array([1, -1]),
    "cells": normal(7, 6, 16),
    "last": np.array([-1]),
    "eps": np.array(1e-5, np.float32),
}

TOKENS, IMAGE = (2, 6, 16), (1, 4, 8, 8)
Made = tuple[list[Any], tuple[int, ...]]
LAYER_NORM: Made = ([node("LayerNormalization", ["x", "gain", "shift"], ["v"], axis=-1, name="it")], TOKENS)
CONV = [node("Conv", ["x", "filters", "f_bias"], ["c"], name="conv"), node("Relu", ["c"], ["r"], name="relu")]

TAKEN: dict[str, Made] = {
    "LayerNormalization": LAYER_NORM,
    "an RMS norm": (
        [
            node("Mul", ["x", "x"], ["s"], name="square"),
            node("ReduceMean", ["s", "last"], ["m"], name="mean"),
            node("Add", ["m", "eps"], ["a"], name="add"),
            node("Sqrt", ["a"], ["r"], name="root"),
            node("Div", ["x", "r"], ["q"], name="div"),
            node("Mul", ["q", "gain"], ["v"], name="mul"),
        ],
        TOKENS,
    ),
    "a decomposed norm": (
        [
            node("Sigmoid", ["x"], ["n"], name="norm"),
            node("Mul", ["n", "gain"], ["m"], name="mul"),
            node("Add", ["m", "shift"], ["v"], name="add"),
        ],
        TOKENS,
    ),
    "a constant for each token and channel": ([node("Mul", ["x", "cells"], ["v"], name="mul")], TOKENS),
    "a gemm": ([node("MatMul", ["x", "w"], ["m"], name="mm"), node("Add", ["m", "bias"], ["v"], name="add")], TOKENS),
    "a gemm and ReLU": (
        [
            node("MatMul", ["x", "w"], ["m"], name="mm"),
            node("Add", ["m", "bias"], ["a"], name="add"),
            node("Relu", ["a"], ["v"], name="relu"),
        ],
        TOKENS,
    ),
    "a convolution": ([CONV[0], node("LeakyRelu", ["c"], ["v"], alpha=0.1, name="relu")], IMAGE),
    "a depthwise convolution": (
        [*CONV, node("Conv", ["r", "depthwise"], ["v"], group=8, pads=[1, 1, 1, 1], name="depthwise")],
        IMAGE,
    ),
    "pooling": ([*CONV, node("MaxPool", ["r"], ["v"], kernel_shape=[2, 2], name="pool")], IMAGE),
    "a mean": ([*CONV, node("GlobalAveragePool", ["r"], ["v"], name="pool")], IMAGE),
    "concatenation": (
        [
            *CONV,
            node("Conv", ["x", "filters"], ["d"], name="other"),
            node("Concat", ["r", "d"], ["v"], axis=1, name="join"),
        ],
        IMAGE,
    ),
    "a shuffle": (
        [
            *CONV,
            node("Reshape", ["r", "grouped"], ["g"], name="apart"),
            node("Transpose", ["g"], ["t"], perm=[0, 2, 1, 3, 4], name="turn"),
            node("Reshape", ["t", "back"], ["v"], name="together"),
        ],
        IMAGE,
    ),
}


def made(nodes: list[Any], shape: tuple[int, ...], *outputs: str) -> ir.Model:
    used = {name for each in nodes for name in each.input}
    return fused(
        nodes, {"x": shape}, ["v", *outputs], {name: array for name, array in CONSTANTS.items() if name in used}
    )


def factors_for(value: ir.Value, seed: int = 8) -> np.ndarray:
    shape = static_shape(value)
    assert shape is not None
    axis = 1 if len(shape) == 4 else len(shape) - 1
    line = [1] * len(shape)
    line[axis] = shape[axis]
    return np.exp(normal(seed, shape[axis])).reshape(line)


@pytest.mark.parametrize("what", TAKEN)
def test_the_value_is_divided(what: str) -> None:
    model = made(*TAKEN[what])
    feed = {"x": normal(9, *TAKEN[what][1])}
    before = output(model, feed)
    value = model.graph.outputs[0]
    factors = factors_for(value)
    changes = absorb(value, factors)
    assert not isinstance(changes, str), changes
    carry_out(Editor(model), changes)
    np.testing.assert_allclose(output(model, feed), before / factors, rtol=1e-4, atol=1e-5)


def test_the_up_half_of_gated_columns_takes_them_whatever_the_activation() -> None:
    for gated in ("halves", "interleaved"):
        arrays = {"a": normal(0, 5, 16), "b": normal(1, 16, 24), "bias": normal(2, 24)}
        model = single("gemm", arrays, ("a",), gated=gated, activation="silu")
        before = output(model, {"a": arrays["a"]})
        factors = np.exp(normal(3, 1, 12))
        changes = absorb(model.graph.outputs[0], factors)
        assert not isinstance(changes, str), changes
        carry_out(Editor(model), changes)
        np.testing.assert_allclose(output(model, {"a": arrays["a"]}), before / factors, rtol=1e-4, atol=1e-6)


def test_a_norm_that_gives_its_sum_divides_its_result_alone() -> None:
    nodes = [
        node("Sigmoid", ["x"], ["s"], name="side"),
        node("Add", ["x", "s"], ["h"], name="add"),
        node("RMSNormalization", ["h", "gain"], ["v"], name="norm"),
        node("Neg", ["h"], ["stream"], name="neg"),
    ]
    model = fused(nodes, {"x": TOKENS}, ["v", "stream"], {"gain": CONSTANTS["gain"]}, opset=23)
    feed = {"x": normal(9, *TOKENS)}
    before = results(model, feed)
    (norm,) = fused_nodes(model)
    factors = factors_for(norm.outputs[0])
    assert absorb(norm.outputs[1], factors) == "FusedRmsNormResidualWeight 'norm' gives it beside its result"
    changes = absorb(norm.outputs[0], factors)
    assert not isinstance(changes, str), changes
    carry_out(Editor(model), changes)
    after = results(model, feed)
    np.testing.assert_allclose(after[0], before[0] / factors, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(after[1], before[1])


REFUSED: dict[str, tuple[Made, str]] = {
    "an input": (([node("Neg", ["x"], ["v"], name="neg")], TOKENS), "Neg 'neg' can't take factors"),
    "GELU": (
        ([node("MatMul", ["x", "w"], ["m"], name="mm"), node("Gelu", ["m"], ["v"], name="gelu")], TOKENS),
        "the activation gelu_erf of 'mm' is not homogeneous",
    ),
    "a product of activations": (
        ([node("MatMul", ["x", "t"], ["v"], name="mm"), node("Transpose", ["x"], ["t"], perm=[0, 2, 1])][::-1], TOKENS),
        "'mm' has no weights in floating point",
    ),
    "a residual": (
        ([node("MatMul", ["x", "w"], ["m"], name="mm"), node("Add", ["m", "x"], ["v"], name="add")], TOKENS),
        "'mm' adds a residual",
    ),
    "a norm without a scale": (
        ([node("Softmax", ["x"], ["v"], name="softmax")], TOKENS),
        "Softmax 'softmax' can't take factors",
    ),
    "what others read": (
        ([*CONV, *TAKEN["pooling"][0][2:], node("Neg", ["r"], ["z"], name="neg")], IMAGE),
        "read by others",
    ),
    "flattened pixels": (
        ([*CONV, node("Reshape", ["r", "flat"], ["v"], name="flatten")], IMAGE),
        "'conv' has weights for each channel",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_take_factors_says_why(what: str) -> None:
    (nodes, shape), reason = REFUSED[what]
    model = made(nodes, shape, *(["z"] if what == "what others read" else []))
    found = absorb(model.graph.outputs[0], factors_for(model.graph.outputs[0]))
    assert isinstance(found, str)
    assert reason in found
    assert absorb(model.graph.inputs[0], np.ones(1)) == "it is an input of the model"


def test_factors_are_one_for_each_place_of_an_axis_or_none() -> None:
    lines = np.broadcast_to(np.arange(1.0, 5.0)[:, None], (3, 4, 2))
    np.testing.assert_array_equal(along(lines, (3, 4, 2), 1), [1, 2, 3, 4])
    assert along(lines, (3, 4, 2), 2) is None
    np.testing.assert_array_equal(reduced(lines, (4, 1)), np.arange(1.0, 5.0)[:, None])
    assert reduced(lines, (2,)) is None
    assert fused_nodes(made(*LAYER_NORM)) == []

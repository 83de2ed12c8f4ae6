"""Small fused models for the tests of precision, and what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, results, value
from tilewright.tuner.model.bodies import attach_bodies
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import dtype_name, fused_nodes, infer_outputs, make_fused, op_of, plugin_inputs
from tilewright.tuner.model.precision.quantise import ACTIVATIONS, LARGEST, LayerPrecision
from tilewright.tuner.model.precision.rules import default_plan, values_to_calibrate
from tilewright.tuner.model.session import run

node = helper.make_node


def fused(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray],
    **options: Any,
) -> ir.Model:
    """A model of `helper.make_node`s, fused."""
    model = model_of(nodes, inputs, outputs, constants, **options)
    fuse(model)
    return model


def convolutions() -> ir.Model:
    """A stem, a pooling, two branches that are concatenated, a convolution, a classifier: x (2, 3, 16, 16) → y."""
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c0"], pads=[1, 1, 1, 1], name="stem"),
        node("Relu", ["c0"], ["r0"], name="relu0"),
        node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        node("Conv", ["p0", "w1", "b1"], ["c1"], name="left"),
        node("Relu", ["c1"], ["r1"], name="relu1"),
        node("Conv", ["p0", "w2"], ["c2"], pads=[1, 1, 1, 1], name="right"),
        node("Relu", ["c2"], ["r2"], name="relu2"),
        node("Concat", ["r1", "r2"], ["joined"], axis=1, name="join"),
        node("Conv", ["joined", "w3", "b3"], ["c3"], pads=[1, 1, 1, 1], group=2, name="grouped"),
        node("Relu", ["c3"], ["r3"], name="relu3"),
        node("GlobalAveragePool", ["r3"], ["mean"], name="mean"),
        node("Flatten", ["mean"], ["flat"], name="flat"),
        node("Gemm", ["flat", "w4", "b4"], ["y"], transB=1, name="classifier"),
    ]
    constants = {
        "w0": normal(0, 16, 3, 3, 3) * np.float32(0.3),
        "w1": normal(1, 16, 16, 1, 1) * np.float32(0.3),
        "w2": normal(2, 32, 16, 3, 3) * np.float32(0.1),
        "w3": normal(3, 16, 24, 3, 3) * np.float32(0.1),
        "w4": normal(4, 10, 16),
        **{f"b{index}": normal(10 + index, size) for index, size in ((0, 16), (1, 16), (3, 16), (4, 10))},
    }
    return fused(nodes, {"x": (2, 3, 16, 16)}, ["y"], constants)


def perceptron(width: int = 32, *, seed: int = 0, activation: str = "Relu") -> ir.Model:
    """Three layers: x (8, width) → y (8, 10), of which the middle one may be quantised."""
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"], name="first"),
        node("Add", ["m0", "b0"], ["a0"], name="bias0"),
        node(activation, ["a0"], ["h0"], name="act0"),
        node("MatMul", ["h0", "w1"], ["m1"], name="middle"),
        node("Add", ["m1", "b1"], ["a1"], name="bias1"),
        node(activation, ["a1"], ["h1"], name="act1"),
        node("MatMul", ["h1", "w2"], ["y"], name="last"),
    ]
    scale = np.float32(width**-0.5)
    constants = {
        "w0": normal(seed, width, width) * scale,
        "b0": normal(seed + 1, width),
        "w1": normal(seed + 2, width, width) * scale,
        "b1": normal(seed + 3, width),
        "w2": normal(seed + 4, width, 10) * scale,
    }
    return fused(nodes, {"x": (8, width)}, ["y"], constants)


def plan_of(
    model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], kind: str = "int8"
) -> dict[str, LayerPrecision]:
    """All layers that the rules let be quantised, by the largest magnitude of their inputs."""
    return default_plan(model, kind, ranges(model, feeds, kind))[0]


def ranges(model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], kind: str = "int8") -> dict[str, float]:
    """The scale by largest magnitude of every value that the rules let be quantised."""
    names = values_to_calibrate(model, kind)
    largest = dict.fromkeys(names, 0.0)
    for values in run(model, feeds, names):
        for name, array in values.items():
            largest[name] = max(largest[name], float(np.abs(array).max()))
    return {name: number / LARGEST[kind] for name, number in largest.items()}


def every_layer(
    model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], kind: str = "int8"
) -> dict[str, LayerPrecision]:
    """All fused nodes quantised, first and last too, by the largest magnitude of their inputs."""
    plan = {}
    for layer in fused_nodes(model):
        inputs = plugin_inputs(layer)
        names = {name: inputs[name].name or "" for name in ACTIVATIONS[op_of(layer)]}
        found = list(run(model, feeds, list(names.values())))
        plan[layer.name or ""] = LayerPrecision(
            kind,
            {
                name: max(float(np.abs(values[value]).max()) for values in found) / LARGEST[kind]
                for name, value in names.items()
            },
        )
    return plan


def output(model: ir.Model, feed: Mapping[str, np.ndarray]) -> np.ndarray:
    """The first output, of a model that passes ONNX's checker."""
    return results(model, feed)[0]


def operators(model: ir.Model) -> list[str]:
    """The operators of the main graph, in order."""
    return [each.op_type for each in model.graph]


def dtypes(model: ir.Model) -> dict[str, str]:
    """The data type of every value that a node of the main graph gives."""
    return {value.name or "": dtype_name(value) for each in model.graph for value in each.outputs}


def decibels(exact: np.ndarray, got: np.ndarray) -> float:
    """Signal to noise."""
    exact = exact.astype(np.float64)
    return 10 * float(np.log10(np.square(exact).sum() / np.square(got - exact).sum()))


def single(op: str, inputs: dict[str, np.ndarray], data: tuple[str, ...], **settings: Any) -> ir.Model:
    """One fused node whose inputs in `data` are the model's and whose others are constants."""
    values = {name: value(name, array.shape) for name, array in inputs.items()}
    for name, array in inputs.items():
        if name not in data:
            values[name].const_value = ir.tensor(array, name=name)
    made = make_fused(op, values, settings, name="layer")
    made.outputs[0].name = "y"
    graph = ir.Graph([values[name] for name in data], [], nodes=[made], opset_imports={"": 21}, name="one")
    for name in inputs:
        if name not in data:
            graph.register_initializer(values[name])
    model = ir.Model(graph, ir_version=10)
    if "a_scale" in inputs and len(inputs["a_scale"]) > 1:
        infer_outputs(made)  # there is no body of these
    else:
        attach_bodies(model)
    graph.outputs.append(made.outputs[0])
    return model


OUTLIERS = np.where(np.arange(32) % 11 == 0, 30, 1).astype(np.float32)


def block(*, residual: bool = False, activation: str = "Relu") -> ir.Model:
    """A norm whose scale has outliers, two projections that share it, and an MLP: x (2, 12, 32) → y."""
    nodes: list[Any] = [
        node("MatMul", ["x", "w0"], ["e"], name="embed"),
        node("LayerNormalization", ["e", "gain", "shift"], ["h"], axis=-1, name="norm"),
        node("MatMul", ["h", "w1"], ["q"], name="query"),
        node("MatMul", ["h", "w2"], ["k"], name="key"),
        node("Add", ["q", "k"], ["qk"], name="sum"),
        node("MatMul", ["qk", "w3"], ["u"], name="up"),
        node("Add", ["u", "b3"], ["ub"], name="up_bias"),
        node(activation, ["ub"], ["a"], name="act"),
        node("MatMul", ["a", "w4"], ["d"], name="down"),
        *([node("Add", ["d", "h"], ["s"], name="add")] if residual else [node("Identity", ["d"], ["s"], name="same")]),
        node("MatMul", ["s", "w5"], ["y"], name="head"),
    ]
    constants = {f"w{index}": normal(index, 32, 32) * np.float32(0.2) for index in range(6)}
    # What is large in the activations is no larger in the results.
    constants |= {name: constants[name] / OUTLIERS[:, None] for name in ("w1", "w2")}
    constants |= {"gain": OUTLIERS * (1 + normal(7, 32) / 10), "shift": normal(8, 32) / 10, "b3": normal(9, 32)}
    return fused(nodes, {"x": (2, 12, 32)}, ["y"], constants)


FEEDS = [{"x": normal(100 + index, 2, 12, 32)} for index in range(24)]

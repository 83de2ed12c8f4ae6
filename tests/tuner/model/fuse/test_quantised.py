from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import node, operators, output
from tests.tuner.model.graphs import model_of, normal
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.fuse.quantised import move_relu
from tilewright.tuner.model.graph import plugin_settings
from tilewright.tuner.model.session import check_default

FEED = {"x": normal(0, 2, 8, 6, 6)}


def layer(
    *behind: Any, last: str = "r", outputs: tuple[str, ...] = ("y",), axis: bool = False, opset: int = 20
) -> ir.Model:
    """Convolution, two steps, ReLU, what is behind, and Neg."""
    along = {"axis": 1} if axis else {}
    nodes = [
        node("Conv", ["x", "w"], ["c"], name="conv"),
        node("QuantizeLinear", ["c", "scale", "zero"], ["q"], name="quantise", **along),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantise", **along),
        node("Relu", ["d"], ["r"], name="relu"),
        *behind,
        node("Neg", [last], ["y"], name="neg"),
    ]
    shape = (12,) if axis else ()
    constants = {
        "w": normal(1, 12, 8, 1, 1),
        "scale": np.full(shape, 1 / 32, np.float32),
        "zero": np.full(shape, 0 if axis else 5, np.int8),
    }
    return model_of(nodes, {"x": (2, 8, 6, 6)}, outputs, constants, opset=opset)


def test_relu_stays_where_onnx_runtime_would_break_the_steps() -> None:
    """Of int8 with a zero point, in front of what moves numbers, from opset 21 on."""
    model = layer(node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2]), last="p", opset=21)
    move_relu(model)
    assert operators(model) == ["Conv", "QuantizeLinear", "DequantizeLinear", "Relu", "MaxPool", "Neg"]
    again = [
        node("QuantizeLinear", ["r", "scale", "zero"], ["t"], name="again"),
        node("DequantizeLinear", ["t", "scale", "zero"], ["u"], name="back"),
    ]
    model = layer(*again, last="u", opset=21)
    wanted = output(model, FEED)
    fuse(model)
    assert "Relu" not in operators(model)
    check_default(model, "moved", FEED)
    np.testing.assert_array_equal(output(model, FEED), wanted)


@pytest.mark.parametrize("axis", [False, True])
def test_relu_goes_into_the_layer_in_front_of_the_steps(axis: bool) -> None:
    model = layer(axis=axis)
    wanted = output(model, FEED)
    fuse(model)
    assert operators(model) == ["FusedConv2d", "QuantizeLinear", "DequantizeLinear", "Neg"]
    assert plugin_settings(model.graph[0])["activation"] == "relu"
    assert model.graph[2].outputs[0].name == "r"  # the same numbers as before
    assert {"c", "q"}.isdisjoint(value.name for each in model.graph for value in each.outputs)
    np.testing.assert_array_equal(output(model, FEED), wanted)


def test_relu_stays_where_the_steps_have_other_readers() -> None:
    for model in (
        layer(node("Add", ["r", "d"], ["s"], name="add"), last="s"),
        layer(node("DequantizeLinear", ["q", "scale", "zero"], ["e"]), node("Add", ["r", "e"], ["s"]), last="s"),
        layer(outputs=("y", "d")),
        layer(outputs=("y", "r")),
    ):
        before = operators(model)
        move_relu(model)
        assert operators(model) == before


def test_relu_stays_behind_steps_of_two_grids() -> None:
    model = layer()
    steps = [each for each in model.graph if each.op_type.endswith("Linear")]
    other = ir.Value(
        name="wide",
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(()),
        const_value=ir.tensor(np.float32(0.25), name="wide"),
    )
    model.graph.register_initializer(other)
    steps[1].replace_input_with(1, other)
    move_relu(model)
    assert operators(model) == ["Conv", "QuantizeLinear", "DequantizeLinear", "Relu", "Neg"]

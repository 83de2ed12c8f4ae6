"""ReLU behind a quantise and a dequantise step is put before them, where a layer can take it in.

ONNX Runtime's symmetric quantisation, for one, writes layer, steps, ReLU, steps. Rounding to a grid that has 0 in it is
monotone and leaves 0 alone, so Relu(DQ(Q(y))) = DQ(Q(Relu(y))), exactly; and of the steps behind it, on the same grid,
nothing is left (`precision/steps.py`).
"""

from __future__ import annotations

import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import TYPED_FROM, dtype_name, is_constant


def move_relu(model: ir.Model) -> None:
    """Puts every ReLU that alone reads what a pair of steps gives in front of the pair, in place."""
    edit, opset = Editor(model), model.opset_imports[""]
    for node in list(model.graph):
        pair = _pair_before(node) if node.op_type == "Relu" and node.domain == "" else None
        if pair is None or node.outputs[0].is_graph_output():
            continue
        (quantise, dequantise), result = pair, node.outputs[0]
        if opset >= TYPED_FROM and any(user.op_type != "QuantizeLinear" for user, _ in result.uses()):
            continue  # ONNX Runtime breaks steps of int8 in front of an operator that moves numbers (1.32)
        y = quantise.inputs[0]
        assert y is not None
        relu = edit.node("Relu", [y], y, y.dtype or ir.DataType.FLOAT, base=f"{y.name}_relu")
        relu.name, node.name = node.name, None
        relu.metadata_props.update(node.metadata_props)
        model.graph.insert_before(quantise, relu)
        quantise.replace_input_with(0, relu.outputs[0])
        # The integers are others now, the numbers behind them are those that ReLU gave.
        quantise.outputs[0].name = edit.name(f"{quantise.outputs[0].name}_relu")
        result.replace_all_uses_with(dequantise.outputs[0])
        name = result.name
        model.graph.remove(node, safe=True)
        dequantise.outputs[0].name = name


def _pair_before(node: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """The quantise and the dequantise step that a node reads, where nothing else reads either and both are of one grid;
    else None."""
    value = node.inputs[0]
    dequantise = None if value is None else value.producer()
    if value is None or dequantise is None or dequantise.op_type != "DequantizeLinear" or not _only(value, node):
        return None
    integers = dequantise.inputs[0]
    quantise = None if integers is None else integers.producer()
    if integers is None or quantise is None or quantise.op_type != "QuantizeLinear" or not _only(integers, dequantise):
        return None
    if quantise.graph is not node.graph or dequantise.graph is not node.graph or quantise.domain or dequantise.domain:
        return None
    places = [given.attributes.get_int("axis", 1) for given in (quantise, dequantise)]
    blocks = [given.attributes.get_int("block_size", 0) for given in (quantise, dequantise)]
    if not quantise.attributes.get_int("saturate", 1):
        return None
    same = list(quantise.inputs[1:]) == list(dequantise.inputs[1:]) and all(map(is_constant, quantise.inputs[1:]))
    if not same or places[0] != places[1] or any(blocks) or dtype_name(value) != dtype_name(node.outputs[0]):
        return None
    y = quantise.inputs[0]
    return None if y is None or dtype_name(y) != dtype_name(value) else (quantise, dequantise)


def _only(value: ir.Value, user: ir.Node) -> bool:
    """Whether one node alone reads a value."""
    return not value.is_graph_output() and {each for each, _ in value.uses()} == {user}

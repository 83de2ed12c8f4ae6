"""Constants of more dimensions than what they go with: x[2, 8] + c[1, 1, 8] has three.

Rules look at the values of constants, and what they put in an operator's place has the shape of x. So such an operator
gets its constant without the leading dimensions, and a `Reshape` behind it adds them.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import constant, is_constant, static_shape

_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum")


def lower_constants(model: ir.Model) -> None:
    """Takes them off sums, products and the like of the main graph (`_BROADCASTING`), where shapes are known; what the
    model computes stays the same."""
    editor = Editor(model)
    for node in list(model.graph):
        if node.domain == "" and node.op_type in _BROADCASTING:
            _lower(node, editor)


def _lower(node: ir.Node, editor: Editor) -> None:
    out = node.outputs[0]
    shapes = [None if value is None else static_shape(value) for value in (*node.inputs, out)]
    ranks = [
        len(shape)
        for value, shape in zip(node.inputs, shapes, strict=False)
        if shape is not None and not is_constant(value)
    ]
    wanted = shapes[-1]
    if wanted is None or out.dtype is None or not ranks or None in shapes or len(wanted) == max(ranks):
        return
    extra = len(wanted) - max(ranks)
    if any(size != 1 for size in wanted[:extra]):
        return  # the constant repeats x
    inputs: list[ir.Value | None] = []
    for value, shape in zip(node.inputs, shapes, strict=False):
        assert value is not None
        assert shape is not None
        if len(shape) <= max(ranks):
            inputs.append(value)
            continue
        array = constant(value)
        if array is None:
            return
        inputs.append(editor.constant(array.reshape(shape[extra:]), f"{value.name}_lowered", value.dtype))
    attributes = dict(node.attributes)
    lowered = editor.node(node.op_type, inputs, out, out.dtype, base=f"{out.name}_lowered", attributes=attributes)
    lowered.outputs[0].shape = ir.Shape(wanted[extra:])
    target = editor.constant(np.array(wanted, np.int64), f"{out.name}_shape")
    raised = editor.node(
        "Reshape", [lowered.outputs[0], target], out, out.dtype, base=f"{out.name}_raised", attributes={"allowzero": 1}
    )
    editor.graph.insert_before(node, lowered)
    editor.replace(node, raised)

"""Halves that are taken by two `Slice`s: torch's older exporter writes `chunk` so where a size is open. They become one
`Split`, which rules know.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import constant, static_shape


def join_slices(model: ir.Model) -> None:
    """Puts a `Split` for two `Slice`s of the main graph that are the halves of a value's last axis, where nothing else
    uses the value; what the model computes stays the same. (A rotary embedding uses it whole as well: there a `Split`
    would help no rule.)"""
    editor = Editor(model)
    gone: set[ir.Node] = set()
    for node in list(model.graph):
        if node in gone or _half(node) is None:
            continue
        value = node.inputs[0]
        assert value is not None
        users = [user for user, _ in value.uses()]
        places = {_half(user): user for user in users}
        if len(users) != 2 or set(places) != {0, 1} or value.is_graph_output():
            continue
        pair = [places[0], places[1]]
        if any(user.graph is not model.graph for user in pair):
            continue
        _join(node, pair, value, editor)
        gone.update(pair)


def _half(node: ir.Node) -> int | None:
    """Which half of the last axis a node takes, 0 or 1; None if it does anything else."""
    if node.op_type != "Slice" or node.domain != "" or not 4 <= len(node.inputs) <= 5 or node.inputs[0] is None:
        return None
    shape = static_shape(node.inputs[0])
    numbers = [_number(value) for value in node.inputs[1:]]
    if not shape or None in numbers or shape[-1] % 2 or not shape[-1]:
        return None
    start, end, axis, step = (*numbers, 1)[:4]
    if axis not in (-1, len(shape) - 1) or step != 1:
        return None
    # Numbers below 0 count from the end, and what lies beyond an end is that end.
    first, last, _ = slice(start, end).indices(shape[-1])
    half = shape[-1] // 2
    return {(0, half): 0, (half, shape[-1]): 1}.get((first, last))


def _number(value: ir.Value | None) -> int | None:
    """The one number of a constant vector."""
    array = constant(value)
    return int(array[0]) if array is not None and array.shape == (1,) else None


def _join(first: ir.Node, pair: list[ir.Node], value: ir.Value, editor: Editor) -> None:
    """`first` is the one of the pair that comes first in the graph."""
    size = (static_shape(value) or ())[-1] // 2
    sizes = editor.constant(np.array([size, size], np.int64), f"{value.name}_halves")
    split = ir.node(
        "Split", [value, sizes], {"axis": -1}, num_outputs=2, name=editor.name(f"{pair[0].name}_and_{pair[1].name}")
    )
    old = [each.outputs[0] for each in pair]
    ir.convenience.replace_nodes_and_values(editor.graph, first, pair, [split], old, split.outputs)

"""Convolutions in one dimension as those of images of one row: (N, C, L) is (N, C, 1, L).

A `Reshape` before the convolution and one behind it cost nothing, but for what they part:

- Of an activation that comes out of a quantise and a dequantise step, the steps are put behind the reshape, right in
  front of the layer, which can read the integers then. ONNX Runtime breaks steps of int8 in front of an operator that
  moves numbers (1.32).
- What is added behind the convolution, a residual or a computed bias, is added before the reshape, where the
  convolution can take it in. `moved_activations.py` does the same for activations.

Each value gets one form of one row, however many read it: filters that several layers share are written once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.epilogue import takes_sum
from tilewright.tuner.model.fuse.layout import row_before
from tilewright.tuner.model.fuse.opening import OpenConv, is_open, new_constant, with_row
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.graph import constant, elements, static_shape

_STEPS = ("QuantizeLinear", "DequantizeLinear")


class OneRow:
    """The forms of one row of a model's values."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._editor = model, Editor(model)
        self._made: dict[ir.Value, ir.Value] = {}
        self._moves: set[ir.Node] = set()  # before convolutions and sums
        self._copies: dict[ir.Node, ir.Node] = {}  # of steps

    def convolutions(self, log: Log) -> None:
        """Makes convolutions in two dimensions of those in one that can be opened, in place. They keep their names, and
        so do their results, which a `Reshape` gives now."""
        self._editor, opening = Editor(self._model), OpenConv(log)
        for node in list(self._model.graph):
            if node.op_type != "Conv" or node.domain != "" or None in node.inputs[:2]:
                continue
            if len(static_shape(node.inputs[0]) or ()) != 3 or not opening.takes(node):  # type: ignore[arg-type]
                continue
            out = node.outputs[0]
            x, w = (self._of(value) for value in node.inputs[:2] if value is not None)
            row = self._like(out, f"{out.name}_as_one_row", with_row(static_shape(out) or ()))
            conv = ir.node("Conv", [x, w, *node.inputs[2:]], _two_dimensional(node), outputs=[row], name=node.name)
            conv.metadata_props.update(node.metadata_props)
            self._model.graph.insert_before(node, conv)
            shape = self._editor.constant(np.array(static_shape(out), np.int64), f"{node.name}_shape")
            self._editor.replace(node, ir.node("Reshape", [row, shape], name=self._editor.name(f"{node.name}_Reshape")))

    def move_sums(self, log: Log) -> bool:
        """Puts what is added to a convolution behind the reshape of its one row before that, in place, where the open
        convolution can take it in, and says whether there was any; why others can't is logged. The sum keeps its
        name."""
        self._editor = Editor(self._model)
        return sum(self._move_sum(node, log) for node in list(self._model.graph)) > 0

    def _move_sum(self, node: ir.Node, log: Log) -> bool:
        if node.op_type != "Add" or node.domain != "" or None in node.inputs:
            return False
        for index, value in enumerate(node.inputs):
            other = node.inputs[1 - index]
            assert value is not None
            assert other is not None
            row = row_before(value)
            conv = None if row is None else row.producer()
            if row is None or conv is None or not is_open(conv) or conv.graph is not node.graph:
                continue
            if not (_goes_to(value, node) and _goes_to(row, value.producer())) or static_shape(other) is None:
                continue
            asked = row if other is value else _asked(other)
            if static_shape(node.outputs[0]) != static_shape(value) or not takes_sum(log, conv, asked, node):
                continue
            total = self._like(node.outputs[0], f"{node.outputs[0].name}_as_one_row", static_shape(row) or ())
            given = [row, self._of(other)]
            added = ir.node("Add", given if index == 0 else given[::-1], outputs=[total], name=node.name)
            added.metadata_props.update(node.metadata_props)
            self._model.graph.insert_before(node, added)
            move = value.producer()
            assert move is not None
            made = ir.node(move.op_type, [total, *move.inputs[1:]], dict(move.attributes), name=move.name)
            self._editor.replace(node, made)
            self._model.graph.remove(move, safe=True)
            return True
        return False

    def _of(self, value: ir.Value) -> ir.Value:
        """A value (…, L) as (…, 1, L): of what steps give, the same steps of such a form."""
        steps: list[ir.Node] = []
        while (known := self._known(value)) is None and (step := _step_of_all(value.producer())) is not None:
            assert step.inputs[0] is not None
            steps.append(step)
            value = step.inputs[0]
        made = self._reshaped(value) if known is None else known
        self._made[value] = made
        for step in reversed(steps):
            out = step.outputs[0]
            made = ir.node(
                step.op_type,
                [made, *step.inputs[1:]],
                dict(step.attributes),
                outputs=[self._like(out, f"{out.name}_as_one_row", with_row(static_shape(value) or ()))],
                name=self._editor.name(f"{step.name}_as_one_row"),
            ).outputs[0]
            copy = made.producer()
            assert copy is not None
            self._model.graph.insert_after(step, copy)
            self._made[out], self._copies[copy] = made, step
        return made

    def name_steps(self) -> None:
        """Gives steps of one row the names of those that they have taken the place of. Their results, of another shape,
        keep names of their own."""
        for copy, step in self._copies.items():
            if step.graph is None:
                copy.name = step.name

    def _reshaped(self, value: ir.Value) -> ir.Value:
        shape, base, array = static_shape(value), f"{value.name}_as_one_row", constant(value)
        assert shape is not None
        assert value.dtype is not None
        if not shape:
            return value
        if array is not None:
            return self._editor.constant(array.reshape(with_row(shape)), base, dtype=value.dtype)
        target = self._editor.constant(np.array(with_row(shape), np.int64), f"{base}_shape")
        move = self._editor.node("Reshape", [value, target], value, value.dtype, base=base)
        move.outputs[0].shape = ir.Shape(with_row(shape))
        self._editor.after(value, move)
        self._moves.add(move)
        return move.outputs[0]

    def _like(self, value: ir.Value, base: str, shape: tuple[int, ...]) -> ir.Value:
        return ir.Value(name=self._editor.name(base), type=value.type, shape=ir.Shape(shape))

    def _known(self, value: ir.Value) -> ir.Value | None:
        """The form of a value that was made and is in the model still; rules may have put another in the value's place
        since."""
        made = self._made.get(value)
        if made is None:
            made = next((user.outputs[0] for user, _ in value.uses() if user in self._moves), None)
        if made is None:
            return None
        producer = made.producer()
        there = made.is_initializer() if producer is None else producer.graph is self._model.graph
        return made if there else None


def _two_dimensional(node: ir.Node) -> dict[str, ir.Attr]:
    """The attributes of a convolution in one dimension as one of a row has them."""
    found = dict(node.attributes)
    for name, missing in (("kernel_shape", [1]), ("strides", [1]), ("dilations", [1])):
        if name in found:
            found[name] = ir.AttrInt64s(name, [*missing, *found[name].as_ints()])
    if "pads" in found:
        begin, end = found["pads"].as_ints()
        found["pads"] = ir.AttrInt64s("pads", [0, begin, 0, end])
    return found


def _step_of_all(node: ir.Node | None) -> ir.Node | None:
    """A quantise or dequantise step with one scale for a whole tensor; None of any other node, and of a step whose one
    scale is that of a block, which has as many axes as the tensor."""
    if node is None or node.domain != "" or node.op_type not in _STEPS or None in node.inputs[:2]:
        return None
    scales = [value for value in node.inputs[1:] if value is not None]
    if node.attributes.get_int("block_size", 0) or any(len(value.shape or ()) > 1 for value in scales):
        return None
    shape = static_shape(node.inputs[0])  # type: ignore[arg-type]
    one = all(elements(value) == 1 for value in scales)
    return node if one and shape and shape == static_shape(node.outputs[0]) else None


def _asked(value: ir.Value) -> ir.Value:
    """The form of one row of a value, to ask with."""
    given, array = static_shape(value), constant(value)
    shape = with_row(given) if given else ()
    if array is not None:
        return new_constant(array.reshape(shape), value.name or "constant")
    return ir.Value(name=value.name, type=value.type, shape=ir.Shape(shape))


def _goes_to(value: ir.Value, node: ir.Node | None) -> bool:
    """Whether a node alone reads a value."""
    return {user for user, _ in value.uses()} == {node} and not value.is_graph_output()

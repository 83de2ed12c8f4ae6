"""Layer norms as exporters write them out up to opset 16 → one `LayerNormalization`.

    y = (x - mean(x)) / √(mean((x - mean(x))²) + ε) · scale + bias, means over the last axes

ONNX Runtime and TensorRT run the operator as one kernel, and find it in a chain of nine nodes by themselves; but next
to a `Cast` ONNX Runtime makes one of two data types of it, and doesn't load the model (1.32). Sums of half precision
are made in fp32 by the operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.graph import DTYPES, constant, dtype_name, is_constant, scalar, static_shape

LAYER_NORM = "LayerNormalization"
_TYPES = ("fp32", "fp16")  # of bf16 ONNX Runtime has no kernel


@dataclass(slots=True)
class _Norm:
    """A norm as far as it was read."""

    x: ir.Value
    axis: int
    epsilon: float
    nodes: list[ir.Node]
    scale: ir.Value | None = None
    bias: ir.Value | None = None

    @property
    def last(self) -> ir.Value:
        """What the nodes give."""
        return self.nodes[-1].outputs[0]


def apply(model: ir.Model, log: Log) -> None:
    """Writes every layer norm of the main graph as one node, which has the last one's name."""
    edit: Editor | None = None
    for node in list(model.graph):
        found = _read(node)
        if found is not None:
            edit = edit or Editor(model)
            _write(edit, found)
            log.match("layer_norm", found.nodes[-1].name or "")


def _read(node: ir.Node) -> _Norm | None:
    """The norm whose quotient a node is, with all that follows of it."""
    found = _quotient(node)
    if found is None:
        return None
    kind, shape = dtype_name(found.x), static_shape(found.x)
    if shape is None or kind not in _TYPES or not 0 <= found.axis < len(shape):
        return None
    while (user := only_user(found.last)) is not None:
        if user.op_type == "Cast" and dtype_name(found.last) == "fp32" and dtype_name(user.outputs[0]) == kind:
            if found.scale is not None or found.bias is not None:
                break  # they are fp32, and so is the norm
        elif user.op_type == "Mul" and found.scale is None and found.bias is None:
            found.scale = _parameter(user, found.last, shape, found.axis)
            if found.scale is None:
                break
        elif user.op_type == "Add" and found.bias is None:
            found.bias = _parameter(user, found.last, shape, found.axis)
            if found.bias is None:
                break
        else:
            break
        found.nodes.append(user)
    return found if dtype_name(found.last) in ("fp32", kind) and _by_themselves(found.nodes) else None


def _quotient(node: ir.Node) -> _Norm | None:
    """What is centred, divided by its deviation: d / √(…), or d · 1 / √(…)."""
    if node.domain != "" or node.op_type not in ("Div", "Mul") or len(node.inputs) != 2:
        return None
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        root, nodes = node.inputs[1 - index], [node]
        if node.op_type == "Mul":
            inverse = made_by(root, "Reciprocal")
            if inverse is None:
                continue
            nodes.insert(0, inverse)
            root = inverse.inputs[0]
        found = _deviation(root)
        centred = _centred(node.inputs[index])
        if found is not None and centred is not None and centred.x is found.x and centred.axis == found.axis:
            found.nodes = list(dict.fromkeys([*centred.nodes, *found.nodes, *nodes]))
            return found
    return None


def _deviation(root: ir.Value | None) -> _Norm | None:
    """√(mean(d²) + ε)."""
    sqrt = made_by(root, "Sqrt")
    added = None if sqrt is None else made_by(sqrt.inputs[0], "Add")
    if sqrt is None or added is None:
        return None
    for index in (0, 1):
        epsilon, mean = scalar(added.inputs[index]), averaging(added.inputs[1 - index])
        if epsilon is None or epsilon < 0 or mean is None:
            continue
        squares, axis = mean.inputs[0], first_axis(mean)
        square = squaring(squares)
        if square is None or axis is None:
            continue
        centred = _centred(square.inputs[0])
        if centred is not None and centred.axis == axis:
            return _Norm(centred.x, axis, epsilon, [*centred.nodes, square, mean, added, sqrt])
    return None


def _centred(value: ir.Value | None) -> _Norm | None:
    """x - mean(x), which exporters cast to fp32."""
    cast = made_by(value, "Cast")
    if cast is not None and dtype_name(cast.outputs[0]) == "fp32":
        value = cast.inputs[0]
    else:
        cast = None
    less = made_by(value, "Sub")
    mean = None if less is None else averaging(less.inputs[1])
    if less is None or mean is None or mean.inputs[0] is not less.inputs[0]:
        return None
    x, axis = less.inputs[0], first_axis(mean)
    if x is None or axis is None:
        return None
    return _Norm(x, axis, 0.0, [mean, less, *([] if cast is None else [cast])])


def squaring(value: ir.Value | None) -> ir.Node | None:
    """The node that a value is the square of some other by."""
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or len(node.inputs) != 2:
        return None
    base, by = node.inputs
    return node if (node.op_type == "Pow" and scalar(by) == 2) or (node.op_type == "Mul" and base is by) else None


def averaging(value: ir.Value | None) -> ir.Node | None:
    """The node that a value is a mean by, which keeps its axes."""
    node = made_by(value, "ReduceMean")
    return node if node is not None and node.attributes.get_int("keepdims", 1) == 1 else None


def first_axis(mean: ir.Node) -> int | None:
    """The first axis of a mean over the last ones; None if it is over others."""
    shape = None if mean.inputs[0] is None else static_shape(mean.inputs[0])
    axes = constant(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if shape is None or axes is None or not axes.size:
        return None
    places = sorted({int(axis) % len(shape) for axis in axes.reshape(-1)})
    return places[0] if places == list(range(places[0], len(shape))) else None


def _parameter(node: ir.Node, value: ir.Value, shape: tuple[int, ...], axis: int) -> ir.Value | None:
    """The constant that a node brings to a value, if it has a number for each place of the axes of the norm, or one
    for all."""
    other = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    own = None if other is None else static_shape(other)
    if other is None or other is value or own is None or not is_constant(other) or len(own) > len(shape):
        return None
    wanted = shape[axis:]
    lead, rest = own[: max(len(own) - len(wanted), 0)], own[-len(wanted) :]
    fits = all(size in (1, place) for size, place in zip(rest[::-1], wanted[::-1], strict=False))
    return other if fits and all(size == 1 for size in lead) else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads a value, of the same graph, if nothing else does."""
    users = list(value.uses())
    if value.is_graph_output() or len(users) != 1 or users[0].node.domain != "":
        return None
    return users[0].node if users[0].node.graph is value.producer().graph else None  # type: ignore[union-attr]


def _by_themselves(nodes: list[ir.Node]) -> bool:
    """Whether nobody else needs what lies between these nodes."""
    *inner, last = nodes
    return all(
        not value.is_graph_output() and all(user in nodes for user, _ in value.uses())
        for node in inner
        for value in node.outputs
    ) and all(node.graph is last.graph for node in inner)


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """The node that makes a value, if it is of this operator."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain == "" and node.op_type == operator else None


def _write(edit: Editor, found: _Norm) -> None:
    x, last, kind = found.x, found.nodes[-1], dtype_name(found.last)
    made: list[ir.Node] = []
    if dtype_name(x) != kind:
        cast = edit.node("Cast", [x], x, DTYPES[kind], base=f"{x.name}_{kind}", attributes={"to": int(DTYPES[kind])})
        made.append(cast)
        x = cast.outputs[0]
    places = (static_shape(x) or ())[found.axis :]
    inputs = [x, _of_shape(edit, found.scale, places, kind, f"{found.last.name}_scale")]
    if found.bias is not None:
        inputs.append(_of_shape(edit, found.bias, places, kind, f"{found.last.name}_bias"))
    out = ir.Value(name=found.last.name, type=ir.TensorType(DTYPES[kind]), shape=found.last.shape)
    attributes = {"axis": found.axis - len(x.shape or ()), "epsilon": found.epsilon}
    made.append(ir.node(LAYER_NORM, inputs, attributes, outputs=[out], name=last.name))
    ir.convenience.replace_nodes_and_values(edit.graph, last, found.nodes, made, [found.last], [out])


def _of_shape(edit: Editor, value: ir.Value | None, shape: tuple[int, ...], kind: str, name: str) -> ir.Value:
    """A constant with a number for each place; ones, if there is none."""
    dtype = DTYPES[kind].numpy()
    array = np.ones(shape, dtype) if value is None else constant(value)
    assert array is not None
    if value is not None and array.shape == shape:
        return value
    lead = array.ndim - len(shape)
    array = array.reshape(array.shape[lead:]) if lead > 0 else array
    return edit.constant(np.array(np.broadcast_to(array, shape)), name)

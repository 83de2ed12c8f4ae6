"""Where the elements of a tensor come from: chains of nodes that only move data, read as one.

Exporters split heads, swap axes and repeat the heads of keys in many ways. All of them are steps of one kind: after
them, dimension by dimension, an element's place in the source is a sum of digits times strides. A `Layout` holds these,
as a hierarchical layout of CuTe does: each dimension is a list of factors (size, stride), the outermost first. What is
repeated has the stride 0. `sources` looks for the values upstream that a tensor is made of, and `plan` says with which
few nodes to make a tensor of a layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.opening import FLOATS, new_constant, with_row
from tilewright.tuner.model.graph import constant, dtype_name, is_constant, scalar, static_shape

Factor = tuple[int, int]
Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]
Shape = tuple[int, ...]
View = Callable[[Layout], Layout | None]
Made = TypeVar("Made")

RESHAPES = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")
_LONGEST = 12  # nodes between a product and what its operand is made of; exporters have up to 7


def row_before(value: ir.Value) -> ir.Value | None:
    """The images of one row, (N, C, 1, L), that a reshape makes a value (N, C, L) of; None of any other value."""
    node = value.producer()
    if node is None or node.domain != "" or node.op_type not in RESHAPES or node.inputs[0] is None:
        return None
    shape, row = static_shape(value), static_shape(node.inputs[0])
    return node.inputs[0] if shape is not None and len(shape) == 3 and row == with_row(shape) else None


def plain(shape: Sequence[int]) -> Layout:
    """A tensor as it lies in memory."""
    return tuple(((size, math.prod(shape[axis + 1 :])),) if size != 1 else () for axis, size in enumerate(shape))


def sizes(layout: Layout) -> Shape:
    """The shape of a tensor of a layout."""
    return tuple(math.prod(size for size, _ in dim) for dim in layout)


def _merged(factors: Sequence[Factor]) -> Dim:
    found: list[Factor] = []
    for size, stride in factors:
        if found and found[-1][1] == size * stride:
            found[-1] = (found[-1][0] * size, stride)
        else:
            found.append((size, stride))
    return tuple(found)


def regrouped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """After a reshape; None if a new dimension would begin within an old factor that it does not divide."""
    waiting = [factor for dim in layout for factor in dim]
    made = []
    for wanted in shape:
        taken = []
        while wanted > 1:
            if not waiting:
                return None
            size, stride = waiting.pop(0)
            if wanted % size == 0:
                taken.append((size, stride))
                wanted //= size
            elif size % wanted == 0:
                taken.append((wanted, stride * (size // wanted)))
                waiting.insert(0, (size // wanted, stride))
                wanted = 1
            else:
                return None
        made.append(_merged(taken))
    return None if waiting or 0 in shape else tuple(made)


def transposed(layout: Layout, order: Sequence[int]) -> Layout:
    """With its axes in another order."""
    return tuple(layout[axis] for axis in order)


def swapped(layout: Layout) -> Layout:
    """With its last two axes swapped."""
    return (*layout[:-2], layout[-1], layout[-2])


def expanded(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """Broadcast as ONNX's `Expand` has it: a dimension of 1, in the tensor or in the shape, takes the other's size."""
    rank = max(len(layout), len(shape))
    aligned = [*[()] * (rank - len(layout)), *layout]
    asked = [*[1] * (rank - len(shape)), *shape]
    made: list[Dim] = []
    for dim, have, size in zip(aligned, sizes(tuple(aligned)), asked, strict=True):
        if have == 1:
            made.append(((size, 0),) if size != 1 else ())
        elif size in (1, have):
            made.append(dim)
        else:
            return None
    return tuple(made)


def repeated(layout: Layout, axis: int, times: int, *, each: bool) -> Layout:
    """With the whole of an axis so many times, or each of its places so many times in a row."""
    made = list(layout)
    copies = [(times, 0)] if times != 1 else []
    made[axis] = _merged([*layout[axis], *copies] if each else [*copies, *layout[axis]])
    return tuple(made)


def moved(node: ir.Node, layout: Layout) -> Layout | None:
    """The layout of a node's result, given that of its first input; None if the node does more than move data."""
    if node.domain != "" or len(node.outputs) != 1:
        return None
    shape = static_shape(node.outputs[0])
    if shape is None:
        return None
    if node.op_type == "Identity":
        return layout
    if node.op_type in RESHAPES:
        return regrouped(layout, shape)
    if node.op_type == "Transpose":
        return transposed(layout, node.attributes.get_ints("perm", []) or range(len(layout))[::-1])
    if node.op_type == "Expand":
        return expanded(layout, shape)
    return _copied(node, layout)


def _copied(node: ir.Node, layout: Layout) -> Layout | None:
    """`moved` of nodes that repeat: `Tile`, `Concat` of one value, `Gather` of each place of an axis several times."""
    if node.op_type == "Tile":
        times = constant(node.inputs[1])
        for axis, count in enumerate([] if times is None else times.tolist()):
            layout = repeated(layout, axis, count, each=False)
        return None if times is None else layout
    axis = node.attributes.get_int("axis", 0) or 0
    axis %= len(layout) or 1
    if node.op_type == "Concat" and all(value is node.inputs[0] for value in node.inputs):
        return repeated(layout, axis, len(node.inputs), each=False)
    if node.op_type == "Gather":
        indices, size = constant(node.inputs[1]), sizes(layout)[axis]
        if indices is None or indices.ndim != 1 or not size or len(indices) % size:
            return None
        copies = len(indices) // size
        if np.array_equal(indices, np.repeat(np.arange(size), copies)):
            return repeated(layout, axis, copies, each=True)
    return None


@dataclass(frozen=True, slots=True)
class Source:
    """A value upstream that a tensor is made of."""

    value: ir.Value
    layout: Layout  # of the tensor
    factor: float  # the tensor is the value times this
    moves: int  # nodes further upstream, of those that were looked at, that move or change elements


def sources(value: ir.Value, view: View, *, scaled: bool, widened: bool = False) -> Iterator[Source]:
    """What a tensor is made of, from the nearest value to the farthest, the first being `value` itself; `view` makes
    the tensor's layout of that of `value`.

    `scaled`: whether to go on through factors of one constant, and through casts between data types of floats;
    `widened`: through casts to fp32 alone, which lose nothing.
    """
    chain: list[ir.Node] = []
    values = [value]
    while len(chain) < _LONGEST:
        node = values[-1].producer()
        if node is None or not (
            _moves(node)
            or (scaled and (_factor(node) is not None or _is_cast(node)))
            or (widened and _is_cast(node) and dtype_name(node.outputs[0]) == "fp32")
        ):
            break
        chain.append(node)
        values.append(_followed(node))
    for index, candidate in enumerate(values):
        shape = static_shape(candidate)
        if shape is None or 0 in shape:
            return
        layout: Layout | None = plain(shape)
        factor = 1.0
        for node in reversed(chain[:index]):
            by = _factor(node)
            if by is not None or _is_cast(node):
                factor *= 1.0 if by is None else by
            elif layout is not None:
                layout = moved(node, layout)
        layout = None if layout is None else view(layout)
        if layout is not None:
            moves = sum(node.op_type not in (*RESHAPES, "Identity") for node in chain[index:])
            yield Source(candidate, layout, factor, moves)


def _moves(node: ir.Node) -> bool:
    source = node.inputs[0] if node.inputs else None
    shape = None if source is None else static_shape(source)
    return shape is not None and 0 not in shape and moved(node, plain(shape)) is not None


def _factor(node: ir.Node) -> float | None:
    """The constant that a node multiplies by."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    if static_shape(node.outputs[0]) != static_shape(_followed(node)):
        return None
    number = scalar(node.inputs[1])
    if node.op_type == "Div":
        return None if not number else 1 / number
    return scalar(node.inputs[0]) if number is None else number


def _is_cast(node: ir.Node) -> bool:
    kinds = [dtype_name(value) for value in (*node.inputs, *node.outputs) if value is not None]
    return node.domain == "" and node.op_type == "Cast" and all(kind in FLOATS for kind in kinds)


def _followed(node: ir.Node) -> ir.Value:
    """The input that a node moves or multiplies."""
    first = node.inputs[0]
    assert first is not None
    if node.op_type == "Mul" and scalar(first) is not None and scalar(node.inputs[1]) is None:
        assert node.inputs[1] is not None
        return node.inputs[1]
    return first


Step = tuple[str, Shape]
"""Reshape, Transpose or Expand, and its shape or order; Gather, and the place on the first axis."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The nodes that make a tensor of a source."""

    source: ir.Value
    steps: tuple[Step, ...]
    shape: Shape
    factor: float = 1.0
    moves: int = field(default=0, compare=False)  # those of the source, too

    @property
    def cost(self) -> tuple[int, int]:
        """Moves of data, and nodes."""
        return self.moves + sum(word != "Reshape" for word, _ in self.steps), len(self.steps)

    def value(self) -> ir.Value:
        """A value as its result will be, to ask with."""
        return ir.Value(name=self.source.name, type=self.source.type, shape=ir.Shape(self.shape))


def plan(source: Source, drop: Sequence[int] = ()) -> Plan:
    """How to make a tensor of a source; of axes in `drop` one place will do if all its places are the same."""
    shape = static_shape(source.value)
    assert shape is not None
    dims = [
        () if axis in drop and all(not stride for _, stride in dim) else dim for axis, dim in enumerate(source.layout)
    ]
    return Plan(source.value, steps(shape, tuple(dims)), sizes(tuple(dims)), source.factor, source.moves)


def steps(shape: Shape, layout: Layout) -> tuple[Step, ...]:
    """What makes a tensor of a layout of one of a shape: at most one transpose, and one expand."""
    target = sizes(layout)
    factors = [factor for dim in layout for factor in dim]
    real = [factor for factor in factors if factor[1]]
    memory = sorted(range(len(real)), key=lambda index: -real[index][1])
    order = tuple(memory.index(index) for index in range(len(real)))
    made: list[Step] = []
    now = shape
    if order != tuple(range(len(order))):
        before = tuple(real[index][0] for index in memory)
        if all(len(dim) <= 1 for dim in layout) and len(real) == len(factors):
            # Dimensions of 1 go along, so that no reshape need follow.
            before, order = _with_ones(before, order, layout, now)
        if before != now:
            made.append(("Reshape", before))
        made.append(("Transpose", order))
        now = tuple(before[axis] for axis in order)
    if len(real) < len(factors):
        apart = tuple(size if stride else 1 for size, stride in factors)
        if now != apart:
            made.append(("Reshape", apart))
        now = tuple(size for size, _ in factors)
        made.append(("Expand", now))
    if now != target:
        made.append(("Reshape", target))
    return tuple(made)


def _with_ones(before: Shape, order: Shape, layout: Layout, now: Shape) -> tuple[Shape, Shape]:
    """The shape before a transpose, and its order, with as many dimensions of 1 as the result has: placed as they are
    now, if they can be."""
    ones = sum(not dim for dim in layout)
    if tuple(size for size in now if size != 1) == before and len(now) == len(layout):
        padded = now
    else:
        padded = (*[1] * ones, *before)
    real = [axis for axis, size in enumerate(padded) if size != 1]
    free = [axis for axis, size in enumerate(padded) if size == 1]
    digits, single = iter(order), iter(free)
    return padded, tuple(real[next(digits)] if dim else next(single) for dim in layout)


class Maker:
    """Makes what plans say, each thing once: layers share their masks."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What was made under a key, or is now."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def follow(self, op: Any, source: ir.Value, steps: Sequence[Step], name: str) -> ir.Value:
        """The value that steps make of another; of a constant a constant."""
        if is_constant(source) and steps:
            return self.once((source, tuple(steps)), lambda: _of_constant(source, steps))
        value = source
        for word, numbers in steps:
            value = self.once((value, word, numbers), lambda v=value, w=word, n=numbers: node(op, w, v, n, name))  # type: ignore[misc]
        return value


class Placer:
    """Makes what plans say outside of a rule, each step of a value once and right behind what it is made of."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._made: dict[tuple[ir.Value, Step], ir.Value] = {}

    def follow(self, value: ir.Value, steps: Sequence[Step], base: str) -> ir.Value:
        """The value that steps make of another, which is no constant."""
        for step in steps:
            if (value, step) not in self._made:
                self._made[value, step] = self._step(value, step, base)
            value = self._made[value, step]
        return value

    def _step(self, value: ir.Value, step: Step, base: str) -> ir.Value:
        (word, numbers), before = step, static_shape(value) or ()
        assert value.dtype is not None
        inputs, attributes, shape = [value], {}, numbers
        if word == "Transpose":
            attributes = {"perm": list(numbers)}
            shape = tuple(before[axis] for axis in numbers)
        elif word == "Gather":
            inputs.append(self._editor.constant(np.array(numbers[0], np.int64), f"{base}_place"))
            shape = before[1:]
        else:
            inputs.append(self._editor.constant(np.array(numbers, np.int64), f"{base}_shape"))
        made = self._editor.node(word, inputs, value, value.dtype, base=f"{base}_{word}", attributes=attributes)
        made.outputs[0].shape = ir.Shape(shape)
        self._editor.after(value, made)
        return made.outputs[0]


def node(op: Any, word: str, source: ir.Value, numbers: Shape, name: str) -> ir.Value:
    """One step as a node."""
    if word == "Transpose":
        made = op.Transpose(source, perm=list(numbers))
        shape = tuple((static_shape(source) or ())[axis] for axis in numbers)
    else:
        digits = "x".join(map(str, numbers))
        made = getattr(op, word)(source, new_constant(np.asarray(numbers, np.int64), f"shape_{digits}"))
        shape = numbers
    return typed(made, source.type, shape, f"{name}_{word}")


def typed(value: ir.Value, kind: ir.TypeProtocol | None, shape: Sequence[int], name: str) -> ir.Value:
    """A value of a new node with what rules need to know of it; the node gets the name, too."""
    value.type = kind
    value.shape = ir.Shape(shape)
    made = value.producer()
    assert made is not None
    made.name = name
    return value


def _of_constant(source: ir.Value, steps: Sequence[Step]) -> ir.Value:
    array = constant(source)
    assert array is not None
    for word, numbers in steps:
        if word == "Transpose":
            array = array.transpose(numbers)
        else:
            array = array.reshape(numbers) if word == "Reshape" else np.broadcast_to(array, numbers)
    return new_constant(np.ascontiguousarray(array), f"{source.name}_moved")

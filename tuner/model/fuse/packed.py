"""Queries, keys and values that are parts of one tensor: all of it is brought into their order at once.

Exporters write a packed projection, of (S, B, 3·E) say, as a `Reshape`, a `Transpose` that brings the axis of 3 to the
front, three `Gather` that take a place of it each, and behind each of them another `Transpose`, which brings its heads
before the sequence. One `Transpose` to (3, B, H, S, D) and three `Gather` do the same, and move each element twice, not
three times.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as passes

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.layout import RESHAPES, Factor, Layout, Placer, Shape, Step, moved, plain, sizes, steps
from tilewright.tuner.model.fuse.opening import inputs_of, is_open
from tilewright.tuner.model.graph import constant, static_shape

_OPERANDS = ("q", "k", "v")
_LONGEST = 12  # nodes between attention and the projection; torch's `MultiheadAttention` has 8


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor as one of so many places of a value upstream."""

    value: ir.Value
    steps: tuple[Step, ...]  # to an axis of the places first, and then the tensor's own axes
    count: int
    place: int
    passed: frozenset[ir.Node]  # on the way there


def unpack(model: ir.Model) -> None:
    """Makes operands of open attentions of the main graph that are parts of one value in fewer moves, in place."""
    editor = Editor(model)
    placer, changed = Placer(editor), False
    for node in list(model.graph):
        if is_open(node) and node.op_type == "attention":
            changed |= _unpack(node, placer)
    if changed:
        passes.RemoveUnusedNodesPass()(model)


def _unpack(attention: ir.Node, placer: Placer) -> bool:
    groups: dict[tuple[ir.Value, tuple[Step, ...]], dict[str, _Part]] = {}
    given = inputs_of(attention)
    for name in _OPERANDS:
        for part in _parts(given[name]):
            groups.setdefault((part.value, part.steps), {})[name] = part
    best: dict[str, _Part] = {}
    most = 1
    for group in groups.values():
        saved = _saved(group, attention)
        if saved >= most:  # of two values the one further up: what lies between goes
            best, most = group, saved
    for name, part in best.items():
        way = (*part.steps, ("Gather", (part.place,)))
        made = placer.follow(part.value, way, f"{attention.name}_{name}")
        attention.replace_input_with(list(given).index(name), made)
    return bool(best)


def _saved(group: dict[str, _Part], attention: ir.Node) -> int:
    """How many moves less there are if operands are made together: 0 or less where they are not all of the value, of
    which what nobody wants would be moved, too."""
    parts = list(group.values())
    if len({part.place for part in parts}) < parts[0].count:
        return 0
    gone = _unused_without(attention, frozenset[ir.Node]().union(*(part.passed for part in parts)))
    before = sum(node.op_type not in (*RESHAPES, "Identity") for node in gone)
    after = sum(word != "Reshape" for word, _ in parts[0].steps) + len(parts)
    return before - after


def _unused_without(user: ir.Node, nodes: frozenset[ir.Node]) -> set[ir.Node]:
    """Those of some nodes that nobody but this user and each other needs."""
    left = set(nodes)

    def is_needed(node: ir.Node) -> bool:
        (out,) = node.outputs
        return out.is_graph_output() or any(use.node is not user and use.node not in left for use in out.uses())

    while needed := {node for node in left if is_needed(node)}:
        left -= needed
    return left


def _parts(tensor: ir.Value) -> Iterator[_Part]:
    """What a tensor is a part of, from the nearest value to the farthest."""
    chain: list[ir.Node] = []
    value = tensor
    while len(chain) < _LONGEST and (node := value.producer()) is not None:
        source = node.inputs[0] if node.inputs else None
        shape = None if source is None else static_shape(source)
        if source is None or shape is None or 0 in shape:
            return
        if _picked(node, shape) is None and moved(node, plain(shape)) is None:
            return
        chain.append(node)
        value = source
        found = _read(chain, shape)
        if found is not None:
            layout, factor, place = found
            yield _Part(value, steps(shape, ((factor,), *layout)), factor[0], place, frozenset(chain))


def _read(chain: list[ir.Node], shape: Shape) -> tuple[Layout, Factor, int] | None:
    """What is left of a value of a shape behind a chain, its last node being the first: the layout, the factor of which
    there is one place, and that. None if there is not one such factor: of two there would be four places at least."""
    layout = plain(shape)
    found: tuple[Factor, int] | None = None
    for node in reversed(chain):
        picked = _picked(node, sizes(layout))
        if picked is None:
            behind = moved(node, layout)
            if behind is None:
                return None
            layout = behind
            continue
        axis, place = picked
        if found is not None or len(layout[axis]) != 1 or not layout[axis][0][1]:
            return None
        found = layout[axis][0], place
        layout = (*layout[:axis], *layout[axis + 1 :])
    return None if found is None else (layout, *found)


def _picked(node: ir.Node, shape: Shape) -> tuple[int, int] | None:
    """The axis of which a `Gather` takes one place, and that."""
    if node.op_type != "Gather" or node.domain != "":
        return None
    indices = constant(node.inputs[1])
    axis = (node.attributes.get_int("axis", 0) or 0) % (len(shape) or 1)
    if indices is None or indices.ndim or not -shape[axis] <= int(indices) < shape[axis]:
        return None
    return axis, int(indices) % shape[axis]

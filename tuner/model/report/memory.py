"""What a model needs of device memory: its weights, and the most that its activations take at once.

A value is live from the node that makes it to the last that reads it; graph inputs and outputs, which the caller owns,
all the time. While a node runs, what it reads and what it makes are both live: no node works in place. Views (`Reshape`
and the like) take nothing: they share what they are views of, which lives until the last of them is read. A node with
subgraphs takes, besides, the most that one of them does. Workspaces, alignment and fragmentation are not counted: it is
what the graph asks for, equal for every runtime.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from tilewright.tuner.model.graph import dtype_name, is_constant, static_shape
from tilewright.tuning_db.errors import ModelError

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
"""Operators whose result is their first input, seen in another shape."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one model needs, in bytes."""

    weights: dict[str, int]  # by canonical dtype name, sorted
    peak_bytes: int  # activations, with graph inputs and outputs
    peak_node: str | None  # the first node during which they are that many; None: a graph without nodes
    interface_bytes: int  # of them graph inputs and outputs
    unknown_values: int  # whose size depends on the data, so that they are in none of these

    @property
    def weight_bytes(self) -> int:
        """All weights."""
        return sum(self.weights.values())


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of memory: its size, and the first and last node, by place in the graph, while it is live."""

    bytes: int
    first: int
    last: int


def memory_of(model: ir.Model) -> Memory:
    """The memory that a model needs; values of unknown size are counted, and taken for nothing."""
    nodes = list(model.graph)
    levels = _levels(model.graph)
    at = max(range(len(nodes)), key=levels.__getitem__, default=None)
    interface = {id(_storage(value)): known_bytes(_storage(value)) for value in _interface(model.graph)}
    return Memory(
        weights=weights_of(model),
        peak_bytes=levels[at or 0],
        peak_node=None if at is None else nodes[at].name,
        interface_bytes=sum(interface.values()),
        unknown_values=sum(
            not _is_known(value)
            for graph in _graphs(model.graph)
            for node in graph
            for value in node.outputs
            if value.name and _storage(value) is value
        ),
    )


def weights_of(model: ir.Model) -> dict[str, int]:
    """Bytes of initializers and constants by canonical dtype name, subgraphs included. No tensor is read."""
    found: dict[str, int] = {}

    def add(value: ir.Value) -> None:
        found[dtype_name(value)] = found.get(dtype_name(value), 0) + known_bytes(value)

    for graph in _graphs(model.graph):
        for value in graph.initializers.values():
            add(value)
        for node in graph:
            if _is_constant_node(node):
                add(node.outputs[0])
    return dict(sorted(found.items()))


def live_spans(graph: ir.Graph) -> dict[ir.Value, Span]:
    """When each activation of a graph is live, by the value that made it; views are part of what they are of."""
    nodes = list(graph)
    end = len(nodes) - 1
    first: dict[ir.Value, int] = {}
    last: dict[ir.Value, int] = {}
    for index, node in enumerate(nodes):
        if _is_constant_node(node):
            continue
        for value in node.outputs:
            if value.name and not is_constant(_storage(value)):
                storage = _storage(value)
                first.setdefault(storage, index)
                last[storage] = max(last.get(storage, index), index)
        for read in _reads(node):
            storage = _storage(read)
            if storage in last:
                last[storage] = index
    for value in _interface(graph):
        if not is_constant(_storage(value)):
            first[_storage(value)], last[_storage(value)] = 0, max(0, end)
    return {value: Span(known_bytes(value), first[value], last[value]) for value in first}


def value_bytes(value: ir.Value) -> int:
    """Bytes of a value, types of less than a byte packed.

    Raises:
        ModelError: its shape is not static, or its type has no size.
    """
    shape, kind = _shape_and_kind(value)
    if shape is None or kind is None or kind in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        what = "no static shape" if shape is None else f"the type {kind.name if kind is not None else 'unknown'}"
        raise ModelError(f"value {value.name!r} has {what}: its memory can't be told; bind all dimensions")
    return math.ceil(math.prod(shape) * kind.bitwidth / 8)


def known_bytes(value: ir.Value) -> int:
    """`value_bytes`, or 0 where that can't be told: of a result whose size depends on values."""
    return value_bytes(value) if _is_known(value) else 0


def _is_known(value: ir.Value) -> bool:
    shape, kind = _shape_and_kind(value)
    return shape is not None and kind not in (None, ir.DataType.STRING, ir.DataType.UNDEFINED)


def _shape_and_kind(value: ir.Value) -> tuple[tuple[int, ...] | None, ir.DataType | None]:
    tensor = value.const_value
    if tensor is None:
        return static_shape(value), value.dtype
    return tuple(int(dim) for dim in tensor.shape), tensor.dtype  # type: ignore[arg-type]


def is_view(node: ir.Node) -> bool:
    """Whether a node only gives its first input another shape, or name."""
    return node.domain == "" and node.op_type in VIEWS


def _storage(value: ir.Value) -> ir.Value:
    """The value whose memory this one is a view of; itself if it is none."""
    while (producer := value.producer()) is not None and is_view(producer) and producer.inputs[0] is not None:
        value = producer.inputs[0]
    return value


def _interface(graph: ir.Graph) -> list[ir.Value]:
    """Graph inputs and outputs; initializers among the inputs, as old files have them, are weights."""
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    return [*inputs, *graph.outputs]


def _levels(graph: ir.Graph) -> list[int]:
    """Bytes of activations while each node runs; of a graph without nodes, those of its inputs and outputs."""
    nodes = list(graph)
    changes = [0] * (len(nodes) + 2)
    for span in live_spans(graph).values():
        changes[span.first] += span.bytes
        changes[span.last + 1] -= span.bytes
    levels = list(itertools.accumulate(changes[: max(1, len(nodes))]))
    for index, node in enumerate(nodes):
        levels[index] += max((max(_levels(inner)) for inner in _subgraphs(node)), default=0)
    return levels


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, what its subgraphs do included."""
    yield from (value for value in node.inputs if value is not None)
    for graph in _subgraphs(node):
        yield from graph.outputs
        for inner in graph:
            yield from _reads(inner)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type is ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _graphs(graph: ir.Graph) -> Iterator[ir.Graph]:
    yield graph
    inner: Iterable[ir.Graph] = (found for node in graph for found in _subgraphs(node))
    for found in inner:
        yield from _graphs(found)


def _is_constant_node(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type == "Constant"

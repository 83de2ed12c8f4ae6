"""Changing a graph: new constants, nodes and values with names of their own, and putting one node for another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.graph import Names

Array = np.ndarray[Any, Any]


class Editor:
    """Adds to the main graph of a model. Knows every name in it, so that none is given twice."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        taken: set[str] = set()
        for node in model.graph.all_nodes():
            taken.update(value.name for value in (*node.inputs, *node.outputs) if value is not None and value.name)
            if node.name:
                taken.add(node.name)
        taken.update(value.name for value in model.graph.inputs if value.name)
        taken.update(model.graph.initializers)
        self._names = Names(taken)

    def name(self, base: str) -> str:
        """A name that is free, and now taken: `base`, or that and a number."""
        return self._names.free(base)

    def constant(self, array: Array, base: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A new initializer."""
        name = self.name(base)
        tensor = ir.tensor(array, dtype=dtype, name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        like: ir.Value,
        dtype: ir.DataType,
        *,
        base: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Node:
        """A node, in no graph yet, whose one output has the shape of `like` and a data type; both are named after
        `base`."""
        out = ir.Value(name=self.name(base), type=ir.TensorType(dtype), shape=like.shape)
        return ir.node(operator, inputs, attributes, outputs=[out], name=self.name(f"{base}_{operator}"))

    def after(self, value: ir.Value, node: ir.Node) -> None:
        """Puts a node where a value is known: behind the node that makes it, or first."""
        producer = value.producer()
        if producer is not None and producer.graph is self.graph:
            self.graph.insert_after(producer, node)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.append(node)

    def replace(self, old: ir.Node, new: ir.Node) -> None:
        """Puts a node in the place of another of as many outputs. Its outputs get the names of the other's, and those
        that have none its types and shapes."""
        kinds = [
            (now.type or before.type, now.shape or before.shape)
            for before, now in zip(old.outputs, new.outputs, strict=True)
        ]
        ir.convenience.replace_nodes_and_values(self.graph, old, [old], [new], old.outputs, new.outputs)
        for value, (kind, shape) in zip(new.outputs, kinds, strict=True):
            value.type, value.shape = kind, shape

    def tidy(self) -> None:
        """Removes nodes and initializers that nothing needs, and sorts the nodes."""
        needed = set(self.graph.outputs)
        for node in reversed(list(self.graph)):
            if not any(value in needed or value.uses() for value in node.outputs):
                self.graph.remove(node, safe=True)
        for name in [name for name, value in self.graph.initializers.items() if _idle(value)]:
            del self.graph.initializers[name]
        self.graph.sort()


def _idle(value: ir.Value) -> bool:
    return not (value.uses() or value.is_graph_output() or value.is_graph_input())

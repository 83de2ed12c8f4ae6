"""Values of fp16 that ONNX Runtime really rounds.

Of many operators it has no fp16 kernel on the CPU: it runs them in fp32 between casts of its own, and takes out the
casts to fp16 and back that then stand behind each other, with all optimisations off too. What lies between two such
nodes is never rounded and never overflows, and a model that is NaN in fp16 looks as good as in fp32.

Two `Identity` nodes behind every node that gives fp16 keep the casts apart: they have fp16 kernels, which copy nothing,
and of one alone between two nodes without ONNX Runtime makes fp32 (1.32). Casts to bf16 it leaves where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import TensorProto, helper

FP16 = TensorProto.FLOAT16

_EXACT = frozenset(
    {"Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Slice", "Gather", "Concat", "Flatten", "Split", "Pad"}
    | {"Expand", "Tile", "Relu", "Neg", "Abs", "Max", "Min", "Clip", "Where", "MaxPool", "DepthToSpace", "SpaceToDepth"}
)
"""Operators that make of numbers of fp16 numbers of fp16 alone: there is nothing to round behind them."""


def has_fp16(model: onnx.ModelProto) -> bool:
    """Whether any value of a model may be fp16: one that it is given, or that one of its nodes makes."""
    graphs = list(_graphs(model.graph))
    nodes = [node for graph in graphs for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    values = [value for graph in graphs for value in (*graph.input, *graph.value_info, *graph.output)]
    if any(map(_is_fp16, values)) or any(each.data_type == FP16 for graph in graphs for each in graph.initializer):
        return True
    return any(
        attribute.t.data_type == FP16 or (attribute.i == FP16 and attribute.name in ("to", "dtype"))
        for node in nodes
        for attribute in node.attribute
    )


def round_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model that computes what its data types say, with the names of its values; the one given may be changed."""
    if not has_fp16(model):
        return model
    if not all(_known(graph) for graph in _graphs(model.graph)):
        model = onnx.shape_inference.infer_shapes(model)
    taken = {name for graph in _graphs(model.graph) for name in _names(graph)}

    def fresh(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    for graph in _graphs(model.graph):
        named = {value.name for value in (*graph.value_info, *graph.output) if _is_fp16(value)}
        nodes = []
        for node in graph.node:
            nodes.append(node)
            if node.op_type in _EXACT and node.domain == "":
                continue
            for index, name in enumerate(node.output):
                if name in named:
                    node.output[index] = fresh(f"{name}/unrounded")
                    between = fresh(f"{name}/rounded")
                    nodes.append(helper.make_node("Identity", [node.output[index]], [between]))
                    nodes.append(helper.make_node("Identity", [between], [name]))
        del graph.node[:]
        graph.node.extend(nodes)
    return model


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all that are in its nodes; the inner ones first."""
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)
    yield graph


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Of all values that a graph has of its own."""
    yield from (value.name for value in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield from node.output


def _known(graph: onnx.GraphProto) -> bool:
    """Whether the types of all that a graph's nodes give are written in it."""
    values: Iterable[onnx.ValueInfoProto] = (*graph.value_info, *graph.output)
    typed = {value.name for value in values if value.type.WhichOneof("value") is not None}
    return all(name in typed for node in graph.node for name in node.output if name)


def _is_fp16(value: onnx.ValueInfoProto) -> bool:
    return value.type.tensor_type.elem_type == FP16

"""Names in an ONNX file: that they are text, each defined once and before use, and what operators they lead to."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import onnx

from tilewright.tuner.model.messages import listed, quoted
from tilewright.tuning_db.errors import ModelError

LARGEST_GRAPH = 200_000
"""Nodes, with those of subgraphs and inlined functions: a hundred times a large language model's."""

_FunctionKey = tuple[str, str, str]


def check_text(model: onnx.ModelProto) -> None:
    """Refuses text that isn't UTF-8: protobuf takes it, and hands it out as bytes where all expect a `str`.

    Raises:
        ModelError: with the name of the field.
    """
    messages: list[Any] = [model]
    while messages:
        message = messages.pop()
        if isinstance(message, onnx.TensorProto):
            # Its other fields are data, of which asking makes a copy.
            texts = [message.name, *(text for entry in message.external_data for text in (entry.key, entry.value))]
            if any(isinstance(text, bytes) for text in texts):
                raise ModelError("a tensor's name or external data is not UTF-8 text: the file is damaged")
            continue
        for field, content in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                messages.extend([content] if hasattr(content, "ListFields") else content)
            elif field.type == field.TYPE_STRING:
                for text in [content] if isinstance(content, str | bytes) else content:
                    if isinstance(text, bytes):
                        raise ModelError(f"the field {field.name} of a {type(message).__name__} is not UTF-8 text")


def check_functions(model: onnx.ModelProto) -> None:
    """Refuses functions that call each other in a circle, or that grow beyond all bounds when inlined.

    Raises:
        ModelError: which; or two functions have one name.
    """
    functions: dict[_FunctionKey, onnx.FunctionProto] = {}
    for function in model.functions:
        key = (function.domain, function.name, function.overload)
        if key in functions:
            raise ModelError(f"two functions are called {quoted(function.name)} of domain {quoted(function.domain)}")
        functions[key] = function
    calls = {
        key: [called for node in all_nodes(function.node) if (called := _key(node)) in functions]
        for key, function in functions.items()
    }
    try:
        order = list(graphlib.TopologicalSorter(calls).static_order())
    except graphlib.CycleError as error:
        circle = [name for _, name, _ in error.args[1]]
        raise ModelError(f"functions call each other in a circle: {listed(circle)}") from None
    # Nodes of each once inlined: a chain of functions that call the next one twice doubles at every step.
    sizes: dict[_FunctionKey, int] = {}
    for key in order:
        sizes[key] = sum(sizes.get(_key(node), 1) for node in all_nodes(functions[key].node))
    total = sum(sizes.get(_key(node), 1) for node in all_nodes(model.graph.node))
    if total > LARGEST_GRAPH:
        raise ModelError(f"the model has {total:.6g} nodes with its functions inlined: it may have {LARGEST_GRAPH}")


def put_in_order(model: onnx.ModelProto) -> None:
    """Checks that every value of the main graph is defined once, and sorts nodes that come before what they use.

    Raises:
        ModelError: a value is defined twice, or never, or the graph is cyclic.
    """
    graph = model.graph
    defined: dict[str, int] = {}  # by which node; inputs and initializers by none
    for name in [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]:
        if name in defined:
            raise ModelError(f"two values are called {quoted(name)}, an input or initializer and another")
        defined[name] = -1
    for place, node in enumerate(graph.node):
        for name in node.output:
            if name and name in defined:
                raise ModelError(f"two values are called {quoted(name)}: the second is made by {_called(node)}")
            if name:
                defined[name] = place
    needs: list[list[int]] = []
    for node in graph.node:
        names = list(used(node))
        for name in names:
            if name not in defined:
                raise ModelError(f"{_called(node)} uses the value {quoted(name)}, which is never defined")
        needs.append([defined[name] for name in names if defined[name] >= 0])
    for output in graph.output:
        if output.name not in defined:
            raise ModelError(f"the output {quoted(output.name)} is never defined")
    if all(need < place for place, all_needs in enumerate(needs) for need in all_needs):
        return
    try:
        order = list(graphlib.TopologicalSorter(dict(enumerate(needs))).static_order())
    except graphlib.CycleError as error:
        circle = [_called(graph.node[place]) for place in error.args[1]]
        raise ModelError(f"the graph is cyclic: {' → '.join(circle[:6])}{' → …' if len(circle) > 6 else ''}") from None
    nodes = [onnx.NodeProto.FromString(graph.node[place].SerializeToString()) for place in order]
    graph.ClearField("node")
    graph.node.extend(nodes)


def check_operators(model: onnx.ModelProto) -> None:
    """Refuses operators that ONNX Runtime doesn't have, once functions are inlined.

    Raises:
        ModelError: with the first node's name, operator and domain.
    """
    for node in all_nodes(model.graph.node):
        domain = "" if node.domain == "ai.onnx" else node.domain
        node.domain = domain
        if domain and (domain, node.op_type) not in _runtime_operators():
            raise ModelError(
                f"{_called(node)} has operator {quoted(node.op_type)} of domain {quoted(domain)}, which is neither a "
                f"function of the model nor known to ONNX Runtime: export the model without it, or a function with it"
            )


@cache
def _runtime_operators() -> frozenset[tuple[str, str]]:
    """Domain and name of what the installed ONNX Runtime can run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as runtime

    return frozenset((schema.domain, schema.name) for schema in runtime.get_all_operator_schema())


def _key(node: onnx.NodeProto) -> _FunctionKey:
    return (node.domain, node.op_type, node.overload)


def _called(node: onnx.NodeProto) -> str:
    return f"node {quoted(node.name or node.op_type)}"


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes, without those inside them."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """With those of subgraphs. Protobuf's parser has bounded how deep these nest."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def used(node: onnx.NodeProto) -> Iterator[str]:
    """The values of the graph around that a node uses, itself or in its subgraphs."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        own |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in used(inner) if name not in own)
        yield from (value.name for value in graph.output if value.name not in own)

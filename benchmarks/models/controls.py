"""Negative controls: models with something wrong in them, which a comparison has to notice."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from benchmarks.models.operators import Array, Operators, Samples
from tilewright.tuning_db.errors import ModelError


def without(model: ir.Model, node_name: str) -> ir.Model:
    """A copy of the model in which the weights of one node are zeros, as if they had been lost.

    Weights are the inputs of two or more axes that come of constants alone, directly or through nodes (a Reshape, a
    DequantizeLinear); the node gets zeros of the same shape and dtype instead. What else uses them keeps them.

    Raises:
        ModelError: there is no node of that name in the main graph, or it has no weights.
    """
    model = model.clone()
    graph = model.graph
    node = next((node for node in graph if node.name == node_name), None)
    if node is None:
        raise ModelError(f"no node {node_name!r} in the graph: name one of its {graph.num_nodes()} nodes")
    operators = Operators({domain: version for domain, version in graph.opset_imports.items() if not domain})
    found = False
    for index, value in enumerate(node.inputs):
        array = None if value is None else constant(value, operators)
        if array is not None and array.ndim > 1:
            name = f"{node_name}/zeros_{index}"
            zeros = ir.tensor(np.zeros_like(array), name=name)
            replacement = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(zeros.dtype), const_value=zeros
            )
            graph.initializers.add(replacement)
            node.replace_input_with(index, replacement)
            found = True
    if not found:
        raise ModelError(f"node {node_name!r} ({node.op_type}) has no constant input of two or more axes to zero")
    return model


def constant(value: ir.Value, operators: Operators) -> Array | None:
    """What a value is, if it doesn't depend on the model's inputs."""
    if value.is_graph_input():
        return None
    producer = value.producer()
    if producer is None:
        return None if value.const_value is None else value.const_value.numpy()
    if producer.op_type == "Constant":
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else tensor.numpy()
    inputs: list[Samples | None] = []
    for needed in producer.inputs:
        array = None if needed is None else constant(needed, operators)
        if array is None and needed is not None:
            return None
        inputs.append(None if array is None else [array])
    if not inputs:
        return None  # random numbers
    return operators(producer, inputs)[producer.outputs.index(value)][0]

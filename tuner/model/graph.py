"""What every pass over a model asks of it: data types, shapes, constants, and the fused nodes.

The model is an `onnx_ir.Model`. A fused node is one whose operator is the name of a plugin (docs/tensorrt.md), with all
of the plugin's attributes and two more that TensorRT's parser looks for; its domain is `tilewright` until
`bodies.attach_bodies` gives it a body, and then one of that body's own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels.tensorrt.catalogue import (
    NAMESPACE,
    VERSION,
    find_plugin,
    plugin_attributes,
    plugin_name,
    plugins,
)
from tilewright.kernels.tensorrt.operation import Tensor
from tilewright.tuning_db.errors import ModelError

Array = np.ndarray[Any, Any]

DTYPES: Mapping[str, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "fp64": ir.DataType.DOUBLE,
    "fp8e4m3": ir.DataType.FLOAT8E4M3FN,
    "fp8e5m2": ir.DataType.FLOAT8E5M2,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}
"""ONNX's data type of each canonical name."""

TYPED_FROM = 21
"""The opset that brought `output_dtype` of `QuantizeLinear`: before, a zero point says the type."""

_MOVES = frozenset(
    "Reshape Unsqueeze Squeeze Flatten Transpose Identity Cast QuantizeLinear DequantizeLinear".split()  # noqa: SIM905
)
"""Operators that change the order, shape or type of the elements of their first input alone."""

_NAMES = {kind: name for name, kind in DTYPES.items()}
_MARKS = {"plugin_namespace": NAMESPACE, "plugin_version": VERSION}


def dtype_name(value: ir.Value) -> str:
    """The canonical name of a value's data type; of types that no kernel knows ONNX's own, of an unknown one `?`."""
    if value.dtype is None:
        return "?"
    return _NAMES.get(value.dtype, value.dtype.name.lower())


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """A value's shape, or None where it, or any dimension of it, is unknown."""
    if value.shape is None or not all(isinstance(dim, int) for dim in value.shape):
        return None
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def constant(value: ir.Value | None) -> Array | None:
    """The array behind an initializer that no caller may replace, or behind a `Constant` node; else None."""
    if value is None or value.is_graph_input():
        return None
    if value.const_value is not None:
        return np.asarray(value.const_value.numpy())
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and producer.domain == "":
        tensor = ir.convenience.get_const_tensor(value)
        return None if tensor is None else np.asarray(tensor.numpy())
    return None


def is_constant(value: ir.Value | None) -> bool:
    """Whether `constant` would give an array; reads none."""
    if value is None or value.is_graph_input():
        return False
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element is, or None."""
    if value is None or not is_constant(value):
        return None
    shape = static_shape(value)
    if shape is not None and int(np.prod(shape, dtype=np.int64)) != 1:
        return None
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def elements(value: ir.Value) -> int | None:
    """How many elements a value has, or None where its shape is unknown."""
    shape = static_shape(value)
    return None if shape is None else int(np.prod(shape, dtype=np.int64))


def is_fused(node: ir.Node) -> bool:
    """Whether a node is one of a plugin of ours."""
    in_domain = node.domain == NAMESPACE or node.domain.startswith(NAMESPACE + ".")
    return in_domain and node.op_type in plugins()


def fused_nodes(model: ir.Model) -> list[ir.Node]:
    """The fused nodes of the main graph, in its order."""
    return [node for node in model.graph if is_fused(node)]


def plugin_inputs(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of a fused node by the plugin's names for them: `a`, `b`, `bias`, …"""
    given = zip(find_plugin(node.op_type).inputs, node.inputs, strict=True)
    return {name: value for name, value in given if value is not None}


def plugin_settings(node: ir.Node) -> dict[str, Any]:
    """The plugin's attributes of a fused node: ints, floats and texts."""
    return {name: attribute.value for name, attribute in node.attributes.items() if name not in _MARKS}


def op_of(node: ir.Node) -> str:
    """The op whose plugin a fused node is: `gemm`, `conv2d`, `attention`, `rmsnorm`."""
    return find_plugin(node.op_type).operation.kernel.name


def make_fused(
    op: str,
    inputs: Mapping[str, ir.Value],
    settings: Mapping[str, Any],
    *,
    name: str,
    outputs: Iterable[ir.Value] | None = None,
) -> ir.Node:
    """A fused node of an op: with these inputs, by the plugin's names for them, and these of its attributes, the others
    at their defaults.

    Raises:
        UsageError: no plugin takes these inputs or attributes.
    """
    variants = [plugin for plugin in plugins().values() if plugin.operation.kernel.name == op]
    required = variants[0].operation.required
    operator = plugin_name(op, *(key for key in inputs if key not in required))
    ordered = [inputs[key] for key in find_plugin(operator).inputs]
    attributes = {**plugin_attributes(operator, **settings), **_MARKS}
    return ir.node(operator, ordered, attributes, domain=NAMESPACE, name=name, outputs=list(outputs or ()) or None)


@dataclass(slots=True)
class Names:
    """Names that are taken. A name that many ask for is told apart by a number, which goes on where it stood: to count
    from the start each time would be quadratic."""

    taken: set[str] = field(default_factory=set)
    _counts: dict[str, int] = field(default_factory=dict)

    def free(self, base: str) -> str:
        """A name that is free, and now taken: `base`, or `base_2`, `base_3`, …"""
        name, count = base, self._counts.get(base, 1)
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self._counts[base] = count
        self.taken.add(name)
        return name


def unique_names(model: ir.Model) -> None:
    """Gives every node a name of its own, and leaves those that have one: names are how layers are spoken of."""
    names = Names()
    for node in model.graph:
        node.name = names.free(node.name or "_".join([node.op_type, *(str(value.name) for value in node.outputs[:1])]))


def known_behind(value: ir.Value, known: Collection[str | None]) -> tuple[ir.Value | None, list[ir.Node]]:
    """The first value with a known name from a value on, through moves, casts and steps that alone read the one before,
    and those nodes; None if there is none. Of a convolution in one dimension, or a product whose activation came behind
    a transpose, only that has a name that the model had before it was fused."""
    passed: list[ir.Node] = []
    while value.name not in known:
        uses = value.uses()
        if len(uses) != 1 or value.is_graph_output():
            return None, []
        ((user, index),) = uses
        if user.domain != "" or user.op_type not in _MOVES or index != 0 or len(user.outputs) != 1:
            return None, []
        passed.append(user)
        value = user.outputs[0]
    return value, passed


def plugin_tensors(node: ir.Node) -> dict[str, Tensor]:
    """The inputs of a fused node as its plugin sees them.

    Raises:
        ModelError: the shape of one is unknown.
    """
    tensors = {}
    for name, value in plugin_inputs(node).items():
        shape = static_shape(value)
        if shape is None:
            raise ModelError(f"node {node.name!r}: the shape of its input {value.name!r}, {value.shape}, is not known")
        tensors[name] = Tensor(name, shape, dtype_name(value))
    return tensors


def infer_outputs(node: ir.Node) -> None:
    """Sets data type and shape of what a fused node gives.

    Raises:
        ModelError: the shape of an input is unknown.
        ProblemError, UnsupportedError: the op can't do this.
    """
    operation = find_plugin(node.op_type).operation
    for value, tensor in zip(
        node.outputs, operation.outputs(plugin_tensors(node), plugin_settings(node)), strict=False
    ):
        value.dtype = DTYPES[tensor.dtype]
        value.shape = ir.Shape(tensor.dims)  # type: ignore[arg-type]


def copy_of(model: ir.Model) -> ir.Model:
    """A model to change: `clone` shares constants, which is wanted, and types of values, which is not."""
    copied = model.clone()
    made = (value for node in copied.graph.all_nodes() for value in node.outputs)
    for value in (*copied.graph.inputs, *copied.graph.initializers.values(), *made):
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(value.type.dtype)
    return copied

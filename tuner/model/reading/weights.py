"""The tensors of an ONNX file: checked, and taken out of the protobuf message.

What onnx's C++ code is given (checker, inliner, version converter, shape inference) is serialised each time, so it gets
the model without its weights: in their place are graph inputs of the same names, types and shapes. The weights become
arrays of their own, mapped from their file or copied once, that can be let go one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, TensorProto

from tilewright.tuner.model.graph import Array
from tilewright.tuner.model.messages import quoted
from tilewright.tuner.model.reading.external import ExternalFiles
from tilewright.tuning_db.errors import ModelError

SMALL = 4096
"""Bytes up to which a tensor stays in the message: shape inference needs the values of axes, shapes and scales."""

_CHUNK = 1 << 20  # elements looked at at a time
Weights = dict[str, ir.TensorProtocol]


def take_weights(model: onnx.ModelProto, files: ExternalFiles) -> tuple[onnx.ModelProto, Weights]:
    """Moves the main graph's tensors of more than `SMALL` bytes, and all external ones, out of a message.

    `Constant` nodes with such tensors become initializers; initializers that are inputs too (as IR versions below 4
    have them) only initializers. All tensors, those in nodes, subgraphs and functions as well, are checked.

    Returns:
        The model without them, and the tensors by name. In the model each is a graph input behind the true ones.
        `model` is left in no state to use.

    Raises:
        ModelError: a tensor without a name, of a name that another has, sparse, of strings, with too little or too much
            data for its dims, external where that can't be read, or with NaN or infinities (see `check_finite`).
    """
    graph = model.graph
    for inner in _graphs(model):
        if inner.sparse_initializer:
            raise ModelError(
                f"tensor {quoted(inner.sparse_initializer[0].values.name)} is sparse: store it as a dense initializer"
            )
    initial = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initial]
    kept_tensors: list[TensorProto] = []
    kept_nodes: list[onnx.NodeProto] = []
    taken: Weights = {}
    stand_ins: list[onnx.ValueInfoProto] = []

    def take(tensor: TensorProto, name: str) -> None:
        taken[name] = _loaded(tensor, name, files)
        shape = [int(dim) for dim in tensor.dims]
        stand_ins.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, shape))

    seen: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            raise ModelError("an initializer of the model has no name")
        if tensor.name in seen:
            raise ModelError(f"two initializers are called {quoted(tensor.name)}")
        seen.add(tensor.name)
        if _size(tensor, tensor.name) > SMALL or _is_external(tensor):
            take(tensor, tensor.name)
        else:
            _check_small(tensor, tensor.name)
            kept_tensors.append(tensor)
    for node in graph.node:
        held = _constant_tensor(node)
        if held is not None and (_size(held, node.output[0]) > SMALL or _is_external(held)):
            if node.output[0] in seen:
                raise ModelError(f"two values are called {quoted(node.output[0])}")
            seen.add(node.output[0])
            take(held, node.output[0])
        else:
            kept_nodes.append(node)
            for tensor, name in _tensors_of(node):
                _check_small(tensor, name)
    for function in model.functions:
        for node in function.node:
            for tensor, name in _tensors_of(node):
                _check_small(tensor, name)
    # By way of lists of copies: what a field is cleared of is gone.
    rest = onnx.GraphProto(node=kept_nodes, initializer=kept_tensors, input=[*inputs, *stand_ins])
    for field in ("node", "initializer", "input"):
        graph.ClearField(field)
        getattr(graph, field).extend(getattr(rest, field))
    # A message keeps the memory of what it was cleared of, so the caller gets another.
    light = onnx.ModelProto()
    light.ParseFromString(model.SerializeToString())
    return light, taken


def put_back(model: ir.Model, weights: Weights) -> None:
    """Makes initializers of the inputs that stand in for `weights`."""
    graph = model.graph
    inputs = list(graph.inputs)
    graph.inputs.clear()
    graph.inputs.extend(value for value in inputs if value.name not in weights)
    for value in inputs:
        if value.name in weights:
            value.const_value = weights[value.name]
            graph.register_initializer(value)


def check_finite(name: str, array: Array) -> None:
    """Refuses a tensor with NaN or infinities.

    Infinities are let through where they mask or bound something: in a tensor of one element, and -inf among zeros.

    Raises:
        ModelError: with the tensor's name and how many elements are NaN or infinite.
    """
    if array.dtype.kind in "iubc":
        return
    try:
        ml_dtypes.finfo(array.dtype)
    except ValueError:
        return  # 4-bit integers and the like
    flat = array.reshape(-1)
    nan = infinite = 0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        if not np.isfinite(part).all():
            nan += int(np.count_nonzero(np.isnan(part)))
            infinite += int(np.count_nonzero(np.isinf(part)))
    if not nan and (not infinite or flat.size == 1 or _is_mask(flat)):
        return
    counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (infinite, "infinities")) if count]
    raise ModelError(
        f"tensor {quoted(name)} has {' and '.join(counts)} among its {flat.size} elements: "
        f"export the model again from weights that are finite"
    )


def _is_mask(flat: Array) -> bool:
    """Whether every element is 0 or -inf, and one is 0."""
    return bool(np.any(flat == 0)) and bool(np.all((flat == 0) | (np.isinf(flat) & (flat < 0))))


def _loaded(tensor: TensorProto, name: str, files: ExternalFiles) -> ir.TensorProtocol:
    """The tensor with data of its own, or a view of the mapped file."""
    dtype = ir.DataType(tensor.data_type)
    shape = tuple(int(dim) for dim in tensor.dims)
    content: Array | None = None
    if _is_external(tensor):
        content = files.bytes_of(tensor, _size(tensor, name))
    elif tensor.HasField("raw_data"):
        content = np.frombuffer(tensor.raw_data, np.uint8)
        _compare(tensor, name, len(content), _size(tensor, name), "bytes")
    if content is not None and dtype.bitwidth >= 8:
        array = content.view(dtype.numpy().newbyteorder("<")).reshape(shape)
    elif content is not None:
        packed = TensorProto(data_type=tensor.data_type, dims=shape, raw_data=content.tobytes())
        array = onnx.numpy_helper.to_array(packed)
    else:
        _check_data(tensor, name)
        if tensor.data_type == TensorProto.FLOAT:
            # Element by element: onnx's own conversion makes a list of Python floats first, ten times the size.
            array = np.fromiter(tensor.float_data, np.float32, count=math.prod(shape)).reshape(shape)
        else:
            array = np.asarray(onnx.numpy_helper.to_array(tensor))
    check_finite(name, array)
    return ir.Tensor(array, dtype=dtype, name=name)


def _check_small(tensor: TensorProto, name: str) -> None:
    """A tensor that stays in the message: its data is there, and finite.

    Raises:
        ModelError: it isn't.
    """
    if _is_external(tensor):
        raise ModelError(f"tensor {quoted(name)}, of a subgraph, function or attribute, is external: store it inside")
    _size(tensor, name)
    _check_data(tensor, name)
    check_finite(name, np.asarray(onnx.numpy_helper.to_array(tensor)))


def _size(tensor: TensorProto, name: str) -> int:
    """The bytes that type and dims ask for.

    Raises:
        ModelError: there is no such type, or a negative dim.
    """
    what = f"tensor {quoted(name)}"
    if tensor.HasField("segment"):
        raise ModelError(f"{what} is stored in segments, which nothing reads: store it whole")
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(f"{what} holds strings: only tensors of numbers are supported")
    try:
        dtype = ir.DataType(tensor.data_type)
        bits = dtype.bitwidth
    except (ValueError, TypeError):
        raise ModelError(f"{what} has the unknown data type {tensor.data_type}") from None
    if dtype == ir.DataType.UNDEFINED:
        raise ModelError(f"{what} has no data type")
    if any(dim < 0 for dim in tensor.dims):
        raise ModelError(f"{what} has a negative dimension: {list(tensor.dims)[:8]}")
    return -(-math.prod(int(dim) for dim in tensor.dims) * bits // 8)


def _check_data(tensor: TensorProto, name: str) -> None:
    """Whether the data in the message is as much as the dims say.

    Raises:
        ModelError: it isn't.
    """
    if tensor.HasField("raw_data"):
        _compare(tensor, name, len(tensor.raw_data), _size(tensor, name), "bytes")
        return
    bits = ir.DataType(tensor.data_type).bitwidth
    elements = math.prod(int(dim) for dim in tensor.dims)
    pairs = 2 if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128) else 1
    needed = elements * pairs if bits >= 8 else -(-elements * bits // 8)
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    _compare(tensor, name, len(getattr(tensor, field)), needed, "numbers")


def _compare(tensor: TensorProto, name: str, held: int, needed: int, unit: str) -> None:
    if held != needed:
        raise ModelError(
            f"tensor {quoted(name)} holds {held} {unit}, but its dims {list(tensor.dims)[:8]} need {needed}: "
            f"the file is damaged"
        )


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _constant_tensor(node: onnx.NodeProto) -> TensorProto | None:
    if node.op_type == "Constant" and node.domain == "" and len(node.output) == 1 and len(node.attribute) == 1:
        attribute = node.attribute[0]
        if attribute.name == "value" and attribute.type == AttributeProto.TENSOR:
            tensor: TensorProto = attribute.t
            return tensor
    return None


def _tensors_of(node: onnx.NodeProto) -> Iterator[tuple[TensorProto, str]]:
    """The tensors in a node's attributes and subgraphs, with a name for each."""
    for attribute in node.attribute:
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise ModelError(f"node {quoted(node.name or node.op_type)} has a sparse tensor: store it as a dense one")
        held = [attribute.t] if attribute.HasField("t") else []
        for tensor in (*held, *attribute.tensors):
            yield tensor, tensor.name or (node.output[0] if node.output else node.name)
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for tensor in graph.initializer:
                yield tensor, tensor.name
            for inner in graph.node:
                yield from _tensors_of(inner)


def _graphs(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every graph inside one. Protobuf's parser has bounded how deep they nest."""

    def inside(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
        for node in nodes:
            for attribute in node.attribute:
                for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                    yield graph
                    yield from inside(iter(graph.node))

    yield model.graph
    yield from inside(iter(model.graph.node))
    for function in model.functions:
        yield from inside(iter(function.node))

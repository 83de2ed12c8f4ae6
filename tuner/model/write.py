"""Writing a model: `write_model`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from onnx import TensorProto

from tilewright.tuner.model.messages import fault
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import ModelError

LARGEST_FILE = 2**31 - 2**26
"""Bytes of weights that go into the file itself. Protobuf reads no more than 2 GiB; 64 MiB of that are for all else."""

_SEPARATE = 1024  # bytes from which a weight is written by itself
_ALIGNMENT = 4096  # of weights in external data: they can be mapped
_STUB = "weights"
_DIGITS = 16  # of the hash in the name of a data file
DATA_FILE = rf".+\.[0-9a-f]{{{_DIGITS}}}\.data"
"""What names of data files are like."""


# Numbers of fields (onnx.proto), as tags of what has a length: number * 8 + 2.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = b"\x3a", b"\x2a", b"\x4a"


def write_model(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """Writes the model to an ONNX file, whole or not at all; equal models give equal bytes.

    Weights of more than `LARGEST_FILE` bytes in all go to `<stem>.<hash of them>.data` beside it, which is put in place
    first: until the model's file is replaced, the one before has its own data still, which is then left lying. They
    are written one after another, so that no second copy of all is ever in memory. The model stays as it is.

    Returns:
        The files: the model's, and that of its data if there is one.

    Raises:
        UsageError: the folder isn't there or can't be written, or `path` is a folder.
        ModelError: a weight without data, or all that isn't weights is larger than protobuf allows.
    """
    for value in model.graph.initializers.values():
        if value.const_value is None:
            raise ModelError(f"initializer {value.name} has no data")
    weights = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= _SEPARATE
    }
    message = _without(model, weights)
    if sum(tensor.nbytes for tensor in weights.values()) <= LARGEST_FILE:
        with whole_file(path) as stream:
            _write_inside(message, weights, stream)
        return (path,)
    with whole_file(path) as stream:
        digest = hashlib.sha256()
        for tensor in weights.values():
            digest.update(tensor.tobytes())
        data_path = path.with_name(f"{path.stem}.{digest.hexdigest()[:_DIGITS]}.data")
        with whole_file(data_path) as data:
            _write_outside(message, weights, data, data_path.name)
        stream.write(message.SerializeToString(deterministic=True))
    return path, data_path


def _without(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The model's message, with a tensor without data for each of `weights`."""
    initializers = model.graph.initializers
    try:
        for name, tensor in weights.items():
            # Of a stub only type, dims and this place are serialised: nothing is opened.
            initializers[name].const_value = ir.ExternalTensor(
                _STUB, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
        message = ir.to_proto(model)
    except Exception as error:  # noqa: BLE001 - whatever a value of a wrong kind makes the library raise
        raise ModelError(f"the model can't be serialised: {fault(error)}") from None
    finally:
        for name, tensor in weights.items():
            initializers[name].const_value = tensor
    for tensor in message.graph.initializer:
        if tensor.name in weights:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return message


def _write_inside(message: onnx.ModelProto, weights: dict[str, ir.TensorProtocol], stream: BinaryIO) -> None:
    """Writes message and weights as one protobuf message, without ever having it in memory.

    The graph is the model's last field, and the weights, of which each is one of the graph's repeated field, its last.
    """
    heads = {tensor.name: tensor.SerializeToString(deterministic=True) for tensor in message.graph.initializer}
    kept = [tensor for tensor in message.graph.initializer if tensor.name not in weights]
    graph = onnx.GraphProto()
    graph.CopyFrom(message.graph)
    graph.ClearField("initializer")
    graph.initializer.extend(kept)
    message.ClearField("graph")
    body = graph.SerializeToString(deterministic=True)
    pieces = []
    for name, tensor in weights.items():
        head = heads[name] + _TENSOR_RAW_DATA + _varint(tensor.nbytes)
        pieces.append((_GRAPH_INITIALIZER + _varint(len(head) + tensor.nbytes) + head, tensor))
    length = len(body) + sum(len(head) + tensor.nbytes for head, tensor in pieces)
    stream.write(message.SerializeToString(deterministic=True))
    stream.write(_MODEL_GRAPH + _varint(length) + body)
    for head, tensor in pieces:
        stream.write(head)
        _write_data(tensor, stream)


def _write_outside(message: onnx.ModelProto, weights: dict[str, ir.TensorProtocol], data: BinaryIO, name: str) -> None:
    """Writes the weights to `data` and their places there into the message."""
    place = 0
    for tensor in message.graph.initializer:
        weight = weights.get(tensor.name)
        if weight is None:
            continue
        padding = -place % _ALIGNMENT
        data.write(bytes(padding))
        place += padding
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", str(place)), ("length", str(weight.nbytes))):
            tensor.external_data.add(key=key, value=value)
        _write_data(weight, data)
        place += weight.nbytes


def _write_data(tensor: ir.TensorProtocol, stream: BinaryIO) -> None:
    before = stream.tell()
    stream.write(tensor.tobytes())
    if stream.tell() - before != tensor.nbytes:
        raise ModelError(f"weight {tensor.name} has {stream.tell() - before} bytes of data, not {tensor.nbytes}")


def _varint(number: int) -> bytes:
    """A number in protobuf's base 128, lowest digit first (protobuf.dev/programming-guides/encoding)."""
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    digits.append(number)
    return bytes(digits)

"""Shapes of a model: what the command line says of them, bound to the inputs, and inferred for every other value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import onnx
import onnx.helper
import onnx_ir as ir

from tilewright.tuner.model.folding.constants import Budget, fold_constants
from tilewright.tuner.model.graph import DTYPES, static_shape
from tilewright.tuner.model.messages import fault, listed, quoted
from tilewright.tuning_db.errors import ModelError, UsageError

LARGEST_DIM = 2**31 - 1
"""The kernels' sizes are 32-bit integers."""

LARGEST_VALUE = 1 << 36
"""Bytes of one value, 64 GiB: what is larger is a damaged shape, or nothing that one GPU can hold."""

_FOLDED_FOR_SHAPES = 1 << 20  # bytes: shapes, masks and positions, no weights

_Shape = tuple[int, ...]

_COMPARED = {*DTYPES.values(), ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64}
"""Types of outputs of which ONNX Runtime gives an array."""


def parse_shapes(texts: Sequence[str]) -> tuple[dict[str, _Shape], dict[str, int]]:
    """What `--shape` says, each `input:1x3x224x224` or `dimension=8`.

    Returns:
        The shapes by input and the sizes by name of a dimension, as `read_model` takes them.

    Raises:
        UsageError: a text is neither, or one contradicts another.
    """
    shapes: dict[str, _Shape] = {}
    dims: dict[str, int] = {}
    for text in texts:
        # An input's name may have colons and equal signs in it, a shape has none.
        name, colon, sizes = text.rpartition(":")
        if colon and name and sizes and set(sizes) <= set("0123456789xX"):
            shape = tuple(_size(part, text) for part in sizes.lower().split("x"))
            if shapes.setdefault(name, shape) != shape:
                both = f"{_written(shapes[name])} and {_written(shape)}"
                raise UsageError(f"--shape gives input {quoted(name)} twice: {both}")
            continue
        name, sign, number = text.rpartition("=")
        if not (sign and name):
            raise UsageError(f"--shape {quoted(text)} is neither input:1x3x224x224 nor dimension=8")
        size = _size(number, text)
        if dims.setdefault(name, size) != size:
            raise UsageError(f"--shape gives dimension {quoted(name)} twice: {dims[name]}, {size}")
    return shapes, dims


def bind_shapes(
    model: onnx.ModelProto, inputs: Sequence[str], shapes: Mapping[str, _Shape], dims: Mapping[str, int]
) -> None:
    """Gives every dimension of the inputs its size, and forgets those of all other values that can be inferred.

    `inputs` are the true ones, without weights that stand among them. A name that an input's shape gives a size to has
    that size in the other inputs too.

    Raises:
        ModelError: an input that is no tensor of numbers, a dimension without a size, or with two; `shapes` or `dims`
            of what the model doesn't have.
    """
    values = {value.name: value for value in model.graph.input if value.name in set(inputs)}
    for name, value in values.items():
        if value.type.WhichOneof("value") != "tensor_type":
            kind = value.type.WhichOneof("value") or "untyped value"
            raise ModelError(f"input {quoted(name)} is a {kind}: only tensors are supported")
        if value.type.tensor_type.elem_type in (onnx.TensorProto.STRING, onnx.TensorProto.UNDEFINED):
            raise ModelError(f"input {quoted(name)} is of strings or of no type: only tensors of numbers are supported")
    unknown = [name for name in shapes if name not in values]
    if unknown:
        raise ModelError(f"--shape names {listed(unknown)}: the model's inputs are {listed(list(values))}")
    sizes = dict(dims)
    for name, shape in shapes.items():
        _take_names(name, values[name].type.tensor_type, shape, sizes)
    named = {dim.dim_param for value in values.values() for dim in value.type.tensor_type.shape.dim if dim.dim_param}
    unknown = [name for name in dims if name not in named]
    if unknown:
        known = f"those of the model are {listed(sorted(named))}" if named else "the model has none without a size"
        raise ModelError(f"--shape gives a size to the dimension {listed(unknown)}: {known}")
    for name, value in values.items():
        _bind(name, value.type.tensor_type, shapes.get(name), sizes)
    _forget_shapes(model)


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with onnx's types and shapes, in its strict mode.

    Without its data propagation, which makes an object of every element of any vector, weights too: 100 GB of a
    vector that a `ConstantOfShape` says has 2^31. Shapes that are calculated become known by constant folding.

    Raises:
        ModelError: an operator's inputs don't go together, or contradict a shape that the file gives.
    """
    try:
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except Exception as error:  # noqa: BLE001 - the C++ code raises several, none of them part of its interface
        raise ModelError(f"the model's shapes don't go together: {fault(error)}") from None


def unknown_shapes(model: ir.Model) -> list[str]:
    """The values of the main graph whose shape or type isn't known."""
    values = [output for node in model.graph for output in node.outputs if output.name]
    return [str(value.name) for value in values if static_shape(value) is None or value.dtype is None]


def fold_for_shapes(model: ir.Model) -> None:
    """Makes shapes known that follow from constants, in place.

    Raises:
        ModelError: a node can't be what it says.
    """
    fold_constants(model, Budget(largest=_FOLDED_FOR_SHAPES, most=_FOLDED_FOR_SHAPES * 64))


def check_outputs(model: ir.Model) -> None:
    """Refuses outputs that can't be compared with another model's.

    Raises:
        ModelError: there is none, or one is a sequence or optional, or of texts or of a type that no array has.
    """
    if not model.graph.outputs:
        raise ModelError("the model has no outputs: it computes nothing, name some when it is exported")
    for value in model.graph.outputs:
        name = quoted(str(value.name))
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            kind = type(value.type).__name__.removesuffix("Type").lower()
            raise ModelError(
                f"output {name} is of the kind {kind}: only tensors are supported, take it out of the outputs"
            )
        if value.dtype is not None and value.dtype not in _COMPARED:
            raise ModelError(
                f"output {name} is {value.dtype.name.lower()}: only tensors of truth values, integers and floats from "
                f"8 bits on are supported, cast it or take it out of the outputs"
            )


def check_sizes(model: ir.Model) -> None:
    """Refuses values of the main graph that no memory holds.

    Raises:
        ModelError: one has a negative dimension, one of more than `LARGEST_DIM`, or more than `LARGEST_VALUE` bytes.
    """
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        shape = static_shape(value)
        if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
            continue
        size = math.prod(shape) * value.dtype.bitwidth // 8
        if any(not 0 <= dim <= LARGEST_DIM for dim in shape) or size > LARGEST_VALUE:
            raise ModelError(
                f"value {quoted(str(value.name))} would be {_written(shape)}, {size:.3g} bytes: dimensions may be up "
                f"to {LARGEST_DIM} and a value {LARGEST_VALUE} bytes"
            )


def _forget_shapes(model: onnx.ModelProto) -> None:
    """Clears what the file says of other values' shapes: it may hold for the sizes at export alone.

    What operators beyond onnx's give stays, for nothing else says it; but for dimensions with a name.
    """
    local = {(function.domain, function.name) for function in model.functions}
    foreign = {
        name
        for node in model.graph.node
        if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in local
        for name in node.output
    }
    kept = [value for value in model.graph.value_info if value.name in foreign]
    for value in (*kept, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            if value.name not in foreign or dim.dim_param or (dim.HasField("dim_value") and dim.dim_value < 0):
                dim.Clear()
    copies = onnx.GraphProto(value_info=kept)
    model.graph.ClearField("value_info")
    model.graph.value_info.extend(copies.value_info)
    # An output may be an input or a weight as it is: then it is the same value, and has that one's shape.
    bound = {value.name: value.type for value in model.graph.input}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for output in model.graph.output:
        if output.name in bound:
            output.type.CopyFrom(bound[output.name])
        elif output.name in weights:
            tensor = weights[output.name]
            output.CopyFrom(onnx.helper.make_tensor_value_info(output.name, tensor.data_type, list(tensor.dims)))


def _take_names(name: str, tensor: onnx.TypeProto.Tensor, shape: _Shape, sizes: dict[str, int]) -> None:
    """Adds what a given shape says of named dimensions to `sizes`."""
    if tensor.HasField("shape") and len(tensor.shape.dim) != len(shape):
        raise ModelError(
            f"--shape gives input {quoted(name)} {len(shape)} dimensions, {_written(shape)}: it has "
            f"{len(tensor.shape.dim)}, {_described(tensor)}"
        )
    for dim, size in zip(tensor.shape.dim, shape, strict=False):
        if dim.dim_param and sizes.setdefault(dim.dim_param, size) != size:
            raise ModelError(
                f"dimension {quoted(dim.dim_param)} would be {sizes[dim.dim_param]}, and {size} in input {quoted(name)}"
            )


def _bind(name: str, tensor: onnx.TypeProto.Tensor, shape: _Shape | None, sizes: Mapping[str, int]) -> None:
    if not tensor.HasField("shape"):
        if shape is None:
            raise ModelError(f"input {quoted(name)} has no shape: give it one with --shape {_hint(name)}:1x3x224x224")
        tensor.shape.CopyFrom(onnx.TensorShapeProto())
        for size in shape:
            tensor.shape.dim.add().dim_value = size
    described = _described(tensor)
    for place, dim in enumerate(tensor.shape.dim):
        known = dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None
        given = shape[place] if shape is not None else sizes.get(dim.dim_param) if dim.dim_param else None
        if known is not None and given not in (None, known):
            raise ModelError(
                f"--shape gives dimension {place} of input {quoted(name)} the size {given}: the model fixes it at "
                f"{known}, in {described}"
            )
        bound = known if known is not None else given
        if bound is None:
            what = f"dimension {quoted(dim.dim_param)}" if dim.dim_param else f"dimension {place}"
            by_name = f"{_hint(dim.dim_param)}=8 or --shape " if dim.dim_param else ""
            example = "x".join(str(other.dim_value) if other.dim_value > 0 else "8" for other in tensor.shape.dim)
            raise ModelError(
                f"{what} of input {quoted(name)}, {described}, has no size: give one, as with --shape "
                f"{by_name}{_hint(name)}:{example}"
            )
        if bound > LARGEST_DIM:
            raise ModelError(f"dimension {place} of input {quoted(name)} is {bound}: it may be up to {LARGEST_DIM}")
        dim.Clear()
        dim.dim_value = bound


def _size(text: str, whole: str) -> int:
    # Nine digits are below LARGEST_DIM.
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and int(text) > 0):
        raise UsageError(f"--shape {quoted(whole)} has the size {quoted(text)}: it must be from 1 to 999999999")
    return int(text)


def _written(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _described(tensor: onnx.TypeProto.Tensor) -> str:
    dims = [
        dim.dim_param if dim.dim_param else str(dim.dim_value) if dim.HasField("dim_value") else "?"
        for dim in tensor.shape.dim
    ]
    return quoted("[" + ", ".join(dims) + "]")[1:-1]


def _hint(name: str) -> str:
    """A name as part of an example of a command: quoted where a shell or a terminal would make something else of it."""
    return name if name.isprintable() and not set(name) & set(" '\"\\$`;|&<>()*?!#~") else quoted(name)

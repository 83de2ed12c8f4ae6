"""Normalisation, with what is added before it. Sums and means are in fp32, as ONNX Runtime has them."""

from __future__ import annotations

import numpy as np
import onnx

from tilewright.tuner.model.reading.contrib.writer import UnsupportedError, Writer

_FLOAT = int(onnx.TensorProto.FLOAT)
_SMALL = 1e-12  # epsilon of most, where none is given


def layer_norm(write: Writer) -> list[str | None]:
    """`LayerNormalization` of models whose opset is below 17, which ONNX Runtime's optimiser makes."""
    x, scale, bias = write.input(0), write.input(1), write.optional(2)
    return _layer_norm(write, x, scale, bias, write.attribute("axis", -1), write.attribute("epsilon", 1e-5))


def skip_layer_norm(write: Writer) -> list[str | None]:
    """`SkipLayerNormalization`: the layer norm of input + skip + bias, and that sum."""
    total = _sum(write, write.optional(4))
    made = _layer_norm(write, total, write.input(2), write.optional(3), -1, write.attribute("epsilon", _SMALL))
    return [*made, *[None] * (3 - len(made)), total]


def rms_norm(write: Writer) -> list[str | None]:
    """`SimplifiedLayerNormalization`: x / √(mean(x²) + epsilon) · scale over the axes from `axis` on."""
    x, scale = write.input(0), write.input(1)
    if write.rank(x) == 0:
        raise UnsupportedError("its input is a scalar")
    return [_rms_norm(write, x, scale, write.attribute("axis", -1), write.attribute("epsilon", 1e-5))]


def skip_rms_norm(write: Writer) -> list[str | None]:
    """`SkipSimplifiedLayerNormalization`: the RMS norm of input + skip + bias, and that sum."""
    total = _sum(write, write.optional(3))
    normal = _rms_norm(write, total, write.input(2), -1, write.attribute("epsilon", _SMALL))
    return [normal, None, None, total]


def embed_layer_norm(write: Writer) -> list[str | None]:
    """`EmbedLayerNormalization`: the layer norm of a word's, its place's and its segment's vectors, with their sum, and
    how many words of each row the mask lets through."""
    words, segments, mask = write.input(0), write.optional(1), write.optional(7)
    places = write.optional(8)
    if places is None:
        # The first S vectors, the same for every row.
        length = write("Shape", words, start=1, end=2)
        table = write("Slice", write.input(3), write.integers(0), length, write.integers(0))
        placed = write("Unsqueeze", table, write.integers(0))
    else:
        placed = write("Gather", write.input(3), places)
    total = write("Add", write("Gather", write.input(2), words), placed)
    if segments is not None:
        total = write("Add", total, write("Gather", write.input(4), segments))
    epsilon = write.attribute("epsilon", _SMALL)
    normal = write("LayerNormalization", total, write.input(5), write.input(6), axis=-1, epsilon=epsilon)
    counts = None
    if write.wants(1):
        if mask is not None:
            kept = write("Equal", mask, write.array(np.array(1, np.int32)))
            kept = write("Cast", kept, to=int(onnx.TensorProto.INT32))
            counts = write("ReduceSum", kept, write.integers(1), keepdims=0)
        else:
            rows = write("Shape", words, start=0, end=1)
            zero = onnx.numpy_helper.from_array(np.zeros(1, np.int32))
            counts = write("ConstantOfShape", rows, value=zero)
    return [normal, counts, total]


def group_norm(write: Writer) -> list[str | None]:
    """`GroupNorm`: of `groups` of channels, which come last unless `channels_last` is 0; SiLU behind it where
    `activation` is 1."""
    return [_group_norm(write, write.input(0), write.shape(write.input(0)))]


def skip_group_norm(write: Writer) -> list[str | None]:
    """`SkipGroupNorm`: the group norm of input + skip + bias, and that sum."""
    skip, bias = write.input(3), write.optional(4)
    if write.rank(skip) == 2:  # (N, C), the same for every pixel
        places = [1, 2] if write.attribute("channels_last", 1) else [2, 3]
        skip = write("Unsqueeze", skip, write.integers(*places))
    total = write("Add", write.input(0), skip)
    if bias is not None:
        if not write.attribute("channels_last", 1):
            bias = write("Unsqueeze", bias, write.integers(1, 2))
        total = write("Add", total, bias)
    return [_group_norm(write, total, write.shape(write.input(0))), total]


def _group_norm(write: Writer, x: str, shape: tuple[int, ...]) -> str:
    """Of x, whose shape is given, as exporters write it: onnx infers no shapes behind `GroupNormalization`."""
    activation, groups = write.attribute("activation", 0), write.attribute("groups", 0)
    last = write.attribute("channels_last", 1)
    if len(shape) == 4 and last:
        x, shape = write("Transpose", x, perm=[0, 3, 1, 2]), (shape[0], shape[3], shape[1], shape[2])
    if len(shape) != 4 or activation not in (0, 1) or groups < 1 or shape[1] % groups:
        raise UnsupportedError(f"its attributes are activation={activation}, groups={groups}, x is {[*shape]}")
    apart = write("Reshape", x, write.integers(shape[0], groups, -1))
    ones, zeros = (write("CastLike", write.array(np.full(groups, each, np.float32)), x) for each in (1, 0))
    normal = write("InstanceNormalization", apart, ones, zeros, epsilon=write.attribute("epsilon", 1e-5))
    made = write("Reshape", normal, write.integers(*shape))
    for place, operator in ((1, "Mul"), (2, "Add")):
        vector = write("CastLike", write.input(place), x)
        made = write(operator, made, write("Reshape", vector, write.integers(shape[1], 1, 1)))
    if activation:
        made = write("Mul", made, write("Sigmoid", made))
    return str(write("Transpose", made, perm=[0, 2, 3, 1]) if last else made)


def _sum(write: Writer, bias: str | None) -> str:
    total = write("Add", write.input(0), write.input(1))
    return str(write("Add", total, bias) if bias else total)


def _layer_norm(write: Writer, x: str, scale: str, bias: str | None, axis: int, epsilon: float) -> list[str | None]:
    wanted = max([1, *(place + 1 for place in (1, 2) if write.wants(place))])
    made = write("LayerNormalization", x, scale, bias, outputs=wanted, axis=axis, epsilon=epsilon)
    return [made] if wanted == 1 else list(made)


def _rms_norm(write: Writer, x: str, scale: str, axis: int, epsilon: float) -> str:
    if write.wants(1) or write.wants(2):
        raise UnsupportedError("its statistics are used")
    axes = [-1] if axis == -1 else list(range(axis % (rank := write.rank(x)) - rank, 0))
    wide = write("Cast", x, to=_FLOAT)
    mean = write("ReduceMean", write("Mul", wide, wide), write.integers(*axes))
    normal = write("Div", wide, write("Sqrt", write("Add", mean, write.array(np.array(epsilon, np.float32)))))
    return str(write("Mul", write("CastLike", normal, scale), scale))

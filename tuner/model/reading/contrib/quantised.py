"""Operators on quantised tensors (`QLinearConv` and its kin) → QDQ form: steps in front, the operator on floats, and a
step behind it.

That is what they stand for: scale · (integer - zero point) is what an integer means. Where a result lies at the very
middle of two integers, it may become the other one.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.reading.contrib.products import window
from tilewright.tuner.model.reading.contrib.writer import Array, UnsupportedError, Writer


def conv(write: Writer) -> list[str]:
    """`QLinearConv`: of int8 or uint8, with a scale for each output channel or one, and a bias of int32 whose scale is
    that of x times that of w."""
    if write.attribute("channels_last", 0):
        raise UnsupportedError("its channels come last")
    x, w = _number(write, 0), _number(write, 3, axis=0)
    bias = write.optional(8)
    made = write("Conv", x, w, _bias(write, bias, 1, 4) if bias else None, **window(write))
    return [_integers(write, made, 6)]


def matmul(write: Writer) -> list[str]:
    """`QLinearMatMul`: b with a scale for each column, or one."""
    return [_integers(write, write("MatMul", _number(write, 0), _number(write, 3, axis=-1)), 6)]


def gemm(write: Writer) -> list[str]:
    """`QGemm`: alpha · A' @ B' + C, of C in int32 with the scale of A times that of B; floats where no scale of the
    result is given."""
    c, alpha = write.optional(6), write.attribute("alpha", 1.0)
    if c is not None and alpha != 1:
        raise UnsupportedError(f"its alpha is {alpha:g}")
    transposed = {name: write.attribute(name, 0) for name in ("transA", "transB")}
    a, b = _number(write, 0), _number(write, 3, axis=0 if transposed["transB"] else 1)
    made = write("Gemm", a, b, _bias(write, c, 1, 4) if c else None, alpha=alpha, **transposed)
    scale, zero = write.optional(7), write.optional(8)
    if scale is None and zero is None:
        return [made]
    if scale is None or zero is None:
        raise UnsupportedError("its result has a scale or a zero point, and not both")
    return [_integers(write, made, 7)]


def add(write: Writer) -> list[str]:
    """`QLinearAdd`"""
    return [_integers(write, write("Add", _number(write, 0), _number(write, 3)), 6)]


def multiply(write: Writer) -> list[str]:
    """`QLinearMul`"""
    return [_integers(write, write("Mul", _number(write, 0), _number(write, 3)), 6)]


def sigmoid(write: Writer) -> list[str]:
    """`QLinearSigmoid`"""
    return [_integers(write, write("Sigmoid", _number(write, 0)), 3)]


def leaky_relu(write: Writer) -> list[str]:
    """`QLinearLeakyRelu`"""
    alpha = write.attribute("alpha", 0.01)
    return [_integers(write, write("LeakyRelu", _number(write, 0), alpha=alpha), 3)]


def softmax(write: Writer) -> list[str]:
    """`QLinearSoftmax`: over one axis, as from opset 13 on."""
    axis = write.attribute("axis", -1)
    if write.attribute("opset", 13) < 13 and axis not in (-1, write.rank(write.input(0)) - 1):
        raise UnsupportedError(f"it is over all axes from {axis} on")
    return [_integers(write, write("Softmax", _number(write, 0), axis=axis), 3)]


def average_pool(write: Writer) -> list[str]:
    """`QLinearAveragePool`"""
    _channels_first(write)
    kinds = {"auto_pad": str, "ceil_mode": int, "count_include_pad": int, "kernel_shape": list, "pads": list}
    given = {name: write.attribute(name, None, kind) for name, kind in (kinds | {"strides": list}).items()}
    if given["ceil_mode"] and given["count_include_pad"]:
        raise UnsupportedError("it counts what lies beyond its padding (ceil_mode with count_include_pad)")
    return [_integers(write, write("AveragePool", _number(write, 0), **given), 3)]


def global_average_pool(write: Writer) -> list[str]:
    """`QLinearGlobalAveragePool`"""
    _channels_first(write)
    return [_integers(write, write("GlobalAveragePool", _number(write, 0)), 3)]


def concat(write: Writer) -> list[str]:
    """`QLinearConcat`: its inputs are the scale and zero point of the result, then those with theirs."""
    count, odd = divmod(len(write.node.input) - 2, 3)
    if odd or count < 1:
        raise UnsupportedError(f"it has {len(write.node.input)} inputs")
    write.input(1)  # the only one that says of what kind the result is
    parts = [_number(write, 2 + 3 * place) for place in range(count)]
    return [_integers(write, write("Concat", *parts, axis=write.attribute("axis", None, int)), 0)]


def _channels_first(write: Writer) -> None:
    if write.attribute("channels_last", 0):
        raise UnsupportedError("its channels come last")


def _number(write: Writer, place: int, axis: int | None = None) -> str:
    """What an input of integers means, with its scale and zero point behind it; `axis` is that of several scales."""
    integers = write.input(place)
    scale, zero = _step(write, place + 1, write.dtype(integers))
    return str(write("DequantizeLinear", integers, scale, zero, axis=_axis(write, integers, scale, axis)))


def _step(write: Writer, place: int, integers: ir.DataType) -> tuple[str, str]:
    """A scale and a zero point of one shape, as a step wants them: ONNX Runtime takes one with many here."""
    scale, zero = write.input(place), write.optional(place + 1)
    shape = write.shape(scale)
    if zero is None:
        return scale, write.array(np.zeros(shape, integers.numpy()))
    other = write.shape(zero)
    if other == shape:
        return scale, zero
    if math.prod(shape) != 1:
        return scale, write.array(_spread(write.constant(zero), shape))
    if math.prod(other) == 1:
        return scale, write("Reshape", zero, write.integers(*shape))
    return write.array(_spread(write.constant(scale), other)), zero


def _spread(array: Array, shape: tuple[int, ...]) -> Array:
    """One number as many.

    Raises:
        UnsupportedError: it is several.
    """
    if array.size != 1:
        raise UnsupportedError(f"its scale and its zero point have the shapes {[*shape]} and {[*array.shape]}")
    return np.full(shape, array.reshape(()))


def _axis(write: Writer, integers: str, scale: str, axis: int | None) -> int | None:
    """The attribute of a step: none where there is one scale."""
    shape = write.shape(scale)
    if shape in ((), (1,)):
        return None
    if len(shape) != 1 or axis is None:
        raise UnsupportedError(f"its scale {scale!r} has the shape {[*shape]}")
    return axis if axis >= 0 else write.rank(integers) + axis


def _bias(write: Writer, bias: str, x_scale: int, w_scale: int) -> str:
    """A bias of int32 as a number; the places are those of the two scales."""
    scales = [write.constant(write.input(place)).reshape(-1) for place in (x_scale, w_scale)]
    if 0 in map(len, scales):
        raise UnsupportedError("its scales are empty")
    with np.errstate(over="ignore"):
        scale = (scales[0] * scales[1]).astype(np.float32)
    if not np.isfinite(scale).all():
        raise UnsupportedError("the scale of its bias, that of x times that of w, is past fp32")
    several, shape = len(scale) > 1, write.shape(bias)
    if several and shape[-1:] != scale.shape:
        bias = write("Expand", bias, write.integers(*shape[:-1], len(scale)))
    given = write.array(scale if several else scale.reshape(()))
    axis = max(0, len(shape) - 1) if several else None
    return str(write("DequantizeLinear", bias, given, axis=axis))


def _integers(write: Writer, number: str, place: int) -> str:
    """A number as integers, by the scale and the zero point of the result at these inputs."""
    return str(write("QuantizeLinear", number, *_step(write, place, write.dtype(write.input(0)))))

"""Matrix products and convolutions with what is around them: a transpose, a factor, an activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tilewright.tuner.model.reading.contrib.writer import UnsupportedError, Writer


def fused_matmul(write: Writer) -> list[str]:
    """`FusedMatMul`: alpha · A' @ B', each transposed in its last two axes where `transA`, `transB` say so."""
    if write.attribute("transBatchA", 0) or write.attribute("transBatchB", 0):
        raise UnsupportedError("it transposes batch dimensions")
    ranks = [write.rank(write.input(place)) for place in (0, 1)]
    if min(ranks) == 1 and max(ranks) > 1 and (write.attribute("transA", 0) or write.attribute("transB", 0)):
        raise UnsupportedError("it transposes, and one of its operands is a vector: ONNX Runtime has no one rule there")
    a, b = (_transposed(write, write.input(place), f"trans{which}") for place, which in ((0, "A"), (1, "B")))
    product = write("MatMul", a, b)
    alpha = write.attribute("alpha", 1.0)
    return [product if alpha == 1 else write("Mul", product, write.number(alpha, product))]


def fused_gemm(write: Writer) -> list[str]:
    """`FusedGemm`: activation(alpha · A' @ B' + beta · C)."""
    kinds = {"alpha": float, "beta": float, "transA": int, "transB": int}
    given = {name: write.attribute(name, None, kind) for name, kind in kinds.items()}
    product = write("Gemm", write.input(0), write.input(1), write.optional(2), **given)
    names = [f"activation_{name}" for name in ("alpha", "beta", "gamma")]
    parameters = [write.attribute(name, None, float) for name in names]
    return [_activated(write, product, [each for each in parameters if each is not None])]


def fused_conv(write: Writer) -> list[str]:
    """`FusedConv`: activation(Conv(X, W, B) + Z)."""
    made = write("Conv", write.input(0), write.input(1), write.optional(2), **window(write))
    residual = write.optional(3)
    if residual is not None:
        made = write("Add", made, residual)
    return [_activated(write, made, write.attribute("activation_params", []))]


def nhwc_conv(write: Writer) -> list[str]:
    """`NhwcConv`: of X (N, H, W, C) with W (M, kH, kW, C / group)."""
    x, w = (write("Transpose", write.input(place), perm=[0, 3, 1, 2]) for place in (0, 1))
    return [write("Transpose", write("Conv", x, w, write.optional(2), **window(write)), perm=[0, 2, 3, 1])]


def window(write: Writer) -> dict[str, Any]:
    """The attributes of a convolution."""
    kinds = {"auto_pad": str, "dilations": list, "group": int, "kernel_shape": list, "pads": list, "strides": list}
    return {name: write.attribute(name, None, kind) for name, kind in kinds.items()}


def _transposed(write: Writer, name: str, attribute: str) -> str:
    if not write.attribute(attribute, 0):
        return name
    places = list(range(write.rank(name)))
    if len(places) < 2:  # as ONNX Runtime has it
        return name
    return str(write("Transpose", name, perm=[*places[:-2], places[-1], places[-2]]))


def _activated(write: Writer, x: str, parameters: Sequence[float]) -> str:
    """x behind the attribute `activation`, with its parameters in the order of ONNX Runtime."""
    activation = write.attribute("activation", "")
    if not activation:
        return x
    known: dict[str, tuple[int, Callable[..., str]]] = {
        "Relu": (0, lambda: write("Relu", x)),
        "Tanh": (0, lambda: write("Tanh", x)),
        "Sigmoid": (0, lambda: write("Sigmoid", x)),
        "LeakyRelu": (1, lambda alpha: write("LeakyRelu", x, alpha=alpha)),
        "Clip": (2, lambda low, high: write("Clip", x, write.number(low, x), write.number(high, x))),
        "HardSigmoid": (2, lambda alpha, beta: write("HardSigmoid", x, alpha=alpha, beta=beta)),
    }
    if activation not in known:
        raise UnsupportedError(f"its activation is {activation!r}")
    count, made = known[activation]
    if len(parameters) != count or not np.isfinite(parameters).all():
        raise UnsupportedError(f"its activation {activation} has the parameters {[*parameters]}, not {count} numbers")
    return made(*parameters)

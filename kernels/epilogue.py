"""The end of every op: y = activation(alpha · x + bias + residual), in fp32.

`activate` is the one device function all kernels call, `ACTIVATIONS` the float64 reference of each activation. A new
activation is one branch in the first and one line in the second; the conformance tests then cover it everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl

from tilewright.tuning_db.errors import UsageError

Array = np.ndarray[Any, Any]

_erf = np.frompyfunc(math.erf, 1, 1)


def _sigmoid(x: Array) -> Array:
    # exp of a negative number only: no overflow at either end.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    # Hendrycks & Gimpel 2016, arXiv:1606.08415: the tanh form and the exact form.
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(np.float64)),
    "silu": lambda x: x * _sigmoid(x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    # Howard et al. 2019, arXiv:1905.02244: x * relu6(x + 3) / 6.
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
}
"""Every activation by its canonical name, as a float64 reference."""

ALIASES = {"gelu": "gelu_erf", "swish": "silu", "": "none"}


def activation_name(name: str | None) -> str:
    """The canonical name of an activation; None is `none`.

    Raises:
        UsageError: no activation has that name.
    """
    canonical = ALIASES.get(name or "", name or "none")
    if canonical not in ACTIVATIONS:
        raise UsageError(f"unknown activation {name!r}; the names are {', '.join(ACTIVATIONS)}")
    return canonical


@triton.jit
def tanh(x):
    """tanh of an fp32 tile."""
    # Triton's language has no tanh, and libdevice's does not run in the interpreter. 1 - exp(-2|x|) cancels near 0,
    # so a series takes over there: at |x| = 0.25 its first dropped term, 1382/155925·x^11, is 9e-9 of x.
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    s = x * x
    small = x * (1.0 + s * (-0.333333333 + s * (0.133333333 + s * (-0.0539682540 + s * 0.0218694885))))
    return tl.where(tl.abs(x) < 0.25, small, large)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of an fp32 tile."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`ACTIVATIONS[ACTIVATION]` of an fp32 tile."""
    if ACTIVATION == "relu":
        # A comparison, not a maximum: NaN must stay NaN.
        y = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "gelu_tanh":
        y = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "gelu_erf":
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "silu":
        y = x * sigmoid(x)
    elif ACTIVATION == "sigmoid":
        y = sigmoid(x)
    elif ACTIVATION == "tanh":
        y = tanh(x)
    elif ACTIVATION == "hardswish":
        # The gate first: 6·x overflows where x alone does not.
        y = x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666)
    else:
        tl.static_assert(ACTIVATION == "none", "unknown activation")
        y = x
    return y

"""Activations: their names, their float64 references, and the device function that all kernels call.

A name may carry parameters after colons: `leaky_relu:0.1`, `clamp:0:6`. It is one text in problems, records and
constexprs alike. A new activation is one branch in `activate` and one line in `ACTIVATIONS`; the conformance tests then
cover it everywhere.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from tilewright.tuning_db.errors import ProblemError
from tilewright.tuning_db.text import did_you_mean

Array = np.ndarray[Any, Any]

_erf = np.frompyfunc(math.erf, 1, 1)


class Activation(NamedTuple):
    """One activation: its reference in float64, of the array and of its parameters."""

    reference: Callable[..., Array]
    defaults: tuple[float, ...] = ()  # of its parameters
    required: int = 0  # how many parameters come first that have no default


def _sigmoid(x: Array) -> Array:
    # exp of a negative number only: no overflow at either end.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


ACTIVATIONS: dict[str, Activation] = {
    "none": Activation(lambda x: x),
    "relu": Activation(lambda x: np.maximum(x, 0)),
    # So et al. 2021, arXiv:2109.08668 ("Primer"): relu squared.
    "relu2": Activation(lambda x: np.maximum(x, 0) ** 2),
    "clamp": Activation(lambda x, low, high: np.minimum(np.maximum(x, low), high), required=2),
    "leaky_relu": Activation(lambda x, slope: np.where(x < 0, slope * x, x), (0.01,)),
    # Hendrycks & Gimpel 2016, arXiv:1606.08415: the tanh form, the exact form (erf), and the one by a sigmoid.
    "gelu_tanh": Activation(lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    "gelu_erf": Activation(lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)).astype(np.float64))),
    "quick_gelu": Activation(lambda x: x * _sigmoid(1.702 * x)),
    "silu": Activation(lambda x: x * _sigmoid(x)),
    "sigmoid": Activation(_sigmoid),
    "tanh": Activation(np.tanh),
    "softplus": Activation(lambda x: np.logaddexp(x, 0)),
    # Howard et al. 2019, arXiv:1905.02244: x * relu6(x + 3) / 6.
    "hardswish": Activation(lambda x: x * np.clip(x + 3, 0, 6) / 6),
}
"""Every activation by the first word of its name."""

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
"""A parameter, in plain digits: Python's `float` takes 1_0 for 10 as well, spaces, and digits of other scripts."""

ALIASES = {"gelu": "gelu_erf", "swish": "silu", "relu6": "clamp:0:6"}


_OF_A_GATE = {"glu": "sigmoid", "reglu": "relu", "geglu": "gelu", "swiglu": "silu"}
"""Gated units of Shazeer 2020, arXiv:2002.05202, which are no activations: the activation of their gate."""


def activation_name(name: str | None) -> str:
    """The canonical name of an activation, its parameters written out; None is `none`.

    Raises:
        ProblemError: no activation has that name, or its parameters are missing, too many or no finite numbers in plain
            digits.
    """
    if name is not None and not isinstance(name, str):
        raise ProblemError(f"activation={name!r} must be the name of one, such as 'gelu', or None")
    if name == "":  # as one whose text was lost on the way is read
        raise ProblemError("activation='' is no name: leave it out, or say 'none'")
    return _canonical("none" if name is None else name)


@functools.cache
def _canonical(name: str) -> str:
    word, *given = ALIASES.get(name, name).split(":")
    if word in _OF_A_GATE:
        raise ProblemError(
            f"activation {name!r} is {_OF_A_GATE[word]} of a gate: where an op takes `gated`, "
            f"activation={_OF_A_GATE[word]!r} with gated='halves' or 'interleaved'"
        )
    if word not in ACTIVATIONS:
        known = (*ACTIVATIONS, *ALIASES)
        near = did_you_mean(word.lower(), known)
        raise ProblemError(f"unknown activation {name!r}{near} (activations: {', '.join(known)})")
    _, defaults, required = ACTIVATIONS[word]
    most = required + len(defaults)
    if not required <= len(given) <= most:
        raise ProblemError(f"activation {name!r} has {len(given)} parameters; {word} takes {_range(required, most)}")
    values = [float(text) if _NUMBER.fullmatch(text) else math.nan for text in given]
    with np.errstate(over="ignore"):
        kept = np.array(values, np.float32)  # as kernels have them: the largest of fp32 is written in several ways
    if not np.isfinite(kept).all():
        raise ProblemError(
            f"activation {name!r}: its parameters must be finite numbers of fp32 in plain digits, as in clamp:0:6"
        )
    if word == "clamp" and values[0] > values[1]:
        raise ProblemError(f"activation {name!r} has a lower bound above the upper one")
    values += defaults[len(values) - required :]
    return ":".join([word, *(f"{value:.9g}" for value in values)])  # 9 digits tell every fp32 number


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def activation(name: str) -> Callable[[Array], Array]:
    """The float64 reference of a canonical name."""
    word, *values = name.split(":")
    reference = ACTIVATIONS[word].reference
    return lambda x: reference(x, *(float(value) for value in values))


# Device code


@triton.constexpr_function
def word_of(name):
    """The activation's name without its parameters."""
    return name.partition(":")[0]


@triton.constexpr_function
def parameter_of(name, index):
    """A parameter from the activation's name."""
    return float(name.split(":")[index + 1])


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
def root_of_gate(exponent):
    """1 / √(1 + 2^exponent) of an fp32 tile, whose square is a sigmoid.

    Of an epilogue on tensor cores' results the instructions count, for nothing else runs meanwhile. A square root takes
    one where a division takes five, to guard against quotients that can't come here; and exp2 three fewer than exp.
    """
    return tl.rsqrt(1.0 + tl.exp2(exponent))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of an fp32 tile."""
    root = root_of_gate(-1.4426950408889634 * x)
    return root * root


@triton.jit
def gated(x, exponent):
    """x / (1 + 2^exponent) of fp32 tiles."""
    root = root_of_gate(exponent)
    return x * root * root


@triton.jit
def gelu_erf(x):
    """x·Φ(x) of an fp32 tile, the exact form (erf), to 5e-7 absolute beside fp32's rounding."""
    # Φ(x) is the sigmoid of an odd function, here -x·P(x²)/log2(e): of degree 6 in x², fitted to minimise the largest
    # error of x·Φ(x), which stays within 5e-7 beyond fp32's last place. From x² = 32 on, |x·Φ(x)| or its distance to x
    # is below 1e-7. 14 instructions; with erf there are 32.
    s = tl.minimum(x * x, 32.0)
    p = -5.2099537e-9
    p = p * s + 3.8504686e-7
    p = p * s - 1.1452459e-5
    p = p * s + 1.5938963e-4
    p = p * s + 9.5592186e-5
    p = p * s - 0.10483858
    p = p * s - 2.3022072
    return gated(x, x * p)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of an fp32 tile."""
    # log(1 + e) loses e where it is small; what 1 + e kept of it puts the result right (Kahan; HP-15C handbook, 1982).
    e = tl.exp(-tl.abs(x))
    sum = 1.0 + e
    kept = sum - 1.0
    tail = tl.where(kept == 0.0, e, tl.log(sum) * (e / tl.where(kept == 0.0, 1.0, kept)))
    return tl.where(x > 0, x, 0.0) + tail


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The reference of `ACTIVATION`, of an fp32 tile."""
    WORD: tl.constexpr = word_of(ACTIVATION)
    if WORD == "relu":
        # A comparison, not a maximum: NaN must stay NaN.
        y = tl.where(x < 0, 0.0, x)
    elif WORD == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif WORD == "clamp":
        LOW: tl.constexpr = parameter_of(ACTIVATION, 0)
        HIGH: tl.constexpr = parameter_of(ACTIVATION, 1)
        y = tl.where(x < LOW, LOW, tl.where(x > HIGH, HIGH, x))
    elif WORD == "leaky_relu":
        y = tl.where(x < 0, x * parameter_of(ACTIVATION, 0), x)
    elif WORD == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u: -2·log2(e)·√(2/π)·(x + 0.044715·x³) is its exponent of 2.
        y = gated(x, x * (-2.3022082 - 0.10294324 * x * x))
    elif WORD == "gelu_erf":
        y = gelu_erf(x)
    elif WORD == "quick_gelu":
        y = gated(x, -2.455466959593 * x)
    elif WORD == "silu":
        y = gated(x, -1.4426950408889634 * x)
    elif WORD == "sigmoid":
        y = sigmoid(x)
    elif WORD == "tanh":
        y = tanh(x)
    elif WORD == "softplus":
        y = softplus(x)
    elif WORD == "hardswish":
        # The gate first: 6·x overflows where x alone does not.
        y = x * (tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) * 0.16666666666666666)
    else:
        tl.static_assert(WORD == "none", "unknown activation")
        y = x
    return y

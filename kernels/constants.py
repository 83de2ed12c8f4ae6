"""What callers' numbers may be: those that are compiled into kernels and no problem holds, and those that kernels read.

Every way in asks here: calls, packs and plugins. By name, since each means the same in every op that takes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from tilewright.kernels.dtypes import array_dtype_text
from tilewright.tuning_db.errors import UsageError

SMALLEST, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
"""Of normal numbers above 0, and of finite ones, as kernels have them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The least and the largest number, and what a message says that one must be."""

    least: float
    most: float
    wanted: str
    zero: bool = False  # whether 0 is one too, below the least


# Attention multiplies both by log2(e), in fp32.
_MOST_FACTOR = LARGEST / math.log2(math.e)
_FACTOR = Limits(SMALLEST, _MOST_FACTOR, f"a number above 0, of fp32, from {SMALLEST:.3g} to {_MOST_FACTOR:.3g}")

# A GPU's root (rsqrt.approx.ftz) of a mean of squares and eps takes what is less than a normal number for 0.
_EPS = Limits(SMALLEST, LARGEST, f"a finite number of at least 0, of fp32: 0, or from {SMALLEST:.3g} up", zero=True)

LIMITS: Mapping[str, Limits] = {
    "EPS": _EPS,
    "WEIGHT_OFFSET": Limits(-LARGEST, LARGEST, "a finite number of fp32"),
    "SCALE": _FACTOR,
    "SOFTCAP": _FACTOR,
}
"""By the constexpr's name, of each that a `Kernel.constants` has."""


def checked_constant(name: str, value: Any) -> float:
    """A number for a constexpr, which may be named in small letters, as callers do.

    Raises:
        UsageError: it is not a number, or outside the limits.
    """
    limits = LIMITS[name.upper()]
    if is_symbolic(value):
        value = float(value)
    taken = is_real(value) and limits.least <= as_float(value) <= limits.most
    if not (taken or (limits.zero and is_real(value) and value == 0)):
        raise UsageError(f"{name.lower()}={value!r} must be {limits.wanted}")
    return as_float(value)


POSITIVE = ("out_scale", "q_scale", "k_scale", "v_scale")
"""Inputs that are numbers above 0, where they are numbers: a result is divided by one, scores are scaled by the others.
Arrays are not looked at, for that would mean waiting."""


def checked_number(name: str, value: Any) -> float:
    """A real number for an input that a kernel reads.

    Raises:
        UsageError: it is outside what fp32, or this input, can have.
    """
    number = as_float(value)
    if name in POSITIVE and not SMALLEST <= number <= LARGEST:
        raise UsageError(f"{name}={value!r} must be a number of fp32 above 0, from {SMALLEST:.3g} to {LARGEST:.3g}")
    if not abs(number) <= LARGEST:
        raise UsageError(f"{name}={value!r} must be a finite number of fp32")
    return number


def is_real(value: Any) -> bool:
    """Whether it is a real number of Python's, NumPy's or ml_dtypes'. True is one to Python, and 1 was hardly meant."""
    if isinstance(value, Real):
        return not isinstance(value, bool)
    return isinstance(value, np.generic) and array_dtype_text(value.dtype) is None  # bf16 and fp8


def is_symbolic(value: Any) -> bool:
    """Whether it is a number that torch.export knows by a symbol. As a float or an int it becomes a constant there."""
    return type(value).__name__ in ("SymInt", "SymFloat")


def as_float(value: Any) -> float:
    """A real number as a float; infinite where an integer is past them all."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf

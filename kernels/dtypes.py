"""Canonical data-type names and what each is called elsewhere.

The names are `fp16 bf16 fp32 int8 int32 uint8 fp8e4m3 fp8e5m2 int4`, in problems, records, suites and error messages
alike.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UnsupportedProblemError, UsageError


@dataclass(frozen=True, slots=True)
class DType:
    """One element type."""

    name: str
    bits: int
    triton: str  # in a Triton signature
    numpy: npt.DTypeLike | None  # None where NumPy (with ml_dtypes) has no array of it: int4 travels packed in uint8
    min_arch: int  # oldest arch whose compiled kernels can hold it in registers
    unit: str  # which rate of `Device.tensor_tflops` a dot of it runs at

    @property
    def bytes(self) -> float:
        """Bytes per element; 0.5 for int4."""
        return self.bits / 8

    @property
    def largest(self) -> float:
        """The largest finite number of the type: 127 of int8, 448 of fp8e4m3."""
        if self.numpy is None:
            return 2.0 ** (self.bits - 1) - 1
        kind = np.dtype(self.numpy)
        return float(np.iinfo(kind).max if kind.kind in "iu" else ml_dtypes.finfo(kind).max)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("fp16", 16, "fp16", np.float16, 75, "fp16"),
        DType("bf16", 16, "bf16", ml_dtypes.bfloat16, 80, "bf16"),
        DType("fp32", 32, "fp32", np.float32, 75, "tf32"),
        DType("int8", 8, "i8", np.int8, 80, "int8"),
        DType("int32", 32, "i32", np.int32, 75, "int8"),  # sums of int8 products, offsets and tables
        DType("uint8", 8, "u8", np.uint8, 75, "int8"),  # two int4 in each
        # e4m3 fails to compile below sm_89 even for stores; e5m2 compiles there, upcast to fp16.
        DType("fp8e4m3", 8, "fp8e4nv", ml_dtypes.float8_e4m3fn, 89, "fp8"),
        DType("fp8e5m2", 8, "fp8e5", ml_dtypes.float8_e5m2, 80, "fp8"),
        DType("int4", 4, "u8", None, 80, "int8"),
    )
}

FP8_SUM = 128
"""Products of fp8 that a dot adds up before the sum moves on to fp32: tensor cores of sm_90 add them with 14 bits (the
interval that DeepSeek-V3 settled on, arXiv:2412.19437, section 3.3.2)."""

# What array libraries print for a dtype (NumPy, CuPy, torch after "torch.", JAX), to the canonical name.
_ARRAY_NAMES = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "int8": "int8",
    "int32": "int32",
    "uint8": "uint8",
    "float8_e4m3fn": "fp8e4m3",
    "float8_e5m2": "fp8e5m2",
}


def dtype(name: str) -> DType:
    """The data type of a canonical name.

    Raises:
        ProblemError: no data type has that name.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise ProblemError(f"unknown dtype {name!r}; the names are {', '.join(DTYPES)}") from None


def refused(name: str, kind: str, op: str, known: Collection[str]) -> ProblemError:
    """Why an op does not take a data type for what is called `name`: it is not one at all, or not one of `known`."""
    text = f"{name}={kind!r}: {op} takes {', '.join(known)}"
    if kind in _ARRAY_NAMES and kind not in DTYPES:
        text += f"; {kind} is {_ARRAY_NAMES[kind]} here"
    return UnsupportedProblemError(text) if kind in DTYPES else ProblemError(f"unknown {text}")


def array_dtype_text(array_dtype: Any) -> str | None:
    """What a library calls a dtype that kernels don't have; None for one that they have, or for none."""
    text = None if array_dtype is None else _text(array_dtype)
    return None if text in _ARRAY_NAMES else text


def _text(array_dtype: Any) -> str:
    return str(array_dtype).removeprefix("torch.")


def dtype_name(array_dtype: Any) -> str:
    """The canonical name of an array's `dtype` attribute, of NumPy, CuPy, torch or JAX.

    Raises:
        UnsupportedError: kernels have no such data type.
    """
    text = _text(array_dtype)
    try:
        return _ARRAY_NAMES[text]
    except KeyError:
        raise UnsupportedError(
            f"arrays of dtype {text} are not supported; use one of {', '.join(_ARRAY_NAMES)}"
        ) from None


def wanted_dtype(value: Any) -> str | None:
    """What a caller names as the dtype of a result, as canonical name; names and None are given back as they are.

    Raises:
        UsageError: it is neither a text nor a dtype of NumPy, CuPy, torch or JAX that kernels have.
    """
    if value is None or value.__class__ is str:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    try:
        return dtype_name(np.dtype(value) if isinstance(value, type) else value)
    except (UnsupportedError, TypeError, ValueError):  # NumPy's of classes that have a `dtype` of another kind
        names = ", ".join(_ARRAY_NAMES)
        raise UsageError(f"out_dtype={value!r} must be a name, as 'fp16', or a library's dtype: {names}") from None

"""Random inputs: what problems are checked and timed with. Equal for equal seeds, and made to show a stray read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright.kernels.dtypes import dtype

Array = np.ndarray[Any, Any]

PERIOD = 4_194_301
"""Random values drawn for one array, 0.1 s of them; a larger one repeats them. A prime: shared with no row length or
tile, so that a kernel which reads a wrong row still reads wrong values."""

INTEGER_SPREAD = 32.0
"""Standard deviation of integer samples: the largest of 10^6 stay within int8's 127 but for one in 15,000."""


def normal(random: np.random.Generator, shape: tuple[int, ...], kind: str, *, scale: float = 1.0) -> Array:
    """Normal values of standard deviation `scale` in a data type, rounded to it; of integers, of `INTEGER_SPREAD`.

    An array of more than `PERIOD` elements repeats its first `PERIOD` along memory.
    """
    repeats = math.prod(shape) > PERIOD
    values = random.standard_normal(PERIOD if repeats else shape, dtype=np.float32)
    numpy_dtype = np.dtype(dtype(kind).numpy)
    if numpy_dtype.kind in "iu":
        limits = np.iinfo(numpy_dtype)
        values = np.clip(np.rint(values * np.float32(INTEGER_SPREAD)), limits.min, limits.max)
    elif scale != 1.0:
        values *= np.float32(scale)
    values = values.astype(numpy_dtype)
    return np.resize(values, shape) if repeats else values


def placed(values: Array, *, pitch: int | None = None, aligned: bool = True) -> Array:
    """A copy whose rows are `pitch` elements apart, at a 64-byte boundary or, unaligned, one element past it.

    What lies before, between and behind the rows is NaN, or an integer's smallest number: a read of it shows.
    """
    row = values.shape[-1]
    pitch = row if pitch is None else pitch
    offset = 0 if aligned else 1  # off a 16-byte boundary for every data type
    size = math.prod(values.shape[:-1]) * pitch
    stray = np.iinfo(values.dtype).min if values.dtype.kind in "iu" else np.nan
    buffer = np.full(size + offset + 64, stray, values.dtype)
    start = (-buffer.ctypes.data % 64) // values.itemsize + offset
    array = buffer[start : start + size].reshape(*values.shape[:-1], pitch)[..., :row]
    array[...] = values
    return array

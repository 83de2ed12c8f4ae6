"""Weights of four bits in bytes, as `gemm` reads them.

Along K, weights lie in runs of 32: byte r of a run, of 16, holds weight r in its low nibble and weight 16 + r in its
high one. A packed tile is then two plain ones, each under a contiguous piece of A's row, and no weight has to change
threads on its way to the dot. K is filled up to a multiple of 32.

Nibbles are unsigned, 0 to 15, and stand for scale · (q - zero), where zero is 8 unless `b_zero` says otherwise: signed
weights from -8 to 7 are packed as q + 8.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import array_api_compat
import numpy as np

from tilewright.tuning_db.errors import ProblemError

RUN = 32
"""Weights along K in one run."""


def _namespace(name: str, array: Any) -> Any:
    try:
        if isinstance(array, np.ma.MaskedArray | np.matrix):  # a mask would be ignored; a matrix has no more dimensions
            raise TypeError
        return array_api_compat.array_namespace(array)
    except TypeError:
        raise ProblemError(f"{name} is {type(array).__name__} and must be an array of NumPy, CuPy or torch") from None


def _is_integral(xp: Any, dtype: Any) -> bool:
    try:
        return bool(xp.isdtype(dtype, "integral"))
    except TypeError:  # of ml_dtypes, which NumPy knows no kind of
        return False


def _rows(k: Any) -> int:
    if isinstance(k, bool) or not isinstance(k, Integral) or k < 1:
        raise ProblemError(f"{k=} must be an integer of at least 1: the rows that were packed")
    return int(k)


def packed_rows(k: int) -> int:
    """Rows of bytes that K rows of weights take."""
    return -(-k // RUN) * (RUN // 2)


def pack_int4(q: Any) -> Any:
    """Packed weights, uint8 (..., 16·⌈K/32⌉, N), of integers from 0 to 15, (..., K, N), of NumPy, CuPy or torch.

    The result is column-major, its columns contiguous: so loaded, 16 weights of a column go from shared memory to the
    registers of one dot in one instruction (`ldmatrix`), where rows would take one a byte. Rows, as
    `numpy.ascontiguousarray` makes them, work too.

    Raises:
        ProblemError: fewer than two dimensions, not integers, or some not from 0 to 15.
    """
    xp = _namespace("q", q)
    if len(q.shape) < 2 or not _is_integral(xp, q.dtype) or 0 in q.shape:
        raise ProblemError(f"q is {tuple(q.shape)} of {q.dtype} and must be (..., K, N) of integers")
    low, high = int(xp.min(q)), int(xp.max(q))
    if low < 0 or high > 15:
        raise ProblemError(
            f"q has values from {low} to {high}, and int4 is 0 to 15: signed weights are packed as q + 8"
        )
    *lead, k, n = q.shape
    # Through a flat array, which has the columns one after the other; element by element a view's order would stay.
    flat = xp.reshape(xp.matrix_transpose(xp.astype(q, xp.uint8)), (-1,))
    columns = xp.reshape(flat, (*lead, n, k))
    missing = -k % RUN
    if missing:
        filler = xp.full((*lead, n, missing), 8, dtype=xp.uint8, device=array_api_compat.device(q))
        columns = xp.concat([columns, filler], axis=-1)
    runs = xp.reshape(columns, (*lead, n, -1, 2, RUN // 2))
    packed = runs[..., 0, :] | (runs[..., 1, :] << 4)
    return xp.matrix_transpose(xp.reshape(packed, (*lead, n, -1)))


def unpack_int4(packed: Any, k: int) -> Any:
    """The integers from 0 to 15, uint8 (..., K, N), of packed weights: the inverse of `pack_int4`.

    Raises:
        ProblemError: not the packed form of K rows.
    """
    xp = _namespace("packed", packed)
    k = _rows(k)
    wrong = len(packed.shape) < 2 or packed.shape[-2] != packed_rows(k) or 0 in packed.shape
    if wrong or packed.dtype != xp.uint8:
        raise ProblemError(
            f"packed is {tuple(packed.shape)} of {packed.dtype}; {k=} rows are uint8 (..., {packed_rows(k)}, N)"
        )
    columns = xp.matrix_transpose(packed)
    *lead, n, _ = columns.shape
    runs = xp.reshape(columns, (*lead, n, -1, RUN // 2))
    halves = xp.stack([runs & 15, runs >> 4], axis=-2)
    return xp.matrix_transpose(xp.reshape(halves, (*lead, n, -1))[..., :k])

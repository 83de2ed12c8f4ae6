# mypy: ignore-errors
"""Tiles in memory: loads and stores that cost a mask only where one is needed, and the strides between their rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, mask_rows, mask_columns):
    """A tile with zeros out of bounds; a mask that is None costs nothing."""
    if mask_rows is None and mask_columns is None:
        tile = tl.load(pointers)
    elif mask_rows is None:
        tile = tl.load(pointers, mask=mask_columns, other=0.0)
    elif mask_columns is None:
        tile = tl.load(pointers, mask=mask_rows, other=0.0)
    else:
        tile = tl.load(pointers, mask=mask_rows & mask_columns, other=0.0)
    return tile


@triton.jit
def store_tile(pointers, tile, mask_rows, mask_columns):
    """Stores what is in bounds."""
    if mask_rows is None and mask_columns is None:
        tl.store(pointers, tile)
    elif mask_rows is None:
        tl.store(pointers, tile, mask=mask_columns)
    elif mask_columns is None:
        tl.store(pointers, tile, mask=mask_rows)
    else:
        tl.store(pointers, tile, mask=mask_rows & mask_columns)


@triton.jit
def strides_of(
    batch_stride, head_stride, row_stride, heads, length, DIM: tl.constexpr, TOKENS_FIRST: tl.constexpr,
    MULTIPLE: tl.constexpr,
):  # fmt: skip
    """Elements from one batch index, head and token to the next: those given, in units of MULTIPLE, else of a dense
    (batch, heads, length, DIM), or with TOKENS_FIRST (batch, length, heads, DIM)."""
    if batch_stride is not None:
        batch = batch_stride.to(tl.int64) * MULTIPLE
        head = head_stride.to(tl.int64) * MULTIPLE
        row = row_stride.to(tl.int64) * MULTIPLE
    else:
        # Offsets wrap silently in 32 bits: widen before anything multiplies.
        token = heads.to(tl.int64) * DIM
        batch = token * length
        if TOKENS_FIRST:
            head = DIM
            row = token
        else:
            head = length.to(tl.int64) * DIM
            row = DIM
    return batch, head, row

# mypy: ignore-errors
"""The main loops of the fused GEMM: sums of products over a range of K blocks, one function for each way to load."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(pointers, mask_rows, mask_columns, EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A tile with zeros out of bounds; a dimension known to divide evenly costs no mask."""
    if EVEN_ROWS and EVEN_COLUMNS:
        tile = tl.load(pointers)
    elif EVEN_ROWS:
        tile = tl.load(pointers, mask=mask_columns, other=0.0)
    elif EVEN_COLUMNS:
        tile = tl.load(pointers, mask=mask_rows, other=0.0)
    else:
        tile = tl.load(pointers, mask=mask_rows & mask_columns, other=0.0)
    return tile


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr, FP8_SUM: tl.constexpr):
    """total + A·B of two tiles; of tiles of eight rows their transpose, see `zeros`."""
    if a.shape[0] < 16:
        a, b = b.T, a.T
    if FP8_SUM > 0:
        total = tl.dot(a, b, total, max_num_imprecise_acc=FP8_SUM)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def zeros(BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, INTEGER: tl.constexpr):
    """A tile of sums: int32 for products of int8, else fp32.

    One of eight rows is transposed, for mma.sync multiplies 16 rows by 8 columns; `upright` turns it back.
    """
    ROWS: tl.constexpr = COLUMNS if BLOCK_M < 16 else BLOCK_M
    WIDTH: tl.constexpr = BLOCK_M if BLOCK_M < 16 else COLUMNS
    return tl.zeros((ROWS, WIDTH), dtype=tl.int32 if INTEGER else tl.float32)


@triton.jit
def upright(total, BLOCK_M: tl.constexpr):
    """A tile of sums, BLOCK_M rows of columns."""
    return total.T if BLOCK_M < 16 else total


@triton.jit
def tile_pointers(base, rows, columns, stride, COLUMN_MAJOR: tl.constexpr):
    """Addresses of a tile of a matrix, `stride` between its rows or, column-major, between its columns."""
    # Offsets wrap silently in 32 bits: widen before a stride multiplies.
    if COLUMN_MAJOR:
        pointers = base + rows[:, None] + columns[None, :].to(tl.int64) * stride
    else:
        pointers = base + rows[:, None].to(tl.int64) * stride + columns[None, :]
    return pointers


@triton.jit
def sums(
    a_base,
    b_base,
    a_ld,
    b_ld,
    offsets_m,
    offsets_n,
    end_m,
    end_n,
    K,
    first,
    last,
    A_COLUMN_MAJOR: tl.constexpr,
    B_COLUMN_MAJOR: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A·B of K blocks `first` to `last` by plain loads; with HALVES also that of the columns `end_n` further on."""
    offsets_k = first * BLOCK_K + tl.arange(0, BLOCK_K)
    a_pointers = tile_pointers(a_base, offsets_m, offsets_k, a_ld, A_COLUMN_MAJOR)
    b_pointers = tile_pointers(b_base, offsets_k, offsets_n, b_ld, B_COLUMN_MAJOR)
    a_step = BLOCK_K * a_ld if A_COLUMN_MAJOR else BLOCK_K
    b_step = BLOCK_K if B_COLUMN_MAJOR else BLOCK_K * b_ld
    up = end_n * b_ld if B_COLUMN_MAJOR else end_n.to(tl.int64)
    mask_m = offsets_m[:, None] < end_m
    mask_n = offsets_n[None, :] < end_n
    x = zeros(BLOCK_M, COLUMNS, a_base.dtype.element_ty == tl.int8)
    second = x
    for _ in range(first, last):
        # Both operands are zero beyond K: one alone would let a NaN of the other's padding through.
        a = load_tile(a_pointers, mask_m, offsets_k[None, :] < K, EVEN_M, EVEN_K)
        b = load_tile(b_pointers, offsets_k[:, None] < K, mask_n, EVEN_K, EVEN_N)
        x = multiply(a, b, x, PRECISION, FP8_SUM)
        if HALVES:
            b = load_tile(b_pointers + up, offsets_k[:, None] < K, mask_n, EVEN_K, EVEN_N)
            second = multiply(a, b, second, PRECISION, FP8_SUM)
        a_pointers += a_step
        b_pointers += b_step
        offsets_k += BLOCK_K
    return x, second


@triton.jit
def matrix_descriptor(
    base, rows, columns, stride, COLUMN_MAJOR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """A tensor descriptor of a matrix, `stride` between its rows; of a column-major one, of its transpose."""
    if COLUMN_MAJOR:
        descriptor = tl.make_tensor_descriptor(base, [columns, rows], [stride, 1], [BLOCK_COLUMNS, BLOCK_ROWS])
    else:
        descriptor = tl.make_tensor_descriptor(base, [rows, columns], [stride, 1], [BLOCK_ROWS, BLOCK_COLUMNS])
    return descriptor


@triton.jit
def load_described(descriptor, row, column, COLUMN_MAJOR: tl.constexpr):
    """The tile at a row and column of a descriptor's matrix, with zeros out of bounds."""
    return descriptor.load([column, row]).T if COLUMN_MAJOR else descriptor.load([row, column])


@triton.jit
def described_sums(
    a_descriptor,
    b_descriptor,
    row,
    column,
    up,
    first,
    last,
    INTEGER: tl.constexpr,
    A_COLUMN_MAJOR: tl.constexpr,
    B_COLUMN_MAJOR: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8_SUM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As `sums`, by tensor descriptors: from sm_90 on the tensor memory accelerator copies whole tiles."""
    x = zeros(BLOCK_M, COLUMNS, INTEGER)
    second = x
    for block in range(first, last):
        a = load_described(a_descriptor, row, block * BLOCK_K, A_COLUMN_MAJOR)
        b = load_described(b_descriptor, block * BLOCK_K, column, B_COLUMN_MAJOR)
        x = multiply(a, b, x, PRECISION, FP8_SUM)
        if HALVES:
            b = load_described(b_descriptor, block * BLOCK_K, column + up, B_COLUMN_MAJOR)
            second = multiply(a, b, second, PRECISION, FP8_SUM)
    return x, second

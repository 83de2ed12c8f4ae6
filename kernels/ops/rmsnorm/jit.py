"""Device code of the fused RMSNorm."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import to_output


@triton.jit
def rows_at(ptr, rows, stride, N):
    """Pointers to the first elements of rows."""
    # Offsets wrap silently in 32 bits: widen before a stride multiplies.
    step = N.to(tl.int64) if stride is None else stride.to(tl.int64)
    return ptr + rows[:, None].to(tl.int64) * step


@triton.jit
def load_sum(x_rows, residual_rows, columns, mask):
    """h = x + residual in fp32; zeros out of bounds."""
    h = tl.load(x_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_rows is not None:
        h += tl.load(residual_rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit
def load_factor(weight_ptr, columns, inside, WEIGHT_OFFSET: tl.constexpr):
    """weight_offset + weight in fp32, a row of them; None without a weight."""
    factor = None
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        factor = (weight + WEIGHT_OFFSET)[None, :]
    return factor


@triton.jit
def height(h, factor):
    """|h · factor|, to which the largest |y| of a row is proportional."""
    return tl.abs(h) if factor is None else tl.abs(h * factor)


@triton.jit
def bounds(start, rows, M, N, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of a tile, which of them are in bounds, and which of its elements. A mask that is known to be true is
    dropped by the compiler."""
    columns = start + tl.arange(0, BLOCK_N)
    inside = tl.full((BLOCK_N,), True, tl.int1)
    if not EVEN_N:
        inside = columns < N
    mask = tl.broadcast_to(inside[None, :], (BLOCK_M, BLOCK_N))
    if not EVEN_M:
        mask = mask & (rows[:, None] < M)
    return columns, inside, mask


@triton.jit
def row_factors(total, highest, N, row_scale_ptrs, rows, M, EPS: tl.constexpr, kind: tl.constexpr):
    """What h of each row is multiplied by: 1 / √(mean + eps), and over the row's scale, which is written here."""
    root = tl.rsqrt(total / N.to(tl.float32) + EPS)
    if highest is not None:
        if kind == tl.int8:
            scale = highest * root * (1.0 / 127.0)
        elif kind == tl.float8e4nv:
            scale = highest * root * (1.0 / 448.0)
        else:
            scale = highest * root * (1.0 / 57344.0)
        # `LEAST_SCALE` of the problem: a row of zeros, or of so little that the quotient passes fp32, whose largest
        # number but one is the factor here: rounding can't hide one that does. False of a root of infinity or NaN.
        scale = tl.where((scale < 1e-30) | (root > scale * 3.4028233e38), 1.0, scale)
        tl.store(row_scale_ptrs, scale, mask=rows < M)
        root = tl.math.div_rn(root, scale)
    return root[:, None]


@triton.jit
def store_tile(h, factor, root, out_rows, residual_out_rows, columns, mask, out_scale_ptr):
    """h and y of a tile."""
    if residual_out_rows is not None:
        tl.store(residual_out_rows + columns[None, :], h.to(residual_out_rows.dtype.element_ty), mask=mask)
    y = h * root
    if factor is not None:
        y *= factor
    tl.store(out_rows + columns[None, :], to_output(y, out_scale_ptr, out_rows.dtype.element_ty), mask=mask)


@triton.jit
def rmsnorm_kernel(
    # inputs
    x_ptr,
    residual_ptr,  # (M, N), or None
    weight_ptr,  # (N,), or None
    out_scale_ptr,  # one fp32 element, or None
    # sizes
    M,
    N,
    # strides in elements, from row to row; None where dense
    x_stride,
    residual_stride,
    out_stride,
    residual_out_stride,
    # outputs
    out_ptr,
    residual_out_ptr,  # (M, N), or None
    row_scale_ptr,  # (M,) of fp32, or None
    # constexprs
    EPS: tl.constexpr,
    WEIGHT_OFFSET: tl.constexpr,
    WHOLE: tl.constexpr,  # a tile has whole rows, which stay in registers; else they are read twice, tile by tile
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out = h / √(mean(h²) + eps) · (weight_offset + weight) with h = x + residual: BLOCK_M rows a program."""
    kind: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_rows = rows_at(x_ptr, rows, x_stride, N)
    out_rows = rows_at(out_ptr, rows, out_stride, N)
    residual_rows = None
    if residual_ptr is not None:
        residual_rows = rows_at(residual_ptr, rows, residual_stride, N)
    residual_out_rows = None
    if residual_out_ptr is not None:
        residual_out_rows = rows_at(residual_out_ptr, rows, residual_out_stride, N)
    row_scale_ptrs = None
    if row_scale_ptr is not None:
        row_scale_ptrs = row_scale_ptr + rows

    highest = None
    if WHOLE:
        columns, inside, mask = bounds(0, rows, M, N, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N)
        h = load_sum(x_rows, residual_rows, columns, mask)
        # Asked for before the warps wait for each other.
        factor = load_factor(weight_ptr, columns, inside, WEIGHT_OFFSET)
        if row_scale_ptr is not None:
            highest = tl.max(height(h, factor), axis=1)
        root = row_factors(tl.sum(h * h, axis=1), highest, N, row_scale_ptrs, rows, M, EPS, kind)
        store_tile(h, factor, root, out_rows, residual_out_rows, columns, mask, out_scale_ptr)
    else:
        squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        heights = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            columns, inside, mask = bounds(start, rows, M, N, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N)
            h = load_sum(x_rows, residual_rows, columns, mask)
            squares += h * h
            if row_scale_ptr is not None:
                factor = load_factor(weight_ptr, columns, inside, WEIGHT_OFFSET)
                heights = tl.maximum(heights, height(h, factor))
        if row_scale_ptr is not None:
            highest = tl.max(heights, axis=1)
        root = row_factors(tl.sum(squares, axis=1), highest, N, row_scale_ptrs, rows, M, EPS, kind)
        # Nothing is written before all of a row has been read once, and then element by element: `out` may be `x`.
        for start in tl.range(0, N, BLOCK_N, num_stages=STAGES):
            columns, inside, mask = bounds(start, rows, M, N, EVEN_M, EVEN_N, BLOCK_M, BLOCK_N)
            h = load_sum(x_rows, residual_rows, columns, mask)
            factor = load_factor(weight_ptr, columns, inside, WEIGHT_OFFSET)
            store_tile(h, factor, root, out_rows, residual_out_rows, columns, mask, out_scale_ptr)

# mypy: ignore-errors
"""What follows the main loop of the fused GEMM: the epilogue, and the only store."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import finish, finish_gated
from tilewright.kernels.ops.gemm.mainloop import load_tile, tile_pointers


@triton.jit
def scaled(
    x,
    rows,
    columns,
    end_m,
    end_n,
    alpha_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    BIAS_AXIS: tl.constexpr,
):
    """alpha · scales · x + bias in fp32; the pointers are those of this matrix."""
    x = x.to(tl.float32)
    if alpha_ptr is not None:
        x *= tl.load(alpha_ptr)
    if A_SCALE == "tensor":
        x *= tl.load(a_scale_ptr)
    elif A_SCALE == "row":
        x *= tl.load(a_scale_ptr + rows, mask=rows < end_m, other=0.0)[:, None]
    if B_SCALE == "tensor":
        x *= tl.load(b_scale_ptr)
    elif B_SCALE == "column":
        x *= tl.load(b_scale_ptr + columns, mask=columns < end_n, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        if BIAS_AXIS == "m":
            x += tl.load(bias_ptr + rows, mask=rows < end_m, other=0.0).to(tl.float32)[:, None]
        else:
            x += tl.load(bias_ptr + columns, mask=columns < end_n, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def store_tile(
    x,
    second,  # the second half of gated columns; else not read
    rows,
    column,  # the tile's first
    end_m,
    end_n,  # of the columns: N, or half of it
    alpha_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    residual_base,
    residual_ld,
    out_scale_ptr,
    out_base,
    out_ld,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    BIAS_AXIS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
):
    """The epilogue of one tile and its only store."""
    kind: tl.constexpr = out_base.dtype.element_ty
    columns = column + tl.arange(0, x.shape[1])
    out_columns = columns
    end_out = end_n
    if kind != tl.int32:
        x = scaled(
            x, rows, columns, end_m, end_n, alpha_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, A_SCALE, B_SCALE, BIAS_AXIS
        )
    if GATED == "halves":
        second = scaled(
            second, rows, columns + end_n, end_m, 2 * end_n, alpha_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, A_SCALE,
            B_SCALE, BIAS_AXIS,
        )  # fmt: skip
    elif GATED == "interleaved":
        # A thread of mma's, wgmma's and tcgen05's layouts has both columns of a pair.
        x, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        out_columns = column // 2 + tl.arange(0, x.shape[1])
        end_out = end_n // 2
    mask_m = rows[:, None] < end_m
    mask_n = out_columns[None, :] < end_out
    residual = None
    if residual_base is not None:
        residual = load_tile(
            tile_pointers(residual_base, rows, out_columns, residual_ld, False), mask_m, mask_n, EVEN_M, EVEN_N
        )
    if kind == tl.int32:
        y = x
    elif GATED is None:
        y = finish(x, residual, ACTIVATION, RESIDUAL_LAST, out_scale_ptr, kind)
    else:
        y = finish_gated(x, second, residual, ACTIVATION, out_scale_ptr, kind)
    out_pointers = tile_pointers(out_base, rows, out_columns, out_ld, False)
    if EVEN_M and EVEN_N:
        tl.store(out_pointers, y)
    else:
        tl.store(out_pointers, y, mask=mask_m & mask_n)


@triton.jit
def halved(x):
    """The left and the right half of a tile's columns, each thread's in its own registers."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_in_pieces(
    x,
    second,
    rows,
    column,
    end_m,
    end_n,
    alpha_ptr,
    a_scale_ptr,
    b_scale_ptr,
    bias_ptr,
    residual_base,
    residual_ld,
    out_scale_ptr,
    out_base,
    out_ld,
    A_SCALE: tl.constexpr,
    B_SCALE: tl.constexpr,
    BIAS_AXIS: tl.constexpr,
    GATED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    PIECES: tl.constexpr,  # 1, 2 or 4 pieces of the columns, one after the other; of gated halves 1
):
    """As `store_tile`, piece by piece: what an epilogue needs beside the sums, it needs for one piece at a time."""
    if PIECES == 1:
        store_tile(
            x, second, rows, column, end_m, end_n, alpha_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, residual_base,
            residual_ld, out_scale_ptr, out_base, out_ld, A_SCALE, B_SCALE, BIAS_AXIS, GATED, EVEN_M, EVEN_N,
            ACTIVATION, RESIDUAL_LAST,
        )  # fmt: skip
    else:
        left, right = halved(x)
        store_in_pieces(
            left, left, rows, column, end_m, end_n, alpha_ptr, a_scale_ptr, b_scale_ptr, bias_ptr,
            residual_base, residual_ld, out_scale_ptr, out_base, out_ld, A_SCALE, B_SCALE, BIAS_AXIS, GATED, EVEN_M,
            EVEN_N, ACTIVATION, RESIDUAL_LAST, PIECES // 2,
        )  # fmt: skip
        store_in_pieces(
            right, right, rows, column + left.shape[1], end_m, end_n, alpha_ptr, a_scale_ptr, b_scale_ptr,
            bias_ptr, residual_base, residual_ld, out_scale_ptr, out_base, out_ld, A_SCALE, B_SCALE, BIAS_AXIS, GATED,
            EVEN_M, EVEN_N, ACTIVATION, RESIDUAL_LAST, PIECES // 2,
        )  # fmt: skip

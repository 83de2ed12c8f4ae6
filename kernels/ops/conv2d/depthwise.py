# mypy: ignore-errors
"""Device code of the depthwise convolution: taps one after the other on CUDA cores, without dots."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.ops.conv2d.jit import across, beside, both, load, out_offsets, pixel_of, store_tile
from tilewright.kernels.ops.gemm.jit import tile_of


@triton.jit
def with_tap(total, x, weights, row: tl.constexpr, R: tl.constexpr, DILATION_H: tl.constexpr):
    """The sum of an output row with a row of x, `row` below its first one, where a tap sees that."""
    if row >= 0 and row % DILATION_H == 0 and row // DILATION_H < R:
        total += x * weights[row // DILATION_H]
    return total


@triton.jit
def load_inside(pointers, mask_m, mask_n, y, z, H, W, GUARDED: tl.constexpr, PADDED: tl.constexpr, NHWC: tl.constexpr):
    """A tile of x, pixels at rows y and columns z: zeros where a mask, if there is one, is false, if GUARDED beyond the
    rows that there are, and if PADDED beyond the columns."""
    # Here, and not in functions that give a mask or None, which Triton 3.6 can't return.
    mask = mask_n
    if GUARDED:
        mask_m = both(mask_m, (y >= 0) & (y < H))
    if PADDED:
        mask_m = both(mask_m, (z >= 0) & (z < W))
    if mask_m is not None:
        mask = both(across(mask_m, NHWC), mask_n)
    return load(pointers, mask)


@triton.jit
def product_of_tap(
    x_tile, w_tile, r, s, x_row, x_column, top, left, H, W, mask_m, mask_n, SUM: tl.constexpr, S: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr, NHWC: tl.constexpr,
):  # fmt: skip
    """x under a tap times its weights."""
    x = load_inside(
        x_tile + (r * DILATION_H * x_row + s * DILATION_W * x_column), mask_m, mask_n, top + r * DILATION_H,
        left + s * DILATION_W, H, W, PADDED, PADDED, NHWC,
    )  # fmt: skip
    w = load(w_tile + (r * S + s), mask_n)
    return x.to(SUM) * w.to(SUM)


@triton.jit
def depthwise_kernel(
    # inputs
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    x_scale_ptr,
    w_scale_ptr,
    alpha_ptr,
    out_scale_ptr,
    # sizes
    N,
    H,
    W,
    C,
    K,  # of all groups, as C is: a multiple of it
    P,
    Q,
    pad_top,
    pad_left,
    # outputs
    out_ptr,
    # constexprs
    MULTIPLIER: tl.constexpr,  # filters for each channel
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    NHWC: tl.constexpr,
    RUN: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    SUM: tl.constexpr,
    W_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    EVEN_P: tl.constexpr,  # whether ROWS divides P
    UNROLL: tl.constexpr,  # columns of taps at once
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,  # of output pixels, one below the other, that a thread has
):
    """One tile a program: ROWS tiles of pixels below each other. A dot would compute all channels by all channels.

    Rows share what they read: of each column of taps the weights are loaded once, and a row of x once for all the rows
    of output that see it.
    """
    bands = tl.cdiv(P, ROWS)
    tiles_m = tl.cdiv(N * bands * Q, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_n, 1)
    pixels = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    filters = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    # Offsets wrap silently in 32 bits: widen before a size multiplies.
    image, band, column = pixel_of(pixels, bands, Q, RUN)
    first = band * ROWS
    top = first * STRIDE_H - pad_top
    left = column * STRIDE_W - pad_left
    channels = filters // MULTIPLIER
    if NHWC:
        x_column = C.to(tl.int64)
        x_row = W * x_column
        x_channels = x_ptr + channels
    else:
        x_column = 1
        x_row = W.to(tl.int64)
        x_channels = x_ptr + channels.to(tl.int64) * H * W
    x_pixels = image.to(tl.int64) * C * H * W + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
    x_tile = across(x_pixels, NHWC) + beside(x_channels, NHWC)
    w_tile = w_ptr + beside(filters.to(tl.int64) * (R * S), NHWC)

    mask_m = None
    if not EVEN_M:
        mask_m = pixels < N * bands * Q
    mask_n = None
    if not EVEN_N:
        mask_n = beside(filters < K, NHWC)
    zeros = tl.zeros((BLOCK_M, BLOCK_N) if NHWC else (BLOCK_N, BLOCK_M), dtype=SUM)
    if ROWS == 1:
        total = zeros
        for r in range(R):
            if UNROLL == S:
                for s in tl.static_range(S):
                    total += product_of_tap(
                        x_tile, w_tile, r, s, x_row, x_column, top, left, H, W, mask_m, mask_n, SUM, S, DILATION_H,
                        DILATION_W, PADDED, NHWC,
                    )  # fmt: skip
            else:
                for s in tl.range(S, loop_unroll_factor=UNROLL):
                    total += product_of_tap(
                        x_tile, w_tile, r, s, x_row, x_column, top, left, H, W, mask_m, mask_n, SUM, S, DILATION_H,
                        DILATION_W, PADDED, NHWC,
                    )  # fmt: skip
        sums = (total,)
    else:
        sums = (zeros,) * ROWS
        ROWS_IN: tl.constexpr = (ROWS - 1) * STRIDE_H + (R - 1) * DILATION_H + 1
        for s in tl.range(S, loop_unroll_factor=UNROLL):
            weights = ()
            for r in tl.static_range(R):
                weights += (load(w_tile + (r * S + s), mask_n).to(SUM),)
            for row in tl.static_range(ROWS_IN):
                x = load_inside(
                    x_tile + (row * x_row + s * DILATION_W * x_column), mask_m, mask_n,
                    top + row, left + s * DILATION_W, H, W, PADDED or not EVEN_P, PADDED, NHWC,
                ).to(SUM)  # fmt: skip
                summed = ()
                for out_row in tl.static_range(ROWS):
                    summed += (with_tap(sums[out_row], x, weights, row - out_row * STRIDE_H, R, DILATION_H),)
                sums = summed

    for out_row in tl.static_range(ROWS):
        out_pixels, out_filters = out_offsets(image, first + out_row, column, filters, K, P, Q, NHWC)
        mask_out = mask_m
        if not EVEN_P:
            mask_out = both(mask_m, first + out_row < P)
        store_tile(
            sums[out_row], bias_ptr, residual_ptr, x_scale_ptr, w_scale_ptr, alpha_ptr, out_scale_ptr, out_ptr,
            across(out_pixels, NHWC) + beside(out_filters, NHWC), filters, filters < K,
            mask_out, mask_n, NHWC, W_SCALE, ACTIVATION, RESIDUAL_LAST,
        )  # fmt: skip

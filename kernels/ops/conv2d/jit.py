"""Device code of the fused convolution: an implicit GEMM.

A tile is output pixels by output channels. For x in NHWC memory pixels are its rows and channels its columns; for NCHW
it lies the other way, so that the lanes of a warp always run along what is contiguous in x and out. `across` and
`beside` turn vectors accordingly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import finish
from tilewright.kernels.ops.gemm.jit import tile_of
from tilewright.kernels.partials import last_to_arrive, store_partial, sum_of_partials


@triton.jit
def across(vector, NHWC: tl.constexpr):
    """A vector down the rows for NHWC, along the columns for NCHW: pixels of any tile, depth of a tile of weights."""
    return vector[:, None] if NHWC else vector[None, :]


@triton.jit
def beside(vector, NHWC: tl.constexpr):
    """A vector along the columns for NHWC, down the rows for NCHW: channels of any tile, depth of a tile of x."""
    return vector[None, :] if NHWC else vector[:, None]


@triton.jit
def both(one, other):
    """one & other, of masks that may be None for all true."""
    if one is None:
        mask = other
    elif other is None:
        mask = one
    else:
        mask = one & other
    return mask


@triton.jit
def load(pointers, mask):
    """A tile with zeros where the mask, if there is one, is false."""
    return tl.load(pointers) if mask is None else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def pixel_of(pixels, P, Q, RUN: tl.constexpr):
    """Image, row and column of an output pixel. RUN, a power of two, divides Q."""
    # This tells the compiler that runs of pixels lie in one row. Where it knows of none, Triton 3.6 puts the lanes of
    # a warp along the other dimension of the tile, which in NCHW is not the contiguous one.
    columns = Q // RUN * RUN
    rows = pixels // columns
    return rows // P, rows % P, pixels % columns


@triton.jit
def conv2d_kernel(
    # inputs
    x_ptr,
    w_ptr,
    bias_ptr,  # (K,), or None
    residual_ptr,  # as out, or None
    x_scale_ptr,  # one fp32 element, or None for 1
    w_scale_ptr,  # one fp32 element or (K,), or None for 1
    alpha_ptr,  # one fp32 element, or None for 1
    out_scale_ptr,  # one fp32 element, or None for a result that is not quantised
    # sizes
    N,
    H,
    W,
    C,  # of one group
    K,  # of one group
    P,
    Q,
    pad_top,
    pad_left,
    # outputs
    out_ptr,
    workspace_ptr,  # partial tiles of split-K, or None
    counters_ptr,  # int32 per tile: blocks that have arrived; zero before and after; None without split-K
    # constexprs
    GROUPS: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    NHWC: tl.constexpr,  # x, residual and out; else NCHW
    KRSC: tl.constexpr,  # w; else KCRS
    RUN: tl.constexpr,  # a power of two that divides Q
    PADDED: tl.constexpr,  # some tap of some pixel lies outside of x
    FOLD: tl.constexpr,  # 0: taps one after the other, each in blocks of channels; C: all taps' channels are one depth
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    SUM: tl.constexpr,  # fp32, or int32 for int8
    PRECISION: tl.constexpr,
    FP8_SUM: tl.constexpr,  # fp8 products that tensor cores may add up before the sum goes to fp32; 0 for other types
    W_SCALE: tl.constexpr,  # "channel" or "tensor"
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels
    BLOCK_N: tl.constexpr,  # output channels
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """One tile of one group, or one split of its depth, a program."""
    tiles_m = tl.cdiv(N * P * Q, BLOCK_M)
    tiles_n = tl.cdiv(K, BLOCK_N)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    group = tile // (tiles_m * tiles_n)
    tile_m, tile_n = tile_of(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    pixels = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    filters = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    steps = tl.arange(0, BLOCK_K)

    # Offsets wrap silently in 32 bits: widen before a size multiplies.
    image, row, column = pixel_of(pixels, P, Q, RUN)
    top = row * STRIDE_H - pad_top
    left = column * STRIDE_W - pad_left
    # Folded, the compiler knows their number and what divides it.
    channels = tl.full((), FOLD, tl.int64) if FOLD > 0 else C.to(tl.int64)
    if NHWC:
        x_channel = 1
        x_column = channels * GROUPS
        x_row = W.to(tl.int64) * x_column
        x_base = x_ptr + group * channels
    else:
        x_channel = H.to(tl.int64) * W
        x_column = 1
        x_row = W.to(tl.int64)
        x_base = x_ptr + group * channels * x_channel
    x_image = H.to(tl.int64) * W * channels * GROUPS
    # Of the first tap: outside of x in the padding, where nothing is read.
    x_pixels = x_base + image.to(tl.int64) * x_image + top.to(tl.int64) * x_row + left.to(tl.int64) * x_column
    w_filters = w_ptr + (group * K + filters).to(tl.int64) * (R * S * channels)

    mask_m = None
    if not EVEN_M:
        mask_m = pixels < N * P * Q
    mask_n = None
    if not EVEN_N:
        mask_n = beside(filters < K, NHWC)

    # A step of the loop is a block of channels under one tap; folded, a block of the depth in the order of w.
    if FOLD > 0:
        blocks = tl.cdiv(R * S * FOLD, BLOCK_K)
    else:
        channel_blocks = tl.cdiv(C, BLOCK_K)
        blocks = R * S * channel_blocks
    blocks_per_split = tl.cdiv(blocks, SPLIT_K)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N) if NHWC else (BLOCK_N, BLOCK_M), dtype=SUM)

    if FOLD > 0:
        depth = first * BLOCK_K + steps
        for _ in range(first, last):
            if KRSC:
                tap = depth // FOLD
                c = depth % FOLD
            else:
                tap = depth % (R * S)
                c = depth // (R * S)
            down = tap // S * DILATION_H
            right = tap % S * DILATION_W
            x_depth = down.to(tl.int64) * x_row + right.to(tl.int64) * x_column + c.to(tl.int64) * x_channel
            mask_x = None
            mask_w = mask_n
            if not EVEN_M:
                mask_x = across(mask_m, NHWC)
            if not EVEN_K:
                mask_x = both(mask_x, beside(depth < R * S * FOLD, NHWC))
                mask_w = both(mask_w, across(depth < R * S * FOLD, NHWC))
            if PADDED:
                y = across(top, NHWC) + beside(down, NHWC)
                z = across(left, NHWC) + beside(right, NHWC)
                mask_x = both(mask_x, (y >= 0) & (y < H) & (z >= 0) & (z < W))
            x = load(across(x_pixels, NHWC) + beside(x_depth, NHWC), mask_x)
            w = load(beside(w_filters, NHWC) + across(depth, NHWC), mask_w)
            accumulator = multiply(x, w, accumulator, NHWC, PRECISION, FP8_SUM)
            depth += BLOCK_K
    else:
        # Row, column and first channel of the step go from one to the next: dividing a counter in the loop is the form
        # that Triton was reported to miscompile at 8 warps (pytorch/pytorch#173068), and slower.
        if R * S > 1:
            r = first // channel_blocks // S
            s = first // channel_blocks % S
        c = first % channel_blocks * BLOCK_K
        for _ in range(first, last):
            mask_x = None
            mask_w = mask_n
            if PADDED:
                y = top
                z = left
                if R * S > 1:
                    y = top + r * DILATION_H
                    z = left + s * DILATION_W
                inside = both(mask_m, (y >= 0) & (y < H) & (z >= 0) & (z < W))
                mask_x = across(inside, NHWC)
            elif not EVEN_M:
                mask_x = across(mask_m, NHWC)
            if not EVEN_K:
                # Both operands are zero beyond C: one alone would let a NaN of the next pixel through.
                mask_x = both(mask_x, beside(c + steps < C, NHWC))
                mask_w = both(mask_w, across(c + steps < C, NHWC))
            x_step = c * x_channel
            w_step = c.to(tl.int64)
            if R * S > 1:
                x_step += (r * DILATION_H).to(tl.int64) * x_row + (s * DILATION_W).to(tl.int64) * x_column
                if KRSC:
                    w_step += (r * S + s) * channels
                else:
                    w_step = w_step * (R * S) + r * S + s
            x = load(across(x_pixels + x_step, NHWC) + beside(steps.to(tl.int64) * x_channel, NHWC), mask_x)
            w_steps = steps
            if not KRSC:
                w_steps = steps * (R * S)
            w = load(beside(w_filters + w_step, NHWC) + across(w_steps, NHWC), mask_w)
            accumulator = multiply(x, w, accumulator, NHWC, PRECISION, FP8_SUM)
            c += BLOCK_K
            if R * S > 1:
                done = c >= C
                c = tl.where(done, 0, c)
                s = tl.where(done, s + 1, s)
                done = s == S
                s = tl.where(done, 0, s)
                r = tl.where(done, r + 1, r)

    out_pixels, out_filters = out_offsets(image, row, column, group * K + filters, K * GROUPS, P, Q, NHWC)
    if SPLIT_K > 1:
        ROWS: tl.constexpr = BLOCK_M if NHWC else BLOCK_N
        COLUMNS: tl.constexpr = BLOCK_N if NHWC else BLOCK_M
        place = tile.to(tl.int64) * SPLIT_K
        store_partial(accumulator, workspace_ptr, place + split, None, True, ROWS, COLUMNS)
        if last_to_arrive(counters_ptr, tile, SPLIT_K):
            accumulator = sum_of_partials(workspace_ptr, place, None, SPLIT_K, 1, True, ROWS, COLUMNS)
            store_tile(
                accumulator, bias_ptr, residual_ptr, x_scale_ptr, w_scale_ptr, alpha_ptr, out_scale_ptr, out_ptr,
                across(out_pixels, NHWC) + beside(out_filters, NHWC), group * K + filters, filters < K,
                mask_m, mask_n, NHWC, W_SCALE, ACTIVATION, RESIDUAL_LAST,
            )  # fmt: skip
    else:
        store_tile(
            accumulator, bias_ptr, residual_ptr, x_scale_ptr, w_scale_ptr, alpha_ptr, out_scale_ptr, out_ptr,
            across(out_pixels, NHWC) + beside(out_filters, NHWC), group * K + filters, filters < K,
            mask_m, mask_n, NHWC, W_SCALE, ACTIVATION, RESIDUAL_LAST,
        )  # fmt: skip


@triton.jit
def multiply(x, w, accumulator, NHWC: tl.constexpr, PRECISION: tl.constexpr, FP8_SUM: tl.constexpr):
    """accumulator + x·w, or its transpose: the rows of a dot are the rows of the tile."""
    if NHWC:
        a = x
        b = w
    else:
        a = w
        b = x
    if accumulator.dtype == tl.int32:
        accumulator = tl.dot(a, b, accumulator, out_dtype=tl.int32)
    elif FP8_SUM > 0:
        accumulator = tl.dot(a, b, accumulator, max_num_imprecise_acc=FP8_SUM)
    else:
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit
def out_offsets(image, row, column, channel, channels, P, Q, NHWC: tl.constexpr):
    """Where pixels and channels are in out: two vectors of 64-bit offsets."""
    if NHWC:
        pixels = ((image.to(tl.int64) * P + row) * Q + column) * channels
        filters = channel.to(tl.int64)
    else:
        pixels = image.to(tl.int64) * channels * P * Q + row.to(tl.int64) * Q + column
        filters = channel.to(tl.int64) * P * Q
    return pixels, filters


@triton.jit
def store_tile(
    accumulator,
    bias_ptr,
    residual_ptr,
    x_scale_ptr,
    w_scale_ptr,
    alpha_ptr,
    out_scale_ptr,
    out_ptr,
    offsets,
    channels,  # output channels of the tile, and whether they exist
    present,
    mask_m,  # pixels, or None for all
    mask_n,  # channels, turned as in the tile, or None for all
    NHWC: tl.constexpr,
    W_SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL_LAST: tl.constexpr,
):
    """The epilogue of one tile and its only store."""
    mask = mask_n
    if mask_m is not None:
        mask = both(across(mask_m, NHWC), mask_n)
    if out_ptr.dtype.element_ty == tl.int32:
        y = accumulator
    else:
        x = accumulator.to(tl.float32)
        if alpha_ptr is not None:
            x *= tl.load(alpha_ptr)
        if x_scale_ptr is not None:
            x *= tl.load(x_scale_ptr)
        if w_scale_ptr is not None:
            if W_SCALE == "channel":
                x *= beside(tl.load(w_scale_ptr + channels, mask=present, other=0.0), NHWC)
            else:
                x *= tl.load(w_scale_ptr)
        if bias_ptr is not None:
            x += beside(tl.load(bias_ptr + channels, mask=present, other=0.0).to(tl.float32), NHWC)
        residual = None
        if residual_ptr is not None:
            residual = load(residual_ptr + offsets, mask)
        y = finish(x, residual, ACTIVATION, RESIDUAL_LAST, out_scale_ptr, out_ptr.dtype.element_ty)
    if mask is None:
        tl.store(out_ptr + offsets, y)
    else:
        tl.store(out_ptr + offsets, y, mask=mask)

# mypy: ignore-errors
"""The main loop of the fused attention: the online softmax over blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.ops.attention.tiles import load_tile

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def values_of(v):
    """Values as they are multiplied: fp16, which holds fp8 exactly; weights of 3 bits would lose more than fp8 has."""
    return v.to(tl.float16) if v.dtype.is_fp8() else v


@triton.jit
def rows_of(base, start, row_stride, BLOCK_N: tl.constexpr):
    """Addresses of the rows of a block of keys, or of values, that lie one behind the other."""
    return base + start.to(tl.int64) * row_stride + tl.arange(0, BLOCK_N) * row_stride


@triton.jit
def both(seen, more):
    """What both masks let through, where there may be no first one."""
    return more if seen is None else seen & more


@triton.jit
def add_values(
    accumulator, accumulator_tail, weights, correction, v_descriptor, v_rows, start, rows, lane_dv, tail_dv, mask_dv,
    tail_mask_dv, TAIL_DV: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The sums of weighted values, corrected for a new maximum, with those of one more block of keys."""
    if TMA:
        v = values_of(v_descriptor.load([start, 0]))
    else:
        v = values_of(load_tile(v_rows[:, None] + lane_dv[None, :], rows, mask_dv))
    accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None], input_precision="ieee")
    if TAIL_DV > 0:
        if TMA:
            v_tail = values_of(v_descriptor.load([start, TAIL_DV]))  # as wide as the first
        else:
            v_tail = values_of(load_tile(v_rows[:, None] + tail_dv[None, :], rows, tail_mask_dv))
        accumulator_tail = tl.dot(
            weights.to(v_tail.dtype), v_tail, accumulator_tail * correction[:, None], input_precision="ieee"
        )
    return accumulator, accumulator_tail


@triton.jit
def attend(
    # of every row: the highest score so far, the sum of the weights relative to it, and the sum of weighted values
    m,
    total,
    accumulator,
    accumulator_tail,
    # the queries, and where their keys, values and terms are
    q,
    q_tail,
    k_descriptor,  # of the sequence's keys and values in this head; None without TMA
    v_descriptor,
    k_base,
    v_base,
    bias_rows,
    table,
    slope,
    mask_m,
    mask_d,
    mask_dv,
    tail_mask_d,
    tail_mask_dv,
    query,
    keys,  # None where the blocks hold no others
    diagonal,
    window_left,
    window_right,
    k_batch,
    k_row,
    v_batch,
    v_row,
    scale,
    # blocks of keys: [lower, upper), where those from `jump` on lie `over` further
    lower,
    upper,
    jump,
    over,
    row,  # of the descriptors, where the keys begin
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TAIL_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TAIL_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
    TMA: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    GUARDED: tl.constexpr,  # no blocks skip the loop, its waits included
):
    """What a tile of queries makes of some blocks of keys: the online softmax.

    With OVERLAP a block's values are multiplied in the iteration of the next block, while its softmax is computed, as
    within a warp group of FlashAttention-3 (arXiv:2407.08608, section 3.2). The weights stay fp32 until then: ptxas
    makes all wgmma of a kernel synchronous where a register that one in flight reads, or adds to, is written before the
    wait for it, on any way through the kernel. GUARDED is for the same reason.
    """
    # Scores are kept in base 2, where exp2 needs no factor; with nothing to add to them and none to mask, they are
    # scaled as late as that, by the subtraction's multiply-add. Of a masked one, -inf, a factor of 0 would make NaN.
    EARLY: tl.constexpr = MASKED or SOFTCAP > 0 or bias_rows is not None or slope is not None
    unit = 1.0 if EARLY else scale
    lane_n = tl.arange(0, BLOCK_N)
    lane_d = tl.arange(0, BLOCK_D)
    lane_dv = tl.arange(0, BLOCK_DV)
    tail_d = BLOCK_D + tl.arange(0, TAIL_D if TAIL_D > 0 else 16)
    tail_dv = BLOCK_DV + tl.arange(0, TAIL_DV if TAIL_DV > 0 else 16)
    if not GUARDED or lower < upper:
        if OVERLAP:
            # Of the block before the first, none: its weights are zero, its values those of the first.
            weights = tl.zeros((m.shape[0], BLOCK_N), tl.float32)
            correction = tl.full((m.shape[0],), 1.0, tl.float32)
        for step in tl.range(lower, upper, warp_specialize=WARP_SPECIALIZE):
            block = step
            if MASKED:
                block += tl.where(step < jump, 0, over)
            start = block * BLOCK_N
            key = start + lane_n
            rows, columns = None, None
            if MASKED and keys is not None:
                rows, columns = key[:, None] < keys, key[None, :] < keys
            if PAGE == 0:
                k_rows = rows_of(k_base, start, k_row, BLOCK_N)
                v_rows = rows_of(v_base, start, v_row, BLOCK_N)
            elif PAGE % BLOCK_N == 0:
                page = tl.load(table + start // PAGE).to(tl.int64)
                k_rows = k_base + page * k_batch + (start % PAGE) * k_row + lane_n * k_row
                v_rows = v_base + page * v_batch + (start % PAGE) * v_row + lane_n * v_row
            else:
                page = load_tile(table + key // PAGE, key < keys if MASKED else None, None).to(tl.int64)
                k_rows = k_base + page * k_batch + (key % PAGE) * k_row
                v_rows = v_base + page * v_batch + (key % PAGE) * v_row

            if TMA:
                k = k_descriptor.load([row + start, 0]).T
            else:
                k = load_tile(k_rows[None, :] + lane_d[:, None], mask_d, columns)
            scores = tl.dot(q, k, input_precision="ieee")
            if TAIL_D > 0:
                if TMA:
                    k_tail = k_descriptor.load([row + start, TAIL_D]).T
                else:
                    k_tail = load_tile(k_rows[None, :] + tail_d[:, None], tail_mask_d, columns)
                scores = tl.dot(q_tail, k_tail, scores, input_precision="ieee")
            if OVERLAP:
                behind = tl.maximum(step - 1, lower) * BLOCK_N
                accumulator, accumulator_tail = add_values(
                    accumulator, accumulator_tail, weights, correction, v_descriptor,
                    rows_of(v_base, behind, v_row, BLOCK_N), row + behind, None, lane_dv, tail_dv, mask_dv,
                    tail_mask_dv, TAIL_DV, TMA,
                )  # fmt: skip
            if EARLY:
                scores *= scale
            if SOFTCAP > 0:
                # tanh; where exp2 overflows it is 1, and near 0 its error is 1e-7.
                scores = SOFTCAP * LOG2E * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / SOFTCAP))))
            if bias_rows is not None:
                bias = load_tile(bias_rows[:, None] + key[None, :], mask_m, columns)
                scores += bias.to(tl.float32) * LOG2E
            offset = key[None, :] - query[:, None] - diagonal
            if slope is not None:
                scores -= slope * tl.abs(offset).to(tl.float32)
            if MASKED:
                seen = columns
                if CAUSAL and keys is None:
                    # Not by `offset`, which would take one more instruction for each element.
                    seen = lane_n[None, :] <= (query + diagonal - start)[:, None]
                elif CAUSAL:
                    seen = seen & (offset <= 0)
                elif window_right is not None:
                    seen = both(seen, offset <= window_right)
                if window_left is not None:
                    seen = both(seen, offset >= -window_left)
                scores = tl.where(seen, scores, -float("inf"))

            higher = tl.maximum(m, tl.max(scores, 1) * unit)
            base = higher
            if MASKED or bias_rows is not None:
                # A row that has seen no key yet: -inf - -inf would be NaN.
                base = tl.where(higher == -float("inf"), 0.0, higher)
            weights = tl.exp2(scores * unit - base[:, None])
            correction = tl.exp2(m - base)
            total = total * correction + tl.sum(weights, 1)
            m = higher
            if not OVERLAP:
                accumulator, accumulator_tail = add_values(
                    accumulator, accumulator_tail, weights, correction, v_descriptor, v_rows, row + start, rows,
                    lane_dv, tail_dv, mask_dv, tail_mask_dv, TAIL_DV, TMA,
                )  # fmt: skip
        if OVERLAP:
            behind = (upper - 1) * BLOCK_N
            accumulator, accumulator_tail = add_values(
                accumulator, accumulator_tail, weights, correction, v_descriptor,
                rows_of(v_base, behind, v_row, BLOCK_N), row + behind, None, lane_dv, tail_dv, mask_dv, tail_mask_dv,
                TAIL_DV, TMA,
            )  # fmt: skip
    return m, total, accumulator, accumulator_tail

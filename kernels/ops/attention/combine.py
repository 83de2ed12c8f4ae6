# mypy: ignore-errors
"""The second launch of split keys: the sum of what the splits found (Flash-Decoding; Dao et al. 2023)."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import to_output
from tilewright.kernels.ops.attention.mainloop import LN2
from tilewright.kernels.ops.attention.tiles import strides_of


@triton.jit
def combine_kernel(
    # inputs
    partial_ptr,  # fp32 (batch, H, Sq, splits, DIM_V)
    partial_lse_ptr,  # fp32 (batch, H, Sq, splits), base 2
    cu_seqlens_q_ptr,  # or None
    # sizes
    H,
    Sq,
    # strides, as above
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    # outputs
    out_ptr,
    lse_ptr,  # or None
    # constexprs
    SPLIT_KV: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Adds up the splits of one query of one head, by their share of the softmax's denominator, in a fixed order."""
    place = tl.program_id(0)
    query = place % Sq
    head = place // Sq % H
    batch = place // Sq // H
    first_q = 0
    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    if VARLEN:
        first_q = tl.load(cu_seqlens_q_ptr + batch)
        if query >= tl.load(cu_seqlens_q_ptr + batch + 1) - first_q:
            return
    row = (first_q + query).to(tl.int64)
    splits = place.to(tl.int64) * SPLIT_KV + tl.arange(0, SPLIT_KV)
    lane_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    lse = tl.load(partial_lse_ptr + splits)
    highest = tl.max(lse, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(lse - base)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0.0, 1.0, total)
    mask_dv = lane_dv < DIM_V
    # A split that saw no key left no result.
    used = (lse != -float("inf"))[:, None] & mask_dv[None, :]
    partial = tl.load(partial_ptr + splits[:, None] * DIM_V + lane_dv[None, :], mask=used, other=0.0)
    out = tl.sum(partial * weights[:, None], 0) / total
    kind: tl.constexpr = out_ptr.dtype.element_ty
    MULTIPLE: tl.constexpr = 128 // kind.primitive_bitwidth if ALIGNED else 1
    out_batch, out_head, out_row = strides_of(
        out_batch_stride, out_head_stride, out_row_stride, H, Sq, DIM_V, VARLEN, MULTIPLE
    )
    pointers = out_ptr + row * out_row + head.to(tl.int64) * out_head + lane_dv
    if not VARLEN:
        pointers += batch.to(tl.int64) * out_batch
    tl.store(pointers, to_output(out, None, kind), mask=mask_dv)
    if lse_ptr is not None:
        index = row * H + head if VARLEN else place
        tl.store(lse_ptr + index, (highest + tl.log2(total)) * LN2, mask=(tl.program_id(1) == 0))

# mypy: ignore-errors
"""The flash forward pass by blocks that go on from tile to tile, whose loads one warp group does for two others.

Queries, keys and values are dense, of lengths that the blocks divide: each of them is one matrix for all heads, whose
rows one tensor descriptor reads. Made anew for every head, descriptors would be overwritten while loads still use them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import to_output
from tilewright.kernels.ops.attention.mainloop import LN2, LOG2E, attend
from tilewright.kernels.specialise import behind_barriers


@triton.jit
def persistent_kernel(
    # inputs
    q_ptr,
    k_ptr,
    v_ptr,
    alibi_slopes_ptr,  # fp32 per query head, or None
    sinks_ptr,  # fp32 per query head, or None
    # sizes
    B,
    H,
    Sq,
    Skv,
    window_left,  # keys further before the diagonal are masked; None: no limit
    window_right,
    # outputs
    out_ptr,
    lse_ptr,  # fp32, or None
    # constexprs
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    DIM: tl.constexpr,  # of a head of q and k: a power of two
    DIM_V: tl.constexpr,
    MASKS: tl.constexpr,  # whether any block of keys needs a mask
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    STAGES: tl.constexpr,  # of its copies: `num_stages`
    GROUP_H: tl.constexpr,  # heads whose tiles take turns
):
    """One tile of queries against all keys after the other, a whole grid apart."""
    tiles = Sq // BLOCK_M
    heads = B * H
    q_descriptor = tl.make_tensor_descriptor(q_ptr, [heads * Sq, DIM], [DIM, 1], [BLOCK_M, DIM])
    keys_of_all = heads // GROUP * Skv
    k_descriptor = tl.make_tensor_descriptor(k_ptr, [keys_of_all, DIM], [DIM, 1], [BLOCK_N, DIM])
    v_descriptor = tl.make_tensor_descriptor(v_ptr, [keys_of_all, DIM_V], [DIM_V, 1], [BLOCK_N, DIM_V])
    scale = SCALE * LOG2E
    start = tl.program_id(0)
    if WARP_SPECIALIZE:
        start = behind_barriers(start, STAGES)
    for program in tl.range(start, heads * tiles, tl.num_programs(0), warp_specialize=WARP_SPECIALIZE):
        # Tiles of one height in GROUP_H heads, then those of the next height; of causal ones the longest rows first.
        group = program // (GROUP_H * tiles)
        size = tl.minimum(heads - group * GROUP_H, GROUP_H)
        within = program % (GROUP_H * tiles)
        place = group * GROUP_H + within % size
        tile = within // size
        if CAUSAL:
            tile = tiles - 1 - tile
        head = place % H
        top = tile * BLOCK_M
        # As in the GEMM, the compiler must not see here the very value that a descriptor reads at.
        query = tl.minimum(top, Sq) + tl.arange(0, BLOCK_M)
        q = q_descriptor.load([place * Sq + top, 0])

        diagonal = Skv - Sq  # the key on the diagonal of query 0
        end = Skv
        begin = 0
        if CAUSAL:
            end = tl.minimum(end, top + BLOCK_M + diagonal)
        elif window_right is not None:
            end = tl.minimum(end, top + BLOCK_M + diagonal + window_right)
        if window_left is not None:
            begin = tl.maximum(begin, top + diagonal - window_left)
        first = begin // BLOCK_N
        last = tl.maximum(tl.cdiv(tl.maximum(end, 0), BLOCK_N), first)

        slope = None
        if alibi_slopes_ptr is not None:
            slope = tl.load(alibi_slopes_ptr + head) * LOG2E
        m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if sinks_ptr is not None:
            # One more score, of a key whose value is 0.
            m = tl.zeros((BLOCK_M,), tl.float32) + LOG2E * tl.load(sinks_ptr + head)
            total += 1.0
        accumulator = tl.zeros((BLOCK_M, DIM_V), tl.float32)
        # One group of warps masks, with the rest of its softmax, while the other one multiplies: a second loop, without
        # masks, is none that Triton could specialise.
        m, total, accumulator, _ = attend(
            m, total, accumulator, total, q, None, k_descriptor, v_descriptor, k_ptr, v_ptr, None, None, slope, None,
            None, None, None, None, query, None, diagonal, window_left, window_right, 0, 0, 0, 0, scale, first, last,
            last, 0, place // GROUP * Skv, SOFTCAP, CAUSAL, 0, DIM, 0, DIM_V, 0, BLOCK_N, False, True, False,
            MASKED=MASKS, GUARDED=False,
        )  # fmt: skip

        factor = tl.where(total == 0.0, 0.0, 1.0 / total)
        accumulator *= factor[:, None]
        # A row that sees no key is 0, whatever v holds; see `attention_kernel`.
        unseen = factor == 0.0
        if sinks_ptr is not None:
            sink = tl.zeros((BLOCK_M,), tl.float32) + LOG2E * tl.load(sinks_ptr + head)
            unseen = unseen | ((total == 1.0) & (m == sink))
        accumulator = tl.where(unseen[:, None] & (accumulator != accumulator), 0.0, accumulator)
        row = place.to(tl.int64) * Sq + query
        out = out_ptr + row[:, None] * DIM_V + tl.arange(0, DIM_V)[None, :]
        tl.store(out, to_output(accumulator, None, out_ptr.dtype.element_ty))
        if lse_ptr is not None:
            tl.store(lse_ptr + row, (m + tl.log2(total)) * LN2)

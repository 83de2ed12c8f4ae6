# mypy: ignore-errors
"""Device code of the fused attention: the flash forward pass of Dao 2023, "FlashAttention-2" (arXiv:2307.08691)."""

from __future__ import annotations

import triton
import triton.language as tl

from tilewright.kernels.epilogue import to_output
from tilewright.kernels.ops.attention.mainloop import LN2, LOG2E, attend
from tilewright.kernels.ops.attention.tiles import load_tile, store_tile, strides_of
from tilewright.kernels.specialise import behind_barriers


@triton.jit
def attention_kernel(
    # inputs
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,  # added to the scores, or None
    alibi_slopes_ptr,  # fp32 per query head, or None
    sinks_ptr,  # fp32 per query head, or None
    q_scale_ptr,  # one fp32 element each, or None for 1
    k_scale_ptr,
    v_scale_ptr,
    cu_seqlens_q_ptr,  # int32, first token of each sequence and their total; None: sequences are rows of a batch
    cu_seqlens_k_ptr,
    block_table_ptr,  # int32 (batch, pages of a sequence): which block of k and v holds a page; or None
    kv_lens_ptr,  # int32 per sequence, or None
    # sizes
    H,
    Sq,  # of varlen sequences, the most that are computed
    Skv,
    window_left,  # keys further before the diagonal are masked; None: no limit
    window_right,
    split_blocks,  # blocks of keys of each split; None without
    # strides, None where dense; in elements, or aligned ones in units of 16 bytes: so it is known that 16 bytes can be
    # loaded at once, of heads of 40 or 72 too, which no 16 elements divide
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,  # paged: between blocks
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    block_table_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    # outputs
    out_ptr,  # None with splits
    lse_ptr,  # fp32, or None
    partial_ptr,  # fp32 (batch, H, Sq, splits, DIM_V): results of the splits; None without
    partial_lse_ptr,  # fp32 (batch, H, Sq, splits): their log-sum-exp, base 2
    # constexprs
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,  # 0 for none
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    PAGE: tl.constexpr,  # keys of a block of k and v; 0: keys are not paged
    BIAS_BATCH: tl.constexpr,  # whether bias has that dimension, or is broadcast over it
    BIAS_HEADS: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    DIM: tl.constexpr,  # of a head of q and k
    DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,  # and TAIL_D, or 0: powers of two that hold DIM, 96 as 64 and 32
    TAIL_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    TAIL_DV: tl.constexpr,
    ALIGNED: tl.constexpr,  # pointers, and every stride of an argument, are multiples of 16 bytes
    EVEN_M: tl.constexpr,
    MASKS: tl.constexpr,  # whether any block of keys needs a mask
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_KV: tl.constexpr,
    OVERLAP: tl.constexpr,  # the values of a block of keys are multiplied during the softmax of the next
    TMA: tl.constexpr,  # keys and values come by tensor descriptors
    WARP_SPECIALIZE: tl.constexpr,  # and queries: one warp group copies, two multiply half of the rows each
    STAGES: tl.constexpr,  # of its copies: `num_stages`
    GROUP_H: tl.constexpr,  # heads whose tiles take turns
    PACK: tl.constexpr,  # the rows of a tile are queries times the heads of a group
):
    """One tile of queries against all keys, or one split of them, a program."""
    HEADS: tl.constexpr = GROUP if PACK else 1  # of a tile
    split = tl.program_id(1)
    tiles = tl.cdiv(Sq * HEADS, BLOCK_M)
    program = tl.program_id(0)
    if WARP_SPECIALIZE:
        program = behind_barriers(program, STAGES)
    place = program // tiles  # among the heads of all sequences
    tile = program % tiles
    if GROUP_H > 1:
        # Tiles of one height in GROUP_H heads, then those of the next height.
        group = program // (GROUP_H * tiles)
        size = tl.minimum(tl.num_programs(0) // tiles - group * GROUP_H, GROUP_H)
        within = program % (GROUP_H * tiles)
        place = group * GROUP_H + within % size
        tile = within // size
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first: short ones fill the last wave
    tile_head = place % (H // HEADS)
    batch = place // (H // HEADS)
    kv_head = tile_head if PACK else tile_head // GROUP
    first_q = 0
    first_k = 0
    queries = Sq
    computed = Sq  # of the queries
    keys = Skv
    if cu_seqlens_q_ptr is not None:
        first_q = tl.load(cu_seqlens_q_ptr + batch)
        queries = tl.load(cu_seqlens_q_ptr + batch + 1) - first_q
        computed = tl.minimum(queries, Sq)
    if cu_seqlens_k_ptr is not None:
        first_k = tl.load(cu_seqlens_k_ptr + batch)
        # As with kv_lens, keys beyond the most there may be are not seen, whatever the configuration.
        keys = tl.minimum(tl.load(cu_seqlens_k_ptr + batch + 1) - first_k, Skv)
    if kv_lens_ptr is not None:
        keys = tl.maximum(0, tl.minimum(tl.load(kv_lens_ptr + batch), Skv))
    # A specialised loop has no way around it: its sequences are of one length, whose tiles all have rows.
    if not WARP_SPECIALIZE:  # noqa: SIM102 - known to the compiler, where the condition within is not
        if tile * BLOCK_M >= computed * HEADS:
            return

    # Rows of the tile: which query and which head each is.
    # As in the GEMM, the compiler must not see here the very value that a descriptor reads at.
    lane_m = (tl.minimum(tile * BLOCK_M, Sq) if WARP_SPECIALIZE else tile * BLOCK_M) + tl.arange(0, BLOCK_M)
    query = lane_m // HEADS
    head = tile_head * HEADS + lane_m % HEADS if PACK else tile_head
    inside = query < computed
    mask_m = None if EVEN_M else inside[:, None]
    lane_d = tl.arange(0, BLOCK_D)
    lane_dv = tl.arange(0, BLOCK_DV)

    VARLEN: tl.constexpr = cu_seqlens_q_ptr is not None
    MULTIPLE: tl.constexpr = 128 // q_ptr.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
    q_batch, q_head, q_row = strides_of(q_batch_stride, q_head_stride, q_row_stride, H, Sq, DIM, VARLEN, MULTIPLE)
    TOKENS_FIRST: tl.constexpr = PAGE > 0 or VARLEN
    stored = PAGE if PAGE > 0 else Skv
    k_batch, k_head, k_row = strides_of(
        k_batch_stride, k_head_stride, k_row_stride, H // GROUP, stored, DIM, TOKENS_FIRST, MULTIPLE
    )
    v_batch, v_head, v_row = strides_of(
        v_batch_stride, v_head_stride, v_row_stride, H // GROUP, stored, DIM_V, TOKENS_FIRST, MULTIPLE
    )
    batch_64 = batch.to(tl.int64)

    q_rows = q_ptr + (first_q + query).to(tl.int64) * q_row + head.to(tl.int64) * q_head
    k_base = k_ptr + kv_head.to(tl.int64) * k_head
    v_base = v_ptr + kv_head.to(tl.int64) * v_head
    if not VARLEN:
        q_rows += batch_64 * q_batch
    if cu_seqlens_k_ptr is not None:
        k_base += first_k.to(tl.int64) * k_row
        v_base += first_k.to(tl.int64) * v_row
    elif PAGE == 0:
        k_base += batch_64 * k_batch
        v_base += batch_64 * v_batch
    mask_d = lane_d[:, None] < DIM if BLOCK_D > DIM else None
    if WARP_SPECIALIZE:
        q_base = q_ptr + batch_64 * q_batch + head.to(tl.int64) * q_head
        q_descriptor = tl.make_tensor_descriptor(q_base, [queries, DIM], [q_row, 1], [BLOCK_M, BLOCK_D])
        q = q_descriptor.load([tile * BLOCK_M, 0])
    else:
        q = load_tile(q_rows[:, None] + lane_d[None, :], mask_m, lane_d[None, :] < DIM if BLOCK_D > DIM else None)
    q_tail, tail_mask_d = None, None
    if TAIL_D > 0:
        tail_d = BLOCK_D + tl.arange(0, TAIL_D)
        PADDED: tl.constexpr = BLOCK_D + TAIL_D > DIM
        tail_mask_d = tail_d[:, None] < DIM if PADDED else None
        q_tail = load_tile(q_rows[:, None] + tail_d[None, :], mask_m, tail_d[None, :] < DIM if PADDED else None)

    # Which blocks of keys the tile sees at all, [first, last), and which of them whole, [whole, masked).
    diagonal = keys - queries  # the key on the diagonal of query 0
    top = tile * BLOCK_M // HEADS
    bottom = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // HEADS, computed - 1)
    end = keys
    end_of_all = keys  # keys before it are seen by every row
    begin = 0
    begin_of_all = 0
    if CAUSAL:
        end = tl.minimum(end, bottom + diagonal + 1)
        end_of_all = tl.minimum(end_of_all, top + diagonal + 1)
    elif window_right is not None:
        end = tl.minimum(end, bottom + diagonal + window_right + 1)
        end_of_all = tl.minimum(end_of_all, top + diagonal + window_right + 1)
    if window_left is not None:
        begin = tl.maximum(begin, top + diagonal - window_left)
        begin_of_all = tl.maximum(begin_of_all, bottom + diagonal - window_left)
    first = begin // BLOCK_N
    last = tl.cdiv(tl.maximum(end, 0), BLOCK_N)
    if SPLIT_KV > 1:
        # The length of a split is the host's: the same for all sequences, whatever their lengths on the device.
        blocks = split_blocks
        if VARLEN and not CAUSAL and window_left is not None and window_right is None:
            # But of a sequence with more queries than are computed the first ones see more keys than the host knows of.
            blocks = tl.maximum(blocks, tl.cdiv(last - first, SPLIT_KV))
        first += split * blocks
        last = tl.minimum(first + blocks, last)
    last = tl.maximum(last, first)
    whole = tl.minimum(tl.maximum(tl.cdiv(begin_of_all, BLOCK_N), first), last)
    masked = tl.minimum(tl.maximum(tl.maximum(end_of_all, 0) // BLOCK_N, whole), last)

    scale = SCALE * LOG2E
    if q_scale_ptr is not None:
        scale = tl.load(q_scale_ptr) * tl.load(k_scale_ptr) * scale
    bias_rows, slope, table = None, None, None
    if bias_ptr is not None:
        if bias_row_stride is not None:
            BIAS_MULTIPLE: tl.constexpr = 128 // bias_ptr.dtype.element_ty.primitive_bitwidth if ALIGNED else 1
            bias_batch = bias_batch_stride.to(tl.int64) * BIAS_MULTIPLE
            bias_head = bias_head_stride.to(tl.int64) * BIAS_MULTIPLE
            bias_row = bias_row_stride.to(tl.int64) * BIAS_MULTIPLE
        else:
            bias_row = Skv.to(tl.int64) if BIAS_ROWS else 0
            bias_head = Skv.to(tl.int64) * (Sq if BIAS_ROWS else 1) if BIAS_HEADS else 0
            bias_batch = Skv.to(tl.int64) * (Sq if BIAS_ROWS else 1) * (H if BIAS_HEADS else 1) if BIAS_BATCH else 0
        bias_rows = bias_ptr + batch_64 * bias_batch + head * bias_head + query * bias_row
    if alibi_slopes_ptr is not None:
        slope = tl.load(alibi_slopes_ptr + head) * LOG2E
        if PACK:
            slope = slope[:, None]
    if block_table_ptr is not None:
        table = block_table_ptr + batch_64 * (Skv // PAGE if block_table_stride is None else block_table_stride)

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        # One more score, of a key whose value is 0, in the first split.
        m = tl.where(split == 0, tl.zeros((BLOCK_M,), tl.float32) + LOG2E * tl.load(sinks_ptr + head), m)
        total += 1.0  # of a score of -inf, no more than that is left at the first key
    accumulator = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    accumulator_tail = total  # stands in where there is no tail: Triton 3.6 returns no None
    mask_dv = lane_dv[None, :] < DIM_V if BLOCK_DV > DIM_V else None
    tail_mask_dv = None
    if TAIL_DV > 0:
        tail_dv = BLOCK_DV + tl.arange(0, TAIL_DV)
        tail_mask_dv = tail_dv[None, :] < DIM_V if BLOCK_DV + TAIL_DV > DIM_V else None
        accumulator_tail = tl.zeros((BLOCK_M, TAIL_DV), tl.float32)
    k_descriptor, v_descriptor = None, None
    if TMA:
        # Rows behind the last, and columns behind those of the head, are read as zeros.
        k_descriptor = tl.make_tensor_descriptor(k_base, [keys, DIM], [k_row, 1], [BLOCK_N, BLOCK_D])
        v_descriptor = tl.make_tensor_descriptor(v_base, [keys, DIM_V], [v_row, 1], [BLOCK_N, BLOCK_DV])

    if WARP_SPECIALIZE:
        # A kernel can have one such loop. All of its blocks are masked, if any need it: one group does that, and the
        # rest of the softmax, while the other one multiplies.
        m, total, accumulator, accumulator_tail = attend(
            m, total, accumulator, accumulator_tail, q, q_tail, k_descriptor, v_descriptor, k_base, v_base, bias_rows,
            table, slope, mask_m, mask_d, mask_dv, tail_mask_d, tail_mask_dv, query, keys, diagonal, window_left,
            window_right, k_batch, k_row, v_batch, v_row, scale, first, last, last, 0, 0, SOFTCAP, CAUSAL, PAGE,
            BLOCK_D, TAIL_D, BLOCK_DV, TAIL_DV, BLOCK_N, False, TMA, WARP_SPECIALIZE, MASKED=MASKS, GUARDED=False,
        )  # fmt: skip
    else:
        # First the blocks that every row sees whole, then those before and behind them: the order doesn't matter.
        m, total, accumulator, accumulator_tail = attend(
            m, total, accumulator, accumulator_tail, q, q_tail, k_descriptor, v_descriptor, k_base, v_base, bias_rows,
            table, slope, mask_m, mask_d, mask_dv, tail_mask_d, tail_mask_dv, query, keys, diagonal, window_left,
            window_right, k_batch, k_row, v_batch, v_row, scale, whole, masked, whole, 0, 0, SOFTCAP, CAUSAL, PAGE,
            BLOCK_D, TAIL_D, BLOCK_DV, TAIL_DV, BLOCK_N, OVERLAP, TMA, False, MASKED=False, GUARDED=OVERLAP or TMA,
        )  # fmt: skip
        if MASKS:
            over = masked - whole
            m, total, accumulator, accumulator_tail = attend(
                m, total, accumulator, accumulator_tail, q, q_tail, k_descriptor, v_descriptor, k_base, v_base,
                bias_rows, table, slope, mask_m, mask_d, mask_dv, tail_mask_d, tail_mask_dv, query, keys, diagonal,
                window_left, window_right, k_batch, k_row, v_batch, v_row, scale, first, last - over, whole, over,
                0, SOFTCAP, CAUSAL, PAGE, BLOCK_D, TAIL_D, BLOCK_DV, TAIL_DV, BLOCK_N, False, TMA, False, MASKED=True,
                GUARDED=OVERLAP or TMA,
            )  # fmt: skip

    lse = m + tl.log2(total)
    factor = tl.where(total == 0.0, 0.0, 1.0 / total)
    if v_scale_ptr is not None:
        factor *= tl.load(v_scale_ptr)
    accumulator *= factor[:, None]
    if TAIL_DV > 0:
        accumulator_tail *= factor[:, None]
    # A row that sees no key is 0, whatever v holds: it has 0 times v, which may be NaN. Where there is a sink, its sum
    # is that of the sink alone, or 0 if that is -inf; so is that of keys that are little beside it, whose values count
    # if they are numbers.
    unseen = factor == 0.0
    if sinks_ptr is not None:
        sink = tl.zeros((BLOCK_M,), tl.float32) + LOG2E * tl.load(sinks_ptr + head)
        unseen = unseen | ((total == 1.0) & (m == sink) & (split == 0))
    unseen = unseen[:, None]
    accumulator = tl.where(unseen & (accumulator != accumulator), 0.0, accumulator)
    if TAIL_DV > 0:
        accumulator_tail = tl.where(unseen & (accumulator_tail != accumulator_tail), 0.0, accumulator_tail)
    row = (batch_64 * H + head) * Sq + query  # in (batch, H, Sq)
    if SPLIT_KV > 1:
        part = row * SPLIT_KV + split
        # The sum reads no partial result of a split that saw no key.
        used = (inside & (lse != -float("inf")))[:, None]
        partial = partial_ptr + part * DIM_V
        tl.store(partial_lse_ptr + part, lse, mask=inside)
        store_tile(partial[:, None] + lane_dv[None, :], accumulator, used, mask_dv)
        if TAIL_DV > 0:
            tail = partial[:, None] + tail_dv[None, :]
            store_tile(tail, accumulator_tail, used, tail_mask_dv)
    else:
        kind: tl.constexpr = out_ptr.dtype.element_ty
        OUT_MULTIPLE: tl.constexpr = 128 // kind.primitive_bitwidth if ALIGNED else 1
        out_batch, out_head, out_row = strides_of(
            out_batch_stride, out_head_stride, out_row_stride, H, Sq, DIM_V, VARLEN, OUT_MULTIPLE
        )
        out_rows = out_ptr + (first_q + query).to(tl.int64) * out_row + head.to(tl.int64) * out_head
        if not VARLEN:
            out_rows += batch_64 * out_batch
        out = out_rows[:, None] + lane_dv[None, :]
        store_tile(out, to_output(accumulator, None, kind), mask_m, mask_dv)
        if TAIL_DV > 0:
            tail = out_rows[:, None] + tail_dv[None, :]
            store_tile(tail, to_output(accumulator_tail, None, kind), mask_m, tail_mask_dv)
        if lse_ptr is not None:
            if VARLEN:
                row = (first_q + query).to(tl.int64) * H + head
            tl.store(lse_ptr + row, lse * LN2, mask=inside)

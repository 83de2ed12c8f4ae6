# mypy: ignore-errors
"""An attention in Gluon for sm_90, to learn what portable Triton leaves there: not of the library, nor tuned by it.

After FlashAttention-3 (arXiv:2407.08608): warp-specialised and persistent. One warp copies keys and values by the
tensor memory accelerator into rings of stages; two groups of four warps have 64 queries each, and every stage serves
both.

- The groups issue their products in turns, so that one has its softmax while the other multiplies (section 3.1).
- Within a group, a block's values are multiplied while the next block's softmax is computed (section 3.2). Left to
  itself, ptxas moves the wait for that product before the softmax; the wait for a turn, a loop, keeps it behind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.gluon_gemm import (
    COPYING_REGISTERS,
    GROUPS,
    MULTIPLYING_REGISTERS,
    REGISTERS,
    copy_tile_in,
    copy_tile_out,
    tile_layout,
)
from tilewright.kernels.ops.gemm.jit import tile_of

ROWS = gl.constexpr(64)
"""Queries of a group: those of one wgmma, whose scores, weights and sums fill the registers of four warps."""


@dataclass(frozen=True, slots=True)
class GluonAttentionConfig:
    """How an attention is cut up.

    Attributes:
        BLOCK_N: keys of a stage.
        STAGES: of the ring of keys, and of that of values; with fewer than two, a group would wait for its turn while
            the other waits for a stage that the first gives back after it.
        GROUP_H: heads whose tiles take turns.
    """

    BLOCK_N: int = 128
    STAGES: int = 2
    GROUP_H: int = 8

    def __post_init__(self) -> None:
        if self.STAGES < 2:
            raise ValueError(f"STAGES={self.STAGES} must be 2 or more")

    def shared_bytes(self, dim: int) -> int:
        """Of the queries, the rings and what is to be written, without barriers, for heads of `dim` 16-bit elements."""
        return 2 * dim * (2 * GROUPS * ROWS.value + 2 * self.STAGES * self.BLOCK_N)


@gluon.jit
def place_of(program, heads, tiles, GROUP_H: gl.constexpr, CAUSAL: gl.constexpr):
    """Head and first query of a tile; of causal ones of GROUP_H heads the longest come first, for a short end."""
    head, tile = tile_of(program, heads, tiles, GROUP_H)
    if CAUSAL:
        tile = tiles - 1 - tile
    return head, tile * 2 * ROWS


@gluon.jit
def blocks_of(top, queries, keys, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """Blocks of keys that the tile of queries from `top` on sees: at least one, whose keys may all be masked."""
    last = keys
    if CAUSAL:
        last = gl.minimum(keys, top + 2 * ROWS + keys - queries)
    return gl.maximum(gl.cdiv(last, BLOCK_N), 1)


@gluon.jit
def whole_blocks_of(row, queries, keys, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """The first blocks of keys, which all queries from `row` on see whole."""
    whole = keys
    if CAUSAL:
        whole = gl.maximum(gl.minimum(keys, row + keys - queries + 1), 0)
    return whole // BLOCK_N


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    """The stage after it, and the phase of its barriers."""
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def copy_in(
    q_desc, k_desc, v_desc, q_parts, k_ring, v_ring, barriers, sizes, GROUP_H: gl.constexpr, CAUSAL: gl.constexpr
):
    """The warp that copies: of every tile the keys' and values' blocks from the last to the first, and the queries."""
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    heads, shared_by, queries, keys = sizes
    tiles = gl.cdiv(queries, 2 * ROWS)
    stage = 0
    phase = 1  # of a barrier that nobody has used, the phase before the first counts as over
    q_phase = 1
    for program in range(gl.program_id(0), heads * tiles, gl.num_programs(0)):
        head, top = place_of(program, heads, tiles, GROUP_H, CAUSAL)
        blocks = blocks_of(top, queries, keys, BLOCK_N, CAUSAL)
        for step in range(blocks):
            key = (blocks - 1 - step) * BLOCK_N
            mbarrier.wait(k_empty.index(stage), phase)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            copy_tile_in(k_desc, [head // shared_by, key, 0], k_full.index(stage), k_ring.index(stage))
            if step == 0:
                # After the first keys: a stage for them was free earlier than the places of the queries.
                for group in gl.static_range(2):
                    mbarrier.wait(q_empty.index(group), q_phase)
                    mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
                    copy_tile_in(q_desc, [head, top + group * ROWS, 0], q_full.index(group), q_parts.index(group))
                q_phase ^= 1
            mbarrier.wait(v_empty.index(stage), phase)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            copy_tile_in(v_desc, [head // shared_by, key, 0], v_full.index(stage), v_ring.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def soften(scores, m, total, unit, allowed, MASKED: gl.constexpr):
    """The online softmax of one more block: weights, and what is left of the sums so far. `allowed` is the last key of
    the block that a row sees."""
    if MASKED:
        lane: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        BLOCK_N: gl.constexpr = scores.shape[1]
        key = gl.arange(0, BLOCK_N, layout=lane)
        seen = gl.expand_dims(key, 0) <= gl.expand_dims(allowed, 1)
        scores = gl.where(seen, scores, -float("inf"))
    higher = gl.maximum(m, gl.max(scores, 1) * unit)
    base = higher
    if MASKED:
        # A row that has seen no key yet: -inf - -inf would be NaN.
        base = gl.where(higher == -float("inf"), 0.0, higher)
    weights = gl.exp2(scores * unit - gl.expand_dims(base, 1))
    correction = gl.exp2(m - base)
    return weights, higher, total * correction + gl.sum(weights, 1), correction


@gluon.jit
def multiply_keys(q, k_ring, stage, SCORES: gl.constexpr):
    """The products of queries and keys, under way."""
    BLOCK_N: gl.constexpr = k_ring.shape[2]
    DIM: gl.constexpr = k_ring.shape[3]
    k = k_ring.index(stage).reshape([BLOCK_N, DIM])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    return warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def multiply_values(p, v_ring, stage, sums):
    """The sums with those of weighted values, under way."""
    BLOCK_N: gl.constexpr = v_ring.shape[2]
    DIM: gl.constexpr = v_ring.shape[3]
    v = v_ring.index(stage).reshape([BLOCK_N, DIM])
    return warpgroup_mma(p, v, sums, is_async=True)


@gluon.jit
def attend_block(
    group: gl.constexpr, q, k_ring, v_ring, barriers, state, places, unit, allowed, SCORES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """One more block of keys, in the group's turn: its scores and, meanwhile, the sums of the block before."""
    STAGES: gl.constexpr = k_ring.shape[0]
    _, _, k_full, k_empty, v_full, v_empty, turns = barriers
    p, sums, m, total = state
    k_stage, k_phase, v_stage, v_phase, my_turn = places
    mbarrier.wait(k_full.index(k_stage), k_phase)
    scores = multiply_keys(q, k_ring, k_stage, SCORES)
    mbarrier.wait(v_full.index(v_stage), v_phase)
    sums = multiply_values(p, v_ring, v_stage, sums)
    mbarrier.arrive(turns.index(1 - group))
    scores = warpgroup_mma_wait(1, deps=(scores,))
    mbarrier.arrive(k_empty.index(k_stage))
    weights, m, total, correction = soften(scores, m, total, unit, allowed, MASKED)
    mbarrier.wait(turns.index(group), my_turn)
    sums, p = warpgroup_mma_wait(0, deps=(sums, p))
    mbarrier.arrive(v_empty.index(v_stage))
    # Not before the wait: ptxas makes all products of a kernel synchronous where registers are written that one in
    # flight still reads.
    p = gl.convert_layout(weights.to(v_ring.dtype), p.type.layout)
    sums *= gl.expand_dims(gl.convert_layout(correction, gl.SliceLayout(1, sums.type.layout)), 1)
    k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
    v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
    return (p, sums, m, total), (k_stage, k_phase, v_stage, v_phase, my_turn ^ 1)


@gluon.jit
def attend(
    group: gl.constexpr,
    out_desc,
    q_parts,
    k_ring,
    v_ring,
    out_parts,
    barriers,
    sizes,
    unit,
    GROUP_H: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """A group that multiplies: of every tile the queries of its half."""
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[2]
    DIM: gl.constexpr = k_ring.shape[3]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    heads, _, queries, keys = sizes
    tiles = gl.cdiv(queries, 2 * ROWS)
    q = q_parts.index(group).reshape([ROWS, DIM])
    out_part = out_parts.index(group)
    q_phase = 0
    # Of keys and of values: the stage, and its barriers' phase; then that of the turns, as in `copy_in` for the first.
    places = (0, 0, 0, 0, 1 - group)
    for program in range(gl.program_id(0), heads * tiles, gl.num_programs(0)):
        head, top = place_of(program, heads, tiles, GROUP_H, CAUSAL)
        blocks = blocks_of(top, queries, keys, BLOCK_N, CAUSAL)
        row = top + group * ROWS
        whole = whole_blocks_of(row, queries, keys, BLOCK_N, CAUSAL)
        allowed = gl.zeros([ROWS], gl.int32, ROW) + (keys - 1)
        if CAUSAL:
            allowed = gl.minimum(allowed, row + keys - queries + gl.arange(0, ROWS, layout=ROW))

        k_stage, k_phase, v_stage, v_phase, my_turn = places
        mbarrier.wait(q_full.index(group), q_phase)
        q_phase ^= 1
        mbarrier.wait(k_full.index(k_stage), k_phase)
        mbarrier.wait(turns.index(group), my_turn)
        scores = multiply_keys(q, k_ring, k_stage, SCORES)
        mbarrier.arrive(turns.index(1 - group))
        scores = warpgroup_mma_wait(0, deps=(scores,))
        mbarrier.arrive(k_empty.index(k_stage))
        m = gl.full([ROWS], -float("inf"), gl.float32, ROW)
        total = gl.zeros([ROWS], gl.float32, ROW)
        weights, m, total, _correction = soften(scores, m, total, unit, allowed - (blocks - 1) * BLOCK_N, True)
        p = gl.convert_layout(weights.to(v_ring.dtype), WEIGHTS)
        sums = gl.zeros([ROWS, DIM], gl.float32, SUMS)
        k_stage, k_phase = next_stage(k_stage, k_phase, STAGES)
        mbarrier.wait(turns.index(group), my_turn ^ 1)
        state = (p, sums, m, total)
        places = (k_stage, k_phase, v_stage, v_phase, my_turn)
        masked = gl.maximum(blocks - whole, 1)
        for step in range(1, masked):
            state, places = attend_block(
                group, q, k_ring, v_ring, barriers, state, places, unit, allowed - (blocks - 1 - step) * BLOCK_N,
                SCORES, True,
            )  # fmt: skip
        for _step in range(masked, blocks):
            state, places = attend_block(
                group, q, k_ring, v_ring, barriers, state, places, unit, None, SCORES, False,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(group))
        p, sums, m, total = state
        k_stage, k_phase, v_stage, v_phase, my_turn = places
        mbarrier.wait(v_full.index(v_stage), v_phase)
        sums = multiply_values(p, v_ring, v_stage, sums)
        mbarrier.arrive(turns.index(1 - group))
        sums, p = warpgroup_mma_wait(0, deps=(sums, p))
        mbarrier.arrive(v_empty.index(v_stage))
        v_stage, v_phase = next_stage(v_stage, v_phase, STAGES)
        places = (k_stage, k_phase, v_stage, v_phase, my_turn)

        factor = gl.where(total == 0.0, 0.0, 1.0 / total)
        sums *= gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, SUMS)), 1)
        tma.store_wait(0)  # what was written from here before has been read
        out_part.reshape([ROWS, DIM]).store(sums.to(out_desc.dtype))
        fence_async_shared()
        copy_tile_out(out_desc, [head, row, 0], out_part)
    tma.store_wait(0)


@gluon.jit
def gluon_attention_kernel(
    q_desc,  # (batch * H, Sq, DIM), by (1, 64, DIM)
    k_desc,  # (batch * Hkv, Skv, DIM), by (1, BLOCK_N, DIM)
    v_desc,  # as k
    out_desc,  # as q
    heads,  # batch * H
    shared_by,  # H / Hkv
    queries,  # Sq
    keys,  # Skv
    unit,  # log2(e) / sqrt(DIM)
    STAGES: gl.constexpr,
    GROUP_H: gl.constexpr,
    CAUSAL: gl.constexpr,
):
    """out = softmax(Q·Kᵀ / sqrt(DIM))·V; causal: the last query stands at the last key."""
    BLOCK_N: gl.constexpr = k_desc.block_type.shape[1]
    DIM: gl.constexpr = k_desc.block_type.shape[2]
    q_parts = gl.allocate_shared_memory(q_desc.dtype, [2, 1, ROWS, DIM], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, DIM], v_desc.layout)
    out_parts = gl.allocate_shared_memory(out_desc.dtype, [2, 1, ROWS, DIM], out_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns)
    sizes = (heads, shared_by, queries, keys)
    gl.warp_specialize(
        [
            (attend, (0, out_desc, q_parts, k_ring, v_ring, out_parts, barriers, sizes, unit, GROUP_H, CAUSAL)),
            (attend, (1, out_desc, q_parts, k_ring, v_ring, out_parts, barriers, sizes, unit, GROUP_H, CAUSAL)),
            (copy_in, (q_desc, k_desc, v_desc, q_parts, k_ring, v_ring, barriers, sizes, GROUP_H, CAUSAL)),
        ],
        [4, 1],
        [MULTIPLYING_REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def gluon_attention(q: Any, k: Any, v: Any, causal: bool, config: GluonAttentionConfig, programs: int) -> Any:
    """softmax(q·kᵀ / sqrt(D))·v of torch's arrays, q of (B, H, Sq, D), k and v of (B, Hkv, Skv, D), all of fp16 or bf16
    and dense, D of 64 or 128, on a GPU with so many multiprocessors. Causal: the last query stands at the last key."""
    batch, heads, queries, _ = q.shape
    out = q.new_empty(q.shape)
    tiles = batch * heads * triton.cdiv(queries, GROUPS * ROWS.value)
    arguments, options = launch_arguments(q, k, v, out, causal, config)
    gluon_attention_kernel[(min(programs, tiles),)](*arguments, **options)
    return out


def launch_arguments(
    q: Any, k: Any, v: Any, out: Any, causal: bool, config: GluonAttentionConfig
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel is launched with."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    arguments = (
        *(_described(array, rows) for array, rows in ((q, ROWS.value), (k, config.BLOCK_N), (v, config.BLOCK_N),
                                                      (out, ROWS.value))),
        batch * heads,
        heads // kv_heads,
        queries,
        keys,
        math.log2(math.e) / math.sqrt(dim),
    )  # fmt: skip
    options = {
        "STAGES": config.STAGES,
        "GROUP_H": config.GROUP_H,
        "CAUSAL": causal,
        "num_warps": 4,
        "maxnreg": REGISTERS,
    }
    return arguments, options


def _described(array: Any, rows: int) -> TensorDescriptor:
    _, _, length, dim = array.shape
    block = [1, rows, dim]
    return TensorDescriptor.from_tensor(array.reshape(-1, length, dim), block, tile_layout(*block))

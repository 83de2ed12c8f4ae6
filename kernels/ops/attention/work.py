"""What a configuration of the fused attention means for the model of time: its grid, its loop and its bytes, and its
resources before anything is compiled."""

from __future__ import annotations

import math

from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import (
    AttentionConfig,
    head_blocks,
    multiplying_warps,
    registers_needed,
    shared_bytes,
    tile_heads,
    value_blocks,
    vector_bytes,
)
from tilewright.kernels.work import SPECIALIZED_REGISTERS, Panel, Work
from tilewright.tuning_db.record import Resources

# Operations of single lanes on the CUDA cores, counted in the source; softmax is what a block does beside its dots.
LANE_OPS = 5.0
"""Of one score: maximum, multiply-add, sum, and its share of packing, masks and addresses."""
ROW_OPS = 48.0
"""Of one row in one iteration: 4 lanes share it, each with 4 shuffles and 8 operations on its maximum and sum."""
SOFTCAP_OPS, BIAS_OPS, ALIBI_OPS = 4.0, 2.0, 3.0
"""Of one score, more."""


def estimate(problem: AttentionProblem, config: AttentionConfig, device: Device) -> Resources:
    """Resources before anything is compiled."""
    needed = registers_needed(problem, config, device)
    registers, most = min(MAX_REGISTERS_PER_THREAD, int(needed)), MAX_REGISTERS_PER_THREAD
    if config.WARP_SPECIALIZE and device.hopper:
        registers, most = SPECIALIZED_REGISTERS
    spilled = 4 * int(max(0.0, needed - most))
    return Resources(
        registers=registers,
        spill_bytes=spilled,
        stack_bytes=spilled,
        shared_bytes=shared_bytes(problem, config, device),
    )


def work(problem: AttentionProblem, config: AttentionConfig) -> Work:
    """The grid, the loop over keys and the bytes of one configuration.

    Tiles see different numbers of keys: the loop is that of the mean, and of causal tiles the longest see twice as many
    or all there are. Query heads that share keys share their panel of L2.
    """
    element = dtype(problem.dtype).bytes
    heads = tile_heads(problem, config)
    group = problem.H // problem.kv_heads // heads
    queries, keys = problem.lengths()
    rows = problem.Sq * heads
    tiles_m = math.ceil(rows / config.BLOCK_M)
    d = sum(head_blocks(problem.D, config.BLOCK_M, problem.smallest_dim))
    dv = sum(value_blocks(problem, config))
    # Keys that a query sees, of all there are of its sequence, and those in blocks that it has to visit.
    seen = problem.flops() / (2 * problem.H * (problem.D + problem.dim_v)) / max(1, int(queries.sum()))
    slanted = problem.causal and problem.Sq > 1
    edge = config.BLOCK_N if problem.window_left is not None else 0.5 * config.BLOCK_N if slanted else 0.0
    visited = min(float(keys.max()), seen + edge + (config.BLOCK_M / heads if problem.window_left is not None else 0.0))
    blocks = max(1, math.ceil(visited / config.BLOCK_N))
    in_block = min(config.BLOCK_N, visited)
    load = in_block * (problem.D + problem.dim_v) * element
    height = rows / tiles_m
    term = 0.0 if problem.bias is None else dtype(problem.bias).bytes
    scores = config.BLOCK_M * config.BLOCK_N
    # Rows of a causal square see all keys at the most, twice the mean; of a window, no more than it.
    longest = min(float(keys.max()), 2 * visited) if slanted else visited
    if problem.window_left is not None:
        longest = min(longest, problem.window_left + 1 + edge + config.BLOCK_M / heads)
    longest = max(longest, visited)
    each = LANE_OPS + SOFTCAP_OPS * problem.softcap + BIAS_OPS * (term > 0) + ALIBI_OPS * problem.alibi
    return Work(
        tiles_m=tiles_m,
        tiles_n=1,
        splits=config.SPLIT_KV,
        batch=problem.B * problem.H // heads,
        group_m=1,
        iterations=math.ceil(blocks / config.SPLIT_KV),
        tile_m=config.BLOCK_M,
        tile_n=config.BLOCK_N,
        tile_k=d,
        num_warps=multiplying_warps(config),
        num_stages=max(1, config.num_stages - 1) if problem.page_size else config.num_stages,
        # The second dot of fp8 is of fp16.
        unit="fp16" if problem.dtype.startswith("fp8") else problem.unit,
        operand_bytes=element,
        load_bytes=load + height * in_block * term,
        vector_bytes=vector_bytes(problem),
        panel_a=Panel(height * (problem.D * element + visited * term) / config.SPLIT_KV),
        panel_b=Panel(visited * (problem.D + problem.dim_v) * element / group / config.SPLIT_KV),
        epilogue_bytes=height * (problem.dim_v * dtype(problem.output_dtype).bytes + (4 if problem.lse else 0)),
        workspace_bytes=0.0 if config.SPLIT_KV == 1 else height * problem.dim_v * 4.0,
        launches=1 if config.SPLIT_KV == 1 else 2,
        second=(config.BLOCK_M, dv, config.BLOCK_N),
        lane_ops=each * scores + (dv + ROW_OPS) * config.BLOCK_M,
        longest=longest / visited,
        descent=tiles_m * min(config.GROUP_H, problem.B * problem.H // heads),
        overlapped=config.OVERLAP,
        specialized=config.WARP_SPECIALIZE,
        persistent=config.PERSISTENT,
        special_ops=(3 if problem.softcap else 1) * scores + 4 * config.BLOCK_M,
    )

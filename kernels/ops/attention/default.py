"""The default configuration of the fused attention: what runs when nothing is known of a problem."""

from __future__ import annotations

import math
from dataclasses import replace

from tilewright.kernels.device import Device
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import (
    AXES,
    CUT,
    AttentionConfig,
    fits,
    key_blocks,
    tile_heads,
    tiles,
    vector_bytes,
)


def default(problem: AttentionProblem, device: Device) -> AttentionConfig:
    """What runs when nothing is known: fits every problem whose grid can be launched, and does not spill."""
    special = _specialised(problem, device)
    if special is not None:
        return special
    group = problem.H // problem.kv_heads
    pack = group > 1 and problem.Sq < CUT
    rows = problem.Sq * (group if pack else 1)
    wide = 2 ** math.ceil(math.log2(max(problem.D, problem.dim_v)))
    copied = device.arch >= 80 and vector_bytes(problem) >= 4
    stages = 2 if copied else 1
    least = 16 if rows <= 16 else 32
    # Each element that is loaded by itself takes an address, each term of the scores registers of its own, and
    # mma.sync, unlike dots of a warp group, has the queries in registers.
    groups = device.has_group_dots
    narrow = not problem.aligned or not copied
    terms = problem.bias is not None or problem.softcap or problem.alibi
    # Two warp groups on 64 rows lie side by side. On an H200 one such problem came out wrong (Triton 3.6; bf16, head
    # dim 96, paged): 32 rows are for mma.sync.
    most = 32 if groups else 64
    if problem.unit == "fp32" or not device.tensor_tflops:
        # 512 multiply-adds a thread or fewer: more may spill.
        m = 16 if narrow or terms or wide > 128 else least
        n = 32 if wide <= 64 and not narrow and not terms else 16
        warps = 4 if m * wide < (2048 if narrow else 4096) else 8
        config = AttentionConfig(m, n, PACK=pack, num_warps=warps, num_stages=stages if wide <= 128 else 1)
    elif rows <= 32:
        n = 64 if wide <= 128 else 32
        # Values of 8 bits are converted before they are multiplied: beside terms that takes all 255 registers.
        converted = problem.unit == "fp8" and wide > 64 and terms
        if converted or (least == 32 and (terms or wide > 128)):
            n //= 2
        n = 16 if narrow else n
        config = AttentionConfig(least, n, PACK=pack, num_stages=3 if copied else 1)
        config = replace(config, SPLIT_KV=enough_splits(problem, config, device))
    elif narrow:
        m = min(most, (4096 if terms else 8192) // wide)
        config = AttentionConfig(m, 16, PACK=pack, num_warps=8, num_stages=stages)
    elif wide > 128 and (not groups or rows <= 64 or problem.bias is not None):
        m, warps = (32, 4) if terms else (most, 8)
        config = AttentionConfig(m, 16, PACK=pack, num_warps=warps, num_stages=stages)
    elif rows <= 64:
        few = (
            wide > 64
            or (problem.unit == "fp8" and terms)
            or (groups and (problem.bias is not None or (terms and device.major == 10)))
        )
        m = 32 if problem.unit == "fp8" and terms and wide > 64 and not groups else 64
        config = AttentionConfig(m, 16 if few else 32, PACK=pack, num_stages=stages)
    elif device.hopper and wide <= 128 and not (terms or pack or problem.page_size or problem.unit == "fp8"):
        # Two blocks on an SM, whose softmax and dots fill each other's gaps: on an H200, 4096 causal keys of bf16 take
        # 0.74 of the time of 128 rows of one block (head dim 128), and 8192 of head dim 64 take 0.85.
        config = AttentionConfig(128 if wide <= 64 else 64, 64, PACK=pack, num_warps=4, num_stages=stages + 1)
    else:
        n = 32 if wide > 128 or terms else 64
        # Rows of a bias that begin anywhere are read element by element, beside accumulators that tcgen05 hands over.
        ragged = problem.bias is not None and problem.Skv % 8 and device.major == 10
        # Packed sequences of fp8 beside a slope per head: 8 or 16 bytes too many.
        packed = problem.varlen and terms and problem.unit == "fp8"
        if ragged or (packed and wide > 128 and device.hopper) or (terms and wide > 64 and not groups):
            n = 16
        config = AttentionConfig(128, n, PACK=pack, num_warps=8, num_stages=stages)
        # Masks beside heads in two blocks and 64 keys: of 72 and 80 columns 4 to 44 bytes too many, and on sm_120 of 96
        # columns 12. Of more columns it takes rows that end within a block, too: 24 to 88 bytes.
        tailed = 64 < problem.D <= (96 if device.major == 12 else 80)
        counted = problem.varlen or problem.kv_lens or problem.window_left is not None
        ends = problem.varlen or problem.Sq * tile_heads(problem, config) % 128 != 0
        masked = counted or problem.right is not None
        if not groups and wide == 128 and ((tailed and counted) or (masked and ends)):
            config = replace(config, BLOCK_N=min(n, 32))
            if problem.D > 96 or 80 < problem.D < 96:
                # Columns beyond the head take masks of their own.
                few = 32 if problem.D == 128 else 16
                config = replace(config, BLOCK_M=64, BLOCK_N=min(n, few), num_warps=4)
        # Packed sequences of paged keys have bounds and a page number for every key: of 128 rows, or 64 keys, they
        # spill where queries are in registers.
        if problem.varlen and problem.page_size and wide == 128 and not groups:
            config = replace(config, BLOCK_M=64, BLOCK_N=min(n, 32), num_warps=4)
        if packed and wide == 128 and problem.D % 16 and device.major == 12:
            config = replace(config, BLOCK_M=64, num_warps=4)
    while fits(problem, config, device) is not None and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return replace(config, GROUP_H=enough_heads(problem, config, device))


def _specialised(problem: AttentionProblem, device: Device) -> AttentionConfig | None:
    """Hopper's default for heads of 128 without a mask: persistent blocks of three warp groups, if they fit.

    On an H200, 2 x 8192 keys of 16 heads take 0.80 of the time of the other default; with a causal mask 0.96 to 1.04.
    """
    terms = problem.bias is not None or problem.softcap or problem.alibi or problem.window_left is not None
    if not device.hopper or (problem.D, problem.dim_v) != (128, 128) or terms or problem.right is not None:
        return None
    config = AttentionConfig(128, 128, TMA=True, WARP_SPECIALIZE=True, PERSISTENT=True)
    full = problem.Skv >= 1024 and tiles(problem, config) >= 2 * device.sms
    return config if full and fits(problem, config, device) is None else None


def enough_heads(problem: AttentionProblem, config: AttentionConfig, device: Device) -> int:
    """Heads that have three tiles for every SM: where blocks are dealt out head by head, the long rows of the last one
    begin when all others are about to end. By list scheduling, 64 heads of 16 causal tiles in turns take 1.03 times as
    long as 264 blocks at once would at the best, head by head 1.32."""
    each = math.ceil(problem.Sq * tile_heads(problem, config) / config.BLOCK_M)
    if not problem.causal or tiles(problem, config) <= max(device.sms, tiles(problem, config) // each):
        return 1
    sizes = [size for size in AXES["GROUP_H"] if size > 1]
    return next((size for size in sizes if size * each >= 3 * device.sms), sizes[-1])


def enough_splits(problem: AttentionProblem, config: AttentionConfig, device: Device) -> int:
    """Splits that give every SM two blocks, of four blocks of keys or more each; on Hopper one.

    On an H200, 8 heads of 131072 keys take 147 µs in 64 splits and 130 in 32, and 128 heads of 8192 keys 145 in 4 and
    131 in one.
    """
    wanted = 0.95 * device.sms if device.hopper else 2 * device.sms
    splits, blocks = 1, tiles(problem, config)
    while splits < 64 and blocks * splits < wanted and key_blocks(problem, config) >= 8 * splits:
        splits *= 2
    return splits

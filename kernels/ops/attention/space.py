"""The configurations of the fused attention: axes and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.problem import Config
from tilewright.kernels.space import (
    NOTHING_COPIED,
    Space,
    malformed,
    mostly_padding,
    needless_split,
    over_block,
    over_grid,
    repeated_group,
)
from tilewright.kernels.work import SPECIALIZED_WARPS, reads_operands_shared


@dataclass(frozen=True, slots=True)
class AttentionConfig(Config):
    """Tile, split and pipeline of one attention. docs/attention.md has every field."""

    BLOCK_M: int  # rows of a tile: queries, or queries times the heads of a group
    BLOCK_N: int  # keys of one iteration
    SPLIT_KV: int = 1  # blocks that share one tile's keys; deterministic, through a workspace and a second launch
    PACK: bool = False  # the heads of a group share a tile, and so each key's only read
    GROUP_H: int = 1  # heads whose tiles take turns, so that long rows of all of them come before short ones
    OVERLAP: bool = False  # the values of a block are multiplied during the softmax of the next
    TMA: bool = False  # keys and values come by tensor descriptors, whole blocks at a time
    WARP_SPECIALIZE: bool = False  # on Hopper, one warp group copies what two others compute with
    PERSISTENT: bool = False  # one such block an SM, which goes from tile to tile
    num_warps: int = 4
    num_stages: int = 2


AXES = {
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "SPLIT_KV": (1, 2, 4, 8, 16, 32, 64),
    "PACK": (False, True),
    "GROUP_H": (1, 8, 32),
    "OVERLAP": (False, True),
    "TMA": (False, True),
    "WARP_SPECIALIZE": (False, True),
    "PERSISTENT": (False, True),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}

CUT = 64
"""Rows from which on head dims are cut in two blocks. Lower tiles are for decoding, which waits for memory, not for
padded dots, and which needs dots as wide as they can be, for its warps lie side by side along them."""

MOST_NEEDED = 300
"""Estimated registers of a thread with which some kernels still compile without a spill."""

LARGEST_BOX = 256
"""Most elements of a dimension that a tensor descriptor's load has (CUDA driver API, `cuTensorMapEncodeTiled`)."""

FMA_LOOP = 1024
"""Most multiply-adds of a thread in one dot on CUDA cores, which is unrolled whole: with 4096, ptxas takes 10 s and
spills."""


def multiplying_warps(config: AttentionConfig) -> int:
    """Warps that hold the scores and sums of a tile."""
    return 2 * config.num_warps if config.WARP_SPECIALIZE else config.num_warps


def head_blocks(dim: int, rows: int, smallest: int) -> tuple[int, int]:
    """Powers of two that hold a head dim, for tiles of so many rows: 96 is 64 and 32, or 128 and 0 for few rows or
    fp8."""
    block = 2 ** int(math.log2(dim))
    rest = dim - block
    if rest == 0:
        return block, 0
    # Of fp8, whose smallest dot is wider, the last columns of 72, 80 and 96 came out wrong on an H200 as 64 and a rest
    # (Triton 3.6; the interpreter has them right, and the GPU 40, 160 and 192).
    if rows < CUT or (smallest > 16 and block == 64):
        return 2 * block, 0
    return block, max(smallest, 2 ** math.ceil(math.log2(rest)))


def value_blocks(problem: AttentionProblem, config: AttentionConfig) -> tuple[int, int]:
    """The blocks of a head dim of V.

    Triton lays the warps of chained dots out along the rows if the second is no wider than high; else along its
    columns, and all weights go through shared memory. So values are cut at the height of the tile, where two blocks do.
    """
    rows, dim = config.BLOCK_M, problem.dim_v
    # No narrower than those of keys: fp8 tails of 16 have failed on an H200 (illegal address; Triton 3.6, head dim 40).
    block, tail = head_blocks(dim, rows, problem.smallest_dim)
    halves = CUT <= rows < block and dim <= 2 * rows and not (problem.smallest_dim > 16 and 64 < dim < 128)
    return (rows, rows) if halves else (block, tail)


def tile_heads(problem: AttentionProblem, config: AttentionConfig) -> int:
    """Query heads whose rows share a tile."""
    return problem.H // problem.kv_heads if config.PACK else 1


def tiles(problem: AttentionProblem, config: AttentionConfig) -> int:
    """Tiles of rows, of all heads and sequences."""
    heads = tile_heads(problem, config)
    return math.ceil(problem.Sq * heads / config.BLOCK_M) * (problem.H // heads) * problem.B


def key_blocks(problem: AttentionProblem, config: AttentionConfig) -> int:
    """Blocks of keys that one tile can see at the most, in sequences of no more than Sq queries."""
    most = math.ceil(problem.Skv / config.BLOCK_N)
    if problem.window_left is None:
        return most
    queries = min(problem.Sq, (config.BLOCK_M - 1) // tile_heads(problem, config) + 2)
    span = problem.Sq if problem.right is None else queries + problem.right
    return min(most, math.ceil((span + problem.window_left) / config.BLOCK_N) + 1)


def vector_bytes(problem: AttentionProblem) -> int:
    """Widest load of q, k and v that their alignment allows, in bytes: 16, or the power of two in the length of a dense
    row; single elements for unaligned ones."""
    return _vector(problem, math.gcd(problem.D, problem.dim_v))


def _vector(problem: AttentionProblem, dim: int) -> int:
    """Likewise of one array whose heads have that dim."""
    element = int(dtype(problem.dtype).bytes)
    if not problem.aligned:
        return element
    if problem.strided:
        return 16
    row = dim * element
    return min(16, row & -row)


def keeps_operands_shared(problem: AttentionProblem, config: AttentionConfig, device: Device) -> bool:
    """Whether dots read their operands from shared memory."""
    return reads_operands_shared(device, problem.unit, config.BLOCK_M, config.num_warps)


def along_rows(problem: AttentionProblem, config: AttentionConfig) -> bool:
    """Whether warps lie along the rows of both dots of mma.sync: see `value_blocks`."""
    block, tail = value_blocks(problem, config)
    return (tail or block) <= config.BLOCK_M


def copies_ahead(problem: AttentionProblem, config: AttentionConfig, device: Device) -> int:
    """Blocks of keys that cp.async fetches while another is computed; 0 without a pipeline."""
    return 0 if vector_bytes(problem) < 4 else _depth(problem, config, device)


def _depth(problem: AttentionProblem, config: AttentionConfig, device: Device) -> int:
    """Blocks that cp.async fetches ahead of what it can fetch at all: 4 bytes at a time or more."""
    if device.arch < 80 or config.num_stages < 2:
        return 0
    # The page numbers take every other stage for themselves, where keys or values are copied ahead.
    halved = problem.page_size and max(_vector(problem, dim) for dim in (problem.D, problem.dim_v)) >= 4
    return max(1, (config.num_stages - 1) // 2) if halved else config.num_stages - 1


def shared_bytes(problem: AttentionProblem, config: AttentionConfig, device: Device) -> int:
    """Shared memory of the main loop, in bytes. The compiled kernel may take more (for layouts of results on their way
    out), never less."""
    element = int(dtype(problem.dtype).bytes)
    m, n = config.BLOCK_M, config.BLOCK_N
    d, dv = head_blocks(problem.D, m, problem.smallest_dim), value_blocks(problem, config)
    in_place = keeps_operands_shared(problem, config, device)
    # Blocks of the head dim that are too small for 4 bytes a thread are not copied ahead.
    least = 4 * config.num_warps * WARP_SIZE
    k, v = (n * element * sum(part for part in parts if part * n * element >= least) for parts in (d, dv))
    # e5m2 is widened to fp16 where there is no mma of it.
    q = m * sum(d) * (2 if problem.dtype == "fp8e5m2" and device.arch < 89 else element)
    on_columns = problem.unit == "fp32" or not (in_place or along_rows(problem, config))
    weights = m * n * max(2, element) if on_columns else 0
    ahead = copies_ahead(problem, config, device)
    if ahead:
        total = q + ahead * (k + v) + weights
    else:
        total = q + max(n * max(d) * element, 0 if element == 1 else n * max(dv) * element + weights)
    if ahead and in_place:
        # One more buffer, for the block that is being read; of fp8 values it is of fp16. tcgen05 has none for keys in
        # two blocks.
        total += 0 if device.arch >= 100 and d[1] else k
        total += 2 * n * max(dv) if element == 1 else v
    if config.PERSISTENT:
        total += (config.num_stages - 1) * q  # the next tile's queries are copied ahead like keys
    if config.WARP_SPECIALIZE and dtype(problem.output_dtype).bytes == 4:
        total += m * sum(dv) * 4  # results on their way out, beside the operands of the next tile
    # Under OVERLAP a bias is loaded where it is added: the loop that would copy it ahead has another block of keys.
    if problem.bias is not None and not config.OVERLAP:
        term = int(dtype(problem.bias).bytes)
        if m * n * term >= least and (term >= 4 or (problem.aligned and (problem.strided or problem.Skv % 16 == 0))):
            total += _depth(problem, config, device) * m * n * term
    return total


def registers_needed(problem: AttentionProblem, config: AttentionConfig, device: Device) -> float:
    """Registers of a thread that would spare it every spill: accumulators, scores and their weights, queries, a 64-bit
    address per copy of 16 bytes (or a narrower load's address, mask and data), and a base. The factors are read off 250
    kernels compiled for sm_80 to sm_100."""
    threads = multiplying_warps(config) * WARP_SIZE
    m, n = config.BLOCK_M, config.BLOCK_N
    d, dv = sum(head_blocks(problem.D, m, problem.smallest_dim)), sum(value_blocks(problem, config))
    held, scores = m * dv / threads, m * n / threads
    if problem.unit == "fp32" or not device.tensor_tflops:
        # Dots are unrolled whole, and most of their operands are loaded before the first multiply-add.
        return 50 + held + scores + 0.1 * m * n * max(d, dv) / threads
    in_place, on_rows = keeps_operands_shared(problem, config, device), along_rows(problem, config)
    repeated = max(1.0, 16 * config.num_warps / m) if in_place or on_rows else 1.0  # warps with the same rows
    element = int(dtype(problem.dtype).bytes)
    queries = 0.0 if in_place or not on_rows else 0.4 * m * d * element / 4 / threads
    loaded = 0.0 if config.TMA else n * (d + dv) / threads
    addresses = 1.5 * loaded * element / 16 if vector_bytes(problem) == 16 else 0.8 * loaded
    held_factor, score_factor = (1.0, 1.1) if in_place and device.major == 10 else (1.3, 1.45)
    if config.OVERLAP:
        # The weights of the block before stay in fp32, and its values have addresses of their own.
        addresses *= 2
        score_factor += 0.35
    return 55 + repeated * (held_factor * held + score_factor * scores + queries) + addresses


def fits(problem: AttentionProblem, config: AttentionConfig, device: Device) -> str | None:
    """None, or the limit that the configuration breaks, with the values."""
    limit = malformed(config, ("BLOCK_M", "BLOCK_N", "SPLIT_KV", "GROUP_H", "num_warps"))
    if limit is not None:
        return limit
    if min(config.BLOCK_M, config.BLOCK_N) < 16:
        return "the smallest tile of two dots is 16×16"
    if config.PACK and problem.kv_heads == problem.H:
        return f"PACK=True needs query heads that share key heads, and H={problem.H} are as many as Hkv={problem.Hkv}"
    for name in ("OVERLAP", "TMA"):
        if problem.page_size and getattr(config, name):
            return f"{name} is for keys that lie one behind the other, not in pages of {problem.page_size}"
    if config.TMA:
        limit = _refused_by_descriptors(problem, config)
        if limit is not None:
            return limit
    if config.WARP_SPECIALIZE:
        limit = _refused_by_specialisation(problem, config)
        if limit is not None:
            return limit
    elif config.PERSISTENT:
        return "PERSISTENT goes with WARP_SPECIALIZE"
    held = config.BLOCK_M * sum(value_blocks(problem, config)) / (multiplying_warps(config) * WARP_SIZE)
    limit = over_block(config, device, held=held, shared_bytes=shared_bytes(problem, config, device))
    if limit is not None:
        return limit
    # Positions are 32-bit, those of the last block's padding too.
    rows = problem.Sq * tile_heads(problem, config) + config.BLOCK_M
    if max(rows, problem.Skv + problem.Sq + config.BLOCK_N * (config.SPLIT_KV + 1)) >= 2**31:
        return f"positions in {problem.Sq} queries of {problem.H} heads and {problem.Skv} keys pass 32 bits"
    if config.GROUP_H * math.ceil(rows / config.BLOCK_M) >= 2**31:
        return f"tiles of GROUP_H={config.GROUP_H} heads of {problem.Sq} queries pass 32 bits"
    blocks = problem.B * problem.H * problem.Sq if config.SPLIT_KV > 1 else tiles(problem, config)
    return over_grid(blocks, SPLIT_KV=config.SPLIT_KV)


def _refused_by_descriptors(problem: AttentionProblem, config: AttentionConfig) -> str | None:
    """None, or why tensor descriptors can't read the keys and values."""
    element = dtype(problem.dtype).bytes
    dense = () if problem.strided else (problem.D, problem.dim_v)
    if not problem.aligned or any(dim * element % 16 for dim in dense):
        return "TMA needs keys and values whose every row starts at 16 bytes"
    for name, (block, tail) in (
        ("D", head_blocks(problem.D, config.BLOCK_M, problem.smallest_dim)),
        ("Dv", value_blocks(problem, config)),
    ):
        if tail not in (0, block):
            return f"TMA reads blocks of one width, and {name} is computed as {block} and {tail}"
        if max(config.BLOCK_N, block) > LARGEST_BOX:
            return f"TMA reads at the most {LARGEST_BOX} rows and columns at once, not {config.BLOCK_N} and {block}"
    return None


def _refused_by_specialisation(problem: AttentionProblem, config: AttentionConfig) -> str | None:
    """None, or why Triton can't give the loop's copies to warps of their own."""
    if not config.TMA or config.OVERLAP or config.PACK or config.SPLIT_KV > 1:
        return "WARP_SPECIALIZE goes with TMA, and without OVERLAP, PACK and SPLIT_KV"
    if config.num_warps != SPECIALIZED_WARPS or config.BLOCK_M < 128:
        return (
            f"WARP_SPECIALIZE is for num_warps={SPECIALIZED_WARPS} and BLOCK_M of 128 or more, 64 for each group that "
            f"multiplies, not num_warps={config.num_warps} and BLOCK_M={config.BLOCK_M}"
        )
    if problem.unit not in ("fp16", "bf16") or problem.bias is not None or problem.varlen:
        return "WARP_SPECIALIZE is for fp16 and bf16, without bias, and sequences of one length"
    tails = head_blocks(problem.D, config.BLOCK_M, problem.smallest_dim)[1], value_blocks(problem, config)[1]
    if any(tails):
        return f"WARP_SPECIALIZE is for head dims of one block each, not D={problem.D} and Dv={problem.dim_v}"
    if config.PERSISTENT:
        # One descriptor reads the rows of all heads, and knows no end of one.
        if problem.strided or problem.kv_lens:
            return "PERSISTENT is for dense queries, keys and values, all of one length"
        if problem.Sq % config.BLOCK_M or problem.Skv % config.BLOCK_N:
            return (
                f"PERSISTENT is for lengths that the blocks divide, not Sq={problem.Sq} by {config.BLOCK_M} and "
                f"Skv={problem.Skv} by {config.BLOCK_N}"
            )
        if problem.B * max(problem.H * problem.Sq, problem.kv_heads * problem.Skv) >= 2**31:
            return f"the rows of B={problem.B} sequences of H={problem.H} heads pass 32 bits"
    return None


def useful(problem: AttentionProblem, config: AttentionConfig, device: Device) -> str | None:
    """None, or why the configuration can't be the best one."""
    m, n, warps = config.BLOCK_M, config.BLOCK_N, config.num_warps
    rows = problem.Sq * tile_heads(problem, config)
    reason = mostly_padding((m, rows, 16), (n, problem.Skv, 16))
    if reason is not None:
        return reason
    places = problem.B * problem.H // tile_heads(problem, config)
    if config.GROUP_H > 1 and (not problem.causal or tiles(problem, config) <= max(places, device.sms)):
        return f"GROUP_H={config.GROUP_H} is for causal tiles of several lengths, more than run at once"
    reason = repeated_group("GROUP_H", config.GROUP_H, AXES["GROUP_H"], places, "heads")
    if reason is not None:
        return reason
    if config.PACK and problem.Sq >= m:
        return f"{problem.Sq} queries fill a tile of {m} rows without the other heads"
    blocks = key_blocks(problem, config)
    if config.SPLIT_KV > 1:
        if blocks < 2 * config.SPLIT_KV:
            return f"SPLIT_KV={config.SPLIT_KV} leaves fewer than 2 of {blocks} blocks of keys to each"
        reason = needless_split("SPLIT_KV", config.SPLIT_KV, tiles(problem, config), device, waves=4)
        if reason is not None:
            return reason
    if config.num_stages > max(2, blocks // config.SPLIT_KV):
        return f"num_stages={config.num_stages} is more than the blocks of keys there are"
    if config.num_stages > 1 and copies_ahead(problem, config, device) == 0:
        return NOTHING_COPIED
    if problem.page_size == 0 and config.num_stages > 4:
        return "5 stages are for paged keys, whose page numbers take one"
    if problem.unit == "fp32" or not device.tensor_tflops:
        products = m * n * max(problem.D, problem.dim_v) / (warps * WARP_SIZE)
        if products > FMA_LOOP:
            return f"a dot of {products:.0f} multiply-adds a thread, unrolled, compiles for too long, and spills"
        if m * n < 4 * warps * WARP_SIZE:
            return f"{warps} warps have fewer than 4 of {m}×{n} scores a thread"
    elif keeps_operands_shared(problem, config, device) or along_rows(problem, config):
        if 16 * warps > m:
            return f"{warps} warps of 16 rows are more than {m} rows have"
    elif 8 * warps > min(n, sum(value_blocks(problem, config))):
        return f"{warps} warps of 8 columns are more than {n} keys or a head have"
    if config.OVERLAP or config.TMA:
        name = "OVERLAP" if config.OVERLAP else "TMA"
        if not device.hopper or not keeps_operands_shared(problem, config, device):
            return f"{name} is for warp groups of wgmma (sm_90, 64 rows or more), which run beside other work"
        if config.num_stages < 2:
            return f"{name} without copies ahead (num_stages={config.num_stages}) has nothing to run beside"
        if blocks // config.SPLIT_KV < (2 if config.PERSISTENT else 4):
            return f"{name} takes longer to start than it saves in {blocks // config.SPLIT_KV} blocks of keys"
    if config.PERSISTENT and tiles(problem, config) < 2 * device.sms:
        return f"{tiles(problem, config)} tiles on {device.sms} SMs leave PERSISTENT blocks fewer than 2 each"
    if device.has_group_dots and m >= 64 and warps < 4 and problem.unit != "fp32":
        return f"{warps} warps are no warp group: no wgmma, no tcgen05"
    needed = registers_needed(problem, config, device)
    if needed > MOST_NEEDED:
        return f"about {needed:.0f} registers a thread are so many over {MAX_REGISTERS_PER_THREAD} that they spill"
    return None


COARSE = {
    "BLOCK_M": (16, 64, 128),
    "BLOCK_N": (32, 64, 128),
    "SPLIT_KV": (1, 4, 16),
    "GROUP_H": (1, 32),
    "OVERLAP": (False,),
    "TMA": (False,),
    "WARP_SPECIALIZE": (False,),
    "PERSISTENT": (False,),
    "num_stages": (2, 3),
}


def narrow(
    problem: AttentionProblem, device: Device, axes: Mapping[str, tuple[Any, ...]]
) -> Mapping[str, tuple[Any, ...]]:
    """The axes without what is useless for a problem whatever the others are."""
    kept = dict(axes)
    if problem.kv_heads == problem.H or max(axes["BLOCK_M"]) <= problem.Sq:
        kept["PACK"] = (False,)
    # The fewest tiles there can be, and the fewest that leave a split no use.
    least = problem.B * problem.kv_heads * math.ceil(problem.Sq / max(axes["BLOCK_M"]))
    kept["SPLIT_KV"] = tuple(s for s in axes["SPLIT_KV"] if s == 1 or least * (s // 2) < 4 * device.sms)
    if not problem.causal:
        kept["GROUP_H"] = tuple(size for size in axes["GROUP_H"] if size == 1)
    if not device.hopper or problem.page_size or problem.unit == "fp32":
        kept["OVERLAP"] = kept["TMA"] = kept["WARP_SPECIALIZE"] = (False,)
    if problem.bias is not None or problem.varlen or problem.unit not in ("fp16", "bf16"):
        kept["WARP_SPECIALIZE"] = (False,)
    if kept["WARP_SPECIALIZE"] == (False,) or problem.strided or problem.kv_lens:
        kept["PERSISTENT"] = (False,)
    if device.arch < 80 or vector_bytes(problem) < 4:
        kept["num_stages"] = tuple(s for s in axes["num_stages"] if s == min(axes["num_stages"]))
    return kept


SPACE: Space[AttentionProblem, AttentionConfig] = Space(AttentionConfig, AXES, fits, useful, COARSE, narrow)


def ragged(problem: AttentionProblem, config: AttentionConfig) -> AttentionProblem:
    """A problem of at most two tiles of rows for each head, the last one cut, and keys that end within a block, after
    splits of unequal length; two heads of keys, and three sequences where they differ in length. A number of keys that
    is a multiple of 16 stays one, for alignment decides how a bias is loaded."""
    heads = problem.H // problem.kv_heads
    kv_heads = min(problem.kv_heads, 2)
    # Of three queries the first can still be kept from the last by a window to the right.
    queries = min(problem.Sq, max(3, (2 * config.BLOCK_M - 1) // tile_heads(problem, config)))
    # What overlaps does so from one block of keys that is seen whole to the next.
    most = 2 * config.SPLIT_KV + (3 if config.OVERLAP else 1)
    blocks = max(2, min(math.ceil(problem.Skv / config.BLOCK_N), most))
    kept = 16 if problem.Skv % 16 == 0 else 1
    keys = problem.Skv
    if problem.Skv % 16 == 0 or problem.Skv >= config.BLOCK_N:
        keys = (blocks - 1) * config.BLOCK_N + max(kept, config.BLOCK_N - kept)
    if problem.page_size:
        unit = problem.page_size if kept == 1 else math.lcm(problem.page_size, kept)
        keys = math.ceil(keys / unit) * unit
        if kept == 1 and keys % 16 == 0:
            keys += problem.page_size
    if config.PERSISTENT:  # nothing is cut
        queries = min(problem.Sq, 2 * config.BLOCK_M)
        keys = min(problem.Skv, blocks * config.BLOCK_N)
    return replace(
        problem,
        B=min(problem.B, 3 if problem.varlen or problem.kv_lens else 2),
        H=heads * kv_heads,
        Hkv=kv_heads,
        Sq=queries,
        Skv=keys,
        # As much narrower that they still mask something.
        window_left=None if problem.window_left is None else min(problem.window_left, keys // 2),
        window_right=None if problem.window_right is None else min(problem.window_right, max(1, queries // 2)),
    )

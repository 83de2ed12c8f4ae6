"""The configurations of the fused convolution: axes and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
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
    widest_block,
)
from tilewright.kernels.work import reads_operands_shared


@dataclass(frozen=True, slots=True)
class Conv2dConfig(Config):
    """Tile, walk, split and pipeline of one convolution.

    The depthwise kernel has no dot: BLOCK_K, GROUP_M, SPLIT_K, FOLD and num_stages change nothing there. ROWS is for it
    alone. docs/conv2d.md has every field.
    """

    BLOCK_M: int  # output pixels
    BLOCK_N: int  # output channels of one group
    BLOCK_K: int = 32  # depth of one iteration: channels under one tap or, folded, of all taps in a row
    GROUP_M: int = 1  # tile rows walked together, for L2
    SPLIT_K: int = 1  # blocks that share one tile's depth; deterministic, through a workspace
    FOLD: bool = False  # the channels of all taps are one depth, padded once: for few channels
    num_warps: int = 4
    num_stages: int = 3
    ROWS: int = 1  # depthwise: such tiles of output pixels below each other, which share what they read


AXES = {
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128),
    "GROUP_M": (1, 8),
    "SPLIT_K": (1, 2, 4, 8, 16),
    "FOLD": (False, True),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "ROWS": (1, 2, 4, 8),
}

WITHOUT_DOTS = ("BLOCK_K", "GROUP_M", "SPLIT_K", "FOLD", "num_stages")
"""Axes that the depthwise kernel has no use for: it takes the first value of each."""

LEAST_FOR_TAPS = 64
"""From so many channels on, taps in blocks of channels waste little, and folding only costs address arithmetic."""


def vector_bytes(problem: Conv2dProblem, config: Conv2dConfig) -> tuple[int, int]:
    """Widest loads of x and of w that their alignment allows, in bytes.

    Sizes are known to be divisible by 16 or by nothing, so that a pixel's channels are read 16 bytes at a time or one
    by one; folded, their number is a constant, and as wide a load as divides it will do. In NCHW the padding puts
    pixels off every boundary.
    """
    element = int(dtype(problem.dtype).bytes)

    def widest(run: int) -> int:
        return min(16, (run & -run) * element) if problem.aligned else element

    channels, taps = problem.group_channels, problem.R * problem.S
    if problem.depthwise:
        in_row = problem.layout == "nhwc" and problem.K == problem.C and problem.C % 16 == 0
        return (16 if problem.aligned and in_row else element), element
    if config.FOLD:
        x = widest(channels) if problem.w_layout == "krsc" else element
        return (x if problem.layout == "nhwc" else element), widest(problem.depth)
    in_blocks = 16 if problem.aligned and channels % 16 == 0 else element
    x = in_blocks if problem.layout == "nhwc" else element
    return x, (in_blocks if problem.w_layout == "krsc" or taps == 1 else element)


def tile_vector_bytes(problem: Conv2dProblem, config: Conv2dConfig) -> tuple[int, int]:
    """Widest loads of the tiles of x and w: alignment's, or less where a tile is too small for all threads."""
    element = int(dtype(problem.dtype).bytes)
    threads = config.num_warps * WARP_SIZE
    depth = 1 if problem.depthwise else config.BLOCK_K
    rows = (config.BLOCK_M * (config.BLOCK_N if problem.depthwise else 1), config.BLOCK_N)
    x, w = (
        min(widest, max(element, size * depth * element // threads))
        for widest, size in zip(vector_bytes(problem, config), rows, strict=True)
    )
    return x, w


def dot_tile(problem: Conv2dProblem, config: Conv2dConfig) -> tuple[int, int]:
    """Rows and columns of the dot: pixels by channels in NHWC, channels by pixels in NCHW."""
    tile = (config.BLOCK_M, config.BLOCK_N)
    return tile if problem.layout == "nhwc" else tile[::-1]


def keeps_operands_shared(problem: Conv2dProblem, config: Conv2dConfig, device: Device) -> bool:
    """Whether the dot becomes wgmma or tcgen05, which read operands from shared memory: 64 rows and a warp group."""
    rows, _ = dot_tile(problem, config)
    return reads_operands_shared(device, problem.unit, rows, config.num_warps)


def shared_bytes(problem: Conv2dProblem, config: Conv2dConfig, device: Device) -> int:
    """Shared memory of the main loop, in bytes; the compiled kernel may take more, never less.

    As for a GEMM: a copy of each operand tile per stage, less the one that mma.sync has in registers already; one copy
    of a tile that cp.async can't bring, or that has to be turned for an 8-bit dot. One copy of a word per thread may
    not be there at all: it goes from thread to thread.
    """
    if problem.depthwise:
        return 0
    element = int(dtype(problem.dtype).bytes)
    keeps_all = keeps_operands_shared(problem, config, device)
    # int8 is mma.sync on sm_100 with Triton 3.6, and tcgen05 with 3.9.
    fewer = device.major == 10 and problem.unit == "int8"
    stages = config.num_stages if keeps_all and not fewer else config.num_stages - 1
    if device.arch < 80:
        stages = 1
    x_vector, w_vector = tile_vector_bytes(problem, config)
    turned = element == 1 and problem.layout == "nchw"  # pixels lie along the lanes, and a dot wants the depth there
    tiles = [
        (rows * config.BLOCK_K * element, max(1, copies))
        for rows, copies in (
            (config.BLOCK_M, stages if x_vector >= 4 and not turned else 1),
            (config.BLOCK_N, stages if w_vector >= 4 else 1),
        )
    ]
    largest = max(tile for tile, _ in tiles)
    single = all(copies == 1 for _, copies in tiles) and not keeps_all
    if single and problem.unit == "fp32" and config.BLOCK_N == config.BLOCK_K == 16:
        return min(tile for tile, _ in tiles)  # CUDA cores may have the rows of x in the threads that loaded them
    if single and (element == 1 or config.BLOCK_K * element <= 32):
        # Bytes, and tiles one mma deep, may pass one tile after the other; of the latter, half a tile.
        return largest if config.BLOCK_K * element > 32 else largest // 2
    word = 4 * WARP_SIZE * config.num_warps
    return sum(tile * copies for tile, copies in tiles if copies > 1 or tile > word)


def accumulators(config: Conv2dConfig) -> float:
    """Sums per thread."""
    return config.BLOCK_M * config.BLOCK_N * config.ROWS / (config.num_warps * WARP_SIZE)


def positions(problem: Conv2dProblem, config: Conv2dConfig) -> int:
    """What is dealt out BLOCK_M at a time: output pixels; of the depthwise kernel, the first of ROWS below each
    other."""
    return problem.pixels if not problem.depthwise else problem.N * math.ceil(problem.P / config.ROWS) * problem.Q


def rows_read(problem: Conv2dProblem, config: Conv2dConfig) -> int:
    """Rows of x that the depthwise kernel loads for each column of taps."""
    return (config.ROWS - 1) * problem.stride_h + (problem.R - 1) * problem.dilation_h + 1


LOADS_AHEAD = 3
"""Rows of x that a step of the depthwise kernel's loop loads, at the least, so that one is waited for with others."""

MOST_UNROLLED = 16
"""Taps of a row that are multiplied without a loop. Of 128, compiling takes 40 s and some spill; of 256, minutes."""


def taps_at_once(problem: Conv2dProblem, config: Conv2dConfig) -> int:
    """Columns of taps in a step of the depthwise kernel's loop: of one row of output, of a row of taps all, unless they
    are very many."""
    if config.ROWS == 1:
        return problem.S if problem.S <= MOST_UNROLLED else 8
    return min(problem.S, math.ceil(LOADS_AHEAD / rows_read(problem, config)))


def fits(problem: Conv2dProblem, config: Conv2dConfig, device: Device) -> str | None:
    """None, or the limit that the configuration breaks, with the values."""
    limit = malformed(config, ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"))
    if limit is not None:
        return limit
    if not problem.depthwise:
        if config.ROWS > 1:
            return f"ROWS={config.ROWS} is for depthwise convolutions"
        least_k = max(16, 32 // int(dtype(problem.dtype).bytes))
        if min(config.BLOCK_M, config.BLOCK_N) < 16 or least_k > config.BLOCK_K:
            return f"the smallest tile of a {problem.dtype} dot is 16×16×{least_k}"
        if config.FOLD and problem.depth >= 2**31:
            return f"{problem.depth} products a sum pass 32 bits in one depth: FOLD must be false"
    shared = shared_bytes(problem, config, device)
    limit = over_block(config, device, held=accumulators(config), shared_bytes=shared)
    if limit is not None:
        return limit
    # Positions are 32-bit, those of the last block's padding too, and so are those of the tiles in a group.
    tiles_n = math.ceil(filters_across(problem) / config.BLOCK_N)
    reach = problem.dilation_h * (problem.R - 1), problem.dilation_w * (problem.S - 1)
    ends = (
        max(problem.pixels, positions(problem, config)) + config.BLOCK_M,
        problem.K + config.BLOCK_N,
        problem.group_channels + config.BLOCK_K,
        depth_blocks(problem, config) + config.SPLIT_K,
        config.GROUP_M * tiles_n,
    )
    if max(ends) >= 2**31:
        return f"positions in {problem.pixels} pixels by {problem.K} channels pass 32 bits"
    # Between the channels of a block lie all taps, if they don't follow each other.
    channels = min(config.BLOCK_K, problem.group_channels)
    if not config.FOLD and problem.w_layout == "kcrs" and (channels - 1) * problem.R * problem.S >= 2**31:
        return f"{channels} channels of w, {problem.R}×{problem.S} taps apart, pass 32 bits"
    rows = math.ceil(problem.P / config.ROWS) * config.ROWS
    for name, size, stride, taps in (
        ("rows", rows, problem.stride_h, reach[0]),
        ("columns", problem.Q, problem.stride_w, reach[1]),
    ):
        if size * stride + taps >= 2**31:
            return f"{size} {name} of the result, {stride} apart in x, and taps that reach {taps} further pass 32 bits"
    tiles = math.ceil(positions(problem, config) / config.BLOCK_M) * tiles_n * _batch(problem)
    return over_grid(tiles, SPLIT_K=config.SPLIT_K)


def filters_across(problem: Conv2dProblem) -> int:
    """Columns of the implicit GEMM; of the depthwise kernel, all channels."""
    return problem.K if problem.depthwise else problem.group_filters


def _batch(problem: Conv2dProblem) -> int:
    return 1 if problem.depthwise else problem.groups


def depth_blocks(problem: Conv2dProblem, config: Conv2dConfig) -> int:
    """Steps of the loop over the depth, before it is split."""
    if config.FOLD:
        return math.ceil(problem.depth / config.BLOCK_K)
    return problem.R * problem.S * math.ceil(problem.group_channels / config.BLOCK_K)


def useful(problem: Conv2dProblem, config: Conv2dConfig, device: Device) -> str | None:
    """None, or why the configuration can't be the best one."""
    if problem.depthwise:
        return _useful_depthwise(problem, config)
    channels = problem.group_channels
    if config.FOLD and channels % 16 == 0 and channels >= LEAST_FOR_TAPS:
        return f"taps in blocks of {channels} channels waste nothing that FOLD could save"
    if not config.FOLD and channels < 8:
        return f"{channels} channels under a tap leave most of a block empty: FOLD"
    tiles_m = math.ceil(problem.pixels / config.BLOCK_M)
    reason = mostly_padding(
        (config.BLOCK_M, problem.pixels, 16),
        (config.BLOCK_N, problem.group_filters, 16),
        (config.BLOCK_K, problem.depth if config.FOLD else channels, 32),
    ) or repeated_group("GROUP_M", config.GROUP_M, AXES["GROUP_M"], tiles_m, "tile rows")
    if reason is not None:
        return reason
    tiles_n = math.ceil(problem.group_filters / config.BLOCK_N)
    if tiles_n == 1 and config.GROUP_M > 1:
        return f"GROUP_M={config.GROUP_M} repeats 1 with one tile column"
    blocks = depth_blocks(problem, config)
    if config.SPLIT_K > 1:
        if blocks < 4 * config.SPLIT_K:
            return f"SPLIT_K={config.SPLIT_K} leaves fewer than 4 of {blocks} steps to each"
        reason = needless_split("SPLIT_K", config.SPLIT_K, tiles_m * tiles_n * problem.groups, device, waves=2)
        if reason is not None:
            return reason
    if config.num_stages > max(2, blocks // config.SPLIT_K):
        return f"num_stages={config.num_stages} is more than the steps there are"
    if 16 * 8 * config.num_warps > config.BLOCK_M * config.BLOCK_N:
        return f"{config.num_warps} warps on {config.BLOCK_M}×{config.BLOCK_N} leave less than one 16×8 mma each"
    if config.num_stages > 1 and (device.arch < 80 or max(vector_bytes(problem, config)) < 4):
        return NOTHING_COPIED
    return None


def _useful_depthwise(problem: Conv2dProblem, config: Conv2dConfig) -> str | None:
    for name in WITHOUT_DOTS:
        if getattr(config, name) != AXES[name][0]:
            return f"{name}={getattr(config, name)} changes nothing in a kernel without dots"
    if config.ROWS >= 2 * problem.P:
        return f"ROWS={config.ROWS} over {problem.P} rows are mostly padding"
    reason = mostly_padding((config.BLOCK_M, positions(problem, config), 16), (config.BLOCK_N, problem.K, 16))
    if reason is not None:
        return reason
    if not 4 <= accumulators(config) <= 64:
        return f"{accumulators(config):g} sums a thread: 4 to 64 hide latency without filling the registers"
    return None


# Without 8 warps: a first call runs what it predicts unchecked; see `default`.
COARSE = {"BLOCK_K": (16, 32, 64), "GROUP_M": (1,), "SPLIT_K": (1, 4), "num_warps": (2, 4), "num_stages": (1, 3, 4)}


def narrow(
    problem: Conv2dProblem, device: Device, axes: Mapping[str, tuple[Any, ...]]
) -> Mapping[str, tuple[Any, ...]]:
    """The values of each axis that `useful` accepts with some values of the others."""
    kept = dict(axes)
    if problem.depthwise:
        kept |= {name: axes[name][:1] for name in WITHOUT_DOTS}
        kept["ROWS"] = tuple(rows for rows in axes["ROWS"] if rows < 2 * problem.P)
    else:
        kept["ROWS"] = axes["ROWS"][:1]
    channels, filters = problem.group_channels, problem.K if problem.depthwise else problem.group_filters
    for name, size, smallest in (
        ("BLOCK_M", problem.pixels, 16),
        ("BLOCK_N", filters, 16),
        ("BLOCK_K", max(problem.depth, channels), 32),
    ):
        kept[name] = tuple(block for block in kept[name] if block <= widest_block(size, smallest))
    if not problem.depthwise:
        if channels < 8:
            kept["FOLD"] = (True,)
        elif channels % 16 == 0 and channels >= LEAST_FOR_TAPS:
            kept["FOLD"] = (False,)
        steps = problem.R * problem.S * math.ceil(channels / AXES["BLOCK_K"][0])
        kept["SPLIT_K"] = tuple(split for split in axes["SPLIT_K"] if split == 1 or steps >= 4 * split)
        if device.arch < 80:
            kept["num_stages"] = axes["num_stages"][:1]
    return kept


SPACE: Space[Conv2dProblem, Conv2dConfig] = Space(Conv2dConfig, AXES, fits, useful, COARSE, narrow)


def ragged(problem: Conv2dProblem, config: Conv2dConfig) -> Conv2dProblem:
    """A problem of at most two tiles a side whose last ones are cut, and a depth that ends within a block. A size that
    is a multiple of 16 stays one, for alignment decides which loads are compiled."""

    def cut(size: int, block: int, blocks: int) -> int:
        kept = 16 if size % 16 == 0 else 1
        if size % 16 and size < block:
            return size  # ragged as it is
        return max(kept, (blocks - 1) * block + (block - kept if block > kept else block))

    filters = cut(filters_across(problem), config.BLOCK_N, min(2, math.ceil(filters_across(problem) / config.BLOCK_N)))
    if problem.depthwise:
        multiplier = problem.group_filters
        groups = max(2, filters // multiplier)
        channels, filters = groups, groups * multiplier
    else:
        groups = min(problem.groups, 2)
        blocks = max(2, min(math.ceil(problem.group_channels / config.BLOCK_K), 2 * config.SPLIT_K + 1))
        channels = problem.group_channels
        if not config.FOLD:
            channels = cut(channels, config.BLOCK_K, min(blocks, math.ceil(channels / config.BLOCK_K)))
        channels, filters = channels * groups, filters * groups
    # As many rows and columns as make two tiles of pixels, of which the last one is cut.
    images = min(problem.N, 2)
    wanted = max(1, min(positions(problem, config), 2 * config.BLOCK_M - 3) // images)
    columns = min(problem.Q, max(1, math.isqrt(wanted)))
    rows = min(problem.P, max(1, wanted // columns))
    if problem.depthwise and config.ROWS > 1:
        rows = min(problem.P, rows * config.ROWS - 1)  # of the last rows below each other, one is none
    if not problem.padded:
        # Padding that no tap reaches would be reached in a smaller image, by other code.
        problem = replace(problem, pad_bottom=0, pad_right=0)
    return replace(
        problem,
        N=images,
        H=_length(rows, problem.R, problem.stride_h, problem.dilation_h, problem.pad_top + problem.pad_bottom),
        W=_length(columns, problem.S, problem.stride_w, problem.dilation_w, problem.pad_left + problem.pad_right),
        C=channels,
        K=filters,
        groups=groups,
    )


def _length(outputs: int, taps: int, stride: int, dilation: int, pads: int) -> int:
    """The shortest input that gives so many outputs."""
    return max(1, (outputs - 1) * stride + dilation * (taps - 1) + 1 - pads)

"""What a configuration of the fused convolution means for the model of time: its resources before anything is compiled,
and its grid, its loop and its bytes."""

from __future__ import annotations

import functools
import math

from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem, seen_by
from tilewright.kernels.ops.conv2d.space import (
    Conv2dConfig,
    accumulators,
    depth_blocks,
    dot_tile,
    filters_across,
    keeps_operands_shared,
    positions,
    rows_read,
    shared_bytes,
    taps_at_once,
    tile_vector_bytes,
    vector_bytes,
)
from tilewright.kernels.work import Panel, Work, lines, warp_tile
from tilewright.tuning_db.record import Resources


@functools.lru_cache(maxsize=4096)
def inside_along(length: int, outputs: int, taps: int, stride: int, dilation: int, pad: int) -> float:
    """The share of all (output, tap) pairs along one dimension that lies inside the input."""
    ends = [seen_by(tap, length, outputs, stride, dilation, pad) for tap in range(taps)]
    return sum(max(0, last - first + 1) for first, last in ends) / (outputs * taps)


def inside(problem: Conv2dProblem) -> float:
    """The share of all taps of all pixels that reads x, and not its padding."""
    rows = inside_along(problem.H, problem.P, problem.R, problem.stride_h, problem.dilation_h, problem.pad_top)
    return rows * inside_along(problem.W, problem.Q, problem.S, problem.stride_w, problem.dilation_w, problem.pad_left)


# Registers of a thread: a base, and for each sum it holds, each register of operand fragments, each load of x and of w
# in an iteration, and each word of what they bring. By the kind of loop: what a load holds on to is an address and a
# mask where it is one element, data where nothing is copied ahead, next to nothing where it is asynchronous. Least
# squares of 720 kernels of 10 problems compiled for sm_86 and sm_90; of 212 others that don't spill, three in four are
# within a quarter.
_REGISTERS = {
    "dot from shared memory": (19.0, 1.7, 0.0, 2.4, 0.0, 0.2),
    "dot from registers": (9.0, 0.4, 2.2, 2.8, 0.0, 0.6),
    "one stage": (20.0, 0.3, 1.7, 4.5, 0.0, 0.75),
    "elements of NHWC": (20.0, 0.9, 0.9, 6.3, 1.9, 0.35),
    "elements of NHWC, folded": (19.0, 2.2, 0.0, 2.2, 1.3, 2.1),
    "elements of NCHW": (56.0, 1.1, 0.0, 1.2, 2.4, 0.35),
    "CUDA cores": (25.0, 0.7, 1.5, 4.4, 1.4, 0.0),
}


def estimate(problem: Conv2dProblem, config: Conv2dConfig, device: Device) -> Resources:
    """Resources before anything is compiled: see `_REGISTERS`, `_depthwise_registers` and `shared_bytes`."""
    held = accumulators(config)
    if problem.depthwise:
        needed = _depthwise_registers(problem, config)
    else:
        element = dtype(problem.dtype).bytes
        threads = config.num_warps * WARP_SIZE
        x_vector, w_vector = tile_vector_bytes(problem, config)
        x_tile = config.BLOCK_M * config.BLOCK_K * element / threads
        w_tile = config.BLOCK_N * config.BLOCK_K * element / threads
        fragments = 0.0
        if problem.unit == "fp32" or not device.tensor_tflops:
            kind, fragments = "CUDA cores", 8 * math.sqrt(held)
            if element < 4:
                fragments *= 0.35 * config.BLOCK_K / 4  # narrow operands are widened all at once
        else:
            if min(x_vector, w_vector) < 16:
                kind = "elements of NCHW" if problem.layout == "nchw" else "elements of NHWC"
                kind += ", folded" if config.FOLD and problem.layout == "nhwc" else ""
            elif config.num_stages == 1 or device.arch < 80:
                kind = "one stage"
            elif keeps_operands_shared(problem, config, device):
                kind = "dot from shared memory"
            else:
                kind = "dot from registers"
            if not keeps_operands_shared(problem, config, device):
                fragments = sum(warp_tile(*dot_tile(problem, config), config.num_warps)) / 2
        base, *each = _REGISTERS[kind]
        counts = (held, fragments, x_tile / x_vector, w_tile / w_vector, (x_tile + w_tile) / 4)
        needed = base + sum(factor * count for factor, count in zip(each, counts, strict=True))
        if config.SPLIT_K > 1:
            # The last block to arrive holds its sum and the next partial tile.
            needed = max(needed + 0.4 * held, min(MAX_REGISTERS_PER_THREAD, 2 * held))
    spilled = 4 * int(max(0.0, needed - MAX_REGISTERS_PER_THREAD))
    return Resources(
        registers=min(MAX_REGISTERS_PER_THREAD, int(needed)),
        spill_bytes=spilled,
        stack_bytes=spilled,
        shared_bytes=shared_bytes(problem, config, device),
    )


def _depthwise_registers(problem: Conv2dProblem, config: Conv2dConfig) -> float:
    """Least squares, by sums, weights, and what is loaded before the first is used: of one row all taps of a row, of
    several (180 kernels; of NCHW one spill in three is foreseen) a column of weights and the rows of x that see it.
    Elements of NHWC that are loaded one by one have an address and a mask each (15 kernels for sm_86, within 27): of
    one row it is pixels that count (9 for sm_86 and sm_90, within a quarter)."""
    held = accumulators(config)
    nhwc, threads = problem.layout == "nhwc", config.num_warps * WARP_SIZE
    single = nhwc and vector_bytes(problem, config)[0] < 16
    if config.ROWS == 1:
        ahead = taps_at_once(problem, config)
        weights = ahead * config.BLOCK_N / threads
        if single:
            return 30 + 15 * config.BLOCK_M * min(config.BLOCK_N, threads) / threads
        if nhwc:
            return 22 + 4.1 * held + 6 * weights
        return 27 + 1.1 * held + 1.65 * ahead * held + 22 * weights
    weights = problem.R * config.BLOCK_N / threads
    loaded = held / config.ROWS * rows_read(problem, config)
    if single:
        return 13 + 0.7 * held + 38 * weights + 3.4 * loaded
    if nhwc:
        return 26 + 1.75 * held + 6.2 * weights + 0.48 * loaded
    return 16 + 0.8 * held + 25 * weights + 1.7 * loaded


def _load_lines(problem: Conv2dProblem, config: Conv2dConfig, pixels: float, columns: float) -> float:
    """Lines of 128 bytes in the tiles of x and w of one iteration, with so many pixels and filters in bounds."""
    element = dtype(problem.dtype).bytes
    depth = min(config.BLOCK_K, problem.depth if config.FOLD else problem.group_channels)
    w = lines(columns, depth * element, joined=depth == problem.depth)
    if problem.layout == "nchw":
        return w + lines(depth, pixels * element, joined=False)
    # Channels lie side by side, and where a step has them all those of neighbouring pixels too; folded, a row's taps.
    whole = problem.groups == 1 and problem.stride_w == 1
    if not config.FOLD:
        return w + lines(pixels, depth * element, joined=whole and depth == problem.C)
    run = min(depth, problem.group_channels * (problem.S if problem.groups == 1 else 1))
    return w + depth / run * lines(pixels, run * element, joined=False)


def work(problem: Conv2dProblem, config: Conv2dConfig) -> Work:
    """The grid, the loop and the bytes of one configuration."""
    element = dtype(problem.dtype).bytes
    tiles_m = math.ceil(positions(problem, config) / config.BLOCK_M)
    tiles_n = math.ceil(filters_across(problem) / config.BLOCK_N)
    splits = 1 if problem.depthwise else config.SPLIT_K
    # In bounds, on average over the tiles: masked elements are not read.
    pixels, columns = problem.pixels / tiles_m, filters_across(problem) / tiles_n
    epilogue = pixels * columns * dtype(problem.output_dtype).bytes
    if problem.residual is not None:
        epilogue += pixels * columns * dtype(problem.residual).bytes
    if problem.bias is not None:
        epilogue += columns * dtype(problem.bias).bytes
    if problem.w_scale == "channel":
        epilogue += columns * 4
    x_bytes = problem.pixels_read() * problem.C * element  # of all groups
    if problem.depthwise:
        # A column of tiles has its own channels of x: it is a problem of its own, as a group is.
        taps = problem.R * problem.S
        # All taps of a row (of rows below each other: of a column) are loaded before the first is used.
        steps = math.ceil(problem.S / taps_at_once(problem, config))
        iterations = problem.R * steps if config.ROWS == 1 else problem.S
        together = taps / iterations
        # Of each column of taps, a row of x is loaded once for all rows of output that see it.
        shared = min(1.0, rows_read(problem, config) / (problem.R * config.ROWS))
        loaded = pixels * inside(problem) * shared
        beside = problem.layout == "nhwc"  # channels of a pixel, else pixels of a channel
        count, length = (loaded, columns) if beside else (columns, loaded)
        joined = beside and columns == problem.C and problem.stride_w == 1
        return Work(
            tiles_m=tiles_m,
            tiles_n=1,
            splits=1,
            batch=tiles_n,
            group_m=1,
            iterations=iterations,
            tile_m=config.BLOCK_M * config.ROWS,
            tile_n=config.BLOCK_N,
            tile_k=0,
            num_warps=config.num_warps,
            num_stages=1,
            unit=problem.unit,
            operand_bytes=element,
            load_bytes=together * (loaded + 1) * columns * element,
            vector_bytes=tile_vector_bytes(problem, config)[0],
            load_lines=together * lines(count, length * element, joined=joined),
            panel_a=Panel(x_bytes / tiles_m / tiles_n),
            panel_b=Panel(columns * taps * element),
            epilogue_bytes=epilogue,
            workspace_bytes=0.0,
            # A product and a sum, and a conversion of what is loaded and not fp32 yet.
            lane_ops=(
                together
                * config.BLOCK_M
                * config.ROWS
                * config.BLOCK_N
                * (1.0 if problem.dtype == "fp32" else 1.0 + shared)
            ),
        )
    blocks = depth_blocks(problem, config)
    tile_m, tile_n = dot_tile(problem, config)
    x_elements = config.BLOCK_M * config.BLOCK_K
    return Work(
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        splits=splits,
        batch=problem.groups,
        group_m=config.GROUP_M,
        iterations=math.ceil(blocks / splits),
        tile_m=tile_m,
        tile_n=tile_n,
        tile_k=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        unit=problem.unit,
        operand_bytes=element,
        load_bytes=(pixels * inside(problem) + columns) * problem.depth / blocks * element,
        vector_bytes=min(tile_vector_bytes(problem, config)),
        load_lines=_load_lines(problem, config, pixels * inside(problem), columns),
        # Tiles of one row of images share its halo through L2: what counts is x once.
        panel_a=Panel(x_bytes / problem.groups / tiles_m / splits),
        panel_b=Panel(columns * problem.depth / splits * element),
        epilogue_bytes=epilogue,
        workspace_bytes=0.0 if splits == 1 else config.BLOCK_M * config.BLOCK_N * 4.0,
        # Folded, every element has its own tap to check; else every pixel, once a step.
        lane_ops=float(x_elements * 6 if config.FOLD and problem.padded else x_elements * element / 16 * 4),
    )

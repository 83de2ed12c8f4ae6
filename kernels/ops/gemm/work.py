"""What a configuration of the fused GEMM means for the model of time: its resources before anything is compiled, and
its grid, its loop and its bytes."""

from __future__ import annotations

import math

from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import (
    GemmConfig,
    accumulators,
    keeps_operands_shared,
    multiplying_warps,
    operand_tiles,
    operand_vectors,
    shared_bytes,
    tile_vector_bytes,
    vector_bytes,
)
from tilewright.kernels.work import SPECIALIZED_REGISTERS, Panel, Work, lines, warp_tile
from tilewright.tuning_db.record import Resources


def estimate(problem: GemmProblem, config: GemmConfig, device: Device) -> Resources:
    """Resources before anything is compiled.

    Registers of one thread are the sum of accumulators, operand fragments of two steps along K, a 64-bit address (and
    the half of one, on average, for its arithmetic) per copy of 16 bytes, and a base. A narrower load has its own
    address, mask and data. The factors are read off 280 kernels compiled for sm_75 to sm_90: of those that don't spill,
    nine of ten are within a quarter.
    """
    element = dtype(problem.dtype).bytes
    tile = operand_tiles(problem, config)
    tile_bytes = (tile.a * tile.a_count + tile.b * tile.b_count) / (config.num_warps * WARP_SIZE)
    held = accumulators(config)
    if problem.unit == "fp32" or not device.tensor_tflops:
        # A thread's rows and columns are read 4 steps along K at a time; narrow operands are widened all at once.
        fragments = 2 * math.sqrt(held) * (4.0 if element == 4 else 0.7 * config.BLOCK_K) + 10
    elif keeps_operands_shared(problem, config, device):
        fragments = 8.0
    else:
        rows, columns = warp_tile(config.BLOCK_M, config.BLOCK_N, config.num_warps)
        fragments = 2 * (rows + columns) * 32 / 128
    if problem.b_dtype is not None and not keeps_operands_shared(problem, config, device):
        fragments += 16  # weights on their way from bytes to operands
    addresses = 0.0
    for size, widest in zip((tile.a * tile.a_count, tile.b * tile.b_count), operand_vectors(problem), strict=True):
        share = size / (config.num_warps * WARP_SIZE)
        addresses += 2.5 * share / 16 if widest == 16 else 4 * share / widest
    if config.TMA and device.arch >= 90:
        addresses = 0.0  # one thread asks for a whole tile
    elif config.PERSISTENT:
        addresses += 24  # what the walk over tiles keeps
    if problem.group_size:
        held *= 2  # the sums of a group, before they are scaled
    registers = needed = held + fragments + addresses + 18
    if vector_bytes(problem) == 16 and (device.arch < 80 or config.num_stages == 1):
        # Data waits in registers in place of addresses and fragments, as much of it as there is room for.
        needed = held + fragments + 18
        registers = max(needed, held + min(110.0, tile_bytes / 4) + 26)
    if config.SPLIT_K > 1:
        # The last block to arrive holds its sum and the next partial tile.
        registers = max(registers, min(MAX_REGISTERS_PER_THREAD, 2 * accumulators(config)))
    most = MAX_REGISTERS_PER_THREAD
    if config.WARP_SPECIALIZE and device.hopper:
        registers, most = SPECIALIZED_REGISTERS
    spilled = 4 * int(max(0.0, needed - most))
    return Resources(
        registers=min(MAX_REGISTERS_PER_THREAD, int(registers)),
        spill_bytes=spilled,
        stack_bytes=spilled,
        shared_bytes=shared_bytes(problem, config, device),
    )


WEIGHT_OPERATIONS = {("int4", "fp16"): 3.4, ("int4", "bf16"): 4.7, ("int8", "fp16"): 4.2, ("int8", "bf16"): 4.2}
"""Instructions of one lane that make a weight an operand, counted in the SASS of compiled kernels for sm_86."""

PAIRED_OPERATIONS = {
    ("int4", "fp16"): 13 / 8,
    ("int4", "bf16"): 13 / 8,
    ("int8", "fp16"): 5 / 4,
    ("int8", "bf16"): 8 / 4,
}
"""The same with PAIRS, of the PTX in `weights`, without zero points."""


def _load_lines(problem: GemmProblem, config: GemmConfig, rows: float, columns: float) -> float:
    """Lines of 128 bytes in the tiles of A and B of one iteration, with so many rows and columns in bounds."""
    depth = min(config.BLOCK_K, problem.K)

    def of(width: float, whole: int, element: float, along_depth: bool) -> float:
        if along_depth:
            return lines(width, depth * element, joined=depth == problem.K)
        return lines(depth, width * element, joined=width == whole)

    a = of(rows, problem.M, dtype(problem.dtype).bytes, problem.a_layout == "row")
    return a + of(columns, problem.N, problem.b_bytes, problem.b_layout == "col")


def work(problem: GemmProblem, config: GemmConfig) -> Work:
    """The grid, the loop and the bytes of one configuration. Groups of rows count as a batch, as if all were of one
    length: the blocks of the grid that then have no rows end at once."""
    element = dtype(problem.dtype).bytes
    batch, height = problem.batch, float(problem.M)
    if problem.groups:
        batch, height = problem.groups, problem.M / problem.groups
    tiles_m, tiles_n = math.ceil(height / config.BLOCK_M), math.ceil(problem.N / config.BLOCK_N)
    k_blocks = math.ceil(problem.K / config.BLOCK_K)
    # In bounds, on average over the tiles: masked elements are not read.
    rows, columns = height / tiles_m, problem.N / tiles_n
    depth = problem.K / config.SPLIT_K
    epilogue = rows * problem.columns_out / tiles_n * dtype(problem.output_dtype).bytes
    if problem.residual is not None:
        epilogue += rows * problem.columns_out / tiles_n * dtype(problem.residual).bytes
    if problem.bias is not None:
        epilogue += (columns if problem.bias_axis == "n" else rows) * dtype(problem.bias).bytes
    if problem.a_scale == "row":
        epilogue += 4 * rows
    if problem.b_scale == "column":
        epilogue += 4 * columns
    per_column = problem.K * problem.b_bytes
    lane_ops = 0.0
    if problem.b_dtype is not None:
        scales = dtype(problem.b_scale_dtype).bytes if problem.group_size else 0.0
        zeros = math.ceil(problem.b_bytes) if problem.b_zero else 0
        per_column += math.ceil(problem.K / (problem.group_size or problem.K)) * (scales + zeros)
        # Every row of warps makes its own operands, but for wgmma and tcgen05, which share them.
        repeats = config.BLOCK_M / warp_tile(config.BLOCK_M, config.BLOCK_N, config.num_warps)[0]
        weights = config.BLOCK_N * config.BLOCK_K * repeats
        operations = PAIRED_OPERATIONS if config.PAIRS else WEIGHT_OPERATIONS
        each = operations[problem.b_dtype, problem.dtype]
        lane_ops = weights * each
        if problem.group_size:
            lane_ops += config.BLOCK_M * config.BLOCK_N
    # Descriptors copy in width whatever the compiler is told of: rows of 16 bytes are enough.
    vector = 16 if config.TMA else min(tile_vector_bytes(problem, config))
    return Work(
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        splits=config.SPLIT_K,
        batch=batch,
        group_m=config.GROUP_M,
        iterations=math.ceil(k_blocks / config.SPLIT_K),
        tile_m=config.BLOCK_M,
        tile_n=config.BLOCK_N,
        tile_k=config.BLOCK_K,
        num_warps=multiplying_warps(config),
        num_stages=config.num_stages,
        unit=problem.unit,
        operand_bytes=element,
        load_bytes=(rows * problem.K * element + columns * per_column) / k_blocks,
        vector_bytes=vector,
        load_lines=_load_lines(problem, config, rows, columns),
        panel_a=Panel(rows * depth * element, problem.a_broadcast),
        panel_b=Panel(columns * per_column / config.SPLIT_K, problem.b_broadcast),
        epilogue_bytes=epilogue,
        workspace_bytes=0.0 if config.SPLIT_K == 1 else rows * config.BLOCK_N * 4.0,
        persistent=config.PERSISTENT,
        specialized=config.WARP_SPECIALIZE,
        lane_ops=lane_ops,
    )

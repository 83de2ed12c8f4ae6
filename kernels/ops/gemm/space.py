"""The configurations of the fused GEMM: axes, limits, the default, and the work each one means."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Config
from tilewright.kernels.space import Space
from tilewright.kernels.work import Panel, Work
from tilewright.tuning_db.record import Resources


@dataclass(frozen=True, slots=True)
class GemmConfig(Config):
    """Tile, walk, split and pipeline of one GEMM."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8  # tile rows walked together, for L2
    SPLIT_K: int = 1  # blocks that share one tile's K; deterministic, through a workspace
    num_warps: int = 4
    num_stages: int = 3


AXES = {
    "BLOCK_M": (16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128, 256),
    "GROUP_M": (1, 4, 8),
    "SPLIT_K": (1, 2, 4, 8, 16),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
}


def vector_bytes(problem: GemmProblem) -> int:
    """Widest load that the alignment of both operands allows, in bytes.

    A row (or column) that starts 16 elements further each time keeps 16-byte loads; any other length leaves single
    elements, for Triton is told of divisibility by 16 or of none.
    """
    element = int(dtype(problem.dtype).bytes)
    if not problem.aligned:
        return element
    if problem.strided:
        return 16
    a_length = problem.M if problem.a_layout == "col" else problem.K
    b_length = problem.K if problem.b_layout == "col" else problem.N
    return 16 if a_length % 16 == 0 and b_length % 16 == 0 else element


def pipeline_buffers(problem: GemmProblem, config: GemmConfig, device: Device) -> int:
    """Copies of both operand tiles that Triton keeps in shared memory (read off compiled kernels, 3.6 and 3.9).

    One, where loads pass through registers; else one per stage, less the one that mma.sync has in registers already.
    """
    if vector_bytes(problem) < 4 or device.arch < 80:
        return 1
    # wgmma and tcgen05 read operands from shared memory; they need 64 rows and a warp group.
    keeps_all = (
        device.arch // 10 in (9, 10) and problem.unit != "fp32" and config.BLOCK_M >= 64 and config.num_warps >= 4
    )
    return max(1, config.num_stages if keeps_all else config.num_stages - 1)


def shared_bytes(problem: GemmProblem, config: GemmConfig, device: Device) -> int:
    """Shared memory of the main loop, in bytes. The compiled kernel may take more, never less."""
    tile = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * int(dtype(problem.dtype).bytes)
    return tile * pipeline_buffers(problem, config, device)


def accumulators(config: GemmConfig) -> float:
    """fp32 accumulators per thread."""
    return config.BLOCK_M * config.BLOCK_N / (config.num_warps * WARP_SIZE)


def fits(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or the limit that the configuration breaks, with the values."""
    for name, value in config.to_dict().items():
        if value < 1:
            return f"{name}={value} must be at least 1"
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"):
        value = getattr(config, name)
        if value & (value - 1):
            return f"{name}={value} must be a power of two"
    least_k = max(16, 32 // int(dtype(problem.dtype).bytes))
    if min(config.BLOCK_M, config.BLOCK_N) < 16 or least_k > config.BLOCK_K:
        return f"the smallest tile of a {problem.dtype} dot is 16×16×{least_k}"
    if config.num_warps > 32:
        return f"num_warps={config.num_warps} is over the 32 of a block"
    if accumulators(config) > MAX_REGISTERS_PER_THREAD:
        return f"{accumulators(config):.0f} accumulators a thread are over its {MAX_REGISTERS_PER_THREAD} registers"
    shared = shared_bytes(problem, config, device)
    if shared > device.shared_per_block:
        return f"{shared} B of shared memory are over the {device.shared_per_block} B a block of {device.sm} can have"
    if config.SPLIT_K > 65535:
        return f"SPLIT_K={config.SPLIT_K} is over the grid's 65535"
    tiles = math.ceil(problem.M / config.BLOCK_M) * math.ceil(problem.N / config.BLOCK_N) * problem.batch
    if tiles >= 2**31:
        return f"{tiles} tiles are over the grid's {2**31 - 1}"
    return None


def useful(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or why the configuration can't be the best one."""
    for block, size in ((config.BLOCK_M, problem.M), (config.BLOCK_N, problem.N), (config.BLOCK_K, problem.K)):
        smallest = 16 if block is not config.BLOCK_K else 32
        if block > max(smallest, 2 ** math.ceil(math.log2(size))):
            return f"a block of {block} over a size of {size} is mostly padding"
    tiles_m = math.ceil(problem.M / config.BLOCK_M)
    if config.GROUP_M > 1 and 2 ** math.floor(math.log2(tiles_m)) < config.GROUP_M:
        return f"GROUP_M={config.GROUP_M} repeats a smaller one with {tiles_m} tile rows"
    k_blocks = math.ceil(problem.K / config.BLOCK_K)
    if config.SPLIT_K > 1:
        if k_blocks < 4 * config.SPLIT_K:
            return f"SPLIT_K={config.SPLIT_K} leaves fewer than 4 of {k_blocks} K blocks to each"
        blocks = tiles_m * math.ceil(problem.N / config.BLOCK_N) * problem.batch
        if blocks >= 4 * device.sms:
            return f"{blocks} tiles fill {device.sms} SMs without SPLIT_K"
    if config.num_stages > max(2, k_blocks // config.SPLIT_K):
        return f"num_stages={config.num_stages} is more than the K blocks there are"
    if 16 * 8 * config.num_warps > config.BLOCK_M * config.BLOCK_N:
        return f"{config.num_warps} warps on {config.BLOCK_M}×{config.BLOCK_N} leave less than one 16×8 mma each"
    if config.num_stages > 2 and (device.arch < 80 or vector_bytes(problem) < 4):
        return "without cp.async (sm_80, 4-byte loads) more than 2 stages change nothing"
    return None


SPACE: Space[GemmProblem, GemmConfig] = Space(GemmConfig, AXES, fits, useful)


def default(problem: GemmProblem, device: Device) -> GemmConfig:
    """What runs when nothing is known: fits every problem, without spills, and is never the slowest."""
    copies = vector_bytes(problem) >= 4 and device.arch >= 80
    if problem.unit == "fp32" or not device.tensor_tflops:
        # CUDA cores hold their operands in registers: larger tiles spill.
        config = GemmConfig(BLOCK_M=16 if problem.M <= 16 else 32, BLOCK_N=32, BLOCK_K=32, num_stages=2)
    elif problem.M <= 32 or problem.N <= 32:
        config = GemmConfig(
            BLOCK_M=16 if problem.M <= 16 else 32,
            BLOCK_N=32 if problem.N <= 32 else 64,
            BLOCK_K=64 if copies and problem.dtype != "fp32" else 32,
            num_stages=4 if copies else 2,
        )
    elif copies and vector_bytes(problem) == 16 and min(problem.M, problem.N) >= 1024:
        config = GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4)
    else:
        config = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=4 if copies else 2)
    while fits(problem, config, device) is not None and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def estimate(problem: GemmProblem, config: GemmConfig, device: Device) -> Resources:
    """Resources before anything is compiled: accumulators, operand fragments and addresses of one thread."""
    warps = config.num_warps
    fragments = (config.BLOCK_M + config.BLOCK_N) * 16 * dtype(problem.dtype).bytes / 4 / (WARP_SIZE * math.sqrt(warps))
    registers = accumulators(config) + 2 * fragments + 32
    if vector_bytes(problem) < 4 or config.num_stages == 1:
        # Operand tiles pass through registers on their way to shared memory.
        tile = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K
        registers += tile * dtype(problem.dtype).bytes / 4 / (WARP_SIZE * warps)
    spilled = max(0.0, registers - MAX_REGISTERS_PER_THREAD) * 4
    return Resources(
        registers=min(MAX_REGISTERS_PER_THREAD, int(registers)),
        spill_bytes=int(spilled),
        stack_bytes=int(spilled),
        shared_bytes=shared_bytes(problem, config, device),
    )


def work(problem: GemmProblem, config: GemmConfig) -> Work:
    """The grid, the loop and the bytes of one configuration."""
    element = dtype(problem.dtype).bytes
    tiles_m, tiles_n = math.ceil(problem.M / config.BLOCK_M), math.ceil(problem.N / config.BLOCK_N)
    k_blocks = math.ceil(problem.K / config.BLOCK_K)
    # In bounds, on average over the tiles: masked elements are not read.
    rows, columns = problem.M / tiles_m, problem.N / tiles_n
    depth = problem.K / config.SPLIT_K
    epilogue = dtype(problem.output_dtype).bytes
    if problem.residual is not None:
        epilogue += dtype(problem.residual).bytes
    return Work(
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        splits=config.SPLIT_K,
        batch=problem.batch,
        group_m=config.GROUP_M,
        iterations=math.ceil(k_blocks / config.SPLIT_K),
        tile_m=config.BLOCK_M,
        tile_n=config.BLOCK_N,
        tile_k=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        unit=problem.unit,
        operand_bytes=element,
        load_bytes=(rows + columns) * problem.K / k_blocks * element,
        vector_bytes=vector_bytes(problem),
        panel_a=Panel(rows * depth * element, problem.a_broadcast),
        panel_b=Panel(columns * depth * element, problem.b_broadcast),
        epilogue_bytes=rows * columns * epilogue,
        workspace_bytes=0.0 if config.SPLIT_K == 1 else config.BLOCK_M * config.BLOCK_N * 4.0,
    )

"""The configurations of the fused GEMM: axes, limits, the default, and the work each one means."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD, WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Config
from tilewright.kernels.space import Space
from tilewright.kernels.work import Panel, Work, warp_tile
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


def tile_vector_bytes(problem: GemmProblem, config: GemmConfig) -> tuple[int, int]:
    """Widest load of the tiles of A and B: alignment's, or less where a tile is too small for all threads."""
    widest = vector_bytes(problem)
    element = int(dtype(problem.dtype).bytes)
    threads = config.num_warps * WARP_SIZE
    a_tile = config.BLOCK_M * config.BLOCK_K * element
    b_tile = config.BLOCK_N * config.BLOCK_K * element
    return min(widest, max(element, a_tile // threads)), min(widest, max(element, b_tile // threads))


def keeps_operands_shared(problem: GemmProblem, config: GemmConfig, device: Device) -> bool:
    """Whether the dot becomes wgmma or tcgen05, which read operands from shared memory: 64 rows and a warp group."""
    return device.arch // 10 in (9, 10) and problem.unit != "fp32" and config.BLOCK_M >= 64 and config.num_warps >= 4


def shared_bytes(problem: GemmProblem, config: GemmConfig, device: Device) -> int:
    """Shared memory of the main loop, in bytes. The compiled kernel may take more (to change the layout of a result on
    its way out), never less.

    Triton keeps a copy of each operand tile per stage, less the one that mma.sync has in registers already; one copy of
    a tile that cp.async can't bring, or that must be transposed through registers, as 8-bit B by rows, and for wgmma
    8-bit A by columns (read off compiled kernels, 3.6 and 3.9). One copy of a word per thread may not be there at all:
    it goes from thread to thread.
    """
    element = int(dtype(problem.dtype).bytes)
    keeps_all = keeps_operands_shared(problem, config, device)
    stages = config.num_stages if keeps_all else config.num_stages - 1
    if device.arch < 80:
        stages = 1
    a_vector, b_vector = tile_vector_bytes(problem, config)
    turned = keeps_all and device.arch // 10 == 9 and element == 1 and problem.a_layout == "col"
    a_copies = stages if a_vector >= 4 and not turned else 1
    b_copies = stages if b_vector >= 4 and (element > 1 or problem.b_layout == "col") else 1
    total = 0
    for rows, copies in ((config.BLOCK_M, a_copies), (config.BLOCK_N, b_copies)):
        tile = rows * config.BLOCK_K * element
        if copies > 1 or tile > 4 * WARP_SIZE * config.num_warps:
            total += max(1, copies) * tile
    return total


def accumulators(config: GemmConfig) -> float:
    """fp32 accumulators per thread."""
    return config.BLOCK_M * config.BLOCK_N / (config.num_warps * WARP_SIZE)


def fits(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or the limit that the configuration breaks, with the values."""
    for name, value in config.to_dict().items():
        if not isinstance(value, int) or value < 1:
            return f"{name}={value!r} must be an integer of at least 1"
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
    # Positions are 32-bit, those of the last block's padding too, and so are those of the tiles in a group.
    tiles_n = math.ceil(problem.N / config.BLOCK_N)
    ends = (problem.M + config.BLOCK_M, problem.N + config.BLOCK_N, problem.K + config.BLOCK_K * config.SPLIT_K)
    if max(*ends, config.GROUP_M * tiles_n) >= 2**31:
        return f"positions in {problem.M}×{problem.N}×{problem.K} with GROUP_M={config.GROUP_M} pass 32 bits"
    tiles = math.ceil(problem.M / config.BLOCK_M) * tiles_n * problem.batch
    if tiles >= 2**31:
        return f"{tiles} tiles are over the grid's {2**31 - 1}"
    return None


def useful(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or why the configuration can't be the best one."""
    for block, size, smallest in (
        (config.BLOCK_M, problem.M, 16),
        (config.BLOCK_N, problem.N, 16),
        (config.BLOCK_K, problem.K, 32),
    ):
        if block > max(smallest, 2 ** math.ceil(math.log2(size))):
            return f"a block of {block} over a size of {size} is mostly padding"
    tiles_m = math.ceil(problem.M / config.BLOCK_M)
    if any(tiles_m <= smaller < config.GROUP_M for smaller in AXES["GROUP_M"]):
        return f"GROUP_M={config.GROUP_M} repeats a smaller one with {tiles_m} tile rows"
    k_blocks = math.ceil(problem.K / config.BLOCK_K)
    if config.SPLIT_K > 1:
        if k_blocks < 4 * config.SPLIT_K:
            return f"SPLIT_K={config.SPLIT_K} leaves fewer than 4 of {k_blocks} K blocks to each"
        tiles = tiles_m * math.ceil(problem.N / config.BLOCK_N) * problem.batch
        # Half as many splits leave half the partial tiles to write and read.
        if tiles * (config.SPLIT_K // 2) >= 4 * device.sms:
            return f"{tiles} tiles fill {device.sms} SMs with half of SPLIT_K={config.SPLIT_K}"
    if config.num_stages > max(2, k_blocks // config.SPLIT_K):
        return f"num_stages={config.num_stages} is more than the K blocks there are"
    if 16 * 8 * config.num_warps > config.BLOCK_M * config.BLOCK_N:
        return f"{config.num_warps} warps on {config.BLOCK_M}×{config.BLOCK_N} leave less than one 16×8 mma each"
    if config.num_stages > 1 and (device.arch < 80 or vector_bytes(problem) < 4):
        return "without cp.async (sm_80, 4-byte loads) more than 1 stage changes nothing: the code is the same"
    return None


COARSE = {"BLOCK_K": (32, 64, 128), "GROUP_M": (1, 8), "SPLIT_K": (1, 4), "num_stages": (1, 3, 4)}

SPACE: Space[GemmProblem, GemmConfig] = Space(GemmConfig, AXES, fits, useful, COARSE)


def default(problem: GemmProblem, device: Device) -> GemmConfig:
    """What runs when nothing is known: fits every problem whose grid can be launched, and does not spill."""
    copies = vector_bytes(problem) >= 4 and device.arch >= 80
    if problem.unit == "fp32" or not device.tensor_tflops:
        # CUDA cores hold their operands in registers: larger tiles spill.
        config = GemmConfig(
            BLOCK_M=16 if problem.M <= 16 else 32, BLOCK_N=32, BLOCK_K=32, num_stages=2 if copies else 1
        )
    elif problem.M <= 32 or problem.N <= 32:
        config = GemmConfig(
            BLOCK_M=16 if problem.M <= 16 else 32,
            BLOCK_N=32 if problem.N <= 32 else 64,
            BLOCK_K=64 if copies and problem.dtype != "fp32" else 32,
            num_stages=4 if copies else 1,
        )
    elif copies and vector_bytes(problem) == 16 and min(problem.M, problem.N) >= 1024:
        config = GemmConfig(BLOCK_M=128, BLOCK_N=128, BLOCK_K=32, num_warps=8, num_stages=4)
    else:
        config = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_stages=4 if copies else 1)
    while fits(problem, config, device) is not None and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def ragged(problem: GemmProblem, config: GemmConfig) -> GemmProblem:
    """A problem of at most two tiles a side whose last ones are cut, and a K that ends within a block, after splits of
    unequal length. A size that is a multiple of 16 stays one, for alignment decides which loads are compiled."""

    def cut(size: int, block: int, blocks: int) -> int:
        kept = 16 if size % 16 == 0 else 1
        if size % 16 and size < block:
            return size  # ragged as it is
        return (blocks - 1) * block + (block - kept if block > kept else block)

    k_blocks = max(2, min(math.ceil(problem.K / config.BLOCK_K), 2 * config.SPLIT_K + 1))
    return replace(
        problem,
        M=cut(problem.M, config.BLOCK_M, min(2, math.ceil(problem.M / config.BLOCK_M))),
        N=cut(problem.N, config.BLOCK_N, min(2, math.ceil(problem.N / config.BLOCK_N))),
        K=cut(problem.K, config.BLOCK_K, k_blocks),
        batch=min(problem.batch, 2),
    )


def estimate(problem: GemmProblem, config: GemmConfig, device: Device) -> Resources:
    """Resources before anything is compiled.

    Registers of one thread are the sum of accumulators, operand fragments of two steps along K, a 64-bit address (and
    the half of one, on average, for its arithmetic) per copy of 16 bytes, and a base. A narrower load has its own
    address, mask and data. The factors are read off 280 kernels compiled for sm_75 to sm_90: of those that don't spill,
    nine of ten are within a quarter.
    """
    element = dtype(problem.dtype).bytes
    tile_bytes = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * element / (config.num_warps * WARP_SIZE)
    held = accumulators(config)
    if problem.unit == "fp32" or not device.tensor_tflops:
        # A thread's rows and columns are read 4 steps along K at a time; narrow operands are widened all at once.
        fragments = 2 * math.sqrt(held) * (4.0 if element == 4 else 0.7 * config.BLOCK_K) + 10
    elif keeps_operands_shared(problem, config, device):
        fragments = 8.0
    else:
        rows, columns = warp_tile(config.BLOCK_M, config.BLOCK_N, config.num_warps)
        fragments = 2 * (rows + columns) * 32 / 128
    addresses = 4 * tile_bytes / element if vector_bytes(problem) < 16 else 2.5 * tile_bytes / 16
    registers = needed = held + fragments + addresses + 18
    if vector_bytes(problem) == 16 and (device.arch < 80 or config.num_stages == 1):
        # Data waits in registers in place of addresses and fragments, as much of it as there is room for.
        needed = held + fragments + 18
        registers = max(needed, held + min(110.0, tile_bytes / 4) + 26)
    if config.SPLIT_K > 1:
        # The last block to arrive holds its sum and the next partial tile.
        registers = max(registers, min(MAX_REGISTERS_PER_THREAD, 2 * held))
    spilled = 4 * int(max(0.0, needed - MAX_REGISTERS_PER_THREAD))
    return Resources(
        registers=min(MAX_REGISTERS_PER_THREAD, int(registers)),
        spill_bytes=spilled,
        stack_bytes=spilled,
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
    epilogue = rows * columns * dtype(problem.output_dtype).bytes
    if problem.residual is not None:
        epilogue += rows * columns * dtype(problem.residual).bytes
    if problem.bias is not None:
        epilogue += columns * dtype(problem.bias).bytes
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
        vector_bytes=min(tile_vector_bytes(problem, config)),
        panel_a=Panel(rows * depth * element, problem.a_broadcast),
        panel_b=Panel(columns * depth * element, problem.b_broadcast),
        epilogue_bytes=epilogue,
        workspace_bytes=0.0 if config.SPLIT_K == 1 else config.BLOCK_M * config.BLOCK_N * 4.0,
    )

"""The configurations of the fused RMSNorm: axes, limits, and the default."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tilewright.kernels.device import SUBPARTITIONS, WARP_SIZE, Device, registers_allowed
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.kernels.problem import Config
from tilewright.kernels.space import Space, malformed, mostly_padding, over_block, widest_block

LARGEST_TENSOR = 2**20
"""Elements of a tile: Triton's own limit."""


@dataclass(frozen=True, slots=True)
class RmsNormConfig(Config):
    """Tile, warps and pipeline of one RMSNorm. A tile at least as wide as the row holds it in registers; a narrower one
    walks along it twice. docs/rmsnorm.md has every field."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 1  # of the walk


AXES = {
    "BLOCK_M": (1, 2, 4, 8, 16, 32, 64),
    "BLOCK_N": tuple(2**power for power in range(4, 16)),
    "num_warps": (1, 2, 4, 8, 16, 32),
    "num_stages": (1, 2, 3, 4),
}

COARSE = {"BLOCK_M": (1, 8), "num_warps": (1, 4, 8, 16), "num_stages": (1, 3)}


def whole(problem: RmsNormProblem, config: RmsNormConfig) -> bool:
    """Whether a tile has whole rows."""
    return config.BLOCK_N >= problem.N


def elements(config: RmsNormConfig) -> float:
    """Of a tile, per thread."""
    return config.BLOCK_M * config.BLOCK_N / (config.num_warps * WARP_SIZE)


def wide(problem: RmsNormProblem) -> bool:
    """Whether loads may be 16 bytes wide: Triton is told of divisibility by 16 or of none, and a row that ends
    elsewhere is masked element by element."""
    return problem.aligned and problem.N % 16 == 0


def vector_bytes(problem: RmsNormProblem, config: RmsNormConfig) -> int:
    """Widest load of the narrower of x and residual: alignment's, or less where a tile is too small for all threads."""
    narrowest = min(int(dtype(kind).bytes) for kind in (problem.dtype, problem.residual) if kind is not None)
    return min(16, max(narrowest, int(elements(config)) * narrowest)) if wide(problem) else narrowest


def shared_bytes(problem: RmsNormProblem, config: RmsNormConfig, device: Device) -> int:
    """Shared memory of the copies in flight, in bytes. The compiled kernel may take more (to sum over warps, and to
    change the layout between a load and a store of different width), never less.

    Triton keeps a copy per stage but one, of each array of which every load is at least 4 bytes, from sm_80 on.
    """
    if whole(problem, config) or device.arch < 80:
        return 0
    total = 0
    for kind, rows in ((problem.dtype, config.BLOCK_M), (problem.residual, config.BLOCK_M), (problem.weight, 1)):
        if kind is not None:
            element = int(dtype(kind).bytes)
            tile = rows * config.BLOCK_N * element
            if element >= 4 or (wide(problem) and tile >= 4 * config.num_warps * WARP_SIZE):
                total += tile
    return total * (config.num_stages - 1)


def registers_needed(problem: RmsNormProblem, config: RmsNormConfig) -> float:
    """Registers of one thread, as many as it would take without a limit.

    They are h of its elements and half of what they were loaded as (the rest is converted by then), the weights, what
    it takes to quantise, to write h too and to address narrow loads, a pointer to each of its rows, and a base; a walk
    along the row keeps the largest elements found, and counts. The factors are read off 1,200 kernels compiled for
    sm_75 to sm_120: of those that don't spill, four of five are within a quarter.
    """
    each = elements(config)
    read = dtype(problem.dtype).bytes + (dtype(problem.residual).bytes if problem.residual is not None else 0)
    share = 0.85 + 0.4 * read / 4 + 0.2 * (problem.weight is not None)
    share += 0.3 * problem.out_scale + 0.25 * problem.residual_out + (0.0 if wide(problem) else 0.25)
    needed = 17.0
    if not whole(problem, config):
        needed += 10
        share += 0.9 * problem.row_scale
    # Threads lie along a row first, each with one load of it.
    across = config.num_warps * WARP_SIZE * vector_bytes(problem, config) / dtype(problem.dtype).bytes
    rows = config.BLOCK_M / max(1.0, across / config.BLOCK_N)
    if rows > 1:
        needed += 0.3 * rows * (2 + (problem.residual is not None) + problem.residual_out)
    return needed + share * each


def fits(problem: RmsNormProblem, config: RmsNormConfig, device: Device) -> str | None:
    """None, or the limit that the configuration breaks, with the values."""
    limit = malformed(config, ("BLOCK_M", "BLOCK_N", "num_warps"))
    if limit is not None:
        return limit
    if config.BLOCK_M * config.BLOCK_N > LARGEST_TENSOR:
        return f"a tile of {config.BLOCK_M}×{config.BLOCK_N} is over the {LARGEST_TENSOR} elements of a tensor"
    limit = over_block(config, device, held=elements(config), shared_bytes=shared_bytes(problem, config, device))
    if limit is not None:
        return limit
    # Positions are 32-bit, those of the last block's padding too.
    if max(problem.M + config.BLOCK_M, problem.N + config.BLOCK_N) >= 2**31:
        return f"positions in {problem.M}×{problem.N} with tiles of {config.BLOCK_M}×{config.BLOCK_N} pass 32 bits"
    return None


def useful(problem: RmsNormProblem, config: RmsNormConfig, device: Device) -> str | None:
    """None, or why the configuration can't be the best one."""
    reason = mostly_padding((config.BLOCK_M, problem.M, 1), (config.BLOCK_N, max(16, problem.N), 16))
    if reason is not None:
        return reason
    if not whole(problem, config) and config.BLOCK_N < 256:
        return f"BLOCK_N={config.BLOCK_N} walks along a row of {problem.N} in pieces of less than 256"
    blocks = math.ceil(problem.M / config.BLOCK_M)
    if config.BLOCK_M > 1 and blocks < device.sms:
        return f"{config.BLOCK_M} rows a block leave some of {device.sms} SMs without any of {problem.M}"
    each = elements(config)
    if blocks <= device.sms and config.num_warps < SUBPARTITIONS and each >= 8:
        return f"{config.num_warps} warps, alone on their SM, leave some of its {SUBPARTITIONS} schedulers idle"
    if config.num_warps > 1 and each < 4:
        return f"{each:g} elements a thread: half of {config.num_warps} warps would do"
    if each > 64 or registers_needed(problem, config) >= registers_allowed(config.num_warps) + 1:
        return f"{each:g} elements a thread leave none of its {registers_allowed(config.num_warps)} registers"
    if config.num_stages > 1:
        if shared_bytes(problem, config, device) == 0:
            return "no load of this kernel is asynchronous: more than 1 stage changes nothing"
        if config.num_stages > math.ceil(problem.N / config.BLOCK_N):
            return f"num_stages={config.num_stages} is more than the tiles of a row"
    return None


SPACE: Space[RmsNormProblem, RmsNormConfig] = Space(RmsNormConfig, AXES, fits, useful, COARSE)


def default(problem: RmsNormProblem, device: Device) -> RmsNormConfig:
    """What runs when nothing is known: fits every problem, and does not spill.

    8 elements a thread, which are 16 bytes of fp16; up to 32 where a block would be over 16 warps. Longer rows, and
    long ones that are read element by element, are walked along; short ones share a block.
    """
    block_n = max(16, widest_block(problem.N))
    if block_n > (16384 if wide(problem) else 8192):
        copies = shared_bytes(problem, RmsNormConfig(1, 2048, num_stages=2), device) > 0
        return RmsNormConfig(BLOCK_M=1, BLOCK_N=2048, num_warps=8, num_stages=3 if copies else 1)
    block_m = max(1, min(widest_block(problem.M), 1024 // block_n))
    num_warps = max(1, min(16, block_m * block_n // (8 * WARP_SIZE)))
    return RmsNormConfig(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps)


def ragged(problem: RmsNormProblem, config: RmsNormConfig) -> RmsNormProblem:
    """A problem of at most two rows of tiles whose last one is cut, with rows that end within a tile: the first one
    where a tile has whole rows, else the third. A length that is a multiple of 16 stays one, for alignment decides
    which loads are compiled."""
    kept = 16 if problem.N % 16 == 0 else 1
    tiles = 1 if whole(problem, config) else min(3, math.ceil(problem.N / config.BLOCK_N))
    columns = tiles * config.BLOCK_N - (kept if kept < config.BLOCK_N else 0)
    if tiles == 1:
        columns = min(columns, problem.N)
    return replace(problem, M=max(1, 2 * config.BLOCK_M - 1), N=columns)

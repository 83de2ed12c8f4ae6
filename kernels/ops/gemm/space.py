"""The configurations of the fused GEMM: axes and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.gemm.problem import FLAT, GemmProblem, has_few_rows
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
from tilewright.kernels.work import SPECIALIZED_WARPS, reads_operands_shared


@dataclass(frozen=True, slots=True)
class GemmConfig(Config):
    """Tile, walk, split and pipeline of one GEMM. docs/gemm.md has every field."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8  # tile rows walked together, for L2
    SPLIT_K: int = 1  # blocks that share one tile's K; deterministic, through a workspace
    num_warps: int = 4
    num_stages: int = 3
    PERSISTENT: bool = False  # as many blocks as the SMs hold, each going from tile to tile
    TMA: bool = False  # operands come by tensor descriptors, whole tiles at a time
    WARP_SPECIALIZE: bool = False  # on Hopper, one warp group copies what two others multiply
    PAIRS: bool = False  # weights are unpacked two at a time, by inline PTX


AXES = {
    "BLOCK_M": (8, 16, 32, 64, 128, 256),
    "BLOCK_N": (16, 32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128, 256),
    "GROUP_M": (1, 4, 8),
    "SPLIT_K": (1, 2, 4, 8, 16),
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5),
    "PERSISTENT": (False, True),
    "TMA": (False, True),
    "WARP_SPECIALIZE": (False, True),
    "PAIRS": (False, True),
}


def multiplying_warps(config: GemmConfig) -> int:
    """Warps that hold the sums of a tile."""
    return 2 * config.num_warps if config.WARP_SPECIALIZE else config.num_warps


def tiles(problem: GemmProblem, config: GemmConfig) -> tuple[int, int]:
    """Rows and columns of output tiles of one matrix; of groups of rows, as many rows as any offsets can need."""
    tiles_n = math.ceil(problem.N / config.BLOCK_N)
    if problem.groups:
        return problem.M // config.BLOCK_M + problem.groups, tiles_n
    return math.ceil(problem.M / config.BLOCK_M), tiles_n


def operand_vectors(problem: GemmProblem) -> tuple[int, int]:
    """Widest loads of A and of B that their alignment allows, in bytes.

    A row (or column) of a multiple of 16 elements keeps 16-byte loads; any other length leaves single elements, for
    Triton is told of divisibility by 16 or of none, and a mask that may end anywhere is as bad as a row that may start
    anywhere. Columns of packed int4 are such rows, whatever K is; rows of a group may start anywhere.
    """
    a_element, b_element = math.ceil(dtype(problem.dtype).bytes), math.ceil(problem.b_bytes)
    if not problem.aligned:
        return a_element, b_element
    a_length = problem.M if problem.a_layout == "col" else problem.K
    b_length = problem.K if problem.b_layout == "col" else problem.N
    a_wide = a_length % 16 == 0 and not (problem.groups and problem.a_layout == "col")
    b_wide = b_length % 16 == 0 or (problem.b_dtype == "int4" and problem.b_layout == "col")
    return 16 if a_wide else a_element, 16 if b_wide else b_element


def vector_bytes(problem: GemmProblem) -> int:
    """The narrower of the operands' widest loads."""
    return min(operand_vectors(problem))


class Tiles(NamedTuple):
    """What one iteration brings to shared memory: `a` and `b` bytes at a time, so many times."""

    a: int
    a_count: int  # 2 pieces of A under the two nibbles of int4
    b: int
    b_count: int  # 2 halves of gated columns


def operand_tiles(problem: GemmProblem, config: GemmConfig) -> Tiles:
    """The operand tiles of one iteration."""
    a_count = 2 if problem.b_dtype == "int4" else 1
    b_count = 2 if problem.gated == "halves" else 1
    a = config.BLOCK_M * config.BLOCK_K * dtype(problem.dtype).bytes / a_count
    b = config.BLOCK_N * config.BLOCK_K * problem.b_bytes / b_count
    return Tiles(int(a), a_count, int(b), b_count)


def tile_vector_bytes(problem: GemmProblem, config: GemmConfig) -> tuple[int, int]:
    """Widest load of the tiles of A and B: alignment's, or less where a tile is too small for all threads."""
    a_widest, b_widest = operand_vectors(problem)
    tile = operand_tiles(problem, config)
    threads = config.num_warps * WARP_SIZE
    a_element, b_element = math.ceil(dtype(problem.dtype).bytes), math.ceil(problem.b_bytes)
    return min(a_widest, max(a_element, tile.a // threads)), min(b_widest, max(b_element, tile.b // threads))


def keeps_operands_shared(problem: GemmProblem, config: GemmConfig, device: Device) -> bool:
    """Whether the dot reads its operands from shared memory."""
    return reads_operands_shared(device, problem.unit, config.BLOCK_M, config.num_warps)


def shared_bytes(problem: GemmProblem, config: GemmConfig, device: Device) -> int:
    """Shared memory of the main loop, in bytes. The compiled kernel may take more (to change the layout of a result on
    its way out), never less.

    Triton keeps a copy of each operand tile per stage, less the one that mma.sync has in registers already; one copy of
    a tile that cp.async can't bring, or that must be transposed through registers, as 8-bit B by rows, and 8-bit A by
    columns for wgmma and of 16 bytes (read off compiled kernels, 3.6 and 3.9). One copy of a word per thread, or of 16
    columns, may not be there at all: it goes from thread to thread, as both may of tiles of eight rows. Weights that
    become fp16 on their way to wgmma lie there once more as such.
    """
    tile = operand_tiles(problem, config)
    element = dtype(problem.dtype).bytes
    keeps_all = keeps_operands_shared(problem, config, device)
    # int8 is mma.sync on sm_100 with Triton 3.6, and tcgen05 with 3.9; A over weights may lack a copy there.
    fewer = device.major == 10 and (problem.unit == "int8" or problem.b_dtype is not None)
    stages = config.num_stages if keeps_all and not fewer else config.num_stages - 1
    b_stages = config.num_stages - 1 if problem.b_dtype is not None else stages
    if device.arch < 80:
        stages = b_stages = 1
    a_vector, b_vector = tile_vector_bytes(problem, config)
    turned = problem.a_layout == "col" and element == 1
    turned = turned and (config.BLOCK_M == 16 or (keeps_all and device.hopper))
    # Rows of half a gated tile's 16 bytes start at multiples of 8 (N / 2): weights so narrow are not copied ahead.
    narrow = problem.b_dtype is not None and problem.gated == "halves" and config.BLOCK_N == 32
    b_turned = problem.b_layout == "row" and (element == 1 or narrow)
    if config.TMA:
        if device.arch < 90:
            return 0  # plain loads, some of them turned in registers: for the interpreter, which has no limit
        a_vector = b_vector = 16
    a_copies = stages if a_vector >= 4 and not turned else 1
    b_copies = b_stages if b_vector >= 4 and not b_turned else 1
    if config.BLOCK_M == FLAT and max(a_copies, b_copies) <= 1:
        # Of one stage operands may go from thread to thread; on CUDA cores, or copied ahead, B lies there.
        return 0 if config.num_stages == 1 and device.arch >= 80 else tile.b
    # int4 of 16 columns, or in halves, may have one copy fewer under mma.sync.
    if problem.b_dtype == "int4" and not keeps_all and (config.BLOCK_N == 16 or tile.b_count == 2):
        b_copies -= 1
    # tcgen05 takes A from tensor memory where a thread has a row of it: of columns that are loaded element by element.
    # Its last copy is there, then.
    narrow_columns = problem.a_layout == "col" and a_vector == math.ceil(element)
    if device.major == 10 and keeps_all and narrow_columns and config.BLOCK_M >= 128:
        a_copies -= 1
        if not a_copies:
            tile = tile._replace(a=0)
    total = []
    if problem.b_dtype is not None and keeps_all:
        total.append(int(tile.b / problem.b_bytes * element / tile.a_count))
        if b_copies <= 1:
            tile = tile._replace(b=0)  # from registers to registers
    for size, count, copies in ((tile.a, tile.a_count, a_copies), (tile.b, tile.b_count, b_copies)):
        if copies > 1:
            total.append(copies * count * size)
        elif size > 4 * WARP_SIZE * config.num_warps and config.BLOCK_K // tile.a_count > 16:
            total.append(size)  # the second of two takes the place of the first
    if config.WARP_SPECIALIZE and dtype(problem.output_dtype).bytes == 4:
        # On their way out, results lie beside the operands, which other tiles' take the place of already.
        total.append(config.BLOCK_M * config.BLOCK_N // tile.b_count * 4)
    # Of 8 bits or fewer, in halves and by descriptors, B takes the place of A, which is in registers by then.
    registers = not keeps_all or (device.major == 10 and problem.unit == "int8")
    if registers and max(a_copies, b_copies) <= 1 and (problem.b_bytes <= 1 or tile.b_count > 1 or config.TMA):
        return max(total, default=0)
    return sum(total)


def accumulators(config: GemmConfig) -> float:
    """fp32 accumulators per thread."""
    return config.BLOCK_M * config.BLOCK_N / (multiplying_warps(config) * WARP_SIZE)


def pieces(problem: GemmProblem, config: GemmConfig) -> int:
    """Pieces of a tile's columns that the epilogue works through one after the other.

    With 128 sums a thread, bias and residual of all columns at once spill 50 to 250 bytes on sm_90, those of a quarter
    none. Gated halves are that much fewer already, and a specialised loop's tile can't be taken apart.
    """
    fused = (problem.bias, problem.residual, problem.a_scale, problem.b_scale, problem.alpha, problem.out_scale)
    many = accumulators(config) >= 128 and config.BLOCK_N >= 128 and problem.gated != "halves"
    many = many and not config.WARP_SPECIALIZE
    return 4 if many and (any(fused) or problem.activation != "none") else 1


def fits(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or the limit that the configuration breaks, with the values."""
    limit = malformed(config, ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"))
    if limit is not None:
        return limit
    least_k = 32 if problem.b_dtype == "int4" else max(16, 32 // int(dtype(problem.dtype).bytes))
    least_n = 32 if problem.gated == "halves" else 16
    if min(config.BLOCK_M - FLAT, config.BLOCK_N - least_n, config.BLOCK_K - least_k) < 0:
        of = problem.b_dtype or problem.dtype
        return f"the smallest tile of a {of} dot is {FLAT}×{least_n}×{least_k}" + (" in halves" if least_n > 16 else "")
    if config.BLOCK_M == FLAT:
        limit = _refused_flat(problem, config, device)
        if limit is not None:
            return limit
    if config.PAIRS and (problem.b_dtype is None or device.arch < 80):
        of = problem.b_dtype or problem.dtype
        return f"PAIRS is for weights of int8 and int4, from sm_80 on, not for b of {of} on {device.sm}"
    if problem.group_size % config.BLOCK_K:
        return f"BLOCK_K={config.BLOCK_K} does not divide group_size={problem.group_size}"
    shared = shared_bytes(problem, config, device)
    limit = over_block(config, device, held=accumulators(config), shared_bytes=shared)
    if limit is not None:
        return limit
    if config.PERSISTENT and config.SPLIT_K > 1:
        return f"PERSISTENT goes with SPLIT_K=1, not {config.SPLIT_K}"
    if config.TMA:
        if problem.b_dtype is not None:
            return f"TMA is for operands of one dtype, not {problem.dtype} by {problem.b_dtype}"
        element = dtype(problem.dtype).bytes
        starts = [] if problem.strided else [problem.M if problem.a_layout == "col" else problem.K]
        starts += [] if problem.strided else [problem.K if problem.b_layout == "col" else problem.N]
        if problem.gated == "halves" and problem.b_layout == "row":
            starts.append(problem.N // 2)
        if problem.groups and problem.a_layout == "col":
            starts.append(1)  # a group may start at any row
        if not problem.aligned or any(start * element % 16 for start in starts):
            return "TMA needs tiles of A and B that start at 16 bytes, every row (or column) of them"
        if config.PERSISTENT and (problem.batch > 1 or problem.groups):
            return f"TMA with PERSISTENT is for one A and B, not batch={problem.batch} and groups={problem.groups}"
    if config.WARP_SPECIALIZE:
        limit = _refused_by_specialisation(problem, config)
        if limit is not None:
            return limit
    # Positions are 32-bit, those of the last block's padding too, and so are those of the tiles in a group.
    tiles_m, tiles_n = tiles(problem, config)
    ends = (problem.M + config.BLOCK_M, problem.N + config.BLOCK_N, problem.K + config.BLOCK_K * config.SPLIT_K)
    if max(*ends, config.GROUP_M * tiles_n) >= 2**31:
        return f"positions in {problem.M}×{problem.N}×{problem.K} with GROUP_M={config.GROUP_M} pass 32 bits"
    # Tile rows that no group uses have places too, which are compared with the end of the rows.
    if tiles_m * config.BLOCK_M >= 2**31:
        return f"{tiles_m} tile rows of BLOCK_M={config.BLOCK_M} for groups={problem.groups} pass 32 bits"
    count = tiles_m * tiles_n * problem.batch
    # A block that goes on from tile to tile counts one step past the last.
    if config.PERSISTENT and count + device.sms * device.blocks_per_sm >= 2**31:
        return f"{count} tiles, and the step of a PERSISTENT block past the last, pass 32 bits"
    return over_grid(count, SPLIT_K=config.SPLIT_K)


def takes_flat(problem: GemmProblem) -> bool:
    """Whether a problem can have tiles of eight rows: only so does Triton bring B's transpose to the left of a dot, and
    A's to the right, without turning them in registers."""
    return (problem.a_layout, problem.b_layout) == ("row", "col") and vector_bytes(problem) == 16


def _refused_flat(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or why a tile can't have eight rows."""
    if not takes_flat(problem):
        return (
            f"BLOCK_M={config.BLOCK_M} is for rows of A and columns of B that are loaded 16 bytes at a time, not "
            f"a_layout={problem.a_layout}, b_layout={problem.b_layout} and {vector_bytes(problem)} bytes"
        )
    # Of 64 rows, as the transpose may have, some versions of Triton make wgmma or tcgen05, which gain nothing by it.
    columns = config.BLOCK_N // 2 if problem.gated == "halves" else config.BLOCK_N
    if config.TMA or reads_operands_shared(device, problem.unit, columns, config.num_warps):
        return f"BLOCK_M={config.BLOCK_M} is for mma.sync: no TMA, and on {device.sm} BLOCK_N under 64 or 2 warps"
    return None


def _refused_by_specialisation(problem: GemmProblem, config: GemmConfig) -> str | None:
    """None, or why Triton can't give a loop's copies to warps of their own."""
    if not (config.PERSISTENT and config.TMA):
        return "WARP_SPECIALIZE goes with PERSISTENT and TMA"
    if config.num_warps != SPECIALIZED_WARPS or config.BLOCK_M < 128:
        return (
            f"WARP_SPECIALIZE is for num_warps={SPECIALIZED_WARPS} and BLOCK_M of 128 or more, 64 for each group that "
            f"multiplies, not num_warps={config.num_warps} and BLOCK_M={config.BLOCK_M}"
        )
    if problem.unit == "fp32" or problem.gated == "interleaved":
        of = "gated pairs of columns" if problem.gated == "interleaved" else f"{problem.dtype} on CUDA cores"
        return f"WARP_SPECIALIZE halves tiles by rows, which those of {of} don't allow"
    if dtype(problem.dtype).bytes == 1 and (problem.a_layout, problem.b_layout) != ("row", "col"):
        layouts = f"a_layout={problem.a_layout} and b_layout={problem.b_layout}"
        return f"WARP_SPECIALIZE multiplies 8-bit operands as they lie, rows of A by columns of B, not {layouts}"
    return None


def _least_persistent(device: Device, described: bool) -> float:
    """Tiles from which on persistent blocks are worth trying: two for every SM. On an H200 one is enough with tensor
    descriptors: 16384×256×1024, 128 tiles, takes 17.1 µs with them and 19.5 without."""
    return (0.95 if described and device.hopper else 2.0) * device.sms


def useful(problem: GemmProblem, config: GemmConfig, device: Device) -> str | None:
    """None, or why the configuration can't be the best one."""
    small = min(config.BLOCK_M, config.BLOCK_N) < 64 or config.num_warps < 4
    if config.TMA and (device.arch < 90 or small or config.num_stages < 2):
        return "TMA pays from sm_90 on, where a warp group computes one tile of 64 or more while others are copied"
    if problem.b_dtype is not None and device.arch >= 80 and not config.PAIRS:
        return "PAIRS unpacks weights with a third to a half of the instructions, int8 in bf16 with no more"
    tiles_m, tiles_n = tiles(problem, config)
    if config.PERSISTENT:
        count = tiles_m * tiles_n * problem.batch
        if config.WARP_SPECIALIZE:
            if not device.hopper:
                return f"WARP_SPECIALIZE is for Hopper, and changes nothing on {device.sm}"
            if 2 * count < device.sms:
                return f"{count} tiles leave most of {device.sms} SMs without a WARP_SPECIALIZE block"
        elif count < _least_persistent(device, config.TMA):
            least = "one" if config.TMA and device.hopper else "two"
            return f"{count} tiles are fewer than {least} for each PERSISTENT block on {device.sms} SMs"
        if small or config.BLOCK_M * config.BLOCK_N < 128 * 128:
            return f"the other blocks of an SM hide the start of one of {config.BLOCK_M}×{config.BLOCK_N}"
        if not config.TMA and device.arch >= 90 and fits(problem, replace(config, TMA=True), device) is None:
            return "from sm_90 on PERSISTENT is for TMA, whose copies are no work for the block"
    if config.BLOCK_M == FLAT and not has_few_rows(problem.M, problem.groups):
        return f"tiles of BLOCK_M={FLAT} rows read B once for every {FLAT} of {problem.M} rows"
    reason = mostly_padding(
        (config.BLOCK_M, problem.M, 16), (config.BLOCK_N, problem.N, 16), (config.BLOCK_K, problem.K, 32)
    ) or repeated_group("GROUP_M", config.GROUP_M, AXES["GROUP_M"], tiles_m, "tile rows")
    if reason is not None:
        return reason
    k_blocks = math.ceil(problem.K / config.BLOCK_K)
    if config.SPLIT_K > 1:
        if k_blocks < 4 * config.SPLIT_K:
            return f"SPLIT_K={config.SPLIT_K} leaves fewer than 4 of {k_blocks} K blocks to each"
        reason = needless_split("SPLIT_K", config.SPLIT_K, tiles_m * tiles_n * problem.batch, device, waves=4)
        if reason is not None:
            return reason
    # Copies of a specialised loop go on into the next tile.
    if config.num_stages > max(2, k_blocks // config.SPLIT_K) and not config.WARP_SPECIALIZE:
        return f"num_stages={config.num_stages} is more than the K blocks there are"
    columns = config.BLOCK_N // 2 if config.BLOCK_M == FLAT and problem.gated == "halves" else config.BLOCK_N
    if 16 * 8 * config.num_warps > config.BLOCK_M * columns:
        return f"{config.num_warps} warps on {config.BLOCK_M}×{config.BLOCK_N} leave less than one 16×8 mma each"
    copied = config.TMA or max(operand_vectors(problem)) >= 4
    if config.num_stages > 1 and (device.arch < 80 or not copied):
        return NOTHING_COPIED
    return None


COARSE = {
    "BLOCK_K": (32, 64, 128),
    "GROUP_M": (1, 8),
    "SPLIT_K": (1, 4),
    "num_stages": (1, 3, 4),
    "PERSISTENT": (False,),
    "TMA": (False,),
    "WARP_SPECIALIZE": (False,),
}


def narrow(problem: GemmProblem, device: Device, axes: Mapping[str, tuple[Any, ...]]) -> Mapping[str, tuple[Any, ...]]:
    """The values of each axis that `useful` accepts with some values of the others."""
    kept = dict(axes)
    for name, size, smallest in (
        ("BLOCK_M", problem.M, 16),
        ("BLOCK_N", problem.N, 16),
        ("BLOCK_K", problem.K, 32),
    ):
        kept[name] = tuple(block for block in axes[name] if block <= widest_block(size, smallest))
    if not (takes_flat(problem) and has_few_rows(problem.M, problem.groups)):
        kept["BLOCK_M"] = tuple(block for block in kept["BLOCK_M"] if block != FLAT)
    least = min(kept["BLOCK_M"], default=FLAT)
    tiles_m = problem.M // least + problem.groups if problem.groups else math.ceil(problem.M / least)
    k_blocks = math.ceil(problem.K / AXES["BLOCK_K"][0])
    kept["GROUP_M"] = tuple(group for group in axes["GROUP_M"] if group == 1 or tiles_m > AXES["GROUP_M"][0])
    # Of the largest tiles, the fewest there can be.
    fewest = (
        max(math.ceil(problem.M / AXES["BLOCK_M"][-1]), problem.groups)
        * math.ceil(problem.N / AXES["BLOCK_N"][-1])
        * problem.batch
    )
    kept["SPLIT_K"] = tuple(
        split
        for split in axes["SPLIT_K"]
        if split == 1 or (k_blocks >= 4 * split and fewest * (split // 2) < 4 * device.sms)
    )
    # TMA is content with rows of 16 bytes, which no 16 elements may divide.
    copies = device.arch >= 90 or (device.arch >= 80 and max(operand_vectors(problem)) >= 4)
    kept["num_stages"] = tuple(stages for stages in axes["num_stages"] if stages == 1 or copies)
    if device.arch < 90:
        kept["TMA"] = (False,)
    if problem.b_dtype is None or device.arch < 80:
        kept["PAIRS"] = (False,)
    else:
        kept["PAIRS"] = (True,)
    # Of tiles as large as PERSISTENT wants them, the most there can be.
    shapes = ((64, 256), (128, 128), (256, 64))
    count = max(
        (problem.M // rows + max(1, problem.groups)) * math.ceil(problem.N / columns) for rows, columns in shapes
    )
    if not device.hopper or 2 * count * problem.batch < device.sms:
        kept["WARP_SPECIALIZE"] = (False,)
    if kept["WARP_SPECIALIZE"] == (False,) and count * problem.batch < _least_persistent(device, True in kept["TMA"]):
        kept["PERSISTENT"] = (False,)
    return kept


SPACE: Space[GemmProblem, GemmConfig] = Space(GemmConfig, AXES, fits, useful, COARSE, narrow)


def ragged(problem: GemmProblem, config: GemmConfig) -> GemmProblem:
    """A problem of at most two tiles a side whose last ones are cut, and a K that ends within a block, after splits of
    unequal length. A size that is a multiple of 16 stays one, for alignment decides which loads are compiled."""

    # Rows of 16 bytes, which tensor descriptors need, may be no multiples of 16 elements.
    described = 16 // int(dtype(problem.dtype).bytes) if config.TMA else 1

    def cut(size: int, block: int, blocks: int, least: int = 1) -> int:
        kept = 16 if size % 16 == 0 else max(least, described) if size % described == 0 else least
        if size % 16 and size < block:
            return size  # ragged as it is
        return (blocks - 1) * block + (block - kept if block > kept else block)

    k_blocks = max(2, min(math.ceil(problem.K / config.BLOCK_K), 2 * config.SPLIT_K + 1))
    return replace(
        problem,
        M=cut(problem.M, config.BLOCK_M, min(2, math.ceil(problem.M / config.BLOCK_M))),
        N=cut(problem.N, config.BLOCK_N, min(2, math.ceil(problem.N / config.BLOCK_N)), 2 if problem.gated else 1),
        K=cut(problem.K, config.BLOCK_K, k_blocks),
        batch=min(problem.batch, 2),
        groups=min(problem.groups, 3),
    )

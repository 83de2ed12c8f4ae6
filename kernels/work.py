"""`Work`: what an op tells the prediction model about one configuration of one problem."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from tilewright.kernels.device import Device
from tilewright.kernels.problem import Config

SPECIALIZED_WARPS = 4
"""`num_warps` of a warp-specialised loop: four warps copy, and two more groups of four, of Triton's making, work on
half of the tile's rows each. With 8, Triton (3.6 and 3.9) leaves the loop as it is."""

SPECIALIZED_REGISTERS = 168, 232
"""Of a thread of such a block: as it is launched, and in the groups that multiply, which take those of the first."""


def block_warps(config: Config, device: Device) -> int:
    """Warps of a block as it is launched: of a warp-specialised loop those that copy, and two groups that multiply."""
    specialized = device.hopper and getattr(config, "WARP_SPECIALIZE", False)
    return 3 * SPECIALIZED_WARPS if specialized else config.num_warps


def reads_operands_shared(device: Device, unit: str, rows: int, num_warps: int) -> bool:
    """Whether a dot of so many rows becomes wgmma or tcgen05, which read operands from shared memory: they take 64 rows
    and a warp group."""
    return device.has_group_dots and unit != "fp32" and rows >= 64 and num_warps >= 4


@functools.lru_cache(maxsize=4096)
def warp_tile(tile_m: int, tile_n: int, num_warps: int) -> tuple[float, float]:
    """Rows and columns of the output tile that one warp owns, at least one 16×8 mma.

    As Triton lays warps out for mma.sync: another row of warps while each warp's tile is at least as high as it is wide
    and higher than an mma, else another column.
    """
    rows, columns = 1, 1
    while rows * columns < num_warps:
        if tile_m / rows >= tile_n / columns and tile_m / rows > 16:
            rows *= 2
        else:
            columns *= 2
    return tile_m / rows, max(8.0, tile_n / columns)


LINE_BYTES = 128
"""Of the L1 cache (CUDA C++ Programming Guide, "Device Memory Accesses")."""


def lines(rows: float, bytes_each: float, *, joined: bool) -> float:
    """Lines of the cache that so many rows of a tile lie in; `joined` where they lie side by side without a gap."""
    return math.ceil(rows * bytes_each / LINE_BYTES) if joined else rows * math.ceil(bytes_each / LINE_BYTES)


class Dot(NamedTuple):
    """One dot of a block's iteration."""

    m: int
    n: int
    k: int
    rows: float  # of the m × n result, that one warp owns
    columns: float
    staged: bool  # whether the left operand is brought anew in every iteration


@dataclass(frozen=True, slots=True)
class Panel:
    """What one row (or column) of output tiles reads of one operand, and how often it is read again.

    A block in tile row i reads panel i of operand A; blocks that run at the same time and share a row share the read
    through L2.
    """

    bytes: float  # of device memory behind one panel, for one batch index and one K split, in bounds
    shared_by_batches: bool = False  # the operand is broadcast over the batch


@dataclass(frozen=True, slots=True)
class Work:
    """A launch as a grid of output tiles, each a loop of dot products. Bytes and operations are those of one block.

    The grid is `batch` × `splits` × `tiles_m` × `tiles_n` blocks, walked in groups of `group_m` tile rows.

    A loop may have a second dot, whose left operand is what the first one left in registers (attention's P·V, with Q
    loaded before the loop), and work beside its dots; a kernel without any dot has a `tile_k` of 0.
    """

    # grid
    tiles_m: int
    tiles_n: int
    splits: int
    batch: int
    group_m: int
    # one block's main loop
    iterations: int
    tile_m: int
    tile_n: int
    tile_k: int
    num_warps: int
    num_stages: int
    unit: str  # rate of the dot products: a key of `Device.tensor_tflops`, or "fp32"
    operand_bytes: float  # bytes of one element of the dot's operands, in shared memory
    load_bytes: float  # read per iteration, in bounds, both operands
    # Widest load that alignment and the tile's size allow: 16 is the cheapest; under 4, loads pass through registers.
    vector_bytes: int
    # device memory
    panel_a: Panel
    panel_b: Panel
    epilogue_bytes: float  # read and written by one tile's epilogue
    workspace_bytes: float  # of one block's partial result, written and read again; 0 without split-K
    # Lines of 128 bytes that one iteration's loads touch, row by row of the operands: more than `load_bytes` fill where
    # rows are shorter. 0: not counted, for rows are long.
    load_lines: float = 0.0
    launches: int = 1
    persistent: bool = False  # blocks go on to other tiles
    # Tiles of different lengths: the longest over the mean, and the blocks over which they go from it to the shortest
    # before the next such series.
    longest: float = 1.0
    descent: float = 1.0
    specialized: bool = False  # and warps that do nothing else copy ahead, past the end of a tile
    # in one iteration of one block, beside the dot
    second: tuple[int, int, int] | None = None  # rows, columns and depth of another dot
    lane_ops: float = 0.0  # fp32 and integer operations of single lanes on the CUDA cores
    special_ops: float = 0.0  # exponentials and the like of single lanes
    overlapped: bool = False  # they run beside the second dot, not after the first and before the second

    @property
    def tiles(self) -> int:
        """Output tiles of the launch."""
        return self.tiles_m * self.tiles_n * self.batch

    @property
    def blocks(self) -> int:
        """Thread blocks of the launch."""
        return self.tiles * self.splits

    @property
    def dots(self) -> tuple[Dot, ...]:
        """The dots of an iteration."""
        if self.second is None:
            if not self.tile_k:
                return ()
            rows, columns = warp_tile(self.tile_m, self.tile_n, self.num_warps)
            return (Dot(self.tile_m, self.tile_n, self.tile_k, rows, columns, True),)
        # Triton lays the warps of chained dots out along the rows alone, so that the second finds its rows in place.
        rows = max(16.0, self.tile_m / self.num_warps)
        m, n, k = self.second
        return (
            Dot(self.tile_m, self.tile_n, self.tile_k, rows, self.tile_n, False),
            Dot(m, n, k, rows, n, False),
        )

    @property
    def staged_bytes(self) -> float:
        """Bytes that pass through shared memory in an iteration."""
        staged = self.tile_n * self.tile_k
        staged += self.tile_m * self.tile_k if self.second is None else self.second[1] * self.second[2]
        return staged * self.operand_bytes

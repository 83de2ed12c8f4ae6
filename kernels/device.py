"""What a result depends on about a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_REGISTERS_PER_THREAD = 255
"""On every arch from sm_35 on (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

WARP_SIZE = 32

REGISTERS_PER_BLOCK = 65536
"""On every arch from sm_53 on (same table)."""

SUBPARTITIONS = 4
"""Of an SM, each with its own warps, its own tensor core and a scheduler of one instruction a cycle (same guide,
"Compute Capabilities")."""

MAX_WARPS_PER_BLOCK = 32
MAX_GRID_X, MAX_GRID_Y = 2**31 - 1, 65535
"""Limits of a launch on every arch (same table)."""


def registers_allowed(num_warps: int) -> int:
    """Registers that a thread of a block of so many warps can have at the most."""
    return min(MAX_REGISTERS_PER_THREAD, REGISTERS_PER_BLOCK // (num_warps * WARP_SIZE))


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU board: limits, rates and clocks.

    Rates are dense, as NVIDIA states them: at `boost_mhz`, or on the largest boards at a lower clock of the tensor
    cores. Those of floating-point types accumulate in fp32, which GeForce boards do at half the advertised fp16 rate.
    """

    board: str  # short name, a slug: "rtx3090"
    name: str  # as the driver prints it: "NVIDIA GeForce RTX 3090"
    arch: int  # compute capability, 86 for sm_86
    sms: int
    boost_mhz: int
    bandwidth_gbs: float  # device memory, 1e9 bytes/s
    memory_gib: float
    l2_bytes: int
    shared_per_block: int  # bytes a block may opt in to
    shared_per_sm: int  # bytes
    registers_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int
    fp32_tflops: float  # CUDA cores, fused multiply-add counted as two
    tensor_tflops: Mapping[str, float]  # by unit: fp16 bf16 tf32 int8 fp8; empty where Triton has no tensor-core path
    source: str  # where the figures come from
    live: str = ""  # "cuda:0" when the device is at hand
    note: str = ""  # what its owner should know, shown by the command line
    aliases: tuple[str, ...] = field(default=(), compare=False)

    @property
    def key(self) -> str:
        """The board and its SM count: two boards of one arch, or a slice of one, never share results."""
        return f"{self.board}-{self.sms}sm"

    @property
    def sm(self) -> str:
        """The arch as a compiler writes it: `sm_86`."""
        return f"sm_{self.arch}"

    @property
    def major(self) -> int:
        """Major number of the compute capability: 8 for sm_86."""
        return self.arch // 10

    @property
    def hopper(self) -> bool:
        """Whether this is compute capability 9.x: wgmma, and warp groups that give each other registers."""
        return self.major == 9

    @property
    def has_group_dots(self) -> bool:
        """Whether a warp group has one instruction for a dot of 64 rows that reads its operands from shared memory:
        wgmma on sm_90, tcgen05 on sm_100 and sm_103. All others, sm_120 too, have mma.sync alone."""
        return self.major in (9, 10)

    def tflops(self, unit: str) -> float:
        """Peak TFLOP/s of dot products at `unit` (a dtype's `unit`, or `fp32` for CUDA cores).

        A unit the tensor cores lack runs on the CUDA cores, except fp8 on sm_80 and sm_86: it is widened to fp16.
        """
        if unit == "fp8" and unit not in self.tensor_tflops:
            unit = "fp16"
        return self.tensor_tflops.get(unit, self.fp32_tflops)

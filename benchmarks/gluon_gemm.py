# mypy: ignore-errors
"""A GEMM in Gluon for sm_90, to learn what portable Triton leaves there: no kernel of the library, and not tuned by it.

Warp-specialised and persistent: one warp copies tiles of A and B by the tensor memory accelerator into a ring of
stages, two groups of four warps multiply (wgmma) and write the result through shared memory. They share the work out in
one of two ways, after CUTLASS's kernels of these names for sm_90:

- ping-pong: each group has tiles of its own, in turns, so that one multiplies during the other's epilogue;
- cooperative: each has half of the rows of every tile, and B's stages serve both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tilewright.kernels.activations import activate
from tilewright.kernels.ops.gemm.jit import tile_of

# Their names up to Triton 3.6, and since.
copy_tile_in = getattr(tma, "async_load", tma.async_copy_global_to_shared)
copy_tile_out = getattr(tma, "async_store", tma.async_copy_shared_to_global)

GROUPS = 2
"""Groups of four warps that multiply."""

MULTIPLYING_REGISTERS, COPYING_REGISTERS = gl.constexpr(240), gl.constexpr(24)
"""Of a thread: two groups of the one and one of the other have 168 on average."""

REGISTERS = 168
"""That a thread is launched with: 65,536 for the 384 threads of a block, in steps of 8."""


@dataclass(frozen=True, slots=True)
class GluonGemmConfig:
    """How a product is cut up.

    Attributes:
        BLOCK_M, BLOCK_N: the part of the result that a group of four warps has at a time.
        BLOCK_K: of a stage.
        STAGES: of the ring.
        GROUP_M: rows of tiles that are walked together, for L2.
        PIECES: in which a group's part is written, one after the other.
        COOPERATIVE: both groups work on one tile of `2 * BLOCK_M` rows.
    """

    BLOCK_M: int = 128
    BLOCK_N: int = 128
    BLOCK_K: int = 64
    STAGES: int = 5
    GROUP_M: int = 8
    PIECES: int = 1
    COOPERATIVE: bool = False

    @property
    def rows(self) -> int:
        """Rows of a stage of A."""
        return self.BLOCK_M * (GROUPS if self.COOPERATIVE else 1)

    def shared_bytes(self, element: int = 2) -> int:
        """Of the ring and of what is to be written, without barriers, for elements of so many bytes."""
        ring = self.STAGES * (self.rows + self.BLOCK_N) * self.BLOCK_K
        return element * (ring + GROUPS * self.BLOCK_M * self.BLOCK_N // self.PIECES)


@gluon.jit
def copy_in(a_desc, b_desc, a_ring, b_ring, barriers, sizes, GROUP_M: gl.constexpr):
    """The warp that copies: tile by tile, the blocks of K into the stages, each as soon as it is free."""
    STAGES: gl.constexpr = a_ring.shape[0]
    ROWS: gl.constexpr = a_ring.shape[1]
    COLUMNS: gl.constexpr = b_ring.shape[1]
    BLOCK_K: gl.constexpr = a_ring.shape[2]
    full, empty, _ = barriers
    tiles_m, tiles_n, blocks = sizes
    stage = 0
    phase = 1  # of a barrier that nobody has used, the phase before the first counts as over
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        for block in range(blocks):
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
            at = block * BLOCK_K
            copy_tile_in(a_desc, [tile_m * ROWS, at], full.index(stage), a_ring.index(stage))
            copy_tile_in(b_desc, [tile_n * COLUMNS, at], full.index(stage), b_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def multiply(
    group: gl.constexpr,
    out_desc,
    bias_ptr,
    N,
    a_ring,
    b_ring,
    out_parts,
    barriers,
    sizes,
    GROUP_M: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """A group that multiplies: every tile's part, or every second tile."""
    STAGES: gl.constexpr = a_ring.shape[0]
    ROWS: gl.constexpr = a_ring.shape[1]
    BLOCK_M: gl.constexpr = out_parts.shape[1]
    BLOCK_N: gl.constexpr = b_ring.shape[1]
    PART: gl.constexpr = out_parts.shape[2]
    TURNS: gl.constexpr = 1 if COOPERATIVE else 2
    OFFSET: gl.constexpr = group * BLOCK_M if COOPERATIVE else 0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    full, empty, turns = barriers
    tiles_m, tiles_n, blocks = sizes
    out_part = out_parts.index(group)
    first = gl.program_id(0)
    used = 0  # stages before this group's tile, those of the other group's tiles counted
    if not COOPERATIVE:
        first += group * gl.num_programs(0)
        used += group * blocks
    my_turn = 1 - group  # as in `copy_in`: the first group has its first turn without being told
    for tile in range(first, tiles_m * tiles_n, TURNS * gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        stage = used % STAGES
        phase = (used // STAGES) & 1
        used += TURNS * blocks
        before = stage
        total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        if not COOPERATIVE:
            # A barrier tells two phases in a row apart and no more: who waits for a stage must be the next to use it.
            mbarrier.wait(turns.index(group), my_turn)
            my_turn ^= 1
        for block in range(blocks):
            mbarrier.wait(full.index(stage), phase)
            a = a_ring.index(stage).slice(OFFSET, BLOCK_M)
            total = warpgroup_mma(a, b_ring.index(stage).permute((1, 0)), total, is_async=True)
            # One product stays under way; the stage of the one before is free.
            total = warpgroup_mma_wait(1, deps=(total,))
            mbarrier.arrive(empty.index(before), pred=block > 0)
            before = stage
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if not COOPERATIVE:
            mbarrier.arrive(turns.index(1 - group))
        total = warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(before))

        row = tile_m * ROWS + OFFSET
        column = tile_n * BLOCK_N
        if bias_ptr is not None:
            columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
            bias = gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32)
            total += gl.expand_dims(bias, 0)
        y = activate(total, ACTIVATION).to(out_desc.dtype)
        if PART == BLOCK_N:
            write(out_desc, out_part, y, row, column)
        else:
            left, right = gl.split(gl.permute(gl.reshape(y, [BLOCK_M, 2, PART]), (0, 2, 1)))
            write(out_desc, out_part, left, row, column)
            write(out_desc, out_part, right, row, column + PART)
    tma.store_wait(0)


@gluon.jit
def write(out_desc, out_part, y, row, column):
    """Writes a part of the result, which is under way when this returns."""
    tma.store_wait(0)  # what was written from here before has been read
    out_part.store(y)
    fence_async_shared()
    copy_tile_out(out_desc, [row, column], out_part)


@gluon.jit
def gluon_gemm_kernel(
    a_desc,  # (M, K), by (rows, BLOCK_K)
    b_desc,  # (N, K), by (BLOCK_N, BLOCK_K)
    out_desc,  # (M, N), by (BLOCK_M, BLOCK_N / PIECES)
    bias_ptr,  # (N,), or None
    M,
    N,
    K,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    COOPERATIVE: gl.constexpr,
    ACTIVATION: gl.constexpr,  # by its canonical name
):
    """out = activation(A·Bᵀ + bias), sums in fp32."""
    ROWS: gl.constexpr = a_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = a_desc.block_type.shape[1]
    BLOCK_M: gl.constexpr = out_desc.block_type.shape[0]
    PART: gl.constexpr = out_desc.block_type.shape[1]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES, ROWS, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    out_parts = gl.allocate_shared_memory(out_desc.dtype, [2, BLOCK_M, PART], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2 if COOPERATIVE else 1)
    for group in gl.static_range(2):
        mbarrier.init(turns.index(group), count=1)
    fence_async_shared()
    barriers = (full, empty, turns)
    sizes = (gl.cdiv(M, ROWS), gl.cdiv(N, BLOCK_N), gl.cdiv(K, BLOCK_K))
    gl.warp_specialize(
        [
            (multiply, (0, out_desc, bias_ptr, N, a_ring, b_ring, out_parts, barriers, sizes, GROUP_M, COOPERATIVE,
                        ACTIVATION)),
            (multiply, (1, out_desc, bias_ptr, N, a_ring, b_ring, out_parts, barriers, sizes, GROUP_M, COOPERATIVE,
                        ACTIVATION)),
            (copy_in, (a_desc, b_desc, a_ring, b_ring, barriers, sizes, GROUP_M)),
        ],
        [4, 1],
        [MULTIPLYING_REGISTERS, COPYING_REGISTERS],
    )  # fmt: skip


def gluon_gemm(a: Any, b: Any, bias: Any, activation: str, config: GluonGemmConfig, programs: int) -> Any:
    """activation(a·bᵀ + bias) of torch's arrays, a of (M, K), b of (N, K) and bias of (N,) or None, all of fp16 or bf16
    and dense, with rows of a multiple of 16 bytes, on a GPU with so many multiprocessors."""
    m, n = len(a), len(b)
    out = a.new_empty((m, n))
    tiles = triton.cdiv(m, config.rows) * triton.cdiv(n, config.BLOCK_N)
    arguments, options = launch_arguments(a, b, out, bias, activation, config)
    gluon_gemm_kernel[(min(programs, tiles),)](*arguments, **options)
    return out


def launch_arguments(
    a: Any, b: Any, out: Any, bias: Any, activation: str, config: GluonGemmConfig
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the kernel is launched with."""
    (m, k), n = a.shape, len(b)
    arguments = (
        _described(a, config.rows, config.BLOCK_K),
        _described(b, config.BLOCK_N, config.BLOCK_K),
        _described(out, config.BLOCK_M, config.BLOCK_N // config.PIECES),
        bias,
        m,
        n,
        k,
    )
    options = {
        "BLOCK_N": config.BLOCK_N,
        "STAGES": config.STAGES,
        "GROUP_M": config.GROUP_M,
        "COOPERATIVE": config.COOPERATIVE,
        "ACTIVATION": activation,
        "num_warps": 4,
        "maxnreg": REGISTERS,
    }
    return arguments, options


def _described(array: Any, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(array, [rows, columns], tile_layout(rows, columns))


def tile_layout(*shape: int) -> gl.NVMMASharedLayout:
    """How a tile of 16-bit elements lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(shape), gl.float16)

"""The default configuration of the fused GEMM: what runs when nothing is known of a problem."""

from __future__ import annotations

import math
from dataclasses import replace

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.gemm.problem import FLAT, GemmProblem
from tilewright.kernels.ops.gemm.space import (
    AXES,
    GemmConfig,
    fits,
    operand_vectors,
    takes_flat,
    tiles,
    vector_bytes,
)

FEW_PRODUCTS = 1024
"""K up to which Hopper's default is warp-specialised: see `_described`."""


def default(problem: GemmProblem, device: Device) -> GemmConfig:
    """What runs when nothing is known: fits every problem whose grid can be launched, and does not spill."""
    copies = max(operand_vectors(problem)) >= 4 and device.arch >= 80
    least_n = 32 if problem.gated == "halves" else 16
    # The loop over int8 carries the operands of one step along K, packed and unpacked again: the deeper, the less.
    deep = 64 if problem.unit == "int8" and vector_bytes(problem) == 16 else 32
    rows = problem.M if not problem.groups else math.ceil(problem.M / problem.groups)
    if problem.unit == "fp32" or not device.tensor_tflops:
        # CUDA cores hold their operands in registers: larger tiles spill.
        config = GemmConfig(BLOCK_M=16 if rows <= 16 else 32, BLOCK_N=32, BLOCK_K=32, num_stages=2 if copies else 1)
    elif rows <= 32 or problem.N <= 32:
        config = GemmConfig(
            BLOCK_M=16 if rows <= 16 else 32,
            BLOCK_N=32 if problem.N <= 32 else 64,
            BLOCK_K=64 if copies and problem.dtype != "fp32" else 32,
            num_stages=4 if copies else 1,
        )
    elif copies and vector_bytes(problem) == 16 and min(rows, problem.N) >= 1024:
        # A group's sums, scaled, go to those of the tile: of 128 columns they spill where tensor memory has the former.
        few = (problem.group_size and device.major == 10) or _crowded(problem, device)
        columns = 64 if few else 128
        config = GemmConfig(BLOCK_M=128, BLOCK_N=columns, BLOCK_K=deep, num_warps=8, num_stages=4)
    else:
        config = GemmConfig(BLOCK_M=64, BLOCK_N=64, BLOCK_K=deep if copies else 32, num_stages=4 if copies else 1)
    if problem.group_size:
        config = replace(config, BLOCK_K=min(config.BLOCK_K, problem.group_size))
    if problem.b_dtype is not None and device.arch >= 80:
        config = replace(config, PAIRS=True)
    if problem.b_dtype is not None and rows <= FLAT and takes_flat(problem):
        # Unpacking keeps a warp busy, and blocks are few: 32 columns are two warps' of 16, as many as an mma has rows.
        config = replace(config, BLOCK_M=FLAT)
        if device.tensor_tflops:
            config = replace(config, BLOCK_N=32 * (least_n // 16), num_warps=2)
    config = replace(config, BLOCK_N=max(config.BLOCK_N, least_n))
    if device.hopper:
        own = (_few_rows(problem, rows), _few_weights(problem, rows, device), _described(problem, device))
        config = next((each for each in own if each is not None and fits(problem, each, device) is None), config)
    while fits(problem, config, device) is not None and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _ragged(problem: GemmProblem) -> bool:
    """Whether what the epilogue reads and writes goes element by element."""
    return not problem.end_aligned or problem.columns_out % 16 > 0


def _crowded(problem: GemmProblem, device: Device) -> bool:
    """Whether more than 32 sums a thread spill, with Triton 3.6 or 3.9: beside a residual that is read element by
    element, with an address for each, whatever the pieces of the epilogue, and on Hopper beside an activation of fp8
    (whose tile has two sums) that is written so; by what softplus computes, on sm_90 and sm_100, or any activation of
    int8 on sm_100; by the zero points of groups for two halves."""
    fp8 = device.hopper and problem.unit == "fp8" and problem.activation != "none"
    by_element = (problem.residual is not None or fp8) and _ragged(problem)
    softplus = device.major in (9, 10) and problem.activation == "softplus"
    int8 = device.major == 10 and problem.unit == "int8" and problem.activation != "none"
    return by_element or softplus or int8 or (problem.b_zero and problem.group_size > 0 and problem.gated == "halves")


def _few_rows(problem: GemmProblem, rows: int) -> GemmConfig | None:
    """Hopper's default for 1 to 16 and 33 to 64 rows of 16 bits, which wait for B: as much of it on its way as fits in
    shared memory, where N and K are 1024 or more.

    On an H200, 1×4096×4096 takes 0.64 of the time of the plain default, 64×6144×4096 0.41 and 64×8192×8192 0.45.
    """
    deep = problem.K >= 1024 and problem.N >= 1024 and vector_bytes(problem) == 16
    if problem.unit not in ("fp16", "bf16") or problem.b_dtype is not None or not deep or 16 < rows <= 32 or rows > 64:
        return None
    if rows <= 16:
        return GemmConfig(16, 64, 128, GROUP_M=1, num_warps=2, num_stages=5)
    return GemmConfig(64, 64, 128, GROUP_M=1, num_warps=4, num_stages=5)


def _few_weights(problem: GemmProblem, rows: int, device: Device) -> GemmConfig | None:
    """Hopper's default for up to 16 rows by int4 weights, whose unpacking takes many blocks: splits give every SM two.

    On an H200, 1×4096×4096 takes 0.32 of the time of the plain default, 1×4096×14336 0.23, 1×28672×4096 0.77, and
    1×57344×8192, where blocks are enough without splits, 1.02, all with tiles of 16 rows.
    """
    if problem.b_dtype != "int4" or rows > 16 or problem.N < 1024 or vector_bytes(problem) < 16:
        return None
    block_k = min(128, problem.group_size or 128)
    blocks, k_blocks = math.ceil(problem.N / 64) * max(1, problem.groups) * problem.batch, problem.K / block_k
    splits = 1
    while blocks * splits < 1.9 * device.sms and k_blocks >= 8 * splits and splits < AXES["SPLIT_K"][-1]:
        splits *= 2
    flat = rows <= FLAT and takes_flat(problem)
    warps = 4 if splits == 1 and not flat else 2
    rows_of_tile = FLAT if flat else 16
    return GemmConfig(rows_of_tile, 64, block_k, GROUP_M=1, SPLIT_K=splits, num_warps=warps, num_stages=4, PAIRS=True)


def _described(problem: GemmProblem, device: Device) -> GemmConfig | None:
    """Hopper's default for large products: a tile of two warp groups, persistent and by tensor descriptors, where there
    is one for every SM.

    On an H200 it takes 0.72 of the time of the plain default at 4096³, and 0.53 at 16384×256×1024; of int8 at 4096³
    0.63, of fp8 0.52. Warp-specialised, the next tile is copied during the epilogue: for K up to 1024 that takes 0.85
    to 1.04 of the other's time, of int8 at 4096³ 0.80, and at K of 4096 and 16 bits 1.02 to 1.08. Of fp8 at 4096³ tiles
    of 256×128 would take 0.89 with Triton 3.6, and spill with 3.9, as other epilogues than the lightest do: they are
    for the tuner to find.
    """
    halves = problem.gated == "halves"  # with a sum of each, beside which 256 columns leave room for little
    crowded = _crowded(problem, device)
    if problem.b_dtype is not None or problem.K < 256:
        return None
    # Results of 4 bytes take a place in shared memory beside the next tile's operands, and what the epilogue needs
    # registers: with Triton 3.9 an activation spills, and so do a bias and scales by row or column together.
    vectors = {problem.a_scale, problem.b_scale} - {None, "tensor"}
    light = problem.activation == "none" and not (problem.alpha or problem.out_scale)
    light = light and (problem.bias is None or (problem.bias_axis == "n" and not vectors))
    special = light and problem.residual is None and not problem.gated and dtype(problem.output_dtype).bytes < 4
    narrow = crowded and (not halves or problem.residual is not None)
    ragged = _ragged(problem)
    if problem.unit in ("fp16", "bf16"):
        if narrow or (ragged and not halves and not special):
            config = GemmConfig(128, 64, 64, num_warps=8, num_stages=4)
        elif ragged or (halves and (vectors or problem.residual is not None or crowded)):
            config = GemmConfig(128, 128, 64, num_warps=8, num_stages=4)
        elif problem.K > FEW_PRODUCTS or not special:
            config = GemmConfig(128, 256, 64, num_warps=8, num_stages=4)
        elif problem.bias is None:
            config = GemmConfig(256, 128, 64, num_warps=4, num_stages=4, WARP_SPECIALIZE=True)
        else:
            config = GemmConfig(128, 256, 64, num_warps=4, num_stages=3, WARP_SPECIALIZE=True)
    elif problem.unit not in ("int8", "fp8") or (problem.a_layout, problem.b_layout) != ("row", "col"):
        return None  # wgmma takes 8-bit operands as they lie, along K
    elif narrow:
        return None
    elif problem.unit == "fp8" or (ragged and light) or (halves and (problem.bias or problem.residual)):
        config = GemmConfig(128, 128, 128, num_warps=8, num_stages=4)  # of fp8 there are two sums of each tile, too
    elif not special:
        config = GemmConfig(128, 256, 128, num_warps=8, num_stages=3)
    else:
        config = GemmConfig(128, 256, 128, num_warps=4, num_stages=4, WARP_SPECIALIZE=True)
    config = replace(config, PERSISTENT=True, TMA=True)
    tiles_m, tiles_n = tiles(problem, config)
    # Tiles of which a third is idle cost more than the larger tile gains.
    idle = 0.75 * tiles_n * config.BLOCK_N > problem.N or 0.75 * tiles_m * config.BLOCK_M > problem.M
    if tiles_m * tiles_n < 0.95 * device.sms or idle:
        return None
    return config

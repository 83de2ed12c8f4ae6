"""What a configuration of the fused RMSNorm means for the model of time: its resources before anything is compiled, and
its grid, its loop and its bytes."""

from __future__ import annotations

import math

from tilewright.kernels.device import Device, registers_allowed
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.kernels.ops.rmsnorm.space import (
    RmsNormConfig,
    registers_needed,
    shared_bytes,
    vector_bytes,
    whole,
)
from tilewright.kernels.work import Panel, Work
from tilewright.tuning_db.record import Resources


def estimate(problem: RmsNormProblem, config: RmsNormConfig, device: Device) -> Resources:
    """Resources before anything is compiled."""
    needed, allowed = registers_needed(problem, config), registers_allowed(config.num_warps)
    spilled = 4 * int(max(0.0, needed - allowed))
    return Resources(
        registers=int(min(needed, allowed)),
        spill_bytes=spilled,
        stack_bytes=spilled,
        shared_bytes=shared_bytes(problem, config, device),
    )


def work(problem: RmsNormProblem, config: RmsNormConfig) -> Work:
    """The grid, the loop and the bytes of one configuration, whose columns are all in one tile column.

    A second walk is charged to device memory like the first. The rows of all resident blocks are more than L2 holds
    (16 blocks with 8 KiB each on 82 SMs are 11 MB), but for problems so small that memory is not what they wait for.
    """
    tiles = math.ceil(problem.M / config.BLOCK_M)
    walks = 1 if whole(problem, config) else 2
    iterations = walks * math.ceil(problem.N / config.BLOCK_N)
    rows = problem.M / tiles  # in bounds, on average
    read = dtype(problem.dtype).bytes
    if problem.residual is not None:
        read += dtype(problem.residual).bytes
    weight = 0.0 if problem.weight is None else problem.N * dtype(problem.weight).bytes
    weighings = walks if problem.row_scale else 1
    written = dtype(problem.output_dtype).bytes
    if problem.residual is not None and problem.residual_out:
        written += dtype(problem.residual).bytes
    # Operations an element: to widen, add and square; to scale, weigh and round, which to 8 bits takes a division and
    # limits.
    lanes = (2 + 2 * (problem.residual is not None)) * walks + 2.5
    lanes += weighings * (problem.weight is not None) + 3 * problem.row_scale
    if problem.out_scale:
        lanes += 4 if problem.row_scale else 14
    return Work(
        tiles_m=tiles,
        tiles_n=1,
        splits=1,
        batch=1,
        group_m=1,
        iterations=iterations,
        tile_m=config.BLOCK_M,
        tile_n=config.BLOCK_N,
        tile_k=0,
        num_warps=config.num_warps,
        num_stages=1 if whole(problem, config) else config.num_stages,
        unit=problem.unit,
        operand_bytes=dtype(problem.dtype).bytes,
        load_bytes=(walks * rows * problem.N * read + weighings * weight) / iterations,
        vector_bytes=vector_bytes(problem, config),
        panel_a=Panel(walks * rows * problem.N * read),
        panel_b=Panel(weight),
        epilogue_bytes=rows * (problem.N * written + 4 * problem.row_scale),
        workspace_bytes=0.0,
        lane_ops=lanes * config.BLOCK_M * config.BLOCK_N / walks,
        special_ops=config.BLOCK_M / iterations,
    )

"""How a convolution's configuration becomes a launch, and the `Kernel` object that ties the op together."""

from __future__ import annotations

import math

import triton.language as tl

from tilewright.kernels.dtypes import FP8_SUM, dtype
from tilewright.kernels.kernel import Argument, Kernel, Launch, Scratch
from tilewright.kernels.ops.conv2d import depthwise, jit, problem, space, work
from tilewright.kernels.ops.conv2d.default import default
from tilewright.kernels.ops.conv2d.features import FEATURES
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import Conv2dConfig


def launches(problem: Conv2dProblem, config: Conv2dConfig) -> tuple[Launch, ...]:
    """The one launch of a convolution: of the depthwise kernel where every filter sees one channel, else of the
    implicit GEMM."""
    wise = problem.depthwise
    groups = 1 if wise else problem.groups
    channels, filters = problem.C // groups, problem.K // groups
    positions = space.positions(problem, config)
    tiles = math.ceil(positions / config.BLOCK_M) * math.ceil(filters / config.BLOCK_N) * groups
    split = config.SPLIT_K > 1 and not wise
    nchw = problem.layout == "nchw"

    def pointer(name: str, kind: str | None) -> Argument:
        return Argument(name, kind and "*" + dtype(kind).triton, aligned=problem.aligned)

    def scalar(name: str, wanted: bool) -> Argument:
        return Argument(name, "*fp32" if wanted else None)

    def size(name: str, value: int, wanted: bool = False) -> Argument:
        # Where divisibility changes no load or store it would only make more kernels.
        return Argument(name, "i32", value, aligned=wanted and value % 16 == 0)

    arguments = (
        pointer("x_ptr", problem.dtype),
        pointer("w_ptr", problem.dtype),
        pointer("bias_ptr", problem.bias),
        pointer("residual_ptr", problem.residual),
        scalar("x_scale_ptr", problem.x_scale),
        scalar("w_scale_ptr", problem.w_scale is not None),
        scalar("alpha_ptr", problem.alpha),
        scalar("out_scale_ptr", problem.out_scale),
        size("N", problem.N),
        size("H", problem.H, nchw),
        size("W", problem.W, nchw),
        size("C", channels, True),
        size("K", filters, True),
        size("P", problem.P, nchw),
        size("Q", problem.Q, nchw),
        size("pad_top", problem.pad_top),
        size("pad_left", problem.pad_left),
        pointer("out_ptr", problem.output_dtype),
    )
    integers = problem.dtype == "int8"
    run = min(16, problem.Q & -problem.Q) if nchw else 1
    window = (
        ("R", problem.R),
        ("S", problem.S),
        ("STRIDE_H", problem.stride_h),
        ("STRIDE_W", problem.stride_w),
        ("DILATION_H", problem.dilation_h),
        ("DILATION_W", problem.dilation_w),
        ("NHWC", not nchw),
        ("RUN", run),
        ("PADDED", problem.padded),
    )
    even = (("EVEN_M", positions % config.BLOCK_M == 0), ("EVEN_N", filters % config.BLOCK_N == 0))
    epilogue = (
        ("SUM", tl.int32 if integers else tl.float32),
        ("W_SCALE", problem.w_scale or "tensor"),
        ("ACTIVATION", problem.activation),
        ("RESIDUAL_LAST", problem.residual_last),
    )
    tile = (("BLOCK_M", config.BLOCK_M), ("BLOCK_N", config.BLOCK_N))
    grid = (tiles, config.SPLIT_K if split else 1, 1)
    if wise:
        rows = (("EVEN_P", problem.P % config.ROWS == 0), ("ROWS", config.ROWS))
        unroll = ("UNROLL", space.taps_at_once(problem, config))
        constexprs = (("MULTIPLIER", filters // channels), *window, *even, *epilogue, *tile, *rows, unroll)
        launch = Launch(depthwise.depthwise_kernel, grid, arguments, constexprs, config.num_warps, config.num_stages)
        return (launch,)
    depth = problem.depth if config.FOLD else channels
    return (
        Launch(
            fn=jit.conv2d_kernel,
            grid=grid,
            arguments=(
                *arguments,
                Argument("workspace_ptr", ("*i32" if integers else "*fp32") if split else None, aligned=True),
                Argument("counters_ptr", "*i32" if split else None, aligned=True),
            ),
            constexprs=(
                ("GROUPS", groups),
                *window,
                ("KRSC", problem.w_layout == "krsc"),
                ("FOLD", channels if config.FOLD else 0),
                *even,
                ("EVEN_K", depth % config.BLOCK_K == 0),
                *epilogue,
                ("PRECISION", problem.precision or "tf32"),
                ("FP8_SUM", min(FP8_SUM, config.BLOCK_K) if problem.dtype.startswith("fp8") else 0),
                *tile,
                ("GROUP_M", config.GROUP_M),
                ("BLOCK_K", config.BLOCK_K),
                ("SPLIT_K", config.SPLIT_K),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            scratch=(
                Scratch(
                    "workspace",
                    "int32" if integers else "float32",
                    tiles * config.SPLIT_K * config.BLOCK_M * config.BLOCK_N,
                ),
                Scratch("counters", "int32", tiles),
            )
            if split
            else (),
        ),
    )


CONV2D: Kernel[Conv2dProblem, Conv2dConfig] = Kernel(
    name="conv2d",
    problem=Conv2dProblem,
    space=space.SPACE,
    jit_functions=(jit.conv2d_kernel, depthwise.depthwise_kernel),
    default=default,
    launches=launches,
    reference=problem.reference,
    tolerance=problem.tolerance,
    estimate=work.estimate,
    work=work.work,
    near=problem.near,
    supported=problem.supported,
    ragged=space.ragged,
    features=FEATURES,
)

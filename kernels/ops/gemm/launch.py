"""How a GEMM configuration becomes a launch, and the `Kernel` object that ties the op together."""

from __future__ import annotations

import math

from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Argument, Kernel, Launch, Scratch
from tilewright.kernels.ops.gemm import jit, problem, space
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig

FP8_SUM = 128
"""Tensor cores of sm_90 add fp8 products with 14 bits; after this many the sum moves on to fp32 (the interval that
DeepSeek-V3 settled on, arXiv:2412.19437, section 3.3.2)."""

STRIDES = (
    "a_stride",
    "b_stride",
    "residual_stride",
    "a_batch_stride",
    "b_batch_stride",
    "residual_batch_stride",
    "out_stride",
    "out_batch_stride",
)


def launches(problem: GemmProblem, config: GemmConfig) -> tuple[Launch, ...]:
    """The one launch of a GEMM. With `strided`, its stride arguments are left to be bound to the arrays."""
    tiles = math.ceil(problem.M / config.BLOCK_M) * math.ceil(problem.N / config.BLOCK_N) * problem.batch
    split = config.SPLIT_K > 1

    def pointer(name: str, kind: str | None) -> Argument:
        return Argument(name, kind and "*" + dtype(kind).triton, aligned=problem.aligned)

    def size(name: str, value: int) -> Argument:
        return Argument(name, "i32", value, aligned=value % 16 == 0)

    def stride(name: str) -> Argument:
        absent = not problem.strided or (name.startswith("residual") and problem.residual is None)
        return Argument(name, None if absent else "i64", aligned=problem.aligned)

    return (
        Launch(
            fn=jit.gemm_kernel,
            grid=(tiles, config.SPLIT_K, 1),
            arguments=(
                pointer("a_ptr", problem.dtype),
                pointer("b_ptr", problem.dtype),
                pointer("bias_ptr", problem.bias),
                pointer("residual_ptr", problem.residual),
                Argument("alpha_ptr", "*fp32" if problem.alpha else None),
                Argument("out_scale_ptr", "*fp32" if problem.out_scale else None),
                size("M", problem.M),
                size("N", problem.N),
                size("K", problem.K),
                *map(stride, STRIDES),
                pointer("out_ptr", problem.output_dtype),
                Argument("workspace_ptr", "*fp32" if split else None, aligned=True),
                Argument("counters_ptr", "*i32" if split else None, aligned=True),
            ),
            constexprs=(
                ("A_COLUMN_MAJOR", problem.a_layout == "col"),
                ("B_COLUMN_MAJOR", problem.b_layout == "col"),
                ("A_BROADCAST", problem.a_broadcast),
                ("B_BROADCAST", problem.b_broadcast),
                ("RESIDUAL_BROADCAST", problem.residual_broadcast),
                ("EVEN_M", problem.M % config.BLOCK_M == 0),
                ("EVEN_N", problem.N % config.BLOCK_N == 0),
                ("EVEN_K", problem.K % config.BLOCK_K == 0),
                ("PRECISION", problem.precision or "tf32"),
                ("FP8_SUM", min(FP8_SUM, config.BLOCK_K) if problem.dtype.startswith("fp8") else 0),
                ("ACTIVATION", problem.activation),
                ("BLOCK_M", config.BLOCK_M),
                ("BLOCK_N", config.BLOCK_N),
                ("BLOCK_K", config.BLOCK_K),
                ("GROUP_M", config.GROUP_M),
                ("SPLIT_K", config.SPLIT_K),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            scratch=(
                Scratch("workspace", "float32", tiles * config.SPLIT_K * config.BLOCK_M * config.BLOCK_N),
                Scratch("counters", "int32", tiles),
            )
            if split
            else (),
        ),
    )


GEMM: Kernel[GemmProblem, GemmConfig] = Kernel(
    name="gemm",
    problem=GemmProblem,
    space=space.SPACE,
    jit_functions=(jit.gemm_kernel,),
    default=space.default,
    launches=launches,
    reference=problem.reference,
    tolerance=problem.tolerance,
    estimate=space.estimate,
    work=space.work,
    distance=problem.distance,
    supported=problem.supported,
    ragged=space.ragged,
    strides=problem.strides,
)

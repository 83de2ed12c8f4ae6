"""How an RMSNorm configuration becomes a launch, and the `Kernel` object that ties the op together."""

from __future__ import annotations

import math

from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Argument, Kernel, Launch
from tilewright.kernels.ops.rmsnorm import jit, problem, space, work
from tilewright.kernels.ops.rmsnorm.features import FEATURES
from tilewright.kernels.ops.rmsnorm.problem import EPS, RmsNormProblem
from tilewright.kernels.ops.rmsnorm.space import RmsNormConfig


def launches(problem: RmsNormProblem, config: RmsNormConfig) -> tuple[Launch, ...]:
    """The one launch of an RMSNorm. `EPS` and `WEIGHT_OFFSET` are the caller's to replace."""

    def pointer(name: str, kind: str | None) -> Argument:
        return Argument(name, kind and "*" + dtype(kind).triton, aligned=problem.aligned)

    def size(name: str, value: int) -> Argument:
        return Argument(name, "i32", value, aligned=value % 16 == 0)

    def stride(name: str, there: bool = True) -> Argument:
        return Argument(name, "i64" if problem.strided and there else None, aligned=problem.aligned)

    return (
        Launch(
            fn=jit.rmsnorm_kernel,
            grid=(math.ceil(problem.M / config.BLOCK_M), 1, 1),
            arguments=(
                pointer("x_ptr", problem.dtype),
                pointer("residual_ptr", problem.residual),
                pointer("weight_ptr", problem.weight),
                Argument("out_scale_ptr", "*fp32" if problem.out_scale and not problem.row_scale else None),
                size("M", problem.M),
                size("N", problem.N),
                stride("x_stride"),
                stride("residual_stride", problem.residual is not None),
                stride("out_stride"),
                stride("residual_out_stride", problem.residual_out),
                pointer("out_ptr", problem.output_dtype),
                pointer("residual_out_ptr", problem.residual if problem.residual_out else None),
                Argument("row_scale_ptr", "*fp32" if problem.row_scale else None),
            ),
            constexprs=(
                ("EPS", EPS),
                ("WEIGHT_OFFSET", 0.0),
                ("WHOLE", config.BLOCK_N >= problem.N),
                ("EVEN_M", problem.M % config.BLOCK_M == 0),
                ("EVEN_N", problem.N % config.BLOCK_N == 0),
                ("BLOCK_M", config.BLOCK_M),
                ("BLOCK_N", config.BLOCK_N),
                ("STAGES", config.num_stages),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
    )


RMSNORM: Kernel[RmsNormProblem, RmsNormConfig] = Kernel(
    name="rmsnorm",
    problem=RmsNormProblem,
    space=space.SPACE,
    jit_functions=(jit.rmsnorm_kernel,),
    default=space.default,
    launches=launches,
    reference=problem.reference,
    tolerance=problem.tolerance,
    estimate=work.estimate,
    work=work.work,
    near=problem.near,
    supported=problem.supported,
    ragged=space.ragged,
    features=FEATURES,
    strides=problem.strides,
    constants=lambda problem: ("EPS", "WEIGHT_OFFSET"),
)

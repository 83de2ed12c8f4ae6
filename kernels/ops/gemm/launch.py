"""How a GEMM configuration becomes a launch, and the `Kernel` object that ties the op together."""

from __future__ import annotations

from tilewright.kernels.dtypes import FP8_SUM, dtype
from tilewright.kernels.kernel import Argument, Kernel, Launch, Scratch
from tilewright.kernels.ops.gemm import jit, problem, reference, space, work
from tilewright.kernels.ops.gemm.default import default
from tilewright.kernels.ops.gemm.features import FEATURES
from tilewright.kernels.ops.gemm.problem import OPERANDS, GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig, tiles

PERSISTENT_WARPS = 8
"""Warps that one SM gets of a persistent launch: with 8, every thread can have all of its 255 registers."""

FLATTEN_WARPS = 4
"""Most warps with which the loops over tiles and over K become one: with 8, Triton has miscompiled such a loop."""

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
    tiles_m, tiles_n = tiles(problem, config)
    grid = tiles_m * tiles_n * problem.batch
    split = config.SPLIT_K > 1
    kinds = {name: problem.dtype_of(name) for name in problem.shapes()}

    def is_aligned(array: str) -> bool:
        return problem.aligned if array in OPERANDS else problem.end_aligned

    def pointer(name: str, kind: str | None) -> Argument:
        return Argument(f"{name}_ptr", kind and "*" + dtype(kind).triton, aligned=is_aligned(name))

    def scalar(name: str, kind: str | None, wanted: str | bool | None) -> Argument:
        # One element, or a number that the launcher keeps: nothing to load in width.
        return Argument(f"{name}_ptr", f"*{kind}" if wanted else None)

    def size(name: str, value: int) -> Argument:
        return Argument(name, "i32", value, aligned=value % 16 == 0)

    def stride(name: str) -> Argument:
        absent = not problem.strided or (name.startswith("residual") and problem.residual is None)
        return Argument(name, None if absent else "i64", aligned=is_aligned(name.partition("_")[0]))

    def scale(name: str, kind: str | None) -> Argument:
        return scalar(name, "fp32", True) if kind == "tensor" else pointer(name, kinds.get(name))

    persistent_batch = config.PERSISTENT and problem.batch > 1
    return (
        Launch(
            fn=jit.gemm_kernel,
            grid=(grid, config.SPLIT_K, 1),
            arguments=(
                pointer("a", kinds["a"]),
                pointer("b", kinds["b"]),
                scale("a_scale", problem.a_scale),
                scale("b_scale", problem.b_scale),
                pointer("b_zero", kinds.get("b_zero")),
                pointer("bias", problem.bias),
                pointer("residual", problem.residual),
                scalar("alpha", "fp32", problem.alpha),
                scalar("out_scale", "fp32", problem.out_scale),
                scalar("offsets", "i32", problem.groups > 0),
                size("M", problem.M),
                size("N", problem.N),
                size("K", problem.K),
                size("batch", problem.batch) if persistent_batch else Argument("batch", None),
                *map(stride, STRIDES),
                pointer("out", problem.output_dtype),
                Argument(
                    "workspace_ptr", ("*i32" if problem.dtype == "int8" else "*fp32") if split else None, None, True
                ),
                Argument("counters_ptr", "*i32" if split else None, None, True),
            ),
            constexprs=(
                ("A_COLUMN_MAJOR", problem.a_layout == "col"),
                ("B_COLUMN_MAJOR", problem.b_layout == "col"),
                ("A_BROADCAST", problem.a_broadcast),
                ("B_BROADCAST", problem.b_broadcast),
                ("RESIDUAL_BROADCAST", problem.residual_broadcast),
                ("EVEN_M", problem.M % config.BLOCK_M == 0 and not problem.groups),
                ("EVEN_N", problem.N % config.BLOCK_N == 0),
                ("EVEN_K", problem.K % config.BLOCK_K == 0),
                ("PRECISION", problem.precision or "tf32"),
                ("FP8_SUM", min(FP8_SUM, config.BLOCK_K) if problem.dtype.startswith("fp8") else 0),
                ("A_SCALE", problem.a_scale),
                ("B_SCALE", problem.b_scale),
                ("BIAS_AXIS", problem.bias_axis),
                ("GATED", problem.gated),
                ("ACTIVATION", problem.activation),
                ("RESIDUAL_LAST", problem.residual_last),
                ("WEIGHTS", problem.b_dtype),
                ("GROUP_SIZE", problem.group_size),
                ("GROUPS", problem.groups),
                ("SLOTS", 1 << max(0, problem.groups - 1).bit_length()),
                ("BLOCK_M", config.BLOCK_M),
                ("BLOCK_N", config.BLOCK_N),
                ("BLOCK_K", config.BLOCK_K),
                ("GROUP_M", config.GROUP_M),
                ("SPLIT_K", config.SPLIT_K),
                ("PERSISTENT", config.PERSISTENT),
                ("FLATTEN", config.PERSISTENT and config.num_warps <= FLATTEN_WARPS and not config.WARP_SPECIALIZE),
                ("WARP_SPECIALIZE", config.WARP_SPECIALIZE),
                ("STAGES", config.num_stages if config.WARP_SPECIALIZE else 0),
                ("TMA", config.TMA),
                ("PIECES", space.pieces(problem, config)),
                ("PAIRS", config.PAIRS),
            ),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            blocks_per_sm=max(1, PERSISTENT_WARPS // space.multiplying_warps(config)) if config.PERSISTENT else 0,
            scratch=(
                Scratch(
                    "workspace",
                    "int32" if problem.dtype == "int8" else "float32",
                    grid * config.SPLIT_K * config.BLOCK_M * config.BLOCK_N,
                ),
                Scratch("counters", "int32", grid),
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
    default=default,
    launches=launches,
    reference=reference.reference,
    tolerance=reference.tolerance,
    estimate=work.estimate,
    work=work.work,
    near=problem.near,
    supported=problem.supported,
    ragged=space.ragged,
    strides=problem.strides,
    features=FEATURES,
)

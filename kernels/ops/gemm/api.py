"""`gemm`: the fused GEMM as people call it, on arrays of any library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tilewright.kernels.activations import activation_name
from tilewright.kernels.arrays import ArrayKind, View
from tilewright.kernels.call import Arrays, Operation, Prepared
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.operands import (
    Matrix,
    dense_strides,
    folds,
    matrix_of,
    matrix_size,
    mergeable,
    outer_indices,
    result_dtype_of,
    shapes_of,
)
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.problem import Output
from tilewright.tuning_db.errors import UnsupportedError, UsageError

SCALARS = ("alpha", "out_scale")
"""Inputs of one element."""


def gemm(
    a: Any,
    b: Any,
    *,
    bias: Any = None,
    residual: Any = None,
    activation: str | None = None,
    alpha: Any = 1.0,
    out_scale: Any = None,
    precision: str | None = None,
    out_dtype: str | None = None,
    out: Any = None,
    config: GemmConfig | None = None,
) -> Any:
    """Fused matrix product: `activation(alpha · A·B + bias + residual)`, summed in fp32; `/ out_scale` if quantised.

    The configuration is the tuned one for these shapes on this GPU, where there is one; see `lookup`. The call returns
    as soon as the work is on the caller's current stream.

    Args:
        a: (..., M, K), of fp16, bf16, fp32, or (sm_89 on) fp8e4m3, fp8e5m2. Rows or columns contiguous, by its strides.
        b: (..., K, N), of the same dtype; likewise. Leading dimensions of `a` and `b` broadcast as in `numpy.matmul`.
        bias: (N,), or None.
        residual: (..., M, N), its leading dimensions broadcast to the result's, or None.
        activation: a name of `activations.ACTIVATIONS`, with its parameters: "gelu", "leaky_relu:0.1", "clamp:0:6".
        alpha: factor on the product: a number, or an fp32 array of one element on the GPU.
        out_scale: scale of a quantised result (int8, fp8): likewise.
        precision: of fp32 operands: "ieee" (default; CUDA cores) or "tf32" (tensor cores, 10-bit mantissa).
        out_dtype: canonical dtype name of the result; by default that of `a`, bf16 for fp8. "int8" needs `out_scale`.
        out: array (..., M, N) to write to, of `out_dtype`; it may be `residual`, but not overlap `a` or `b`.
        config: a configuration to use instead of the tuned one.

    Returns:
        `out`, or a new array (..., M, N) of the library that `a` is of.

    Raises:
        ProblemError: shapes or dtypes that don't go together; the message has them.
        UnsupportedError: an operand with neither rows nor columns contiguous, or a dtype this GPU lacks.
        IllegalConfigError: `config` breaks a limit of the problem or the GPU.
        MissingDependencyError: CuPy or a GPU is needed and absent.
    """
    if config is not None and not isinstance(config, GemmConfig):
        raise UsageError(f"config must be a GemmConfig, not {config!r}")
    if isinstance(alpha, Real) and alpha == 1.0:
        alpha = None
    options = (activation, precision, out_dtype, config)
    return _GEMM((a, b, bias, residual, alpha, out_scale), (out,), options)[0]


@dataclass(frozen=True, slots=True)
class LoopedCall:
    """Batches that broadcast in more than one way, as (x, 1, M, K) by (1, y, K, N): a call for each outer index."""

    output: Output
    # For each call, the index into a, b, residual and out.
    indices: tuple[tuple[tuple[int, ...], ...], ...]
    options: dict[str, Any]

    def __call__(self, kind: ArrayKind, arrays: Arrays, outs: Arrays) -> Arrays:
        """Puts the calls on the current stream, in order."""
        a, b, bias, residual, alpha, out_scale = arrays
        result = kind.empty(a, *self.output) if outs[0] is None else outs[0]
        for at_a, at_b, at_residual, at_out in self.indices:
            part = None if residual is None else residual[at_residual]
            gemm(
                a[at_a],
                b[at_b],
                bias=bias,
                residual=part,
                alpha=1.0 if alpha is None else alpha,
                out_scale=out_scale,
                out=result[at_out],
                **self.options,
            )
        return (result,)


def _prepare(kind: ArrayKind, views: dict[str, View], options: tuple[Any, ...]) -> Prepared:
    """Everything about a call that its arrays' signatures decide."""
    activation, precision, out_dtype, config = options
    m, k, n, batch = shapes_of(views)
    result_dtype = result_dtype_of(views, out_dtype)
    shape = (*batch, m, n)

    matrices: dict[str, Matrix] = {
        name: matrix_of(name, views[name], batch) for name in ("a", "b", "residual", "out") if name in views
    }
    if "residual" in matrices and matrices["residual"].layout != "row":
        raise UnsupportedError(f"residual must be row-major; its strides are {views['residual'].strides}")
    if "out" in matrices:
        repeated = any(step == 0 and length > 1 for step, length in zip(matrices["out"].batch, batch, strict=True))
        if matrices["out"].layout != "row" or repeated:
            raise UnsupportedError(f"out must be row-major, without broadcast; its strides are {views['out'].strides}")
    else:
        matrices["out"] = Matrix("row", n, dense_strides(batch, m * n), True)

    inner = mergeable(batch, [matrix.batch for matrix in matrices.values()])
    if inner < len(batch):
        indices = outer_indices(views, batch, len(batch) - inner)
        named = {"activation": activation, "precision": precision, "config": config}
        return LoopedCall(Output(shape, result_dtype), indices, named)

    count = math.prod(batch)
    steps = {name: matrix.batch[-1] if batch else 0 for name, matrix in matrices.items()}
    # The innermost batch dimension that is longer than 1 gives the merged batch its stride.
    for position in range(len(batch) - 1, -1, -1):
        if batch[position] > 1:
            steps = {name: matrix.batch[position] for name, matrix in matrices.items()}
            break
    if count > 1 and m * count < 2**31 and folds(matrices, steps, m):
        # One B for all: the batch is more rows of A.
        m, count = m * count, 1
    strided = not all(
        matrix.dense and (count == 1 or steps[name] in (0, matrix_size(name, m, n, k)))
        for name, matrix in matrices.items()
    )
    pointers_aligned = all(view.pointer % 16 == 0 for name, view in views.items() if name not in SCALARS)
    strides: dict[str, int] = {}
    if strided:
        for name, matrix in matrices.items():
            strides[f"{name}_stride"] = matrix.stride
            strides[f"{name}_batch_stride"] = steps[name] if count > 1 else 0
    problem = GemmProblem(
        M=m,
        N=n,
        K=k,
        dtype=views["a"].dtype,
        out_dtype=result_dtype,
        batch=count,
        a_layout=matrices["a"].layout,
        b_layout=matrices["b"].layout,
        a_broadcast=count > 1 and steps["a"] == 0,
        b_broadcast=count > 1 and steps["b"] == 0,
        bias=views["bias"].dtype if "bias" in views else None,
        residual=views["residual"].dtype if "residual" in views else None,
        residual_broadcast=count > 1 and "residual" in steps and steps["residual"] == 0,
        activation=activation_name(activation),
        alpha="alpha" in views,
        out_scale="out_scale" in views,
        precision=precision,
        strided=strided,
        aligned=pointers_aligned and all(stride % 16 == 0 for stride in strides.values()),
    )
    return _GEMM.planned(problem, views, shapes={"out": shape}, strides=strides, config=config)


_GEMM = Operation(
    GEMM,
    ("a", "b", "bias", "residual", "alpha", "out_scale"),
    ("activation", "precision", "out_dtype", "config"),
    _prepare,
    scalars=SCALARS,
    in_place=("residual",),
)

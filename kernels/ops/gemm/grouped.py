"""`grouped_gemm`: one launch for groups of rows that each meet a matrix of their own, as a mixture of experts has."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.activations import activation_name
from tilewright.kernels.arrays import View
from tilewright.kernels.call import New, Operation, Prepared
from tilewright.kernels.dtypes import wanted_dtype
from tilewright.kernels.ops.gemm.api import (
    ARRAY_DTYPES,
    INPUTS,
    OPTIONS,
    SCALARS,
    SCALES,
    alignments,
    check_config,
    result_dtype,
)
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.operands import (
    Matrix,
    check_dense,
    check_depth,
    check_ends,
    check_rows,
    dtypes_of,
    is_empty,
    matrix_of,
    scales_of,
)
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.options import factor, flag, integer
from tilewright.tuning_db.errors import ProblemError


def grouped_gemm(
    a: Any,
    b: Any,
    offsets: Any,
    *,
    a_scale: Any = None,
    b_scale: Any = None,
    b_zero: Any = None,
    group_size: int | None = None,
    bias: Any = None,
    bias_axis: str = "n",
    residual: Any = None,
    residual_last: bool = False,
    activation: str | None = None,
    gated: str | None = None,
    alpha: Any = 1.0,
    out_scale: Any = None,
    precision: str | None = None,
    out_dtype: Any = None,
    out: Any = None,
    config: GemmConfig | None = None,
) -> Any:
    """`gemm` of groups of A's rows, each with a B of its own: rows `offsets[g]` to `offsets[g + 1]` of the result are
    those of `a` times `b[g]`, with the whole epilogue. One launch, whatever the offsets hold; they stay on the device.

    Args:
        a: (M, K), the rows of all groups, one group after the other.
        b: (G, K, N), or packed int4 (G, 16·⌈K/32⌉, N); G at most 1024.
        offsets: int32 (G + 1,), from 0 to M, never falling. Rows of no group are neither computed nor written.
        a_scale: as in `gemm`: a number, one element, or (M,).
        b_scale: a number, one element, (G, N), or with `group_size` (G, ⌈K/group_size⌉, N).
        b_zero: (G, N), or with `group_size` (G, ⌈K/group_size⌉, N).
        bias: (G, N), or with `bias_axis="m"` (M,).
        residual: (M, N), gated (M, N/2).
        group_size, residual_last, activation, gated, alpha, out_scale, precision, out_dtype, config: as in `gemm`.
        out: (M, N), gated (M, N/2), to write to; it may be `residual`, but not overlap another input.

    Returns:
        `out`, or a new array of the library that `a` is of, in which rows of no group hold anything.

    Raises:
        ProblemError, UnsupportedError, IllegalConfigError, UsageError, MissingDependencyError, CompileError,
        LaunchError, PackError, NotPackedError: as `gemm`.
    """
    check_config(config)
    arrays = (a, b, a_scale, b_scale, b_zero, bias, residual, factor(alpha), out_scale, offsets)
    group_size = integer("group_size", group_size)
    last = flag("residual_last", residual_last)
    options = (group_size, bias_axis, activation, last, gated, precision, wanted_dtype(out_dtype), config)
    return _GROUPED.run(arrays, (out,), options)[0]


def _prepare(views: dict[str, View], options: tuple[Any, ...]) -> Prepared:
    """Everything about a call that its arrays' signatures decide."""
    group_size, bias_axis, activation, residual_last, gated, precision, out_dtype, config = options
    m, k, n, groups = _sizes(views)
    check_ends(n, gated, bias_axis)
    shape = (m, n // 2 if gated is not None else n)
    if views["offsets"].dtype != "int32":
        raise ProblemError(f"offsets is {views['offsets'].dtype} and must be int32")
    check_dense(views, "offsets", (groups + 1,))
    if "bias" in views:
        check_dense(views, "bias", (m,) if bias_axis == "m" else (groups, n))
    for name in ("residual", "out"):
        if name in views and views[name].shape != shape:
            raise ProblemError(f"{name} is {views[name].shape} and must be {shape}")
    fields: dict[str, Any] = dtypes_of(views, out_dtype) | scales_of(views, n, group_size, groups)
    fields |= {name: name in views for name in SCALARS}

    matrices: dict[str, Matrix] = {
        name: matrix_of(name, views[name], (groups,) if name == "b" else ())
        for name in ("a", "b", "residual", "out")
        if name in views
    }
    check_rows(matrices, views)
    if "out" not in matrices:
        matrices["out"] = Matrix("row", shape[1], (), True)
    depth = views["b"].shape[1] * n
    strided = not (
        all(matrix.dense for matrix in matrices.values()) and (groups == 1 or matrices["b"].batch == (depth,))
    )
    strides: dict[str, int] = {}
    if strided:
        for name, matrix in matrices.items():
            strides[f"{name}_stride"] = matrix.stride
            strides[f"{name}_batch_stride"] = matrix.batch[0] if matrix.batch else 0
    problem = GemmProblem(
        M=m,
        N=n,
        K=k,
        groups=groups,
        a_layout=matrices["a"].layout,
        b_layout=matrices["b"].layout,
        bias_axis=bias_axis,
        gated=gated,
        activation=activation_name(activation),
        residual_last=residual_last,
        precision=precision,
        strided=strided,
        **(fields | alignments(views, strides)),
    )
    return _GROUPED.planned(problem, views, shapes={"out": shape}, strides=strides, config=config)


def _results(views: dict[str, View], options: tuple[Any, ...]) -> tuple[New, ...]:
    _, _, activation, _, gated, _, out_dtype, _ = options
    m, _, n, _ = _sizes(views)
    return (New((m, n // 2 if gated else n), result_dtype(views, activation, gated, out_dtype)),)


def _sizes(views: dict[str, View]) -> tuple[int, int, int, int]:
    """M, K, N and the number of groups."""
    a, b = views["a"].shape, views["b"].shape
    if len(a) != 2 or len(b) != 3 or is_empty(*a, *b):
        raise ProblemError(f"a is {a} and b is {b}: they must be (M, K) and (groups, K, N), none of them 0")
    check_depth(views)
    return a[0], a[1], b[2], b[0]


_GROUPED = Operation(
    "grouped_gemm",
    GEMM,
    (*INPUTS, "offsets"),
    OPTIONS,
    _prepare,
    _results,
    scalars=SCALARS,
    scalar_or_array=SCALES,
    in_place=("residual",),
    required=("a", "b", "offsets"),
    dtypes={**ARRAY_DTYPES, "offsets": ("int32",)},
)

"""`gemm`: the fused GEMM as people call it, on arrays of any library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tilewright.kernels.activations import activation_name
from tilewright.kernels.arrays import ArrayKind, View
from tilewright.kernels.call import Arrays, New, Operation, Prepared
from tilewright.kernels.dtypes import wanted_dtype
from tilewright.kernels.epilogue import FLOATS, OUTPUT_DTYPES, sums_dtype
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.operands import (
    Matrix,
    check_rows,
    dense_strides,
    dtypes_of,
    folds,
    matrix_of,
    mergeable,
    outer_indices,
    scales_of,
    shapes_of,
)
from tilewright.kernels.ops.gemm.problem import INPUT_DTYPES, OPERANDS, SCALE_DTYPES, GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.options import factor, flag, integer
from tilewright.kernels.problem import Output
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UnsupportedProblemError, UsageError

INPUTS = ("a", "b", "a_scale", "b_scale", "b_zero", "bias", "residual", "alpha", "out_scale")
SCALARS = ("alpha", "out_scale")
"""Inputs of one element."""

SCALES = ("a_scale", "b_scale")
"""Inputs of one element or of many."""

ARRAY_DTYPES = {
    "a": INPUT_DTYPES,
    "b": (*INPUT_DTYPES, "uint8"),
    "a_scale": ("fp32",),
    "b_scale": SCALE_DTYPES,
    "b_zero": ("int8", "uint8"),
    "bias": FLOATS,
    "residual": FLOATS,
    "out": OUTPUT_DTYPES,
}
"""What each array may be."""


def gemm(
    a: Any,
    b: Any,
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
    """Fused matrix product: `activation(alpha · a_scale · b_scale · (A·B) + bias + residual)`, `/ out_scale`.

    With `residual_last`, `activation(… + bias) + residual`. With `gated`, `[g|u] = alpha · a_scale · b_scale · (A·B) +
    bias` and `activation(g) · u + residual`. Sums are taken in fp32, of int8 in int32. The configuration is the tuned
    one for these shapes on this GPU, where there is one; see docs/tuning-database.md. The call returns as soon as the
    work is on the caller's current stream.

    Args:
        a: (..., M, K), of fp16, fp32, (sm_80 on) bf16, int8, fp8e5m2, or (sm_89 on) fp8e4m3. Rows or columns
            contiguous, by its strides.
        b: (..., K, N), of the same dtype; under fp16 and bf16 also int8, or int4 packed by `pack_int4`: uint8
            (..., 16·⌈K/32⌉, N). Likewise by its strides; leading dimensions of `a` and `b` broadcast as in
            `numpy.matmul`.
        a_scale: factor on the product: a number, one fp32 element on the GPU, or one for each row of `a`, (..., M) or
            (..., M, 1).
        b_scale: likewise; of each column, fp32 (N,) or (1, N); with `group_size`, (⌈K/group_size⌉, N) of fp32, fp16 or
            bf16.
        b_zero: zero points of int8 or int4 weights, B = b_scale · (b - b_zero), of the dtype of `b`: (N,), or with
            `group_size` (⌈K/group_size⌉, N). By default 0, of int4 8.
        group_size: rows of int8 or int4 weights that share a scale: 32, 64 or 128.
        bias: (N,), or with `bias_axis="m"` (M,), of fp16, bf16, fp32 or fp8.
        residual: (..., M, N), gated (..., M, N/2), of any of these, its leading dimensions broadcast to the result's.
        residual_last: the residual is added behind the activation, not before it. Gated it always is.
        activation: a name of docs/epilogue.md, with its parameters: "gelu", "leaky_relu:0.1", "clamp:0:6".
        gated: pairs of columns: "halves", all g before all u, or "interleaved", g, u, g, u, …. SwiGLU, GEGLU and ReGLU
            have the activations silu, gelu and relu.
        alpha: factor on the product: a number, or an fp32 array of one element on the GPU; None is 1.
        out_scale: scale of a quantised result (int8, fp8): a number above 0, or such an array, which is not looked at.
        precision: of fp32 operands: "ieee" (default; CUDA cores) or "tf32" (tensor cores, 10-bit mantissa).
        out_dtype: the result's dtype, by its canonical name or as a library has it; by default that of `a`, bf16 for
            fp8, and for int8 int32 or, with `a_scale` or `b_scale`, bf16. Of int8 with neither, nothing but the bare
            int32 sums. "int8" needs `out_scale`.
        out: array (..., M, N), gated (..., M, N/2), to write to, of `out_dtype`; it may be `residual`, but not overlap
            another input.
        config: a configuration to use instead of the tuned one.

    Returns:
        `out`, or a new array of the library that `a` is of.

    Raises:
        ProblemError: shapes, dtypes or options that don't go together, or an unknown activation; the message has them.
        UnsupportedError: what is no array, an operand with neither rows nor columns contiguous, or a dtype this GPU
            lacks.
        IllegalConfigError: `config` breaks a limit of the problem or the GPU.
        UsageError: an option of a type that it can't have, as a `group_size` that is no integer.
        MissingDependencyError: CuPy or a GPU is needed and absent.
        CompileError, LaunchError: the compiler or the driver refused the configuration.
        PackError, NotPackedError: this process's pack can't be used, or lacks the problem (docs/packs.md).
    """
    if config is not None:
        check_config(config)
    if group_size is not None:
        group_size = integer("group_size", group_size)
    arrays = (a, b, a_scale, b_scale, b_zero, bias, residual, factor(alpha), out_scale)
    last = flag("residual_last", residual_last)
    options = (group_size, bias_axis, activation, last, gated, precision, wanted_dtype(out_dtype), config)
    return _GEMM.run(arrays, (out,), options)[0]


def check_config(config: Any) -> None:
    """Does nothing for a configuration or None.

    Raises:
        UsageError: something else.
    """
    if config is not None and not isinstance(config, GemmConfig):
        raise UsageError(f"config must be a GemmConfig, not {config!r}")


@dataclass(frozen=True, slots=True)
class LoopedCall:
    """Batches that broadcast in more than one way, as (x, 1, M, K) by (1, y, K, N): a call for each outer index."""

    output: Output
    # For each call, the index into a, b, residual and out.
    indices: tuple[tuple[tuple[int, ...], ...], ...]
    rows: bool  # whether a_scale has one for each row of a
    options: tuple[Any, ...]

    def run(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, arguments: list[Any]) -> Arrays:
        """Puts the calls on the current stream, in order."""
        given = dict(zip(INPUTS, arrays, strict=True))
        result = kind.empty(given["a"], *self.output) if outs[0] is None else outs[0]
        calls = []
        for at_a, at_b, at_residual, at_out in self.indices:
            parts = given | {"a": given["a"][at_a], "b": given["b"][at_b]}
            if given["residual"] is not None:
                parts["residual"] = given["residual"][at_residual]
            if self.rows:
                parts["a_scale"] = given["a_scale"][at_a]
            calls.append((tuple(parts.values()), (result[at_out],), self.options))
        # All of them before the first writes: one may be refused for how its part is aligned.
        for run in [_GEMM.made_ready(*call) for call in calls]:
            run()
        return (result,)


def _prepare(views: dict[str, View], options: tuple[Any, ...]) -> Prepared:
    """Everything about a call that its arrays' signatures decide."""
    group_size, bias_axis, activation, residual_last, gated, precision, out_dtype, config = options
    m, k, n, batch = shapes_of(views, gated=gated, bias_axis=bias_axis)
    fields: dict[str, Any] = dtypes_of(views, out_dtype) | scales_of(views, n, group_size)
    fields |= {"bias_axis": bias_axis, "gated": gated, "precision": precision}
    fields |= {"activation": activation_name(activation), "residual_last": residual_last}
    fields |= {name: name in views for name in SCALARS}
    # The result's dtype; and what never goes together is said before what these arrays' strides don't allow.
    result = GemmProblem(M=m, N=n, K=k, **fields)
    n_out = result.columns_out
    shape = (*batch, m, n_out)

    matrices: dict[str, Matrix] = {
        name: matrix_of(name, views[name], batch) for name in ("a", "b", "residual", "out") if name in views
    }
    check_rows(matrices, views)
    if "out" not in matrices:
        matrices["out"] = Matrix("row", n_out, dense_strides(batch, m * n_out), True)

    inner = mergeable(batch, [matrix.batch for matrix in matrices.values()])
    if (fields.get("b_zero") or group_size) and any(matrices["b"].batch):
        raise UnsupportedProblemError(
            f"b is {views['b'].shape}: scales of groups and zero points are for one B, not one in each of a batch"
        )
    outer = len(batch) - inner
    count = math.prod(batch[outer:])
    steps = dict.fromkeys(matrices, 0)
    # The innermost batch dimension that is longer than 1 gives the merged batch its stride.
    for position in range(len(batch) - 1, outer - 1, -1):
        if batch[position] > 1:
            steps = {name: matrix.batch[position] for name, matrix in matrices.items()}
            break
    if result.a_scale == "row":
        # Of every matrix of A that a loop goes to, and of those that are merged there one, or as many as there are.
        looped = math.prod(views["a"].shape[:-2][: -inner or None])
        check_row_scales(views, looped * (1 if steps["a"] == 0 else count))
    if outer:
        indices = outer_indices(views, batch, outer)
        return LoopedCall(Output(shape, result.output_dtype), indices, result.a_scale == "row", options)

    if count > 1 and m * count < 2**31 and bias_axis == "n" and folds(matrices, steps, m):
        # One B for all: the batch is more rows of A.
        m, count = m * count, 1
    sizes = {"a": m * k, "b": views["b"].shape[-2] * n}
    strided = not all(
        matrix.dense and (count == 1 or steps[name] in (0, sizes.get(name, m * n_out)))
        for name, matrix in matrices.items()
    )
    strides: dict[str, int] = {}
    if strided:
        for name, matrix in matrices.items():
            strides[f"{name}_stride"] = matrix.stride
            strides[f"{name}_batch_stride"] = steps[name] if count > 1 else 0
    problem = GemmProblem(
        M=m,
        N=n,
        K=k,
        batch=count,
        a_layout=matrices["a"].layout,
        b_layout=matrices["b"].layout,
        a_broadcast=count > 1 and steps["a"] == 0,
        b_broadcast=count > 1 and steps["b"] == 0,
        residual_broadcast=count > 1 and "residual" in steps and steps["residual"] == 0,
        strided=strided,
        **alignments(views, strides),
        **fields,
    )
    return _GEMM.planned(problem, views, shapes={"out": shape}, strides=strides, config=config)


def _results(views: dict[str, View], options: tuple[Any, ...]) -> tuple[New, ...]:
    _, bias_axis, activation, _, gated, _, out_dtype, _ = options
    m, _, n, batch = shapes_of(views, gated=gated, bias_axis=bias_axis)
    return (New((*batch, m, n // 2 if gated else n), result_dtype(views, activation, gated, out_dtype)),)


def result_dtype(views: dict[str, View], activation: Any, gated: str | None, out_dtype: str | None) -> str:
    """The dtype of a new result."""
    bare = {"a", "b", "offsets", "out"}
    fused = not bare.issuperset(views) or gated is not None or activation_name(activation) != "none"
    return out_dtype or sums_dtype(views["a"].dtype, fused)


def check_row_scales(views: dict[str, View], matrices: int) -> None:
    """Does nothing if there is a scale for each row of as many matrices of A as a call reads.

    Raises:
        ProblemError: there are fewer.
        UnsupportedError: there are more, for a matrix that is repeated.
    """
    scale, a = views["a_scale"].shape, views["a"].shape
    if math.prod(scale) < matrices * a[-2]:
        raise ProblemError(f"a_scale is {scale} and must be {a[:-1]}")
    if math.prod(scale) > matrices * a[-2]:
        raise UnsupportedError(f"a of shape {a} repeats one matrix and has a_scale for all: pass a copy")


def alignments(views: dict[str, View], strides: dict[str, int]) -> dict[str, Any]:
    """Whether what is read or written in width starts at 16 bytes, every row of it: of the operands, whose copies to
    shared memory hang on it, and apart from them of the other arrays, which cost little."""
    narrow = {"offsets", *SCALARS, *(name for name in SCALES if name in views and math.prod(views[name].shape) == 1)}
    found = {"aligned": True, "end_aligned": True}
    for name, view in views.items():
        if name not in narrow:
            found["aligned" if name in OPERANDS else "end_aligned"] &= view.pointer % 16 == 0
    for name, stride in strides.items():
        found["aligned" if name.partition("_")[0] in OPERANDS else "end_aligned"] &= stride % 16 == 0
    return found


OPTIONS = {
    "group_size": "int?",
    "bias_axis": "str",
    "activation": "str?",
    "residual_last": "bool",
    **dict.fromkeys(("gated", "precision", "out_dtype"), "str?"),
    "config": "config",
}

_GEMM = Operation(
    "gemm",
    GEMM,
    INPUTS,
    OPTIONS,
    _prepare,
    _results,
    scalars=SCALARS,
    scalar_or_array=SCALES,
    in_place=("residual",),
    required=("a", "b"),
    dtypes=ARRAY_DTYPES,
)

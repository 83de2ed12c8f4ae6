"""`gemm`: the fused GEMM as people call it, on arrays of any library."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tilewright.kernels.arrays import ArrayKind, View, kind_of
from tilewright.kernels.dispatch import call_cache, plan_for
from tilewright.kernels.epilogue import activation_name
from tilewright.kernels.interpreter import require_interpreter
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.operands import (
    Extents,
    Matrix,
    dense_strides,
    folds,
    matrix_of,
    matrix_size,
    mergeable,
    outer_indices,
    refuse_overlap,
    result_dtype_of,
    shapes_of,
)
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.runtime import Plan
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UsageError


def gemm(
    a: Any,
    b: Any,
    *,
    bias: Any = None,
    residual: Any = None,
    activation: str | None = None,
    alpha: float = 1.0,
    precision: str | None = None,
    out_dtype: str | None = None,
    out: Any = None,
    config: GemmConfig | None = None,
) -> Any:
    """Fused matrix product: `activation(alpha · A·B + bias + residual)`, summed in fp32.

    The configuration is the tuned one for these shapes on this GPU, where there is one; see `lookup`. The call returns
    as soon as the work is on the caller's current stream.

    Args:
        a: (..., M, K), of fp16, bf16, fp32, or (sm_89 on) fp8e4m3, fp8e5m2. Rows or columns contiguous, by its strides.
        b: (..., K, N), of the same dtype; likewise. Leading dimensions of `a` and `b` broadcast as in `numpy.matmul`.
        bias: (N,), or None.
        residual: (..., M, N), its leading dimensions broadcast to the result's, or None.
        activation: none, relu, gelu_tanh, gelu_erf (or gelu), silu, sigmoid, tanh, hardswish.
        alpha: factor on the product.
        precision: of fp32 operands: "ieee" (default; CUDA cores) or "tf32" (tensor cores, 10-bit mantissa).
        out_dtype: canonical dtype name of the result; by default that of `a`, bf16 for fp8.
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
    kind = kind_of(a)
    if alpha.__class__ is not float:
        alpha = _real_number(alpha)
    for name, array in (("b", b), ("bias", bias), ("residual", residual), ("out", out)):
        if array is not None and kind_of(array) is not kind:
            raise ProblemError(f"a is a {_type_name(a)} and {name} a {_type_name(array)}: pass arrays of one library")
    if config is not None and not isinstance(config, GemmConfig):
        raise UsageError(f"config must be a GemmConfig, not {config!r}")
    if kind.foreign:
        # Seen through CuPy once, not at every use.
        own = [None if array is None else kind.adopt(array) for array in (a, b, bias, residual, out)]
        result = gemm(
            own[0],
            own[1],
            bias=own[2],
            residual=own[3],
            out=own[4],
            activation=activation,
            alpha=alpha,
            precision=precision,
            out_dtype=out_dtype,
            config=config,
        )
        return kind.give_back(result, a) if out is None else out
    key = (
        kind,
        kind.signature(a),
        kind.signature(b),
        None if bias is None else kind.signature(bias),
        None if residual is None else kind.signature(residual),
        None if out is None else kind.signature(out),
        activation,
        alpha == 1.0,
        precision,
        out_dtype,
        config,
    )
    try:
        call = _calls.get(key)
    except TypeError:
        named: dict[str, Any] = {"activation": activation, "precision": precision, "out_dtype": out_dtype}
        wrong = {name: value for name, value in named.items() if not isinstance(value, str | None)}
        raise UsageError(f"{wrong or config} must be text or None") from None
    if call is None:
        call = _prepare(kind, a, b, bias, residual, out, activation, alpha, precision, out_dtype, config)
        if len(_calls) >= _MOST_CALLS:
            _calls.clear()
        _calls[key] = call
    if out is not None:
        refuse_overlap(kind, call.extents, {"a": a, "b": b, "bias": bias, "residual": residual}, out)
    return call(a, b, bias, residual, alpha, out)


_MOST_CALLS = 65536
"""Signatures remembered; a program with more (every shape new) prepares them again rather than grow without end."""


@dataclass(frozen=True, slots=True)
class GemmCall:
    """A call prepared for one signature of arrays: run as often as arrays of that signature come."""

    kind: ArrayKind
    problem: GemmProblem
    plan: Plan
    shape: tuple[int, ...]  # of the result
    strides: dict[str, int]
    extents: Extents

    def __call__(self, a: Any, b: Any, bias: Any, residual: Any, alpha: float, out: Any) -> Any:
        """Put the call on the current stream of the arrays' library."""
        kind = self.kind
        stream = kind.stream(a)
        result = kind.empty(a, self.shape, self.problem.output_dtype) if out is None else out
        of = kind.argument
        pointers = {"a_ptr": of(a), "b_ptr": of(b), "out_ptr": of(result)}
        if bias is not None:
            pointers["bias_ptr"] = of(bias)
        if residual is not None:
            pointers["residual_ptr"] = of(residual)
        if self.problem.alpha:
            pointers["alpha_ptr"] = of(_alpha_array(kind, a, alpha, stream))
        self.plan.run(pointers, self.strides, stream)
        return result


@dataclass(frozen=True, slots=True)
class LoopedCall:
    """Batches that broadcast in more than one way, as (x, 1, M, K) by (1, y, K, N): a call for each outer index."""

    kind: ArrayKind
    shape: tuple[int, ...]
    out_dtype: str
    # For each call, the index into a, b, residual and out.
    indices: tuple[tuple[tuple[int, ...], ...], ...]
    options: dict[str, Any]
    extents: Extents

    def __call__(self, a: Any, b: Any, bias: Any, residual: Any, alpha: float, out: Any) -> Any:
        """Put the calls on the current stream, in order."""
        kind = self.kind
        result = kind.empty(a, self.shape, self.out_dtype) if out is None else out
        for at_a, at_b, at_residual, at_out in self.indices:
            part = None if residual is None else residual[at_residual]
            gemm(a[at_a], b[at_b], bias=bias, residual=part, alpha=alpha, out=result[at_out], **self.options)
        return result


_calls: dict[tuple[Any, ...], GemmCall | LoopedCall] = call_cache()
_alphas: dict[tuple[Any, ...], Any] = {}


def _alpha_array(kind: ArrayKind, like: Any, alpha: float, stream: int) -> Any:
    """alpha on the device, made once per value and stream, in whose order it is filled: a kernel takes no floats."""
    key = (kind, getattr(like, "device", None), stream, float(alpha))
    array = _alphas.get(key)
    if array is None:
        # Kept for good, as a captured CUDA graph may read it: 512 bytes a value.
        array = _alphas[key] = kind.scalar(like, float(alpha))
    return array


def _real_number(alpha: Any) -> float:
    try:
        if isinstance(alpha, str):
            raise TypeError
        return float(alpha)
    except TypeError:
        raise UsageError(f"alpha={alpha!r} must be a real number") from None


def _type_name(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__qualname__}"


def _prepare(
    kind: ArrayKind,
    a: Any,
    b: Any,
    bias: Any,
    residual: Any,
    out: Any,
    activation: str | None,
    alpha: float,
    precision: str | None,
    out_dtype: str | None,
    config: GemmConfig | None,
) -> GemmCall | LoopedCall:
    """Everything about a call that its arrays' signatures decide."""
    if kind.host:
        require_interpreter()
    views: dict[str, View] = {}
    for name, array in (("a", a), ("b", b), ("bias", bias), ("residual", residual), ("out", out)):
        if array is not None:
            views[name] = kind.view(array)
    ordinals = {view.device for view in views.values()}
    if len(ordinals) > 1:
        raise ProblemError(f"the arrays are on different GPUs: {sorted(ordinals)}")
    m, k, n, batch = shapes_of(views)
    result_dtype = result_dtype_of(views, out_dtype)
    shape = (*batch, m, n)

    matrices = {name: matrix_of(name, views[name], batch) for name in views if name != "bias"}
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
        options = {"activation": activation, "precision": precision, "config": config}
        return LoopedCall(kind, shape, result_dtype, indices, options, Extents.of(views))

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
    pointers_aligned = all(view.pointer % 16 == 0 for view in views.values())
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
        alpha=alpha != 1.0,
        precision=precision,
        strided=strided,
        aligned=pointers_aligned and all(stride % 16 == 0 for stride in strides.values()),
    )
    plan, _ = plan_for(GEMM, problem, ordinals.pop(), config=config)
    return GemmCall(kind, problem, plan, shape, strides, Extents.of(views))

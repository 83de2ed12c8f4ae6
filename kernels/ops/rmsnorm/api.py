"""`rmsnorm`: the fused RMSNorm as people call it, on arrays of any library."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilewright.kernels.arrays import View, another
from tilewright.kernels.call import New, Operation, Prepared
from tilewright.kernels.constants import checked_constant
from tilewright.kernels.dtypes import wanted_dtype
from tilewright.kernels.epilogue import FLOATS
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.kernels.ops.rmsnorm.problem import EPS, INPUT_DTYPES, RmsNormProblem
from tilewright.kernels.ops.rmsnorm.space import RmsNormConfig
from tilewright.kernels.options import flag
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UsageError


def rmsnorm(
    x: Any,
    weight: Any = None,
    *,
    residual: Any = None,
    eps: float = EPS,
    weight_offset: float = 0.0,
    out_dtype: Any = None,
    out_scale: Any = None,
    out: Any = None,
    residual_out: Any = None,
    return_residual: bool = False,
    row_scale: Any = None,
    config: RmsNormConfig | None = None,
) -> Any:
    """Fused RMSNorm of rows: `h / √(mean(h²) + eps) · (weight_offset + weight)` with `h = x + residual`, in fp32.

    h is rounded on its way to `residual_out`, not on its way to the norm. The configuration is the tuned one for these
    shapes on this GPU, where there is one; see docs/tuning-database.md. The call returns as soon as the work is on
    the caller's current stream.

    Args:
        x: (..., N), of fp16, bf16 or fp32. Rows contiguous, and all at one distance from the next.
        weight: (N,), of any of these, or None for none.
        residual: as `x`, of any of these, or None.
        eps: 0, or a number of at least 1.18e-38, compiled in; rows of zeros are NaN if it is 0.
        weight_offset: a number added to the weight, compiled in: 1 for models that keep weight - 1. Without a weight it
            counts for nothing.
        out_dtype: the result's dtype, by its canonical name or as a library has it; by default that of `x`. "int8"
            needs `out_scale`.
        out_scale: scale of a quantised result (int8, fp8): a number above 0, or an fp32 array of one element on the
            GPU, which is not looked at, or "row" for one of each row that takes its largest element to the type's
            largest number (1 of a row of zeros, or of next to nothing: docs/rmsnorm.md).
        out: array as `x` to write to, of `out_dtype`; it may be `x` or `residual`.
        residual_out: array as `x` to write h to, of the residual's dtype; it may be `residual` or `x`.
        return_residual: whether h is a result; `residual_out` says so too.
        row_scale: fp32 array (..., 1) to write the rows' scales to.
        config: a configuration to use instead of the tuned one.

    Returns:
        `out`, or a new array of the library that `x` is of; with h or rows' scales, a tuple: the result, then
        `residual_out`, then `row_scale`.

    Raises:
        ProblemError: shapes, dtypes or options that don't go together; the message has them.
        UnsupportedError: rows that are not contiguous or at several distances, or a dtype this GPU lacks.
        IllegalConfigError: `config` breaks a limit of the problem or the GPU.
        UsageError: an option of a type or value that it can't have.
        MissingDependencyError: CuPy or a GPU is needed and absent.
        CompileError, LaunchError: the compiler or the driver refused the configuration.
        PackError, NotPackedError: this process's pack can't be used, or lacks the problem (docs/packs.md).
    """
    if config is not None and not isinstance(config, RmsNormConfig):
        raise UsageError(f"config must be a RmsNormConfig, not {config!r}")
    scaled_rows = isinstance(out_scale, str) and out_scale == "row"
    if isinstance(out_scale, str) and not scaled_rows:
        raise UsageError(f'{out_scale=} must be a real number, an array, or "row": a scale of its own for each row')
    options = (
        _constant("eps", eps),
        _constant("weight_offset", weight_offset),
        wanted_dtype(out_dtype),
        scaled_rows,
        flag("return_residual", return_residual),
        config,
    )
    arrays = (x, residual, weight, None if scaled_rows else out_scale)
    results = _RMSNORM.run(arrays, (out, residual_out, row_scale), options)
    there = tuple(result for result in results if result is not None)
    return there if len(there) > 1 else there[0]


def _constant(name: str, value: Any) -> float:
    """A number of the caller's. What is no float is looked at at every call: True is the key of a call with 1."""
    return value if value.__class__ is float else checked_constant(name, value)


def _prepare(views: dict[str, View], options: tuple[Any, ...]) -> Prepared:
    """Everything about a call that its arrays' signatures decide."""
    eps, weight_offset, out_dtype, scaled_rows, return_residual, config = options
    x = views["x"]
    if not x.shape or 0 in x.shape:
        raise ProblemError(f"x is {x.shape}: it must have a dimension, and none of length 0")
    n = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    for name in ("residual", "out", "residual_out"):
        if name in views and views[name].shape != x.shape:
            raise ProblemError(f"{name} is {views[name].shape} and must be {x.shape}, as x")
    if "weight" in views:
        if views["weight"].shape != (n,):
            raise ProblemError(f"weight is {views['weight'].shape} and must be ({n},)")
        if n > 1 and views["weight"].strides != (1,):
            raise UnsupportedError(f"weight must be contiguous; its stride is {views['weight'].strides[0]}")
    if "row_scale" in views:
        _check_row_scale(views["row_scale"], (*x.shape[:-1], 1), scaled_rows)
    if "out" in views and out_dtype not in (None, views["out"].dtype):
        raise ProblemError(f"out is {views['out'].dtype} and out_dtype={out_dtype!r}: leave one out")
    wants_sum = return_residual or "residual_out" in views
    if wants_sum and "residual" not in views:
        raise ProblemError("return_residual and residual_out need a residual: without one h is x")
    if "residual_out" in views and views["residual_out"].dtype != views["residual"].dtype:
        kinds = f"residual_out is {views['residual_out'].dtype} and residual {views['residual'].dtype}"
        raise ProblemError(f"{kinds}: they must be of one dtype")

    steps = {name: _row_stride(name, views[name]) for name in ("x", "residual", "out", "residual_out") if name in views}
    strided = any(step != n for step in steps.values())
    # New arrays are dense, and aligned.
    steps = {"out": n, **({"residual_out": n} if wants_sum else {}), **steps}
    pointers = [view.pointer for name, view in views.items() if name not in ("out_scale", "row_scale")]
    problem = RmsNormProblem(
        M=rows,
        N=n,
        dtype=x.dtype,
        weight=views["weight"].dtype if "weight" in views else None,
        residual=views["residual"].dtype if "residual" in views else None,
        residual_out=wants_sum,
        out_dtype=views["out"].dtype if "out" in views else out_dtype,
        out_scale="out_scale" in views,
        row_scale=scaled_rows,
        strided=strided,
        aligned=all(pointer % 16 == 0 for pointer in pointers)
        and not (strided and any(step % 16 for step in steps.values())),
    )
    return _RMSNORM.planned(
        problem,
        views,
        shapes={"out": x.shape, "residual_out": x.shape, "row_scale": (*x.shape[:-1], 1)},
        strides={f"{name}_stride": step for name, step in steps.items()} if strided else {},
        config=config,
        constants=(
            # As the kernel has them, in fp32.
            ("EPS", float(np.float32(checked_constant("eps", eps)))),
            ("WEIGHT_OFFSET", float(np.float32(checked_constant("weight_offset", weight_offset)))),
        ),
    )


def _results(views: dict[str, View], options: tuple[Any, ...]) -> tuple[New, ...]:
    _, _, out_dtype, *_ = options
    x = views["x"]
    return (
        New(x.shape, out_dtype or x.dtype),
        New(x.shape, views.get("residual", x).dtype),
        New((*x.shape[:-1], 1), "fp32"),
    )


def _row_stride(name: str, view: View) -> int:
    """Elements from each row to the next, over all leading dimensions.

    Raises:
        UnsupportedError: there is no such number, or the rows are not contiguous.
    """
    n = view.shape[-1]
    step, span = n, None
    for length, stride in zip(reversed(view.shape[:-1]), reversed(view.strides[:-1]), strict=True):
        if length == 1:
            continue  # no stride to speak of
        if span is None:
            step = stride
        elif stride != span:
            step = -1
            break
        span = stride * length
    if step < n or (n > 1 and view.strides[-1] != 1):
        raise UnsupportedError(
            f"{name} has strides {view.strides} for shape {view.shape}: rows must be contiguous, and at one distance "
            f"that does not let them overlap; {another(name)}"
        )
    return step


def _check_row_scale(view: View, shape: tuple[int, ...], wanted: bool) -> None:
    if not wanted:
        raise ProblemError('row_scale is written with out_scale="row"')
    if view.shape != shape or view.dtype != "fp32":
        raise ProblemError(f"row_scale is {view.shape} of {view.dtype} and must be {shape} of fp32")
    dense = math.prod(shape)
    for length, stride in zip(shape, view.strides, strict=True):
        dense //= length
        if length > 1 and stride != dense:
            raise UnsupportedError(f"row_scale must be contiguous; its strides are {view.strides}")


_RMSNORM = Operation(
    "rmsnorm",
    RMSNORM,
    ("x", "residual", "weight", "out_scale"),
    {
        **dict.fromkeys(("eps", "weight_offset"), "float"),
        "out_dtype": "str?",
        **dict.fromkeys(("scaled_rows", "return_residual"), "bool"),
        "config": "config",
    },
    _prepare,
    _results,
    outputs=("out", "residual_out", "row_scale"),
    optional={"residual_out": "return_residual", "row_scale": "scaled_rows"},
    scalars=("out_scale",),
    in_place=("x", "residual"),
    dtypes={
        **dict.fromkeys(("x", "residual", "weight", "residual_out"), INPUT_DTYPES),
        "out": (*FLOATS, "int8"),
        "row_scale": ("fp32",),
    },
)

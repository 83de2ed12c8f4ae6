"""What a call's arrays say about its problem: shapes, dtypes, layouts, and how batches merge."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tilewright.kernels.arrays import View
from tilewright.kernels.dtypes import dtype
from tilewright.tuning_db.errors import ProblemError, UnsupportedError


class Matrix(NamedTuple):
    """An operand against the batch of the result."""

    layout: str
    stride: int  # between rows ("row") or columns ("col"), in elements
    batch: tuple[int, ...]  # stride of each batch dimension of the result; 0 where the operand is broadcast
    dense: bool  # rows (columns) follow each other without a gap


def shapes_of(views: dict[str, View]) -> tuple[int, int, int, tuple[int, ...]]:
    """M, K, N and the batch of the result.

    Raises:
        ProblemError: the shapes don't go together.
    """
    a, b = views["a"].shape, views["b"].shape
    if len(a) < 2 or len(b) < 2:
        raise ProblemError(f"a {a} and b {b} must have at least two dimensions: (..., M, K) and (..., K, N)")
    (m, k), (other_k, n) = a[-2:], b[-2:]
    if k != other_k:
        raise ProblemError(f"a is {a} and b is {b}: K={k} and K={other_k} must be equal")
    try:
        batch = np.broadcast_shapes(a[:-2], b[:-2])
    except ValueError:
        raise ProblemError(f"a is {a} and b is {b}: the leading dimensions don't broadcast") from None
    if 0 in (m, n, k, *batch):
        raise ProblemError(f"a is {a} and b is {b}: no dimension may be 0")
    shape = (*batch, m, n)
    if "bias" in views and views["bias"].shape != (n,):
        raise ProblemError(f"bias is {views['bias'].shape} and must be ({n},)")
    if "bias" in views and n > 1 and views["bias"].strides != (1,):
        raise UnsupportedError(f"bias must be contiguous; its stride is {views['bias'].strides[0]}")
    if "residual" in views:
        residual = views["residual"].shape
        if residual[-2:] != (m, n) or not _broadcasts(residual[:-2], batch):
            raise ProblemError(f"residual is {residual} and must broadcast to {shape} over the leading dimensions")
    if "out" in views and views["out"].shape != shape:
        raise ProblemError(f"out is {views['out'].shape} and must be {shape}")
    return m, k, n, batch


def _broadcasts(lead: tuple[int, ...], batch: tuple[int, ...]) -> bool:
    """Whether leading dimensions can be repeated to those of the result, without adding to them."""
    try:
        return np.broadcast_shapes(lead, batch) == batch
    except ValueError:
        return False


def result_dtype_of(views: dict[str, View], out_dtype: str | None) -> str:
    """The result's dtype.

    Raises:
        ProblemError: the dtypes don't go together.
    """
    if views["a"].dtype != views["b"].dtype:
        raise ProblemError(f"a is {views['a'].dtype} and b is {views['b'].dtype}: they must have one dtype")
    if out_dtype is not None:
        dtype(out_dtype)
    if "out" in views:
        if out_dtype not in (None, views["out"].dtype):
            raise ProblemError(f"out is {views['out'].dtype} and out_dtype={out_dtype!r}: leave one out")
        return views["out"].dtype
    return out_dtype or ("bf16" if views["a"].dtype.startswith("fp8") else views["a"].dtype)


def matrix_of(name: str, view: View, batch: tuple[int, ...]) -> Matrix:
    """The operand's layout and strides.

    Raises:
        UnsupportedError: neither its rows nor its columns are contiguous.
    """
    rows, columns = view.shape[-2:]
    row_stride, column_stride = view.strides[-2:]
    # A dimension of length 1 has no stride to speak of.
    if column_stride == 1 or columns == 1:
        layout, stride, length, lines = "row", row_stride, columns, rows
        contiguous = column_stride == 1 or columns == 1
    else:
        layout, stride, length, lines = "col", column_stride, rows, columns
        contiguous = row_stride == 1 or rows == 1
    if lines == 1:
        stride = length
    if not contiguous or stride < length:
        raise UnsupportedError(
            f"{name} has strides {view.strides} for shape {view.shape}: rows or columns must be contiguous and not "
            f"overlap; pass a copy"
        )
    lead = view.shape[:-2]
    own = tuple(0 if size == 1 else step for size, step in zip(lead, view.strides[:-2], strict=True))
    if any(step < 0 for step in own):
        raise UnsupportedError(f"{name} has negative strides {view.strides}: pass a copy")
    return Matrix(layout, stride, (0,) * (len(batch) - len(lead)) + own, stride == length)


def dense_strides(batch: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Stride of each batch dimension of an array whose matrices of `size` elements follow each other."""
    strides = []
    for length in reversed(batch):
        strides.append(size if length > 1 else 0)
        size *= length
    return tuple(reversed(strides))


def mergeable(batch: tuple[int, ...], strides: list[tuple[int, ...]]) -> int:
    """How many trailing batch dimensions are one dimension to every operand."""
    merged, step = 0, None
    for position in range(len(batch) - 1, -1, -1):
        current = [stride[position] for stride in strides]
        if batch[position] > 1:
            if step is not None and current != step:
                break
            step = [stride * batch[position] for stride in current]
        merged += 1
    return merged


def outer_indices(
    views: dict[str, View], batch: tuple[int, ...], outer: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """For every index of the first `outer` batch dimensions: where that is in a, b, residual and out."""
    found = []
    for index in np.ndindex(*batch[:outer]):
        at = []
        for name in ("a", "b", "residual", "out"):
            lead = views[name].shape[:-2] if name in views else batch
            missing = len(batch) - len(lead)
            own = index[missing:] if missing < outer else ()
            at.append(tuple(0 if lead[i] == 1 else position for i, position in enumerate(own)))
        found.append(tuple(at))
    return tuple(found)


def matrix_size(name: str, m: int, n: int, k: int) -> int:
    """Elements of one matrix of the operand of that name."""
    return {"a": m * k, "b": k * n}.get(name, m * n)


def folds(matrices: dict[str, Matrix], steps: dict[str, int], m: int) -> bool:
    """Whether the batch of A, residual and out continues their rows, under one B."""
    return steps["b"] == 0 and all(
        matrix.layout == "row" and steps[name] == m * matrix.stride for name, matrix in matrices.items() if name != "b"
    )

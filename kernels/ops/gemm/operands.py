"""What a call's arrays say about its problem: shapes, dtypes, layouts, and how batches merge."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from tilewright.kernels.arrays import View, another
from tilewright.kernels.ops.gemm.packing import packed_rows
from tilewright.kernels.ops.gemm.problem import SCALE_DTYPES, check_words
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UnsupportedProblemError


class Matrix(NamedTuple):
    """An operand against the batch of the result."""

    layout: str
    stride: int  # between rows ("row") or columns ("col"), in elements
    batch: tuple[int, ...]  # stride of each batch dimension of the result; 0 where the operand is broadcast
    dense: bool  # rows (columns) follow each other without a gap


def shapes_of(views: dict[str, View], *, gated: str | None, bias_axis: str) -> tuple[int, int, int, tuple[int, ...]]:
    """M, K, N and the batch of the result.

    Raises:
        ProblemError: the shapes don't go together.
        UnsupportedError: a bias that is not contiguous.
    """
    a, b = views["a"].shape, views["b"].shape
    if len(a) < 2 or len(b) < 2:
        raise ProblemError(f"a {a} and b {b} must have at least two dimensions: (..., M, K) and (..., K, N)")
    (m, k), n = a[-2:], b[-1]
    check_depth(views)
    check_ends(n, gated, bias_axis)
    batch = _broadcast(a[:-2], b[:-2])
    if batch is None:
        raise ProblemError(f"a is {a} and b is {b}: the leading dimensions don't broadcast")
    if is_empty(m, n, k, *batch):
        raise ProblemError(f"a is {a} and b is {b}: no dimension may be 0")
    shape = (*batch, m, n // 2 if gated else n)
    if "bias" in views:
        check_dense(views, "bias", (m if bias_axis == "m" else n,))
    if "residual" in views:
        residual = views["residual"].shape
        # It is repeated to the result's leading dimensions, and adds none.
        if residual[-2:] != shape[-2:] or _broadcast(residual[:-2], batch) != batch:
            raise ProblemError(f"residual is {residual} and must broadcast to {shape} over the leading dimensions")
    if "out" in views and views["out"].shape != shape:
        raise ProblemError(f"out is {views['out'].shape} and must be {shape}")
    return m, k, n, batch


def is_empty(*sizes: int) -> bool:
    """Whether one of them is 0; of torch's symbols nobody can say."""
    return any(size.__class__ is int and size == 0 for size in sizes)


def check_ends(n: int, gated: str | None, bias_axis: str) -> None:
    """Does nothing for options that shapes can be held against.

    Raises:
        ProblemError: they can't be.
    """
    check_words(bias_axis=bias_axis, gated=gated)
    if gated and n % 2:
        raise ProblemError(f"{gated=} needs an even N, not {n}")


def check_depth(views: dict[str, View]) -> None:
    """Does nothing if the rows of B are as many as A has columns, or packed, as many take.

    Raises:
        ProblemError: they are not.
    """
    a, b = views["a"].shape, views["b"].shape
    k, depth = a[-1], b[-2]
    if views["b"].dtype == "uint8":
        if depth != packed_rows(k):
            raise ProblemError(f"a is {a} and b is {b} of packed int4: K={k} rows are packed in {packed_rows(k)}")
    elif k != depth:
        raise ProblemError(f"a is {a} and b is {b}: K={k} and K={depth} must be equal")


def check_dense(views: dict[str, View], name: str, *shapes: tuple[int, ...], one: str | None = None) -> None:
    """Does nothing if the array has one of the shapes and no gaps. `one` says what else it might have been.

    Raises:
        ProblemError: another shape.
        UnsupportedError: strides that are not of a contiguous array.
    """
    shape, strides = views[name].shape, views[name].strides
    if shape not in shapes:
        raise ProblemError(f"{name} is {shape} and must be {' or '.join(filter(None, (one, *map(str, shapes))))}")
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length > 1 and stride != step:
            raise UnsupportedError(f"{name} must be contiguous; its strides are {strides} for shape {shape}")
        step *= length


def scales_of(views: dict[str, View], n: int, group_size: int | None, groups: int = 0) -> dict[str, Any]:
    """The problem's fields that scales and zero points decide.

    Raises:
        ProblemError: shapes or dtypes that don't go together.
        UnsupportedError: arrays that are not contiguous.
    """
    if group_size is not None and group_size < 1:  # before its scales' shape follows from it
        raise ProblemError(f"{group_size=} must be 32, 64 or 128")
    fields: dict[str, Any] = {}
    k = views["a"].shape[-1]
    each = (groups,) if groups else ()
    rows = -(-k // group_size) if group_size else 1
    if "a_scale" in views:
        whole = math.prod(views["a_scale"].shape) == 1
        if not whole:
            a = views["a"].shape[:-1]
            # One matrix may be repeated, by a batch stride of 0, under scales for one.
            once = (1,) * (len(a) - 1) + a[-1:]
            shapes = (a,) if once == a else (a, once)
            check_dense(views, "a_scale", *shapes, *((*shape, 1) for shape in shapes), one="one element")
        fields["a_scale"] = "tensor" if whole else "row"
    if group_size and "b_scale" not in views:
        raise ProblemError(f"{group_size=} needs b_scale")
    if "b_scale" in views:
        if group_size:
            check_dense(views, "b_scale", (*each, rows, n))
            if views["b_scale"].dtype not in SCALE_DTYPES:
                kinds = " or ".join(SCALE_DTYPES)
                raise UnsupportedProblemError(f"b_scale of groups is {views['b_scale'].dtype} and must be {kinds}")
            fields |= {"b_scale": "group", "group_size": group_size, "b_scale_dtype": views["b_scale"].dtype}
        elif math.prod(views["b_scale"].shape) == 1:
            fields["b_scale"] = "tensor"
        else:
            check_dense(views, "b_scale", (*each, n), (*each, 1, n), one="one element")
            fields["b_scale"] = "column"
    if "b_zero" in views:
        check_dense(views, "b_zero", (*each, rows, n), *(((*each, n),) if rows == 1 else ()))
        if views["b_zero"].dtype != views["b"].dtype:
            raise ProblemError(f"b_zero is {views['b_zero'].dtype} and must be that of b, {views['b'].dtype}")
        fields["b_zero"] = True
    for name in ("a_scale", "b_scale"):
        if name in views and views[name].dtype != "fp32" and fields[name] != "group":
            raise UnsupportedProblemError(f"{name} is {views[name].dtype} and must be fp32")
    return fields


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that two broadcast to, None where they don't. Of torch's symbolic sizes too, which NumPy would ask for
    their values."""
    shape = []
    for x, y in itertools.zip_longest(reversed(one), reversed(other), fillvalue=1):
        if x != y and x != 1 and y != 1:
            return None
        shape.append(y if x == 1 else x)
    return tuple(reversed(shape))


def dtypes_of(views: dict[str, View], out_dtype: str | None) -> dict[str, str | None]:
    """The problem's fields that name the dtypes of its arrays.

    Raises:
        ProblemError: the dtypes don't go together.
    """
    a, b = views["a"].dtype, views["b"].dtype
    if b != a and not (b in ("int8", "uint8") and a in ("fp16", "bf16")):
        raise UnsupportedProblemError(
            f"a is {a} and b is {b}: they must have one dtype, or a fp16 or bf16 and b int8 or uint8 (packed int4)"
        )
    if "out" in views:
        if out_dtype not in (None, views["out"].dtype):
            raise ProblemError(f"out is {views['out'].dtype} and out_dtype={out_dtype!r}: leave one out")
        out_dtype = views["out"].dtype
    fields = {"dtype": a, "b_dtype": "int4" if b == "uint8" else b, "out_dtype": out_dtype}
    return fields | {name: views[name].dtype if name in views else None for name in ("bias", "residual")}


def matrix_of(name: str, view: View, batch: tuple[int, ...]) -> Matrix:
    """The operand's layout and strides.

    Raises:
        UnsupportedError: neither its rows nor its columns are contiguous.
    """
    rows, columns = view.shape[-2:]
    row_stride, column_stride = view.strides[-2:]
    # A dimension of length 1 has no stride to speak of.
    contiguous = True
    if column_stride == 1 or columns == 1:
        layout, stride, length, lines = "row", row_stride, columns, rows
    else:
        layout, stride, length, lines = "col", column_stride, rows, columns
        contiguous = row_stride == 1 or rows == 1
    if lines == 1:
        stride = length
    if not contiguous or stride < length:
        raise UnsupportedError(
            f"{name} has strides {view.strides} for shape {view.shape}: rows or columns must be contiguous and not "
            f"overlap; {another(name)}"
        )
    lead = view.shape[:-2]
    own = tuple(0 if size == 1 else step for size, step in zip(lead, view.strides[:-2], strict=True))
    if any(step < 0 for step in own):
        raise UnsupportedError(f"{name} has negative strides {view.strides}: {another(name)}")
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


def folds(matrices: dict[str, Matrix], steps: dict[str, int], m: int) -> bool:
    """Whether the batch of A, residual and out continues their rows, under one B."""
    return steps["b"] == 0 and all(
        matrix.layout == "row" and steps[name] == m * matrix.stride for name, matrix in matrices.items() if name != "b"
    )


def check_rows(matrices: dict[str, Matrix], views: dict[str, View]) -> None:
    """Does nothing if the residual and the result are row-major, and the result has every element once.

    Raises:
        UnsupportedError: they are not.
    """
    if "residual" in matrices and matrices["residual"].layout != "row":
        raise UnsupportedError(f"residual must be row-major; its strides are {views['residual'].strides}")
    if "out" in views:
        lead = zip(matrices["out"].batch, views["out"].shape[:-2], strict=True)
        repeated = any(step == 0 and length > 1 for step, length in lead)
        if matrices["out"].layout != "row" or repeated:
            raise UnsupportedError(f"out must be row-major, without broadcast; its strides are {views['out'].strides}")

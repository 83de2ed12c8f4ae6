"""What a call's arrays say about its problem: shapes, dtypes, and how each lies in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

from tilewright.kernels.arrays import View
from tilewright.kernels.constants import is_symbolic
from tilewright.kernels.ops.conv2d.problem import INPUT_DTYPES, LAYOUTS
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UnsupportedProblemError, UsageError

TO_NHWC = {"nhwc": (0, 1, 2, 3), "nchw": (0, 2, 3, 1)}
"""Where N, H, W and C (K, R, S and C of weights) are among the dimensions of a layout."""

FROM_NHWC = {"nhwc": (0, 1, 2, 3), "nchw": (0, 3, 1, 2)}


def numbers(name: str, value: Any, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """An option that is one integer or as many as one of `lengths`; one stands for as many as the first.

    Raises:
        UsageError: it is something else.
    """
    given = value if isinstance(value, tuple) else (value,) * lengths[0]
    given = tuple(int(each) if is_symbolic(each) else each for each in given)
    if len(given) not in lengths or any(isinstance(each, bool) or not isinstance(each, Integral) for each in given):
        counts = " or ".join(map(str, lengths))
        raise UsageError(f"{name}={value!r} must be an integer or {counts} of them")
    return tuple(map(int, given))


def paddings(value: Any) -> dict[str, int]:
    """The problem's padding from an integer, (height, width), or (top, left, bottom, right) as in ONNX.

    Raises:
        UsageError: it is something else.
    """
    given = numbers("padding", value, (2, 4))
    top, left, bottom, right = given if len(given) == 4 else given * 2
    return {"pad_top": top, "pad_left": left, "pad_bottom": bottom, "pad_right": right}


def nhwc(view: View, layout: str) -> View:
    """A view with its dimensions in the order N, H, W, C."""
    order = TO_NHWC[layout]
    return view._replace(
        shape=tuple(view.shape[axis] for axis in order), strides=tuple(view.strides[axis] for axis in order)
    )


def memory_of(view: View) -> tuple[str, ...]:
    """In which layouts a view in the order N, H, W, C lies in memory without a gap: one, both or none of them."""
    found = []
    for layout, order in FROM_NHWC.items():
        step, dense = 1, True
        for axis in reversed(order):
            # A dimension of length 1 has no stride to speak of.
            dense = dense and (view.shape[axis] == 1 or view.strides[axis] == step)
            step *= view.shape[axis]
        if dense:
            found.append(layout)
    return tuple(found)


def layouts_of(views: dict[str, View], layout: str, whole: dict[str, tuple[int, ...]]) -> tuple[str, str]:
    """How x, residual and out lie in memory, all alike, and how w does: where `layout` is one way, that.

    Raises:
        UnsupportedError: an array has gaps, or not the layout of x.
    """
    possible = tuple(dict.fromkeys((layout, *LAYOUTS)))
    for name in ("x", "residual", "out"):
        if name in views:
            mine = memory_of(views[name])
            common = tuple(each for each in possible if each in mine)
            if not common:
                where = f"{_shown(possible, whole)} memory{'' if name == 'x' else ', as x does,'}"
                raise UnsupportedError(
                    f"{name} of shape {whole[name]} must lie in {where} without gaps; pass a contiguous copy"
                )
            possible = common
    memory = possible[0]
    weights = memory_of(views["w"])
    if not weights:
        where = _shown(sorted(LAYOUTS.values(), reverse=True), whole)
        raise UnsupportedError(
            f"w of shape {whole['w']} must lie in {where} memory without gaps; pass a contiguous copy"
        )
    return memory, LAYOUTS[memory if memory in weights else weights[0]]


def _shown(layouts: Iterable[str], whole: dict[str, tuple[int, ...]]) -> str:
    """Layouts as the caller names them: of one dimension without rows, the other being L."""
    letters = str.maketrans("W", "L", "HR") if len(whole["x"]) == 3 else {}
    return " or ".join(layout.upper().translate(letters) for layout in layouts)


def sizes_of(views: dict[str, View], groups: int, whole: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The problem's sizes, from views in the order N, H, W, C.

    Raises:
        ProblemError: the shapes don't go together.
        UnsupportedError: bias or w_scale has gaps.
    """
    n, h, w, c = views["x"].shape
    k, r, s, seen = views["w"].shape
    if 0 in (n, h, w, c, k, r, s, seen):
        raise ProblemError(f"x is {whole['x']} and w is {whole['w']}: no dimension may be 0")
    if groups < 1:
        raise ProblemError(f"groups={groups} must be at least 1")
    if c != seen * groups:
        raise ProblemError(
            f"x is {whole['x']} and w is {whole['w']}: {c} channels of x must be groups={groups} times {seen} of w"
        )
    for name in ("bias", "w_scale"):
        if name in views and (name == "bias" or math.prod(views[name].shape) != 1):
            if views[name].shape != (k,):
                one = " or one element" if name == "w_scale" else ""
                raise ProblemError(f"{name} is {views[name].shape} and must be ({k},){one}")
            if k > 1 and views[name].strides != (1,):
                raise UnsupportedError(f"{name} must be contiguous; its stride is {views[name].strides[0]}")
    return {"N": n, "H": h, "W": w, "C": c, "K": k, "R": r, "S": s}


def dtypes_of(views: dict[str, View], out_dtype: str | None) -> dict[str, Any]:
    """The problem's fields that name the dtypes of its arrays, or say that they are there.

    Raises:
        ProblemError: the dtypes don't go together.
    """
    if views["x"].dtype != views["w"].dtype:
        raise UnsupportedProblemError(f"x is {views['x'].dtype} and w is {views['w'].dtype}: they must have one dtype")
    if views["x"].dtype not in INPUT_DTYPES:
        raise UnsupportedProblemError(f"x is {views['x'].dtype} and must be one of {', '.join(INPUT_DTYPES)}")
    if "out" in views:
        if out_dtype not in (None, views["out"].dtype):
            raise ProblemError(f"out is {views['out'].dtype} and out_dtype={out_dtype!r}: leave one out")
        out_dtype = views["out"].dtype
    fields: dict[str, Any] = {"dtype": views["x"].dtype, "out_dtype": out_dtype}
    fields |= {name: views[name].dtype if name in views else None for name in ("bias", "residual")}
    fields |= {name: name in views for name in ("x_scale", "alpha", "out_scale")}
    if "w_scale" in views:
        if views["w_scale"].dtype != "fp32":
            raise UnsupportedProblemError(f"w_scale is {views['w_scale'].dtype} and must be fp32")
        fields["w_scale"] = "tensor" if math.prod(views["w_scale"].shape) == 1 else "channel"
    return fields

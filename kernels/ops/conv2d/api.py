"""`conv2d` and `conv1d`: the fused convolution as people call it, on arrays of any library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from tilewright.kernels.activations import activation_name
from tilewright.kernels.arrays import ArrayKind, View
from tilewright.kernels.call import Arrays, New, Operation, PlannedCall, Prepared
from tilewright.kernels.dispatch import plan_for
from tilewright.kernels.dtypes import wanted_dtype
from tilewright.kernels.epilogue import FLOATS, OUTPUT_DTYPES, sums_dtype
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.conv2d.operands import (
    FROM_NHWC,
    dtypes_of,
    layouts_of,
    nhwc,
    numbers,
    paddings,
    sizes_of,
)
from tilewright.kernels.ops.conv2d.problem import INPUT_DTYPES, LAYOUTS, Conv2dProblem, as_gemm, outputs_along
from tilewright.kernels.ops.conv2d.space import Conv2dConfig
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.options import factor, flag, integer
from tilewright.kernels.problem import Output
from tilewright.kernels.runtime import Plan
from tilewright.tuning_db.errors import ProblemError, UnsupportedProblemError, UsageError

INPUTS = ("x", "w", "x_scale", "w_scale", "bias", "residual", "alpha", "out_scale")
SCALARS = ("x_scale", "alpha", "out_scale")
"""Inputs of one element."""

OPTIONS = {
    "activation": "str?",
    "residual_last": "bool",
    **dict.fromkeys(("stride", "padding", "dilation"), "ints"),
    "groups": "int?",
    "layout": "str",
    **dict.fromkeys(("precision", "out_dtype"), "str?"),
    "config": "config",
}


def conv2d(
    x: Any,
    w: Any,
    *,
    x_scale: Any = None,
    w_scale: Any = None,
    bias: Any = None,
    residual: Any = None,
    residual_last: bool = False,
    activation: str | None = None,
    alpha: Any = 1.0,
    out_scale: Any = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[int, int, int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    layout: str = "nhwc",
    precision: str | None = None,
    out_dtype: Any = None,
    out: Any = None,
    config: Conv2dConfig | GemmConfig | None = None,
) -> Any:
    """Fused convolution: `activation(alpha · x_scale · w_scale · (x ∗ w) + bias + residual)`, `/ out_scale`.

    With `residual_last`, `activation(… + bias) + residual`. As deep learning has it: w is not flipped, and x is zero
    outside its bounds. Sums are taken in fp32, of int8 in int32. What is read and written is told from strides: any of
    x, w, residual and out may lie in NHWC or NCHW memory (torch's channels_last), whatever the order of its dimensions,
    if x, residual and out do so alike. One tap with stride 1, no padding and one group is a GEMM, and runs as one. The
    configuration is the tuned one for this problem on this GPU, where there is one; see docs/tuning-database.md. The
    call returns as soon as the work is on the caller's current stream.

    Args:
        x: (N, H, W, C), or (N, C, H, W) with `layout="nchw"`, of fp16, fp32, (sm_80 on) bf16, int8, fp8e5m2, or
            (sm_89 on) fp8e4m3.
        w: (K, R, S, C/groups), or (K, C/groups, R, S), of the same dtype.
        x_scale: factor on the sums: a number, or one fp32 element on the GPU.
        w_scale: likewise, or one for each output channel, fp32 (K,).
        bias: (K,), of fp16, bf16, fp32 or fp8.
        residual: of the result's shape, of any of these.
        residual_last: the residual is added behind the activation, not before it.
        activation: a name of docs/epilogue.md, with its parameters: "silu", "leaky_relu:0.1", "clamp:0:6".
        alpha: factor on the sums: a number, or an fp32 array of one element on the GPU; None is 1.
        out_scale: scale of a quantised result (int8, fp8): a number above 0, or such an array, which is not looked at.
        stride: one for both dimensions, or (height, width).
        padding: zeros around x: one number, (height, width), or (top, left, bottom, right), the order of ONNX.
        dilation: distance of neighbouring taps: one for both dimensions, or (height, width).
        groups: of channels: output channel k sees the C/groups input channels of its group. As many as there are
            channels is a depthwise convolution.
        layout: order of the dimensions of x, w, residual and out: "nhwc" or "nchw".
        precision: of fp32 operands: "ieee" (default; CUDA cores) or "tf32" (tensor cores, 10-bit mantissa).
        out_dtype: the result's dtype, by its canonical name or as a library has it; by default that of `x`, bf16 for
            fp8, and for int8 int32 or, with `x_scale` or `w_scale`, bf16. Of int8 with neither, nothing but the bare
            int32 sums. "int8" needs `out_scale`.
        out: array (N, P, Q, K), or (N, K, P, Q), to write to, of `out_dtype`; it may be `residual`, but not overlap
            another input.
        config: a configuration to use instead of the tuned one; a `GemmConfig` for what runs as a GEMM.

    Returns:
        `out`, or a new array of the library that `x` is of, in memory of the layout of x.

    Raises:
        ProblemError: shapes or dtypes that don't go together; the message has them.
        UsageError: an option that can't be one, as a padding of three numbers.
        UnsupportedError: an array with gaps, or a dtype this GPU lacks.
        IllegalConfigError: `config` breaks a limit of the problem or the GPU.
        MissingDependencyError: CuPy or a GPU is needed and absent.
        CompileError, LaunchError: the compiler or the driver refused the configuration.
        PackError, NotPackedError: this process's pack can't be used, or lacks the problem (docs/packs.md).
    """
    arrays = (x, w, x_scale, w_scale, bias, residual, factor(alpha), out_scale)
    window = (_whole("stride", stride, 2), _whole("padding", padding, 2, 4), _whole("dilation", dilation, 2))
    rest = integer("groups", groups), layout, precision, wanted_dtype(out_dtype), _checked(config)
    return _CONV2D.run(arrays, (out,), (activation, flag("residual_last", residual_last), *window, *rest))[0]


def conv1d(
    x: Any,
    w: Any,
    *,
    x_scale: Any = None,
    w_scale: Any = None,
    bias: Any = None,
    residual: Any = None,
    residual_last: bool = False,
    activation: str | None = None,
    alpha: Any = 1.0,
    out_scale: Any = None,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    layout: str = "nlc",
    precision: str | None = None,
    out_dtype: Any = None,
    out: Any = None,
    config: Conv2dConfig | GemmConfig | None = None,
) -> Any:
    """`conv2d` over one dimension: the same kernel, on images of one row.

    Args:
        x: (N, L, C), or (N, C, L) with `layout="ncl"`.
        w: (K, S, C/groups), or (K, C/groups, S).
        padding: zeros at both ends, or (begin, end).
        layout: "nlc" or "ncl".

    The rest, the result and the errors are as `conv2d` has them, with one dimension less.
    """
    arrays = (x, w, x_scale, w_scale, bias, residual, factor(alpha), out_scale)
    window = (_whole("stride", stride, 1), _whole("padding", padding, 2), _whole("dilation", dilation, 1))
    rest = integer("groups", groups), layout, precision, wanted_dtype(out_dtype), _checked(config)
    return _CONV1D.run(arrays, (out,), (activation, flag("residual_last", residual_last), *window, *rest))[0]


def _whole(name: str, option: Any, *lengths: int) -> Any:
    """An option of one integer or several, as Python's: 1, 1.0 and True are equal keys of a call that is remembered."""
    if option.__class__ is int:
        return option
    return numbers(name, tuple(option) if isinstance(option, list) else option, lengths)


def _checked(config: Any) -> Conv2dConfig | GemmConfig | None:
    if config is None or isinstance(config, Conv2dConfig | GemmConfig):
        return config
    raise UsageError(f"config must be a Conv2dConfig, or a GemmConfig for what runs as a GEMM, not {config!r}")


@dataclass(frozen=True, slots=True)
class TurnedCall:
    """A call whose new results have their dimensions in another order than their memory: channels_last."""

    planned: PlannedCall
    memory: Output
    order: tuple[int, ...]  # of the result's dimensions, among those of `memory`

    def run(self, kind: ArrayKind, arrays: Arrays, outs: Arrays, arguments: list[Any]) -> Arrays:
        """Puts the call on the current stream."""
        (out,) = outs
        if out is None:
            array = kind.empty(arrays[0], *self.memory)
            # torch's name for it is not that of the others.
            out = array.permute(*self.order) if hasattr(array, "permute") else array.transpose(self.order)
        return self.planned.run(kind, arrays, (out,), arguments)


class Described(NamedTuple):
    """A call as one of two dimensions."""

    views: dict[str, View]  # of x, w, residual and out in the order N, H, W, C (K, R, S, C)
    whole: dict[str, tuple[int, ...]]  # shapes as the caller sees them
    layout: str
    order: tuple[int, ...]  # the result's dimensions, as the caller sees them, among N, P, Q, K
    sizes: dict[str, int]
    window: dict[str, int]

    @property
    def result(self) -> tuple[int, int, int, int]:
        """N, P, Q and K."""
        of, along = self.sizes, {}
        for name, length, taps, before, after in (("h", "H", "R", "top", "bottom"), ("w", "W", "S", "left", "right")):
            padding = self.window[f"pad_{before}"] + self.window[f"pad_{after}"]
            window = self.window[f"stride_{name}"], padding, self.window[f"dilation_{name}"]
            along[name] = outputs_along(of[length], of[taps], *window)
        return of["N"], along["h"], along["w"], of["K"]

    def seen(self, result: tuple[int, ...]) -> tuple[int, ...]:
        """A shape N, P, Q, K as the caller sees it."""
        return tuple(result[axis] for axis in self.order)

    def stored(self, memory: str) -> tuple[int, ...]:
        """The result's dimensions, as the caller numbers them, in the order of memory of a layout. Of one row, which is
        the dimension P, `conv1d` shows nothing."""
        return tuple(self.order.index(axis) for axis in FROM_NHWC[memory] if axis in self.order)


def _image(views: dict[str, View], options: tuple[Any, ...]) -> Described:
    """A call of `conv2d`."""
    _, _, stride, padding, dilation, groups, layout, *_ = options
    if layout not in LAYOUTS:
        raise ProblemError(f"layout={layout!r} must be nhwc or nchw")
    stride_h, stride_w = numbers("stride", stride, (2,))
    dilation_h, dilation_w = numbers("dilation", dilation, (2,))
    window = {"stride_h": stride_h, "stride_w": stride_w, "dilation_h": dilation_h, "dilation_w": dilation_w}
    whole = {name: view.shape for name, view in views.items()}
    return _described(views, whole, layout, FROM_NHWC[layout], window | paddings(padding), groups)


def _row(views: dict[str, View], options: tuple[Any, ...]) -> Described:
    """A call of `conv1d`, as one of images of one row."""
    _, _, stride, padding, dilation, groups, layout, *_ = options
    if layout not in ("nlc", "ncl"):
        raise ProblemError(f"layout={layout!r} must be nlc or ncl")
    (stride_w,), (dilation_w,) = numbers("stride", stride, (1,)), numbers("dilation", dilation, (1,))
    left, right = numbers("padding", padding, (2,))
    _refuse_window(stride_w, left, right, dilation_w)
    whole = {name: view.shape for name, view in views.items()}
    at = 1 if layout == "nlc" else 2
    for name, view in views.items():
        if name in ("x", "w", "residual", "out") and len(view.shape) == 3:
            shape, strides = ((*each[:at], 1, *each[at:]) for each in (view.shape, view.strides))
            views[name] = view._replace(shape=shape, strides=strides)
        elif name in ("x", "w", "residual", "out"):
            wanted = layout.upper() if name != "w" else "KSC" if layout == "nlc" else "KCS"
            raise ProblemError(f"{name} is {view.shape} and must have 3 dimensions: {wanted}")
    length, taps = (whole[name][2 - (layout == "nlc")] for name in ("x", "w"))
    if length and taps and length + left + right <= dilation_w * (taps - 1):
        raise ProblemError(
            f"L={length} with padding={left, right} is less than the {dilation_w * (taps - 1) + 1} that {taps} taps "
            f"with dilation={dilation_w} reach"
        )
    if length + left + right >= 2**31:
        raise ProblemError(f"L={length} with padding={left, right} passes 32 bits")
    window = {"stride_h": 1, "stride_w": stride_w, "dilation_h": 1, "dilation_w": dilation_w}
    window |= {"pad_top": 0, "pad_bottom": 0, "pad_left": left, "pad_right": right}
    seen, order = ("nhwc", (0, 2, 3)) if layout == "nlc" else ("nchw", (0, 3, 2))
    return _described(views, whole, seen, order, window, groups)


def _refuse_window(stride: int, left: int, right: int, dilation: int) -> None:
    """Does nothing for what a problem takes, whose names for these are those of two dimensions."""
    for name, value, least in (("stride", stride, 1), ("dilation", dilation, 1)):
        if not least <= value < 2**31:
            raise ProblemError(f"{name}={value} must be from {least} to {2**31 - 1}")
    if not 0 <= min(left, right) <= max(left, right) < 2**31:
        raise UnsupportedProblemError(f"padding={left, right} must be from 0 to {2**31 - 1}")


def _described(
    views: dict[str, View],
    whole: dict[str, tuple[int, ...]],
    layout: str,
    order: tuple[int, ...],
    window: dict[str, int],
    groups: int | None,
) -> Described:
    for name in ("x", "w", "residual", "out"):
        if name in views:
            if len(views[name].shape) != 4:
                wanted = layout.upper() if name != "w" else LAYOUTS[layout].upper()
                raise ProblemError(f"{name} is {whole[name]} and must have 4 dimensions: {wanted}")
            views[name] = nhwc(views[name], layout)
    if groups is None:
        raise UsageError("groups=None must be an integer")
    return Described(views, whole, layout, order, sizes_of(views, groups, whole), window)


Describe = Callable[[dict[str, View], tuple[Any, ...]], Described]


def _prepare(describe: Describe, views: dict[str, View], options: tuple[Any, ...]) -> Prepared:
    """Everything about a call that its arrays' signatures decide."""
    activation, residual_last, _, _, _, groups, _, precision, out_dtype, config = options
    call = describe(views, options)
    views, whole, layout, *_ = call
    fields = call.sizes | call.window | dtypes_of(views, out_dtype)
    # What never goes together is said before what these arrays' strides don't allow.
    fields |= {"activation": activation_name(activation), "residual_last": residual_last}
    made = Conv2dProblem(**fields, groups=groups, precision=precision)
    result = (made.N, made.P, made.Q, made.K)
    for name in ("residual", "out"):
        if name in views and views[name].shape != result:
            raise ProblemError(f"{name} is {whole[name]} and must be {call.seen(result)}")
    memory, w_layout = layouts_of(views, layout, whole)
    narrow = {*SCALARS, *(["w_scale"] if made.w_scale == "tensor" else [])}
    problem = Conv2dProblem(
        **fields,
        groups=groups,
        precision=precision,
        layout=memory,
        w_layout=w_layout,
        aligned=all(view.pointer % 16 == 0 for name, view in views.items() if name not in narrow),
    )
    shape = call.seen(result)
    planned = _planned(problem, views, shape, config)
    if memory == layout or "out" in views:
        return planned
    stored = call.stored(memory)
    turned = tuple(stored.index(dimension) for dimension in range(len(stored)))
    return TurnedCall(planned, Output(tuple(shape[dimension] for dimension in stored), problem.output_dtype), turned)


def _results(describe: Describe, views: dict[str, View], options: tuple[Any, ...]) -> tuple[New, ...]:
    activation, *_, out_dtype, _ = options
    call = describe(views, options)
    memory, _ = layouts_of(call.views, call.layout, call.whole)
    fused = not {"x", "w", "out"}.issuperset(call.views) or activation_name(activation) != "none"
    kind = out_dtype or sums_dtype(call.views["x"].dtype, fused)
    return (New(call.seen(call.result), kind, call.stored(memory)),)


def _planned(
    problem: Conv2dProblem, views: dict[str, View], shape: tuple[int, ...], config: Conv2dConfig | GemmConfig | None
) -> PlannedCall:
    ordinal = views["x"].device
    names = {name: f"{name}_ptr" for name in INPUTS}
    plan: Plan
    if problem.pointwise and not isinstance(config, Conv2dConfig):
        plan, _ = plan_for(GEMM, as_gemm(problem), ordinal, config=config)
        x, w = ("a", "b") if problem.layout == "nhwc" else ("b", "a")
        names |= {"x": f"{x}_ptr", "w": f"{w}_ptr", "x_scale": f"{x}_scale_ptr", "w_scale": f"{w}_scale_ptr"}
    else:
        if isinstance(config, GemmConfig):
            raise UsageError(f"{config} is for what runs as a GEMM, and {problem} does not: pass a Conv2dConfig")
        plan, _ = plan_for(CONV2D, problem, ordinal, config=config)
    return PlannedCall.of(plan, views, names, {"out": Output(shape, problem.output_dtype)}, {})


_CONV2D, _CONV1D = (
    Operation(
        name,
        CONV2D,
        INPUTS,
        OPTIONS,
        functools.partial(_prepare, describe),
        functools.partial(_results, describe),
        scalars=SCALARS,
        scalar_or_array=("w_scale",),
        in_place=("residual",),
        required=("x", "w"),
        dtypes={
            "x": INPUT_DTYPES,
            "w": INPUT_DTYPES,
            "w_scale": ("fp32",),
            "bias": FLOATS,
            "residual": FLOATS,
            "out": OUTPUT_DTYPES,
        },
    )
    for name, describe in (("conv2d", _image), ("conv1d", _row))
)

"""The fused 2-D convolution as mathematics: what is computed, on which arrays, and how near a result must be.

    y[n, p, q, k] = Σ over r, s, c of x[n, p·stride + r·dilation - pad, q·stride + s·dilation - pad, c] · w[k, r, s, c]
    out = activation(alpha · x_scale · w_scale · y + bias + residual) / out_scale

x is zero outside its bounds. Output channel k sees the C/groups input channels of its group. Sums are taken in fp32, of
int8 in int32.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tilewright.kernels.activations import activation_name
from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype, refused
from tilewright.kernels.epilogue import FusedProblem, epilogue_reference, rounded, sums_dtype, unsupported_dtype
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Output
from tilewright.kernels.samples import INTEGER_SPREAD, normal, placed
from tilewright.tuning_db.errors import ProblemError, UnsupportedProblemError
from tilewright.tuning_db.shapes import Near

Array = np.ndarray[Any, Any]

INPUT_DTYPES = ("fp16", "bf16", "fp32", "int8", "fp8e4m3", "fp8e5m2")
LAYOUTS = {"nhwc": "krsc", "nchw": "kcrs"}
"""Layouts of x and out, each with that of the weights that goes with it."""

PART = 24
"""Rows, columns and eighths of the output channels that `part` takes."""


@dataclass(frozen=True, slots=True)
class Conv2dProblem(FusedProblem):
    """One fused convolution: N images of H×W pixels and C channels, K filters of R×S taps. docs/conv2d.md has
    every field.

    `layout` says how x, residual and out lie in memory, `w_layout` how w does (left out: as goes with `layout`). Left
    out, `out_dtype` is the input's (bf16 for fp8; of int8, int32 for the bare sums, else bf16), and `precision` is
    `ieee` for fp32 and nothing for the rest.
    """

    op: ClassVar[str] = "conv2d"

    N: int
    H: int
    W: int
    C: int
    K: int
    R: int
    S: int
    stride_h: int = 1
    stride_w: int = 1
    pad_top: int = 0
    pad_left: int = 0
    pad_bottom: int = 0
    pad_right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1
    dtype: str = "fp16"
    layout: str = "nhwc"
    w_layout: str | None = None  # "krsc" or "kcrs"
    precision: str | None = None  # of fp32 operands: "ieee" or "tf32"
    x_scale: bool = False  # one factor for all of x
    w_scale: str | None = None  # "tensor": one factor for all of w; "channel": one for each output channel
    aligned: bool = True  # every pointer to 16 bytes

    def __post_init__(self) -> None:
        self.check_types()
        self._check_sizes()
        put = object.__setattr__  # frozen: canonical spellings are set once, here
        if self.dtype not in INPUT_DTYPES:
            raise refused("dtype", self.dtype, "conv2d", INPUT_DTYPES)
        if self.layout not in LAYOUTS:
            raise ProblemError(f"layout={self.layout!r} must be nhwc or nchw")
        if self.w_layout not in (None, *LAYOUTS.values()):
            raise ProblemError(f"w_layout={self.w_layout!r} must be krsc or kcrs")
        if self.w_layout is None or self.R * self.S == 1 or self.group_channels == 1:
            put(self, "w_layout", LAYOUTS[self.layout])  # one tap, or one channel: they are the same
        if self.w_scale not in (None, "tensor", "channel"):
            raise ProblemError(f"w_scale={self.w_scale!r} must be tensor, channel or none")
        # What is absent: None or False, or the activation "none" (however it is spelled).
        parts = (self.x_scale, self.w_scale, self.bias, self.residual, self.alpha, self.out_scale)
        fused = any(parts) or activation_name(self.activation) != "none"
        self.check_epilogue(sums_dtype(self.dtype, fused))
        if self.out_dtype == "int32" and (self.dtype != "int8" or fused):
            raise ProblemError(
                "out_dtype='int32' is the bare sum of dtype='int8': without scale, bias, residual or activation"
            )
        if self.dtype == "int8" and self.out_dtype != "int32" and not (self.x_scale or self.w_scale):
            raise ProblemError(
                "dtype='int8' with neither x_scale nor w_scale gives the bare sums, in int32: another out_dtype, and "
                "whatever is fused to them, needs one of these"
            )
        if self.precision not in (None, "ieee", "tf32"):
            raise ProblemError(f"precision={self.precision!r} must be ieee or tf32")
        if self.dtype == "fp32":
            put(self, "precision", self.precision or "ieee")
        elif self.precision is not None:
            raise ProblemError(f"precision={self.precision!r} is for dtype=fp32; {self.dtype} has only one")

    def _check_sizes(self) -> None:
        for names, least in (
            (("N", "H", "W", "C", "K", "R", "S", "groups", "stride_h", "stride_w", "dilation_h", "dilation_w"), 1),
            (("pad_top", "pad_left", "pad_bottom", "pad_right"), 0),
        ):
            for name in names:
                if not least <= getattr(self, name) < 2**31:
                    # A negative padding would cut x off.
                    kind = UnsupportedProblemError if name.startswith("pad") else ProblemError
                    raise kind(f"{name}={getattr(self, name)} must be from {least} to {2**31 - 1}")
        for name in ("C", "K"):
            if getattr(self, name) % self.groups:
                raise ProblemError(f"{name}={getattr(self, name)} must be divisible by groups={self.groups}")
        for length, size, pads, taps, dilation in (
            ("H", self.H, (self.pad_top, self.pad_bottom), self.R, self.dilation_h),
            ("W", self.W, (self.pad_left, self.pad_right), self.S, self.dilation_w),
        ):
            whole = f"{length}={size} with padding {pads[0]} and {pads[1]}"
            if size + sum(pads) < dilation * (taps - 1) + 1:
                raise ProblemError(
                    f"{whole} is less than the {dilation * (taps - 1) + 1} that {taps} taps with dilation {dilation} "
                    "reach"
                )
            if size + sum(pads) >= 2**31:
                raise ProblemError(f"{whole} passes 32 bits")

    @property
    def P(self) -> int:  # noqa: N802 - the field's name
        """Rows of the result."""
        return outputs_along(self.H, self.R, self.stride_h, self.pad_top + self.pad_bottom, self.dilation_h)

    @property
    def Q(self) -> int:  # noqa: N802 - the field's name
        """Columns of the result."""
        return outputs_along(self.W, self.S, self.stride_w, self.pad_left + self.pad_right, self.dilation_w)

    @property
    def pixels(self) -> int:
        """Output pixels: the rows of the implicit GEMM."""
        return self.N * self.P * self.Q

    @property
    def group_channels(self) -> int:
        """Input channels that a filter sees."""
        return self.C // self.groups

    @property
    def group_filters(self) -> int:
        """Output channels of a group: the columns of the implicit GEMM."""
        return self.K // self.groups

    @property
    def depth(self) -> int:
        """Products in one sum."""
        return self.R * self.S * self.group_channels

    @property
    def depthwise(self) -> bool:
        """Whether every filter sees one channel, so that there is nothing for a dot product to do."""
        return self.group_channels == 1 and self.groups > 1

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product of pixels and filters: `as_gemm` says which."""
        plain = self.R * self.S * self.groups == self.stride_h == self.stride_w == 1
        return plain and not (self.pad_top or self.pad_left or self.pad_bottom or self.pad_right)

    @property
    def padded(self) -> bool:
        """Whether a tap of some output pixel lies outside of x."""
        return (
            self.pad_top > 0
            or self.pad_left > 0
            or (self.P - 1) * self.stride_h + self.dilation_h * (self.R - 1) - self.pad_top >= self.H
            or (self.Q - 1) * self.stride_w + self.dilation_w * (self.S - 1) - self.pad_left >= self.W
        )

    @property
    def unit(self) -> str:
        """`fp32` for depthwise and for IEEE arithmetic, which tensor cores don't do; else the dtype's own."""
        return "fp32" if self.depthwise or self.precision == "ieee" else dtype(self.dtype).unit

    def flops(self) -> int:
        """2·N·P·Q·K·R·S·C/groups, taps in the padding included, as is customary."""
        return 2 * self.pixels * self.K * self.depth

    def pixels_read(self) -> int:
        """Pixels of x that any tap touches: a stride longer than the kernel skips some."""
        rows = touched(self.H, self.P, self.R, self.stride_h, self.dilation_h, self.pad_top)
        columns = touched(self.W, self.Q, self.S, self.stride_w, self.dilation_w, self.pad_left)
        return self.N * rows * columns

    def bytes_moved(self) -> int:
        """Every pixel that is needed and every weight read once, the output written once."""
        total = (self.pixels_read() * self.C + self.K * self.depth) * dtype(self.dtype).bytes
        total += self.pixels * self.K * dtype(self.output_dtype).bytes
        if self.bias is not None:
            total += self.K * dtype(self.bias).bytes
        if self.residual is not None:
            total += self.pixels * self.K * dtype(self.residual).bytes
        if self.w_scale == "channel":
            total += 4 * self.K
        return int(total)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input array but the one-element ones, by argument name; dimensions in the order of
        `layout`."""
        nhwc = self.layout == "nhwc"
        shapes: dict[str, tuple[int, ...]] = {
            "x": (self.N, self.H, self.W, self.C) if nhwc else (self.N, self.C, self.H, self.W),
            "w": (self.K, self.R, self.S, self.group_channels)
            if nhwc
            else (self.K, self.group_channels, self.R, self.S),
        }
        if self.w_scale == "channel":
            shapes["w_scale"] = (self.K,)
        if self.bias is not None:
            shapes["bias"] = (self.K,)
        if self.residual is not None:
            shapes["residual"] = self.outputs()["out"].shape
        return shapes

    def outputs(self) -> dict[str, Output]:
        """The one result: (N, P, Q, K), or (N, K, P, Q) for nchw."""
        nhwc = self.layout == "nhwc"
        shape = (self.N, self.P, self.Q, self.K) if nhwc else (self.N, self.K, self.P, self.Q)
        return {"out": Output(shape, self.output_dtype)}

    def inputs(self, seed: int) -> dict[str, Array]:
        """Standard normal values; weights, or their scales where there are any, make results stay near 1 whatever the
        depth is. Integers spread as `normal` does, and the scales undo that."""
        random = np.random.default_rng(seed)
        integers = self.dtype == "int8"
        spread = INTEGER_SPREAD if integers else 1.0
        shrink = 1 / math.sqrt(self.depth)
        arrays: dict[str, Array] = {}
        for name, shape in self.shapes().items():
            if name == "w_scale":
                arrays[name] = (random.uniform(0.5, 2.0, shape) * shrink / spread).astype(np.float32)
                continue
            kind = {"bias": self.bias, "residual": self.residual}.get(name) or self.dtype
            turned = name == "w" and self.w_layout != LAYOUTS[self.layout]
            order = (0, 2, 3, 1) if self.w_layout == "krsc" else (0, 3, 1, 2)
            stored = tuple(shape[axis] for axis in order) if turned else shape
            scale = shrink if name == "w" and self.w_scale is None else 1.0
            array = placed(normal(random, stored, kind, scale=scale), aligned=self.aligned)
            arrays[name] = array.transpose(np.argsort(order)) if turned else array
        if self.x_scale:
            # Where integer weights have no scale, this one makes up for both; of floats it only has to be seen.
            scale = 1 / spread if integers else 0.5
            scale *= shrink / spread if integers and self.w_scale is None else 1.0
            arrays["x_scale"] = np.full(1, scale, np.float32)
        if self.w_scale == "tensor":
            arrays["w_scale"] = np.full(1, shrink / spread, np.float32)
        return arrays | self.epilogue_scalars()

    def part(
        self, arrays: Mapping[str, Array], random: np.random.Generator
    ) -> tuple[Conv2dProblem, dict[str, Array], dict[str, tuple[Array, ...]]]:
        """The problem of some images, rows, columns and channels of the result, its inputs, and which they are.

        What the taps of the chosen rows and columns see is laid side by side, zeros for the padding: a convolution
        whose stride is its kernel.
        """
        images, groups = _spread(self.N, 4, random), _spread(self.groups, 8, random)
        rows, columns = _spread(self.P, PART, random), _spread(self.Q, PART, random)
        filters = _spread(self.group_filters, 8 * PART // len(groups), random)
        channels = (groups[:, None] * self.group_filters + filters).reshape(-1)
        seen = (groups[:, None] * self.group_channels + np.arange(self.group_channels)).reshape(-1)
        nhwc = self.layout == "nhwc"
        chosen = dict(arrays)
        x = arrays["x"] if nhwc else arrays["x"].transpose(0, 2, 3, 1)
        x = x[images]
        for axis, at in (
            (1, (rows[:, None] * self.stride_h + np.arange(self.R) * self.dilation_h).reshape(-1) - self.pad_top),
            (2, (columns[:, None] * self.stride_w + np.arange(self.S) * self.dilation_w).reshape(-1) - self.pad_left),
        ):
            inside = (at >= 0) & (at < x.shape[axis])
            x = np.take(x, np.where(inside, at, 0), axis)
            x[(slice(None),) * axis + (~inside,)] = 0
        x = x[..., seen]
        chosen["x"] = x if nhwc else x.transpose(0, 3, 1, 2)
        chosen["w"] = arrays["w"][channels]
        for name in ("bias", "w_scale"):
            if name in arrays and arrays[name].size > 1:
                chosen[name] = arrays[name][channels]
        index = (images, rows, columns, channels) if nhwc else (images, channels, rows, columns)
        if self.residual is not None:
            chosen["residual"] = arrays["residual"][np.ix_(*index)]
        smaller = replace(
            self,
            N=len(images),
            H=len(rows) * self.R,
            W=len(columns) * self.S,
            C=len(seen),
            K=len(channels),
            groups=len(groups),
            stride_h=self.R,
            stride_w=self.S,
            dilation_h=1,
            dilation_w=1,
            pad_top=0,
            pad_left=0,
            pad_bottom=0,
            pad_right=0,
        )
        return smaller, chosen, {"out": index}


def _spread(size: int, count: int, random: np.random.Generator) -> Array:
    """Indices below `size`: a random one in each of `count` equal stretches, and both ends."""
    edges = np.linspace(0, size, min(size, max(count, 1)) + 1).astype(np.int64)
    return np.unique(np.concatenate([random.integers(edges[:-1], edges[1:]), [0, size - 1]]))


def outputs_along(length: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """Pixels of the result along one dimension; `padding` is that of both ends."""
    return (length + padding - dilation * (taps - 1) - 1) // stride + 1


@functools.lru_cache(maxsize=4096)
def touched(length: int, outputs: int, taps: int, stride: int, dilation: int, pad: int) -> int:
    """How many of `length` positions the taps of any output see."""
    # A tap sees every stride-th position: of those that agree modulo the stride, a run without gaps.
    runs: dict[int, list[tuple[int, int]]] = {}
    for tap in range(taps):
        first, last = seen_by(tap, length, outputs, stride, dilation, pad)
        if first <= last:
            start, rest = divmod(tap * dilation - pad, stride)
            runs.setdefault(rest, []).append((first + start, last + start))
    total = 0
    for found in runs.values():
        end = min(start for start, _ in found) - 1
        for start, last in sorted(found):
            total += max(0, last - max(end, start - 1))
            end = max(end, last)
    return total


def seen_by(tap: int, length: int, outputs: int, stride: int, dilation: int, pad: int) -> tuple[int, int]:
    """The first and the last output whose tap of that number lies inside of `length` positions; none: last < first."""
    offset = tap * dilation - pad
    return max(0, -(offset // stride)), min(outputs - 1, (length - 1 - offset) // stride)


def reference(problem: Conv2dProblem, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`out` in float64, from the very values the kernel is given."""
    forth, back = ((0, 1, 2, 3),) * 2 if problem.layout == "nhwc" else ((0, 2, 3, 1), (0, 3, 1, 2))
    p, n, g = problem, problem.N, problem.groups
    x = arrays["x"].transpose(forth).astype(np.float64)
    x = np.pad(x, ((0, 0), (p.pad_top, p.pad_bottom), (p.pad_left, p.pad_right), (0, 0)))
    w = arrays["w"].transpose(forth).astype(np.float64).reshape(g, p.group_filters, p.R, p.S, p.group_channels)
    sums = np.zeros((g, p.pixels, p.group_filters))
    for r, s in np.ndindex(p.R, p.S):
        top, left = r * p.dilation_h, s * p.dilation_w
        seen = x[:, top :: p.stride_h, left :: p.stride_w][:, : p.P, : p.Q].reshape(-1, g, p.group_channels)
        sums += seen.swapaxes(0, 1) @ w[:, :, r, s].swapaxes(1, 2)
    y = sums.swapaxes(0, 1).reshape(n, p.P, p.Q, p.K)
    residual = arrays["residual"].transpose(forth) if "residual" in arrays else None
    scales = [arrays[name] for name in ("x_scale", "w_scale") if name in arrays]
    out = epilogue_reference(problem, y, arrays, scales=scales, bias=arrays.get("bias"), residual=residual)
    return {"out": out.transpose(back)}


def as_gemm(problem: Conv2dProblem) -> GemmProblem:
    """The GEMM that a pointwise convolution is: of NHWC, all pixels by wᵀ; of NCHW, w by every image's pixels.

    Raises:
        ProblemError: the problem is not pointwise.
    """
    if not problem.pointwise:
        raise ProblemError(f"{problem} is no GEMM: that takes one tap, stride 1, no padding and one group")
    p = problem
    fields: dict[str, Any] = {name: getattr(p, name) for name in ("dtype", "precision", "aligned", "bias", "residual")}
    fields |= {name: getattr(p, name) for name in ("activation", "residual_last", "alpha", "out_scale", "out_dtype")}
    fields["end_aligned"] = p.aligned
    x_scale = "tensor" if p.x_scale else None
    if p.layout == "nhwc":
        fields |= {"a_scale": x_scale, "b_scale": "column" if p.w_scale == "channel" else p.w_scale}
        return GemmProblem(M=p.pixels, N=p.K, K=p.C, b_layout="col", **fields)
    fields |= {"a_scale": "row" if p.w_scale == "channel" else p.w_scale, "b_scale": x_scale}
    return GemmProblem(
        M=p.K, N=p.H * p.W, K=p.C, batch=p.N, a_broadcast=p.N > 1, bias_axis="m" if p.bias else "n", **fields
    )


def tolerance(problem: Conv2dProblem) -> dict[str, Tolerance]:
    """The sum's own error, and the rounding of the result.

    Of products near 1/√depth in size, as for a GEMM of that depth: each carries a relative error u (2^-24 in fp32; tf32
    cuts off both operands, 2·2^-10; sm_90 adds fp8 with 14 bits, 2^-12), which grows with √depth, and an fp32 sum
    rounds at every step. Depthwise sums are fp32 throughout. Sums of int8 are exact; scaling them rounds up to three
    times. c = 8 covers the largest of 10^6 results; scales of channels reach 2, and undo the spread of w alone.
    """
    product = 2.0**-24
    if problem.precision == "tf32" and not problem.depthwise:
        product = 2 * 2.0**-10
    if problem.dtype.startswith("fp8") and not problem.depthwise:
        product = 2.0**-12
    absolute = 8 * (product + math.sqrt(problem.depth) * 2.0**-24)
    if problem.w_scale == "channel":
        absolute *= 2
    if problem.dtype == "int8":
        absolute = 8 * 4 * 2.0**-24 * (1.0 if problem.x_scale else INTEGER_SPREAD)
    return {"out": rounded(problem, absolute)}


def supported(problem: Conv2dProblem, device: Device) -> str | None:
    """None, or why no configuration of this problem can run on the device."""
    too_old = unsupported_dtype((problem.dtype, problem.output_dtype, problem.bias, problem.residual), device)
    if too_old is not None:
        return too_old
    if problem.precision == "tf32" and not problem.depthwise and not device.tensor_tflops.get("tf32"):
        return f"precision=tf32 needs sm_80 or newer, and {device.board} is {device.sm}; use precision=ieee"
    return None


def near(problem: Conv2dProblem) -> Near:
    """Which convolutions compare: those of other images, channels and filters; taps, stride, padding and dilation must
    be equal. A problem whose alignment differs compiles to other code and is no neighbour; nor is one of other groups,
    unless both are depthwise: then they follow from the channels."""
    multiples = (("C", 16), ("K", 16))
    sizes = ("N", "H", "W", "C", "K")
    if problem.groups == 1:
        return Near(sizes, multiples=multiples)
    if problem.depthwise:
        return Near(sizes, ("groups",), multiples, accept=functools.partial(_like_groups, problem))
    of_a_group = (("C", 16 * problem.groups), ("K", 16 * problem.groups))
    return Near(sizes, multiples=multiples + of_a_group)


def _like_groups(problem: Conv2dProblem, found: str) -> bool:
    """Whether another problem is depthwise too, with as many filters for each channel as far as alignment goes."""
    other = json.loads(found)
    of_a_group = other["K"] // other["groups"]
    return bool(other["C"] == other["groups"]) and (of_a_group % 16 == 0) == (problem.group_filters % 16 == 0)

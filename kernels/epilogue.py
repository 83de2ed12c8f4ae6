"""The end of every op, in one order, in fp32:

    y = activation(alpha · scales · x + bias + residual)

or, with `residual_last`, as the blocks of YOLO and Darknet have it:

    y = activation(alpha · scales · x + bias) + residual

or, of pairs of columns, where the residual is always last, so that it skips the gate:

    [g | u] = alpha · scales · x + bias,    y = activation(g) · u + residual

and then, where the result is quantised, y / out_scale rounded to nearest even and saturated; and the cast.

`FusedProblem` holds the fields that ops share for it, `epilogue_reference` computes it in float64, `finish` and
`finish_gated` are its device code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import triton
import triton.language as tl

from tilewright.kernels.activations import activate, activation, activation_name
from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import DTYPES, dtype, refused
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.problem import Problem
from tilewright.tuning_db.errors import ProblemError

Array = np.ndarray[Any, Any]

FLOATS = ("fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2")
OUTPUT_DTYPES = (*FLOATS, "int8", "int32")
QUANTISED = ("int8", "fp8e4m3", "fp8e5m2")
"""Result types that `out_scale` is for."""

GATED = ("halves", "interleaved")
"""How the gate and the up projection lie in N: all gates, then all ups; or gate, up, gate, up, …"""

ALPHA = 0.5
"""The alpha that `inputs` draws for problems that have one; a power of two, so that it adds no rounding of its own."""

OUT_SCALE = 2.0**-5
"""The scale that `inputs` draws for a quantised result: values near 1 become numbers near 32, the largest saturate."""


def sums_dtype(operands: str, fused: bool) -> str:
    """The dtype of a result where none is asked for: that of the operands, bf16 for fp8, and of int8 int32 for the bare
    sums, bf16 where anything is fused."""
    return {"fp8e4m3": "bf16", "fp8e5m2": "bf16", "int8": "bf16" if fused else "int32"}.get(operands, operands)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedProblem(Problem):
    """A problem with the common epilogue. `bias` and `residual` are the dtype of that array, or None for none;
    `residual_last` says that the residual is added behind an activation, not before it.

    An op's own class says what `out_dtype` is when left out, and which of these it does not take.
    """

    ADDED: ClassVar[tuple[str, ...]] = ("residual_last",)

    out_dtype: str | None = None
    bias: str | None = None
    residual: str | None = None
    residual_last: bool = False
    activation: str = "none"
    alpha: bool = False  # whether a factor other than 1 is applied
    out_scale: bool = False  # whether the result is quantised with a scale

    def check_epilogue(self, default_out_dtype: str) -> None:
        """Writes the canonical spellings, and checks them.

        Raises:
            ProblemError: dtypes that can't be, or don't go together; or no such activation.
        """
        put = object.__setattr__  # frozen: set once, as the problem is made
        put(self, "activation", activation_name(self.activation))
        put(self, "out_dtype", default_out_dtype if self.out_dtype is None else self.out_dtype)
        if self.output_dtype not in OUTPUT_DTYPES:
            sums = getattr(self, "dtype", None) == "int8"  # nothing else gives int32
            raise refused("out_dtype", self.output_dtype, self.op, OUTPUT_DTYPES if sums else (*FLOATS, "int8"))
        for name, kind in (("bias", self.bias), ("residual", self.residual)):
            if kind is not None and kind not in FLOATS:
                raise refused(name, kind, self.op, FLOATS)
        if self.residual_last and self.residual is None:
            raise ProblemError("residual_last needs a residual")
        if self.activation == "none":
            put(self, "residual_last", False)  # the same sum
        if self.out_scale and self.out_dtype not in QUANTISED:
            raise ProblemError(f"out_scale is for a result of {', '.join(QUANTISED)}, not out_dtype={self.out_dtype!r}")
        if self.out_dtype == "int8" and not self.out_scale:
            raise ProblemError("out_dtype='int8' needs out_scale")

    @property
    def output_dtype(self) -> str:
        """`out_dtype`, which is never None once the problem is made."""
        assert self.out_dtype is not None
        return self.out_dtype

    def epilogue_scalars(self) -> dict[str, Array]:
        """The one-element arrays among the epilogue's inputs, by argument name."""
        scalars = {"alpha": (self.alpha, ALPHA), "out_scale": (self.out_scale, OUT_SCALE)}
        return {name: np.full(1, value, np.float32) for name, (wanted, value) in scalars.items() if wanted}


def epilogue_reference(
    problem: FusedProblem,
    x: Array,
    arrays: Mapping[str, Array],
    *,
    scales: Sequence[Array] = (),
    bias: Array | None = None,
    residual: Array | None = None,
    gated: str | None = None,
) -> Array:
    """The result in float64 for x = A·B, not rounded, but cut to the range of a quantised type.

    `scales`, `bias` and `residual` broadcast against x; alpha and out_scale are read from `arrays`. Gated columns are
    along the last axis of x.
    """
    for factor in (*scales, *(arrays[name] for name in ("alpha",) if problem.alpha)):
        x = x * factor.astype(np.float64)
    if bias is not None:
        x = x + bias.astype(np.float64)
    extra = 0.0 if residual is None else residual.astype(np.float64)
    function = activation(problem.activation)
    if gated is None:
        y = function(x) + extra if problem.residual_last else function(x + extra)
    else:
        half = x.shape[-1] // 2
        gate, up = (x[..., :half], x[..., half:]) if gated == "halves" else (x[..., 0::2], x[..., 1::2])
        y = function(gate) * up + extra
    if problem.out_scale:
        limits = _limits(problem.output_dtype)
        y = np.clip(y / arrays["out_scale"].astype(np.float64), *limits)
    return y


def _limits(name: str) -> tuple[float, float]:
    if name == "int8":
        return -128.0, 127.0
    largest = float(ml_dtypes.finfo(DTYPES[name].numpy).max)
    return -largest, largest


ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "fp8e4m3": 2.0**-4, "fp8e5m2": 2.0**-3}
"""Half the distance from 1 to the next number."""

_SMALLEST = {"fp16": 2.0**-24, "fp8e4m3": 2.0**-9, "fp8e5m2": 2.0**-16}

STEEPEST = {"relu2": 12.0}
"""The steepest slope that an activation has between -6 and 6, where it is above about 1."""


def rounded(problem: FusedProblem, absolute: float, *, gated: bool = False) -> Tolerance:
    """The tolerance of a result whose sums are within `absolute` of the true ones.

    Relative: two roundings to the output's dtype. Absolute: the sum's error as the activation passes it on (a gate
    multiplies it by up to 6, the largest of 10^6 normal values, on either side); and of a type with few small numbers
    its smallest one, for below the normal ones digits are lost. An int8 is up to half a step off; int32 sums are exact.
    """
    kind = problem.output_dtype
    absolute *= STEEPEST.get(problem.activation.partition(":")[0], 1.0)
    if problem.activation.startswith("leaky_relu:"):
        absolute *= max(1.0, abs(float(problem.activation.partition(":")[2])))
    if gated:
        absolute *= 12
    if problem.out_scale:
        absolute /= OUT_SCALE
    if kind == "int32":
        return Tolerance(relative=0.0, absolute=0.0)
    if kind == "int8":
        return Tolerance(relative=2.0**-20, absolute=absolute + 0.5)
    return Tolerance(relative=2 * ROUNDOFF[kind], absolute=absolute + _SMALLEST.get(kind, 0.0))


def unsupported_dtype(names: Iterable[str | None], device: Device) -> str | None:
    """None, or which of the dtypes the device is too old for: the first, as those that follow from it come later."""
    for name in dict.fromkeys(name for name in names if name is not None):
        oldest = dtype(name).min_arch
        if device.arch < oldest:
            return f"{name} needs sm_{oldest} or newer, and {device.board} is {device.sm}"
    return None


# Device code


@triton.jit
def to_output(y, out_scale_ptr, kind: tl.constexpr):
    """An fp32 tile as `kind`: divided by the scale, if there is one, rounded to nearest even; saturated, if 8 bits.

    NaN stays NaN in floating-point types and becomes -128 in int8.
    """
    if out_scale_ptr is not None:
        y = tl.math.div_rn(y, tl.load(out_scale_ptr))
    if kind == tl.int8:
        y = tl.minimum(tl.maximum(y, -128.0), 127.0)
        # 1.5·2^23: fp32 numbers there are one apart, so the addition rounds to an integer, to nearest even. A cast
        # would cut off.
        y = (y + 12582912.0) - 12582912.0
    elif kind == tl.float8e4nv:
        # Comparisons, not a minimum: NaN must stay NaN.
        y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
    elif kind == tl.float8e5:
        y = tl.where(y > 57344.0, 57344.0, tl.where(y < -57344.0, -57344.0, y))
    return y.to(kind)


@triton.jit
def finish(
    x, residual, ACTIVATION: tl.constexpr, RESIDUAL_LAST: tl.constexpr, out_scale_ptr, kind: tl.constexpr
):  # fmt: skip
    """activation(x + residual) of an fp32 tile, or activation(x) + residual, quantised and cast; the residual is a
    tile, or None."""
    if residual is None:
        y = activate(x, ACTIVATION)
    elif RESIDUAL_LAST:
        y = activate(x, ACTIVATION) + residual.to(tl.float32)
    else:
        y = activate(x + residual.to(tl.float32), ACTIVATION)
    return to_output(y, out_scale_ptr, kind)


@triton.jit
def finish_gated(gate, up, residual, ACTIVATION: tl.constexpr, out_scale_ptr, kind: tl.constexpr):
    """activation(gate) · up + residual of fp32 tiles, quantised and cast; the residual is a tile, or None."""
    y = activate(gate, ACTIVATION) * up
    if residual is not None:
        y += residual.to(tl.float32)
    return to_output(y, out_scale_ptr, kind)

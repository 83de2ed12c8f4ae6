"""The fused RMSNorm as mathematics: what is computed, on which arrays, and how near a result must be.

    h = x + residual
    y = h / √(mean(h²) + eps) · (weight_offset + weight)
    out = y / out_scale, or y / row_scale with row_scale = max|y| / largest

(Zhang & Sennrich 2019, arXiv:1910.07467.) x, residual, residual_out (which is h) and out are (M, N), weight (N,) and
row_scale (M,); means are over a row. All of it is in fp32: h is not rounded before it is normalised, as in FlashInfer's
`fused_add_rmsnorm`, and y not before it is multiplied by the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tilewright.kernels.constants import LARGEST
from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype, refused
from tilewright.kernels.epilogue import ROUNDOFF, FusedProblem, epilogue_reference, rounded, unsupported_dtype
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.problem import Output
from tilewright.kernels.samples import normal, placed
from tilewright.tuning_db.errors import ProblemError
from tilewright.tuning_db.shapes import Near

Array = np.ndarray[Any, Any]

INPUT_DTYPES = ("fp16", "bf16", "fp32")
EPS = 1e-6
"""Of the reference, and of calls that name none."""

PART = 256
"""Rows that `part` takes."""


@dataclass(frozen=True, slots=True)
class RmsNormProblem(FusedProblem):
    """One fused RMSNorm of M rows of N elements. docs/rmsnorm.md has every field.

    `weight` and `residual` are the dtype of that array, or None for none. `residual_out` has the residual's dtype.
    `row_scale` implies `out_scale`: the result is quantised, with a scale for each row that is itself a result. Of the
    common epilogue there is no bias, activation or alpha. eps and the weight's offset are no part of a problem: they
    are chosen per call, and speed does not depend on them.
    """

    op: ClassVar[str] = "rmsnorm"

    M: int
    N: int
    dtype: str = "fp16"
    weight: str | None = None
    residual_out: bool = False  # whether h is a result too
    row_scale: bool = False
    strided: bool = False  # rows further apart than they are long: strides travel as arguments
    aligned: bool = True  # every pointer to 16 bytes, every stride argument a multiple of 16 elements

    def __post_init__(self) -> None:
        self.check_types()
        for name in ("M", "N"):
            size = getattr(self, name)
            if not 0 < size < 2**31:
                raise ProblemError(f"{name}={size} must be from 1 to {2**31 - 1}")
        for name, kind in (("dtype", self.dtype), ("weight", self.weight), ("residual", self.residual)):
            if kind is not None and kind not in INPUT_DTYPES:
                raise refused(name, kind, "rmsnorm", INPUT_DTYPES)
        # Frozen: the canonical spelling is set once, here.
        object.__setattr__(self, "out_scale", self.out_scale or self.row_scale)
        if self.residual_last:
            raise ProblemError("residual_last=True: rmsnorm adds its residual first")
        self.check_epilogue(self.dtype)
        if self.out_dtype == "int32":
            raise ProblemError("out_dtype='int32' is for sums of int8, not for rmsnorm")
        for name, absent in (("bias", None), ("activation", "none"), ("alpha", False)):
            if getattr(self, name) != absent:
                raise ProblemError(f"{name}={getattr(self, name)!r}: rmsnorm has no {name}")
        if self.residual_out and self.residual is None:
            raise ProblemError("residual_out needs a residual: without one it would be x")

    @property
    def unit(self) -> str:
        """`fp32`: everything is computed on CUDA cores."""
        return "fp32"

    def flops(self) -> int:
        """4·M·N: a square, a sum and two products an element."""
        return 4 * self.M * self.N

    def bytes_moved(self) -> int:
        """Each input read once, each output written once."""
        total = self.M * self.N * dtype(self.dtype).bytes
        if self.residual is not None:
            total += self.M * self.N * dtype(self.residual).bytes
        if self.weight is not None:
            total += self.N * dtype(self.weight).bytes
        return int(total + sum(math.prod(shape) * dtype(kind).bytes for shape, kind in self.outputs().values()))

    def inputs(self, seed: int) -> dict[str, Array]:
        """Standard normal values."""
        random = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for name, kind in (("x", self.dtype), ("residual", self.residual), ("weight", self.weight)):
            if kind is not None:
                shape = (self.N,) if name == "weight" else (self.M, self.N)
                pitch = None
                if self.strided and name != "weight":
                    pitch = -(-self.N // 16) * 16 + (16 if self.aligned else 1)
                arrays[name] = placed(normal(random, shape, kind), pitch=pitch, aligned=self.aligned)
        return arrays if self.row_scale else arrays | self.epilogue_scalars()

    def outputs(self) -> dict[str, Output]:
        """`out`, and where wanted `residual_out` and `row_scale`."""
        outputs = {"out": Output((self.M, self.N), self.output_dtype)}
        if self.residual_out:
            assert self.residual is not None
            outputs["residual_out"] = Output((self.M, self.N), self.residual)
        if self.row_scale:
            outputs["row_scale"] = Output((self.M,), "fp32")
        return outputs

    def part(
        self, arrays: Mapping[str, Array], random: np.random.Generator
    ) -> tuple[RmsNormProblem, dict[str, Array], dict[str, tuple[Array, ...]]]:
        """The problem of some whole rows, its inputs, and which: a random one of every `PART`-th of all rows, so that
        no tile of that height is left out, and the first and last."""
        edges = np.linspace(0, self.M, min(self.M, PART) + 1).astype(np.int64)
        rows = np.unique(np.concatenate([random.integers(edges[:-1], edges[1:]), [0, self.M - 1]]))
        chosen = {name: array[rows] if name in ("x", "residual") else array for name, array in arrays.items()}
        index = {name: (rows, np.arange(self.N))[: len(output.shape)] for name, output in self.outputs().items()}
        return replace(self, M=len(rows)), chosen, index


LEAST_SCALE = 1e-30
"""A row's scale that is less is 1, as that of a row of zeros. So is one by which 1 / √(mean + eps) can't be divided in
fp32: h is multiplied by the quotient, which is largest / max|h · weight|. That takes eps below 1e-17, for with a scale
that is no less 1 / √(mean + eps) is over 3e8."""


def reference(
    problem: RmsNormProblem, arrays: Mapping[str, Array], *, eps: float = EPS, weight_offset: float = 0.0
) -> dict[str, Array]:
    """Every output in float64, from the very values the kernel is given."""
    h = arrays["x"].astype(np.float64)
    if problem.residual is not None:
        h = h + arrays["residual"].astype(np.float64)
    root = np.sqrt(np.mean(h * h, axis=1, keepdims=True) + eps)
    y = h / root
    if problem.weight is not None:
        y = y * (weight_offset + arrays["weight"].astype(np.float64))
    if not problem.row_scale:
        return {"out": epilogue_reference(problem, y, arrays)} | ({"residual_out": h} if problem.residual_out else {})
    highest = np.max(np.abs(y), axis=1)
    scale = highest / dtype(problem.output_dtype).largest
    scale = np.where((scale < LEAST_SCALE) | (scale * root[:, 0] < 1 / LARGEST), 1.0, scale)
    out = epilogue_reference(problem, y, {"out_scale": scale[:, None]})
    return {"out": out} | ({"residual_out": h} if problem.residual_out else {}) | {"row_scale": scale}


def tolerance(problem: RmsNormProblem) -> dict[str, Tolerance]:
    """Errors are relative, all of them: squares don't cancel.

    h, its square, the products and, on a GPU to 2 ulp each, the mean and the reciprocal root are 16·2^-24 off at most.
    The sum of N squares is off by √N·2^-24, as independent errors are, of which the root passes on half. A row's scale
    is made of the same numbers, and dividing by it adds its errors. Then the rounding of the result.
    """
    computed = (16 + math.sqrt(problem.N) / 2) * ROUNDOFF["fp32"]
    bound = rounded(problem, 0.0)
    found = {"out": bound._replace(relative=bound.relative + computed * (2 if problem.row_scale else 1))}
    if problem.residual_out:
        assert problem.residual is not None
        # fp16 has few digits below 2^-14: half of its smallest number.
        found["residual_out"] = Tolerance(relative=2 * ROUNDOFF[problem.residual], absolute=2.0**-25)
    if problem.row_scale:
        found["row_scale"] = Tolerance(relative=computed + 2 * ROUNDOFF["fp32"], absolute=0.0)
    return found


def strides(problem: RmsNormProblem, of: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The stride arguments: from row to row of each matrix."""
    return {f"{name}_stride": of[name][0] for name in ("x", "residual", "out", "residual_out") if name in of}


def supported(problem: RmsNormProblem, device: Device) -> str | None:
    """None, or why no configuration of this problem can run on the device."""
    return unsupported_dtype((problem.dtype, problem.output_dtype, problem.weight, problem.residual), device)


def near(problem: RmsNormProblem) -> Near:
    """Which RMSNorms compare: those of other M and N. Rows that are and are not a multiple of 16 long compile to other
    code."""
    return Near(("M", "N"), multiples=(("N", 16),))

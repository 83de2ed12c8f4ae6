"""The fused GEMM as mathematics: what is computed, on which arrays, and how near a result must be.

    out = activation(alpha · A·B + bias + residual)

A is (batch, M, K), B is (batch, K, N), bias (N,), residual and out (batch, M, N); sums are taken in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import DTYPES, dtype
from tilewright.kernels.epilogue import FusedProblem, epilogue_reference, rounded, unsupported_dtype
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.problem import Output
from tilewright.kernels.samples import normal, placed
from tilewright.tuning_db.errors import ProblemError

INPUT_DTYPES = ("fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2")
LAYOUTS = ("row", "col")


PART = 256
"""Rows, and columns, that `part` takes: one of every 32 at a size of 8192."""


@dataclass(frozen=True, slots=True)
class GemmProblem(FusedProblem):
    """One fused GEMM.

    Left out, `out_dtype` is the input's (bf16 for fp8), and `precision` is `ieee` for fp32 and nothing for the rest.
    `bias` and `residual` are the dtype of that array, or None for none.
    """

    op: ClassVar[str] = "gemm"

    M: int
    N: int
    K: int
    dtype: str = "fp16"
    batch: int = 1
    a_layout: str = "row"
    b_layout: str = "row"
    a_broadcast: bool = False  # one A for the whole batch
    b_broadcast: bool = False
    residual_broadcast: bool = False
    precision: str | None = None  # of fp32 operands: "ieee" or "tf32"
    strided: bool = False  # rows further apart than they are long: strides travel as arguments
    aligned: bool = True  # every pointer to 16 bytes, every stride argument a multiple of 16 elements

    def __post_init__(self) -> None:
        for name in ("M", "N", "K", "batch"):
            size = getattr(self, name)
            if not 0 < size < 2**31:
                raise ProblemError(f"{name}={size} must be from 1 to {2**31 - 1}")
        if self.dtype not in INPUT_DTYPES:
            known = "" if self.dtype in DTYPES else "unknown "
            raise ProblemError(f"{known}dtype={self.dtype!r}: gemm takes {', '.join(INPUT_DTYPES)}")
        self.check_epilogue("bf16" if self.dtype.startswith("fp8") else self.dtype)
        if self.out_dtype == "int32":
            raise ProblemError(f"out_dtype='int32' is for sums of int8, not of dtype={self.dtype!r}")
        for name in ("a_layout", "b_layout"):
            if getattr(self, name) not in LAYOUTS:
                raise ProblemError(f"{name}={getattr(self, name)!r} must be row or col")
        if self.dtype == "fp32":
            # Frozen: the canonical spelling is set once, here.
            object.__setattr__(self, "precision", self.precision or "ieee")
            if self.precision not in ("ieee", "tf32"):
                raise ProblemError(f"precision={self.precision!r} must be ieee or tf32")
        elif self.precision is not None:
            raise ProblemError(f"precision={self.precision!r} is for dtype=fp32; {self.dtype} has only one")
        for name in ("a_broadcast", "b_broadcast"):
            if getattr(self, name) and self.batch == 1:
                raise ProblemError(f"{name} needs batch > 1")
        if self.residual_broadcast and (self.residual is None or self.batch == 1):
            raise ProblemError("residual_broadcast needs a residual and batch > 1")

    @property
    def unit(self) -> str:
        """`fp32` for IEEE arithmetic, which the tensor cores don't have; else the dtype's own."""
        return "fp32" if self.precision == "ieee" else dtype(self.dtype).unit

    def flops(self) -> int:
        """2·batch·M·N·K; the epilogue's operations are not counted, as is customary."""
        return 2 * self.batch * self.M * self.N * self.K

    def bytes_moved(self) -> int:
        """Each operand read once, the output written once."""
        operand = dtype(self.dtype).bytes
        total = self.M * self.K * operand * (1 if self.a_broadcast else self.batch)
        total += self.K * self.N * operand * (1 if self.b_broadcast else self.batch)
        total += self.batch * self.M * self.N * dtype(self.output_dtype).bytes
        if self.bias is not None:
            total += self.N * dtype(self.bias).bytes
        if self.residual is not None:
            total += self.M * self.N * dtype(self.residual).bytes * (1 if self.residual_broadcast else self.batch)
        return int(total)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every array of the problem, by argument name, a broadcast one with a batch of 1."""
        shapes: dict[str, tuple[int, ...]] = {
            "a": (1 if self.a_broadcast else self.batch, self.M, self.K),
            "b": (1 if self.b_broadcast else self.batch, self.K, self.N),
        }
        if self.bias is not None:
            shapes["bias"] = (self.N,)
        if self.residual is not None:
            shapes["residual"] = (1 if self.residual_broadcast else self.batch, self.M, self.N)
        return shapes

    def inputs(self, seed: int) -> dict[str, np.ndarray[Any, Any]]:
        """Standard normal values, A scaled by 1/√K so that results stay near 1 whatever K is."""
        random = np.random.default_rng(seed)
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, shape in self.shapes().items():
            kind = {"bias": self.bias, "residual": self.residual}.get(name) or self.dtype
            column_major = {"a": self.a_layout, "b": self.b_layout}.get(name) == "col"
            stored = (shape[0], shape[2], shape[1]) if column_major else shape
            values = normal(random, stored, kind, scale=1 / math.sqrt(self.K) if name == "a" else 1.0)
            pitch = None
            if self.strided and name != "bias":
                pitch = -(-stored[-1] // 16) * 16 + (16 if self.aligned else 1)
            array = placed(values, pitch=pitch, aligned=self.aligned)
            arrays[name] = array.swapaxes(-1, -2) if column_major else array
        return arrays | self.epilogue_scalars()

    def outputs(self) -> dict[str, Output]:
        """The one result, (batch, M, N)."""
        return {"out": Output((self.batch, self.M, self.N), self.output_dtype)}

    def part(
        self, arrays: Mapping[str, np.ndarray[Any, Any]], random: np.random.Generator
    ) -> tuple[GemmProblem, dict[str, np.ndarray[Any, Any]], dict[str, tuple[np.ndarray[Any, Any], ...]]]:
        """The problem of some rows and columns of the result, its inputs, and which: batch indices, rows, columns.

        One row of every `PART`-th of all rows, so that no tile of that height is left out, and the first and last of
        the whole tiles of any size; columns likewise; four matrices of a batch.
        """
        batch, rows, columns = (
            _spread(self.batch, 4, random),
            _spread(self.M, PART, random),
            _spread(self.N, PART, random),
        )

        def matrices(name: str) -> np.ndarray[Any, Any]:
            return arrays[name] if arrays[name].shape[0] == 1 else arrays[name][batch]

        chosen = dict(arrays)
        chosen["a"] = matrices("a")[:, rows]
        chosen["b"] = matrices("b")[:, :, columns]
        if self.bias is not None:
            chosen["bias"] = arrays["bias"][columns]
        if self.residual is not None:
            chosen["residual"] = matrices("residual")[:, rows][:, :, columns]
        smaller = replace(self, batch=len(batch), M=len(rows), N=len(columns))
        return smaller, chosen, {"out": (batch, rows, columns)}


def _spread(size: int, count: int, random: np.random.Generator) -> np.ndarray[Any, Any]:
    """Indices below `size`: a random one in each of `count` equal stretches, both ends, and both sides of where the
    last tile begins, for every tile size there is."""
    edges = np.linspace(0, size, min(size, count) + 1).astype(np.int64)
    chosen = random.integers(edges[:-1], edges[1:])
    starts = np.array([size // tile * tile for tile in (16, 32, 64, 128, 256)])
    ends = np.concatenate([[0, size - 1], starts, starts - 1])
    return np.unique(np.concatenate([chosen, ends[(ends >= 0) & (ends < size)]]))


def reference(problem: GemmProblem, arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """`out` in float64, from the very values the kernel is given."""
    x = arrays["a"].astype(np.float64) @ arrays["b"].astype(np.float64)
    y = epilogue_reference(problem, x, arrays, bias=arrays.get("bias"), residual=arrays.get("residual"))
    # Of two broadcast operands there is one result, repeated.
    return {"out": np.broadcast_to(y, (problem.batch, problem.M, problem.N))}


_TF32_ROUNDOFF = 2.0**-10  # Triton cuts operands off at 10 mantissa bits; it does not round them


def tolerance(problem: GemmProblem) -> dict[str, Tolerance]:
    """The sum's own error, and the rounding of the result.

    Each of K products of size about 1/√K carries a relative error u (the fp32 sum's 2^-24; tf32 cuts off both operands,
    2·2^-10), and independent errors grow with √K: u·√K·(1/√K)·c. An fp32 sum taken in order also rounds each partial
    result of size up to 1, which adds √K·2^-24. fp8 products are exact, but sm_90 adds up to 128 of them with 14 bits:
    four additions of size √(128/K), each rounded at 2^-13, in K/128 chunks are 2·2^-13 whatever K is. c = 8 covers the
    largest of 10^6 results (about 5 standard deviations).
    """
    product = 2 * _TF32_ROUNDOFF if problem.precision == "tf32" else 2.0**-24
    if problem.dtype.startswith("fp8"):
        product = 2.0**-12
    return {"out": rounded(problem, 8 * (product + math.sqrt(problem.K) * 2.0**-24))}


def strides(problem: GemmProblem, of: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The stride arguments: of each matrix from row to row (column to column, if its columns are contiguous), and from
    one to the next of the batch, 0 where there is only one."""
    shapes = problem.shapes() | {name: output.shape for name, output in problem.outputs().items()}
    values = {}
    for name in ("a", "b", "residual", "out"):
        if name in of:
            matrix, row, column = of[name]
            columns = {"a": problem.a_layout, "b": problem.b_layout}.get(name) == "col"
            values[f"{name}_stride"] = column if columns else row
            values[f"{name}_batch_stride"] = matrix if shapes[name][0] > 1 else 0
    return values


def supported(problem: GemmProblem, device: Device) -> str | None:
    """None, or why no configuration of this problem can run on the device."""
    used = (problem.dtype, problem.output_dtype, problem.bias, problem.residual)
    too_old = unsupported_dtype(used, device)
    if too_old is not None:
        return too_old
    if problem.precision == "tf32" and not device.tensor_tflops.get("tf32"):
        return f"precision=tf32 needs sm_80 or newer, and {device.board} is {device.sm}; use precision=ieee"
    return None


def distance(problem: GemmProblem, other: GemmProblem) -> float | None:
    """How far apart the shapes of two problems are, if nothing but the shape differs; else None.

    The sum of |log2| ratios of M, N, K and batch: 1 is one of them doubled. Beyond 4 they are strangers. A problem
    whose alignment differs compiles to other code and is no neighbour.
    """
    mine, theirs = problem.to_dict(), other.to_dict()
    shape = ("M", "N", "K", "batch")
    if any(mine[name] != theirs[name] for name in mine if name not in shape):
        return None
    lengths = ("M", "N", "K") if problem.a_layout == "col" else ("N", "K")  # M is one where columns of A are read
    if any((mine[name] % 16 == 0) != (theirs[name] % 16 == 0) for name in lengths):
        return None
    total = sum(abs(math.log2(mine[name] / theirs[name])) for name in shape)
    return total if total <= 4 else None

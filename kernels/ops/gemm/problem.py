"""The fused GEMM as a problem: its fields, what goes together, its arrays.

    out = activation(alpha · scales · (A·B) + bias + residual)

and, of gated pairs of columns,

    [g | u] = alpha · scales · (A·B) + bias,    out = activation(g) · u + residual

A is (batch, M, K), B is (batch, K, N), bias (N,) or (M,), residual and out (batch, M, N), gated (batch, M, N / 2); sums
are taken in fp32, of int8 in int32. B may hold weights of fewer bits than A, B = scale · (q - zero), whose scales and
zero points are shared by groups of rows; and with `groups`, A's rows are cut into that many, each with a B of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from tilewright.kernels.activations import activation_name
from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import DTYPES, dtype, refused
from tilewright.kernels.epilogue import GATED, FusedProblem, sums_dtype, unsupported_dtype
from tilewright.kernels.ops.gemm.packing import packed_rows
from tilewright.kernels.problem import Output
from tilewright.kernels.samples import INTEGER_SPREAD, normal, placed
from tilewright.tuning_db.errors import ProblemError, UnsupportedProblemError
from tilewright.tuning_db.shapes import Near

Array = np.ndarray[Any, Any]

INPUT_DTYPES = ("fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2", "int8")
WEIGHT_DTYPES = ("int8", "int4")
"""Of B, under A of fp16 or bf16."""

GROUP_SIZES = (32, 64, 128)
SCALE_DTYPES = ("fp32", "fp16", "bf16")
"""Of scales that groups of weights share; all other scales are fp32."""

OPERANDS = ("a", "b", "a_scale", "b_scale", "b_zero")
"""Arrays that `aligned` speaks of; `end_aligned` is about the others."""

LAYOUTS = ("row", "col")

FLAT = 8
"""Rows of the tiles whose transpose is multiplied: mma.sync takes 16 rows and 8 columns, so that of eight rows half the
products, sums and registers would be of no use."""

MOST_GROUPS = 1024
"""Groups of rows: every block looks through the offsets of all to find its own."""

PART = 256
"""Rows, and columns, that `part` takes: one of every 32 at a size of 8192."""

INT4_SPREAD = 4.6
"""Standard deviation of integers from 0 to 15."""


WORDS: dict[str, tuple[str | None, ...]] = {
    "a_layout": LAYOUTS,
    "b_layout": LAYOUTS,
    "bias_axis": ("n", "m"),
    "gated": (None, *GATED),
    "a_scale": (None, "tensor", "row"),
    "b_scale": (None, "tensor", "column", "group"),
}
"""What fields of text may be."""


def check_words(**fields: str | None) -> None:
    """Does nothing for fields of a problem that are one of their words.

    Raises:
        ProblemError: one isn't.
    """
    for name, value in fields.items():
        if value not in WORDS[name]:
            *words, last = sorted(map(repr, WORDS[name]), key="None".__eq__)  # None last
            raise ProblemError(f"{name}={value!r} must be {', '.join(words)} or {last}")


@dataclass(frozen=True, slots=True)
class GemmProblem(FusedProblem):
    """One fused GEMM. docs/gemm.md has every field.

    Left out, `out_dtype` is the input's (bf16 for fp8; of int8, int32 for the bare sums, else bf16), and `precision` is
    `ieee` for fp32 and nothing for the rest.
    """

    op: ClassVar[str] = "gemm"

    M: int
    N: int
    K: int
    dtype: str = "fp16"
    b_dtype: str | None = None  # int8 or int4 weights under fp16 or bf16; None: that of A
    batch: int = 1
    groups: int = 0  # pieces of A's rows, each with a B of its own; 0: B is one for all rows
    a_layout: str = "row"
    b_layout: str = "row"
    a_broadcast: bool = False  # one A for the whole batch
    b_broadcast: bool = False
    residual_broadcast: bool = False
    a_scale: str | None = None  # one for the "tensor", or one per "row"
    b_scale: str | None = None  # one for the "tensor", one per "column", or per column and "group" of weights
    group_size: int = 0  # rows of B that share a scale and a zero point; 0: all
    b_scale_dtype: str = "fp32"  # of scales of groups
    b_zero: bool = False  # whether weights have zero points other than 0 (int4: 8)
    bias_axis: str = "n"
    gated: str | None = None  # "halves" or "interleaved": how the columns of gate and up lie in N
    precision: str | None = None  # of fp32 operands: "ieee" or "tf32"
    strided: bool = False  # rows further apart than they are long: strides travel as arguments
    aligned: bool = True  # of operands: pointers to 16 bytes, stride arguments multiples of 16 elements
    end_aligned: bool = True  # the same of bias, residual and out

    def __post_init__(self) -> None:
        self.check_types()
        for name in ("M", "N", "K", "batch"):
            size = getattr(self, name)
            if not 0 < size < 2**31:
                raise ProblemError(f"{name}={size} must be from 1 to {2**31 - 1}")
        check_words(**{name: getattr(self, name) for name in WORDS})
        self._check_operands()
        self._check_epilogue()
        for name in ("a_broadcast", "b_broadcast"):
            if getattr(self, name) and self.batch == 1:
                raise ProblemError(f"{name} needs batch > 1")
        if self.residual_broadcast and (self.residual is None or self.batch == 1):
            raise ProblemError("residual_broadcast needs a residual and batch > 1")
        if not 0 <= self.groups <= MOST_GROUPS:
            kind = ProblemError if self.groups < 0 else UnsupportedProblemError
            raise kind(f"groups={self.groups} must be from 0 to {MOST_GROUPS}")
        if self.groups and self.batch > 1:
            raise ProblemError(f"groups={self.groups} are pieces of one A: batch={self.batch} must be 1")

    def _check_operands(self) -> None:
        put = object.__setattr__  # frozen: canonical spellings are set once, here
        if self.dtype not in INPUT_DTYPES:
            raise refused("dtype", self.dtype, "gemm", INPUT_DTYPES)
        if self.precision not in (None, "ieee", "tf32"):
            raise ProblemError(f"precision={self.precision!r} must be ieee or tf32")
        if self.dtype == "fp32":
            put(self, "precision", self.precision or "ieee")
        elif self.precision is not None:
            raise ProblemError(f"precision={self.precision!r} is for dtype=fp32; {self.dtype} has only one")
        if self.b_dtype == self.dtype:
            put(self, "b_dtype", None)
        if self.b_dtype is not None and (self.b_dtype not in WEIGHT_DTYPES or self.dtype not in ("fp16", "bf16")):
            kind = UnsupportedProblemError if self.b_dtype in DTYPES else ProblemError
            raise kind(
                f"dtype={self.dtype!r} with b_dtype={self.b_dtype!r}: they are one, or fp16 or bf16 with int8 or int4"
            )
        if (self.b_scale == "group") != (self.group_size != 0):
            raise ProblemError(
                f"group_size={self.group_size} and b_scale={self.b_scale!r}: 'group' has a size, and only it"
            )
        if self.group_size and (self.group_size not in GROUP_SIZES or self.b_dtype is None):
            sizes = ", ".join(map(str, GROUP_SIZES))
            kind = ProblemError if self.group_size < 0 else UnsupportedProblemError
            raise kind(f"group_size={self.group_size} must be one of {sizes}, of weights of b_dtype int8 or int4")
        if self.b_scale_dtype != "fp32" and (self.b_scale != "group" or self.b_scale_dtype not in SCALE_DTYPES):
            kind = UnsupportedProblemError if self.b_scale_dtype in DTYPES else ProblemError
            raise kind(
                f"b_scale_dtype={self.b_scale_dtype!r}: scales are fp32, those of groups {' or '.join(SCALE_DTYPES)}"
            )
        if self.b_zero and self.b_dtype is None:
            raise ProblemError("b_zero is for weights of b_dtype int8 or int4")
        if (self.b_zero or self.group_size) and self.batch > 1 and not self.b_broadcast:
            raise UnsupportedProblemError(
                f"scales of groups and zero points are for one B, not one in each of batch={self.batch}"
            )

    def _check_epilogue(self) -> None:
        # What is absent: None or False, or the activation "none" (however it is spelled).
        parts = (self.a_scale, self.b_scale, self.bias, self.residual, self.alpha, self.out_scale, self.gated)
        fused = any(parts) or activation_name(self.activation) != "none"
        if self.gated and self.residual is not None:
            object.__setattr__(self, "residual_last", False)  # there it always is, and needs no word
        self.check_epilogue(sums_dtype(self.dtype, fused))
        if self.out_dtype == "int32" and (self.dtype != "int8" or fused):
            raise ProblemError(
                "out_dtype='int32' is the bare sum of dtype='int8': without scale, bias, residual, activation or gate"
            )
        if self.dtype == "int8" and self.out_dtype != "int32" and not (self.a_scale or self.b_scale):
            raise ProblemError(
                "dtype='int8' with neither a_scale nor b_scale gives the bare sums, in int32: another out_dtype, and "
                "whatever is fused to them, needs one of these"
            )
        if self.gated and self.N % 2:
            raise ProblemError(f"gated={self.gated!r} needs an even N, not {self.N}")
        if self.bias_axis != "n" and self.bias is None:
            raise ProblemError(f"bias_axis={self.bias_axis!r} needs a bias")

    @property
    def unit(self) -> str:
        """`fp32` for IEEE arithmetic, which the tensor cores don't have; else the dtype's own."""
        return "fp32" if self.precision == "ieee" else dtype(self.dtype).unit

    @property
    def columns_out(self) -> int:
        """Columns of the result: N, or half as many where they are gated pairs."""
        return self.N // 2 if self.gated else self.N

    @property
    def b_bytes(self) -> float:
        """Bytes of one element of B."""
        return dtype(self.b_dtype or self.dtype).bytes

    def flops(self) -> int:
        """2·batch·M·N·K; the epilogue's operations are not counted, as is customary."""
        return 2 * self.batch * self.M * self.N * self.K

    def bytes_moved(self) -> int:
        """Each array read once, the output written once."""
        moved = {name: (shape, self.dtype_of(name)) for name, shape in self.shapes().items()}
        moved |= self.outputs()
        return sum(math.prod(shape) * int(dtype(kind).bytes) for shape, kind in moved.values())

    def dtype_of(self, name: str) -> str:
        """Data type of an input array: packed int4 are uint8."""
        packed = "uint8" if self.b_dtype == "int4" else self.b_dtype or self.dtype
        kinds = {"a": self.dtype, "b": packed, "b_zero": packed, "bias": self.bias, "residual": self.residual}
        kinds |= {"offsets": "int32", "b_scale": self.b_scale_dtype}
        return kinds.get(name) or "fp32"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input array but alpha and out_scale, by argument name, a broadcast one with a batch of 1."""
        depth = packed_rows(self.K) if self.b_dtype == "int4" else self.K
        each = (self.groups,) if self.groups else ()
        scales = math.ceil(self.K / self.group_size) if self.group_size else 1
        shapes: dict[str, tuple[int, ...]] = {
            "a": (1 if self.a_broadcast else self.batch, self.M, self.K),
            "b": (self.groups or (1 if self.b_broadcast else self.batch), depth, self.N),
        }
        if self.a_scale is not None:
            shapes["a_scale"] = (1,) if self.a_scale == "tensor" else (shapes["a"][0], self.M)
        if self.b_scale is not None:
            per = {"tensor": (1,), "column": (*each, self.N), "group": (*each, scales, self.N)}
            shapes["b_scale"] = per[self.b_scale]
        if self.b_zero:
            shapes["b_zero"] = (*each, scales, self.N)
        if self.bias is not None:
            shapes["bias"] = (self.M,) if self.bias_axis == "m" else (*each, self.N)
        if self.residual is not None:
            shapes["residual"] = (1 if self.residual_broadcast else self.batch, self.M, self.columns_out)
        if self.groups:
            shapes["offsets"] = (self.groups + 1,)
        return shapes

    def outputs(self) -> dict[str, Output]:
        """The one result, (batch, M, N), or of gated pairs (batch, M, N / 2)."""
        return {"out": Output((self.batch, self.M, self.columns_out), self.output_dtype)}

    def inputs(self, seed: int) -> dict[str, Array]:
        """Values, scales and zero points by which results stay near 1 whatever K is: A's are normal with a deviation of
        1/√K, or integers with scales that make up for it. Groups of rows are cut at random, some of them empty."""
        random = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for name, shape in self.shapes().items():
            column_major = {"a": self.a_layout, "b": self.b_layout}.get(name) == "col"
            stored = (shape[0], shape[2], shape[1]) if column_major else shape
            values = self._values(name, stored, random)
            pitch, aligned = None, self.aligned if name in OPERANDS else self.end_aligned
            if self.strided and name in ("a", "b", "residual"):
                pitch = -(-stored[-1] // 16) * 16 + (16 if aligned else 1)
            array = placed(values, pitch=pitch, aligned=aligned)
            arrays[name] = array.swapaxes(-1, -2) if column_major else array
        return arrays | self.epilogue_scalars()

    def _values(self, name: str, shape: tuple[int, ...], random: np.random.Generator) -> Array:
        kind = self.dtype_of(name)
        spread = {"int4": INT4_SPREAD, "int8": INTEGER_SPREAD}.get(self.b_dtype or self.dtype, 1.0)
        if name == "offsets":
            cuts = np.sort(random.integers(0, self.M + 1, self.groups - 1))
            return np.concatenate([[0], cuts, [self.M]]).astype(np.int32)
        if name in ("a_scale", "b_scale"):
            # From 1/2 to 1: no smaller than that, so that a wrong one shows, and no larger, for the sum's error.
            factor = 1.0
            if self.dtype == "int8":
                factor = 1 / (spread * math.sqrt(self.K)) if name == "a_scale" or self.a_scale is None else 1.0
                factor /= spread if name == "b_scale" or self.b_scale is None else 1.0
            elif name == "b_scale":
                factor = 1 / spread
            return (random.uniform(0.5, 1.0, shape) * factor).astype(dtype(kind).numpy)
        if name == "b" and kind == "uint8":
            return random.integers(0, 256, shape, np.uint8)
        if name == "b_zero":
            return random.integers(*((5, 12) if kind == "uint8" else (-9, 10)), shape).astype(dtype(kind).numpy)
        scale = 1.0
        if name == "a":
            scale = 1 / math.sqrt(self.K) / (spread if self.b_scale is None else 1.0)
        return normal(random, shape, kind, scale=scale)

    def part(
        self, arrays: Mapping[str, Array], random: np.random.Generator
    ) -> tuple[GemmProblem, dict[str, Array], dict[str, tuple[Array, ...]]]:
        """The problem of some rows and columns of the result, its inputs, and which: batch indices, rows, columns.

        One row of every `PART`-th of all rows, so that no tile of that height is left out, and the first and last of
        the whole tiles of any size; columns likewise; four matrices of a batch.
        """
        batch = _spread(self.batch, 4, random)
        rows = _spread(self.M, PART, random)
        columns = _spread(self.columns_out, PART, random)
        of_b = columns
        if self.gated == "halves":
            of_b = np.concatenate([columns, columns + self.N // 2])
        elif self.gated == "interleaved":
            of_b = np.stack([2 * columns, 2 * columns + 1], axis=-1).reshape(-1)

        def matrices(name: str) -> Array:
            return arrays[name] if arrays[name].shape[0] == 1 or self.groups else arrays[name][batch]

        chosen = dict(arrays)
        chosen["a"] = matrices("a")[:, rows]
        chosen["b"] = matrices("b")[:, :, of_b]
        if self.a_scale == "row":
            chosen["a_scale"] = matrices("a_scale")[:, rows]
        for name, whole in (("b_scale", self.b_scale == "tensor"), ("b_zero", False)):
            if name in arrays and not whole:
                chosen[name] = arrays[name][..., of_b]
        if self.bias is not None:
            chosen["bias"] = arrays["bias"][rows] if self.bias_axis == "m" else arrays["bias"][..., of_b]
        if self.residual is not None:
            chosen["residual"] = matrices("residual")[:, rows][:, :, columns]
        if self.groups:
            chosen["offsets"] = np.searchsorted(rows, arrays["offsets"]).astype(np.int32)
        smaller = replace(self, batch=len(batch), M=len(rows), N=len(of_b))
        return smaller, chosen, {"out": (batch, rows, columns)}


def _spread(size: int, count: int, random: np.random.Generator) -> Array:
    """Indices below `size`: a random one in each of `count` equal stretches, both ends, and both sides of where the
    last tile begins, for every tile size there is."""
    edges = np.linspace(0, size, min(size, count) + 1).astype(np.int64)
    chosen = random.integers(edges[:-1], edges[1:])
    starts = np.array([size // tile * tile for tile in (FLAT, 16, 32, 64, 128, 256)])
    ends = np.concatenate([[0, size - 1], starts, starts - 1])
    return np.unique(np.concatenate([chosen, ends[(ends >= 0) & (ends < size)]]))


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
    used = (problem.dtype, problem.b_dtype, problem.output_dtype, problem.bias, problem.residual, problem.b_scale_dtype)
    too_old = unsupported_dtype(used, device)
    if too_old is not None:
        return too_old
    if problem.precision == "tf32" and not device.tensor_tflops.get("tf32"):
        return f"precision=tf32 needs sm_80 or newer, and {device.board} is {device.sm}; use precision=ieee"
    return None


def near(problem: GemmProblem) -> Near:
    """Which GEMMs compare: those of other M, N, K and batch. A problem whose alignment differs compiles to other code
    and is no neighbour: N and K count there, and M where columns of A are read."""
    lengths = ("M", "N", "K") if problem.a_layout == "col" else ("N", "K")
    # Tiles for a few rows would read B again for each few of many; those for many serve few as well as any.
    flat = (problem.a_layout, problem.b_layout) == ("row", "col")
    accept = _has_many_rows if flat and not has_few_rows(problem.M, problem.groups) else None
    return Near(("M", "N", "K", "batch"), multiples=tuple((name, 16) for name in lengths), accept=accept)


def has_few_rows(rows: int, groups: int) -> bool:
    """Whether a tile of `FLAT` rows holds all there are, of a group on average."""
    return math.ceil(rows / max(1, groups)) <= FLAT


def _has_many_rows(problem: str) -> bool:
    fields = json.loads(problem)
    return not has_few_rows(fields["M"], fields.get("groups", 0))

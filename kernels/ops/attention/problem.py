"""The fused attention as mathematics: what is computed, on which arrays, and how near a result must be.

    out = softmax(softcap · tanh(scale · Q·Kᵀ / softcap) + bias - slope · |distance|) · V

of every query head, over the keys that its query sees. The last query of a sequence stands at its last key: query i is
at key i + keys - queries, from there its distance to a key counts, and with `causal` it sees no later one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype, refused
from tilewright.kernels.epilogue import FLOATS, unsupported_dtype
from tilewright.kernels.ops.attention import samples
from tilewright.kernels.problem import Output, Problem
from tilewright.tuning_db.errors import ProblemError, UnsupportedProblemError
from tilewright.tuning_db.shapes import Near

Array = np.ndarray[Any, Any]

SMALLEST_DIM, LARGEST_DIM = 16, 256
SOFTCAP = 30.0
"""The cap of problems that have one, where the caller names none: that of Gemma 2's output, its attention has 50."""


@dataclass(frozen=True, slots=True)
class AttentionProblem(Problem):
    """One fused attention. docs/attention.md has every field.

    Left out, `Hkv` is H, `Dv` is D, `out_dtype` the input's (bf16 for fp8). A window that masks nothing, and `causal`
    for one query, are left out themselves, but for `varlen`, of which a sequence may have more. Of sequences of
    different lengths (`varlen`, `kv_lens`), Sq and Skv are the longest, or the most that count; `lengths` says which
    they are when the problem is measured.
    """

    op: ClassVar[str] = "attention"

    B: int  # sequences
    H: int  # query heads
    Sq: int  # queries
    Skv: int  # keys
    D: int  # of a head of q and k
    Hkv: int | None = None  # heads of k and v, each for H / Hkv query heads
    Dv: int | None = None  # of a head of v and out
    dtype: str = "fp16"
    out_dtype: str | None = None
    causal: bool = False
    window_left: int | None = None  # keys that a query sees before its own place; None: all
    window_right: int | None = None
    softcap: bool = False
    bias: str | None = None  # dtype of the array added to the scores
    bias_batch: bool = False  # whether it has that dimension, or is broadcast over it
    bias_heads: bool = False
    bias_rows: bool = True
    alibi: bool = False
    sinks: bool = False
    varlen: bool = False  # sequences follow each other without padding: (tokens, heads, head dim)
    page_size: int = 0  # k and v are in blocks of so many keys, found through a table; 0: they are not
    kv_lens: bool = False  # each sequence's keys are counted in an array
    lse: bool = False  # whether the log-sum-exp is an output too
    scales: bool = False  # whether q, k and v have factors, of fp8
    strided: bool = False  # strides travel as arguments
    aligned: bool = True  # every pointer, and every stride argument, a multiple of 16 bytes

    def __post_init__(self) -> None:
        self.check_types()
        for name in ("B", "H", "Sq", "Skv"):
            size = getattr(self, name)
            if not 0 < size < 2**30:
                raise ProblemError(f"{name}={size} must be from 1 to {2**30 - 1}")
        # Frozen: the canonical spelling is set once, here.
        put = functools.partial(object.__setattr__, self)
        put("Hkv", self.H if self.Hkv is None else self.Hkv)
        put("Dv", self.D if self.Dv is None else self.Dv)
        if self.kv_heads < 1 or self.H % self.kv_heads:
            raise ProblemError(f"H={self.H} query heads must be a multiple of Hkv={self.Hkv} key heads")
        if self.dtype not in FLOATS:
            raise refused("dtype", self.dtype, "attention", FLOATS)
        for name, size in (("D", self.D), ("Dv", self.dim_v)):
            if not self.smallest_dim <= size <= LARGEST_DIM:
                wrong = ProblemError if size < 1 else UnsupportedProblemError
                raise wrong(f"{name}={size} must be from {self.smallest_dim} to {LARGEST_DIM} for {self.dtype}")
        put("out_dtype", self.out_dtype or ("bf16" if self.dtype.startswith("fp8") else self.dtype))
        for name, kind in (("out_dtype", self.out_dtype), ("bias", self.bias)):
            if kind is not None and kind not in FLOATS:
                raise refused(name, kind, "attention", FLOATS)
        self._check_window()
        self._check_storage()
        if self.scales and not self.dtype.startswith("fp8"):
            raise ProblemError(f"scales are for fp8, not dtype={self.dtype!r}")
        # Without that dimension there is nothing to broadcast over.
        put("bias_batch", self.bias is not None and self.bias_batch and self.B > 1)
        put("bias_heads", self.bias is not None and self.bias_heads and self.H > 1)
        put("bias_rows", self.bias is None or self.bias_rows or self.Sq == 1)
        # The rows of a new result follow each other.
        row = self.dim_v * int(dtype(self.output_dtype).bytes)
        put("aligned", self.aligned and not (self.strided and row % 16))

    def _check_window(self) -> None:
        put = functools.partial(object.__setattr__, self)
        for name in ("window_left", "window_right"):
            size = getattr(self, name)
            if size is not None and size < 0:
                raise ProblemError(f"{name}={size} must be at least 0, or None for no limit")
        if self.causal or self.window_right == 0:
            put("causal", True)
            put("window_right", None)
        if self.window_left is not None and self.window_left >= self.Skv - 1:
            put("window_left", None)
        if self.window_right is not None and self.window_right >= 2**30:
            put("window_right", None)  # no limit: places with it would pass 32 bits
        if self.varlen:
            return  # a sequence may have more queries than are computed
        if self.window_right is not None and self.window_right >= self.Sq - 1:
            put("window_right", None)
        if self.Sq == 1:
            put("causal", False)

    def _check_storage(self) -> None:
        if self.page_size < 0 or (self.page_size and self.Skv % self.page_size):
            raise ProblemError(f"Skv={self.Skv} must be a multiple of page_size={self.page_size}, the keys of a block")
        if self.page_size and not self.kv_lens:
            raise ProblemError("page_size needs kv_lens: how many keys of its blocks each sequence has")
        if self.varlen and self.kv_lens and not self.page_size:
            raise UnsupportedProblemError(
                "varlen has its own lengths of keys: kv_lens goes with page_size or with one batch array"
            )
        if self.varlen and self.bias is not None:
            raise UnsupportedProblemError("a bias needs sequences of one length: varlen has none")

    @property
    def kv_heads(self) -> int:
        """`Hkv`, which is never None once the problem is made."""
        assert self.Hkv is not None
        return self.Hkv

    @property
    def dim_v(self) -> int:
        """`Dv`, which is never None once the problem is made."""
        assert self.Dv is not None
        return self.Dv

    @property
    def output_dtype(self) -> str:
        """`out_dtype`, which is never None once the problem is made."""
        assert self.out_dtype is not None
        return self.out_dtype

    @property
    def smallest_dim(self) -> int:
        """The least head dim: what one dot of the tensor cores takes, 32 bytes and no fewer than 16 elements."""
        return max(SMALLEST_DIM, 32 // int(dtype(self.dtype).bytes))

    @property
    def unit(self) -> str:
        """`fp32` for IEEE arithmetic, which the tensor cores don't have; else the dtype's own."""
        return "fp32" if self.dtype == "fp32" else dtype(self.dtype).unit

    @property
    def right(self) -> int | None:
        """Keys that a query sees behind its own place; None: all."""
        return 0 if self.causal else self.window_right

    def lengths(self) -> tuple[Array, Array]:
        """Queries and keys of each sequence, as `inputs` has them. Where they differ, the longest comes first and, of
        three or more, an empty one last; the others are spread between. Nothing about them is random: the operations of
        a problem are a property of it."""
        uniform = np.ones(self.B, np.int64)
        queries = _spread_lengths(self.B, self.Sq, 1) if self.varlen else self.Sq * uniform
        keys = _spread_lengths(self.B, self.Skv, 2) if self.varlen or self.kv_lens else self.Skv * uniform
        return queries, keys

    def flops(self) -> int:
        """2·(D + Dv) for each query head, query, and key it sees; the softmax is not counted, as is customary."""
        pairs = 0
        # Each pair of lengths once: servers have thousands of sequences, and this is asked for every configuration.
        lengths, counts = np.unique(np.stack(self.lengths(), axis=1), axis=0, return_counts=True)
        for (queries, keys), count in zip(lengths, counts, strict=True):
            place = np.arange(queries) + (keys - queries)
            last = keys if self.right is None else np.minimum(keys, place + self.right + 1)
            first = 0 if self.window_left is None else np.maximum(0, place - self.window_left)
            pairs += int(count) * int(np.sum(np.maximum(0, last - first + np.zeros_like(place))))
        return 2 * self.H * (self.D + self.dim_v) * pairs

    def bytes_moved(self) -> int:
        """Queries, and keys and values that any query sees, read once; the outputs written once."""
        queries, keys = self.lengths()
        seen = 0
        for count, length in zip(queries, keys, strict=True):
            first = 0 if self.window_left is None else max(0, length - count - self.window_left)
            seen += max(0, int(length - first)) if count else 0
        element = dtype(self.dtype).bytes
        total = self.H * int(queries.sum()) * (self.D * element + self.dim_v * dtype(self.output_dtype).bytes)
        total += self.kv_heads * seen * (self.D + self.dim_v) * element
        if self.lse:
            total += 4 * self.H * int(queries.sum())
        if self.bias is not None:
            total += math.prod(self.bias_shape) * dtype(self.bias).bytes
        return int(total)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of `bias`, broadcast dimensions 1."""
        return (
            self.B if self.bias_batch else 1,
            self.H if self.bias_heads else 1,
            self.Sq if self.bias_rows else 1,
            self.Skv,
        )

    def outputs(self) -> dict[str, Output]:
        """The result and, if asked for, the log-sum-exp."""
        tokens = int(self.lengths()[0].sum())
        lead = (tokens, self.H) if self.varlen else (self.B, self.H, self.Sq)
        outputs = {"out": Output((*lead, self.dim_v), self.output_dtype)}
        return outputs | ({"lse": Output(lead, "fp32")} if self.lse else {})

    def inputs(self, seed: int) -> dict[str, Array]:
        """Standard normal values. Whatever is not a sequence's own is NaN: keys beyond its length, blocks that no table
        names, and the padding of strided arrays."""
        return samples.inputs(self, seed)

    def part(
        self, arrays: Mapping[str, Array], random: np.random.Generator
    ) -> tuple[AttentionProblem, dict[str, Array], dict[str, tuple[Array, ...]]]:
        """The problem of some queries of some heads, its inputs, and which: indices of outputs along their dimensions.

        Where the chosen queries stand goes along in the array `places`, by sequence, which `reference` heeds.
        """
        return samples.part(self, arrays, random)


def _spread_lengths(count: int, longest: int, empty: int) -> Array:
    """`count` lengths up to `longest`, the first that long and, of three or more, the one at `empty` 0."""
    lengths = np.random.default_rng([count, longest, abs(empty)]).integers(0, longest, count, endpoint=True)
    lengths[0] = longest
    if count > 2:
        lengths[empty] = 0
    return lengths


STEPS = ("batch", "head", "row")
"""What there are strides between."""


def strides(problem: AttentionProblem, of: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """The stride arguments, from one sequence (block of keys), head and token to the next; 0 where broadcast. Aligned
    strides of q, k, v, bias and out are in units of 16 bytes, unaligned ones in elements."""
    values: dict[str, int] = {}
    kinds = {"bias": problem.bias, "out": problem.output_dtype}

    def put(name: str, *steps: int) -> None:
        unit = 16 // int(dtype(kinds.get(name) or problem.dtype).bytes) if problem.aligned else 1
        values.update({f"{name}_{axis}_stride": step // unit for axis, step in zip(STEPS, steps, strict=True)})

    for name in ("q", "k", "v", "out"):
        if problem.page_size and name in ("k", "v"):
            block, row, head, _ = of[name]
            put(name, block, head, row)
        elif problem.varlen:
            row, head, _ = of[name]
            put(name, 0, head, row)
        else:
            put(name, *of[name][:3])
    if "bias" in of:
        flags = (problem.bias_batch, problem.bias_heads, problem.bias_rows)
        put("bias", *(step * flag for step, flag in zip(of["bias"][:3], flags, strict=True)))
    if "block_table" in of:
        values["block_table_stride"] = of["block_table"][0]
    return values


def supported(problem: AttentionProblem, device: Device) -> str | None:
    """None, or why no configuration of this problem can run on the device."""
    return unsupported_dtype((problem.dtype, problem.output_dtype, problem.bias), device)


def near(problem: AttentionProblem) -> Near:
    """Which attentions compare: those of other batch, heads, lengths, page size and windows. Head dims decide which
    tiles fit, and must be equal; so must the alignment of keys where a bias is read, in rows of 16 bytes at a time."""
    sizes = ("B", "H", "Hkv", "Sq", "Skv", "page_size", "window_left", "window_right")
    return Near(sizes, multiples=(("Skv", 16),) if problem.bias is not None else ())

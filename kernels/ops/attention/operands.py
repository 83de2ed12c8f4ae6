"""What a call's arrays say about its problem: forms, shapes, dtypes, strides."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from tilewright.kernels.arrays import View, another
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import AttentionConfig
from tilewright.kernels.overlaps import refuse_self_overlap
from tilewright.tuning_db.errors import ProblemError, UnsupportedError, UnsupportedProblemError

SCALARS = ("q_scale", "k_scale", "v_scale")
"""Inputs of one element."""

TILED = ("q", "k", "v", "bias", "out")
"""Arrays that are read and written in tiles, with strides of their own."""


class Options(NamedTuple):
    """What a call says beside its arrays."""

    causal: bool
    window: tuple[int | None, int | None] | None
    scale: float | None
    softcap: float | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    return_lse: bool
    out_dtype: str | None
    config: AttentionConfig | None


def problem_of(views: Mapping[str, View], options: Options) -> AttentionProblem:
    """The problem of a call.

    Raises:
        ProblemError: shapes, dtypes or options that don't go together.
        UnsupportedError: strides that kernels can't follow.
    """
    b, h, sq, d = _queries(views, options)
    hkv, skv, page_size, dv = _keys(views, options, b, d)
    dense = _check_strides(views)
    _check_others(views, b, h, sq, skv)
    left, right = options.window or (None, None)
    bias = views.get("bias")
    problem = AttentionProblem(
        B=b,
        H=h,
        Sq=sq,
        Skv=skv,
        D=d,
        Hkv=hkv,
        Dv=dv,
        dtype=views["q"].dtype,
        out_dtype=_out_dtype(views, options.out_dtype),
        causal=options.causal,
        window_left=left,
        window_right=right,
        softcap=options.softcap is not None,
        bias=None if bias is None else bias.dtype,
        bias_batch=bias is not None and bias.shape[0] > 1,
        bias_heads=bias is not None and bias.shape[1] > 1,
        bias_rows=bias is None or bias.shape[2] > 1 or sq == 1,
        alibi="alibi_slopes" in views,
        sinks="sinks" in views,
        varlen="cu_seqlens_q" in views,
        page_size=page_size,
        kv_lens="kv_lens" in views,
        lse=options.return_lse,
        scales="v_scale" in views,
        strided=not dense,
        aligned=_aligned(views, dense),
    )
    for name, output in problem.outputs().items():
        if name in views:
            shape = (views["q"].shape[0], *output.shape[1:]) if problem.varlen else output.shape
            if views[name].shape != shape:
                raise ProblemError(f"{name} is {views[name].shape} and must be {shape}")
    if "lse" in views and views["lse"].dtype != "fp32":
        raise ProblemError(f"lse is {views['lse'].dtype} and must be fp32")
    return problem


def strides_of(views: Mapping[str, View]) -> dict[str, tuple[int, ...]]:
    """The strides of every array of more than one dimension, 0 where there is one index only."""
    return {
        name: tuple(0 if length == 1 else step for length, step in zip(view.shape, view.strides, strict=True))
        for name, view in views.items()
        if len(view.shape) > 1
    }


def dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of an array without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _queries(views: Mapping[str, View], options: Options) -> tuple[int, int, int, int]:
    """Sequences, heads, queries (the most of a sequence) and head dim."""
    q, starts = views["q"].shape, views.get("cu_seqlens_q")
    if starts is None:
        if len(q) != 4:
            raise ProblemError(
                f"q is {q} and must be (batch, heads, queries, head dim); (tokens, heads, head dim) with cu_seqlens_q"
            )
        if "cu_seqlens_k" in views or options.max_seqlen_q is not None:
            raise ProblemError("cu_seqlens_k and max_seqlen_q go with cu_seqlens_q")
        sizes = q
    else:
        if len(q) != 3:
            raise ProblemError(f"q is {q} and must be (tokens, heads, head dim) with cu_seqlens_q")
        if len(starts.shape) != 1 or starts.shape[0] < 2:
            raise ProblemError(f"cu_seqlens_q is {starts.shape} and must be (sequences + 1,)")
        longest = _longest("max_seqlen_q", options.max_seqlen_q, "queries")
        sizes = (starts.shape[0] - 1, q[1], longest, q[2])
    if 0 in q:
        raise ProblemError(f"q is {q}: no dimension may be 0")
    return sizes[0], sizes[1], sizes[2], sizes[3]


def _keys(views: Mapping[str, View], options: Options, b: int, d: int) -> tuple[int, int, int, int]:
    """Key heads, keys (the most of a sequence), keys of a block or 0, and head dim of v."""
    k, v = views["k"].shape, views["v"].shape
    if "block_table" in views:
        form, table = "(blocks, block size, heads, head dim) with block_table", views["block_table"].shape
        if "cu_seqlens_k" in views or options.max_seqlen_k is not None:
            raise ProblemError("paged keys are counted by kv_lens: leave out cu_seqlens_k and max_seqlen_k")
        if "kv_lens" not in views:
            raise ProblemError("block_table needs kv_lens, the keys of each sequence")
        if len(table) != 2 or table[0] != b or table[1] < 1:
            raise ProblemError(f"block_table is {table} and must be ({b}, most blocks of a sequence)")
        _same_tokens(k, v, 4, d, form)
        return k[2], table[1] * k[1], k[1], v[3]
    if "cu_seqlens_q" in views:
        if "cu_seqlens_k" not in views:
            raise ProblemError("cu_seqlens_q needs cu_seqlens_k, or block_table and kv_lens")
        if views["cu_seqlens_k"].shape != (b + 1,):
            raise ProblemError(f"cu_seqlens_k is {views['cu_seqlens_k'].shape} and must be ({b + 1},)")
        if "kv_lens" in views:
            raise UnsupportedProblemError("kv_lens goes with block_table or with keys of one batch array: leave it out")
        _same_tokens(k, v, 3, d, "(tokens, heads, head dim) with cu_seqlens_k")
        return k[1], _longest("max_seqlen_k", options.max_seqlen_k, "keys"), 0, v[2]
    if options.max_seqlen_k is not None:
        raise ProblemError("max_seqlen_k goes with cu_seqlens_k")
    _same_tokens(k, v, 4, d, "(batch, heads, keys, head dim)")
    if k[0] != b:
        raise ProblemError(f"q has {b} sequences and k is {k}: both must have as many")
    return k[1], k[2], 0, v[3]


def _same_tokens(k: tuple[int, ...], v: tuple[int, ...], ndim: int, d: int, form: str) -> None:
    if len(k) != ndim or len(v) != ndim:
        raise ProblemError(f"k is {k} and v is {v}: both must be {form}")
    if k[:-1] != v[:-1]:
        raise ProblemError(f"k is {k} and v is {v}: all but the head dim must be equal")
    if k[-1] != d:
        raise ProblemError(f"k is {k} and q has head dim {d}: they must be equal")
    if 0 in (*k, *v):
        raise ProblemError(f"k is {k} and v is {v}: no dimension may be 0")


def _longest(name: str, value: int | None, what: str) -> int:
    if value is None:
        # Reading it from the device would make the call wait for it.
        raise ProblemError(f"{name} must be given: the most {what} of a sequence, or a number above that")
    return value


def _check_others(views: Mapping[str, View], b: int, h: int, sq: int, skv: int) -> None:
    """The arrays beside q, k and v."""
    kinds = {views[name].dtype for name in "qkv"}
    if len(kinds) > 1:
        named = ", ".join(f"{name} is {views[name].dtype}" for name in "qkv")
        raise UnsupportedProblemError(f"{named}: they must have one dtype")
    for name, shape, kind in (
        ("alibi_slopes", (h,), "fp32"),
        ("sinks", (h,), "fp32"),
        ("cu_seqlens_q", (b + 1,), "int32"),
        ("cu_seqlens_k", (b + 1,), "int32"),
        ("kv_lens", (b,), "int32"),
        ("block_table", None, "int32"),
    ):
        view = views.get(name)
        if view is None:
            continue
        if shape is not None and view.shape != shape:
            raise ProblemError(f"{name} is {view.shape} and must be {shape}")
        if view.dtype != kind:
            wrong = UnsupportedProblemError if kind == "fp32" else ProblemError
            raise wrong(f"{name} is {view.dtype} and must be {kind}")
        if view.strides[-1] != 1 and view.shape[-1] > 1:
            raise UnsupportedError(f"{name} must be contiguous; its strides are {view.strides}")
    bias = views.get("bias")
    if bias is not None and (
        len(bias.shape) != 4
        or any(length not in (1, most) for length, most in zip(bias.shape, (b, h, sq), strict=False))
        or bias.shape[3] != skv
    ):
        raise ProblemError(f"bias is {bias.shape} and must be ({b} or 1, {h} or 1, {sq} or 1, {skv})")


def _out_dtype(views: Mapping[str, View], wanted: str | None) -> str | None:
    if "out" not in views:
        return wanted
    if wanted not in (None, views["out"].dtype):
        raise ProblemError(f"out is {views['out'].dtype} and out_dtype={wanted!r}")
    return views["out"].dtype


def _check_strides(views: Mapping[str, View]) -> bool:
    """Whether no array has gaps between its rows, heads or sequences.

    Raises:
        UnsupportedError: strides that kernels can't follow.
    """
    dense = True
    for name in (*TILED, "lse", "block_table"):
        view = views.get(name)
        if view is None:
            continue
        shape, steps = view.shape, view.strides
        gapless = all(
            step == own or length == 1 for length, step, own in zip(shape, steps, dense_strides(shape), strict=True)
        )
        if name == "lse" and not gapless:
            raise UnsupportedError(f"lse must be contiguous; its strides are {steps} for shape {shape}")
        if shape[-1] > 1 and steps[-1] != 1:
            raise UnsupportedError(
                f"{name} has strides {steps}: its last dimension must be contiguous; {another(name)}"
            )
        if any(step < 0 for step in steps):
            raise UnsupportedError(f"{name} has negative strides {steps}: {another(name)}")
        if name == "out":
            refuse_self_overlap(name, view)  # before anything is compiled
        dense = dense and gapless
    return dense


def _aligned(views: Mapping[str, View], dense: bool) -> bool:
    """Whether every tiled array begins at a multiple of 16 bytes and, with stride arguments, goes on in such steps."""
    for name in TILED:
        view = views.get(name)
        if view is not None:
            unit = 16 // int(dtype(view.dtype).bytes)
            steps = () if dense else strides_of({name: view})[name][:-1]
            if view.pointer % 16 or any(step % unit for step in steps):
                return False
    return True

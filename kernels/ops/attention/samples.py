"""The arrays of an attention problem: random inputs that show a stray read, and a part of them for a partial check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.kernels.samples import normal, placed

if TYPE_CHECKING:
    from tilewright.kernels.ops.attention.problem import AttentionProblem

Array = np.ndarray[Any, Any]

SCALES = {"q_scale": 0.5, "k_scale": 2.0, "v_scale": 0.25}
"""The factors of fp8 arrays: powers of two, so that they add no rounding of their own."""

SPREAD = 0.25
"""Standard deviation of a bias, and the largest slope: scores stay near 1, so that many keys count."""

PART_ROWS = 64
"""Queries of each sequence that `part` takes, besides those at the edges of tiles."""

UNREACHED = np.iinfo(np.int32).max
"""What the block table holds beyond a sequence's pages: to read a block of that number is an error."""


def inputs(problem: AttentionProblem, seed: int) -> dict[str, Array]:
    """Every input by argument name; see `AttentionProblem.inputs`."""
    random = np.random.default_rng(seed)
    queries, keys = problem.lengths()
    arrays: dict[str, Array] = {}
    tokens = _tokens(problem, random, queries, problem.Sq, problem.H, problem.D, packed=problem.varlen)
    arrays["q"] = _laid_out(problem, tokens, heads_first=not problem.varlen)
    paged = bool(problem.page_size)
    if paged:
        blocks = problem.B * (problem.Skv // problem.page_size)
        order = random.permutation(blocks + 2)[:blocks]  # two blocks belong to nobody
        arrays["block_table"] = _table(problem, order, keys)
    for name, dim in (("k", problem.D), ("v", problem.dim_v)):
        packed = problem.varlen and not paged
        tokens = _tokens(problem, random, keys, problem.Skv, problem.kv_heads, dim, packed=packed)
        if paged:
            pages = tokens.reshape(-1, problem.page_size, problem.kv_heads, dim)
            tokens = np.full((len(pages) + 2, *pages.shape[1:]), np.nan, pages.dtype)
            tokens[order] = pages
        arrays[name] = _laid_out(problem, tokens, heads_first=not (packed or paged))
    if problem.bias is not None:
        pitch = problem.Skv + 16 if problem.strided else None
        values = normal(random, problem.bias_shape, problem.bias, scale=SPREAD)
        arrays["bias"] = placed(values, pitch=pitch, aligned=problem.aligned)
    if problem.alibi:
        arrays["alibi_slopes"] = (SPREAD * 2.0 ** (-8 * np.arange(problem.H) / problem.H)).astype(np.float32)
    if problem.sinks:
        arrays["sinks"] = normal(random, (problem.H,), "fp32")
    if problem.varlen:
        arrays["cu_seqlens_q"] = _starts(queries)
        if not paged:
            arrays["cu_seqlens_k"] = _starts(keys)
    if problem.kv_lens:
        arrays["kv_lens"] = keys.astype(np.int32)
    if problem.scales:
        arrays |= {name: np.full(1, value, np.float32) for name, value in SCALES.items()}
    return arrays


def _tokens(
    problem: AttentionProblem,
    random: np.random.Generator,
    lengths: Array,
    longest: int,
    heads: int,
    dim: int,
    *,
    packed: bool,
) -> Array:
    """All sequences, tokens before heads: (tokens, heads, dim) packed, else (B, longest, heads, dim) with NaN behind
    the end of each."""
    if packed:
        return normal(random, (int(lengths.sum()), heads, dim), problem.dtype)
    values = normal(random, (problem.B, longest, heads, dim), problem.dtype)
    for sequence, length in enumerate(lengths):
        values[sequence, length:] = np.nan
    return values


def _table(problem: AttentionProblem, order: Array, keys: Array) -> Array:
    """Which block holds each page of each sequence; strided, with columns behind it that belong to nobody."""
    width = problem.Skv // problem.page_size
    table = np.full((problem.B, width + (3 if problem.strided else 0)), UNREACHED, np.int32)
    reached = np.arange(width) < -(-keys // problem.page_size)[:, None]
    table[:, :width][reached] = order.reshape(problem.B, width)[reached]
    return table[:, :width]


def _laid_out(problem: AttentionProblem, tokens: Array, *, heads_first: bool) -> Array:
    """Tokens before heads, as the problem lays them out. Strided, they stay in that order, as a projection leaves them,
    and heads lie apart."""
    pitch = None
    if problem.strided:
        vector = 16 // tokens.itemsize
        pitch = (-(-tokens.shape[-1] // vector) + 1) * vector if problem.aligned else tokens.shape[-1] + 1
    if heads_first and not problem.strided:
        return placed(np.ascontiguousarray(tokens.swapaxes(1, 2)), aligned=problem.aligned)
    array = placed(tokens, pitch=pitch, aligned=problem.aligned)
    return array.swapaxes(1, 2) if heads_first else array


def _starts(lengths: Array) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def part(
    problem: AttentionProblem, arrays: Mapping[str, Array], random: np.random.Generator
) -> tuple[AttentionProblem, dict[str, Array], dict[str, tuple[Array, ...]]]:
    """Some queries of the heads of the first key head, the last, and two between; see `AttentionProblem.part`."""
    queries, keys = problem.lengths()
    kv_heads = np.unique([0, *random.integers(0, problem.kv_heads, 2), problem.kv_heads - 1])
    group = problem.H // problem.kv_heads
    heads = (kv_heads[:, None] * group + np.arange(group)).reshape(-1)
    chosen = dict(arrays)
    for name in ("alibi_slopes", "sinks"):
        if name in arrays:
            chosen[name] = arrays[name][heads]
    tokens_first = problem.varlen or bool(problem.page_size)
    for name in ("k", "v"):
        chosen[name] = arrays[name][..., kv_heads, :] if tokens_first else arrays[name][:, kv_heads]
    if problem.varlen:
        rows = [_rows(int(count), random) for count in queries]
        tokens = np.concatenate([start + each for start, each in zip(_starts(queries), rows, strict=False)])
        lead: tuple[Array, ...] = (tokens, heads)
        chosen["q"] = arrays["q"][np.ix_(*lead)]
        chosen["cu_seqlens_q"] = _starts(np.array([len(each) for each in rows]))
        shifts = keys - queries
        chosen["places"] = np.concatenate([each + shift for each, shift in zip(rows, shifts, strict=True)])
    else:
        some = _rows(problem.Sq, random)
        lead = (np.arange(problem.B), heads, some)
        chosen["q"] = arrays["q"][np.ix_(*lead)]
        chosen["places"] = some + (keys - queries)[:, None]
        if problem.bias is not None:
            bias = arrays["bias"][:, heads] if problem.bias_heads else arrays["bias"]
            chosen["bias"] = bias[:, :, some] if problem.bias_rows else bias
    smaller = replace(problem, H=len(heads), Hkv=len(kv_heads))
    index = {"out": (*lead, np.arange(problem.dim_v)), "lse": lead}
    return smaller, chosen, {name: index[name] for name in problem.outputs()}


def _rows(count: int, random: np.random.Generator) -> Array:
    """Some of `count` queries: one in each of `PART_ROWS` stretches, both ends, and both sides of where the last tile
    begins, for every tile size there is."""
    edges = np.linspace(0, count, min(count, PART_ROWS) + 1).astype(np.int64)
    inside = random.integers(edges[:-1], edges[1:]) if count else edges[:0]
    starts = np.array([count // tile * tile for tile in (16, 32, 64, 128, 256)])
    ends = np.concatenate([[0, count - 1], starts, starts - 1])
    return np.unique(np.concatenate([inside, ends[(ends >= 0) & (ends < count)]]))

"""The fused attention in float64, and how near a result must be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tilewright.kernels.epilogue import ROUNDOFF
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.attention import samples
from tilewright.kernels.ops.attention.problem import SOFTCAP, AttentionProblem

Array = np.ndarray[Any, Any]


class Head(NamedTuple):
    """One query head of one sequence, in float64."""

    sequence: int
    head: int
    q: Array  # (queries, D)
    k: Array  # (keys, D)
    v: Array  # (keys, Dv)
    places: Array  # of each query among the keys
    at: Any  # where its results go, in the outputs


def heads_of(problem: AttentionProblem, arrays: Mapping[str, Array]) -> Iterator[Head]:
    """Every query head of every sequence, gathered from wherever its queries, keys and values are."""
    q, k, v = (arrays[name].astype(np.float64) * arrays.get(f"{name}_scale", 1.0) for name in "qkv")
    group = problem.H // problem.kv_heads
    for b in range(problem.B):
        if problem.page_size:
            length = int(arrays["kv_lens"][b])
            pages = arrays["block_table"][b, : -(-length // problem.page_size)]
            # (pages, keys of a page, heads, dim) to (heads, keys, dim)
            k_b, v_b = (x[pages].reshape(-1, *x.shape[2:])[:length].swapaxes(0, 1) for x in (k, v))
        elif problem.varlen:
            first, last = arrays["cu_seqlens_k"][b : b + 2]
            k_b, v_b = (x[first:last].swapaxes(0, 1) for x in (k, v))
        else:
            length = int(arrays["kv_lens"][b]) if problem.kv_lens else problem.Skv
            k_b, v_b = k[b][:, :length], v[b][:, :length]
        first, last = arrays["cu_seqlens_q"][b : b + 2] if problem.varlen else (0, q.shape[-2])
        places = np.arange(last - first) + k_b.shape[1] - (last - first)
        if "places" in arrays:
            places = arrays["places"][first:last] if problem.varlen else arrays["places"][b]
        for h in range(problem.H):
            at = (slice(first, last), h) if problem.varlen else (b, h)
            yield Head(b, h, q[at], k_b[h // group], v_b[h // group], places, at)


def reference(
    problem: AttentionProblem, arrays: Mapping[str, Array], *, scale: float | None = None, softcap: float = SOFTCAP
) -> dict[str, Array]:
    """`out` and `lse` in float64, from the very values the kernel is given."""
    lead = arrays["q"].shape[:-1]
    out, lse = np.zeros((*lead, problem.dim_v)), np.zeros(lead)
    for b, h, q, k, v, places, at in heads_of(problem, arrays):
        s = (scale or 1 / math.sqrt(problem.D)) * (q @ k.T)
        if problem.softcap:
            s = softcap * np.tanh(s / softcap)
        if problem.bias is not None:
            s = s + np.broadcast_to(arrays["bias"], (problem.B, problem.H, len(q), problem.Skv))[b, h, :, : len(k)]
        away = np.arange(len(k)) - places[:, None]  # of each key from each query's own place
        if problem.alibi:
            s = s - float(arrays["alibi_slopes"][h]) * np.abs(away)
        s[away > (np.inf if problem.right is None else problem.right)] = -np.inf
        s[away < -(np.inf if problem.window_left is None else problem.window_left)] = -np.inf
        if problem.sinks:  # one more key, whose value is 0
            s = np.column_stack([s, np.full(len(q), arrays["sinks"][h], np.float64)])
            v = np.vstack([v, np.zeros(problem.dim_v)])
        top = s.max(axis=1, initial=-np.inf, keepdims=True)
        p = np.exp(s - np.where(np.isinf(top), 0, top))
        total = p.sum(axis=1, keepdims=True)
        out[at] = p @ v / np.where(total == 0, 1, total)
        with np.errstate(divide="ignore"):
            lse[at] = (top + np.log(total))[:, 0]
    return {"out": out, "lse": lse} if problem.lse else {"out": out}


def tolerance(problem: AttentionProblem) -> dict[str, Tolerance]:
    """What rounding the weights, and errors of the scores, make of the result; and the rounding of the result.

    Scores near 1 come from fp32 sums of D products of size 1/√D: 2^-24·√D, and a few roundings of numbers up to 16 and
    of exp2, 2^-21. A weight is off by as much, relatively. fp8 scores add another 2^-12: sm_90 adds their products with
    14 bits. Each weight is rounded to the type of V (fp16 for fp8), by u/√3 of itself on average, so that a result is
    off by u/√3·‖p‖, where ‖p‖ is 1 for a row that sees few keys, and about √(e/n) for n keys of normal scores. The sum
    of n weights in order adds √n·2^-24. Factors of 4 and 8 cover the largest of 10^6 results (5 standard deviations).
    """
    scores = 8 * (2.0**-21 + math.sqrt(problem.D) * 2.0**-24 + (2.0**-12 if problem.dtype.startswith("fp8") else 0.0))
    if problem.softcap:
        scores += 2 * SOFTCAP * 2.0**-23
    weights = ROUNDOFF["fp16" if problem.dtype.startswith("fp8") else problem.dtype]
    all_seen = problem.right is None and problem.window_left is None and not (problem.varlen or problem.kv_lens)
    norm = min(1.0, 2 / math.sqrt(problem.Skv)) if all_seen and problem.bias is None and not problem.alibi else 1.0
    absolute = scores * norm + 4 * weights * norm + 8 * math.sqrt(problem.Skv) * 2.0**-24 * norm
    absolute *= samples.SCALES["v_scale"] if problem.scales else 1.0
    smallest = {"fp16": 2.0**-24, "fp8e4m3": 2.0**-9, "fp8e5m2": 2.0**-16}.get(problem.output_dtype, 0.0)
    out = Tolerance(relative=2 * ROUNDOFF[problem.output_dtype], absolute=absolute + smallest)
    lse = Tolerance(relative=2.0**-22, absolute=scores + 8 * math.sqrt(problem.Skv) * 2.0**-24)
    return {"out": out, "lse": lse} if problem.lse else {"out": out}

"""`Workload`: a problem and where it comes from; and how layers of models are written as problems.

All arrays are fp16 with fp32 sums. A layer's problem is the op that runs it, with everything behind it that the op's
epilogue takes along: bias, residual, activation, gate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem, as_gemm
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Problem


@dataclass(frozen=True, slots=True)
class Workload:
    """A problem with the name of where it comes from."""

    name: str
    problem: Problem
    count: int = 1  # times that one pass of the model runs it

    @property
    def op(self) -> str:
        """The kernel that runs it."""
        return self.problem.op


def distinct(workloads: Iterable[Workload]) -> tuple[Workload, ...]:
    """Each problem once, under the first of its names, with the counts of all."""
    found: dict[Problem, Workload] = {}
    for workload in workloads:
        first = found.get(workload.problem)
        found[workload.problem] = replace(first, count=first.count + workload.count) if first else workload
    return tuple(found.values())


def linear(name: str, tokens: int, features_in: int, features_out: int, *, count: int = 1, **options: Any) -> Workload:
    """A linear layer: (tokens, in features) × (in features, out features).

    Weights are stored as PyTorch does, (out features, in features), so B is column-major.
    """
    problem = GemmProblem(M=tokens, N=features_out, K=features_in, **{"b_layout": "col", **options})
    return Workload(name, problem, count)


def conv(
    name: str,
    images: int,
    size: int | tuple[int, int],
    channels: int,
    filters: int,
    taps: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: tuple[int, int, int, int] | None = None,
    count: int = 1,
    **options: Any,
) -> Workload:
    """A convolution with bias (that of a BatchNorm folded in, where there is one), NHWC: the name gets taps, channels,
    pixels and images. One of single pixels (1×1, stride 1) is the GEMM that `conv2d` runs it as.

    Without `padding` (top, left, bottom, right), kernels of odd size keep the pixels that there are, and those of even
    size, which cut images into patches, have none.
    """
    height, width = (size, size) if isinstance(size, int) else size
    r, s = (taps, taps) if isinstance(taps, int) else taps
    top, left, bottom, right = padding or [length // 2 if length % 2 else 0 for length in (r, s, r, s)]
    problem = Conv2dProblem(
        N=images,
        H=height,
        W=width,
        C=channels,
        K=filters,
        R=r,
        S=s,
        stride_h=stride if height > 1 else 1,
        stride_w=stride,
        pad_top=top,
        pad_left=left,
        pad_bottom=bottom,
        pad_right=right,
        **{"bias": "fp16", **options},
    )
    step = f"/{stride}" if stride > 1 else ""
    where = f"{name} {r}x{s}{step} {channels}-{filters} {height}x{width}, batch {images}"
    return Workload(where, as_gemm(problem) if problem.pointwise else problem, count)


def attention(
    name: str, sequences: int, heads: int, queries: int, keys: int, dim: int, *, count: int = 1, **options: Any
) -> Workload:
    """Attention of arrays as models have them: slices of one projection's result or of a cache, so with strides."""
    problem = AttentionProblem(B=sequences, H=heads, Sq=queries, Skv=keys, D=dim, **{"strided": True, **options})
    return Workload(name, problem, count)

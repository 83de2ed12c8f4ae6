"""What `benchmarks.gpu` compares with the best library at hand: named workloads by family, each with its bar.

A family's bar is for the geometric mean of its cases' ratios, the library's time over ours. What a ratio is taken
against is a role of the contenders:

    library    the library's own product, convolution or attention without the epilogue
    separate   that, and the epilogue by elementwise kernels of its own
    fused      the library's own fused form
    whole      the best of all that compute the very function, which a bare product does where there is no epilogue
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.activations import activation_name
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Problem
from tilewright.tuner.suites import find_suite
from tilewright.tuner.suites.llama import INT4
from tilewright.tuner.suites.resnet import resnet50


@dataclass(frozen=True, slots=True)
class Family:
    """Cases that one figure is given for."""

    name: str
    against: str  # a role, or "whole"
    bar: float | None = None  # least geometric mean of the ratios; None where none was set
    copy_bar: float | None = None  # least part of the copy bandwidth, of cases of a GB or those that wait for memory


@dataclass(frozen=True, slots=True)
class Case:
    """A problem in a family."""

    family: Family
    name: str
    problem: Problem
    images: int = 0  # of a convolution that runs as a GEMM: how its rows are cut

    @property
    def op(self) -> str:
        """The kernel that runs it."""
        return self.problem.op


LARGE = Family("gemm, large", "whole", 0.95)
FEW = Family("gemm, small N and K", "whole", 0.97)
SKINNY = Family("gemm, M up to 64", "whole", 1.05, 0.85)
FP8 = Family("gemm, fp8", "whole")
INT8 = Family("gemm, int8 + bias + gelu", "separate")
GELU = Family("gemm + bias + gelu, 4096 x 14336 x 4096", "separate", 1.06)
SWIGLU = Family("gemm + swiglu, 4096 x 14336 x 4096", "separate", 1.05)
UP = Family("gemm + bias + gelu, BERT and ViT up-projection", "separate", 1.3)
RESIDUAL = Family("gemm + bias + residual", "separate")
WEIGHTS = Family("gemm, int4 weights, M = 1, against bf16 ones", "library", 3.0)
RESNET_1 = Family("conv2d, ResNet-50, batch 1", "whole", 1.15)
RESNET_32 = Family("conv2d, ResNet-50, batch 32", "whole", 0.92)
DEPTHWISE = Family("conv2d, depthwise", "whole", 1.5)
PREFILL = Family("attention, prefill, d128, causal", "whole", 0.72)
PREFILL_OTHER = Family("attention, prefill, others", "whole")
DECODE = Family("attention, decode", "whole", 1.1, 0.85)

FAMILIES = (
    LARGE, FEW, SKINNY, FP8, INT8, GELU, SWIGLU, UP, RESIDUAL, WEIGHTS, RESNET_1, RESNET_32, DEPTHWISE, PREFILL,
    PREFILL_OTHER, DECODE,
)  # fmt: skip


def computes_all(case: Case, role: str) -> bool:
    """Whether a contender of a role computes the very function: a bare product does where there is no epilogue."""
    problem = case.problem
    if role != "library":
        return True
    if isinstance(problem, AttentionProblem):
        return True
    parts = (problem.bias, problem.residual, getattr(problem, "gated", None), getattr(problem, "b_dtype", None))  # type: ignore[attr-defined]
    return not any(parts) and activation_name(problem.activation) == "none"  # type: ignore[attr-defined]


def held_against_all(case: Case) -> Case:
    """The case, held against the best of all that compute the very function."""
    return replace(case, family=replace(case.family, against="whole"))


def cases() -> tuple[Case, ...]:
    """All of them: a family's first case before any family's second, so that a run cut short has some of each."""
    by_family: dict[Family, list[Case]] = {family: [] for family in FAMILIES}
    for case in (*_gemms(), *_convolutions(), *_attentions()):
        by_family[case.family].append(case)
    return tuple(
        column[row]
        for row in range(max(map(len, by_family.values())))
        for column in by_family.values()
        if row < len(column)
    )


def _product(family: Family, m: int, n: int, k: int, dtype: str = "bf16", **options: Any) -> Case:
    problem = GemmProblem(M=m, N=n, K=k, dtype=dtype, b_layout="col", **options)
    return Case(family, f"{m} x {n} x {k} {dtype}", problem)


def _gemms() -> Iterator[Case]:
    for m, n, k, kind in (
        (4096, 4096, 4096, "bf16"),
        (8192, 8192, 8192, "bf16"),
        (4096, 14336, 4096, "bf16"),
        (2048, 6144, 4096, "fp16"),
        (8192, 8192, 1024, "fp16"),
    ):
        yield _product(LARGE, m, n, k, kind)
    for m, n, k in ((16384, 768, 768), (8192, 1024, 512), (16384, 256, 1024), (32768, 128, 256)):
        yield _product(FEW, m, n, k)
    for m, n, k in ((1, 4096, 4096), (16, 4096, 14336), (64, 8192, 8192), (1, 28672, 4096), (16, 28672, 4096),
                    (64, 6144, 4096), (8, 8192, 8192)):  # fmt: skip
        yield _product(SKINNY, m, n, k)
    yield _product(FP8, 4096, 4096, 4096, "fp8e4m3", a_scale="tensor", b_scale="tensor")
    yield _product(FP8, 8192, 8192, 8192, "fp8e4m3", a_scale="tensor", b_scale="tensor")
    int8 = {"a_scale": "tensor", "b_scale": "column", "bias": "fp32", "activation": "gelu_tanh", "out_dtype": "bf16"}
    yield _product(INT8, 4096, 4096, 4096, "int8", **int8)
    gelu = {"bias": "bf16", "activation": "gelu_tanh"}
    yield _product(GELU, 4096, 14336, 4096, **gelu)
    yield _product(SWIGLU, 4096, 28672, 4096, gated="halves", activation="silu")
    yield _product(UP, 16384, 3072, 768, **gelu)
    yield _product(UP, 8192, 4096, 1024, **gelu)
    for m in (4096, 16384):
        yield _product(RESIDUAL, m, 1024, 1024, bias="bf16", residual="bf16")
    weights: dict[str, Any] = {**INT4, "b_scale_dtype": "bf16"}
    for n, k in ((4096, 4096), (28672, 4096), (4096, 14336), (57344, 8192)):
        yield _product(WEIGHTS, 1, n, k, **weights)


def _convolutions() -> Iterator[Case]:
    for family, images in ((RESNET_32, 32), (RESNET_1, 1)):
        for workload in resnet50(images):
            if " fc" not in workload.name:
                yield Case(family, workload.name.removeprefix("resnet50 "), workload.problem, images)
    for suite in ("mobilenet-v2", "convnext-t"):
        for workload in find_suite(suite):
            if " depthwise " in workload.name:
                yield Case(DEPTHWISE, workload.name, workload.problem)


def _attentions() -> Iterator[Case]:
    def prefill(family: Family, batch: int, length: int, heads: int, kv_heads: int, dim: int, causal: bool) -> Case:
        problem = AttentionProblem(
            B=batch, H=heads, Hkv=kv_heads, Sq=length, Skv=length, D=dim, dtype="bf16", causal=causal
        )
        shape = f"{batch} x {length}, {heads}/{kv_heads} heads of {dim}{', causal' if causal else ''}"
        return Case(family, shape, problem)

    for length in (2048, 4096, 8192, 16384):
        yield prefill(PREFILL, 16384 // length, length, 16, 16, 128, True)
    yield prefill(PREFILL, 1, 8192, 32, 8, 128, True)
    yield prefill(PREFILL_OTHER, 2, 8192, 16, 16, 128, False)
    yield prefill(PREFILL_OTHER, 2, 8192, 32, 32, 64, True)
    yield prefill(PREFILL_OTHER, 8, 128, 12, 12, 64, False)
    for batch, keys in ((1, 4096), (1, 32768), (1, 131072), (16, 8192), (64, 4096)):
        problem = AttentionProblem(B=batch, H=32, Hkv=8, Sq=1, Skv=keys, D=128, dtype="bf16", causal=True)
        yield Case(DECODE, f"{batch} x {keys} keys, 32/8 heads of 128", problem)


def as_convolution(case: Case) -> Conv2dProblem | None:
    """The convolution that a case is, also where it runs as a GEMM of its pixels; None for what is no convolution."""
    problem = case.problem
    if isinstance(problem, Conv2dProblem):
        return problem
    if not isinstance(problem, GemmProblem) or not case.images:
        return None
    pixels = math.isqrt(problem.M // case.images)
    return Conv2dProblem(
        N=case.images,
        H=pixels,
        W=pixels,
        C=problem.K,
        K=problem.N,
        R=1,
        S=1,
        dtype=problem.dtype,
        bias=problem.bias,
        residual=problem.residual,
        activation=problem.activation,
        residual_last=problem.residual_last,
    )


def smaller(case: Case) -> Case:
    """A case of the same form that a rehearsal can compute on a processor: every size cut to 64 at the most."""
    problem = case.problem
    if isinstance(problem, GemmProblem):
        k = min(problem.K, 256 if problem.group_size else 64)
        small = replace(problem, M=min(problem.M, 16), N=min(problem.N, 64), K=k)
        return replace(case, problem=small, images=1 if case.images else 0)
    if isinstance(problem, Conv2dProblem):
        groups = 8 if problem.groups > 1 else 1
        channels = 8 if problem.groups > 1 else min(problem.C, 8)
        return replace(case, problem=replace(problem, N=1, H=8, W=8, C=channels, K=8, groups=groups))
    assert isinstance(problem, AttentionProblem)
    heads = 4 if problem.kv_heads < problem.H else 2
    sq = min(problem.Sq, 32)
    skv = sq if problem.Sq > 1 else min(problem.Skv, 64)
    return replace(case, problem=replace(problem, B=1, H=heads, Hkv=2, Sq=sq, Skv=skv))

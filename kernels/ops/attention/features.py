"""What the fused attention can do, a small problem for each."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.kernel import Variant
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import AttentionConfig

SMALL: dict[str, Any] = {"B": 2, "H": 4, "Sq": 33, "Skv": 47, "D": 64}
DECODE: dict[str, Any] = {"B": 2, "H": 8, "Hkv": 2, "Sq": 1, "Skv": 160, "D": 64}
PAGED: dict[str, Any] = {**DECODE, "page_size": 16, "kv_lens": True}

FEATURES: dict[str, AttentionProblem | Variant[AttentionProblem, AttentionConfig]] = {
    # data types
    "fp16": AttentionProblem(**SMALL),
    "bf16": AttentionProblem(**SMALL, dtype="bf16"),
    "fp32, IEEE": AttentionProblem(**{**SMALL, "H": 2}, dtype="fp32"),
    "fp8e4m3": AttentionProblem(**SMALL, dtype="fp8e4m3"),
    "fp8e5m2, with scales": AttentionProblem(**SMALL, dtype="fp8e5m2", scales=True),
    "fp32 result": AttentionProblem(**SMALL, out_dtype="fp32"),
    # masks
    "causal, bottom-right aligned": AttentionProblem(**SMALL, causal=True),
    "window to the left": AttentionProblem(**SMALL, causal=True, window_left=9),
    "window to both sides": AttentionProblem(**SMALL, window_left=9, window_right=5),
    # scores
    "softcap": AttentionProblem(**SMALL, softcap=True),
    "bias": AttentionProblem(**SMALL, bias="fp16", bias_batch=True, bias_heads=True),
    "bias, one row": AttentionProblem(**SMALL, bias="fp32", bias_batch=True, bias_rows=False),
    "ALiBi": AttentionProblem(**SMALL, causal=True, alibi=True),
    "sinks": AttentionProblem(**SMALL, causal=True, sinks=True),
    "log-sum-exp": AttentionProblem(**SMALL, causal=True, lse=True),
    # heads
    "grouped queries": AttentionProblem(**SMALL, Hkv=2),
    "one head of keys": AttentionProblem(**SMALL, Hkv=1),
    "values of another head dim": AttentionProblem(**SMALL, Dv=32),
    **{
        f"head dim {dim}": AttentionProblem(B=1, H=2, Sq=33, Skv=47, D=dim, causal=True)
        for dim in (16, 32, 40, 72, 80, 96, 128, 160, 192, 256)
    },
    # storage
    "any strides": AttentionProblem(**SMALL, strided=True),
    "unaligned arrays": AttentionProblem(**{**SMALL, "D": 40}, aligned=False),
    "variable lengths": AttentionProblem(B=3, H=4, Sq=33, Skv=47, D=64, varlen=True, causal=True, lse=True),
    "lengths of keys": AttentionProblem(**SMALL, kv_lens=True),
    "paged keys": AttentionProblem(**PAGED),
    "paged keys, variable lengths of queries": AttentionProblem(
        **{**PAGED, "B": 3, "Sq": 17, "Skv": 48}, varlen=True, causal=True
    ),
    # decode
    "one query": AttentionProblem(**DECODE),
    "split keys, deterministic": Variant(AttentionProblem(**DECODE, lse=True), AttentionConfig(16, 32, SPLIT_KV=4)),
    # prefill
    "values multiplied during the next softmax": Variant(
        AttentionProblem(**SMALL, causal=True), AttentionConfig(64, 16, OVERLAP=True)
    ),
    "warp-specialised": Variant(
        AttentionProblem(B=1, H=2, Sq=150, Skv=200, D=64, causal=True, lse=True),
        AttentionConfig(128, 32, TMA=True, WARP_SPECIALIZE=True),
    ),
    "warp-specialised, persistent": Variant(
        AttentionProblem(B=2, H=4, Hkv=2, Sq=256, Skv=384, D=64, causal=True, lse=True),
        AttentionConfig(128, 32, GROUP_H=8, TMA=True, WARP_SPECIALIZE=True, PERSISTENT=True),
    ),
    "tensor descriptors": Variant(AttentionProblem(**SMALL, causal=True), AttentionConfig(64, 16, TMA=True)),
}

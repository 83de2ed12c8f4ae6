"""What the fused GEMM can do, a small problem for each."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.activations import ACTIVATIONS
from tilewright.kernels.kernel import Variant
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig

SMALL: dict[str, Any] = {"M": 33, "N": 48, "K": 64}
INT8: dict[str, Any] = {**SMALL, "dtype": "int8"}
INT4: dict[str, Any] = {"M": 17, "N": 48, "K": 128, "b_dtype": "int4", "b_scale": "group"}
GROUPED: dict[str, Any] = {**SMALL, "groups": 3}
WITH_PARAMETERS = {"clamp": "clamp:0:6", "leaky_relu": "leaky_relu:0.1"}
EVEN: dict[str, Any] = {"M": 96, "N": 64, "K": 64}

FEATURES: dict[str, GemmProblem | Variant[GemmProblem, GemmConfig]] = {
    # data types
    "fp16": GemmProblem(**SMALL),
    "bf16": GemmProblem(**SMALL, dtype="bf16"),
    "fp32, IEEE": GemmProblem(**SMALL, dtype="fp32"),
    "fp32, tf32": GemmProblem(**SMALL, dtype="fp32", precision="tf32"),
    "fp8e4m3": GemmProblem(**SMALL, dtype="fp8e4m3"),
    "fp8e5m2": GemmProblem(**SMALL, dtype="fp8e5m2"),
    "int8 to int32": GemmProblem(**INT8),
    "int8, dequantised by tensor": GemmProblem(**INT8, a_scale="tensor", b_scale="tensor"),
    "int8, dequantised by row and column": GemmProblem(**INT8, a_scale="row", b_scale="column", out_dtype="fp16"),
    "int8 weights, a scale a column": GemmProblem(**SMALL, b_dtype="int8", b_scale="column"),
    "int8 weights, groups of 64": GemmProblem(**SMALL, b_dtype="int8", b_scale="group", group_size=64),
    "int8 weights, groups of 32, zero points": GemmProblem(
        **SMALL, b_dtype="int8", b_scale="group", group_size=32, b_zero=True
    ),
    "int4 weights, groups of 32": GemmProblem(**INT4, group_size=32),
    "int4 weights, groups of 64, zero points": GemmProblem(**INT4, group_size=64, b_zero=True),
    "int4 weights, groups of 128, bf16": GemmProblem(**INT4, group_size=128, dtype="bf16", b_scale_dtype="bf16"),
    "int4 weights, a scale a column": GemmProblem(**{**INT4, "b_scale": "column"}),
    # forms
    "column-major operands": GemmProblem(**SMALL, a_layout="col", b_layout="col"),
    "batch": GemmProblem(**SMALL, batch=3),
    "batch, one operand broadcast": GemmProblem(**SMALL, batch=3, b_broadcast=True, residual="fp16"),
    "rows further apart than long": GemmProblem(**SMALL, batch=2, strided=True, residual="fp16"),
    "unaligned arrays": GemmProblem(M=33, N=47, K=65, aligned=False),
    "groups of rows (mixture of experts)": GemmProblem(**GROUPED),
    "groups of rows, with bias and gate": GemmProblem(**GROUPED, bias="fp16", gated="halves", activation="silu"),
    "groups of rows, int4 weights": GemmProblem(**INT4, group_size=32, groups=2),
    "split-K, deterministic": Variant(GemmProblem(M=17, N=32, K=512), GemmConfig(16, 32, 32, SPLIT_K=4)),
    "few rows": Variant(GemmProblem(M=5, N=48, K=64, b_layout="col", bias="fp16"), GemmConfig(8, 32, 32, num_warps=2)),
    "few rows, split-K, gated halves": Variant(
        GemmProblem(M=8, N=96, K=256, b_layout="col", gated="halves", activation="silu"),
        GemmConfig(8, 64, 32, SPLIT_K=2, num_warps=2),
    ),
    "few rows by int4 weights": Variant(
        GemmProblem(M=3, N=48, K=128, b_layout="col", b_dtype="int4", b_scale="group", group_size=64, b_zero=True),
        GemmConfig(8, 32, 64, num_warps=2),
    ),
    "persistent blocks": Variant(GemmProblem(**EVEN), GemmConfig(32, 32, 32, PERSISTENT=True)),
    "tensor descriptors": Variant(GemmProblem(**EVEN), GemmConfig(32, 32, 32, TMA=True)),
    "tensor descriptors, persistent": Variant(
        GemmProblem(**EVEN, b_layout="col"), GemmConfig(32, 32, 32, PERSISTENT=True, TMA=True)
    ),
    "warp-specialised": Variant(
        GemmProblem(M=200, N=136, K=96, b_layout="col", bias="fp16", residual="fp16"),
        GemmConfig(128, 64, 32, num_warps=4, PERSISTENT=True, TMA=True, WARP_SPECIALIZE=True),
    ),
    "warp-specialised, gated halves": Variant(
        GemmProblem(M=256, N=128, K=64, gated="halves", activation="silu"),
        GemmConfig(128, 128, 32, num_warps=4, PERSISTENT=True, TMA=True, WARP_SPECIALIZE=True),
    ),
    # epilogue
    "alpha, bias, residual, activation": GemmProblem(
        **SMALL, alpha=True, bias="fp32", residual="fp16", activation="gelu_erf"
    ),
    "residual behind the activation": GemmProblem(**SMALL, residual="fp16", residual_last=True, activation="silu"),
    "bias along M": GemmProblem(**SMALL, bias="fp16", bias_axis="m"),
    "scales of any dtype": GemmProblem(**SMALL, a_scale="row", b_scale="column"),
    "gated halves (SwiGLU)": GemmProblem(**SMALL, gated="halves", activation="silu"),
    "gated halves (ReGLU)": GemmProblem(**SMALL, gated="halves", activation="relu"),
    "gated pairs of columns (GEGLU)": GemmProblem(
        **SMALL, gated="interleaved", activation="gelu_tanh", bias="fp16", residual="fp16"
    ),
    **{
        f"activation {word}": GemmProblem(**SMALL, activation=WITH_PARAMETERS.get(word, word))
        for word in ACTIVATIONS
        if word != "none"
    },
    "int8 result": GemmProblem(**SMALL, out_dtype="int8", out_scale=True, activation="relu"),
    "int8 to int8": GemmProblem(**INT8, a_scale="tensor", b_scale="column", out_dtype="int8", out_scale=True),
    "fp8e4m3 result": GemmProblem(**SMALL, dtype="bf16", out_dtype="fp8e4m3", out_scale=True),
    "fp8e5m2 result": GemmProblem(**SMALL, dtype="bf16", out_dtype="fp8e5m2", out_scale=True),
}

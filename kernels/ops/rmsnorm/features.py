"""What the fused RMSNorm can do, a small problem for each."""

from __future__ import annotations

from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem

FEATURES = {
    "fp16": RmsNormProblem(M=5, N=208, weight="fp16"),
    "bf16": RmsNormProblem(M=5, N=208, dtype="bf16", weight="bf16"),
    "fp32": RmsNormProblem(M=5, N=208, dtype="fp32", weight="fp32"),
    "no weight": RmsNormProblem(M=5, N=208),
    "weight of another dtype": RmsNormProblem(M=5, N=208, weight="fp32"),
    "residual": RmsNormProblem(M=5, N=208, weight="fp16", residual="fp16"),
    "residual, and the sum as a result": RmsNormProblem(M=5, N=208, weight="fp16", residual="fp16", residual_out=True),
    "fp32 residual stream": RmsNormProblem(M=5, N=208, weight="fp16", residual="fp32", residual_out=True),
    "result of another dtype": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="fp32"),
    "int8 result": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="int8", out_scale=True),
    "fp8e4m3 result": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="fp8e4m3", out_scale=True),
    "fp8e5m2 result": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="fp8e5m2", out_scale=True),
    "int8 result, a scale a row": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="int8", row_scale=True),
    "fp8e4m3 result, a scale a row": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="fp8e4m3", row_scale=True),
    "fp8e5m2 result, a scale a row": RmsNormProblem(M=5, N=208, weight="fp16", out_dtype="fp8e5m2", row_scale=True),
    "rows of any length": RmsNormProblem(M=5, N=97, weight="fp16"),
    "rows longer than a tile": RmsNormProblem(M=2, N=9008, weight="fp16"),
    "rows further apart than long": RmsNormProblem(M=5, N=208, weight="fp16", strided=True),
    "unaligned arrays": RmsNormProblem(M=5, N=208, weight="fp16", strided=True, aligned=False),
}

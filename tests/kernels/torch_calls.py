"""Calls as programs of torch make them, for torch.compile: what the interpreter's tests and the GPU's share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tilewright.kernels import AttentionConfig, GemmConfig, attention, conv1d, conv2d, gemm, grouped_gemm, rmsnorm

HALF, FP8 = torch.float16, torch.float8_e4m3fn
OUTER = GemmConfig(16, 16, 32, SPLIT_K=2)


def randn(*shape: int, dtype: Any = HALF) -> Any:
    """Normal values, the same ones at every call."""
    return torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32)).to(dtype)


def ints(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32)


def of_one_epilogue(a, b, bias, residual):
    return torch.relu(gemm(a, b, bias=bias, residual=residual, activation="silu", alpha=0.5)) + 1


def of_configs(a, b):
    return gemm(a, b, config=OUTER) + gemm(a, b, config=GemmConfig(16, 32, 16, GROUP_M=2))


def of_fp8(a, b, scale):
    return gemm(a.to(FP8), b.to(FP8), a_scale=scale, b_scale=2, out_scale=0.25, out_dtype="fp8e4m3")


def of_pairs(a, b):
    return gemm(a, b, gated="interleaved", activation="gelu_tanh", out_dtype="fp32")


def of_groups(a, b, offsets):
    return grouped_gemm(a, b, offsets, alpha=2.0)


def in_place(a, b, residual):
    sum_ = residual.clone()
    product = gemm(a, b, residual=sum_, out=sum_)
    return product, sum_ * 2


def of_images(x, w):
    return conv2d(x, w, padding=(1, 0, 1, 2), stride=(2, 1), layout="nchw", activation="relu") * 2


def of_pixels(x, w):
    return conv2d(x, w, groups=2)


def of_rows(x, w):
    return conv1d(x, w, padding=1, layout="ncl", out_dtype="fp32")


def of_windows(q, k):
    return attention(q, k, k, causal=True, window=(4, None), softcap=20.0, return_lse=True)


def of_sequences(q, k, starts):
    return attention(q, k, k, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=5, max_seqlen_k=5, scale=0.3)


def of_one_config(q, k):
    return attention(q, k, k, config=AttentionConfig(16, 16, num_warps=2))


def of_sums(x, residual):
    return rmsnorm(x, residual=residual, return_residual=True, eps=1e-5)


def of_row_scales(x):
    return rmsnorm(x, out_dtype="int8", out_scale="row", weight_offset=1.0)


def in_place_sums(x, residual):
    x, residual = x + 0, residual + 0
    out, total = rmsnorm(x, residual=residual, out=x, residual_out=residual)
    return out, total, residual + 1


CALLS = [
    (of_one_epilogue, (randn(8, 32), randn(32, 16), randn(16), randn(8, 16))),
    (of_configs, (randn(8, 64), randn(64, 16))),
    (of_fp8, (randn(8, 32), randn(16, 32).T, torch.tensor([0.5]))),
    (of_pairs, (randn(2, 3, 8, 32), randn(3, 32, 16))),
    (of_groups, (randn(9, 32), randn(2, 32, 16), ints(0, 4, 9))),
    (in_place, (randn(8, 32), randn(32, 16), randn(8, 16))),
    (of_images, (randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last), randn(16, 8, 3, 3))),
    (of_pixels, (randn(2, 5, 5, 8), randn(6, 1, 1, 4))),
    (of_rows, (randn(2, 8, 9), randn(16, 8, 3))),
    (of_windows, (randn(2, 4, 5, 16), randn(2, 2, 9, 16))),
    (of_sequences, (randn(9, 4, 16), randn(9, 2, 16), ints(0, 4, 9))),
    (of_one_config, (randn(1, 2, 5, 16), randn(1, 2, 9, 16))),
    (of_sums, (randn(3, 64), randn(3, 64, dtype=torch.float32))),
    (of_row_scales, (randn(3, 64),)),
    (in_place_sums, (randn(3, 64), randn(3, 64))),
]
"""Functions of tensors, and tensors for them in host memory."""

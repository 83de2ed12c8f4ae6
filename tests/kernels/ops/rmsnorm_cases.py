"""How the fused RMSNorm is called on a problem's arrays, and held to its reference: what its tests share."""

from __future__ import annotations

import numpy as np

from tests.kernels.calls import rmsnorm_outs as outs_for
from tests.kernels.calls import run_rmsnorm as run
from tests.kernels.conformance import assert_close, check
from tilewright.kernels import RmsNormConfig, RmsNormProblem
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM

LLAMA = RmsNormProblem(M=4096, N=4096, weight="fp16", residual="fp16", residual_out=True)

WALKS = (None, RmsNormConfig(2, 16, num_stages=2))
"""Configurations that hold rows of up to a few hundred in registers, and one that walks along them."""

RESULTS = {
    "same": {},
    **{kind: {"out_dtype": kind} for kind in ("fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2")},
    **{f"{kind}/scale": {"out_dtype": kind, "out_scale": True} for kind in ("int8", "fp8e4m3", "fp8e5m2")},
    **{f"{kind}/row": {"out_dtype": kind, "row_scale": True} for kind in ("int8", "fp8e4m3", "fp8e5m2")},
}


def conforms(problem, config=None, seed=0):
    check(RMSNORM, problem, lambda arrays, outs: run(problem, arrays, outs, config), outs_for(problem), seed=seed)


def random_array(shape, kind="fp32", seed=0):
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return values.astype(DTYPES[kind].numpy)


def norm(x, eps=1e-6):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def near(result, expected, relative=1e-5):
    assert_close(result, np.asarray(expected, np.float64), Tolerance(relative, 1e-6))

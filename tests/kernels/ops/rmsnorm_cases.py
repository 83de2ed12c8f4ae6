"""How the fused RMSNorm is called on a problem's arrays, and held to its reference: what its tests share."""

from __future__ import annotations

import numpy as np

from tests.kernels.conformance import Guarded, assert_close, check
from tilewright.kernels import RmsNormConfig, rmsnorm
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM

WALKS = (None, RmsNormConfig(2, 16, num_stages=2))
"""Configurations that hold rows of up to a few hundred in registers, and one that walks along them."""

RESULTS = {
    "same": {},
    **{kind: {"out_dtype": kind} for kind in ("fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2")},
    **{f"{kind}/scale": {"out_dtype": kind, "out_scale": True} for kind in ("int8", "fp8e4m3", "fp8e5m2")},
    **{f"{kind}/row": {"out_dtype": kind, "row_scale": True} for kind in ("int8", "fp8e4m3", "fp8e5m2")},
}


def run(problem, arrays, outs, config=None):
    """The public function on a problem's arrays."""
    out_scale = float(arrays["out_scale"][0]) if "out_scale" in arrays else None
    return rmsnorm(
        arrays["x"],
        arrays.get("weight"),
        residual=arrays.get("residual"),
        out_dtype=problem.out_dtype,
        out_scale="row" if problem.row_scale else out_scale,
        out=outs.get("out"),
        residual_out=outs.get("residual_out"),
        return_residual=problem.residual_out,
        row_scale=outs["row_scale"][:, None] if "row_scale" in outs else None,
        config=config,
    )


def outs_for(problem):
    """Where a problem's results go: laid out and aligned like its inputs."""
    gap = 0
    if problem.strided:
        gap = -problem.N % 16 + 16 if problem.aligned else 1
    offset = 0 if problem.aligned else 1
    return {
        name: Guarded(output.shape, output.dtype, gap=0 if name == "row_scale" else gap, offset=offset)
        for name, output in problem.outputs().items()
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

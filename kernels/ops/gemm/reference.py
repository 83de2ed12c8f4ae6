"""The fused GEMM in float64, and how near a result must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.kernels.epilogue import epilogue_reference, rounded
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.gemm.packing import unpack_int4
from tilewright.kernels.ops.gemm.problem import GemmProblem

Array = np.ndarray[Any, Any]


def reference(problem: GemmProblem, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """`out` in float64, from the very values the kernel is given."""
    b = weights(problem, arrays)
    a = arrays["a"].astype(np.float64)
    scales, bias = [arrays[name] for name in ("a_scale", "b_scale") if name in arrays], arrays.get("bias")
    if problem.a_scale == "row":
        scales[0] = scales[0][..., None]
    if problem.b_scale == "group":
        scales.pop()
    if bias is not None and problem.bias_axis == "m":
        bias = bias[:, None]
    if problem.groups:
        offsets = arrays["offsets"]
        of_row = np.repeat(np.arange(problem.groups), np.diff(offsets))
        x = np.concatenate([a[0, offsets[g] : offsets[g + 1]] @ b[g] for g in range(problem.groups)])[None]
        if problem.b_scale == "column":
            scales[-1] = scales[-1][of_row]
        if bias is not None and problem.bias_axis == "n":
            bias = bias[of_row]
    else:
        x = a @ b
    residual = arrays.get("residual")
    y = epilogue_reference(problem, x, arrays, scales=scales, bias=bias, residual=residual, gated=problem.gated)
    # Of two broadcast operands there is one result, repeated.
    return {"out": np.broadcast_to(y, problem.outputs()["out"].shape)}


def weights(problem: GemmProblem, arrays: Mapping[str, Array]) -> Array:
    """B in float64, (matrices, K, N): unpacked, less its zero points, and with the scales of its groups."""
    b = arrays["b"]
    if problem.b_dtype == "int4":
        b = unpack_int4(b, problem.K)
    wide = b.astype(np.float64)
    group_of = np.arange(problem.K) // (problem.group_size or problem.K)
    if problem.b_zero:
        wide -= arrays["b_zero"].astype(np.float64)[..., group_of, :]
    elif problem.b_dtype == "int4":
        wide -= 8
    if problem.b_scale == "group":
        wide *= arrays["b_scale"].astype(np.float64)[..., group_of, :]
    return wide


_TF32_ROUNDOFF = 2.0**-10  # Triton cuts operands off at 10 mantissa bits; it does not round them


def tolerance(problem: GemmProblem) -> dict[str, Tolerance]:
    """The sum's own error, and the rounding of the result.

    Each of K products of size about 1/√K carries a relative error u (the fp32 sum's 2^-24; tf32 cuts off both operands,
    2·2^-10), and independent errors grow with √K: u·√K·(1/√K)·c. An fp32 sum taken in order also rounds each partial
    result of size up to 1, which adds √K·2^-24. fp8 products are exact, but sm_90 adds up to 128 of them with 14 bits:
    four additions of size √(128/K), each rounded at 2^-13, in K/128 chunks are 2·2^-13 whatever K is. Products with
    int8 and int4 weights are exact too, and sums of int8 altogether; scales and bias round four times. c = 8 covers the
    largest of 10^6 results (about 5 standard deviations).
    """
    product = 2 * _TF32_ROUNDOFF if problem.precision == "tf32" else 2.0**-24
    if problem.dtype.startswith("fp8"):
        product = 2.0**-12
    added = 4.0 if problem.dtype == "int8" else math.sqrt(problem.K)
    if problem.a_scale or problem.b_scale:
        added += 4.0
    return {"out": rounded(problem, 8 * (product + added * 2.0**-24), gated=problem.gated is not None)}

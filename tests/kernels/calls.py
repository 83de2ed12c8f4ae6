"""How a problem's arrays become a call of the op's public function: what the interpreter's tests and the GPU's share.

The arrays are NumPy's or any library's that indexes as NumPy does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.kernels.conformance import Guarded
from tilewright.kernels import attention, conv2d, gemm, grouped_gemm, rmsnorm
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.ops.attention.problem import SOFTCAP

Arrays = Mapping[str, Any]


def call(problem: Any, arrays: Arrays, outs: Arrays | None = None, config: Any = None) -> dict[str, Any]:
    """Runs the op on a problem's inputs, into `outs` or new arrays; gives every output by name."""
    given = dict(outs or {})
    if problem.op == "attention":
        results = run_attention(problem, arrays, given, config)
    elif problem.op == "rmsnorm":
        results = run_rmsnorm(problem, arrays, given, config)
    else:
        results = {"gemm": run_gemm, "conv2d": run_conv2d}[problem.op](problem, arrays, given.get("out"), config)
    named = results if isinstance(results, tuple) else (results,)
    return dict(zip(problem.outputs(), named, strict=True))


def outs_for(problem: Any) -> dict[str, Guarded]:
    """Where a problem's results go: guarded, laid out and aligned like its inputs."""
    return {"gemm": gemm_outs, "conv2d": conv2d_outs, "attention": attention_outs, "rmsnorm": rmsnorm_outs}[problem.op](
        problem
    )


# GEMM


def run_gemm(problem: Any, arrays: Arrays, out: Any = None, config: Any = None) -> Any:
    """The public function on a problem's arrays."""
    options = {name: arrays.get(name) for name in ("a_scale", "b_scale", "b_zero", "bias", "residual")}
    options |= {name: float(arrays[name][0]) for name in ("alpha", "out_scale") if name in arrays}
    options |= {name: getattr(problem, name) for name in ("bias_axis", "activation", "gated", "precision", "out_dtype")}
    options["residual_last"] = problem.residual_last
    options |= {"group_size": problem.group_size or None, "out": out, "config": config}
    a = arrays["a"]
    if problem.groups:
        for name in ("residual", "out"):
            options[name] = None if options[name] is None else options[name][0]
        if problem.a_scale == "row":
            options["a_scale"] = options["a_scale"][0]
        return grouped_gemm(a[0], arrays["b"], arrays["offsets"], **options)
    if problem.a_broadcast and problem.b_broadcast:
        # Else nothing says how long the batch is.
        a = np.broadcast_to(a, (problem.batch, *a.shape[1:]))
    return gemm(a, arrays["b"], **options)


def gemm_outs(problem: Any) -> dict[str, Guarded]:
    gap = 0
    if problem.strided:
        gap = -problem.columns_out % 16 + 16 if problem.end_aligned else 1
    return Guarded.of(problem, gap=gap, offset=0 if problem.end_aligned else 1)


# Convolution


def run_conv2d(problem: Any, arrays: Arrays, out: Any = None, config: Any = None) -> Any:
    """The public function on a problem's arrays."""
    return conv2d(
        arrays["x"],
        arrays["w"],
        **{name: arrays.get(name) for name in ("x_scale", "w_scale", "bias", "residual", "out_scale")},
        alpha=arrays.get("alpha", 1.0),
        activation=problem.activation,
        residual_last=problem.residual_last,
        stride=(problem.stride_h, problem.stride_w),
        padding=(problem.pad_top, problem.pad_left, problem.pad_bottom, problem.pad_right),
        dilation=(problem.dilation_h, problem.dilation_w),
        groups=problem.groups,
        layout=problem.layout,
        precision=problem.precision,
        out_dtype=problem.out_dtype,
        out=out,
        config=config,
    )


def conv2d_outs(problem: Any) -> dict[str, Guarded]:
    return Guarded.of(problem, offset=0 if problem.aligned else 1)


# Attention


def run_attention(problem: Any, arrays: Arrays, outs: Arrays, config: Any = None, **options: Any) -> Any:
    """The public function on a problem's arrays."""
    if problem.varlen:
        options["max_seqlen_q"] = problem.Sq
        if not problem.page_size:
            options["max_seqlen_k"] = problem.Skv
    return attention(
        **{name: array for name, array in arrays.items() if name not in ("places",)},
        causal=problem.causal,
        window=(problem.window_left, problem.window_right),
        softcap=SOFTCAP if problem.softcap else None,
        return_lse=problem.lse,
        out_dtype=problem.out_dtype,
        **outs,
        config=config,
        **options,
    )


def attention_outs(problem: Any) -> dict[str, Guarded]:
    outs = {}
    for name, output in problem.outputs().items():
        shape, offset, gap = output.shape, 0 if problem.aligned else 1, 0
        if name == "out" and problem.strided:
            vector = 16 // np.dtype(DTYPES[output.dtype].numpy).itemsize
            gap = vector if problem.aligned else 1
        tokens_first = problem.strided and not problem.varlen and name == "out"
        if tokens_first:
            shape = (shape[0], shape[2], shape[1], shape[3])
        outs[name] = Guarded(shape, output.dtype, gap=gap, offset=offset)
        if tokens_first:
            outs[name].array = outs[name].array.swapaxes(1, 2)
    return outs


# RMSNorm


def run_rmsnorm(problem: Any, arrays: Arrays, outs: Arrays, config: Any = None) -> Any:
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


def rmsnorm_outs(problem: Any) -> dict[str, Guarded]:
    gap = 0
    if problem.strided:
        gap = -problem.N % 16 + 16 if problem.aligned else 1
    offset = 0 if problem.aligned else 1
    return {
        name: Guarded(output.shape, output.dtype, gap=0 if name == "row_scale" else gap, offset=offset)
        for name, output in problem.outputs().items()
    }

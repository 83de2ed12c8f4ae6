"""A case of every plugin with every data type that it takes: all its inputs, small, and dynamic where they may be."""

from __future__ import annotations

from typing import Any

from tests.kernels.tensorrt.lives import Job
from tilewright.kernels import AttentionProblem, Conv2dProblem, GemmProblem, RmsNormProblem
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.tensorrt.catalogue import plugins
from tilewright.kernels.tensorrt.operation import PluginVariant

ROWS = [1, 64, 300]
LENGTH = [2, 64, 300]


def jobs() -> dict[str, Job]:
    """The jobs, by plugin and data type."""
    made = {"FusedGemm": _gemm, "FusedConv2d": _conv2d, "FusedAttention": _attention, "FusedRmsNorm": _rmsnorm}
    dtypes = ("fp16", "bf16", "fp32", "int8", "fp8e4m3")
    found = {}
    for name, variant in plugins().items():
        for dtype in dtypes:
            job = made[variant.operation.title](variant, dtype)
            if job is not None:
                found[f"{name} {dtype}"] = job
    return found


def kernel_of(job: Job) -> Kernel[Any, Any]:
    return plugins()[job.plugin].operation.kernel


def _result(dtype: str, optional: tuple[str, ...], scaled: bool) -> str | None:
    """The result's data type; None where the op has none for these."""
    if "out_scale" in optional:
        return None if dtype == "int8" and not scaled else "fp8e4m3" if dtype == "fp8e4m3" else "int8"
    if dtype == "int8":
        # The bare sums, or what scales make of them; nothing else is added to integers.
        return "bf16" if scaled else None if optional else "int32"
    return "bf16" if dtype == "fp8e4m3" else dtype


def _float(dtype: str) -> str:
    return dtype if dtype in ("fp16", "bf16", "fp32") else "bf16"


def _job(
    variant: PluginVariant, arrays: dict[str, tuple[Any, str]], problem: Any, sizes: Any, **attributes: Any
) -> Job:
    inputs = [arrays[name] for name in variant.inputs]
    constants = (("SCALE", 1 / 8),) if variant.operation.title == "FusedAttention" else ()
    return Job(variant.name, inputs, problem, sizes, attributes, constants=constants)


def _gemm(variant: PluginVariant, dtype: str) -> Job | None:
    optional = variant.optional
    weights = "b_zero" in optional
    if weights and dtype not in ("fp16", "bf16"):
        return None  # zero points are for int8 and int4 weights under these
    out = _result(dtype, optional, bool({"a_scale", "b_scale"} & set(optional)))
    if out is None:
        return None
    other = _float(dtype)
    b_dtype = "int8" if weights else dtype
    arrays = {
        "a": ((ROWS, 128), dtype),
        "b": ((128, 96), b_dtype),
        "a_scale": ((1,), "fp32"),
        "b_scale": (((2, 96) if weights else (96,)), "fp32"),
        "b_zero": ((2, 96), "int8"),
        "bias": ((96,), other),
        "residual": ((ROWS, 96), other),
        "out_scale": ((1,), "fp32"),
    }
    fields: dict[str, Any] = {"N": 96, "K": 128, "dtype": dtype, "out_dtype": out, "b_dtype": b_dtype}
    fields |= {"a_scale": "tensor"} if "a_scale" in optional else {}
    fields |= {"b_scale": "group" if weights else "column"} if "b_scale" in optional else {}
    fields |= {"b_zero": True, "group_size": 64} if weights else {}
    fields |= {name: other for name in ("bias", "residual") if name in optional}
    fields |= {"out_scale": "out_scale" in optional}
    count = 2 if "residual" in optional else 1
    sizes = [(m,) * count for m in (1, 64, 77, 300)]
    attributes = {"out_dtype": out, "group_size": 64 if weights else 0}
    return _job(variant, arrays, lambda m, *_: GemmProblem(M=m, **fields), sizes, **attributes)


def _conv2d(variant: PluginVariant, dtype: str) -> Job | None:
    optional = variant.optional
    out = _result(dtype, optional, bool({"x_scale", "w_scale"} & set(optional)))
    if out is None:
        return None
    other = _float(dtype)
    batch = [1, 2, 9]
    arrays = {
        "x": ((batch, 8, 10, 10), dtype),
        "w": ((24, 8, 3, 3), dtype),
        "bias": ((24,), other),
        "residual": ((batch, 24, 8, 8), other),
        "x_scale": ((1,), "fp32"),
        "w_scale": ((24,), "fp32"),
        "out_scale": ((), "fp32"),
    }
    fields: dict[str, Any] = {"H": 10, "W": 10, "C": 8, "K": 24, "R": 3, "S": 3, "dtype": dtype, "out_dtype": out}
    fields |= {"layout": "nchw", "w_layout": "kcrs", "x_scale": "x_scale" in optional}
    fields |= {"w_scale": "channel"} if "w_scale" in optional else {}
    fields |= {name: other for name in ("bias", "residual") if name in optional}
    fields |= {"out_scale": "out_scale" in optional}
    count = 2 if "residual" in optional else 1
    sizes = [(n,) * count for n in (1, 2, 9)]
    return _job(variant, arrays, lambda n, *_: Conv2dProblem(N=n, **fields), sizes, out_dtype=out)


def _attention(variant: PluginVariant, dtype: str) -> Job | None:
    optional = variant.optional
    if dtype == "int8" or ("q_scale" in optional and dtype != "fp8e4m3"):
        return None  # scales are fp8's
    arrays = {
        **{name: ((2, heads, LENGTH, 64), dtype) for name, heads in (("q", 4), ("k", 2), ("v", 2))},
        "bias": ((1, 4, LENGTH, LENGTH), _float(dtype)),
        "alibi_slopes": ((4,), "fp32"),
        "sinks": ((4,), "fp32"),
        **{f"{name}_scale": ((1,), "fp32") for name in "qkv"},
        "kv_lens": ((2,), "int32"),
    }
    fields: dict[str, Any] = {"B": 2, "H": 4, "Hkv": 2, "D": 64, "dtype": dtype, "causal": True}
    fields |= {"bias": _float(dtype), "bias_heads": True} if "bias" in optional else {}
    fields |= {"alibi": "alibi_slopes" in optional, "sinks": "sinks" in optional, "scales": "q_scale" in optional}
    fields |= {"kv_lens": "kv_lens" in optional}
    count = 5 if "bias" in optional else 3
    sizes = [(s,) * count for s in (2, 64, 300)]
    return _job(variant, arrays, lambda q, k, *_: AttentionProblem(Sq=q, Skv=k, **fields), sizes, causal=1)


def _rmsnorm(variant: PluginVariant, dtype: str) -> Job | None:
    optional = variant.optional
    if dtype in ("int8", "fp8e4m3"):
        return None
    arrays = {
        "x": ((ROWS, 256), dtype),
        "residual": ((ROWS, 256), "fp32"),
        "weight": ((256,), "bf16"),
        "out_scale": ((1,), "fp32"),
    }
    out = "int8" if "out_scale" in optional else dtype
    fields: dict[str, Any] = {"N": 256, "dtype": dtype, "out_dtype": out, "out_scale": "out_scale" in optional}
    fields |= {"residual": "fp32", "residual_out": True} if "residual" in optional else {}
    fields |= {"weight": "bf16"} if "weight" in optional else {}
    count = 2 if "residual" in optional else 1
    sizes = [(m,) * count for m in (1, 64, 300)]
    return _job(variant, arrays, lambda m, *_: RmsNormProblem(M=m, **fields), sizes, out_dtype=out)

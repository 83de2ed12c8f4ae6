"""Cases of every op and data type, for the contract: small, with and without a dynamic dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.kernels.tensorrt.lives import Job
from tilewright.kernels import AttentionProblem, Conv2dProblem, GemmProblem, RmsNormProblem

BATCH = [1, 4, 32]
ROWS = [1, 128, 1000]


def gemm(dtype: str, through: str = "c++") -> Job:
    """A layer with a dynamic number of rows; what is quantised has its scales."""
    inputs: list[tuple[Any, str]] = [((ROWS, 128), dtype), ((128, 192), dtype)]
    plugin, fields = "FusedGemmBias", {"dtype": dtype, "bias": dtype, "activation": "gelu_tanh"}
    out = {"fp8e4m3": "bf16", "int8": "fp16"}.get(dtype, dtype)
    if dtype in ("int8", "fp8e4m3"):
        plugin = "FusedGemmAScaleBScaleBias"
        inputs += [((1,), "fp32"), ((192,), "fp32")]
        fields |= {"a_scale": "tensor", "b_scale": "column", "out_dtype": out}
    fields["bias"] = out
    inputs.append(((192,), out))
    return Job(
        plugin,
        inputs,
        lambda m: GemmProblem(M=m, N=192, K=128, **fields),
        sizes=((1,), (128,), (129,), (1000,)),
        attributes={"activation": "gelu_tanh", "out_dtype": out if plugin != "FusedGemmBias" else "default"},
        through=through,
    )


def weights(packed: bool, through: str = "c++") -> Job:
    """Weights of 8 or 4 bits under fp16, in groups."""
    fields: dict[str, Any] = {"b_dtype": "int4" if packed else "int8", "b_scale": "group", "group_size": 64}
    return Job(
        "FusedGemmBScale",
        [((ROWS, 128), "fp16"), ((64 if packed else 128, 192), "int8"), ((2, 192), "fp16")],
        lambda m: GemmProblem(M=m, N=192, K=128, b_scale_dtype="fp16", **fields),
        sizes=((1,), (128,), (1000,)),
        attributes={"group_size": 64, "weights": "int4" if packed else "none"},
        through=through,
    )


def conv2d(dtype: str, through: str = "c++") -> Job:
    """A 3×3 layer with a dynamic batch, in both memory layouts."""
    inputs: list[tuple[Any, str]] = [((BATCH, 32, 14, 14), dtype), ((64, 32, 3, 3), dtype)]
    out = {"fp8e4m3": "bf16", "int8": "fp16"}.get(dtype, dtype)
    quantised = dtype in ("int8", "fp8e4m3")
    inputs.append(((64,), out))
    fields: dict[str, Any] = {"dtype": dtype, "bias": out, "activation": "relu", "layout": "nchw", "w_layout": "kcrs"}
    plugin = "FusedConv2dBias"
    if quantised:
        plugin = "FusedConv2dBiasXScaleWScale"
        inputs += [((1,), "fp32"), ((64,), "fp32")]
        fields |= {"x_scale": True, "w_scale": "channel", "out_dtype": out}
    last = {"fp32": "HWC", "fp16": "HWC8", "bf16": "HWC8", "int8": "HWC16", "fp8e4m3": "HWC16"}
    pads = {f"pad_{side}": 1 for side in ("top", "left", "bottom", "right")}
    middle = ("LINEAR",) * (len(inputs) - 1)
    return Job(
        plugin,
        inputs,
        lambda n: Conv2dProblem(N=n, H=14, W=14, C=32, K=64, R=3, S=3, **pads, **fields),
        sizes=((1,), (4,), (7,), (32,)),
        attributes={"activation": "relu", **pads, **({"out_dtype": out} if quantised else {})},
        formats=[(last[dtype], *middle, last[out])],
        through=through,
    )


def attention(dtype: str, through: str = "c++") -> Job:
    """Causal attention with shared key heads and a dynamic length."""
    length = [1, 64, 500]
    inputs: list[tuple[Any, str]] = [((2, heads, length, 64), dtype) for heads in (4, 2, 2)]
    scales = dtype == "fp8e4m3"
    inputs += [((1,), "fp32")] * 3 if scales else []
    return Job(
        "FusedAttentionScales" if scales else "FusedAttention",
        inputs,
        lambda q, k, v: AttentionProblem(B=2, H=4, Hkv=2, Sq=q, Skv=k, D=64, dtype=dtype, causal=True, scales=scales),
        sizes=((1, 1, 1), (64, 64, 64), (65, 65, 65), (500, 500, 500)),
        attributes={"causal": 1},
        constants=(("SCALE", 1 / 8),),
        through=through,
    )


def rmsnorm(dtype: str, through: str = "c++") -> Job:
    """With residual and weight, and its sum as a second result."""
    return Job(
        "FusedRmsNormResidualWeight",
        [((BATCH, 7, 512), dtype), ((BATCH, 7, 512), dtype), ((512,), dtype)],
        lambda x, residual: RmsNormProblem(
            M=7 * x, N=512, dtype=dtype, residual=dtype, weight=dtype, residual_out=True
        ),
        sizes=((1, 1), (4, 4), (32, 32)),
        through=through,
    )


def static() -> list[Job]:
    """Layers of one image, one token and one large product, all sizes of which are known."""
    pads = {f"pad_{side}": 1 for side in ("top", "left", "bottom", "right")}
    layer = Conv2dProblem(N=1, H=7, W=7, C=512, K=512, R=3, S=3, **pads, layout="nchw", w_layout="kcrs")
    keys = ((1, 8, 4096, 128), "fp16")
    token = AttentionProblem(B=1, H=32, Hkv=8, Sq=1, Skv=4096, D=128)
    return [
        Job(
            "FusedConv2d",
            [((1, 512, 7, 7), "fp16"), ((512, 512, 3, 3), "fp16")],
            lambda: layer,
            sizes=((),),
            attributes=pads,
            formats=[("HWC8", "LINEAR", "HWC8")],
        ),
        Job(
            "FusedAttention",
            [((1, 32, 1, 128), "fp16"), keys, keys],
            lambda: token,
            sizes=((),),
            constants=(("SCALE", 128**-0.5),),
        ),
        Job(
            "FusedGemm",
            [((4096, 4096), "fp16"), ((4096, 4096), "fp16")],
            lambda: GemmProblem(4096, 4096, 4096),
            sizes=((),),
        ),
    ]


DTYPES: dict[str, tuple[Callable[..., Job], tuple[str, ...]]] = {
    "gemm": (gemm, ("fp16", "bf16", "fp32", "int8", "fp8e4m3")),
    "conv2d": (conv2d, ("fp16", "bf16", "fp32", "int8", "fp8e4m3")),
    "attention": (attention, ("fp16", "bf16", "fp32", "fp8e4m3")),
    "rmsnorm": (rmsnorm, ("fp16", "bf16", "fp32")),
}


def every(arch: int) -> list[Job]:
    """Every op with every data type that the arch has."""
    return [make(dtype) for make, dtypes in DTYPES.values() for dtype in dtypes if dtype != "fp8e4m3" or arch >= 89] + [
        weights(packed) for packed in (False, True)
    ]


def some(arch: int) -> list[Job]:
    """Every op, with a data type that changes from arch to arch."""
    turn = (80, 86, 89, 90, 120).index(arch)
    chosen = []
    for make, dtypes in DTYPES.values():
        fitting = [dtype for dtype in dtypes if dtype != "fp8e4m3" or arch >= 89]
        # sm_89 and sm_120 show fp8, which the others lack or show elsewhere.
        dtype = fitting[-1] if arch in (89, 120) else fitting[turn % len(fitting)]
        chosen.append(make(dtype, "python" if turn % 2 else "c++"))
    return chosen

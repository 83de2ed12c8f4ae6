"""What the fused convolution can do, a small problem for each."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.kernel import Variant
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import Conv2dConfig

PADDED: dict[str, Any] = {"pad_top": 1, "pad_left": 1, "pad_bottom": 1, "pad_right": 1}
TAPS: dict[str, Any] = {"N": 2, "H": 6, "W": 7, "C": 32, "K": 32, "R": 3, "S": 3, **PADDED}
WISE: dict[str, Any] = {**TAPS, "groups": 32}
INT8: dict[str, Any] = {**TAPS, "dtype": "int8"}

FEATURES: dict[str, Conv2dProblem | Variant[Conv2dProblem, Conv2dConfig]] = {
    # data types
    "fp16": Conv2dProblem(**TAPS),
    "bf16": Conv2dProblem(**TAPS, dtype="bf16"),
    "fp32, IEEE": Conv2dProblem(**TAPS, dtype="fp32"),
    "fp32, tf32": Conv2dProblem(**TAPS, dtype="fp32", precision="tf32"),
    "fp8e4m3": Conv2dProblem(**TAPS, dtype="fp8e4m3"),
    "fp8e5m2": Conv2dProblem(**TAPS, dtype="fp8e5m2"),
    "int8 to int32": Conv2dProblem(**INT8),
    "int8, scales by tensor and channel": Conv2dProblem(**INT8, x_scale=True, w_scale="channel", bias="fp32"),
    "int8 to int8": Conv2dProblem(
        **INT8, x_scale=True, w_scale="channel", out_dtype="int8", out_scale=True, activation="relu"
    ),
    # layouts
    "NHWC": Conv2dProblem(**TAPS, bias="fp16"),
    "NCHW": Conv2dProblem(**TAPS, layout="nchw", bias="fp16"),
    "NHWC with weights (K, C, R, S)": Conv2dProblem(**TAPS, w_layout="kcrs"),
    "unaligned arrays": Conv2dProblem(N=1, H=5, W=5, C=7, K=9, R=3, S=3, **PADDED, aligned=False),
    # forms
    "stride": Conv2dProblem(**TAPS, stride_h=2, stride_w=3),
    "asymmetric padding": Conv2dProblem(N=1, H=6, W=7, C=32, K=32, R=3, S=3, pad_top=2, pad_right=1),
    "dilation": Conv2dProblem(**TAPS, dilation_h=2, dilation_w=3),
    "groups": Conv2dProblem(**TAPS, groups=2),
    "depthwise, NHWC": Conv2dProblem(**WISE, bias="fp16", activation="clamp:0:6"),
    "depthwise, NCHW": Conv2dProblem(**WISE, layout="nchw"),
    "depthwise, no padding": Conv2dProblem(N=2, H=10, W=10, C=32, K=32, R=3, S=3, groups=32),
    "depthwise, two filters a channel": Conv2dProblem(**{**WISE, "K": 64}),
    "depthwise, rows of pixels": Variant(
        Conv2dProblem(**WISE, bias="fp16"), Conv2dConfig(16, 32, ROWS=4, num_stages=1)
    ),
    "depthwise, int8": Conv2dProblem(**WISE, dtype="int8", x_scale=True, w_scale="channel"),
    "three channels": Conv2dProblem(N=1, H=9, W=9, C=3, K=32, R=7, S=7, stride_h=2, stride_w=2, **PADDED),
    "1×1": Conv2dProblem(N=2, H=5, W=5, C=32, K=48, R=1, S=1, bias="fp16"),
    "1×1, NCHW": Conv2dProblem(N=2, H=4, W=8, C=32, K=48, R=1, S=1, layout="nchw", bias="fp16"),
    "1-D": Conv2dProblem(N=2, H=1, W=19, C=32, K=32, R=1, S=3, pad_left=1, pad_right=1),
    "split depth, deterministic": Variant(Conv2dProblem(**TAPS), Conv2dConfig(32, 32, 32, SPLIT_K=3)),
    # The form of loop that was reported to be miscompiled: on a GPU this line is what shows that ours is not.
    "eight warps": Variant(Conv2dProblem(**TAPS), Conv2dConfig(64, 32, 32, num_warps=8)),
    "eight warps, folded": Variant(Conv2dProblem(**TAPS), Conv2dConfig(64, 32, 32, FOLD=True, num_warps=8)),
    # epilogue
    "alpha, bias, residual, activation": Conv2dProblem(
        **TAPS, alpha=True, bias="fp32", residual="fp16", activation="silu"
    ),
    "residual behind the activation": Conv2dProblem(
        **TAPS, bias="fp16", residual="fp16", residual_last=True, activation="silu"
    ),
    "fp8e4m3 result": Conv2dProblem(**TAPS, out_dtype="fp8e4m3", out_scale=True),
}

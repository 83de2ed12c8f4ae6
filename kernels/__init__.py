"""Fused GPU kernels that know their best configuration.

    from tilewright.kernels import attention, conv2d, gemm
    y = gemm(x, w, bias=b, activation="gelu")

The ops are for inference: none has a backward pass. Their pages in docs/ have every argument, problem field and
configuration field.

Importing this loads Triton and NumPy, and no GPU library. CuPy is loaded by the first array that lives on a GPU, and by
`resolve_device`, which looks for the device among this machine's GPUs.
"""

from __future__ import annotations

from tilewright.kernels.call_log import Call, called
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.lookup import Choice, choose
from tilewright.kernels.ops.attention.api import attention
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import AttentionConfig
from tilewright.kernels.ops.conv2d.api import conv1d, conv2d
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import Conv2dConfig
from tilewright.kernels.ops.gemm.api import gemm
from tilewright.kernels.ops.gemm.grouped import grouped_gemm
from tilewright.kernels.ops.gemm.packing import pack_int4, unpack_int4
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.ops.rmsnorm.api import rmsnorm
from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.kernels.ops.rmsnorm.space import RmsNormConfig
from tilewright.kernels.prediction import Prediction, predict
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuning_db.errors import (
    CompileError,
    IllegalConfigError,
    LaunchError,
    MissingDependencyError,
    NotPackedError,
    PackError,
    ProblemError,
    RunError,
    TilewrightError,
    UnknownDeviceError,
    UnknownKernelError,
    UnsupportedError,
    UnsupportedProblemError,
    UsageError,
)

__all__ = [
    "gemm",
    "grouped_gemm",
    "pack_int4",
    "unpack_int4",
    "conv2d",
    "conv1d",
    "attention",
    "rmsnorm",
    "GemmProblem",
    "GemmConfig",
    "Conv2dProblem",
    "Conv2dConfig",
    "AttentionProblem",
    "AttentionConfig",
    "RmsNormProblem",
    "RmsNormConfig",
    "KERNELS",
    "find_kernel",
    "Device",
    "resolve_device",
    "Choice",
    "choose",
    "Call",
    "called",
    "forget_plans",
    "Prediction",
    "predict",
    "TilewrightError",
    "UsageError",
    "UnknownDeviceError",
    "UnknownKernelError",
    "ProblemError",
    "UnsupportedError",
    "UnsupportedProblemError",
    "IllegalConfigError",
    "PackError",
    "NotPackedError",
    "MissingDependencyError",
    "RunError",
    "CompileError",
    "LaunchError",
]


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

"""Fused GPU kernels that know their best configuration.

    from tilewright.kernels import gemm
    y = gemm(x, w, bias=b, activation="gelu")

Importing this loads Triton and NumPy, and no GPU library: CuPy is loaded by the first array that lives on a GPU.
"""

from __future__ import annotations

from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import Choice, choose
from tilewright.kernels.ops.gemm.api import gemm
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.prediction import Prediction, predict
from tilewright.kernels.registry import KERNELS, find_kernel

__all__ = [
    "gemm",
    "GemmProblem",
    "GemmConfig",
    "KERNELS",
    "find_kernel",
    "Device",
    "resolve_device",
    "Choice",
    "choose",
    "Prediction",
    "predict",
]

"""The kernels there are."""

from __future__ import annotations

from typing import Any

from tilewright.kernels.kernel import Kernel
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.rmsnorm.launch import RMSNORM
from tilewright.tuning_db.errors import UnknownKernelError, UsageError
from tilewright.tuning_db.text import did_you_mean, shown

KERNELS: tuple[Kernel[Any, Any], ...] = (GEMM, CONV2D, ATTENTION, RMSNORM)


def find_kernel(name: str) -> Kernel[Any, Any]:
    """The kernel of an op's name.

    Raises:
        UnknownKernelError: there is none; the message names the nearest.
        UsageError: what is no text can't be one.
    """
    if not isinstance(name, str):
        raise UsageError(f"{name=} must be the name of an op: {', '.join(kernel.name for kernel in KERNELS)}")
    by_name = {kernel.name: kernel for kernel in KERNELS}
    if name in by_name:
        return by_name[name]
    raise UnknownKernelError(f"unknown op {shown(name)}{did_you_mean(name, by_name)} (ops: {', '.join(by_name)})")

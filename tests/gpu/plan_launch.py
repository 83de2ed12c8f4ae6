"""Launch plans on a GPU: loaded and launched through the driver, as TensorRT does it."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.kernels.problem import Problem
from tilewright.kernels.tensorrt.expressions import Sizes
from tilewright.kernels.tensorrt.plans import LaunchPlan

GUARD = 4096
"""Bytes behind every output that must stay as they are."""

POISON = 0xA5


class LoadedPlan:
    """A plan's kernel, compiled from its PTX by the driver."""

    def __init__(self, cupy: Any, plan: LaunchPlan) -> None:
        from cupy_backends.cuda.api import driver

        self.plan, self._driver = plan, driver
        self._module = cupy.cuda.Module()
        self._module.load(plan.ptx.encode())
        self._function = driver.moduleGetFunction(self._module.ptr, plan.name)
        if plan.shared_bytes > 48 * 1024:
            attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(self._function, attribute, plan.shared_bytes)

    def launch(self, addresses: Mapping[str, int], sizes: Sizes, stream: int = 0) -> None:
        """Input addresses, int32 scalars, output addresses, and nothing else."""
        plan = self.plan
        values: list[Any] = [ctypes.c_uint64(addresses[name]) for name in plan.inputs]
        values += [ctypes.c_int32(value) for value in plan.scalars_at(sizes)]
        values += [ctypes.c_uint64(addresses[name]) for name in plan.outputs]
        parameters = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        x, y, z = plan.grid_at(sizes)
        self._driver.launchKernel(
            self._function, x, y, z, plan.threads, 1, 1, plan.shared_bytes, stream, ctypes.addressof(parameters), 0
        )


class Arrays:
    """A problem's arrays in device memory, each as it lies in the host's, and poisoned outputs with a guard behind."""

    def __init__(self, cupy: Any, problem: Problem, seed: int = 0) -> None:
        self._cupy, self.problem = cupy, problem
        self.host = problem.inputs(seed)
        self._device = {name: cupy.asarray(in_memory(array)) for name, array in self.host.items()}
        self._sizes = {}
        for name, output in problem.outputs().items():
            self._sizes[name] = int(np.prod(output.shape)) * self._numpy(name).itemsize
            self._device[name] = cupy.full(self._sizes[name] + GUARD, POISON, np.uint8)

    def _numpy(self, name: str) -> np.dtype[Any]:
        from tilewright.kernels.dtypes import dtype

        return np.dtype(dtype(self.problem.outputs()[name].dtype).numpy)

    @property
    def addresses(self) -> dict[str, int]:
        return {name: int(array.data.ptr) for name, array in self._device.items()}

    def results(self) -> dict[str, np.ndarray[Any, Any]]:
        """The outputs, once all is done.

        Raises:
            AssertionError: something was written behind one.
        """
        self._cupy.cuda.runtime.deviceSynchronize()
        found = {}
        for name, size in self._sizes.items():
            stored = self._cupy.asnumpy(self._device[name])
            assert (stored[size:] == POISON).all(), f"written behind {name}"
            found[name] = stored[:size].view(self._numpy(name)).reshape(self.problem.outputs()[name].shape)
        return found


def in_memory(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bytes of an array without gaps, in the order in which they lie in memory."""
    axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
    stored = np.ascontiguousarray(array.transpose(axes))
    return stored.reshape(-1).view(np.uint8)

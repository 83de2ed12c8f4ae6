"""A GPU that is not there: CuPy's driver calls do nothing, and arrays are shapes with an address.

For measuring and rehearsing what the processor does up to the driver call. Nothing is computed, so nothing that runs on
it says anything about a kernel.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from tilewright.kernels import arrays, dispatch, runtime
from tilewright.kernels.device import Device


class SimulatedArray:
    """What of a `cupy.ndarray` a launch looks at."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float16, address: int = 1 << 20) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.itemsize = self.dtype.itemsize
        self.size = int(np.prod(shape))
        steps = np.cumprod((1, *reversed(shape[1:])))[::-1] * self.itemsize
        self.strides = tuple(int(step) for step in steps)
        self.data = SimpleNamespace(ptr=address, device_id=0)
        self.device = _Nothing()


# `kind_of` goes by the module of an array's type.
SimulatedArray.__module__ = "cupy.simulated"


class _Nothing:
    """A context manager, module, stream and device that does nothing."""

    ptr = 1
    __hash__ = None  # type: ignore[assignment] # as CuPy's devices

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load(self, cubin: bytes) -> None:
        """As `cupy.cuda.Module.load`."""

    def synchronize(self) -> None:
        """As `cupy.cuda.Stream.synchronize`."""


class SimulatedDriver(ModuleType):
    """`cupy_backends.cuda.api.driver`; counts launches and keeps the last one's arguments."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
    CUDADriverError = RuntimeError

    def __init__(self) -> None:
        super().__init__("driver")
        self.launches = 0

    def moduleGetFunction(self, module: int, name: str) -> int:  # noqa: N802
        """An address."""
        return 1

    def funcSetAttribute(self, function: int, attribute: int, value: int) -> None:  # noqa: N802
        """Nothing."""

    def launchKernel(self, *arguments: int) -> None:  # noqa: N802
        """Nothing but a count."""
        self.launches += 1


@contextmanager
def simulated_gpu(board: Device) -> Iterator[SimulatedDriver]:
    """`board` as `cuda:0` of this process, without its driver."""
    driver = SimulatedDriver()
    stream = SimpleNamespace(ptr=0)
    cupy = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=_Nothing,
            Module=_Nothing,
            Stream=_Nothing,
            get_current_stream=lambda *_: stream,
            runtime=SimpleNamespace(getDevice=lambda: 0, getDeviceCount=lambda: 1),
        ),
        zeros=lambda size, dtype: SimulatedArray((size,), dtype),
        empty=functools.cache(SimulatedArray),  # an allocator whose pool always has one
        asarray=lambda array: SimulatedArray(array.shape, array.dtype),
    )
    api = ModuleType("cupy_backends.cuda.api")
    api.driver = driver  # type: ignore[attr-defined]
    modules = {"cupy_backends.cuda.api": api, "cupy_backends.cuda.api.driver": driver}
    with (
        mock.patch.object(runtime, "require_cupy", return_value=cupy),
        mock.patch.object(arrays, "require_cupy", return_value=cupy),
        mock.patch.object(dispatch, "_device", return_value=replace(board, live="cuda:0")),
        mock.patch.dict(sys.modules, modules),
    ):
        yield driver

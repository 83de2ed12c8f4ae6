"""Running a configuration: a `Plan` is a problem's launches, loaded once and launched at little cost.

On a GPU the cubin is loaded through CuPy and launched on the caller's stream; NumPy arrays go to Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.kernels.arrays import require_cupy
from tilewright.kernels.compile import HIDDEN_POINTERS, Binary, compile_launch, over_limits
from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.interpreter import interpret
from tilewright.kernels.kernel import Launch, Scratch
from tilewright.tuning_db.errors import LaunchError, UnsupportedError

DEFAULT_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory a kernel may use without asking the driver for more (CUDA C++ Programming Guide)."""


HIDDEN_SCRATCH = "descriptors"
"""Name of the scratch memory that Triton itself asks for."""


class Plan(ABC):
    """The launches of one problem with one configuration, ready to run. Safe to share between threads."""

    @abstractmethod
    def run(self, pointers: Mapping[str, Any], strides: Mapping[str, int], stream: int) -> None:
        """Puts the launches on a stream, in order, and returns without waiting.

        `pointers` are addresses (arrays, for the interpreter) by argument name, `strides` the scalars that only the
        arrays decide.
        """


INTERPRETED_SMS = 3
"""SMs that the interpreter has for kernels whose blocks walk over tiles: few, so that in small tests they do walk."""


PLAIN = (("PAIRS", False), ("WARP_SPECIALIZE", False))
"""Constexprs in the interpreter, which has no inline PTX: the plain form of the code, whose values are the same."""


class InterpretedPlan(Plan):
    """Runs on NumPy arrays, in this process, at once."""

    def __init__(self, launches: tuple[Launch, ...]) -> None:
        self._launches = tuple(launch.on(INTERPRETED_SMS).with_constants(PLAIN) for launch in launches)

    def run(self, pointers: Mapping[str, Any], strides: Mapping[str, int], stream: int) -> None:
        # Scratch of one name is one array for all launches of the plan: what one leaves there the next one reads.
        lent: dict[str, Any] = {}
        for launch in self._launches:
            for scratch in launch.scratch:
                if f"{scratch.name}_ptr" not in lent:
                    lent[f"{scratch.name}_ptr"] = np.zeros(scratch.elements, scratch.numpy)
            arguments: dict[str, Any] = {}
            for argument in launch.arguments:
                if argument.type is None:
                    arguments[argument.name] = None
                elif argument.is_pointer:
                    arguments[argument.name] = lent[argument.name] if argument.name in lent else pointers[argument.name]
                else:
                    value = strides.get(argument.name, argument.value)
                    assert value is not None, argument.name
                    arguments[argument.name] = value
            interpret(launch.fn, launch.grid, {**arguments, **dict(launch.constexprs)})


_plan_lock = threading.Lock()


class GpuPlan(Plan):
    """Loaded on one GPU."""

    def __init__(
        self,
        launches: tuple[Launch, ...],
        device: Device,
        ordinal: int,
        binaries: tuple[Binary, ...] | None = None,
    ) -> None:
        """Compiles, unless the launches' `binaries` are given, and loads.

        Raises:
            UnsupportedError: the code takes more than the device has, or spills.
            CompileError, LaunchError: the compiler or the driver refused it.
        """
        self._loaded = []
        for index, launch in enumerate(each.on(device.sms) for each in launches):
            binary = compile_launch(launch, device.arch) if binaries is None else binaries[index]
            limit = over_limits(binary.resources, device, binary.num_warps)
            if limit is not None:
                raise UnsupportedError(f"this configuration can't run on {device.board}: {limit}")
            self._loaded.append(_LoadedLaunch(launch, binary, ordinal))

    def run(self, pointers: Mapping[str, Any], strides: Mapping[str, int], stream: int) -> None:
        if len(self._loaded) == 1:
            self._loaded[0].launch(pointers, strides, stream)
            return
        # What one launch leaves in scratch memory the next one reads: nobody else's may come between on this stream.
        with _plan_lock:
            for loaded in self._loaded:
                loaded.launch(pointers, strides, stream)


class _LoadedLaunch:
    """One launch with its parameter block laid out: a call writes addresses into it and hands it to the driver."""

    def __init__(self, launch: Launch, binary: Binary, ordinal: int) -> None:
        cupy = require_cupy()
        from cupy_backends.cuda.api import driver

        self._cupy, self._driver, self._ordinal = cupy, driver, ordinal
        self._grid = launch.grid
        self._block = binary.num_warps * WARP_SIZE
        self._shared = binary.shared_bytes
        self._scratch = launch.scratch
        if binary.scratch_bytes:
            # Where tensor descriptors are made: every block has a place of its own behind the first hidden pointer.
            blocks = math.prod(launch.grid)
            self._scratch += (Scratch(HIDDEN_SCRATCH, "int8", blocks * binary.scratch_bytes),)
        with cupy.cuda.Device(ordinal):
            try:
                self._module = cupy.cuda.Module()
                self._module.load(binary.cubin)
                self._function = driver.moduleGetFunction(self._module.ptr, binary.name)
                if binary.shared_bytes > DEFAULT_SHARED_BYTES:
                    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(self._function, attribute, binary.shared_bytes)
            except driver.CUDADriverError as error:
                raise LaunchError(f"the driver refused {binary.name} for sm_{binary.arch}: {error}") from error
        present = [argument for argument in launch.arguments if argument.type is not None]
        # The hidden scratch pointers stay null, but for the first where the kernel uses it.
        self._slots = (ctypes.c_uint64 * (len(present) + HIDDEN_POINTERS))()
        base, size = ctypes.addressof(self._slots), ctypes.sizeof(ctypes.c_uint64)
        addresses = [base + size * index for index in range(len(self._slots))]
        self._parameters = (ctypes.c_void_p * len(addresses))(*addresses)
        self._parameters_address = ctypes.addressof(self._parameters)
        lent = {f"{scratch.name}_ptr" for scratch in launch.scratch}
        self._pointers = [
            (index, argument.name)
            for index, argument in enumerate(present)
            if argument.is_pointer and argument.name not in lent
        ]
        self._lent = [(index, argument.name) for index, argument in enumerate(present) if argument.name in lent]
        if binary.scratch_bytes:
            self._lent.append((len(present), f"{HIDDEN_SCRATCH}_ptr"))
        self._strides = []
        for index, argument in enumerate(present):
            if not argument.is_pointer:
                if argument.value is None:
                    self._strides.append((index, argument.name))
                else:
                    self._slots[index] = argument.value
        # Two threads may share a plan; the driver copies the block before launchKernel returns.
        self._lock = threading.Lock()

    def launch(self, pointers: Mapping[str, int], strides: Mapping[str, int], stream: int) -> None:
        slots = self._slots
        with self._lock:
            for index, name in self._pointers:
                slots[index] = pointers[name]
            if self._strides:
                for index, name in self._strides:
                    slots[index] = strides[name]
            if self._lent:
                lent = _lend(self._cupy, self._scratch, self._ordinal, stream)
                for index, name in self._lent:
                    slots[index] = lent[name]
            if self._cupy.cuda.runtime.getDevice() == self._ordinal:
                self._start(stream)
            else:
                with self._cupy.cuda.Device(self._ordinal):
                    self._start(stream)

    def _start(self, stream: int) -> None:
        x, y, z = self._grid
        try:
            self._driver.launchKernel(
                self._function, x, y, z, self._block, 1, 1, self._shared, stream, self._parameters_address, 0
            )
        except self._driver.CUDADriverError as error:
            raise LaunchError(f"launch of {x}×{y}×{z} blocks of {self._block} threads failed: {error}") from error


# Scratch lives as long as the process: a captured CUDA graph may replay into it. Streams never share it, for two
# launches on one stream run in order and two streams don't. Graphs captured on one stream do share it, and must not be
# replayed at the same time (docs/gemm.md).
_scratch: dict[tuple[int, int, int, str], Any] = {}
_scratch_lock = threading.Lock()

PER_THREAD_STREAM = 2
"""cudaStreamPerThread: one address, and another stream in every thread."""


def _lend(cupy: Any, wanted: tuple[Scratch, ...], ordinal: int, stream: int) -> dict[str, int]:
    lent = {}
    thread = threading.get_ident() if stream == PER_THREAD_STREAM else 0
    for scratch in wanted:
        key = (ordinal, stream, thread, scratch.numpy + scratch.name)
        array = _scratch.get(key)
        if array is None or array.size < scratch.elements:
            with _scratch_lock:
                array = _scratch.get(key)  # as it is now: another thread may have been here
                if array is not None and array.size >= scratch.elements:
                    lent[f"{scratch.name}_ptr"] = int(array.data.ptr)
                    continue
                # The smaller one is kept alive by whatever graph holds its address, through this list.
                if array is not None:
                    _retired.append(array)
                size = max(scratch.elements, 2 * array.size if array is not None else 0)
                array = _scratch[key] = _zeros(cupy, size, scratch.numpy, ordinal)
        lent[f"{scratch.name}_ptr"] = int(array.data.ptr)
    return lent


_retired: list[Any] = []


def _zeros(cupy: Any, size: int, dtype: str, ordinal: int) -> Any:
    """An array that is zero on return, for any stream: memset on one of its own, so that a capture on the caller's
    doesn't take the zeroing into its graph."""
    with cupy.cuda.Device(ordinal), cupy.cuda.Stream(non_blocking=True) as own:
        array = cupy.zeros(size, dtype)
        own.synchronize()
    return array

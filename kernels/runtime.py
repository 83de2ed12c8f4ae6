"""Running a configuration: a `Plan` is a problem's launches, loaded once and launched at little cost.

On a GPU the cubin is loaded through CuPy and launched on the caller's stream; NumPy arrays go to Triton's interpreter.
"""

from __future__ import annotations

import ctypes
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from tilewright.kernels.arrays import require_cupy
from tilewright.kernels.compile import HIDDEN_POINTERS, Binary, compile_launch, over_limits
from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.interpreter import interpret
from tilewright.kernels.kernel import Argument, Launch, Scratch
from tilewright.tuning_db.errors import LaunchError, UnsupportedError

DEFAULT_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory a kernel may use without asking the driver for more (CUDA C++ Programming Guide)."""


HIDDEN_SCRATCH = "descriptors"
"""Name of the scratch memory that Triton itself asks for."""


Run = Callable[[Sequence[Any], int], None]
"""Puts a plan's launches on a stream, in order, and returns without waiting: of addresses (arrays, for the interpreter)
and the stream. Safe to share between threads."""


class Plan(ABC):
    """The launches of one problem with one configuration, ready to run. Safe to share between threads."""

    @abstractmethod
    def bind(self, names: Sequence[str], strides: Mapping[str, int]) -> Run:
        """The plan as it runs for arrays that come in the order of these argument names, of which it may lack some;
        `strides` are the scalars that only the arrays decide.

        Raises:
            KeyError: an argument is not among them; the interpreter says so when it runs.
            UnsupportedError: a number is not one that its argument's type has; likewise.
        """

    def run(self, pointers: Mapping[str, Any], strides: Mapping[str, int], stream: int) -> None:
        """Runs once, on addresses (arrays) by argument name. Who runs often binds once."""
        self.bind(tuple(pointers), strides)(tuple(pointers.values()), stream)


def _number(argument: Argument, strides: Mapping[str, int]) -> int:
    """The value of a scalar. The driver would cut off what its type doesn't hold, and the interpreter widen the type.

    Raises:
        KeyError: it is left to the arrays, and not among `strides`.
        UnsupportedError: its type doesn't have it.
    """
    value = strides[argument.name] if argument.value is None else argument.value
    assert argument.type is not None
    half = 1 << int(argument.type.removeprefix("i")) - 1
    if not -half <= value < half:
        raise UnsupportedError(f"{argument.name}={value} does not fit in {argument.type}")
    return value


INTERPRETED_SMS = 3
"""SMs that the interpreter has for kernels whose blocks walk over tiles: few, so that in small tests they do walk."""


PLAIN = (("PAIRS", False), ("WARP_SPECIALIZE", False))
"""Constexprs in the interpreter, which has no inline PTX: the plain form of the code, whose values are the same."""


class InterpretedPlan(Plan):
    """Runs on NumPy arrays, in this process, at once."""

    def __init__(self, launches: tuple[Launch, ...]) -> None:
        self._launches = tuple(launch.on(INTERPRETED_SMS).with_constants(PLAIN) for launch in launches)

    def bind(self, names: Sequence[str], strides: Mapping[str, int]) -> Run:
        return lambda arrays, stream: self._interpret(dict(zip(names, arrays, strict=True)), strides)

    def _interpret(self, pointers: Mapping[str, Any], strides: Mapping[str, int]) -> None:
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
                    arguments[argument.name] = _number(argument, strides)
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
        *,
        lasting: bool = False,
    ) -> None:
        """Compiles, unless the launches' `binaries` are given, and loads.

        The code leaves the GPU with the last plan that has it, or `lasting` never: a captured CUDA graph may launch it.

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
            self._loaded.append(_LoadedLaunch(launch, binary, ordinal, _code_of(binary, ordinal)))
        if lasting:
            _lasting.update(loaded.code for loaded in self._loaded)

    def bind(self, names: Sequence[str], strides: Mapping[str, int]) -> Run:
        launches = [loaded.bind(names, strides) for loaded in self._loaded]
        if len(launches) == 1:
            return launches[0]

        def run(addresses: Sequence[int], stream: int) -> None:
            # What one launch leaves in scratch memory the next one reads: nobody else's may come between on this
            # stream.
            with _plan_lock:
                for launch in launches:
                    launch(addresses, stream)

        return run


class _Code:
    """A kernel on one GPU."""

    def __init__(self, binary: Binary, ordinal: int) -> None:
        cupy = require_cupy()
        from cupy_backends.cuda.api import driver

        with cupy.cuda.Device(ordinal):
            try:
                self._module = cupy.cuda.Module()  # which unloads it when it goes
                self._module.load(binary.cubin)
                self.function = driver.moduleGetFunction(self._module.ptr, binary.name)
                if binary.shared_bytes > DEFAULT_SHARED_BYTES:
                    attribute = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    driver.funcSetAttribute(self.function, attribute, binary.shared_bytes)
            except driver.CUDADriverError as error:
                raise LaunchError(f"the driver refused {binary.name} for sm_{binary.arch}: {error}") from error


_loading = threading.Lock()
_code: WeakValueDictionary[tuple[int, str, int, bytes], _Code] = WeakValueDictionary()
_lasting: set[_Code] = set()


def _code_of(binary: Binary, ordinal: int) -> _Code:
    """The kernel on that GPU, loaded once for all plans: problems of many sizes have the same code."""
    key = (ordinal, binary.name, binary.shared_bytes, binary.cubin)
    with _loading:
        code = _code.get(key)
        if code is None:
            code = _code[key] = _Code(binary, ordinal)
        return code


class _LoadedLaunch:
    """One launch, its code on the GPU."""

    def __init__(self, launch: Launch, binary: Binary, ordinal: int, code: _Code) -> None:
        cupy = require_cupy()
        from cupy_backends.cuda.api import driver

        self.cupy, self.ordinal = cupy, ordinal
        self.driver_error = driver.CUDADriverError
        self.code = code
        self.grid = launch.grid
        self.block = binary.num_warps * WARP_SIZE
        self.arguments = [argument for argument in launch.arguments if argument.type is not None]
        self.scratch = launch.scratch
        if binary.scratch_bytes:
            # Where tensor descriptors are made: every block has a place of its own behind the first hidden pointer.
            blocks = math.prod(launch.grid)
            self.scratch += (Scratch(HIDDEN_SCRATCH, "int8", blocks * binary.scratch_bytes),)
        # The hidden scratch pointers stay null, but for the first where the kernel uses it.
        self.hidden = [
            f"{HIDDEN_SCRATCH}_ptr" if binary.scratch_bytes and index == 0 else "" for index in range(HIDDEN_POINTERS)
        ]
        # Of the stream, the address of the parameters, and 0.
        self.start = partial(driver.launchKernel, code.function, *self.grid, self.block, 1, 1, binary.shared_bytes)

    def bind(self, names: Sequence[str], strides: Mapping[str, int]) -> Run:
        """As `Plan.bind`."""
        return _BoundLaunch(self, names, strides).launch


class _BoundLaunch:
    """One launch with its parameters laid out: a call writes addresses into a block of them and hands it to the driver.

    In a block's slots come first the addresses in the order of calls, then those of scratch memory, so that each are
    written in one go, then the numbers. The driver reads them through a table in the kernel's order.
    """

    def __init__(self, loaded: _LoadedLaunch, names: Sequence[str], strides: Mapping[str, int]) -> None:
        self._loaded = loaded  # keeps the code on the GPU
        self._cupy, self._ordinal, self.start = loaded.cupy, loaded.ordinal, loaded.start
        self._current_device = loaded.cupy.cuda.runtime.getDevice
        self._scratch = loaded.scratch
        lent = [f"{scratch.name}_ptr" for scratch in loaded.scratch]
        slots = {name: index for index, name in enumerate((*names, *lent))}
        self._given, self._filled = len(names), len(names) + len(lent)
        self._numbers: list[int] = []
        self._order: list[int] = []  # of the slots, as the kernel has its parameters
        for argument in loaded.arguments:
            if argument.is_pointer:
                self._order.append(slots[argument.name])
            else:
                self._order.append(self._filled + len(self._numbers))
                self._numbers.append(_number(argument, strides))
        for name in loaded.hidden:
            self._order.append(slots[name] if name else self._filled + len(self._numbers))
        self._numbers.append(0)
        # Two threads may share a plan: each launch has a block of its own while it writes and the driver copies, which
        # it has done when it returns. Taking from a list and giving back are atomic, and a quarter of a lock's time.
        self._blocks = [self._block()]

    def _block(self) -> tuple[Any, Any, int]:
        """Slots, the table of their addresses, and its address."""
        slots: Any = (ctypes.c_uint64 * (self._filled + len(self._numbers)))()
        slots[self._filled :] = self._numbers
        base, size = ctypes.addressof(slots), ctypes.sizeof(ctypes.c_uint64)
        table = (ctypes.c_void_p * len(self._order))(*(base + size * index for index in self._order))
        return slots, table, ctypes.addressof(table)

    def launch(self, addresses: Sequence[int], stream: int) -> None:
        """Puts the launch on a stream."""
        try:
            block = self._blocks.pop()
        except IndexError:
            block = self._block()
        slots, _, table = block
        slots[: self._given] = addresses
        if self._scratch:
            slots[self._given : self._filled] = _lend(self._cupy, self._scratch, self._ordinal, stream)
        try:
            if self._current_device() == self._ordinal:
                self.start(stream, table, 0)
            else:
                with self._cupy.cuda.Device(self._ordinal):
                    self.start(stream, table, 0)
        except self._loaded.driver_error as error:
            (x, y, z), threads = self._loaded.grid, self._loaded.block
            raise LaunchError(f"launch of {x}×{y}×{z} blocks of {threads} threads failed: {error}") from error
        self._blocks.append(block)


# Scratch lives as long as the process: a captured CUDA graph may replay into it. Streams never share it, for two
# launches on one stream run in order and two streams don't. Graphs captured on one stream do share it, and must not be
# replayed at the same time (docs/gemm.md).
_scratch: dict[tuple[int, int, int, str], Any] = {}
_scratch_lock = threading.Lock()

PER_THREAD_STREAM = 2
"""cudaStreamPerThread: one address, and another stream in every thread."""


def _lend(cupy: Any, wanted: tuple[Scratch, ...], ordinal: int, stream: int) -> list[int]:
    """The address of each."""
    lent = []
    thread = threading.get_ident() if stream == PER_THREAD_STREAM else 0
    for scratch in wanted:
        key = (ordinal, stream, thread, scratch.numpy + scratch.name)
        array = _scratch.get(key)
        if array is None or array.size < scratch.elements:
            with _scratch_lock:
                array = _scratch.get(key)  # as it is now: another thread may have been here
                if array is None or array.size < scratch.elements:
                    # The smaller one is kept alive by whatever graph holds its address, through this list.
                    if array is not None:
                        _retired.append(array)
                    size = max(scratch.elements, 2 * array.size if array is not None else 0)
                    array = _scratch[key] = _zeros(cupy, size, scratch.numpy, ordinal)
        lent.append(int(array.data.ptr))
    return lent


_retired: list[Any] = []


def _zeros(cupy: Any, size: int, dtype: str, ordinal: int) -> Any:
    """An array that is zero on return, for any stream: memset on one of its own, so that a capture on the caller's
    doesn't take the zeroing into its graph."""
    with cupy.cuda.Device(ordinal), cupy.cuda.Stream(non_blocking=True) as own:
        array = cupy.zeros(size, dtype)
        own.synchronize()
    return array

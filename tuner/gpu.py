"""The GPU as the measurements use it: memory as raw bytes, one stream, events, graphs.

CuPy is used for its bindings alone. None of its kernels is compiled, so neither NVRTC nor cuRAND has to be installed,
and data types that CuPy lacks need no detour.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import triton
import triton.language as tl

from tilewright.kernels.arrays import require_cupy
from tilewright.kernels.compile import compile_launch
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Argument, Launch
from tilewright.kernels.runtime import GpuPlan, Plan
from tilewright.tuner.timing import MAX_SAMPLES, Sampler, flush_bytes, replay_launches, warm_up
from tilewright.tuning_db.record import Resources

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

FLUSH_BLOCK = 4096
"""int32 elements that one program of the flush reads: eight 16-byte loads a thread."""


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(buffer_ptr, out_ptr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads a buffer of zeros. The compiler can't know that it holds no sum of 1, so the loads stay."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if tl.sum(tl.load(buffer_ptr + offsets)) == 1:
        tl.store(out_ptr, 1)


def resources_of(launches: Sequence[Launch], arch: int) -> Resources:
    """What the compiled launches take: of several, the most of each resource."""
    found = [compile_launch(launch, arch).resources for launch in launches]
    return Resources(
        registers=max(each.registers for each in found),
        spill_bytes=max(each.spill_bytes for each in found),
        stack_bytes=max(each.stack_bytes for each in found),
        shared_bytes=max(each.shared_bytes for each in found),
    )


class Gpu:
    """One GPU of this machine. For one thread, and one of these in a process.

    Every method may raise one of `errors`; after a fault in a kernel they all do, until the process ends.
    """

    def __init__(self, ordinal: int) -> None:
        """Takes the GPU into use.

        Raises:
            MissingDependencyError, UnknownDeviceError: it is not there.
        """
        self.device = resolve_device(f"cuda:{ordinal}")
        self._cupy = require_cupy()
        from cupy_backends.cuda.api import driver, runtime

        self._runtime = runtime
        self.errors: tuple[type[Exception], ...] = (
            runtime.CUDARuntimeError,
            driver.CUDADriverError,
            self._cupy.cuda.memory.OutOfMemoryError,
        )
        self._ordinal = ordinal
        self._cupy.cuda.Device(ordinal).use()
        self.address = str(runtime.deviceGetPCIBusId(ordinal))
        self._stream = self._cupy.cuda.Stream(non_blocking=True)
        self.stream = int(self._stream.ptr)
        self._events: list[tuple[Any, Any]] = []
        self._flush: Callable[[], None] | None = None
        self._flush_memory: tuple[Any, ...] = ()

    # Code

    def load(self, launches: tuple[Launch, ...]) -> Plan:
        """The launches compiled and loaded; raises as `GpuPlan`."""
        return GpuPlan(launches, self.device, self._ordinal)

    def resources(self, launches: tuple[Launch, ...]) -> Resources:
        """What they take, once they are compiled."""
        return resources_of(launches, self.device.arch)

    # Memory

    def allocate(self, nbytes: int) -> Any:
        """Device memory, aligned to 256 bytes; given back when the last reference goes."""
        return self._cupy.cuda.alloc(nbytes)

    def host_buffer(self, nbytes: int) -> Bytes:
        """Pinned host memory: transfers run at the bus's speed, five times that of pageable memory."""
        memory = self._cupy.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def fill(self, memory: Any, byte: int, nbytes: int) -> None:
        """Sets every byte; as everything here that moves memory, in order with what is on the stream."""
        self._runtime.memsetAsync(memory.ptr, byte, nbytes, self.stream)

    def upload(self, memory: Any, data: Bytes) -> None:
        """From host memory; the data may change again on return."""
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(memory.ptr, data.ctypes.data, data.nbytes, kind, self.stream)
        self.synchronize()

    def download(self, memory: Any, into: Bytes) -> None:
        """Into host memory; complete on return."""
        kind = self._runtime.memcpyDeviceToHost
        self._runtime.memcpyAsync(into.ctypes.data, memory.ptr, into.nbytes, kind, self.stream)
        self.synchronize()

    def copy(self, to: Any, source: Any, nbytes: int) -> None:
        """From device to device."""
        self._runtime.memcpyAsync(to.ptr, source.ptr, nbytes, self._runtime.memcpyDeviceToDevice, self.stream)

    def argument(self, memory: Any, offset: int, dtype: np.dtype[Any], elements: int) -> Any:
        """What a plan is given for an array that begins `offset` bytes into the memory: its address."""
        return memory.ptr + offset

    def release(self) -> None:
        """Gives freed memory back to the driver, where the next problem finds it in any size."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()

    # Running

    def synchronize(self) -> None:
        """Waits for the stream."""
        self._stream.synchronize()

    def alive(self) -> bool:
        """Whether work can go on: False after a fault in a kernel, which stays with the process."""
        try:
            self._runtime.deviceSynchronize()
        except self.errors:
            return False
        return True

    def cold_sampler(self, run: Callable[[int], Any], prepare: Callable[[], None] = lambda: None) -> Sampler:
        """Each sample one launch, `run(0)`, after a flush of L2; before that, and not timed, what `prepare` queues."""
        flush = self._flusher()
        while len(self._events) < MAX_SAMPLES:
            self._events.append((self._cupy.cuda.Event(), self._cupy.cuda.Event()))

        def sample(count: int) -> list[float]:
            for before, after in self._events[:count]:
                prepare()
                flush()
                before.record(self._stream)
                run(0)
                after.record(self._stream)
            return self._elapsed(count)

        return sample

    def replay_sampler(self, run: Callable[[int], Any], copies: int) -> Sampler:
        """Each sample the mean over one replay of a graph of launches on every copy, `run(0)` to `run(copies - 1)`."""
        # Eagerly first: nothing may allocate in a capture, and the length of a replay has to be judged at full clocks.
        cold = self.cold_sampler(run)
        warm_up([cold])
        launches = replay_launches(min(cold(3)), copies)
        replay = self.capture(run, launches, copies)

        def sample(count: int) -> list[float]:
            # One that is not counted keeps the GPU busy while the host, which takes its time over a large graph, queues
            # those that are.
            replay()
            for before, after in self._events[:count]:
                before.record(self._stream)
                replay()
                after.record(self._stream)
            return [time_us / launches for time_us in self._elapsed(count)]

        return sample

    def capture(self, run: Callable[[int], Any], launches: int, copies: int) -> Callable[[], None]:
        """A CUDA graph of so many launches, `run(0)` to `run(copies - 1)` in turn, as what queues a replay of it."""
        with self._stream:
            self._stream.begin_capture()
            try:
                for index in range(launches):
                    run(index % copies)
            finally:
                graph = self._stream.end_capture()
        return lambda: graph.launch(self._stream)

    def _elapsed(self, count: int) -> list[float]:
        self._events[count - 1][1].synchronize()
        return [1e3 * self._cupy.cuda.get_elapsed_time(*pair) for pair in self._events[:count]]

    def _flusher(self) -> Callable[[], None]:
        if self._flush is None:
            nbytes = flush_bytes(self.device.l2_bytes) // (4 * FLUSH_BLOCK) * 4 * FLUSH_BLOCK
            buffer, out = self.allocate(nbytes), self.allocate(4)
            self.fill(buffer, 0, nbytes)
            plan = self.load((flush_launch(nbytes),))
            self._flush_memory = (buffer, out)
            self._flush = partial(plan.bind(("buffer_ptr", "out_ptr"), {}), (buffer.ptr, out.ptr), self.stream)
        return self._flush

    # What the board says of itself

    def clocks(self) -> dict[str, Any]:
        """SM and memory clock (MHz), temperature (°C), power (W) and throttle reasons (NVML's bits) now; without NVML
        nothing."""
        found: dict[str, Any] = {}
        try:
            import pynvml
        except ImportError:
            return found
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(self.address.encode())
            found["sm_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)
            found["memory_mhz"] = pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)
            found["celsius"] = pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
            found["watt"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
            found["throttle"] = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        return found


def flush_launch(nbytes: int) -> Launch:
    """The launch that reads `nbytes`, a multiple of a program's share."""
    return Launch(
        fn=read_kernel,
        grid=(nbytes // (4 * FLUSH_BLOCK), 1, 1),
        arguments=(Argument("buffer_ptr", "*i32", aligned=True), Argument("out_ptr", "*i32", aligned=True)),
        constexprs=(("BLOCK", FLUSH_BLOCK),),
        num_warps=4,
        num_stages=1,
    )

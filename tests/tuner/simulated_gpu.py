"""A GPU that is not there: host memory, interpreted kernels, invented times, and faults on demand.

`Gpu`'s test double. `measure` runs on it unchanged, the correctness gate included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Launch
from tilewright.kernels.runtime import InterpretedPlan, Plan, Run
from tilewright.tuning_db.record import Resources


class CudaError(Exception):
    """Stands for CuPy's."""


class OutOfMemoryError(MemoryError):
    """Likewise."""


class SimulatedGpu:
    """An A100 with so small an L2 that replays of small problems rotate over a few copies.

    `fault` is what the next kernels do: "illegal address" (every later call fails, in this process), "endless kernel",
    "wrong result"; or "out of memory", which allocations do.
    """

    errors = (CudaError, OutOfMemoryError)
    stream = 0
    address = "0000:00:00.0"

    def __init__(self) -> None:
        self.device = replace(resolve_device("a100"), l2_bytes=4096)
        self.uploads = self.releases = self.allocated = 0
        self.limit = 1 << 40
        self.dead = self.hung = False
        self.fault = ""
        self.times_us: Iterator[float] = iter(lambda: 10.0, None)
        self.replace: Callable[[Launch], Launch] = lambda launch: launch
        self.refusal: Exception | None = None
        self.loads: list[tuple[Launch, ...]] = []
        self.copies: list[int] = []

    def load(self, launches: tuple[Launch, ...]) -> Plan:
        self._call()
        self.loads.append(launches)
        if self.refusal is not None:
            raise self.refusal
        return _Faulty(self, InterpretedPlan(tuple(self.replace(launch) for launch in launches)))

    def resources(self, launches: tuple[Launch, ...]) -> Resources:
        return Resources(64, 0, 0, 8192)

    def allocate(self, nbytes: int) -> Any:
        self._call()
        self.allocated += nbytes
        if self.allocated > self.limit or self.fault == "out of memory":
            raise OutOfMemoryError(f"Out of memory allocating {nbytes} bytes")
        memory = np.full(nbytes + 256, 0xA5, np.uint8)
        return memory[-memory.ctypes.data % 256 :][:nbytes]

    def host_buffer(self, nbytes: int) -> Any:
        return np.empty(nbytes, np.uint8)

    def fill(self, memory: Any, byte: int, nbytes: int) -> None:
        self._call()
        memory[:nbytes] = byte

    def upload(self, memory: Any, data: Any) -> None:
        self._call()
        self.uploads += 1
        memory[: data.size] = data

    def download(self, memory: Any, into: Any) -> None:
        self._call()
        into[:] = memory[: into.size]

    def copy(self, to: Any, source: Any, nbytes: int) -> None:
        self._call()
        to[:nbytes] = source[:nbytes]

    def argument(self, memory: Any, offset: int, dtype: np.dtype[Any], elements: int) -> Any:
        return memory[offset : offset + elements * dtype.itemsize].view(dtype)

    def release(self) -> None:
        self.releases += 1

    def alive(self) -> bool:
        return not self.dead

    def cold_sampler(self, run: Callable[[int], None], prepare: Callable[[], None] = lambda: None) -> Any:
        def sample(count: int) -> list[float]:
            for _ in range(count):
                prepare()
                run(0)
            return [time_us] * count

        time_us = next(self.times_us)
        return sample

    def replay_sampler(self, run: Callable[[int], None], copies: int) -> Any:
        self._call()
        for copy in range(copies):
            run(copy)
        self.copies.append(copies)
        time_us = next(self.times_us)
        return lambda count: [time_us] * count

    def clocks(self) -> dict[str, Any]:
        return {"sm_mhz": 1410}

    def _call(self) -> None:
        """What every call of the driver does after a kernel has gone wrong: launches return, and later ones tell."""
        while self.hung:
            time.sleep(60)
        if self.dead:
            raise CudaError("cudaErrorIllegalAddress: an illegal memory access was encountered")


class _Faulty(Plan):
    """A plan that does what `fault` says when it runs."""

    def __init__(self, gpu: SimulatedGpu, plan: Plan) -> None:
        self._gpu, self._plan = gpu, plan

    def bind(self, names: Sequence[str], strides: Mapping[str, int]) -> Run:
        bound = self._plan.bind(names, strides)

        def run(arrays: Sequence[Any], stream: int) -> None:
            self._gpu.dead |= self._gpu.fault == "illegal address"
            self._gpu.hung |= self._gpu.fault == "endless kernel"
            bound(arrays, stream)
            if self._gpu.fault == "wrong result":
                result = "out_ptr" if "out_ptr" in names else "x_ptr"  # of an op that overwrites its input
                arrays[names.index(result)][0] += 1

        return run

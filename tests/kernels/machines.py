"""Machines with the GPUs that a test wants, as CuPy's runtime describes them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from tilewright.kernels import live
from tilewright.kernels.catalogue import CATALOGUE

BOARDS = {device.board: device for device in CATALOGUE}


Reading = tuple[dict[str, Any], dict[str, int]]


# Per arch: shared memory per block (opt-in) and per SM, threads and blocks per SM, as drivers report them.
LIMITS = {80: (166912, 167936, 2048, 32), 86: (101376, 102400, 1536, 16), 90: (232448, 233472, 2048, 32)}


def reading(name: str, arch: int, *, sms: int, mhz: int, memory_mhz: int, bus: int, l2: int, memory: int) -> Reading:
    """What CuPy returns for a GPU."""
    per_block, per_sm, threads, blocks = LIMITS.get(arch, LIMITS[80])
    properties = {"name": name.encode(), "major": arch // 10, "minor": arch % 10, "totalGlobalMem": memory}
    attributes = {
        "MultiProcessorCount": sms,
        "MaxSharedMemoryPerBlockOptin": per_block,
        "MaxSharedMemoryPerMultiprocessor": per_sm,
        "MaxRegistersPerMultiprocessor": 65536,
        "MaxThreadsPerMultiProcessor": threads,
        "MaxBlocksPerMultiprocessor": blocks,
        "L2CacheSize": l2,
        "ClockRate": mhz * 1000,
        "MemoryClockRate": memory_mhz * 1000,
        "GlobalMemoryBusWidth": bus,
    }
    return properties, attributes


MIB = 2**20


RTX3090 = reading(
    "NVIDIA GeForce RTX 3090", 86, sms=82, mhz=1695, memory_mhz=9751, bus=384, l2=6 * MIB, memory=24268 * MIB
)


H200 = reading("NVIDIA H200", 90, sms=132, mhz=1980, memory_mhz=3201, bus=6144, l2=60 * MIB, memory=143156 * MIB)


A100_SLICE = reading(
    "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
    80,
    sms=42,
    mhz=1410,
    memory_mhz=1215,
    bus=2560,
    l2=20 * MIB,
    memory=20096 * MIB,
)


LAPTOP = reading(
    "NVIDIA GeForce RTX 3080 Laptop GPU",
    86,
    sms=48,
    mhz=1710,
    memory_mhz=7001,
    bus=256,
    l2=4 * MIB,
    memory=16125 * MIB,
)


RTX3060_8GB = reading(
    "NVIDIA GeForce RTX 3060", 86, sms=28, mhz=1777, memory_mhz=7501, bus=128, l2=2 * MIB, memory=8192 * MIB
)


RTX_A5000 = reading("NVIDIA RTX A5000", 86, sms=64, mhz=1695, memory_mhz=8001, bus=384, l2=6 * MIB, memory=24248 * MIB)


V100 = reading("Tesla V100-SXM2-16GB", 70, sms=80, mhz=1530, memory_mhz=877, bus=4096, l2=6 * MIB, memory=16160 * MIB)


class Runtime(ModuleType):
    """`cupy.cuda.runtime` of a machine with these GPUs."""

    def __init__(self, readings: list[Reading], error: str = "") -> None:
        super().__init__("cupy.cuda.runtime")
        self._readings, self._error = readings, error
        for name in live._ATTRIBUTES:
            setattr(self, f"cudaDevAttr{name}", name)

    def getDeviceCount(self) -> int:  # noqa: N802  # CuPy's name, like those below
        if self._error:
            raise RuntimeError(self._error)
        return len(self._readings)

    def getDeviceProperties(self, index: int) -> dict[str, Any]:  # noqa: N802
        return self._readings[index][0]

    def deviceGetAttribute(self, attribute: str, index: int) -> int:  # noqa: N802
        return self._readings[index][1][attribute]

    def driverGetVersion(self) -> int:  # noqa: N802
        if self._error:
            raise RuntimeError(self._error)
        return 12090

    def deviceGetPCIBusId(self, index: int) -> str:  # noqa: N802
        return f"0000:0{index}:00.0"


class Machine:
    """Replaces CuPy, and with it the GPUs that this process sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def has(self, *readings: Reading, error: str = "") -> None:
        cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
        cuda.runtime = Runtime(list(readings), error)  # type: ignore[attr-defined]
        cupy.cuda = cuda  # type: ignore[attr-defined]
        self._monkeypatch.setitem(sys.modules, "cupy", cupy)
        live.probe.cache_clear()

    def lacks_cupy(self) -> None:
        self._monkeypatch.setitem(sys.modules, "cupy", None)
        live.probe.cache_clear()

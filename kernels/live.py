"""The GPUs of this machine, as CuPy, NVML and the driver describe them; none where CuPy or the driver is missing.

Read once per process, and with the first question: importing this imports no CuPy.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS, normalise, supported_archs
from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.tuning_db.errors import UnknownDeviceError
from tilewright.tuning_db.text import one_line

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")

# A board's driver reports up to 9 % less than the nominal memory (ECC, reserved pages); boards that share name and SM
# count but not memory differ by a third and more (RTX 3060 with 12 and 8 GB).
_MEMORY_TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found of GPUs on this machine."""

    devices: tuple[Device, ...] = ()  # those that kernels can be tuned on, in CUDA's order
    skipped: Mapping[int, str] = field(default_factory=dict)  # CUDA index of each other one: why, in one line
    count: int = 0  # of both
    missing: str = ""  # what a live GPU needs and this machine lacks, in words


def live_devices() -> tuple[Device, ...]:
    """The GPUs of this machine that kernels can be tuned on, in CUDA's order; empty when there is none."""
    return probe().devices


def read_device(index: int, properties: Mapping[str, Any], attributes: Mapping[str, int]) -> Device:
    """The device that the driver describes.

    A GPU that the catalogue has, by name, SM count and memory, takes its rates, clock and bandwidth from there. Any
    other (a laptop part, a MIG slice, a new board) takes rates from a board of its arch, scaled by SMs x clock, and
    bandwidth from memory clock x bus width x 2, two transfers a clock. Limits are the driver's in both cases.

    Args:
        index: CUDA's index.
        properties: as `cupy.cuda.runtime.getDeviceProperties` returns them.
        attributes: `cudaDeviceGetAttribute` by attribute name without `cudaDevAttr`; clocks in kHz, 0 if unknown.

    Raises:
        UnknownDeviceError: the catalogue has no board of this arch to scale from.
    """
    raw_name = properties["name"]
    name = raw_name.decode() if isinstance(raw_name, bytes) else str(raw_name)
    arch = int(properties["major"]) * 10 + int(properties["minor"])
    if arch not in REFERENCE_BOARDS:
        raise UnknownDeviceError(f"cuda:{index} ({name}) is sm_{arch}; {supported_archs()}")

    sms = attributes["MultiProcessorCount"]
    memory_gib = properties["totalGlobalMem"] / 2**30
    known = next((device for device in CATALOGUE if _same_board(device, name, arch, sms, memory_gib)), None)
    base = known or _scaling_base(name, arch)
    device = replace(
        base,
        name=name,
        sms=sms,
        memory_gib=round(memory_gib, 2),
        l2_bytes=attributes["L2CacheSize"],
        shared_per_block=attributes["MaxSharedMemoryPerBlockOptin"],
        shared_per_sm=attributes["MaxSharedMemoryPerMultiprocessor"],
        registers_per_sm=attributes["MaxRegistersPerMultiprocessor"],
        warps_per_sm=attributes["MaxThreadsPerMultiProcessor"] // WARP_SIZE,
        blocks_per_sm=attributes["MaxBlocksPerMultiprocessor"],
        source=f"{base.source}; SMs, memory, L2 and limits read from the driver",
        live=f"cuda:{index}",
    )
    return device if known else _scaled(device, base, attributes)


def _same_board(device: Device, name: str, arch: int, sms: int, memory_gib: float) -> bool:
    return (
        device.arch == arch
        and device.sms == sms
        and normalise(device.name) == normalise(name)
        and abs(memory_gib / device.memory_gib - 1) < _MEMORY_TOLERANCE
    )


def _scaling_base(name: str, arch: int) -> Device:
    """The board to scale from: of the same arch and, if there is one, of the same tensor-core rate per SM and clock.

    GeForce boards accumulate in fp32 at half rate, others at full rate; among those left the reference board is best.
    """
    geforce = "geforce" in name.lower()
    return min(
        (device for device in CATALOGUE if device.arch == arch),
        key=lambda device: (("GeForce" in device.name) != geforce, device.board != REFERENCE_BOARDS[arch]),
    )


def _scaled(device: Device, base: Device, attributes: Mapping[str, int]) -> Device:
    """`device`, whose rates are still those of `base`, with its own."""
    mhz = round(attributes["ClockRate"] / 1000) or base.boost_mhz
    scale = device.sms * mhz / (base.sms * base.boost_mhz)
    memory_mhz, bus_bits = attributes["MemoryClockRate"] / 1000, attributes["GlobalMemoryBusWidth"]
    # MHz x bit / 8 is MB/s; x 2 for double data rate.
    bandwidth = round(memory_mhz * bus_bits * 2 / 8 / 1000, 1)
    bandwidth_source = f"bandwidth from memory clock x bus width x 2 ({memory_mhz:.0f} MHz x {bus_bits} bit x 2)"
    if not bandwidth:
        bandwidth = round(base.bandwidth_gbs * scale, 1)
        bandwidth_source = "bandwidth scaled likewise, for the driver reports no memory clock or bus width"
    return replace(
        device,
        board=_slug(device.name),
        boost_mhz=mhz,
        bandwidth_gbs=bandwidth,
        fp32_tflops=round(base.fp32_tflops * scale, 2),
        tensor_tflops={unit: round(rate * scale, 2) for unit, rate in base.tensor_tflops.items()},
        source=(
            f"rates scaled from {base.board} by SMs x clock ({device.sms} x {mhz} MHz against {base.sms} x "
            f"{base.boost_mhz} MHz); {bandwidth_source}; SMs, memory, L2, clocks and limits read from the driver"
        ),
        aliases=(),
    )


def _slug(name: str) -> str:
    """`NVIDIA A100-SXM4-40GB MIG 3g.20gb` as `a100-sxm4-40gb-mig-3g-20gb`, fit for a key and a file name."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


# `cudaDevAttr...` of the runtime. Clocks and bus width are asked for here because CUDA 13 dropped them from the device
# properties.
_ATTRIBUTES = (
    "MultiProcessorCount",
    "MaxSharedMemoryPerBlockOptin",
    "MaxSharedMemoryPerMultiprocessor",
    "MaxRegistersPerMultiprocessor",
    "MaxThreadsPerMultiProcessor",
    "MaxBlocksPerMultiprocessor",
    "L2CacheSize",
    "ClockRate",
    "MemoryClockRate",
    "GlobalMemoryBusWidth",
)


@functools.cache
def probe() -> Probe:
    """Looks for GPUs, once per process."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return Probe(missing=f"CuPy, whose import fails: {one_line(error)}")
        return Probe(
            missing='CuPy, which is not installed: pip install "tilewright[cuda13]" (or [cuda12], by your driver)'
        )
    except (ImportError, OSError, RuntimeError) as error:
        return Probe(missing=f"CuPy, whose import fails: {one_line(error)}")
    try:
        runtime = cupy.cuda.runtime
        count = int(runtime.getDeviceCount())
    except RuntimeError as error:
        return Probe(missing=f"an NVIDIA GPU and its driver: {one_line(error)}")
    if not count:
        return Probe(missing="a GPU: the driver shows none")

    devices: list[Device] = []
    skipped: dict[int, str] = {}
    for index in range(count):
        try:
            devices.append(read_device(index, runtime.getDeviceProperties(index), _attributes(runtime, index)))
        except UnknownDeviceError as error:
            skipped[index] = str(error)
        except RuntimeError as error:
            skipped[index] = f"cuda:{index} can't be read: {one_line(error)}"
    return Probe(tuple(devices), skipped, count)


def _attributes(runtime: Any, index: int) -> dict[str, int]:
    attributes = {
        name: int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), index)) for name in _ATTRIBUTES
    }
    unknown = [name for name in ("ClockRate", "MemoryClockRate", "GlobalMemoryBusWidth") if not attributes[name]]
    if unknown:
        from_nvml = _nvml_clocks(runtime.deviceGetPCIBusId(index))
        attributes.update({name: from_nvml.get(name, 0) for name in unknown})
    return attributes


def _nvml_clocks(pci_bus_id: str) -> dict[str, int]:
    """Clocks in kHz and bus width from NVML, by the names of the runtime's attributes; empty without NVML."""
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(pci_bus_id.encode())
        return {
            "ClockRate": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM) * 1000,
            "MemoryClockRate": pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_MEM) * 1000,
            "GlobalMemoryBusWidth": pynvml.nvmlDeviceGetMemoryBusWidth(handle),
        }
    except pynvml.NVMLError:
        return {}


def driver_versions() -> tuple[str, str]:
    """The versions of NVIDIA's driver and of the CUDA that it serves, `("580.65.06", "13.0")`; empty where unknown."""
    return _nvml_driver() or _module_driver(), live_cuda()


def _nvml_driver() -> str:
    try:
        import pynvml
    except ImportError:
        return ""
    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return ""
    return found if isinstance(found, str) else str(found.decode())  # bytes in older bindings


def _module_driver() -> str:
    """What the kernel module says of itself: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul …`."""
    try:
        text = _KERNEL_MODULE.read_text()
    except OSError:
        return ""
    found = re.search(r"^NVRM version:.*?\s(\d{3}\.\d+(?:\.\d+)?)\s", text, re.MULTILINE)
    return found[1] if found else ""


def live_cuda() -> str:
    """The CUDA version that the driver at hand serves, `13.0`; empty where unknown."""
    try:
        import cupy

        number = int(cupy.cuda.runtime.driverGetVersion())
    except (ImportError, OSError, RuntimeError):
        return ""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""  # 12080 is 12.8

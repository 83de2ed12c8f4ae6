"""From what a user types to a `Device`: an arch, a board's name, or a GPU of this machine.

`resolve_device` looks among live GPUs first, for which it imports CuPy: a board that is at hand is the live one. Naming
a board needs neither CuPy nor a driver; `catalogue_device` doesn't look for them.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS
from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.tuning_db.errors import MissingDependencyError, UnknownDeviceError, UsageError
from tilewright.tuning_db.text import one_line

_BOARDS = {device.board: device for device in CATALOGUE}

_ARCH = re.compile(r"(?:sm|compute)?_?(?:(\d{1,2})\.(\d)|(\d{2,3}))[af]?")
_LIVE = re.compile(r"cuda(?::(\d+))?")

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")

# A board's driver reports up to 9 % less than the nominal memory (ECC, reserved pages); boards that share name and SM
# count but not memory differ by a third and more (RTX 3060 with 12 and 8 GB).
_MEMORY_TOLERANCE = 0.15


def normalise(name: str) -> str:
    """A device name without what people write differently: case, separators, `NVIDIA GeForce` in front."""
    text = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(?:nvidia|geforce|tesla|quadro)+", "", text)


_SPELLINGS = {
    normalise(spelling): device for device in CATALOGUE for spelling in (device.board, device.name, *device.aliases)
}


def resolve_device(name: str) -> Device:
    """The device that `name` means, live when it is at hand.

    Args:
        name: an arch (`sm_86`, `86`, `8.6`), which means a live GPU of that arch if there is one, else the arch's
            reference board; a board (`rtx3090`, `NVIDIA GeForce RTX 3090`); or a live GPU (`cuda`, `cuda:0`).

    Raises:
        UnknownDeviceError: nothing has that name, or the live GPU's arch is not in the catalogue.
        MissingDependencyError: a live GPU is asked for, and CuPy, the driver or the GPU is missing.
        UsageError: what is no text can't be a name.
    """
    if not isinstance(name, str):
        raise UsageError(f"{name=} must be the name of a device, such as 'sm_86', 'rtx3090' or 'cuda:0'")
    text = name.strip().lower()
    if match := _LIVE.fullmatch(text):
        return _live_device(int(match[1] or 0))
    if match := _ARCH.fullmatch(text):
        return _arch_device(int(match[3] or match[1] + match[2]))

    if text.startswith("cuda"):
        raise UnknownDeviceError(f"no GPU is called {name!r}: the first is cuda:0; `autotune devices` lists boards too")
    spelling = normalise(name)
    if known := _SPELLINGS.get(spelling):
        return next((device for device in live_devices() if device.key == known.key), known)
    for device in live_devices():
        if spelling in (normalise(device.board), normalise(device.name)):
            return device
    close = difflib.get_close_matches(spelling, _SPELLINGS, n=6, cutoff=0.5)
    boards = list(dict.fromkeys(_SPELLINGS[each].board for each in close))[:3]
    nearest = f"nearest: {', '.join(boards)}; " if boards else ""
    raise UnknownDeviceError(f"no device is called {name!r}; {nearest}list them with `autotune devices`")


def catalogue_device(board: str) -> Device:
    """The catalogue's device of a board, by its short name (`a100`), whether such a GPU is at hand or not.

    Raises:
        UnknownDeviceError: the catalogue has no board of that name.
    """
    if board not in _BOARDS:
        raise UnknownDeviceError(f"no board in the catalogue is called {board!r}")
    return _BOARDS[board]


def live_devices() -> tuple[Device, ...]:
    """The GPUs of this machine that kernels can be tuned on, in CUDA's order; empty when there is none.

    Read once per process.
    """
    return _probe().devices


def skipped_devices() -> dict[int, str]:
    """CUDA index of each GPU of this machine that `live_devices` left out, with the reason in one line."""
    return dict(_probe().skipped)


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
        raise UnknownDeviceError(f"cuda:{index} ({name}) is sm_{arch}; {_supported_archs()}")

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


def _supported_archs() -> str:
    return f"supported: {', '.join(f'sm_{arch}' for arch in REFERENCE_BOARDS)}"


def _arch_device(arch: int) -> Device:
    if arch not in REFERENCE_BOARDS:
        raise UnknownDeviceError(f"no board of sm_{arch} is in the catalogue; {_supported_archs()}")
    reference = _BOARDS[REFERENCE_BOARDS[arch]]
    return next((device for device in live_devices() if device.arch == arch), reference)


def _live_device(index: int) -> Device:
    live = f"cuda:{index}"
    for device in live_devices():
        if device.live == live:
            return device
    probe = _probe()
    if index in probe.skipped:
        raise UnknownDeviceError(probe.skipped[index])
    if probe.missing:
        raise MissingDependencyError(f"{live} needs {probe.missing}; without a GPU, name a board or arch, as in sm_86")
    gpus = "1 GPU, cuda:0" if probe.count == 1 else f"{probe.count} GPUs, cuda:0 to cuda:{probe.count - 1}"
    raise MissingDependencyError(f"there is no {live}: this machine shows {gpus}")


@dataclass(frozen=True, slots=True)
class _Probe:
    """What was found of GPUs on this machine."""

    devices: tuple[Device, ...] = ()
    skipped: Mapping[int, str] = field(default_factory=dict)
    count: int = 0
    missing: str = ""  # what a live GPU needs and this machine lacks, in words


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
def _probe() -> _Probe:
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            return _Probe(missing=f"CuPy, whose import fails: {one_line(error)}")
        return _Probe(
            missing="CuPy, which is not installed: pip install cupy-cuda13x (or cupy-cuda12x, by your driver)"
        )
    except (ImportError, OSError, RuntimeError) as error:
        return _Probe(missing=f"CuPy, whose import fails: {one_line(error)}")
    try:
        runtime = cupy.cuda.runtime
        count = int(runtime.getDeviceCount())
    except RuntimeError as error:
        return _Probe(missing=f"an NVIDIA GPU and its driver: {one_line(error)}")
    if not count:
        return _Probe(missing="a GPU: the driver shows none")

    devices: list[Device] = []
    skipped: dict[int, str] = {}
    for index in range(count):
        try:
            devices.append(read_device(index, runtime.getDeviceProperties(index), _attributes(runtime, index)))
        except UnknownDeviceError as error:
            skipped[index] = str(error)
        except RuntimeError as error:
            skipped[index] = f"cuda:{index} can't be read: {one_line(error)}"
    return _Probe(tuple(devices), skipped, count)


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

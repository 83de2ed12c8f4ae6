"""The GPUs of a machine, without one: the driver's readings are recorded or faked."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.kernels.machines import (
    A100_SLICE,
    BOARDS,
    H200,
    LAPTOP,
    MIB,
    RTX3060_8GB,
    RTX3090,
    RTX_A5000,
    Machine,
    Runtime,
)
from tilewright.kernels import live
from tilewright.kernels.live import live_devices, read_device

pytestmark = pytest.mark.usefixtures("machine")


def test_without_a_driver_there_are_no_live_devices() -> None:
    assert live_devices() == ()
    assert live.probe().skipped == {}


def test_a_known_gpu_takes_rates_from_the_catalogue_and_limits_from_the_driver() -> None:
    device = read_device(0, *RTX3090)
    known = BOARDS["rtx3090"]
    assert device.key == known.key
    assert device.live == "cuda:0"
    assert device.tensor_tflops == known.tensor_tflops
    assert (device.boost_mhz, device.bandwidth_gbs) == (known.boost_mhz, known.bandwidth_gbs)
    assert (device.shared_per_block, device.shared_per_sm) == (101376, 102400)
    assert (device.warps_per_sm, device.blocks_per_sm, device.registers_per_sm) == (48, 16, 65536)
    assert device.memory_gib == pytest.approx(23.7, abs=0.01)
    assert device.source.startswith(known.source)
    assert device.source.endswith("read from the driver")


def test_limits_come_from_the_driver_even_where_they_differ() -> None:
    properties, attributes = RTX3090
    device = read_device(0, properties, attributes | {"MaxSharedMemoryPerBlockOptin": 65536, "L2CacheSize": 4 * MIB})
    assert device.shared_per_block == 65536
    assert device.l2_bytes == 4 * MIB


def test_an_h200_is_recognised() -> None:
    device = read_device(1, *H200)
    assert device.key == BOARDS["h200"].key == "h200-132sm"
    assert device.live == "cuda:1"
    assert device.shared_per_block == 227 * 1024
    assert device.tflops("fp8") == BOARDS["h200"].tflops("fp8")


def test_a_mig_slice_is_a_board_of_its_own_with_its_share_of_the_rates() -> None:
    device = read_device(0, *A100_SLICE)
    assert device.key == "a100-sxm4-40gb-mig-3g-20gb-42sm"
    assert device.tflops("fp16") == pytest.approx(312 * 42 / 108, rel=0.001)
    assert device.fp32_tflops == pytest.approx(19.5 * 42 / 108, rel=0.001)
    assert device.bandwidth_gbs == pytest.approx(777.6, abs=0.1)  # half of the whole board's 1555
    assert device.l2_bytes == 20 * MIB
    assert "rates scaled from a100 by SMs x clock (42 x 1410 MHz against 108 x 1410 MHz)" in device.source
    assert "bandwidth from memory clock x bus width x 2 (1215 MHz x 2560 bit x 2)" in device.source


def test_a_laptop_gpu_is_not_the_desktop_board_of_its_name() -> None:
    device = read_device(0, *LAPTOP)
    assert device.key == "rtx-3080-laptop-gpu-48sm"
    assert device.name == "NVIDIA GeForce RTX 3080 Laptop GPU"
    assert device.boost_mhz == 1710
    # GeForce, so half rate: 48 SMs x 1710 MHz x 512.
    assert device.tflops("fp16") == pytest.approx(42.0, rel=0.01)
    assert device.bandwidth_gbs == pytest.approx(448, rel=0.001)
    assert device.aliases == ()


def test_name_and_sms_alone_do_not_make_a_board() -> None:
    device = read_device(0, *RTX3060_8GB)
    assert device.key != BOARDS["rtx3060"].key
    assert device.bandwidth_gbs == pytest.approx(240, abs=0.1)


def test_a_professional_board_is_scaled_from_one_of_full_rate() -> None:
    device = read_device(0, *RTX_A5000)
    assert device.tflops("fp16") == pytest.approx(64 * 1695 * 1024 / 1e6, rel=0.02)
    assert "scaled from a10 " in device.source


def test_unreadable_clocks_fall_back_to_the_base_board() -> None:
    properties, attributes = LAPTOP
    device = read_device(0, properties, attributes | {"ClockRate": 0, "MemoryClockRate": 0})
    base = BOARDS["rtx3090"]
    assert device.boost_mhz == base.boost_mhz
    assert device.bandwidth_gbs == pytest.approx(base.bandwidth_gbs * 48 / 82, abs=0.1)
    assert "bandwidth scaled likewise" in device.source


def test_live_devices_are_read_once(machine: Machine) -> None:
    machine.has(RTX3090)
    assert live_devices() is live_devices()


def fake_nvml() -> ModuleType:
    nvml = ModuleType("pynvml")
    clocks = {"sm": 1410, "mem": 1215}
    members = {
        "NVMLError": type("NVMLError", (Exception,), {}),
        "NVML_CLOCK_SM": "sm",
        "NVML_CLOCK_MEM": "mem",
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByPciBusId": lambda bus_id: bus_id,
        "nvmlDeviceGetMaxClockInfo": lambda handle, clock: clocks[clock],
        "nvmlDeviceGetMemoryBusWidth": lambda handle: 2560,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
    }
    for name, member in members.items():
        setattr(nvml, name, member)
    return nvml


def test_nvml_fills_in_the_clocks_that_the_runtime_lacks(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    properties, attributes = A100_SLICE
    machine.has((properties, attributes | {"ClockRate": 0, "MemoryClockRate": 0, "GlobalMemoryBusWidth": 0}))
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    (device,) = live_devices()
    assert device.boost_mhz == 1410
    assert device.bandwidth_gbs == pytest.approx(777.6, abs=0.1)


def test_without_nvml_the_clocks_stay_those_of_the_base_board(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties, attributes = A100_SLICE
    machine.has((properties, attributes | {"MemoryClockRate": 0}))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    (device,) = live_devices()
    assert "bandwidth scaled likewise" in device.source


MODULES = {
    "closed": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.133.20  Sun Mar 30 04:52:03 UTC 2025\nGCC: 9",
    "open": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (x@y)\nGCC: 9",
}


@pytest.mark.parametrize("text", MODULES.values(), ids=MODULES)
def test_the_drivers_version_is_nvmls_or_the_kernel_modules(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    machine.has(A100_SLICE)
    monkeypatch.setattr(live, "_KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert live.driver_versions() == ("", "12.9")
    (tmp_path / "version").write_text(text)
    assert live.driver_versions() == ("570.133.20", "12.9")
    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert live.driver_versions() == ("580.65.06", "12.9")
    nvml.nvmlSystemGetDriverVersion = lambda: b"580.65.06"  # type: ignore[attr-defined]
    assert live.driver_versions() == ("580.65.06", "12.9")

    def unloaded() -> None:
        raise nvml.NVMLError

    nvml.nvmlInit = unloaded  # type: ignore[attr-defined]
    machine.lacks_cupy()
    assert live.driver_versions() == ("570.133.20", "")


@pytest.mark.parametrize(("number", "version"), [(12080, "12.8"), (13010, "13.1"), (0, "")])
def test_the_cuda_of_a_driver(machine: Machine, monkeypatch: pytest.MonkeyPatch, number: int, version: str) -> None:
    machine.has(A100_SLICE)
    monkeypatch.setattr(Runtime, "driverGetVersion", lambda self: number)
    assert live.live_cuda() == version


def test_without_a_driver_its_version_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(live, "_KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert live.driver_versions() == ("", "")

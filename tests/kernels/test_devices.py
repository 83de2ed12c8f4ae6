"""Names, archs and live GPUs resolved to devices, without a GPU: the driver's readings are recorded or faked."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tilewright.kernels import devices
from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS
from tilewright.kernels.device import Device
from tilewright.kernels.devices import catalogue_device, live_devices, read_device, resolve_device, skipped_devices
from tilewright.tuning_db.errors import MissingDependencyError, UnknownDeviceError, UsageError

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
        for name in devices._ATTRIBUTES:
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
        devices._probe.cache_clear()

    def lacks_cupy(self) -> None:
        self._monkeypatch.setitem(sys.modules, "cupy", None)
        devices._probe.cache_clear()


@pytest.fixture(autouse=True)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine without a GPU unless the test gives it one; the real one for tests that need a GPU."""
    this = Machine(monkeypatch)
    devices._probe.cache_clear()
    if not request.node.get_closest_marker("gpu"):
        this.has(error="cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
    yield this
    devices._probe.cache_clear()


def message_of(name: str, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        resolve_device(name)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Names


@pytest.mark.parametrize("spelling", ["sm_{}", "sm{}", "SM_{}", "{}", " sm_{} ", "compute_{}", "sm_{}a"])
@pytest.mark.parametrize(("arch", "board"), REFERENCE_BOARDS.items())
def test_an_arch_means_its_reference_board(arch: int, board: str, spelling: str) -> None:
    assert resolve_device(spelling.format(arch)) == BOARDS[board]


@pytest.mark.parametrize(("spelling", "arch"), [("7.5", 75), ("8.6", 86), ("10.0", 100), ("sm_12.0", 120)])
def test_an_arch_may_have_a_point(spelling: str, arch: int) -> None:
    assert resolve_device(spelling).board == REFERENCE_BOARDS[arch]


@pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)
def test_a_board_has_its_slug_its_drivers_name_and_its_aliases(device: Device) -> None:
    for spelling in (device.board, device.board.upper(), device.name, *device.aliases):
        assert resolve_device(spelling) == device


@pytest.mark.parametrize(
    ("spelling", "board"),
    [
        ("3090", "rtx3090"),
        ("geforce rtx 3090", "rtx3090"),
        ("rtx-3090", "rtx3090"),
        ("RTX_3090", "rtx3090"),
        ("rtxa6000", "a6000"),
        ("RTX A4000", "a4000"),
        ("NVIDIA A10", "a10"),
        ("T4", "t4"),
        ("h200-sxm", "h200"),
        ("H100 PCIe", "h100-pcie"),
        ("RTX PRO 6000", "rtxpro6000"),
    ],
)
def test_what_people_type(spelling: str, board: str) -> None:
    assert resolve_device(spelling).board == board


def test_boards_of_one_arch_have_different_keys() -> None:
    assert resolve_device("a10").key == "a10-72sm"
    assert resolve_device("rtx3090").key == "rtx3090-82sm"


@pytest.mark.parametrize(("typo", "meant"), [("rtx309", "rtx3090"), ("a600", "a6000"), ("h10O-pcie", "h100-pcie")])
def test_an_unknown_name_is_answered_with_the_nearest(typo: str, meant: str) -> None:
    text = message_of(typo, UnknownDeviceError)
    assert repr(typo) in text
    assert meant in text
    assert "autotune devices" in text


@pytest.mark.parametrize("name", ["", "   ", "quantum", "cuda:x", "cuda:-1", "rtx\n3090x", "sm_"])
def test_a_name_like_no_other_is_answered_in_one_line(name: str) -> None:
    assert "autotune devices" in message_of(name, UnknownDeviceError)


@pytest.mark.parametrize("name", [3, 8.6, None, b"sm_86"])
def test_what_is_no_text_is_no_devices_name(name: Any) -> None:
    assert "must be the name of a device, such as 'sm_86'" in message_of(name, UsageError)


@pytest.mark.parametrize("name", ["sm_70", "70", "7.0", "sm_87", "sm_121"])
def test_an_arch_outside_the_catalogue_is_answered_with_those_in_it(name: str) -> None:
    text = message_of(name, UnknownDeviceError)
    assert "sm_75, sm_80, sm_86, sm_89, sm_90, sm_100, sm_120" in text


# No GPU


def test_without_a_driver_there_are_no_live_devices() -> None:
    assert live_devices() == ()
    assert skipped_devices() == {}


def test_without_cupy_there_are_no_live_devices(machine: Machine) -> None:
    machine.lacks_cupy()
    assert live_devices() == ()
    assert resolve_device("sm_86") == BOARDS["rtx3090"]


def test_cuda_without_cupy_says_how_to_install_it(machine: Machine) -> None:
    machine.lacks_cupy()
    text = message_of("cuda:0", MissingDependencyError)
    assert "pip install cupy-cuda13x" in text


def test_cuda_without_a_driver_quotes_cupy() -> None:
    text = message_of("cuda", MissingDependencyError)
    assert "cudaErrorInsufficientDriver: CUDA driver version is insufficient" in text


def test_cuda_with_a_driver_but_no_gpu(machine: Machine) -> None:
    machine.has()
    assert "the driver shows none" in message_of("cuda:0", MissingDependencyError)


def test_a_cuda_index_out_of_range_gives_the_count(machine: Machine) -> None:
    machine.has(RTX3090)
    assert "1 GPU, cuda:0" in message_of("cuda:1", MissingDependencyError)
    machine.has(RTX3090, H200)
    assert "2 GPUs, cuda:0 to cuda:1" in message_of("cuda:2", MissingDependencyError)


# Live GPUs


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


def test_live_devices_keep_cudas_numbering_past_one_that_is_skipped(machine: Machine) -> None:
    machine.has(V100, RTX3090)
    assert [device.live for device in live_devices()] == ["cuda:1"]
    assert list(skipped_devices()) == [0]
    assert "Tesla V100-SXM2-16GB" in skipped_devices()[0]
    text = message_of("cuda:0", UnknownDeviceError)
    assert "sm_70" in text
    assert resolve_device("cuda:1").board == "rtx3090"


def test_live_devices_are_read_once(machine: Machine) -> None:
    machine.has(RTX3090)
    assert live_devices() is live_devices()


def test_a_board_at_hand_resolves_to_the_live_gpu(machine: Machine) -> None:
    machine.has(H200, RTX3090)
    assert resolve_device("rtx3090").live == "cuda:1"
    assert resolve_device("cuda").board == "h200"
    assert resolve_device("a10").live == ""


def test_a_board_of_the_catalogue_is_looked_for_nowhere(machine: Machine) -> None:
    machine.has(H200, RTX3090)
    assert catalogue_device("rtx3090") == next(device for device in CATALOGUE if device.board == "rtx3090")
    with pytest.raises(UnknownDeviceError, match=r"^no board in the catalogue is called 'rtx 3090'$"):
        catalogue_device("rtx 3090")


def test_an_arch_at_hand_means_the_live_gpus_own_board(machine: Machine) -> None:
    machine.has(H200, LAPTOP)
    assert resolve_device("sm_90").key == "h200-132sm"
    assert resolve_device("sm_86").live == "cuda:1"
    assert resolve_device("sm_86").board == "rtx-3080-laptop-gpu"
    assert resolve_device("sm_80") == BOARDS["a100"]


def test_a_slice_does_not_answer_for_the_whole_board(machine: Machine) -> None:
    machine.has(A100_SLICE)
    assert resolve_device("a100-40gb").live == ""
    assert resolve_device("sm_80").live == "cuda:0"


def test_a_live_gpu_outside_the_catalogue_goes_by_its_own_name(machine: Machine) -> None:
    machine.has(LAPTOP)
    assert resolve_device("rtx-3080-laptop-gpu").live == "cuda:0"
    assert resolve_device("RTX 3080 Laptop GPU").live == "cuda:0"


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
    monkeypatch.setattr(devices, "_KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices.driver_versions() == ("", "12.9")
    (tmp_path / "version").write_text(text)
    assert devices.driver_versions() == ("570.133.20", "12.9")
    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert devices.driver_versions() == ("580.65.06", "12.9")
    nvml.nvmlSystemGetDriverVersion = lambda: b"580.65.06"  # type: ignore[attr-defined]
    assert devices.driver_versions() == ("580.65.06", "12.9")

    def unloaded() -> None:
        raise nvml.NVMLError

    nvml.nvmlInit = unloaded  # type: ignore[attr-defined]
    machine.lacks_cupy()
    assert devices.driver_versions() == ("570.133.20", "")


@pytest.mark.parametrize(("number", "version"), [(12080, "12.8"), (13010, "13.1"), (0, "")])
def test_the_cuda_of_a_driver(machine: Machine, monkeypatch: pytest.MonkeyPatch, number: int, version: str) -> None:
    machine.has(A100_SLICE)
    monkeypatch.setattr(Runtime, "driverGetVersion", lambda self: number)
    assert devices.live_cuda() == version


def test_without_a_driver_its_version_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "_KERNEL_MODULE", tmp_path / "version")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert devices.driver_versions() == ("", "")


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_read() -> None:
    device = resolve_device("cuda:0")
    assert device.live == "cuda:0"
    assert device.sms > 0
    assert device.bandwidth_gbs > 100

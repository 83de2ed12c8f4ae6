"""Names, archs and live GPUs resolved to devices."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kernels.machines import A100_SLICE, BOARDS, H200, LAPTOP, RTX3090, V100, Machine
from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS
from tilewright.kernels.device import Device
from tilewright.kernels.devices import catalogue_device, resolve_device
from tilewright.kernels.live import live_devices, probe
from tilewright.tuning_db.errors import MissingDependencyError, UnknownDeviceError, UsageError

pytestmark = pytest.mark.usefixtures("machine")


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


def test_without_cupy_there_are_no_live_devices(machine: Machine) -> None:
    machine.lacks_cupy()
    assert live_devices() == ()
    assert resolve_device("sm_86") == BOARDS["rtx3090"]


def test_cuda_without_cupy_says_how_to_install_it(machine: Machine) -> None:
    machine.lacks_cupy()
    text = message_of("cuda:0", MissingDependencyError)
    assert 'pip install "tilewright[cuda13]" (or [cuda12], by your driver)' in text


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


def test_live_devices_keep_cudas_numbering_past_one_that_is_skipped(machine: Machine) -> None:
    machine.has(V100, RTX3090)
    assert [device.live for device in live_devices()] == ["cuda:1"]
    assert list(probe().skipped) == [0]
    assert "Tesla V100-SXM2-16GB" in probe().skipped[0]
    text = message_of("cuda:0", UnknownDeviceError)
    assert "sm_70" in text
    assert resolve_device("cuda:1").board == "rtx3090"


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


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_read() -> None:
    device = resolve_device("cuda:0")
    assert device.live == "cuda:0"
    assert device.sms > 0
    assert device.bandwidth_gbs > 100

"""The catalogue against figures from elsewhere: NVIDIA's limits per arch and its tensor-core throughput per SM."""

from __future__ import annotations

import pickle
from collections import Counter

import pytest

from tilewright.kernels.catalogue import ARCH_LIMITS, CATALOGUE, REFERENCE_BOARDS, normalise
from tilewright.kernels.device import Device

BOARDS = {device.board: device for device in CATALOGUE}

# CUDA Programming Guide, "Compute Capabilities": shared memory in KiB (per SM, then the most a block may opt in to),
# resident threads and blocks per SM.
CUDA_GUIDE = {
    75: (64, 64, 1024, 16),
    80: (164, 163, 2048, 32),
    86: (100, 99, 1536, 16),
    89: (100, 99, 1536, 24),
    90: (228, 227, 2048, 32),
    100: (228, 227, 2048, 32),
    120: (100, 99, 1536, 24),
}

# FLOP per clock and SM, dense: fused multiply-adds of the CUDA cores (x 2), and tensor cores (whitepapers, "Tensor
# Core" sections; B200 from its rate over Hopper's).
CUDA_CORE_OPS = {75: 128, 80: 128, 86: 256, 89: 256, 90: 256, 100: 256, 120: 256}
TENSOR_OPS = {
    80: {"fp16": 2048, "bf16": 2048, "tf32": 1024, "int8": 4096},
    86: {"fp16": 1024, "bf16": 1024, "tf32": 512, "int8": 2048},
    89: {"fp16": 1024, "bf16": 1024, "tf32": 512, "int8": 2048, "fp8": 2048},
    90: {"fp16": 4096, "bf16": 4096, "tf32": 2048, "int8": 8192, "fp8": 8192},
    100: {"fp16": 8192, "bf16": 8192, "tf32": 4096, "int8": 16384, "fp8": 16384},
    120: {"fp16": 1024, "bf16": 1024, "tf32": 512, "int8": 2048, "fp8": 2048},
}
GEFORCE_HALF_RATE = {"fp16", "bf16", "tf32", "fp8"}

# The boost clock under tensor-core load where it is another: H100 whitepaper, table 3. B200's is not published.
TENSOR_MHZ = {"h100": 1830, "h100-pcie": 1620, "h200": 1830}

SM86_BOARDS = {"rtx3090", "rtx3080", "rtx3070", "rtx3060", "a10", "a40", "a6000", "a4000"}

each_board = pytest.mark.parametrize("device", CATALOGUE, ids=lambda device: device.board)


def tensor_ops(device: Device, unit: str) -> int:
    halved = "GeForce" in device.name and unit in GEFORCE_HALF_RATE
    return TENSOR_OPS[device.arch][unit] // (2 if halved else 1)


def test_every_arch_has_a_reference_board_of_its_own() -> None:
    assert set(REFERENCE_BOARDS) == set(ARCH_LIMITS) == {device.arch for device in CATALOGUE} == set(CUDA_GUIDE)
    for arch, board in REFERENCE_BOARDS.items():
        assert BOARDS[board].arch == arch


def test_reference_board_of_sm_86_is_the_rtx_3090() -> None:
    assert REFERENCE_BOARDS[86] == "rtx3090"


def test_sm_86_has_its_eight_boards() -> None:
    assert {device.board for device in CATALOGUE if device.arch == 86} == SM86_BOARDS


def test_boards_and_keys_are_unique() -> None:
    assert len(BOARDS) == len(CATALOGUE) == len({device.key for device in CATALOGUE})


def test_no_spelling_means_two_boards() -> None:
    spellings = Counter(
        spelling
        for device in CATALOGUE
        for spelling in {normalise(each) for each in (device.board, device.name, *device.aliases)}
    )
    assert [spelling for spelling, boards in spellings.items() if boards > 1] == []


@each_board
def test_limits_are_those_of_the_cuda_guide(device: Device) -> None:
    per_sm, per_block, threads, blocks = CUDA_GUIDE[device.arch]
    assert device.shared_per_sm == per_sm * 1024
    assert device.shared_per_block == per_block * 1024
    assert device.warps_per_sm * 32 == threads
    assert device.blocks_per_sm == blocks
    assert device.registers_per_sm == 65536


@each_board
def test_fp32_rate_follows_from_sms_and_clock(device: Device) -> None:
    derived = device.sms * device.boost_mhz * CUDA_CORE_OPS[device.arch] / 1e6
    assert device.fp32_tflops == pytest.approx(derived, rel=0.02)


@pytest.mark.parametrize("board", sorted(set(BOARDS) - {"b200"}))
def test_tensor_rates_follow_from_sms_and_clock(board: str) -> None:
    device = BOARDS[board]
    mhz = TENSOR_MHZ.get(device.board, device.boost_mhz)
    for unit, rate in device.tensor_tflops.items():
        derived = device.sms * mhz * tensor_ops(device, unit) / 1e6
        assert rate == pytest.approx(derived, rel=0.02), unit


def test_b200_tensor_rates_are_in_proportion_and_below_those_at_its_boost_clock() -> None:
    b200 = BOARDS["b200"]
    for unit, rate in b200.tensor_tflops.items():
        at_boost = b200.sms * b200.boost_mhz * TENSOR_OPS[100][unit] / 1e6
        # Hopper's tensor-core clock is 0.92 of its boost clock.
        assert 0.9 < rate / at_boost < 1, unit


@each_board
def test_units_are_those_the_arch_has(device: Device) -> None:
    assert set(device.tensor_tflops) == set(TENSOR_OPS.get(device.arch, ()))


@each_board
def test_sm_75_says_that_it_runs_on_cuda_cores(device: Device) -> None:
    assert ("CUDA cores" in device.note) == (device.arch == 75)


def test_geforce_boards_have_half_the_fp16_rate_of_their_professional_kin() -> None:
    a6000, rtx3090 = BOARDS["a6000"], BOARDS["rtx3090"]
    per_sm_and_clock = {d.board: d.tflops("fp16") / (d.sms * d.boost_mhz) for d in (a6000, rtx3090)}
    assert per_sm_and_clock["rtx3090"] / per_sm_and_clock["a6000"] == pytest.approx(0.5, rel=0.02)
    assert rtx3090.tflops("int8") / rtx3090.tflops("fp16") == pytest.approx(4, rel=0.02)


@each_board
def test_every_row_is_complete_and_sourced(device: Device) -> None:
    assert device.source
    assert not device.live
    assert device.bandwidth_gbs > 0
    assert device.l2_bytes % 1024 == 0
    assert device.l2_bytes > 2**20
    assert device.memory_gib >= 8


@each_board
def test_a_device_travels_to_a_worker(device: Device) -> None:
    assert pickle.loads(pickle.dumps(device)) == device

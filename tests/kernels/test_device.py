from __future__ import annotations

from dataclasses import replace

import pytest

from tilewright.kernels.devices import resolve_device

pytestmark = pytest.mark.smoke

RTX3090 = resolve_device("rtx3090")


def test_the_key_is_the_board_and_its_sms_not_the_arch() -> None:
    a10 = resolve_device("a10")
    assert RTX3090.arch == a10.arch
    assert RTX3090.key != a10.key
    # A slice of a board, as MIG makes them, is another device.
    assert replace(RTX3090, sms=41).key != RTX3090.key


def test_being_live_changes_no_key() -> None:
    assert replace(RTX3090, live="cuda:0").key == RTX3090.key


def test_the_arch_as_compilers_write_it() -> None:
    assert RTX3090.sm == "sm_86"


def test_a_unit_the_tensor_cores_lack_runs_on_the_cuda_cores() -> None:
    t4 = resolve_device("t4")
    assert not t4.tensor_tflops
    assert t4.tflops("fp16") == t4.fp32_tflops
    assert RTX3090.tflops("fp32") == RTX3090.fp32_tflops


def test_fp8_is_widened_to_fp16_where_there_is_none() -> None:
    assert RTX3090.tflops("fp8") == RTX3090.tflops("fp16")
    h200 = resolve_device("h200")
    assert h200.tflops("fp8") == pytest.approx(2 * h200.tflops("fp16"), rel=1e-3)

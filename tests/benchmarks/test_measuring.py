from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measuring import board_environment


class NvmlError(Exception):
    """Stands for NVML's."""


def nvml(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000 + handle,
        **more,
    )


def test_a_board_s_driver_and_power_limit_are_nvml_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert board_environment(1) == {"driver": "580.1", "power_limit_w": 700.001}


def test_without_nvml_or_its_library_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert board_environment(0) == {}

    def absent() -> None:
        raise NvmlError("NVML Shared Library Not Found")

    library = nvml()
    library.nvmlInit = absent
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert board_environment(0) == {}

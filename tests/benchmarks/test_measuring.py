from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.measuring import board_environment, environment, kept
from tilewright.tuning_db.version import NOT_INSTALLED


def test_a_checkout_that_is_not_installed_is_measured_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr("tilewright.tuning_db.version.version", absent)
    assert environment()["tilewright"] == NOT_INSTALLED


class NvmlError(Exception):
    """Stands for NVML's."""


def nvml(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        NVMLError=NvmlError,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByPciBusId={b"0000:81:00.0": 1}.__getitem__,
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000 + handle,
        **more,
    )


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that sees the second GPU alone, as its first."""
    runtime = SimpleNamespace(deviceGetPCIBusId={0: "0000:81:00.0"}.__getitem__)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))


@pytest.mark.usefixtures("cupy")
def test_a_board_s_driver_and_power_limit_are_nvml_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert board_environment(0) == {"driver": "580.1", "power_limit_w": 700.001}


@pytest.mark.usefixtures("cupy")
def test_without_nvml_or_its_library_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert board_environment(0) == {}

    def absent() -> None:
        raise NvmlError("NVML Shared Library Not Found")

    library = nvml()
    library.nvmlInit = absent
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert board_environment(0) == {}


def test_figures_are_kept_one_by_one(tmp_path: Path) -> None:
    asked: list[str] = []

    def measured(name: str, say: Callable[[str], None]) -> dict[str, Any]:
        say("at work")
        asked.append(name)
        if name == "c":
            raise KeyboardInterrupt
        return {"name": name}

    file = tmp_path / "found.json"
    with pytest.raises(KeyboardInterrupt):
        kept(["a", "b", "c"], "once", file, measured)
    assert kept(["b"], "once", file, measured) == {"b": {"name": "b"}}
    assert asked == ["a", "b", "c"]
    assert kept(["b"], "another", file, measured) == {"b": {"name": "b"}}
    assert json.loads(file.read_text()).keys() == {"once", "another"}
    assert kept(["a"], "once", None, measured) == {"a": {"name": "a"}}
    assert asked == ["a", "b", "c", "b", "a"]

"""TensorRT where it is absent, too old, or there."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from tilewright.kernels.tensorrt.library import plugin_api, tensorrt
from tilewright.tuning_db.errors import MissingDependencyError, UnsupportedError


def stand_in(monkeypatch, version, **plugin):
    module, api = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
    module.__version__ = version
    module.plugin = api
    vars(api).update(plugin)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", api)
    return module


def test_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        MissingDependencyError, match=r"^TensorRT is not installed here .*pip install 'tensorrt>=10\.16'"
    ):
        tensorrt()


def test_one_that_does_not_load(monkeypatch):
    class Finder:
        def find_spec(self, name, *_):
            if name == "tensorrt":
                raise RuntimeError("libnvinfer:\n  no such symbol")

    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(
        MissingDependencyError, match=r"^TensorRT is not installed here \(libnvinfer: no such symbol\):"
    ):
        tensorrt()


def test_a_folder_of_that_name(monkeypatch):
    module = ModuleType("tensorrt")
    module.__path__ = ["/here/tensorrt"]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(
        MissingDependencyError, match=r"^/here/tensorrt is taken for TensorRT, and is not: run Python in"
    ):
        tensorrt()


@pytest.mark.parametrize("version", ["8.6.1", "10.15.1.29"])
def test_too_old(monkeypatch, version):
    stand_in(monkeypatch, version)
    with pytest.raises(UnsupportedError, match=f"^TensorRT {version} is too old for these plugins: install 10.16 or"):
        tensorrt()


def test_new_enough(monkeypatch):
    module = stand_in(monkeypatch, "10.16.1.11", aot_impl=None)
    assert tensorrt() is module
    assert plugin_api() is module.plugin


def test_without_plugins_ahead_of_time(monkeypatch):
    stand_in(monkeypatch, "11.4.0.106")
    with pytest.raises(UnsupportedError, match=r"11.4.0.106 has no tensorrt.plugin.aot_impl"):
        plugin_api()

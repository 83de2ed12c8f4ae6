"""What the tests on a GPU share."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from typing import Any

import pytest

from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.measure import EXIT_AFTER_FAULT


@pytest.fixture(scope="session")
def board() -> Device:
    """The GPU at hand."""
    return resolve_device("cuda:0")


@pytest.fixture(autouse=True)
def no_records(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was tuned on this machine is none of these tests' business."""
    monkeypatch.setenv("TILEWRIGHT_DB_DIR", str(tmp_path_factory.getbasetemp() / "no-records"))


@pytest.fixture
def cupy(board: Device) -> Any:
    import cupy

    return cupy


@pytest.fixture
def torch(board: Device) -> Any:
    """torch, if it is installed and sees the GPU."""
    import warnings

    module = None
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        import torch as module  # type: ignore[no-redef]
    if module is None:
        pytest.skip("torch is not installed")
    if not module.cuda.is_available():
        pytest.skip("torch finds no GPU")
    return module


@pytest.fixture
def jax(board: Device) -> Any:
    """JAX, if it is installed and sees the GPU."""
    import warnings

    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else it takes three quarters of the memory
    module = None
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        import jax as module  # type: ignore[no-redef]
    if module is None:
        pytest.skip("JAX is not installed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.devices("gpu")
    except RuntimeError as error:
        pytest.skip(f"JAX finds no GPU: {error}")
    return module


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """After a kernel's fault every call of the driver fails in the process: the tests to come would fail for it too.

    With several workers, another one takes this one's place, and the test that did it is said to have crashed its own.
    It is the innermost wrapper, so that the test's time limit holds for the wait here as well.
    """
    result = yield
    if "cupy" in sys.modules and _lost(sys.modules["cupy"]):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(EXIT_AFTER_FAULT)
        pytest.exit(f"{item.nodeid} has cost the process its GPU: run the others without it", EXIT_AFTER_FAULT)
    return result


def _lost(cupy: Any) -> bool:
    """Whether a kernel's fault has made this process's GPU useless to it."""
    try:
        cupy.cuda.runtime.deviceSynchronize()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        # Without a GPU there is nothing to lose.
        return "NoDevice" not in str(error) and "InsufficientDriver" not in str(error)
    return False

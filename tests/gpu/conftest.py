"""What the tests on a GPU share."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device


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

"""What the tests on a GPU share."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device


@pytest.fixture(scope="session")
def board() -> Device:
    """The GPU at hand."""
    return resolve_device("cuda:0")


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

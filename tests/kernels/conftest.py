"""What several tests of kernels stand on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kernels.machines import Machine
from tilewright.kernels import live


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine without a GPU unless the test gives it one; the real one for tests that need a GPU."""
    this = Machine(monkeypatch)
    live.probe.cache_clear()
    if not request.node.get_closest_marker("gpu"):
        this.has(error="cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
    yield this
    live.probe.cache_clear()

"""Every line of the support table on a GPU: its problem, in the default configuration, through the correctness gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.tuner.measuring import measure_request
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import KERNELS
from tilewright.tuner.pool import Pool

pytestmark = pytest.mark.gpu

TIMEOUT = 120.0
FEATURES = [(kernel, problem, config) for kernel in KERNELS for _, problem, config in kernel.feature_cases]
NAMES = [f"{kernel.name}: {name}" for kernel in KERNELS for name in kernel.features]


@pytest.fixture(scope="module")
def worker(board: Device) -> Iterator[Pool]:
    with Pool(1) as pool:
        yield pool


@pytest.mark.parametrize(("kernel", "problem", "config"), FEATURES, ids=NAMES)
def test_a_feature_passes_the_gate(
    worker: Pool, board: Device, kernel: Kernel[Any, Any], problem: Problem, config: Config | None
) -> None:
    config = config or kernel.default(problem, board)
    reason = kernel.supported(problem, board) or kernel.space.fits(problem, config, board)
    if reason is not None:
        pytest.skip(reason)
    reply = worker.submit(measure_request(kernel.name, problem, config), TIMEOUT).result()
    assert reply["status"] == "ok", reply["message"]
    assert reply["ragged"] in ("passed", "none")
    assert reply["resources"]["spill_bytes"] == 0
    assert reply["times"]["median_us"] > 0

"""Every line of the support table through the public function of its op, on the configuration that a lookup gives."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu.conforming import conforms, skip_unless
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.registry import KERNELS

pytestmark = pytest.mark.gpu

FEATURES = [(kernel, problem, config) for kernel in KERNELS for _, problem, config in kernel.feature_cases]
NAMES = [f"{kernel.name}: {name}" for kernel in KERNELS for name in kernel.features]


@pytest.mark.parametrize(("kernel", "problem", "config"), FEATURES, ids=NAMES)
def test_a_feature_equals_its_reference(
    cupy: Any, board: Device, kernel: Kernel[Any, Any], problem: Any, config: Any
) -> None:
    skip_unless(kernel, problem, board, config)
    conforms(cupy, kernel, problem, config)

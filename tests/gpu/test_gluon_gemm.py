"""The GEMM in Gluon of the benchmarks, on the GPU it is for."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gluon import ARCH, CONFIGS, label
from benchmarks.gluon_gemm import GluonConfig, gluon_gemm
from tilewright.kernels.device import Device

pytestmark = pytest.mark.gpu

SHAPES = [(4096, 1024, 512), (1000, 520, 200), (128, 128, 64), (64, 8, 8), (8192, 768, 768)]
LAUNCHES = 50


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_every_launch_gives_the_same_bits_and_they_are_right(
    torch: Any, board: Device, config: GluonConfig, shape: tuple[int, int, int]
) -> None:
    if board.arch != ARCH:
        pytest.skip(f"{board.name} is {board.sm}, not sm_{ARCH}")
    m, n, k = shape
    draw = torch.Generator("cuda").manual_seed(0)
    a, b, bias = (
        torch.randn(size, generator=draw, device="cuda").to(torch.bfloat16) for size in ((m, k), (n, k), (n,))
    )
    sums = a.double() @ b.double().T + bias.double()
    for activation, expected in (("none", sums), ("gelu_tanh", torch.nn.functional.gelu(sums, approximate="tanh"))):
        first = gluon_gemm(a, b, bias, activation, config, board.sms)
        assert float((first - expected).abs().max() / expected.abs().max()) < 2**-8
        for _ in range(LAUNCHES):
            assert torch.equal(gluon_gemm(a, b, bias, activation, config, board.sms), first)

"""The GEMM and the attention in Gluon of the benchmarks, on the GPU they are for."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.gluon import ARCH, ATTENTION_CONFIGS, GEMM_CONFIGS, label
from benchmarks.gluon_attention import GluonAttentionConfig, gluon_attention
from benchmarks.gluon_gemm import GluonGemmConfig, gluon_gemm
from tilewright.kernels.device import Device

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(60)]  # barriers that don't meet wait for ever

SHAPES = [(4096, 1024, 512), (1000, 520, 200), (128, 128, 64), (64, 8, 8), (8192, 768, 768)]
# B, H, Hkv, Sq, Skv, D
ATTENTIONS = [
    (2, 16, 16, 2048, 2048, 128),
    (1, 32, 8, 1000, 1300, 128),
    (4, 12, 12, 512, 512, 64),
    (1, 2, 1, 300, 100, 64),
    (1, 1, 1, 1, 1, 128),
]
LAUNCHES = 50


@pytest.fixture
def hopper(board: Device) -> Device:
    if board.arch != ARCH:
        pytest.skip(f"{board.name} is {board.sm}, not sm_{ARCH}")
    return board


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("config", GEMM_CONFIGS, ids=label)
def test_every_product_gives_the_same_bits_and_they_are_right(
    torch: Any, hopper: Device, config: GluonGemmConfig, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    draw = torch.Generator("cuda").manual_seed(0)
    a, b, bias = (
        torch.randn(size, generator=draw, device="cuda").to(torch.bfloat16) for size in ((m, k), (n, k), (n,))
    )
    sums = a.double() @ b.double().T + bias.double()
    for activation, expected in (("none", sums), ("gelu_tanh", torch.nn.functional.gelu(sums, approximate="tanh"))):
        first = gluon_gemm(a, b, bias, activation, config, hopper.sms)
        assert float((first - expected).abs().max() / expected.abs().max()) < 2**-8
        for _ in range(LAUNCHES):
            assert torch.equal(gluon_gemm(a, b, bias, activation, config, hopper.sms), first)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", ATTENTIONS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("config", ATTENTION_CONFIGS, ids=label)
def test_every_attention_gives_the_same_bits_and_they_are_right(
    torch: Any, hopper: Device, config: GluonAttentionConfig, shape: tuple[int, ...], causal: bool
) -> None:
    batch, heads, kv_heads, queries, keys, dim = shape
    if config.shared_bytes(dim) > hopper.shared_per_block:
        pytest.skip(f"{label(config)} takes more shared memory than a block of {hopper.name} has")
    draw = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(batch, count, length, dim, generator=draw, device="cuda").to(torch.bfloat16)
        for count, length in ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    )
    k_all, v_all = (x.repeat_interleave(heads // kv_heads, 1).double() for x in (k, v))
    scores = q.double() @ k_all.transpose(2, 3) / dim**0.5
    if causal:
        hidden = torch.ones(queries, keys, dtype=torch.bool, device="cuda").triu(keys - queries + 1)
        scores.masked_fill_(hidden, -torch.inf)
    expected = torch.nan_to_num(scores.softmax(-1)) @ v_all  # a query that sees no key: 0
    first = gluon_attention(q, k, v, causal, config, hopper.sms)
    assert float((first - expected).abs().max() / expected.abs().max()) < 2**-7  # weights are rounded to bf16, too
    for _ in range(LAUNCHES):
        assert torch.equal(gluon_attention(q, k, v, causal, config, hopper.sms), first)

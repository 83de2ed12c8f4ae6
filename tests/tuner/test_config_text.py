from __future__ import annotations

import pytest

from tilewright.kernels import AttentionConfig, Conv2dConfig, GemmConfig
from tilewright.kernels.problem import Config
from tilewright.tuner.config_text import short_config


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (GemmConfig(128, 64, 32), "128×64×32 group 8 warps 4 stages 3"),
        (GemmConfig(128, 64, 32, 1, PERSISTENT=True, TMA=True), "128×64×32 warps 4 stages 3 persistent TMA"),
        (Conv2dConfig(64, 32, 16, FOLD=True, SPLIT_K=2), "64×32×16 split 2 folded warps 4 stages 3"),
        (AttentionConfig(16, 64, SPLIT_KV=8, PACK=True), "16×64 split 8 packed warps 4 stages 2"),
        (AttentionConfig(128, 64, GROUP_H=8, OVERLAP=True, TMA=True), "128×64 turns 8 overlapped TMA warps 4 stages 2"),
        (AttentionConfig(128, 64), "128×64 warps 4 stages 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_configurations_are_short(config: Config, text: str) -> None:
    assert short_config(config.to_dict()) == text


def test_no_configuration_is_a_dash() -> None:
    assert short_config(None) == "-"

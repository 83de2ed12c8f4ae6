"""How the fused attention is called on a problem's arrays, and held to its reference: what its tests share."""

from __future__ import annotations

from tests.kernels.calls import attention_outs as outs_for
from tests.kernels.calls import run_attention as run
from tests.kernels.conformance import check
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.space import AttentionConfig

SMALL = AttentionConfig(16, 16)


def conforms(problem, config=None, seed=0):
    check(ATTENTION, problem, lambda arrays, outs: run(problem, arrays, outs, config), outs_for(problem), seed=seed)

from __future__ import annotations

import pytest

from tests.tuner.suites.totals import weights
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.tuner.suites import SUITES

pytestmark = pytest.mark.smoke


def test_parameters_add_up() -> None:
    # 1543.49 M (the model card of whisper-large-v3, 1550 M with 80 mel bins in the paper's table 1), of which
    # 1280·(1500 + 448) are positions; the logits' weights are those of the tokens.
    assert weights(SUITES["whisper"]) + 1280 * (1500 + 448) == pytest.approx(1543.5e6, rel=0.002)


def test_its_convolutions_are_one_dimensional() -> None:
    problems = [w.problem for w in SUITES["whisper"] if isinstance(w.problem, Conv2dProblem)]
    assert [(p.H, p.W, p.C, p.K, p.R, p.S) for p in problems] == [
        (1, 3000, 128, 1280, 1, 3),
        (1, 3000, 1280, 1280, 1, 3),
    ]
    assert [(p.P, p.Q) for p in problems] == [(1, 3000), (1, 1500)]


def test_its_attention() -> None:
    problems = [w.problem for w in SUITES["whisper"] if isinstance(w.problem, AttentionProblem)]
    assert [(p.B, p.H, p.Sq, p.Skv, p.D) for p in problems] == [
        (1, 20, 1500, 1500, 64),
        (5, 20, 1, 448, 64),
        (5, 20, 1, 1500, 64),
    ]

from __future__ import annotations

import pytest

from tests.tuner.suites.totals import multiply_adds, weights
from tilewright.tuner.suites import SUITES

pytestmark = pytest.mark.smoke


def test_it_adds_up() -> None:
    # torchvision's ViT_B_16_Weights: 17.56 G multiply-adds and 86567656 parameters, of which the biases are
    # 768 + 12·(3·768 + 768 + 3072 + 768) + 1000, the norms 25·2·768, and the class token and positions 198·768.
    others = 768 + 12 * (3 * 768 + 768 + 3072 + 768) + 1000 + 25 * 2 * 768 + 198 * 768
    assert weights(SUITES["vit-b"]) == 86567656 - others
    assert multiply_adds(SUITES["vit-b"]) == pytest.approx(32 * 17.56e9, rel=0.001)

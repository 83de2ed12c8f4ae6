from __future__ import annotations

import pytest

from tests.tuner.suites.totals import weights
from tilewright.tuner.suites import SUITES

pytestmark = pytest.mark.smoke


def test_parameters_add_up() -> None:
    # 110 M and 340 M as published (Devlin et al. 2018), of which 24 M and 32 M are embeddings and pooler.
    assert weights(SUITES["bert-base"]) == pytest.approx(85e6, rel=0.01)
    assert weights(SUITES["bert-large"]) == pytest.approx(302e6, rel=0.01)


@pytest.mark.parametrize(("suite", "heads", "hidden"), [("bert-base", 12, 768), ("bert-large", 16, 1024)])
def test_heads_are_of_64(suite: str, heads: int, hidden: int) -> None:
    (problem,) = [w.problem.to_dict() for w in SUITES[suite] if w.op == "attention"]
    assert (problem["B"], problem["H"], problem["Sq"], problem["Skv"], problem["D"]) == (8, heads, 128, 128, 64)
    assert problem["H"] * problem["D"] == hidden
    assert not problem["causal"]

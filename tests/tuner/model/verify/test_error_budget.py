"""The text of `--max-error`: what is read from it, and one line for what can't be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuning_db.errors import UsageError


def test_measures_and_limits() -> None:
    assert Budget.parse("cosine=0.999,max=0.01,top1=0.99") == Budget(cosine=0.999, max=0.01, top1=0.99)
    assert Budget.parse(" sqnr = 30 , centred=1e-3 ") == Budget(sqnr=30.0, centred=1e-3)


def test_a_bare_number_is_the_relative_maximum() -> None:
    assert Budget.parse("0.02") == Budget(max=0.02)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cosin=0.9", "no measure 'cosin'; did you mean cosine? (measures: max, centred, cosine, top1, sqnr)"),
        ("", "'' is not MEASURE=LIMIT"),
        ("0.1,cosine=0.9", "'0.1' is not MEASURE=LIMIT"),
        ("max=0.1,", "'' is not MEASURE=LIMIT"),
        ("max=0.1,max=0.2", "max is given twice"),
        ("max=much", "max='much' is no number"),
        ("top1=99%", "top1='99%' is no number: write 0.99"),
        ("top1=some%", "top1='some%' is no number"),
        ("cosine=1.0000001", "cosine=1.0000001 must be from -1 to 1"),
        ("max=nan", "max=nan is no finite number"),
        ("inf", "max=inf is no finite number"),
        ("max=-1", "max=-1 must be at least 0"),
        ("top1=99", "top1=99 must be from 0 to 1"),
        ("cosine=1.5", "cosine=1.5 must be from -1 to 1"),
    ],
)
def test_what_is_wrong_gets_one_line(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert words in str(caught.value)
    assert f"--max-error {text!r}" in str(caught.value)
    assert "\n" not in str(caught.value)


LIMITS = {
    "max": st.none() | st.floats(0, 1e6),
    "centred": st.none() | st.floats(0, 1e6),
    "cosine": st.none() | st.floats(-1, 1),
    "top1": st.none() | st.floats(0, 1),
    "sqnr": st.none() | st.floats(0, 200),
}


@given(st.builds(Budget, **LIMITS))
def test_a_budget_reads_what_it_writes(budget: Budget) -> None:
    if budget != Budget():
        assert Budget.parse(str(budget)) == budget

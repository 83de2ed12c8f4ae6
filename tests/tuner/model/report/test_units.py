"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuner.model.report.units import bytes_text, digits, factor_text, flops_text, share_text, time_text


@pytest.mark.parametrize(
    ("time_us", "words"),
    [(0, "0 µs"), (0.0123, "0.0123 µs"), (9.994, "9.99 µs"), (9.996, "10.0 µs"), (999.4, "999 µs"), (999.6, "1.00 ms")],
)
def test_times(time_us: float, words: str) -> None:
    assert time_text(time_us) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (102_236_160, "97.5 MiB"),
        (1 << 30, "1.00 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_sizes(count: float, words: str) -> None:
    assert bytes_text(count) == words


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0"), (12, "12.0 FLOP"), (4.09e9, "4.09 GFLOP"), (2e13, "20.0 TFLOP")]
)
def test_operations(count: float, words: str) -> None:
    assert flops_text(count) == words


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (23.0, 10.0, "2.30× faster"),
        (10.0, 11.0, "1.10× slower"),
        (10.0, 10.01, "equal"),
        (10.0, 9.99, "equal"),
        (0.0, 1.0, "no factor can be told"),
        (1.0, 0.0, "no factor can be told"),
    ],
)
def test_factors(before: float, after: float, words: str) -> None:
    assert factor_text(before, after) == words


def test_shares() -> None:
    assert [share_text(share) for share in (0, 0.0001, 0.0005, 0.123, 1)] == [
        "0.0 %",
        "< 0.1 %",
        "0.1 %",
        "12.3 %",
        "100.0 %",
    ]


@given(st.floats(1e-6, 1e6))
def test_digits_are_near_the_number(number: float) -> None:
    assert float(digits(number)) == pytest.approx(number, rel=5.01e-3)
    assert float(digits(-number)) == -float(digits(number))

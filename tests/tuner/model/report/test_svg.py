"""Plots: marks and roofs where they belong, and names that can't get out of their text."""

from __future__ import annotations

import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuner.model.report.svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    LogAxis,
    Point,
    bar,
    escaped,
    roofline,
    scatter,
)

POINTS = [
    Point(4.0, 2.0, "gemm", False, "inner <b>&"),
    Point(40.0, 30.0, "conv2d", True, "top"),
    Point(0.5, 0.01, "other", False, "low"),
]
PEAKS = {"fp16": 71.2, "bf16": 71.2, "fp32": 35.6}


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(svg).findall(f".//{tag}")


def number(element: ElementTree.Element, name: str) -> float:
    return float(element.attrib[name])


def test_marks_are_in_the_frame_and_in_order() -> None:
    marks = elements(roofline(POINTS, PEAKS, 936), "circle")
    places = [(number(mark, "cx"), number(mark, "cy")) for mark in marks]
    assert all(LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in places)
    assert places[2][0] < places[0][0] < places[1][0]
    assert places[2][1] > places[0][1] > places[1][1]  # downwards is less
    assert [mark.attrib["class"] for mark in marks] == ["mark gemm", "mark conv2d hollow", "mark other"]
    assert [title.text for mark in marks for title in mark] == ["inner <b>&", "top", "low"]


def test_the_roof_is_bandwidth_up_to_the_peak() -> None:
    """A mark at the ridge of a peak lies where the slope meets the plateau."""
    ridge = 35.6 / 0.936
    svg = roofline([*POINTS, Point(ridge, 35.6, "gemm", False, "ridge")], PEAKS, 936)
    mark = elements(svg, "circle")[-1]
    roofs = [line for line in elements(svg, "line") if line.attrib["class"] == "roof"]
    slope, plateaus = roofs[0], roofs[1:]
    x1, y1, x2, y2 = (number(slope, name) for name in ("x1", "y1", "x2", "y2"))
    on_slope = y1 + (y2 - y1) * (number(mark, "cx") - x1) / (x2 - x1)
    assert on_slope == pytest.approx(number(mark, "cy"), abs=0.2)
    lowest = max(plateaus, key=lambda line: number(line, "y1"))
    assert number(lowest, "y1") == number(lowest, "y2") == pytest.approx(number(mark, "cy"), abs=0.2)
    assert number(lowest, "x1") == pytest.approx(number(mark, "cx"), abs=0.2)
    assert len(plateaus) == 2  # two units have one peak


def test_labels_name_every_unit_and_don_t_overlap() -> None:
    svg = roofline(POINTS, {"a": 10.0, "b": 10.5, "c": 11.0}, 900)
    labels = [
        text for text in elements(svg, "text") if "TFLOP/s" in (text.text or "") and text.attrib["class"] == "note"
    ]
    assert [label.text for label in labels] == ["a: 10.0 TFLOP/s", "b: 10.5 TFLOP/s", "c: 11.0 TFLOP/s"]
    places = [number(label, "y") for label in labels]
    assert all(lower - upper >= 15 for lower, upper in pairwise(places))


def test_a_plot_of_one_point_or_of_zeros() -> None:
    for points in ([Point(1.0, 1.0, "a", False, "")], [Point(0.0, 0.0, "a", False, "")]):
        assert len(elements(scatter(points, "x", "y", "title"), "circle")) == 1


@given(st.floats(1e-9, 1e9), st.floats(1.0, 1e9))
def test_axes_have_ticks_at_round_numbers(low: float, ratio: float) -> None:
    axis = LogAxis([low, low * ratio], 100, 700)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 25
    assert ticks == sorted(ticks)
    assert all(100 <= axis(tick) <= 700 for tick in ticks)
    assert {f"{tick:e}"[:3] for tick in ticks} <= {"1.0", "1.5", "2.0", "3.0", "4.0", "5.0", "6.0", "8.0"}


def test_bars_are_as_long_as_their_share_and_no_longer() -> None:
    widths = [number(elements(bar(length, "after"), "rect")[0], "width") for length in (0.0, 0.25, 1.0, 7.0, -1.0)]
    assert widths == [0, 250, 1000, 1000, 0]


@given(st.text())
def test_no_text_has_markup_or_signs_that_don_t_print(text: str) -> None:
    safe = escaped(text)
    assert not re.search(r"[<>\"']", safe)
    assert safe.isprintable()
    safe.encode("utf-8")
    element = ElementTree.fromstring(f"<a b='{safe}'>{safe}</a>")
    assert element.attrib["b"] == (element.text or "")
    if text.isprintable():
        assert element.attrib["b"] == text


def test_what_turns_the_direction_of_writing_is_replaced() -> None:
    assert escaped("a\u202eb\x00\ud800<") == "a\ufffdb\ufffd\ufffd&lt;"

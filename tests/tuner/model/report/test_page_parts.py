"""Cells, tables and marks of the page."""

from __future__ import annotations

from tests.tuner.model.pages import Page
from tilewright.tuner.model.report.page_parts import (
    Cell,
    badge,
    badges,
    code_lines,
    digits_of,
    folded,
    name,
    number,
    percent,
    table,
    text,
    timed,
    titled,
)

HOSTILE = "</td><script>alert(1)</script>\"'&"


def test_every_cell_escapes() -> None:
    for cell in (text(HOSTILE), name(HOSTILE), number(HOSTILE), timed(1.0, HOSTILE)):
        assert "<script" not in cell.markup
        page = Page(table(("title",), [[cell]]))
        assert HOSTILE in page.rows[1][0]
    for markup in (titled(HOSTILE, "x"), folded(HOSTILE, "x"), badge(HOSTILE), code_lines([HOSTILE])):
        assert "<script" not in markup


def test_a_table_aligns_numbers_and_is_wide_for_bars() -> None:
    page = Page(table(("a", "b"), [[text("x"), number("1")], [text("y"), number("2")]]))
    assert [attributes.get("class") for tag, attributes in page.elements if tag == "th"] == [None, "n"]
    assert page.rows == [["a", "b"], ["x", "1"], ["y", "2"]]
    assert ("table", {}) in page.elements
    assert ("table", {"class": "wide"}) in Page(table(("a",), [[Cell("<i></i>", "bars")]])).elements


def test_a_long_table_says_what_it_leaves_out() -> None:
    markup = table(("a",), [[text(index)] for index in range(30)], most=10)
    assert len(Page(markup).rows) == 11
    assert "20 more rows are in report.json" in markup
    assert "more rows" not in table(("a",), [[text(index)] for index in range(10)], most=10)


def test_of_nothing_there_is_nothing() -> None:
    assert table(("a",), []) == ""
    assert titled("title", "") == ""
    assert folded("title", "") == ""
    assert badge("") == ""
    assert timed(None, "measured").markup == "–"
    assert digits_of(None) == "–"
    assert percent(0, 3) == "none before"


def test_a_time_has_its_provenance_next_to_it() -> None:
    assert timed(12.3, "measured").markup == '12.3 µs <span class="badge measured">measured</span>'
    assert badges("predicted", "predicted").count("<span") == 1
    assert badges("measured", "predicted").count("<span") == 2
    assert 'class="badge free"' in badge("no such word")

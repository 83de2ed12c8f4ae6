"""`report.html`: whole, self-contained, safe against names that are out to harm, and honest about times."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tuner.model import reports
from tests.tuner.model.pages import Page
from tests.tuner.model.reports import sample
from tilewright.tuner.model.report import html, page_parts
from tilewright.tuner.model.report.document import ModelReport
from tilewright.tuner.model.report.html import POLICY, render, write_page

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e"
SECTIONS = [
    "Time, layer by layer",
    "Roofline",
    "Errors against the original",
    "Memory",
    "Fusion",
    "Workloads",
    "Precision",
]


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_all_parts_are_there() -> None:
    page = render(sample())
    assert headings(page) == [*SECTIONS, "Files"]
    Page(page)


def test_what_a_run_left_out_is_left_out() -> None:
    page = render(sample(plain=True))
    assert headings(page) == ["Time, layer by layer", "Roofline", "Memory", "Fusion", "Workloads"]
    Page(page)


def test_it_needs_nothing_from_elsewhere_and_runs_nothing() -> None:
    page = Page(render(sample()))
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "img", "iframe", "object", "base", "form", "a"}
    )
    attributes = {name for _, given in page.elements for name in given}
    assert attributes.isdisjoint({"src", "href", "style", "srcset", "action", "xlink:href"})
    assert not [name for name in attributes if name.startswith("on")]
    policies = [given["content"] for _, given in page.elements if given.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [POLICY]
    assert "default-src 'none'" in POLICY
    assert not re.search(r"https?://", render(sample()))


def test_names_in_the_file_are_text_wherever_they_stand() -> None:
    """Every name of the model is hostile: the page has the elements of one whose names are not."""
    safe, hostile = Page(render(sample("ok"))), Page(render(sample(HOSTILE)))
    assert [(tag, list(given)) for tag, given in hostile.elements] == [
        (tag, list(given)) for tag, given in safe.elements
    ]
    shown = HOSTILE.replace("\u202e", "\ufffd")
    seen = " ".join(hostile.words)
    for name in ("layer0", "softmax", "model.onnx", "x", "lstm", "data.npz", "refused"):
        assert f"{shown}{name}" in seen
    assert "\u202e" not in render(sample(HOSTILE))


def test_equal_reports_are_equal_pages() -> None:
    assert render(sample()) == render(reports.sample.__wrapped__())


def test_every_time_of_a_layer_has_what_it_is_based_on() -> None:
    page = Page(render(sample()))
    start = page.rows.index(["layer", "operator", "before", "after", ""])
    end = page.rows.index(["", "whole model", "measured", "transferred", "predicted", "roofline"])
    rows = page.rows[start + 1 : end]
    assert len(rows) == 4
    for row in rows:
        for cell in row[2:4]:
            assert re.fullmatch(r"[\d.]+ [µm]s (measured|transferred|predicted|roofline)", cell)
    assert {row[0]: row[3].split()[-1] for row in rows} == {
        "layer0": "measured",
        "layer1": "transferred",
        "layer2": "predicted",
        "softmax": "roofline",
    }
    for row in page.rows[end + 1 : end + 3]:
        assert row[1].endswith(" predicted")


def called(report: ModelReport, before: str, after: str) -> str:
    part = report.estimate
    made = replace(part, before=replace(part.before, provenance=before), after=replace(part.after, provenance=after))
    return render(replace(report, estimate=made))


def test_the_whole_is_called_predicted_unless_it_was_measured() -> None:
    assert "Times of the whole model are <b>predicted</b>" in render(sample())
    assert "Times of the whole model are <b>predicted</b>" in called(sample(), "predicted", "measured")
    assert "Times of the whole model are" not in called(sample(), "measured", "measured")


def test_the_longest_layers_have_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "MOST_BARS", 2)
    page = render(sample())
    rows = Page(page).rows
    start = rows.index(["layer", "operator", "before", "after", ""])
    assert [row[0] for row in rows[start + 1 : start + 3]] == ["layer1", "layer0"]
    assert rows[start + 3][1] == "whole model"
    assert "The 2 longest of 4:" in page


def test_bars_are_in_proportion() -> None:
    page = Page(render(sample()))
    bars = [given for tag, given in page.elements if tag == "rect"][:8]
    before = [float(given["width"] or 0) for given in bars if given["class"] == "before"]
    after = [float(given["width"] or 0) for given in bars if given["class"] == "after"]
    assert max(*before, *after) == 1000
    part = sample().estimate.after
    times = sorted((row.time_us for row in part.nodes), reverse=True)
    assert sorted(after, reverse=True)[1] / max(after) == pytest.approx(times[1] / times[0], abs=1e-3)


def test_a_device_that_isn_t_there_is_named_as_such() -> None:
    report = sample()
    assert "not at hand: nothing here was run on it" in render(report)
    there = replace(report, device=replace(report.device, present=True))
    assert "not at hand" not in render(there)


def test_warnings_stand_at_the_head() -> None:
    page = render(replace(sample(), warnings=("'<b>' is off",)))
    assert page.index('<p class="note-box failed">') < page.index("<h2>")
    assert "&#x27;&lt;b&gt;&#x27; is off" in page


def test_values_of_unknown_size_are_told() -> None:
    report = sample()
    after = replace(report.memory.after, unknown_values=3)
    assert "whose size depends on the data" not in render(report)
    assert "0 before, 3 after" in render(replace(report, memory=replace(report.memory, after=after)))


def test_long_tables_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    report = sample()
    many = report.fusion.left * (page_parts.MOST_ROWS + 5)
    page = render(replace(report, fusion=replace(report.fusion, left=many)))
    assert "5 more rows are in report.json" in page
    assert len(page) < 400_000


def test_it_is_written_whole(tmp_path: Path) -> None:
    write_page(sample(), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(sample())

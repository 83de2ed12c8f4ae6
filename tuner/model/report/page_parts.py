"""What the page of `html` is made of: cells, tables, marks. All but markup made here is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tilewright.tuner.model.report.svg import escaped as esc
from tilewright.tuner.model.report.units import digits, share_text, time_text

MOST_ROWS = 1000
"""Rows of a table; `report.json` has all."""


class Cell(NamedTuple):
    """A cell of a table: markup, and its class."""

    markup: str
    kind: str = ""


def text(value: object) -> Cell:
    """Words."""
    return Cell(esc(value))


def name(value: str) -> Cell:
    """A name out of the model."""
    return Cell(f"<code>{esc(value)}</code>", "name")


def number(words: str) -> Cell:
    """A number as it is to be read, at the right of its cell."""
    return Cell(esc(words), "n")


def timed(time_us: float | None, provenance: str | None) -> Cell:
    """A time, with what it is based on next to it."""
    if time_us is None:
        return Cell("–", "n")
    return Cell(f"{esc(time_text(time_us))} {badge(provenance or '')}", "n")


def badge(provenance: str) -> str:
    """What a time is based on, as a mark."""
    known = provenance if provenance in ("measured", "transferred", "predicted", "roofline") else "free"
    return f'<span class="badge {known}">{esc(provenance)}</span>' if provenance else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], most: int = MOST_ROWS) -> str:
    """A table, as wide as the page if it has bars. Its columns are at the right where the first row's are."""
    listed = list(rows)
    if not listed:
        return ""
    classes = [' class="n"' if cell.kind == "n" else "" for cell in listed[0]]
    wide = ' class="wide"' if any(cell.kind == "bars" for cell in listed[0]) else ""
    parts = [f'<div class="scroll"><table{wide}><thead><tr>']
    parts += [f"<th{kind}>{esc(title)}</th>" for title, kind in zip(head, classes, strict=True)]
    parts.append("</tr></thead><tbody>")
    for row in listed[:most]:
        cells = (f"<td{f' class={cell.kind!r}' if cell.kind else ''}>{cell.markup}</td>" for cell in row)
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append("</tbody></table></div>")
    if len(listed) > most:
        parts.append(f'<p class="soft">{len(listed) - most} more rows are in report.json.</p>')
    return "".join(parts)


def folded(title: str, body: str) -> str:
    """What is seen when its title is clicked; nothing if there is nothing."""
    return f"<details><summary>{esc(title)}</summary>{body}</details>" if body else ""


def code_lines(lines: Iterable[str]) -> str:
    """Lines of code."""
    return "\n".join(map(esc, lines))


def titled(title: str, body: str) -> str:
    """Something under a heading of its own; nothing if there is nothing."""
    return f"<h3>{esc(title)}</h3>{body}" if body else ""


def badges(before: str, after: str) -> str:
    """What two times are based on: one mark if it is the same."""
    return badge(before) if before == after else f"{badge(before)} → {badge(after)}"


def percent(before: int, after: int) -> str:
    """What is left of a size."""
    return share_text(after / before) if before else "none before"


def digits_of(value: float | None) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else digits(value)

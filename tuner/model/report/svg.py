"""Plots as SVG, to stand in a page: no scripts, colours by the page's style, every name escaped.

A roofline plot is Williams, Waterman & Patterson's (2009): operations per byte against operations per second, both on
logarithmic axes, under the least of the peak and intensity · bandwidth.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tilewright.tuner.model.report.units import digits

WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 16, 48
LABEL_GAP = 15
"""Least distance of two labels' lines."""


@dataclass(frozen=True, slots=True)
class Point:
    """A mark in a plot."""

    x: float
    y: float
    kind: str  # a class of the page's style: its colour
    hollow: bool
    title: str  # shown where the pointer rests


def escaped(text: object) -> str:
    """Text for a page, whatever it is: markup is written out, and signs that don't print, that turn the direction of
    writing or that UTF-8 has none for become U+FFFD."""
    return html.escape("".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in str(text)))


class LogAxis:
    """A logarithmic axis: values to places, and its ticks."""

    def __init__(self, values: Iterable[float], start: float, end: float) -> None:
        given = [value for value in values if value > 0] or [1.0]
        low, high = min(given) / 1.6, max(given) * 1.6
        self.low, self.high = low, high
        self._start, self._scale = start, (end - start) / math.log(high / low)

    def __call__(self, value: float) -> float:
        """Where a value is; values beyond the ends are at the ends."""
        return self._start + self._scale * math.log(min(max(value, self.low), self.high) / self.low)

    def ticks(self) -> list[float]:
        """Powers of ten; where there are fewer than three, 2 and 5 times them, or more."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if self.low <= value <= self.high]
            if len(found) >= 3:
                break
        return found


def roofline(points: Sequence[Point], peaks: Mapping[str, float], bandwidth_gbs: float) -> str:
    """The plot.

    Args:
        points: operations per byte, and TFLOP/s.
        peaks: TFLOP/s by unit.
        bandwidth_gbs: of device memory.
    """
    slope = bandwidth_gbs / 1e3  # TFLOP/s at one operation per byte
    ridges = [peak / slope for peak in peaks.values()]
    x = LogAxis([*(point.x for point in points), *ridges], LEFT, WIDTH - RIGHT)
    y = LogAxis([*(point.y for point in points), *peaks.values()], HEIGHT - BOTTOM, TOP)
    parts = [*_axes(x, y, "operations per byte of device memory", "TFLOP/s")]
    top = max(peaks.values(), default=y.high)
    left = max(x.low, y.low / slope)
    parts.append(_line(x(left), y(left * slope), x(top / slope), y(top), "roof"))
    merged: dict[float, list[str]] = {}
    for unit, peak in sorted(peaks.items()):
        merged.setdefault(peak, []).append(unit)
    places = _apart([y(peak) - 6 for peak in sorted(merged)])
    for (peak, units), place in zip(sorted(merged.items()), places, strict=True):
        parts.append(_line(x(peak / slope), y(peak), WIDTH - RIGHT, y(peak), "roof"))
        parts.append(_text(WIDTH - RIGHT - 4, place, f"{', '.join(units)}: {digits(peak)} TFLOP/s", "end", "note"))
    middle = math.sqrt(left * top / slope)
    angle = math.degrees(math.atan2(y(middle * slope * 2) - y(middle * slope), x(middle * 2) - x(middle)))
    at = f'transform="rotate({angle:.1f} {x(middle):.1f} {y(middle * slope) - 7:.1f})"'
    parts.append(_text(x(middle), y(middle * slope) - 7, f"{digits(bandwidth_gbs)} GB/s", "middle", "note", at))
    parts += _marks(points, x, y)
    return _figure(parts, "Roofline plot of the layers before and after")


def scatter(points: Sequence[Point], x_title: str, y_title: str, title: str) -> str:
    """Points on two logarithmic axes. What is 0 stands at the lower end."""
    x = LogAxis((point.x for point in points), LEFT, WIDTH - RIGHT)
    y = LogAxis((point.y for point in points), HEIGHT - BOTTOM, TOP)
    return _figure([*_axes(x, y, x_title, y_title), *_marks(points, x, y)], title)


def bar(length: float, kind: str, title: str = "") -> str:
    """One bar of a table: `length` of its cell's width, from 0 to 1."""
    tip = f"<title>{escaped(title)}</title>" if title else ""
    return (
        f'<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" role="img"><g>{tip}'
        f'<rect class="{kind}" width="{1000 * min(max(length, 0.0), 1.0):.1f}" height="10" rx="2"/></g></svg>'
    )


def _figure(parts: Iterable[str], title: str) -> str:
    head = f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">'
    return "\n".join([head, *parts, "</svg>"])


def _axes(x: LogAxis, y: LogAxis, x_title: str, y_title: str) -> Iterable[str]:
    for value in x.ticks():
        yield _line(x(value), TOP, x(value), HEIGHT - BOTTOM, "grid")
        yield _text(x(value), HEIGHT - BOTTOM + 17, _tick(value), "middle", "tick")
    for value in y.ticks():
        yield _line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")
        yield _text(LEFT - 7, y(value) + 4, _tick(value), "end", "tick")
    yield _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_title, "middle", "axis")
    turned = f'transform="rotate(-90 14 {(TOP + HEIGHT - BOTTOM) / 2:.1f})"'
    yield _text(14, (TOP + HEIGHT - BOTTOM) / 2, y_title, "middle", "axis", turned)


def _marks(points: Iterable[Point], x: LogAxis, y: LogAxis) -> Iterable[str]:
    for point in points:
        kind = f"mark {point.kind}{' hollow' if point.hollow else ''}"
        yield (
            f'<circle class="{kind}" cx="{x(point.x):.1f}" cy="{y(point.y):.1f}" r="4.5">'
            f"<title>{escaped(point.title)}</title></circle>"
        )


def _apart(places: Sequence[float]) -> list[float]:
    """Places from the lowest label up, moved further up where two are too near."""
    found: list[float] = []
    for place in places:
        found.append(min(place, found[-1] - LABEL_GAP) if found else place)
    return found


def _tick(value: float) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e6 else f"{value:.0e}"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str, extra: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escaped(text)}</text>'

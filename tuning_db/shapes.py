"""Which problems are near each other in shape, and how far apart: what a lookup asks about a problem not on record.

A problem is split into its *sizes*, the fields that are positive integers, and its *class*, all the rest: every other
value, and the names of the sizes. (A zero stays in the class, for a page size of 0 is no small page.) Only problems of
one class can be near. The table `shapes` has a row for each problem that was measured, with its class and its sizes in
the order of their names, so that the nearest are found by an index.

Of two problems of a class, `Near` says which sizes may differ; their distance is the sum of the |log2| ratios of these:
1 is one of them doubled or halved. Beyond `FARTHEST` they are strangers.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.tuning_db.record import canonical_json, read_json

FARTHEST = 4.0
"""Distance beyond which problems don't compare: one size 16 times another, say, or four doubled."""

COLUMNS = tuple(f"size{place}" for place in range(16))
"""Of the sizes in their order. Those of a problem that has more stay in its class."""

Read = Callable[[str, Sequence[Any]], Sequence[Any]]
"""All rows of a query: `DatabaseFile.rows`."""

_LARGEST = 2**63 - 1  # of SQLite's integers
_DIGITS = 9  # of a distance that count: equal ones must be found equal
_RINGS = (1 / 16, 1 / 4, 1.0, FARTHEST)  # distances at which a search pauses
_FEW = 16


@dataclass(frozen=True, slots=True)
class Near:
    """Which problems may stand in for one: in what they may differ from it. All other fields must be equal."""

    sizes: tuple[str, ...]  # may differ, at the price of distance
    free: tuple[str, ...] = ()  # sizes that may differ at none, since they follow from others
    multiples: tuple[tuple[str, int], ...] = ()  # sizes that must agree in being a multiple of so much, or not
    # The last word on a problem, in canonical JSON, that all this lets through.
    accept: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Shape:
    """A problem as split here."""

    digest: str  # of its class; empty for a text that is no problem
    sizes: dict[str, int]  # in the order of their names

    @property
    def volume(self) -> float:
        """Sum of the log2 of the sizes: it differs by no more than the distance, where no size is free."""
        return sum(map(math.log2, self.sizes.values()))


def split(problem: str) -> Shape:
    """The class and the sizes of a problem, from its canonical JSON."""
    try:
        fields = read_json(problem)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        return Shape("", {})
    sizes = {name: value for name, value in sorted(fields.items()) if type(value) is int and 0 < value <= _LARGEST}
    sizes = dict(list(sizes.items())[: len(COLUMNS)])
    others = {name: value for name, value in fields.items() if name not in sizes}
    text = canonical_json({"sizes": list(sizes), "others": others})
    return Shape(hashlib.sha256(text.encode()).hexdigest()[:16], sizes)


def distance(near: Near, asked: str, found: str) -> float | None:
    """How far apart two problems are, in doublings; None where they don't compare. The rule of `nearest`, for one pair.

    `near` is that of the problem asked for.
    """
    one, other = split(asked), split(found)
    if not one.digest or one.digest != other.digest:
        return None
    total = 0.0
    for name, size in one.sizes.items():
        if name in near.sizes:
            total += abs(math.log2(size / other.sizes[name]))
        elif name not in near.free and size != other.sizes[name]:
            return None
    for name, factor in near.multiples:
        if name in one.sizes and (one.sizes[name] % factor == 0) != (other.sizes[name] % factor == 0):
            return None
    total = round(total, _DIGITS)
    return total if total <= FARTHEST and (near.accept is None or near.accept(found)) else None


def nearest(read: Read, near: Near, op: str, arch: int, asked: str) -> Iterator[tuple[str, float]]:
    """The measured problems near `asked` and their distances, nearest first, `asked` itself left out.

    Read in rings, and the first few of each alone: there may be thousands, and mostly the first is taken.
    """
    shape = split(asked)
    inner = -1.0
    for outer in _RINGS:
        text, parameters = _query(near, op, arch, shape, outer)
        taken = 0
        for limit in (_FEW, -1):
            rows = read(f"{text} LIMIT ? OFFSET ?", (*parameters, limit, taken))
            for row_id, ratio in rows:
                far = round(math.log2(ratio), _DIGITS)
                if inner < far <= outer:
                    for (problem,) in read("SELECT problem FROM shapes WHERE id = ?", (row_id,)):
                        if problem != asked and (near.accept is None or near.accept(problem)):
                            yield problem, far
            taken += len(rows)
            if len(rows) < _FEW:
                break
        inner = outer


def _query(near: Near, op: str, arch: int, shape: Shape, most: float) -> tuple[str, tuple[Any, ...]]:
    """SQL for `id` and `ratio`, 2 to the power of the distance, of all problems at a distance of at most `most` and of
    some beyond, in order; and its parameters.

    The text is the same for all problems of one pattern, so that SQLite needn't compile it for each.
    """
    ratios: list[str] = ["1.0"]
    conditions = ["op = ?", "arch = ?", "class = ?"]
    sizes: list[float] = []  # parameters of the ratios, which stand first in the text
    bounds: list[Any] = [op, arch, shape.digest]
    if not near.free:
        conditions.append("volume BETWEEN ? AND ?")
        bounds += [shape.volume - most - 1e-6, shape.volume + most + 1e-6]
    factor = 2.0**most
    for column, (name, size) in zip(COLUMNS, shape.sizes.items(), strict=False):
        if name in near.sizes:
            # No size is further than the whole problem: this costs a tenth of a ratio.
            conditions.append(f"{column} BETWEEN ? AND ?")
            bounds += [math.floor(size / factor), math.ceil(size * factor)]
            # CASE takes 2/3 of the time of max() and min(), which are calls.
            ratios.append(f"(CASE WHEN {column} > ? THEN {column} / ? ELSE ? / {column} END)")
            sizes += [float(size)] * 3
        elif name not in near.free:
            conditions.append(f"{column} = ?")
            bounds.append(size)
        for of, multiple in near.multiples:
            if of == name:
                conditions.append(f"({column} % {multiple} = 0) = ?")
                bounds.append(size % multiple == 0)
    # Of equally near ones by their sizes, which the index has, so that no answer hangs on which was measured first.
    order = ", ".join(["ratio", *COLUMNS[: len(shape.sizes)]])
    text = f"SELECT id, {' * '.join(ratios)} AS ratio FROM shapes WHERE {' AND '.join(conditions)} ORDER BY {order}"
    return text, (*sizes, *bounds)


def place(connection: sqlite3.Connection) -> None:
    """Give its class and sizes to every row of `shapes` that has none yet: triggers add the rows, and can't split.

    Files are full of what `split` once said: changing it takes a step of the schema that empties `class`.
    """
    unplaced = connection.execute("SELECT id, problem FROM shapes WHERE class IS NULL").fetchall()
    for row_id, problem in unplaced:
        shape = split(problem)
        sizes = [*shape.sizes.values(), *[None] * (len(COLUMNS) - len(shape.sizes))]
        connection.execute(
            f"UPDATE shapes SET class = ?, volume = ?, {', '.join(f'{column} = ?' for column in COLUMNS)} WHERE id = ?",
            (shape.digest, shape.volume, *sizes, row_id),
        )

"""Bringing the records of one file into another of the same device, where two have an outcome of the same thing.

Two records are rivals if key, configuration and provenance are equal: measured and predicted never are. The one with
more evidence stays:

1. a wrong result before all others: what was wrong once may be again;
2. a time before a refusal by compiler or limits, and that before a crash or a timeout, which may be the machine's;
3. of two times, that of more samples, then of less spread ((p90 - p10) / median);
4. the newer one;
5. of two that agree in all that, the one whose text sorts last: any rule will do that doesn't ask which came first.

So the result of merging any number of files doesn't hang on their order, and merging one again changes nothing. A
record keeps its run: where and with what it was made, and when.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.tuning_db.errors import DatabaseCorruptError, UsageError
from tilewright.tuning_db.file import DatabaseFile
from tilewright.tuning_db.interchange import Objection, duration, in_key_order
from tilewright.tuning_db.record import Record, Status, read_json
from tilewright.tuning_db.rows import Row, insertion, record_of
from tilewright.tuning_db.strict_json import plain
from tilewright.tuning_db.text import shown


@dataclass(frozen=True, slots=True)
class Merged:
    """What became of the records of a source."""

    added: int = 0  # no rival
    replaced: int = 0  # more evidence than the rival that was there
    kept: int = 0  # less
    known: int = 0  # there already, the same in every field

    @property
    def total(self) -> int:
        """Records of the source."""
        return self.added + self.replaced + self.kept + self.known


_RANKS = {
    Status.INCORRECT: 3,
    Status.OK: 2,
    Status.COMPILE_ERROR: 1,
    Status.OUT_OF_RESOURCES: 1,
    Status.INVALID: 1,
    Status.RUNTIME_ERROR: 0,
    Status.TIMEOUT: 0,
}


def merge(target: DatabaseFile, source: DatabaseFile, device: str) -> Merged:
    """Bring the records of `source` into `target`, in one transaction: all of it or nothing.

    Raises:
        UsageError: a record is of another device than `device`, or both are one file.
        DatabaseCorruptError: a row of `source` is no record.
        DatabaseError: a file can't be read or written.
    """

    def action(theirs: sqlite3.Connection) -> Merged:
        # Before the lock is taken: others wait to write for as long as it is held.
        _check_all(theirs, source.path, device)
        return target.write(lambda ours: _merge(ours, theirs))

    _check_apart(target.path, source.path)
    return source.read(action)


def check(target: Path, source: DatabaseFile, device: str, objection: Objection = lambda record: None) -> None:
    """Does nothing if the records of `source` may be brought into the file at `target`, which need not be there yet: to
    read all of several sources before the first is merged. `objection` may refuse a record, as with
    `interchange.read_export`.

    Raises:
        UsageError: as `merge`, or a record was objected to.
        DatabaseError: as `merge`.
    """
    _check_apart(target, source.path)
    source.read(lambda theirs: _check_all(theirs, source.path, device, objection))


def _check_apart(target: Path, source: Path) -> None:
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"{source} can't be merged into itself")


def _check_all(theirs: sqlite3.Connection, path: Path, device: str, objection: Objection = lambda record: None) -> None:
    broken = theirs.execute("PRAGMA foreign_key_check").fetchone()
    if broken:
        raise DatabaseCorruptError(f"{path}: record {broken['rowid']} is of a run that there is not")
    for row in in_key_order(theirs):
        record = _checked(row, path, device)
        if (reason := objection(record)) is not None:
            raise UsageError(f"{path}: record {row['id']} is not valid for these kernels ({reason}): delete that row")


def _merge(ours: sqlite3.Connection, theirs: sqlite3.Connection) -> Merged:
    counts = dict.fromkeys(("added", "replaced", "kept", "known"), 0)
    arriving, present = _Runs(theirs), _Runs(ours)
    ids: dict[int, int] = {}  # of their runs, here
    put = ""
    for row in in_key_order(theirs):
        rival = ours.execute(_RIVAL, (row["key_digest"], row["config"], row["provenance"])).fetchone()
        if rival is None:
            fate = "added"
        else:
            theirs_weighs, ours_weighs = _weight(row, arriving.of(row)), _weight(rival, present.of(rival))
            fate = "known" if theirs_weighs == ours_weighs else "replaced" if theirs_weighs > ours_weighs else "kept"
        counts[fate] += 1
        if fate in ("added", "replaced"):
            run = row["run_id"]
            if run not in ids:
                ids[run] = _run_id(ours, arriving.of(row))
            fields = {**_without_ids(row), "run_id": ids[run]}
            put = put or insertion("records", fields)
            ours.execute(put, fields)
    return Merged(**counts)


_RIVAL = "SELECT * FROM records WHERE key_digest = ? AND config = ? AND provenance = ?"


def _checked(row: sqlite3.Row, path: Path, device: str) -> Record:
    record = record_of(path, row)
    if record.key.digest() != row["key_digest"]:
        raise DatabaseCorruptError(f"{path}: record {row['id']} doesn't match its key: delete that row")
    for name in ("median_us", "p10_us", "p90_us", "predicted_us"):
        if row[name] is not None and (wanted := duration(row[name])) is not None:
            raise DatabaseCorruptError(f"{path}: record {row['id']}: {name}={row[name]} must be {wanted}")
    for name, text in (("problem", record.key.problem), ("config", record.config)):
        # Programs will read these when they ask for an answer.
        if (wanted := _wanted_of_json(text)) is not None:
            said = f"has the {name} {shown(text)}, which must be {wanted}"
            raise DatabaseCorruptError(f"{path}: record {row['id']} {said}: delete that row")
    if record.key.device != device:
        raise UsageError(
            f"{path}: record {row['id']} is of {shown(record.key.device)}, and to be merged with {device}'s"
        )
    return record


def _wanted_of_json(text: str) -> str | None:
    try:
        return plain(read_json(text))
    except ValueError:
        return "a JSON object"


def _weight(row: Row, run: dict[str, Any]) -> tuple[Any, ...]:
    """The evidence of a record: of two rivals the greater stays."""
    samples, spread = 0, 0.0
    if row["status"] == Status.OK and row["median_us"]:
        samples, spread = row["samples"], (row["p90_us"] - row["p10_us"]) / row["median_us"]
    content = [sorted(fields.items(), key=lambda field: field[0]) for fields in (_without_ids(row), run)]
    return (_RANKS[Status(row["status"])], samples, -spread, row["created_at"], repr(content))


class _Runs:
    """The runs of a file, as they are in every file; the latest few are kept."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._known: dict[int, dict[str, Any]] = {}

    def of(self, record: Row) -> dict[str, Any]:
        """The run of a record."""
        run = record["run_id"]
        if run not in self._known:
            if len(self._known) >= _MOST_RUNS:
                self._known.clear()
            query = "SELECT * FROM runs WHERE id = ?"
            self._known[run] = _without_ids(self._connection.execute(query, (run,)).fetchone())
        return self._known[run]


_MOST_RUNS = 1000


def _without_ids(row: Row) -> dict[str, Any]:
    """What of a row is the same in every file."""
    fields = dict(row)
    for name in ("id", "run_id"):
        fields.pop(name, None)
    return fields


def _run_id(ours: sqlite3.Connection, run: dict[str, Any]) -> int:
    """The id of a run here, where it is added unless it is there."""
    same = " AND ".join(f"{name} IS :{name}" for name in run)
    known = ours.execute(f"SELECT id FROM runs WHERE {same}", run).fetchone()
    return int(known["id"] if known else ours.execute(insertion("runs", run), run).lastrowid or 0)

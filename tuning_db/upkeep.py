"""Looking after a database file: what is in it, whether it is whole, and what of it can go."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from tilewright.tuning_db.errors import DatabaseCorruptError, DatabaseError
from tilewright.tuning_db.file import DatabaseFile, damage_mark, explained, path_for
from tilewright.tuning_db.record import Provenance, Record, Status, canonical_json, read_json
from tilewright.tuning_db.rows import member_of, row_to_environment, row_to_record
from tilewright.tuning_db.snapshot import open_snapshot
from tilewright.tuning_db.strict_json import text as is_text
from tilewright.tuning_db.text import shown

MOST_FINDINGS = 20
"""Told of one file: the first few say what is wrong."""


@dataclass(frozen=True, slots=True)
class Revision:
    """What records have in common whose times compare but for problem and configuration."""

    op: str
    kernel_hash: str
    triton: str
    ptxas: str
    protocol: str


@dataclass(frozen=True, slots=True)
class Overview:
    """What a database file holds."""

    path: Path
    devices: tuple[str, ...]  # one, or none of an empty file
    bytes: int  # of the file, without SQLite's side files
    runs: int
    problems: int
    counts: dict[tuple[Status, Provenance], int]
    revisions: dict[Revision, int]  # and how many records of each
    oldest: str | None  # ISO 8601, UTC
    newest: str | None

    @property
    def records(self) -> int:
        """Of every status and provenance."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed, or would be."""

    records: int
    runs: int
    bytes: int  # by which the file became smaller


def overview(path: Path) -> Overview:
    """What a file holds; changes nothing.

    Raises:
        DatabaseError: there is no such file, or it can't be read.
    """
    with open_snapshot(path) as file:
        return file.read(lambda connection: _overview(connection, path))


def _overview(connection: sqlite3.Connection, path: Path) -> Overview:
    def one(query: str) -> sqlite3.Row:
        row: sqlite3.Row = connection.execute(query).fetchone()
        return row

    grouped = "SELECT {0}, count(*) AS n FROM records GROUP BY {0} ORDER BY {0}"
    counts = connection.execute(grouped.format("status, provenance")).fetchall()
    revisions = connection.execute(grouped.format("op, kernel_hash, triton, ptxas, protocol")).fetchall()
    oldest, newest = one("SELECT min(created_at), max(created_at) FROM records")
    try:
        return Overview(
            path=path,
            devices=tuple(row[0] for row in connection.execute("SELECT DISTINCT device FROM records ORDER BY device")),
            bytes=path.stat().st_size,
            runs=one("SELECT count(*) FROM runs")[0],
            problems=one("SELECT count(*) FROM (SELECT DISTINCT op, problem FROM records)")[0],
            counts={(member_of(Status, row[0]), member_of(Provenance, row[1])): row["n"] for row in counts},
            revisions={Revision(*tuple(row)[:-1]): row["n"] for row in revisions},
            oldest=oldest,
            newest=newest,
        )
    except ValueError as error:
        raise DatabaseCorruptError(f"{path} holds a row that is no record ({error}): `autotune db check`") from error


def check(path: Path, objection: Callable[[Record], str | None] = lambda record: None) -> list[str]:
    """What is wrong with a file, the first `MOST_FINDINGS` in a line each; empty if nothing is. Changes nothing.

    SQLite's own check of pages, tables and indexes; that the file's name is its device's, by which a lookup finds it;
    then every row: that it is a run, or a record of the file's one device, with canonical JSON, under its own key, of a
    run that there is. `objection` says what else is wrong with a record: what its problem and configuration must be,
    the kernels know.

    Raises:
        DatabaseAccessError: there is no such file, or it can't be read.
        DatabaseSchemaError: a newer Tilewright wrote it, or something else did.
    """
    findings = []
    if damage_mark(path).exists():
        findings.append("a program met damage here before: the next run that writes to it checks it and sets it aside")
    try:
        with explained(path), open_snapshot(path) as file:
            found = file.read(lambda connection: list(_findings(connection, path, objection)))
    except DatabaseCorruptError as error:
        found = [str(error)]
    return findings + found


def _findings(connection: sqlite3.Connection, path: Path, objection: Callable[[Record], str | None]) -> Iterator[str]:
    connection.text_factory = partial(str, encoding="utf-8", errors="surrogateescape")  # so that every row can be read
    damage = [row[0] for row in connection.execute(f"PRAGMA integrity_check({MOST_FINDINGS})")]
    if damage != ["ok"]:
        yield from (" ".join(line.split()) for line in damage)  # the first may have a heading above it
        return  # what rows say then is no news
    broken = connection.execute("PRAGMA foreign_key_check").fetchmany(MOST_FINDINGS)
    yield from (f"record {row['rowid']} is of a run that there is not" for row in broken)
    device = connection.execute("SELECT device FROM records ORDER BY id LIMIT 1").fetchone()
    if device is not None and (wrong := _of_another_name(path, device[0])) is not None:
        yield wrong
    left = MOST_FINDINGS
    checks = (("runs", _objection_to_run), ("records", lambda row: _objection(row, device[0], objection)))
    for table, check_row in checks:
        for row in _by_id(connection, table):
            reason = check_row(row)
            if reason is not None:
                yield f"{table.removesuffix('s')} {row['id']}: {reason}"
                left -= 1
                if not left:
                    yield "there may be more"
                    return


def _of_another_name(path: Path, device: object) -> str | None:
    """What to say where the records of a file are of a device whose file has another name; None where they are not."""
    if not (isinstance(device, str) and device and is_text(device) is None):
        return None
    wanted = path_for(device, path.parent)
    if wanted.name == path.name:
        return None
    taken = f"merge it into that with autotune merge {path} --db {path.parent}, and remove it"
    advice = taken if wanted.exists() else "rename it"
    return f"its records are of {shown(device)}, whose file is {wanted.name}: {advice}"


def refuse_other_devices(file: DatabaseFile, path: Path, device: str) -> None:
    """Does nothing for the file of a device, at `path`, that has no records of others. Under the name of another
    device's file they would be listed, pruned and added to as that one's. Reads every record: no matter of a lookup,
    whose key has the device in it.

    Raises:
        DatabaseError: it has; or it can't be read.
    """
    found = [row["device"] for row in file.rows("SELECT DISTINCT device FROM records LIMIT 3")]
    if found in ([], [device]):
        return
    if len(found) == 1 and (wrong := _of_another_name(path, found[0])) is not None:
        raise DatabaseError(f"{path}: {wrong}")
    raise DatabaseError(
        f"{path} has records of {' and '.join(sorted(map(shown, found)))}, and a file is of one device: "
        "`autotune db check` names the rows to delete"
    )


def _by_id(connection: sqlite3.Connection, table: str) -> Iterator[sqlite3.Row]:
    """Every row: by its number, for a text that is not valid can't be asked for again."""
    last = -(2**63)
    while rows := connection.execute(f"SELECT * FROM {table} WHERE id > ? ORDER BY id LIMIT 1000", (last,)).fetchall():
        yield from rows
        last = rows[-1]["id"]


def _objection_to_run(row: sqlite3.Row) -> str | None:
    try:
        row_to_environment(row)
    except ValueError as error:
        return f"it is no run ({error})"
    return _no_text(row)


def _no_text(row: sqlite3.Row) -> str | None:
    for name in row.keys():  # noqa: SIM118 - of a row, not a dict
        if isinstance(row[name], str) and is_text(row[name]) is not None:
            return f"its {name} is no text: {shown(row[name])}"
    return None


def _objection(row: sqlite3.Row, device: str, further: Callable[[Record], str | None]) -> str | None:
    try:
        record = row_to_record(row)
        for name, text in (("problem", record.key.problem), ("config", record.config)):
            if canonical_json(read_json(text)) != text:
                return f"its {name} is no canonical JSON: {shown(text)}"
        digest = record.key.digest()
    except (ValueError, TypeError, AttributeError) as error:
        return f"it is no record ({error})"
    if (reason := _no_text(row)) is not None:
        return reason
    if digest != row["key_digest"]:
        return "it doesn't match its key"
    if record.key.device != device:
        return f"it is of {shown(record.key.device)}, and others of {shown(device)}"
    return further(record)


def prune(
    file: DatabaseFile, current: Callable[[Revision], bool], *, before: str | None = None, dry_run: bool = False
) -> Pruned:
    """Remove what no lookup and no search will ask for: predictions and failures of revisions that are not `current`.

    Measured times of such revisions are evidence still, for an answer that is `transferred`; those made before the time
    `before` (ISO 8601, UTC), if one is given, go too. Records of current revisions stay, all of them. Runs without a
    record go once they are a day old. All in one transaction; then the space is given back. With `dry_run` it is only
    counted, for which the file may have been opened to read.

    Raises:
        DatabaseError: the file can't be written, or read.
    """
    if dry_run:
        records, runs = file.read(lambda connection: _prune(connection, current, before, _count))
        return Pruned(records, runs, bytes=0)
    size = file.path.stat().st_size
    records, runs = file.write(lambda connection: _prune(connection, current, before, _delete))
    file.compact()
    return Pruned(records, runs, bytes=max(0, size - file.path.stat().st_size))


_Deal = Callable[[sqlite3.Connection, str, Sequence[object]], int]
"""What is done with the rows of `table WHERE …`; gives how many there are."""


def _count(connection: sqlite3.Connection, rows: str, parameters: Sequence[object]) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {rows}", parameters).fetchone()[0])


def _delete(connection: sqlite3.Connection, rows: str, parameters: Sequence[object]) -> int:
    return connection.execute(f"DELETE FROM {rows}", parameters).rowcount


def _prune(
    connection: sqlite3.Connection, current: Callable[[Revision], bool], before: str | None, deal: _Deal
) -> tuple[int, int]:
    names = "op, kernel_hash, triton, ptxas, protocol"
    found = [Revision(*tuple(row)) for row in connection.execute(f"SELECT DISTINCT {names} FROM records")]
    others = [revision for revision in found if not current(revision)]
    of_others = f"({names}) IN (VALUES {', '.join(['(?, ?, ?, ?, ?)'] * len(others))})" if others else "0"
    useless = f"{of_others} AND (provenance = 'predicted' OR status != 'ok' OR spill_bytes > 0 OR created_at < ?)"
    given = [*(value for revision in others for value in astuple(revision)), before or ""]
    records = deal(connection, f"records WHERE {useless}", given)
    # A run of today may still be waiting for its first record.
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    # Whether they are gone yet or not. The spills of what never compiled are null, and so may the condition be.
    left = f"SELECT run_id FROM records WHERE ({useless}) IS NOT TRUE"
    return records, deal(connection, f"runs WHERE started_at < ? AND id NOT IN ({left})", [yesterday, *given])

"""Records as JSON lines: what `autotune export` writes and `autotune import` reads; docs/interchange.md has the format.

An export depends on what is on record and on nothing else: runs are numbered in the order of their content, records
stand in the order of their keys. The same records give the same bytes, in whatever order they came to be there.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tilewright.tuning_db import strict_json as is_
from tilewright.tuning_db.errors import DatabaseCorruptError, ExportFileError, UsageError
from tilewright.tuning_db.file import DatabaseFile, open_file, open_in_memory
from tilewright.tuning_db.record import (
    Environment,
    Key,
    Provenance,
    Record,
    Resources,
    Status,
    Times,
    canonical_json,
    read_json,
)
from tilewright.tuning_db.rows import (
    ENVIRONMENT,
    RESOURCES,
    TIMES,
    Row,
    environment_to_row,
    insertion,
    no_record,
    record_to_row,
    row_to_environment,
    row_to_record,
)
from tilewright.tuning_db.selection import BestFew
from tilewright.tuning_db.text import shown

FORMAT = "tilewright-records"
VERSION = 1

MOST_LINE_BYTES = 1 << 20
"""Of one line: a record takes about 1 KB, most of it the problem."""

MOST_RECORDS = 10_000_000
MOST_RUNS = 100_000
"""Of one file: hundreds of times what a board collects."""

_NO_RUN = "it is of a run that there is not"
_PAGE = 1000  # rows in memory at a time
_PAGE_BYTES = 1 << 23

_GZIP = b"\x1f\x8b"  # RFC 1952, section 2.3.1

_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?\+00:00", re.ASCII)

Objection = Callable[[Record], str | None]
"""What speaks against a record that is well formed: a configuration that is not valid for its kernel, say."""


def _moment(value: Any) -> str | None:
    wanted = "a time as 2026-01-31T12:00:00+00:00"
    if not (isinstance(value, str) and _MOMENT.fullmatch(value)):
        return wanted
    try:
        datetime.fromisoformat(value)
    except ValueError:  # of a 13th month
        return wanted
    return None


LEAST_US, MOST_US = 1e-3, 1e12
"""Of a time, in microseconds: two clocks of a GPU, and twelve days. What is computed from one is then a number, too."""


def duration(value: Any) -> str | None:
    """A time that a kernel may take, in microseconds."""
    fine = is_.positive(value) is None and LEAST_US <= value <= MOST_US
    return None if fine else f"a number of µs from {LEAST_US:g} to {MOST_US:g}"


_DEVICE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*-[1-9][0-9]*sm", re.ASCII)
_MOST_DEVICE = 100  # characters, as of a plain name of a file


def device_key(value: Any) -> str | None:
    """The key of a device: a board, as in a file's name, and its SM count. Any other nobody would ever ask for."""
    fine = isinstance(value, str) and len(value) <= _MOST_DEVICE and _DEVICE.fullmatch(value)
    return None if fine else "a board and its SM count, as rtx3090-82sm"


_HEADER = {
    "format": is_.one_of((FORMAT,)),
    "version": is_.integer(1),
    "device": device_key,
    "runs": is_.integer(0, MOST_RUNS),
    "records": is_.integer(0, MOST_RECORDS),
}
_RUN = {
    "run": is_.integer(1),
    "started_at": _moment,
    **dict.fromkeys(ENVIRONMENT, is_.text),
    "extra": is_.anything,
}
_KEY = ("op", "kernel_hash", "arch", "triton", "ptxas", "protocol")  # the device is the header's, the problem an object
_RECORD = {
    "run": is_.integer(1),
    **dict.fromkeys(_KEY, is_.word),
    "arch": is_.integer(1, 9999),
    "problem": is_.plain,
    "config": is_.plain,
    "status": is_.one_of([str(status) for status in Status]),
    "provenance": is_.one_of([str(Provenance.MEASURED), str(Provenance.PREDICTED)]),
    "message": is_.text,
    "times": is_.optional(is_.anything),
    "resources": is_.optional(is_.anything),
    "predicted_us": is_.optional(duration),
    "created_at": _moment,
}
_TIMES = {**dict.fromkeys(TIMES, duration), "samples": is_.integer(1)}
_RESOURCES = dict.fromkeys(RESOURCES, is_.integer(0))


def export(
    file: DatabaseFile, device: str, stream: BinaryIO, *, ops: Collection[str] = (), best: BestFew | None = None
) -> int:
    """Write the records of a file, or those of some ops, or the best few, as JSON lines; gives how many. What others
    write meanwhile is left out.

    Raises:
        UsageError: there are records, and none that `best` takes; nothing was written.
        DatabaseError: the file can't be read, or holds a row that is no record.
        OSError: the stream can't be written.
    """
    chosen = f"op IN ({', '.join('?' * len(ops))})" if ops else "1"

    def action(connection: sqlite3.Connection) -> int:
        condition = chosen
        if best is not None:
            connection.execute("CREATE TEMP TABLE few (id INTEGER PRIMARY KEY)")  # gone with the transaction
            connection.executemany("INSERT INTO few VALUES (?)", [(row_id,) for row_id in best.ids(connection)])
            condition += " AND id IN (SELECT id FROM few)"
            _refuse_none(connection, chosen, condition, tuple(ops), device)
        try:
            return _export(connection, file.path, device, stream, condition, tuple(ops))
        except OSError as error:
            raise _StreamError(error) from None  # no trouble of the database's, whose own are SQLite's

    try:
        return file.read(action)
    except _StreamError as carrier:
        raise carrier.error from None


def _refuse_none(
    connection: sqlite3.Connection, chosen: str, best: str, parameters: tuple[str, ...], device: str
) -> None:
    """Does nothing where records meet the condition `best`, or none `chosen` either."""
    there, left = (
        connection.execute(f"SELECT count(*) FROM records WHERE {condition}", parameters).fetchone()[0]
        for condition in (chosen, best)
    )
    if there and not left:
        raise UsageError(
            f"none of the {there} records of {device} is a measured time, and --best takes no other: measure on the "
            "GPU first, or leave --best out"
        )


Entry = dict[str, Any]
"""One record with its run, for carriers that take outcomes one at a time: the fields of both lines of an export, under
`run` and `record`, without the run's number."""


def entries(file: DatabaseFile, key: Key, config: str | None = None) -> dict[str, Entry]:
    """The outcomes of one key, or that of one configuration, by configurations (canonical JSON); of one both measured
    and predicted, the former.

    Raises:
        DatabaseError: the file can't be read, or holds a row that is no record.
    """

    where, parameters = "key_digest = ?", [key.digest()]
    if config is not None:
        where, parameters = "key_digest = ? AND config = ?", [key.digest(), config]

    def action(connection: sqlite3.Connection) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for row in in_key_order(connection, where, tuple(parameters)):
            if row["config"] in found:  # measured comes before predicted
                continue
            run = connection.execute("SELECT * FROM runs WHERE id = ?", (row["run_id"],)).fetchone()
            try:
                if run is None:
                    raise ValueError(_NO_RUN)
                entry = {"run": _run_fields(run), "record": _record_fields(row_to_record(row), key.device)}
            except ValueError as error:
                raise no_record(file.path, row, error) from error
            found[row["config"]] = entry
        return found

    return file.read(action)


def write_entries(entries: Iterable[Entry], device: str, stream: BinaryIO) -> None:
    """Writes entries of one device as an export, for `read_export` to check and read.

    Raises:
        ValueError: one has not the form of an entry.
    """
    numbers: dict[str, int] = {}
    records = []
    for entry in entries:
        try:
            number = numbers.setdefault(canonical_json(entry["run"]), len(numbers) + 1)
            records.append(canonical_json({**entry["record"], "run": number}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{shown(entry)} is no record with its run ({error})") from None
    header = {"format": FORMAT, "version": VERSION, "device": device, "runs": len(numbers), "records": len(records)}
    runs = [canonical_json({**read_json(run), "run": number}) for run, number in numbers.items()]
    stream.write("".join(f"{line}\n" for line in (canonical_json(header), *runs, *records)).encode())


class _StreamError(Exception):
    """Carries an error of the stream past those of the database."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


def _export(
    connection: sqlite3.Connection, path: Path, device: str, stream: BinaryIO, chosen: str, ops: tuple[str, ...]
) -> int:
    (count,) = connection.execute(f"SELECT count(*) FROM records WHERE {chosen}", ops).fetchone()
    query = f"SELECT * FROM runs WHERE id IN (SELECT run_id FROM records WHERE {chosen})"
    runs = {}
    for row in connection.execute(query, ops):
        try:
            runs[row["id"]] = canonical_json(_run_fields(row))
        except ValueError as error:
            raise DatabaseCorruptError(
                f"{path}: run {row['id']} is no run ({error}): delete it and its records"
            ) from error
    contents = sorted(set(runs.values()))
    numbers = {content: number for number, content in enumerate(contents, 1)}

    def write(line: dict[str, Any]) -> None:
        stream.write(canonical_json(line).encode() + b"\n")

    write({"format": FORMAT, "version": VERSION, "device": device, "runs": len(contents), "records": count})
    for content, number in numbers.items():
        write({"run": number, **read_json(content)})
    for row in in_key_order(connection, chosen, ops):
        try:
            if row["run_id"] not in runs:
                raise ValueError(_NO_RUN)
            line = {"run": numbers[runs[row["run_id"]]], **_record_fields(row_to_record(row), device)}
        except ValueError as error:
            raise no_record(path, row, error) from error
        write(line)
    return int(count)


def in_key_order(
    connection: sqlite3.Connection, where: str = "1", parameters: tuple[Any, ...] = ()
) -> Iterator[sqlite3.Row]:
    """The rows of `records` in the one order that doesn't hang on how they came there, a page in memory at a time."""
    last = ("", "", "")
    query = (
        f"SELECT * FROM records WHERE {where} AND (key_digest, config, provenance) > (?, ?, ?) "
        f"ORDER BY key_digest, config, provenance LIMIT {_PAGE}"
    )
    while True:
        rows = connection.execute(query, (*parameters, *last)).fetchall()
        yield from rows
        if len(rows) < _PAGE:
            return
        last = (rows[-1]["key_digest"], rows[-1]["config"], rows[-1]["provenance"])


def _run_fields(row: Row) -> dict[str, Any]:
    environment = row_to_environment(row)
    fields = {name: getattr(environment, name) for name in ENVIRONMENT}
    return {"started_at": row["started_at"], **fields, "extra": dict(environment.extra)}


def _record_fields(record: Record, device: str) -> dict[str, Any]:
    if record.key.device != device:
        raise ValueError(f"it is of {record.key.device}, and the file of {device}")
    return {
        **{name: getattr(record.key, name) for name in _KEY},
        "problem": _parsed(record.key.problem),
        "config": _parsed(record.config),
        "status": str(record.status),
        "provenance": str(record.provenance),
        "message": record.message,
        "times": record.times and {name: getattr(record.times, name) for name in TIMES},
        "resources": record.resources and {name: getattr(record.resources, name) for name in RESOURCES},
        "predicted_us": record.predicted_us,
        "created_at": record.created_at,
    }


def _parsed(text: str) -> dict[str, Any]:
    values: Any = read_json(text)
    if not isinstance(values, dict) or canonical_json(values) != text:
        raise ValueError(f"{shown(text)} is no canonical JSON object")
    return values


def read_export(
    stream: BinaryIO, name: str, staging: Path | None, objection: Objection = lambda record: None
) -> tuple[str, DatabaseFile]:
    """Read an export, all of it, into a fresh database file of its own at `staging`, from where it can be merged in one
    transaction: a pipe may take its time, and a broken line may be the last. Gives the device's key and the open file.

    However long the stream, a line and a page of records are in memory at a time; without `staging` all of it is.

    Raises:
        ExportFileError: it is no export, or one line of it is wrong; the message has `name`, the line and the value.
        OSError: the stream can't be read.
        DatabaseError: the staging file can't be written.
    """
    lines = _Lines(stream, name)
    header = lines.header()
    file = open_in_memory() if staging is None else open_file(staging, scratch=True)
    try:
        runs: dict[int, int] = {}
        for _ in range(header["runs"]):
            runs.update(lines.run(file, runs))
        remaining = header["records"]
        while remaining:
            rows = lines.records(remaining, header["device"], runs, objection)
            file.write(partial(lines.keep, rows))
            remaining -= len(rows)
        lines.end()
    except BaseException:
        file.close()
        raise
    return header["device"], file


class _Lines:
    """The lines of an export, one after another, and where we are."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self._number = 0
        self._bytes = 0

    def header(self) -> dict[str, Any]:
        values = self._next("the header", _GZIP)
        if values.get("format") != FORMAT:
            raise self._error(f"format={shown(values.get('format'))}: this is no file of `autotune export`")
        version = values.get("version")
        if isinstance(version, int) and version > VERSION:
            raise self._error(
                f"version={shown(version)} is a newer Tilewright's: upgrade tilewright (this one reads {VERSION})"
            )
        self._check(values, _HEADER)
        return values

    def run(self, file: DatabaseFile, known: dict[int, int]) -> dict[int, int]:
        """One run, kept in `file`: its number and the id that it has there."""
        values = self._next("a run")
        self._check(values, _RUN)
        if values["run"] in known:
            raise self._error(f"run={values['run']} is given twice")
        environment = Environment(**{name: values[name] for name in ENVIRONMENT}, extra=values["extra"])
        row = environment_to_row(environment, values["started_at"])
        return {values["run"]: file.write(lambda db: int(db.execute(insertion("runs", row), row).lastrowid or 0))}

    def records(
        self, most: int, device: str, runs: dict[int, int], objection: Objection
    ) -> list[tuple[int, dict[str, Any]]]:
        """Some of the records to come, at the most a page or `_PAGE_BYTES`: the line of each and its row."""
        rows: list[tuple[int, dict[str, Any]]] = []
        until = self._bytes + _PAGE_BYTES
        while len(rows) < min(most, _PAGE) and self._bytes < until:
            values = self._next("a record")
            record = self._record(values, device)
            if values["run"] not in runs:
                raise self._error(f"run={values['run']} is no run of this file")
            if (reason := objection(record)) is not None:
                raise self._error(reason)
            rows.append((self._number, record_to_row(record, runs[values["run"]], "")))
        return rows

    def keep(self, rows: list[tuple[int, dict[str, Any]]], connection: sqlite3.Connection) -> None:
        """Puts rows where none of the same key, configuration and provenance is yet."""
        for number, row in rows:
            try:
                connection.execute(insertion("records", row, replace=False), row)
            except sqlite3.IntegrityError:
                self._number = number
                raise self._error("an earlier line has the same key, configuration and provenance") from None

    def _record(self, values: dict[str, Any], device: str) -> Record:
        self._check(values, _RECORD)
        for name, fields in (("times", _TIMES), ("resources", _RESOURCES)):
            if values[name] is not None:
                self._check(values[name], fields, f"{name}.")
        try:
            return Record(
                key=Key(
                    problem=canonical_json(values["problem"]), device=device, **{name: values[name] for name in _KEY}
                ),
                config=canonical_json(values["config"]),
                status=Status(values["status"]),
                provenance=Provenance(values["provenance"]),
                times=values["times"] and Times(**values["times"]),
                resources=values["resources"] and Resources(**values["resources"]),
                message=values["message"],
                predicted_us=values["predicted_us"],
                created_at=values["created_at"],
            )
        except ValueError as error:
            raise self._error(str(error)) from None

    def end(self) -> None:
        """Does nothing at the end of the file."""
        rest = self._stream.read(1)
        if rest:
            self._number += 1
            raise self._error("there are more lines than the header says")

    def _next(self, wanted: str, compressed: bytes | None = None) -> dict[str, Any]:
        line = self._stream.readline(MOST_LINE_BYTES + 1)
        self._number += 1
        self._bytes += len(line)
        if compressed is not None and line.startswith(compressed):
            raise self._error("it is compressed by gzip: gunzip it first, as with gunzip -c FILE | autotune import -")
        if not line:
            raise self._error(f"the file ends where {wanted} should be: it was cut short, or is no export")
        if len(line) > MOST_LINE_BYTES:
            raise self._error(f"the line is over {MOST_LINE_BYTES} bytes: {shown(line[:40])}…")
        if not line.endswith(b"\n"):
            raise self._error(f"the line has no end: the file was cut short, after {shown(line[-20:])}")
        try:
            return is_.read_object(line.rstrip(b"\r\n"))
        except ValueError as error:
            raise self._error(str(error)) from None

    def _check(self, values: dict[str, Any], fields: dict[str, Any], prefix: str = "") -> None:
        try:
            is_.check_fields(values, fields)
        except ValueError as error:
            raise self._error(f"{prefix}{error}") from None

    def _error(self, reason: str) -> ExportFileError:
        return ExportFileError(f"{self._name}:{self._number}: {reason}")

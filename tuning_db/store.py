"""`TuningDB`: what was ever tried on one device, in one SQLite file."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime
from io import BytesIO
from itertools import islice
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

from tilewright.tuning_db.env import database_dir, shipped_dir
from tilewright.tuning_db.errors import DatabaseCorruptError, DatabaseError, ExportFileError, UsageError
from tilewright.tuning_db.file import DatabaseFile, open_file, path_for
from tilewright.tuning_db.lookup import answers, best_first, evidence
from tilewright.tuning_db.record import Answer, Environment, Key, Provenance, Record, Status
from tilewright.tuning_db.rows import (
    environment_to_row,
    insertion,
    member_of,
    no_record,
    record_of,
    record_to_row,
    row_to_environment,
)
from tilewright.tuning_db.schema import ANSWERABLE
from tilewright.tuning_db.shapes import Near
from tilewright.tuning_db.shipped_records import open_shipped

if TYPE_CHECKING:
    from tilewright.tuning_db.interchange import Entry
    from tilewright.tuning_db.merging import Merged

Accept = Callable[[Record], bool]
"""Rechecks a candidate (its resources on the device at hand, say) before it is answered."""

_NOTE = "INSERT OR REPLACE INTO identities (stamp, value) VALUES (?, ?)"

# As the view `best`, and of two equally fast the one whose text sorts first, as in a lookup: no answer hangs on which
# outcome came first.
_BEST_OF_EACH = f"""
    SELECT * FROM (
        SELECT *, row_number() OVER (
            PARTITION BY key_digest ORDER BY provenance = 'predicted', median_us, config
        ) AS place FROM records WHERE {ANSWERABLE}
    ) WHERE place = 1 ORDER BY op, problem, key_digest
"""

_PAGE = 1000  # rows per read of a long iteration: about 1 MB, and no read transaction stays open between


class TuningDB:
    """The records of one device.

    Guarantees:
        - A record is committed when `add` returns. Killing the process at any moment loses none of those and leaves
          the file whole; a power cut may take back the last few, and leaves the file whole too.
        - `best` and `top` answer only records with status ok and no spills.
        - Every outcome is kept: one per key, configuration and provenance. The newest to arrive replaces an earlier
          one of the same three, good or bad, because it ran on the state of the machine as it is now; measured and
          predicted never replace one another.

    Threads may share one object. Any number of processes may open the same file, also for the first time and at once;
    an object doesn't survive a fork and can't be pickled: open another.

    Attributes:
        path: the file.
        device: the key of its device.
        set_aside: where a damaged file was moved that `open` found in its place, if it did.
        skipped: shipped files and those of other boards that `best` could not ask, and why.
    """

    def __init__(self, device: str, file: DatabaseFile, shipped: Path | None = None) -> None:
        """Use `open`."""
        self.device = device
        self.path = file.path
        self.set_aside = file.set_aside
        self.skipped: dict[Path, DatabaseError] = {}
        self._file = file
        self._begun: dict[int, tuple[int, dict[str, Any]]] = {}  # by id: the number of each run's row, and the row
        self._shipped = shipped  # the folder of the shipped files, which `best` and `evidence` ask too

    @classmethod
    def open(cls, device_key: str, folder: Path | None = None, *, read_only: bool = False) -> Self:
        """Open the file of a device in `folder`, by default the one `database_dir` names.

        For writing, folder and file are made where missing and brought to the current schema. A damaged file is
        renamed, never deleted: `set_aside` has its new name, and a fresh one takes its place. To read, a missing file
        is an empty one, and nothing is made or changed.

        Raises:
            DatabaseCorruptError: read-only, and the file is damaged or no database.
            DatabaseSchemaError: a newer Tilewright wrote the file; or read-only, and an older one did.
            DatabaseAccessError: the file or folder can't be read, made or written, or was held locked for 30 s.
            UsageError: an empty key.
        """
        file = open_file(path_for(device_key, folder or database_dir()), read_only=read_only)
        return cls(device_key, file, shipped_dir())

    @classmethod
    def without_own(cls, device_key: str, folder: Path | None = None) -> Self:
        """As `open` to read where the device has no file, whatever is in its place: for one that can't be read. Shipped
        records and those of other boards answer still."""
        path = path_for(device_key, folder or database_dir())
        return cls(device_key, DatabaseFile(path, None, read_only=True), shipped_dir())

    @classmethod
    def open_shipped(cls, device_key: str) -> Self | None:
        """The records of a device that were shipped with the package, alone, to read; None where there are none.

        Raises:
            DatabaseError: the file can't be read.
        """
        folder = shipped_dir()
        path = None if folder is None else path_for(device_key, folder)
        return cls(device_key, open_shipped(path)) if path is not None and path.exists() else None

    def start_run(self, environment: Environment) -> int:
        """Note where and with what the records that follow are made; the id goes to `add`.

        Raises:
            DatabaseError: as `add`.
        """
        row = environment_to_row(environment, _now())
        number = self._file.write(lambda connection: _insert_run(connection, row))
        self._begun[number] = (number, row)
        return number

    def runs(self) -> dict[int, tuple[str, Environment]]:
        """Every run by its id: when it started (ISO 8601, UTC) and its environment."""
        rows = self._file.rows("SELECT * FROM runs ORDER BY id")
        try:
            return {row["id"]: (row["started_at"], row_to_environment(row)) for row in rows}
        except ValueError as error:
            raise DatabaseCorruptError(
                f"{self.path} has a run that is not valid ({error}): `autotune db check`"
            ) from error

    def add(self, record: Record, run_id: int) -> None:
        """Keep one outcome. When this returns, it is kept.

        Raises:
            DatabaseAccessError: the disk is full, the file can't be written, or was held locked for 30 s.
            DatabaseCorruptError: the file is damaged.
            UsageError: another device's record, an unknown run, or opened read-only.
            ValueError: a time that is not finite.
        """
        self.add_many([record], run_id)

    def add_many(self, records: Iterable[Record], run_id: int, notes: Mapping[str, str] = MappingProxyType({})) -> None:
        """Keep outcomes, and notes as `note` does, all or none, in one transaction; see `add`."""
        rows = []
        for record in records:
            if record.key.device != self.device:
                raise UsageError(f"a record of {record.key.device} doesn't belong in {self.path}, of {self.device}")
            rows.append(record_to_row(record, run_id, _now()))

        def insert(connection: sqlite3.Connection) -> int:
            number = self._number_of(connection, run_id)
            if rows:
                connection.executemany(insertion("records", rows[0]), [{**row, "run_id": number} for row in rows])
            connection.executemany(_NOTE, notes.items())
            return number

        number = self._file.write(insert)
        if run_id in self._begun:
            self._begun[run_id] = (number, self._begun[run_id][1])

    def _number_of(self, connection: sqlite3.Connection, run_id: int) -> int:
        """The number of a run's row. A run of this object that has none any more has been pruned while it went on: it
        gets a new one, for its number may be another's."""
        number, begun = self._begun.get(run_id, (run_id, None))
        row = connection.execute("SELECT * FROM runs WHERE id = ?", (number,)).fetchone()
        if begun is None and row is None:
            raise UsageError(f"{self.path} has no run {run_id}: start_run gives the id")
        # One of the very same environment serves as well.
        if begun is None or (
            row is not None and all(row[name] == begun[name] for name in begun.keys() - {"started_at"})
        ):
            return number
        return _insert_run(connection, begun)

    def merge(self, source: TuningDB) -> Merged:
        """Bring the records of another open file of this device into this one, with their runs, in one transaction.

        Where both have an outcome of the same key, configuration and provenance, `tilewright.tuning_db.merging` says
        which stays.

        Raises:
            UsageError: `source` is of another device, or this very file; or this one was opened read-only.
            DatabaseCorruptError: a row of `source` is no record.
            DatabaseError: a file can't be read or written.
        """
        from tilewright.tuning_db.merging import merge

        return merge(self._file, source._file, self.device)

    def entries(self, key: Key, config: str | None = None) -> dict[str, Entry]:
        """Every outcome under one key, or that of one configuration, with its run, by configuration, in the form that
        `bring` takes.

        Raises:
            DatabaseError: the file can't be read.
        """
        from tilewright.tuning_db.interchange import entries

        return entries(self._file, key, config)

    def entry(self, key: Key, config: str) -> Entry:
        """One of `entries`.

        Raises:
            KeyError: the configuration is not on record.
        """
        return self.entries(key, config)[config]

    def bring(
        self, entries: Iterable[Entry], source: str, objection: Callable[[Record], str | None] = lambda record: None
    ) -> Merged:
        """Merge entries of this device, as `merge` does: all or none. `source` is what errors call their place;
        `objection` may refuse a record, as with `interchange.read_export`.

        Raises:
            ExportFileError: one is no entry of this device, or was objected to.
            DatabaseError: a file can't be read or written.
        """
        from tilewright.tuning_db.interchange import read_export, write_entries

        stream = BytesIO()
        try:
            write_entries(entries, self.device, stream)
        except ValueError as error:
            raise ExportFileError(f"{source}: {error}") from None
        stream.seek(0)
        device, file = read_export(stream, source, None, objection)
        with closing(file), TuningDB(device, file) as arriving:
            return self.merge(arriving)

    def get(self, key: Key, config: str) -> Record | None:
        """The outcome of one configuration under one key, measured before predicted."""
        query = "SELECT * FROM records WHERE key_digest = ? AND config = ? ORDER BY provenance = 'predicted' LIMIT 1"
        rows = self._file.rows(query, (key.digest(), config))
        return record_of(self._file.path, rows[0]) if rows else None

    def records(self, key: Key) -> list[Record]:
        """Every outcome under one key, in the order of arrival."""
        rows = self._file.rows("SELECT * FROM records WHERE key_digest = ? ORDER BY id", (key.digest(),))
        return [record_of(self._file.path, row) for row in rows]

    def no_record(self, record: Record, error: Exception) -> DatabaseCorruptError:
        """What to say where a record of this file turns out to be none, by what only its kernel knows; it has the
        number of its row."""
        query = "SELECT id FROM records WHERE key_digest = ? AND config = ? AND provenance = ?"
        given = (record.key.digest(), record.config, str(record.provenance))
        rows = self._file.rows(query, given)
        return no_record(self.path, rows[0] if rows else {"id": "?"}, error)

    def find(
        self,
        *,
        op: str | None = None,
        problem: str | None = None,
        status: Status | None = None,
        provenance: Provenance | None = None,
        run_id: int | None = None,
    ) -> Iterator[Record]:
        """Every outcome that has what is given, in the order of arrival. Others may write meanwhile."""
        given = {"op": op, "problem": problem, "status": status, "provenance": provenance, "run_id": run_id}
        given = {name: value for name, value in given.items() if value is not None}
        where = "".join(f" AND {name} = ?" for name in given)
        last = 0
        while True:
            query = f"SELECT * FROM records WHERE id > ?{where} ORDER BY id LIMIT {_PAGE}"
            rows = self._file.rows(query, (last, *given.values()))
            for row in rows:
                yield record_of(self._file.path, row)
            if len(rows) < _PAGE:
                return
            last = rows[-1]["id"]

    def best(
        self,
        key: Key,
        *,
        predicted_protocol: str | None = None,
        near: Near | None = None,
        accept: Accept | None = None,
        incumbent: str | None = None,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> Answer | None:
        """The best evidence there is for `key`, in the order of `tilewright.tuning_db.lookup`; None without any.

        Records that were shipped with the package are asked too, weighed with this file's.

        `predicted_protocol` names the protocol of the predictions to fall back to, where `key` has that of
        measurements. `near` says which problems may stand in for the key's; without it, no other shape is asked. The
        first candidate that `accept` accepts is the answer; it may be asked about a configuration more than once, each
        time with another record. `incumbent` is a configuration that outcomes of this very key must beat beyond noise.
        `defaults` are the fields that configurations of earlier revisions may lack, with what they then are: so that
        one is known again.

        Raises:
            DatabaseError: this file can't be read. Shipped files and other boards' that can't are noted in `skipped`.
        """
        protocol = predicted_protocol or key.protocol
        with closing(
            answers(self._file, key, protocol, near, self.skipped, incumbent, self._shipped, defaults)
        ) as found:
            return next((answer for answer in found if accept is None or accept(answer.record)), None)

    def of_problem(
        self,
        key: Key,
        k: int,
        *,
        predicted_protocol: str | None = None,
        accept: Accept | None = None,
        incumbent: str | None = None,
        defaults: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[Answer]:
        """The `k` best answers that are of `key`'s very problem on its board, of whatever revision or toolchain, made
        here or shipped: measured, then predicted. A configuration may be there as both.

        The arguments are those of `best`.

        Raises:
            DatabaseError: as `best`.
        """
        protocol = predicted_protocol or key.protocol
        with closing(
            answers(self._file, key, protocol, None, self.skipped, incumbent, self._shipped, defaults)
        ) as found:
            own = (each for each in found if each.record.key.device == key.device)
            return list(islice((each for each in own if accept is None or accept(each.record)), k))

    def evidence(
        self, key: Key, *, near: Near | None = None, least: int = 1, most: int
    ) -> list[tuple[str, list[Record]]]:
        """What was measured elsewhere of `key`'s problem and those near it: a reason, and the answerable records of one
        other key, fastest first; also shipped records of `key` itself. Up to `most` of these with at least `least`
        records, the nearest first.

        Raises:
            DatabaseError: as `best`.
        """
        with closing(evidence(self._file, key, near, self.skipped, self._shipped)) as found:
            return list(islice((each for each in found if len(each[1]) >= least), most))

    def top(self, key: Key, k: int, *, incumbent: str | None = None) -> list[Record]:
        """The `k` best records of exactly this key, each of another configuration: measured, then predicted.

        A prediction is left out where the configuration was measured, well or badly. `incumbent`: as in `best`.
        """
        chosen = list(islice(best_first(self._file, key.digest(), Provenance.MEASURED, incumbent), k))
        if len(chosen) < k:
            query = "SELECT config FROM records WHERE key_digest = ? AND provenance = 'measured'"
            measured = {row["config"] for row in self._file.rows(query, (key.digest(),))}
            guesses = best_first(self._file, key.digest(), Provenance.PREDICTED, incumbent)
            chosen += [record for record in guesses if record.config not in measured]
        return chosen[:k]

    def best_of_each(self) -> list[Record]:
        """The best record of every key, measured before predicted, ordered by op and problem."""
        rows = self._file.rows(_BEST_OF_EACH)
        return [record_of(self._file.path, row) for row in rows]

    def refuse_other_devices(self) -> None:
        """Does nothing unless there are records of other devices here, as in a file that was given another's name. What
        goes by the key never meets one: this is for those who list, prune or add.

        Raises:
            DatabaseError: there are; or the file can't be read.
        """
        from tilewright.tuning_db.upkeep import refuse_other_devices

        refuse_other_devices(self._file, self.path, self.device)

    def stats(self) -> dict[tuple[Status, Provenance], int]:
        """How many records there are of each status and provenance."""
        rows = self._file.rows("SELECT status, provenance, count(*) AS n FROM records GROUP BY status, provenance")
        return {(member_of(Status, row["status"]), member_of(Provenance, row["provenance"])): row["n"] for row in rows}

    def noted(self, stamp: str) -> str | None:
        """What was noted under a stamp; see `note`."""
        return self.all_noted([stamp]).get(stamp)

    def all_noted(self, stamps: Collection[str]) -> dict[str, str]:
        """What was noted under each of the stamps, those without a note left out; see `note`."""
        marks = ", ".join("?" * len(stamps))
        rows = self._file.rows(f"SELECT stamp, value FROM identities WHERE stamp IN ({marks})", tuple(stamps))
        return {row["stamp"]: row["value"] for row in rows}

    def note(self, values: Mapping[str, str]) -> None:
        """Keep what was slow to work out, by stamps of what it was worked out from: hints for this machine, which are
        never evidence.

        Raises:
            DatabaseError: as `add`.
        """
        self._file.write(lambda connection: connection.executemany(_NOTE, values.items()))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _insert_run(connection: sqlite3.Connection, row: Mapping[str, Any]) -> int:
    return int(connection.execute(insertion("runs", row), row).lastrowid or 0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")

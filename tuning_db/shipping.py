"""Making a file to be shipped: records of a database in one that is only ever read.

It is a SQLite file and not an export, though an export can be read by people. For a lookup answers by the indexes of a
SQLite file, with which the first of a process takes a millisecond; the lines of an export would have to be parsed in
each process, or be turned into such a file first, which a lookup, that never writes, has no place for. `autotune
export --db` with the folder of the shipped files shows the records as lines.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.file import DatabaseFile, explained
from tilewright.tuning_db.interchange import Objection, export, read_export
from tilewright.tuning_db.selection import BestFew


def write_database(
    file: DatabaseFile,
    device: str,
    stream: BinaryIO,
    *,
    ops: Collection[str] = (),
    best: BestFew | None = None,
    objection: Objection = lambda record: None,
) -> int:
    """Write the records that `interchange.export` would write, with their runs, as a database file of the current
    schema that needs no side files; gives how many. The same records give the same bytes with one version of SQLite.

    Raises:
        ExportFileError: a record was objected to.
        UsageError: as `interchange.export`.
        DatabaseError: the file can't be read, or holds a row that is no record.
        OSError: the stream can't be written.
    """
    with TemporaryDirectory(prefix="tilewright-export-") as folder:
        lines, made = Path(folder) / "records.jsonl", Path(folder) / "records.sqlite"
        with lines.open("wb") as text:
            count = export(file, device, text, ops=ops, best=best)
        with lines.open("rb") as text:
            # In the order of an export, in which ids then don't hang on how the records came there.
            read_export(text, str(file.path), made, objection)[1].close()
        _settle(made)
        with made.open("rb") as content:
            shutil.copyfileobj(content, stream)
    return count


def refuse_database(path: Path, *, but_shipped: bool = False) -> None:
    """Does nothing unless a file to be written would take the place of a SQLite database; with `but_shipped` of one
    that was not made to be shipped, and by nobody used since.

    Raises:
        UsageError: it would.
    """
    if not path.is_file() or not _is_database(path) or (but_shipped and _is_settled(path)):
        return
    raise UsageError(f"{path} is a database, which would be lost: name another file (--output), or remove that one")


def _is_database(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(_MAGIC)) == _MAGIC


_MAGIC = b"SQLite format 3\0"


def _is_settled(path: Path) -> bool:
    """Whether a database is as `_settle` leaves it. A tuning run that opens it turns its journal into a WAL; one that
    some tool turned back has the times at which its tables were made."""
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            (journal,) = connection.execute("PRAGMA journal_mode").fetchone()
            (made,) = connection.execute(
                f"SELECT count(*) FROM _sqlite_migrations WHERE applied_at = {_NEWEST}"
            ).fetchone()
            (steps,) = connection.execute("SELECT count(*) FROM _sqlite_migrations").fetchone()
    except sqlite3.Error:
        return False  # of something else, or damaged
    return bool(journal != "wal" and 0 < steps == made)


_NEWEST = "(SELECT coalesce(max(created_at), '') FROM records)"


def _settle(path: Path) -> None:
    with explained(path), closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        # When the tables were made is no news, and would make every file another.
        connection.execute(f"UPDATE _sqlite_migrations SET applied_at = {_NEWEST}")
        connection.execute("VACUUM")

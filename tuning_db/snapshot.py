"""Reading a database file of any schema there ever was, without changing it."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tilewright.tuning_db import schema
from tilewright.tuning_db.errors import DatabaseAccessError
from tilewright.tuning_db.file import DatabaseFile, connect_to_read, explained, open_file, refuse_dangling


@contextmanager
def open_snapshot(path: Path) -> Iterator[DatabaseFile]:
    """A file to read: itself, or if its schema is an older one, a copy of it that was brought up to date.

    Raises:
        DatabaseAccessError: there is no such file, or it can't be read.
        DatabaseCorruptError: it is damaged or no database.
        DatabaseSchemaError: a newer Tilewright wrote it, or something else did.
    """
    refuse_dangling(path)
    if not path.exists():
        raise DatabaseAccessError(f"there is no {path}: tune that device first, or name its folder (--db)")
    with tempfile.TemporaryDirectory(prefix="tilewright-") as folder:
        file = _opened(path, Path(folder))
        try:
            yield file
        finally:
            file.close()


def _opened(path: Path, folder: Path) -> DatabaseFile:
    with explained(path):
        if not _is_older(path):
            return open_file(path, read_only=True)
        copy = folder / path.name
        with closing(connect_to_read(path)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        return open_file(copy, scratch=True)


def _is_older(path: Path) -> bool:
    if path.is_dir() or path.stat().st_size == 0:
        return False  # `open_file` knows what to say
    with closing(connect_to_read(path)) as connection:
        return not schema.is_current(connection, path)

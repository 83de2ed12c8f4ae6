"""One database file: its name, how it is opened and made, and what its errors mean.

How a file comes into being. It is made complete under another name (WAL, schema), closed, and renamed into place, all
under a file lock. So whoever sees the file sees a whole one, and opening an existing file takes no lock. Without this,
processes that meet at a fresh file fail with "database is locked": the switch to WAL ignores the busy timeout.

Nothing here opens the database but SQLite itself, not even to look at the header: closing any descriptor of a file
drops all POSIX locks the process holds on it, those of its other connections included
(https://www.sqlite.org/howtocorrupt.html, 2.2).
"""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from tilewright.tuning_db import schema, shapes
from tilewright.tuning_db.env import a_file_for_a_folder, refuse_if_frozen
from tilewright.tuning_db.errors import (
    DatabaseAccessError,
    DatabaseCorruptError,
    DatabaseError,
    DatabaseSchemaError,
    UsageError,
)

T = TypeVar("T")

TIMEOUT_S = 30.0
"""How long to wait for other processes, for the file lock and for each transaction. Transactions take milliseconds."""

_NOT_PLAIN = re.compile(r"[^a-z0-9_-]+")

SIDECARS = ("-wal", "-shm", "-journal")

_IMMUTABLE = "mode=ro&immutable=1"

# What SQLite says where it can't make the side files of WAL, or make them longer: no permission, or no space.
_NO_SIDE_FILES = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL}

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_NO_TEXT = "{path} holds a text that is not valid ({error}): `autotune db check` names the row to delete"
_ELSEWHERE = "choose another folder with --db or $TILEWRIGHT_DB_DIR"
_OTHER_TMPDIR = "name another folder for temporary files in TMPDIR"
_ACCESS = {
    sqlite3.SQLITE_BUSY: f"another process has held it for over {TIMEOUT_S:.0f} s: end that process and try again",
    sqlite3.SQLITE_LOCKED: f"another process has held it for over {TIMEOUT_S:.0f} s: end that process and try again",
    sqlite3.SQLITE_FULL: "the disk is full: free some space, or {elsewhere}",
    sqlite3.SQLITE_READONLY: "it can't be written: change its permissions, or {elsewhere}",
    sqlite3.SQLITE_CANTOPEN: "it can't be opened: check the permissions of the file and its folder, or {elsewhere}",
    sqlite3.SQLITE_PERM: "it can't be opened: check the permissions of the file and its folder, or {elsewhere}",
    sqlite3.SQLITE_IOERR: "reading or writing failed: check the disk and its free space, or {elsewhere}",
}


def path_for(device_key: str, folder: Path) -> Path:
    """The file of a device. A key that is no plain lower-case name gets a hash too, so that no two keys share a file.

    Raises:
        UsageError: the key is empty.
    """
    if not device_key:
        raise UsageError(f"a device needs a name; got {device_key=}")
    slug = _NOT_PLAIN.sub("-", device_key.lower()).strip("-")[:100]
    if slug != device_key:
        slug = f"{slug}-{hashlib.sha256(device_key.encode()).hexdigest()[:8]}".lstrip("-")
    return folder / f"{slug}.sqlite"


class DatabaseFile:
    """An open file. Every statement goes through here: under one lock, with errors in Tilewright's terms.

    Threads may share it. A child made by fork may not: SQLite's locks don't survive that. It is told so.
    """

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection | None,
        *,
        read_only: bool,
        set_aside: Path | None = None,
        scratch: bool = False,
    ) -> None:
        self.path = path
        self.read_only = read_only
        self.set_aside = set_aside
        self._scratch = scratch
        self._connection = connection  # None: reading a file that isn't there, so an empty one
        self._closed = False
        self._lock = threading.RLock()
        self._pid = os.getpid()

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query. No cursor stays open, since one would keep SQLite from truncating the WAL."""
        with self._lock, self._explained():
            self._check_usable()
            return [] if self._connection is None else self._connection.execute(sql, parameters).fetchall()

    def read(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """What `action` returns, run in one read transaction: it sees one state of the file, whoever writes meanwhile.

        A function for the reason that `write` takes one. While it runs SQLite can't shorten the WAL: be quick.
        """
        with self._lock, self._explained():
            self._check_usable()
            if self._connection is None and self.path.exists():
                raise DatabaseAccessError(f"{self.path} is empty and no database: tune that device first, or remove it")
            if self._connection is None:
                raise DatabaseAccessError(f"there is no {self.path}: tune that device first, or name its folder (--db)")
            try:
                self._connection.execute("BEGIN")
                return action(self._connection)
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")

    def write(self, action: Callable[[sqlite3.Connection], T]) -> T:
        """What `action` returns, run in one write transaction: committed then, or rolled back if it raises.

        A function and no context manager, so that Ctrl-C finds the rollback in place wherever it strikes: between a
        generator's `yield` and the block it opens there is a gap that no `except` covers. `sqlite_utils.atomic` has
        that gap, so its inserts are not used here either.
        """
        with self._lock, self._explained():
            self._check_usable()
            connection = self._connection
            if connection is None or self.read_only:
                raise UsageError(f"{self.path} was opened read-only")
            try:
                # Immediate: a deferred transaction that reads first may fail at its first write, without waiting.
                connection.execute("BEGIN IMMEDIATE")
                result = action(connection)
                shapes.place(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return result

    def compact(self) -> None:
        """Give the space of deleted rows back to the disk; left for another time where another process is in the way.

        Raises:
            DatabaseError: as `write`.
        """
        with self._lock, self._explained():
            self._check_usable()
            if self._connection is None or self.read_only:
                raise UsageError(f"{self.path} was opened read-only")
            try:
                self._connection.execute("VACUUM")
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                    raise

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self.path, note_damage=not self.read_only, scratch=self._scratch)

    def _check_usable(self) -> None:
        if self._closed:
            raise UsageError(f"{self.path} was closed")
        if os.getpid() != self._pid:
            raise UsageError(f"{self.path} was opened before this process was forked: open it again here")


def open_file(path: Path, *, read_only: bool = False, immutable: bool = False, scratch: bool = False) -> DatabaseFile:
    """Open a file, for writing made first where it is missing, set aside first where it is damaged. One that is
    `immutable`, which is read only, nobody ever writes to: SQLite then takes no locks and looks for no side files. One
    that is `scratch` is this process's own, for a while.

    Raises:
        DatabaseCorruptError: read-only, and the file is damaged or no database.
        DatabaseSchemaError: it is a newer Tilewright's, or read-only an older one's.
        DatabaseAccessError: it can't be opened, made or written.
        UsageError: for writing, where `$TILEWRIGHT_FROZEN` is on and the file is not `scratch`.
    """
    with explained(path, scratch=scratch):
        if path.is_dir():
            raise DatabaseAccessError(f"{path} is a folder, where a file should be: move it, or {_ELSEWHERE}")
        refuse_dangling(path)
        if immutable:
            connection = _checked(_connect(path, _IMMUTABLE), path) if _has_content(path) else None
            return DatabaseFile(path, connection, read_only=True)
        if read_only:
            connection = _checked(connect_to_read(path), path) if _has_content(path) else None
            return DatabaseFile(path, connection, read_only=True)
        if not scratch:
            refuse_if_frozen(f"nothing is written to {path}")
        if (connection := _connect_if_ready(path)) is not None:
            return DatabaseFile(path, connection, read_only=False, scratch=scratch)
        connection, set_aside = _initialise(path)
        return DatabaseFile(path, connection, read_only=False, set_aside=set_aside, scratch=scratch)


def open_in_memory() -> DatabaseFile:
    """An empty database that no file holds, this process's own: of one that is killed nothing is left behind.

    Raises:
        DatabaseError: there is no memory for it.
    """
    path = Path(":memory:")
    with explained(path, scratch=True):
        connection = _connect(path, "mode=memory")
        try:
            schema.migrate(connection)
        except BaseException:
            connection.close()
            raise
        return DatabaseFile(path, connection, read_only=False, scratch=True)


@contextmanager
def explained(path: Path, *, note_damage: bool = False, scratch: bool = False) -> Iterator[None]:
    """Turn errors of SQLite and of the file system into ours: one line, with the path and what to do.

    With `note_damage`, damage leaves a mark beside the file, which makes the next opening for writing check the whole
    file and set it aside. Doing that here would pull the file from under the other processes that have it open. A file
    that is `scratch` is in the folder for temporary files.
    """
    elsewhere = _OTHER_TMPDIR if scratch else _ELSEWHERE
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None and isinstance(error, sqlite3.OperationalError):  # "Could not decode to UTF-8 column …"
            raise DatabaseCorruptError(_NO_TEXT.format(path=path, error=error)) from error
        if code is None:
            raise  # Python's own: a mistake in the calling code
        code &= 0xFF  # the primary code; the rest says where in SQLite
        if code in _DAMAGE:
            if note_damage:
                with suppress(OSError):
                    damage_mark(path).touch()
            raise DatabaseCorruptError(
                f"{path} is damaged or no database ({error}): the next run that writes to it sets it aside "
                "and starts a fresh one"
            ) from error
        if code in _ACCESS:
            others = _others(path) if code == sqlite3.SQLITE_READONLY else ""
            advice = f"{others}, or {elsewhere}" if others else _ACCESS[code].format(elsewhere=elsewhere)
            raise DatabaseAccessError(f"{path} ({error}): {advice}") from error
        raise DatabaseError(f"{path}: {error}") from error
    except UnicodeDecodeError as error:
        raise DatabaseCorruptError(_NO_TEXT.format(path=path, error=error)) from error
    except TimeoutError as error:
        raise DatabaseAccessError(f"{path}: {_ACCESS[sqlite3.SQLITE_BUSY]}") from error
    except OSError as error:
        if path.parent.is_file():
            raise DatabaseAccessError(f"{a_file_for_a_folder(path.parent)}: {elsewhere}") from error
        raise DatabaseAccessError(f"{path} can't be used ({error.strerror or error}): {elsewhere}") from error


def _others(path: Path) -> str:
    """What to do where side files keep this user from writing a file; "" where none does. They are not to be removed: a
    WAL may hold records."""
    found = [Path(f"{path.resolve()}{suffix}") for suffix in SIDECARS]
    kept = [side for side in found if side.exists() and not os.access(side, os.W_OK)]
    if not kept:
        return ""
    try:
        owner = kept[0].owner()
    except (KeyError, NotImplementedError):  # a number without a name, or a system without owners
        owner = str(kept[0].stat().st_uid)
    names = " and ".join(side.name for side in kept)
    return f"{names} beside it, of user {owner}, can't be written: have that made writable"


def _connect(path: Path, parameters: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?{parameters}",
        uri=True,
        timeout=TIMEOUT_S,
        isolation_level=None,  # no transaction begins by itself
        check_same_thread=False,  # DatabaseFile has the lock
    )
    connection.row_factory = sqlite3.Row
    try:
        # With WAL, NORMAL survives the death of any process and never breaks the file. Only a power cut can take the
        # last commits back; FULL would prevent that with an fsync per record, while all processes wait for the lock.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ready(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether the file can be used as it is. Touches each table, since damage shows only in pages that are read."""
    if not schema.is_current(connection, path):
        return False
    connection.execute("SELECT * FROM runs ORDER BY id DESC LIMIT 1").fetchall()
    connection.execute("SELECT * FROM records ORDER BY id DESC LIMIT 1").fetchall()
    return bool(connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal")


def _connect_if_ready(path: Path) -> sqlite3.Connection | None:
    """Open for writing without the file lock; None if there is something to do that needs it."""
    if not _has_content(path) or damage_mark(path).exists():
        return None
    if not os.access(path, os.W_OK):  # SQLite would open it read-only without a word, and fail at the first write
        raise DatabaseAccessError(f"{path}: {_ACCESS[sqlite3.SQLITE_READONLY].format(elsewhere=_ELSEWHERE)}")
    connection, ready = None, False
    try:
        connection = _connect(path, "mode=rw")
        ready = _is_ready(connection, path)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
    finally:
        if connection is not None and not ready:
            connection.close()
    return connection if ready else None


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a file that there is for reading. Takes no lock and changes nothing but SQLite's own side files.

    Without a WAL the file alone is the whole database, and is read alone where side files can't be made; and where the
    file can't be written, since side files that such a reader makes are its own, stay, and keep writers out. Those of a
    program that has the file open, though its WAL be empty yet, are there for all, and what it writes is seen.

    Raises:
        DatabaseAccessError: there is a WAL, and the side files can't be made.
        sqlite3.Error: it can't be opened.
    """
    wal = Path(f"{path.resolve()}-wal")  # beside the file that a link leads to
    try:
        is_open = wal.exists() and Path(f"{path.resolve()}-shm").exists()
        if os.access(path, os.W_OK) or is_open or _has_content(wal):
            return _connect(path, "mode=ro")  # which reads the file
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in _NO_SIDE_FILES:
            raise
        if _has_content(wal):
            raise DatabaseAccessError(
                f"{path} ({error}): its latest records are in {wal}, and to read them SQLite must write beside it: "
                "check permissions and free space there, or copy both files to another folder and name that with --db"
            ) from error
    return _connect(path, _IMMUTABLE)


def _checked(connection: sqlite3.Connection, path: Path) -> sqlite3.Connection:
    try:
        if not schema.is_current(connection, path):
            raise DatabaseSchemaError(
                f"{path} was written by an older Tilewright: tune that device once more, which brings it up to date"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _initialise(path: Path) -> tuple[sqlite3.Connection, Path | None]:
    """Bring the file into being or up to date, one process at a time; also the path of what was set aside."""
    from filelock import FileLock  # 35 ms, and needed once in the life of a file

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=TIMEOUT_S):
        try:
            if _has_content(path):
                return _repair(path), None
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
        # Side files without their database go too: SQLite would replay them into the fresh one.
        remains = _has_content(path) or any(Path(f"{path}{suffix}").exists() for suffix in SIDECARS)
        set_aside = _set_aside(path) if remains else None
        _create(path.resolve())  # where a link leads, should it be one to an empty file
        damage_mark(path).unlink(missing_ok=True)
        return _connect(path, "mode=rw"), set_aside


def _repair(path: Path) -> sqlite3.Connection:
    """Under the lock: check a file that was marked as damaged, apply missing migrations, return to WAL."""
    connection = _connect(path, "mode=rw")
    try:
        if damage_mark(path).exists():
            findings = connection.execute("PRAGMA integrity_check(1)").fetchone()[0]
            if findings != "ok":
                raise _damage(findings)
            damage_mark(path).unlink()
        if not _is_ready_after_migration(connection, path):
            # Someone's tool left it in another journal mode, which works as well, only slower. A reader in another
            # process makes the switch fail at once; then it is left to the next opening.
            with suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _is_ready_after_migration(connection: sqlite3.Connection, path: Path) -> bool:
    if not schema.is_current(connection, path):
        schema.migrate(connection)
    return _is_ready(connection, path)


def _create(path: Path) -> None:
    """Under the lock: make a complete file and put it in place of none or an empty one."""
    fresh = Path(f"{path}.new")

    def remove() -> None:
        for leftover in (fresh, *(Path(f"{fresh}{suffix}") for suffix in SIDECARS)):
            leftover.unlink(missing_ok=True)

    remove()  # what is of a process that died here
    try:
        connection = _connect(fresh, "mode=rwc")
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            schema.migrate(connection)
            # Closing would empty the WAL into the file as well, and say nothing where that fails.
            if connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                raise DatabaseAccessError(f"{fresh} is held by another process: {_ELSEWHERE}")
        finally:
            connection.close()  # the last connection: it removes the WAL
        fresh.replace(path)
    except BaseException:  # a full disk, say
        remove()
        raise


def _set_aside(path: Path) -> Path:
    """Rename a damaged file and its side files, which belong to it; never delete. The first of the new names."""
    aside = Path(f"{path}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}")
    moved = []
    for suffix in ("", *SIDECARS):
        if Path(f"{path}{suffix}").exists():
            moved.append(Path(f"{path}{suffix}").rename(f"{aside}{suffix}"))
    return moved[0]


def refuse_dangling(path: Path) -> None:
    """Does nothing unless a path is a link to what is not there, whose records would be missed, or begun anew, in
    silence.

    Raises:
        DatabaseAccessError: it is.
    """
    if path.is_symlink() and not path.exists():
        target = path.readlink()
        raise DatabaseAccessError(
            f"{path} is a link to {target}, which is not there: bring that back, remove the link, or {_ELSEWHERE}"
        )


def _has_content(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):  # side files go whenever the last connection closes
        return False


def damage_mark(path: Path) -> Path:
    """The empty file that says that a program met damage in the one beside it."""
    return Path(f"{path}.damaged")


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def _damage(findings: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(findings)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error

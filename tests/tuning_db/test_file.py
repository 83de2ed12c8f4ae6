from __future__ import annotations

import functools
import os
import re
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tilewright.tuning_db import (
    DatabaseAccessError,
    DatabaseCorruptError,
    DatabaseError,
    Key,
    TuningDB,
    UsageError,
    file,
)
from tilewright.tuning_db.snapshot import open_snapshot

DEVICE = "rtx3090-82sm"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def filled(tmp_path: Path, environment, make_record) -> Path:
    """A closed file with 400 records, some hundred pages."""
    with TuningDB.open(DEVICE, tmp_path) as db:
        run_id = db.start_run(environment)
        db.add_many([make_record(f'{{"BLOCK_M":{i}}}', message="x" * 500) for i in range(400)], run_id)
        return db.path


# Names


def test_a_plain_key_is_the_file_name(tmp_path: Path) -> None:
    assert file.path_for("rtx3090-82sm", tmp_path) == tmp_path / "rtx3090-82sm.sqlite"


@pytest.mark.parametrize("key", ["NVIDIA H200 / 132", "../../etc/passwd", "a10.72", "A10-72", "µ", ".", "x" * 400])
def test_any_key_is_one_file_in_the_folder(tmp_path: Path, key: str) -> None:
    path = file.path_for(key, tmp_path)
    assert path.parent == tmp_path
    assert re.fullmatch(r"[a-z0-9_-]+\.sqlite", path.name)
    assert path != file.path_for(key + " ", tmp_path)
    with TuningDB.open(key, tmp_path) as db:
        assert db.path == path


def test_keys_with_the_same_slug_have_different_files(tmp_path: Path) -> None:
    assert len({file.path_for(key, tmp_path) for key in ("a10-72sm", "A10-72", "a10 72", "a10/72")}) == 4


def test_an_empty_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs a name"):
        TuningDB.open("", tmp_path)


# Fresh files


def test_a_fresh_file_is_wal_and_alone(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "here"
    with TuningDB.open(DEVICE, folder) as db:
        assert db.set_aside is None
        with closing(sqlite3.connect(db.path)) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert names(folder) == [f"{DEVICE}.sqlite", f"{DEVICE}.sqlite.lock"]


def test_a_fresh_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with TuningDB.open(DEVICE, tmp_path) as db:
            assert stat.S_IMODE(db.path.stat().st_mode) == 0o640
    finally:
        os.umask(before)


def test_the_folder_is_the_variables_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_DB_DIR", str(tmp_path))
    with TuningDB.open(DEVICE) as db:
        assert db.path == tmp_path / f"{DEVICE}.sqlite"


def test_a_current_file_is_opened_without_the_lock(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_initialise", lambda path: pytest.fail("took the lock"))
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert sum(db.stats().values()) == 400


def test_an_empty_file_is_filled(tmp_path: Path, key: Key) -> None:
    (tmp_path / f"{DEVICE}.sqlite").touch()
    with TuningDB.open(DEVICE, tmp_path) as db:
        assert db.set_aside is None
        assert db.records(key) == []


def test_what_a_killed_initialisation_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / f"{DEVICE}.sqlite.new").write_bytes(b"half")
    (tmp_path / f"{DEVICE}.sqlite.new-wal").write_bytes(b"half")
    with TuningDB.open(DEVICE, tmp_path) as db:
        assert db.set_aside is None
    assert names(tmp_path) == [f"{DEVICE}.sqlite", f"{DEVICE}.sqlite.lock"]


@pytest.mark.parametrize(
    ("busy", "said"), [(False, "the disk is full: free some space"), (True, "is held by another process")]
)
def test_a_fresh_file_that_did_not_get_out_of_its_log_is_none(
    tmp_path: Path, busy: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that has room for the log alone: closing the last connection says nothing of it."""

    class Full(sqlite3.Connection):
        def execute(self, sql: str, *given: Any) -> sqlite3.Cursor:
            if "wal_checkpoint" not in sql:
                return super().execute(sql, *given)
            if busy:
                return super().execute("SELECT 1, 16, 0")
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Full))
    with pytest.raises(DatabaseAccessError, match=said):
        file.open_file(tmp_path / "d.sqlite")
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_another_journal_mode_is_put_back(filled: Path) -> None:
    with closing(sqlite3.connect(filled)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    with TuningDB.open(DEVICE, filled.parent) as db, closing(sqlite3.connect(filled)) as connection:
        assert sum(db.stats().values()) == 400
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


# Damage


def garbage(path: Path) -> None:
    path.write_bytes(b"this is no database" * 1000)


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first_page_overwritten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:100] + b"\xff" * 3996 + content[4096:])


@pytest.mark.parametrize("damage", [garbage, short, truncated, first_page_overwritten])
def test_a_damaged_file_is_set_aside(filled: Path, damage, environment, make_record, key: Key) -> None:
    damage(filled)
    content = filled.read_bytes()
    with TuningDB.open(DEVICE, filled.parent) as db:
        aside = db.set_aside
        db.add(make_record(), db.start_run(environment))
        assert len(db.records(key)) == 1
    assert aside is not None
    assert re.fullmatch(rf"{DEVICE}\.sqlite\.corrupt-\d{{8}}T\d{{6}}\.\d{{6}}Z", aside.name)
    assert aside.read_bytes() == content
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert db.set_aside is None
        assert len(db.records(key)) == 1


@pytest.mark.parametrize("damage", [garbage, short, truncated, first_page_overwritten])
def test_reading_a_damaged_file_says_so_and_changes_nothing(filled: Path, damage) -> None:
    damage(filled)
    before = filled.read_bytes()
    with pytest.raises(DatabaseCorruptError, match=re.escape(str(filled))) as caught:
        TuningDB.open(DEVICE, filled.parent, read_only=True)
    assert "\n" not in str(caught.value)
    assert filled.read_bytes() == before
    assert not [name for name in names(filled.parent) if "corrupt" in name or "damaged" in name]


def test_side_files_without_their_database_are_set_aside(filled: Path) -> None:
    wal = Path(f"{filled}-wal")
    wal.write_bytes(b"an earlier database's")
    filled.unlink()
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert db.set_aside is not None
        assert db.set_aside.read_bytes() == b"an earlier database's"
        assert db.stats() == {}


def test_damage_met_in_a_run_is_set_aside_by_the_next(filled: Path, key: Key) -> None:
    content = bytearray(filled.read_bytes())
    middle = len(content) // 4096 // 2 * 4096
    content[middle : middle + 20 * 4096] = b"\xff" * (20 * 4096)
    filled.write_bytes(content)
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert db.set_aside is None  # opening reads a few pages only
        with pytest.raises(DatabaseCorruptError) as caught:
            db.records(key)
    assert str(filled) in str(caught.value)
    assert "\n" not in str(caught.value)
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert db.set_aside is not None
        assert db.set_aside.stat().st_size == len(content)
        assert db.records(key) == []
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert db.set_aside is None


def test_a_mark_on_a_sound_file_is_taken_back(filled: Path) -> None:
    mark = Path(f"{filled}.damaged")
    mark.touch()
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert db.set_aside is None
        assert sum(db.stats().values()) == 400
    assert not mark.exists()


# Access


def test_the_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    for folder in (tmp_path / "folder", tmp_path / "folder" / "below"):
        with pytest.raises(DatabaseAccessError, match=re.escape(str(folder))) as caught:
            TuningDB.open(DEVICE, folder)
        assert "--db" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_file_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / f"{DEVICE}.sqlite").mkdir()
    for read_only in (False, True):
        with pytest.raises(DatabaseAccessError, match="is a folder"):
            TuningDB.open(DEVICE, tmp_path, read_only=read_only)


def test_a_link_to_what_is_not_there_is_told_and_stays(filled: Path, key: Key) -> None:
    target = filled.rename(filled.with_name("unmounted"))
    filled.symlink_to("unmounted")
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert len(db.records(key)) == 400
    target.unlink()
    said = f"^{re.escape(str(filled))} is a link to unmounted, which is not there: "
    for read_only in (False, True):
        with pytest.raises(DatabaseAccessError, match=said):
            TuningDB.open(DEVICE, filled.parent, read_only=read_only)
    with pytest.raises(DatabaseAccessError, match=said), open_snapshot(filled):
        pass
    assert filled.is_symlink()
    target.touch()
    TuningDB.open(DEVICE, filled.parent).close()
    assert filled.is_symlink()
    assert target.stat().st_size > 0


UNPRIVILEGED = """
import os, sqlite3, sys
from pathlib import Path
from typing import Any
from tilewright.tuning_db import DatabaseAccessError, Key, TuningDB
folder = Path(sys.argv[1])
TuningDB.open("a10-72sm", folder.parent / "other").close()  # imports what another user may be unable to read
os.umask(0)
if os.geteuid() == 0:  # root may write anywhere
    os.chown(folder, 65534, 65534)
    os.setgid(65534)
    os.setuid(65534)
def refused():
    try:
        TuningDB.open("a10-72sm", folder).close()
    except DatabaseAccessError as error:
        print(error)
    else:
        print("opened")
folder.chmod(0o555)
refused()
folder.chmod(0o755)
with TuningDB.open("a10-72sm", folder) as db:
    path = db.path
path.chmod(0o444)
refused()
def read():
    with TuningDB.open("a10-72sm", folder, read_only=True) as db:
        print(db.records(Key("gemm", "hash", "{}", "a10-72sm", 86, "3.9", "13.0", "graph-1")))
read()
print(sorted(path.name for path in folder.iterdir()))
folder.chmod(0o555)
read()
folder.chmod(0o755)
other = sqlite3.connect(f"file:{path}?mode=ro", uri=True)  # some tool of one who may only read
other.execute("SELECT count(*) FROM records").fetchall()
other.close()
path.chmod(0o644)
try:
    with TuningDB.open("a10-72sm", folder) as db:
        db.note({"stamp": "value"})
except DatabaseAccessError as error:
    print(error)
"""


def test_without_permissions() -> None:
    # Not below pytest's folder, which nobody but its owner may enter.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        (Path(folder) / "db").mkdir()
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, f"{folder}/db"], capture_output=True, text=True, check=False
        )
    assert done.stderr == ""
    no_folder, no_file, read, beside, read_there, no_side_file = done.stdout.splitlines()
    assert "Permission denied" in no_folder
    assert "it can't be written" in no_file
    assert "a10-72sm.sqlite-shm beside it, of user " in no_side_file
    for line in (no_folder, no_file, no_side_file):
        assert line.startswith(f"{folder}/db/a10-72sm.sqlite")
        assert "--db" in line
    assert read == read_there == "[]"
    assert beside == "['a10-72sm.sqlite', 'a10-72sm.sqlite.lock']"  # no side files, which would keep its writers out


def test_who_may_only_read_sees_what_a_program_that_has_the_file_open_writes(
    filled: Path, environment, make_record, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TuningDB.open(DEVICE, filled.parent) as db:
        assert Path(f"{filled}-wal").stat().st_size == 0  # open, and not written to yet
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with TuningDB.open(DEVICE, filled.parent, read_only=True) as reader:
            before = len(reader.records(key))
            db.add(make_record("later"), db.start_run(environment))
            assert len(reader.records(key)) == before + 1


def test_a_full_disk(filled: Path, environment, make_record, key: Key) -> None:
    with TuningDB.open(DEVICE, filled.parent) as db:
        run_id = db.start_run(environment)
        pages = db._file.rows("PRAGMA page_count")[0][0]
        db._file.rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DatabaseAccessError, match="the disk is full") as caught:
            db.add_many([make_record(str(i), message="y" * 9000) for i in range(50)], run_id)
        assert str(filled) in str(caught.value)
        assert len(db.records(key)) == 400  # all or none
        db._file.rows(f"PRAGMA max_page_count = {pages + 1000}")
        db.add(make_record("later"), run_id)
        assert db.get(key, "later") is not None


@contextmanager
def no_space() -> Iterator[None]:
    """No file can be made longer than it takes to be one of SQLite's."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_read(filled: Path, key: Key) -> None:
    with no_space(), TuningDB.open(DEVICE, filled.parent, read_only=True) as db:
        assert len(db.records(key)) == 400


def test_records_in_a_wal_are_never_left_out(filled: Path, tmp_path: Path, key: Key) -> None:
    """Of a run that was killed; through a link, beside which there is no WAL."""
    target = tmp_path / "elsewhere" / "a.sqlite"
    target.parent.mkdir()
    with closing(sqlite3.connect(filled)) as connection:
        connection.execute("UPDATE records SET message = 'in the WAL'")
        connection.commit()
        shutil.copy(f"{filled}-wal", f"{target}-wal")
        shutil.copy(filled, target)
    filled.unlink()
    filled.symlink_to(target)
    wal = re.escape(f"its latest records are in {target}-wal, ")
    with no_space(), pytest.raises(DatabaseAccessError, match=wal):
        TuningDB.open(DEVICE, tmp_path, read_only=True)
    with no_space(), pytest.raises(DatabaseAccessError, match=wal), open_snapshot(filled):
        pass
    with TuningDB.open(DEVICE, tmp_path, read_only=True) as db:
        assert {record.message for record in db.records(key)} == {"in the WAL"}


def test_a_file_locked_too_long(filled: Path, environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "TIMEOUT_S", 0.05)
    with closing(sqlite3.connect(filled, isolation_level=None)) as other, TuningDB.open(DEVICE, filled.parent) as db:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(DatabaseAccessError, match="another process has held it"):
            db.start_run(environment)
        other.execute("ROLLBACK")
        assert db.start_run(environment) > 0


def test_a_lock_file_held_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(file, "TIMEOUT_S", 0.05)
    with FileLock(f"{tmp_path / DEVICE}.sqlite.lock"):  # noqa: SIM117
        with pytest.raises(DatabaseAccessError, match="another process has held it"):
            TuningDB.open(DEVICE, tmp_path)


def test_a_dropped_table_is_an_error_of_the_database(filled: Path, key: Key) -> None:
    with TuningDB.open(DEVICE, filled.parent) as db:
        with closing(sqlite3.connect(filled)) as other:
            other.execute("DROP TABLE records")
        with pytest.raises(DatabaseError, match="no such table"):
            db.records(key)


# Use


def test_text_that_is_none_is_damage_of_one_row(filled: Path, key: Key) -> None:
    with closing(sqlite3.connect(filled)) as raw, raw:
        raw.execute("UPDATE records SET message = CAST(x'ff41' AS TEXT)")
    with (
        TuningDB.open(key.device, filled.parent, read_only=True) as db,
        pytest.raises(
            DatabaseCorruptError, match=r"holds a text that is not valid .*: `autotune db check` names the row"
        ),
    ):
        db.records(key)


def test_ctrl_c_in_a_transaction_takes_it_back(db: TuningDB, environment, key: Key) -> None:
    def interrupted(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO runs VALUES (9, 'a', 'b', 'c', 'd', 'e', 'f', '', '', '{}', 'now')")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        db._file.write(interrupted)
    assert db.runs() == {}
    assert db.start_run(environment) == 1


def test_use_after_close_is_refused(db: TuningDB, key: Key) -> None:
    db.close()
    db.close()
    with pytest.raises(UsageError, match="was closed"):
        db.records(key)


def test_use_after_fork_is_refused(db: TuningDB, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(UsageError, match="forked"):
        db.records(key)


# Reading one state, giving space back, and a frozen process


def test_a_read_sees_one_state(filled: Path) -> None:
    def action(connection: sqlite3.Connection) -> list[int]:
        counts = []
        for _ in range(2):
            counts.append(connection.execute("SELECT count(*) FROM records").fetchone()[0])
            with closing(sqlite3.connect(filled)) as other, other:
                other.execute("DELETE FROM records WHERE id = (SELECT max(id) FROM records)")
        return counts

    with closing(file.open_file(filled, read_only=True)) as opened:
        assert opened.read(action) == [400, 400]
        assert opened.rows("SELECT count(*) FROM records")[0][0] == 398
        with pytest.raises(ZeroDivisionError):
            opened.read(lambda connection: 1 // 0)
        assert opened.read(action) == [398, 398]


def test_a_read_of_what_is_not_there(tmp_path: Path) -> None:
    absent = tmp_path / "a10-72sm.sqlite"
    with closing(file.open_file(absent, read_only=True)) as opened, pytest.raises(DatabaseAccessError) as caught:
        opened.read(lambda connection: None)
    assert str(caught.value) == f"there is no {absent}: tune that device first, or name its folder (--db)"


def test_space_is_given_back_unless_another_is_in_the_way(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "TIMEOUT_S", 0.1)
    size = filled.stat().st_size
    with closing(file.open_file(filled)) as opened:
        opened.write(lambda connection: connection.execute("DELETE FROM records WHERE id > 10"))
        with closing(sqlite3.connect(filled, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            opened.compact()
            assert filled.stat().st_size == size
            other.execute("ROLLBACK")
        opened.compact()
        assert filled.stat().st_size < size // 4
        assert len(opened.rows("SELECT * FROM records")) == 10
    with closing(file.open_file(filled, read_only=True)) as opened, pytest.raises(UsageError, match="read-only"):
        opened.compact()


def test_a_frozen_process_opens_nothing_for_writing(filled: Path, key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    before = filled.read_bytes()
    for path in (filled, filled.with_name("a10-72sm.sqlite")):
        with pytest.raises(UsageError, match=f"TILEWRIGHT_FROZEN is set: nothing is written to {path}"):
            file.open_file(path)
    with TuningDB.open(DEVICE, filled.parent, read_only=True) as db:
        assert len(list(db.find())) == 400
    assert filled.read_bytes() == before
    assert not filled.with_name("a10-72sm.sqlite").exists()

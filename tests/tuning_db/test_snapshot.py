from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tilewright.tuning_db import DatabaseCorruptError, DatabaseSchemaError, TuningDB, schema
from tilewright.tuning_db.errors import DatabaseAccessError
from tilewright.tuning_db.snapshot import open_snapshot


@pytest.fixture
def path(tmp_path: Path, environment, make_record, key) -> Path:
    with TuningDB.open(key.device, tmp_path) as db:
        db.add(make_record(), db.start_run(environment))
        return db.path


def test_a_current_file_is_read_itself(path: Path) -> None:
    with open_snapshot(path) as file:
        assert file.path == path
        assert file.read_only
        assert len(file.rows("SELECT * FROM records")) == 1


def test_an_older_file_is_read_through_a_copy_that_goes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def s0099_adds_a_note(db) -> None:
        db.table("runs").add_column("note", str)

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, s0099_adds_a_note))
    before = path.read_bytes()
    with open_snapshot(path) as file:
        assert file.rows("SELECT note FROM runs")[0][0] is None
        assert file.path.name == path.name
        assert file.path != path
    assert not file.path.exists()
    assert path.read_bytes() == before


def test_what_was_committed_and_is_still_in_the_wal_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def s0099_changes_nothing(db) -> None:
        pass

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, s0099_changes_nothing))
    with closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE records SET message = 'in the WAL'")
        other.commit()
        with open_snapshot(path) as file:
            assert file.rows("SELECT message FROM records")[0][0] == "in the WAL"


def test_a_file_in_a_folder_that_cannot_be_written_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def s0099_changes_nothing(db) -> None:
        pass

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, s0099_changes_nothing))
    path.parent.chmod(0o555)
    try:
        with open_snapshot(path) as file:
            assert len(file.rows("SELECT * FROM records")) == 1
    finally:
        path.parent.chmod(0o755)


def test_what_cannot_be_read(path: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(DatabaseAccessError, match=r"there is no .*absent.sqlite"),
        open_snapshot(tmp_path / "absent.sqlite"),
    ):
        pass
    (tmp_path / "text.sqlite").write_text("no database at all, though of some length" * 9)
    with pytest.raises(DatabaseCorruptError, match=r"text.sqlite"), open_snapshot(tmp_path / "text.sqlite"):
        pass
    newer = tmp_path / "newer.sqlite"
    shutil.copy(path, newer)
    with closing(sqlite3.connect(newer)) as connection, connection:
        connection.execute("INSERT INTO _sqlite_migrations VALUES (99, 'tilewright', 's0999_future', 'some day')")
    with pytest.raises(DatabaseSchemaError, match="upgrade tilewright"), open_snapshot(newer):
        pass
    with pytest.raises(DatabaseAccessError, match="is a folder"), open_snapshot(tmp_path):
        pass

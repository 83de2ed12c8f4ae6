from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tilewright.tuning_db import DatabaseCorruptError, Key, Provenance, Status, TuningDB, shipping
from tilewright.tuning_db.env import SHIPPED, shipped_dir
from tilewright.tuning_db.file import path_for
from tilewright.tuning_db.schema import is_current
from tilewright.tuning_db.shipped_records import open_shipped, shipped_paths, warn_of_unreadable
from tilewright.tuning_db.upkeep import check


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, db: TuningDB, run_id: int, make_record) -> Path:
    """A shipped file of one record."""
    db.add(make_record(), run_id)
    path = tmp_path / "shipped" / db.path.name
    path.parent.mkdir()
    with path.open("wb") as stream:
        assert shipping.write_database(db._file, db.device, stream) == 1
    monkeypatch.setenv(SHIPPED, str(path.parent))
    return path


def test_the_files_there_are(shipped: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (shipped.parent / "README.md").touch()
    assert shipped_paths() == [shipped]
    monkeypatch.setenv(SHIPPED, str(tmp_path / "nowhere"))
    assert shipped_paths() == []
    monkeypatch.setenv(SHIPPED, "0")
    assert shipped_paths() == []


def test_reading_takes_no_locks_and_leaves_nothing_beside_the_file(shipped: Path, key: Key, tmp_path: Path) -> None:
    """So it may lie in a folder that can't be written, and any number of processes may read it."""
    with closing(sqlite3.connect(shipped, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with TuningDB.open(key.device, tmp_path / "home", read_only=True) as db:
            answer = db.best(key)
            assert answer is not None
            assert (answer.provenance, answer.reason) == (Provenance.MEASURED, "exact, shipped")
            assert {path.name for path in shipped.parent.iterdir()} <= {shipped.name, f"{shipped.name}-journal"}
        other.execute("ROLLBACK")
    assert list(shipped.parent.iterdir()) == [shipped]
    assert not (tmp_path / "home").exists()


def test_a_missing_file_is_an_empty_one_and_a_broken_one_an_error(shipped: Path) -> None:
    file = open_shipped(shipped.with_name("a10-72sm.sqlite"))
    assert file.rows("SELECT * FROM records") == []
    shipped.write_bytes(b"no database" * 99)
    with pytest.raises(DatabaseCorruptError, match="no database"):
        open_shipped(shipped)
    assert list(shipped.parent.iterdir()) == [shipped]


def test_the_warning_names_the_cause(tmp_path: Path) -> None:
    error = DatabaseCorruptError("set aside by the next run that writes to it")
    error.__cause__ = sqlite3.DatabaseError("file is not a database\nmore")
    with pytest.warns(RuntimeWarning, match=r"a\.sqlite: .* left out \(file is not a database\): install it again, or"):
        warn_of_unreadable(tmp_path / "a.sqlite", error)


def test_what_the_package_ships_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this fails after a new step of the schema, make the file again: `autotune export --device BOARD
    --db tuning_db/shipped --format sqlite --output tuning_db/shipped/BOARD.sqlite`."""
    monkeypatch.delenv(SHIPPED)
    folder = shipped_dir()
    assert folder is not None
    assert folder.is_dir()
    assert {path.suffix for path in folder.iterdir()} <= {".md", ".sqlite"}, "side files: it was opened for writing"
    for path in shipped_paths():
        assert check(path) == []
        with closing(sqlite3.connect(path)) as connection:
            assert is_current(connection, path)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            (device,) = connection.execute("SELECT DISTINCT device FROM records").fetchone()
        assert path == path_for(device, folder)
        with TuningDB.open(device, folder, read_only=True) as db:
            for record in db.find():
                assert (record.status, record.provenance) == (Status.OK, Provenance.MEASURED)
                assert record.resources is not None

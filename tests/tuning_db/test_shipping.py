from __future__ import annotations

import io
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tilewright.tuning_db import DatabaseCorruptError, Environment, Key, Record, TuningDB, shipping
from tilewright.tuning_db.errors import ExportFileError, UsageError
from tilewright.tuning_db.interchange import export
from tilewright.tuning_db.schema import is_current
from tilewright.tuning_db.selection import BestFew
from tilewright.tuning_db.shipped_records import open_shipped

MOMENT = "2026-01-01T00:00:00+00:00"


@pytest.fixture
def fill(tmp_path: Path, environment: Environment, key: Key):
    """A database with records of some runs, in the order given; the host names the run."""

    def make(name: str, *records: tuple[str, Record]) -> TuningDB:
        db = TuningDB.open(key.device, tmp_path / name)
        for host, record in records:
            db.add(record, db.start_run(replace(environment, host=host)))
        db._file.write(lambda connection: connection.execute("UPDATE runs SET started_at = ?", (MOMENT,)))
        return db

    return make


def written(db: TuningDB, path: Path, **options) -> int:
    with path.open("wb") as stream:
        return shipping.write_database(db._file, db.device, stream, **options)


@pytest.fixture
def records(make_record) -> list[tuple[str, Record]]:
    """Of four configurations and two runs."""
    make = [make_record(f'{{"tile":{tile}}}', 10.0 - tile, created_at=MOMENT) for tile in range(4)]
    return [("there" if record.config[-2] in "02" else "here", record) for record in make]


def test_the_records_are_those_of_an_export(fill, records, tmp_path: Path, key: Key) -> None:
    db, path = fill("home", *records), tmp_path / "made.sqlite"
    assert written(db, path) == 4
    wanted, found = io.BytesIO(), io.BytesIO()
    export(db._file, key.device, wanted)
    export(open_shipped(path), key.device, found)
    assert found.getvalue() == wanted.getvalue()
    assert written(db, path, ops=["conv2d"]) == 0
    assert written(db, path, best=BestFew(1, lambda op, problem: '{"tile":0}')) == 2
    with TuningDB(key.device, open_shipped(path)) as made:
        assert {record.config for record in made.find()} == {'{"tile":0}', '{"tile":3}'}


def test_the_same_records_give_the_same_bytes(fill, records, tmp_path: Path) -> None:
    one, other = fill("one", *records), fill("other", *reversed(records))
    written(one, tmp_path / "one.sqlite")
    written(other, tmp_path / "other.sqlite")
    assert (tmp_path / "one.sqlite").read_bytes() == (tmp_path / "other.sqlite").read_bytes()
    fill("other", ("here", replace(records[1][1], message="changed")))
    written(other, tmp_path / "other.sqlite")
    assert (tmp_path / "one.sqlite").read_bytes() != (tmp_path / "other.sqlite").read_bytes()


def test_it_is_one_file_of_the_current_schema(fill, records, tmp_path: Path) -> None:
    path = tmp_path / "made.sqlite"
    written(fill("home", *records), path)
    with closing(sqlite3.connect(path)) as connection:
        assert is_current(connection, path)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM shapes WHERE class IS NOT NULL").fetchone() == (1,)
    assert {each.name for each in tmp_path.iterdir()} == {"home", "made.sqlite"}


def test_records_that_are_none_are_refused(fill, records, tmp_path: Path) -> None:
    db = fill("home", *records)
    with pytest.raises(ExportFileError, match=r"\.sqlite:4: not this one$"):
        written(db, tmp_path / "made.sqlite", objection=lambda record: "not this one")
    db._file.write(lambda connection: connection.execute("UPDATE records SET status = 'okay' WHERE id = 2"))
    with pytest.raises(DatabaseCorruptError, match="record 2 is no record"):
        written(db, tmp_path / "made.sqlite")


def test_a_database_is_replaced_only_where_it_was_made_to_be_shipped(fill, records, tmp_path: Path) -> None:
    db, made, text = fill("home", *records), tmp_path / "made.sqlite", tmp_path / "text"
    written(db, made)
    text.write_text("of something else")
    for path in (text, tmp_path / "absent", tmp_path):
        shipping.refuse_database(path)
    shipping.refuse_database(made, but_shipped=True)
    db.close()
    with pytest.raises(UsageError, match=r"made\.sqlite is a database, which would be lost"):
        shipping.refuse_database(made)
    for journal in ("wal", "delete"):  # that of another tool is no sign
        with closing(sqlite3.connect(db.path)) as connection:
            connection.execute(f"PRAGMA journal_mode = {journal}")
        with pytest.raises(UsageError, match="which would be lost"):
            shipping.refuse_database(db.path, but_shipped=True)
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as connection:
        connection.execute("CREATE TABLE a (b)")
    with pytest.raises(UsageError, match="which would be lost"):
        shipping.refuse_database(tmp_path / "other.sqlite", but_shipped=True)

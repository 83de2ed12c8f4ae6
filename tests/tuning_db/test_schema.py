from __future__ import annotations

import io
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tilewright.tuning_db import (
    DatabaseSchemaError,
    Key,
    Near,
    Provenance,
    TuningDB,
    canonical_json,
    lookup,
    schema,
    shapes,
)
from tilewright.tuning_db.file import open_file
from tilewright.tuning_db.interchange import export
from tilewright.tuning_db.rows import environment_to_row, record_to_row

SCHEMAS = Path(__file__).with_name("schemas")
"""A file of each schema that was ever released, with rows, and what was exported from it then; see `make.py` there."""


@pytest.fixture
def raw(db: TuningDB) -> Iterator[sqlite3.Connection]:
    """The file as any SQLite tool sees it."""
    with closing(sqlite3.connect(db.path)) as connection:
        yield connection


def columns(connection: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}


def test_a_fresh_file_names_every_step(raw: sqlite3.Connection) -> None:
    rows = raw.execute("SELECT migration_set, name FROM _sqlite_migrations ORDER BY id").fetchall()
    assert rows == [("tilewright", step.__name__) for step in schema.STEPS]


def test_columns_are_the_fields_that_are_written(raw: sqlite3.Connection, make_record, environment) -> None:
    assert columns(raw, "records") == {"id", *record_to_row(make_record(), 1, "")}
    assert columns(raw, "runs") == {"id", *environment_to_row(environment, "")}
    assert columns(raw, "best") == columns(raw, "records")


def test_one_outcome_per_key_config_and_provenance(raw: sqlite3.Connection, db: TuningDB, run_id, make_record) -> None:
    db.add(make_record(), run_id)
    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        raw.execute(
            "INSERT INTO records SELECT max(id) + 1, "
            + ", ".join(name for name in (row[1] for row in raw.execute("PRAGMA table_info(records)")) if name != "id")
            + " FROM records"
        )


def test_applying_again_changes_nothing(raw: sqlite3.Connection) -> None:
    raw.isolation_level = None
    before = list(raw.iterdump())
    schema.migrate(raw)
    assert list(raw.iterdump()) == before


def test_a_step_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def s9999_breaks(db) -> None:
        db.table("halfway").create({"id": int}, pk="id")
        raise RuntimeError("broken step")

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, s9999_breaks))
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        with pytest.raises(RuntimeError, match="broken step"):
            schema.migrate(connection)
        assert not connection.in_transaction
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []


def test_an_older_file_is_brought_up_to_date(tmp_path: Path, monkeypatch, environment, make_record, key: Key) -> None:
    with TuningDB.open(key.device, tmp_path) as db:
        db.add(make_record(), db.start_run(environment))

    def s9999_adds_a_note(db) -> None:
        db.table("runs").add_column("note", str)

    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, s9999_adds_a_note))
    with pytest.raises(DatabaseSchemaError, match="older Tilewright"):
        TuningDB.open(key.device, tmp_path, read_only=True)
    with TuningDB.open(key.device, tmp_path) as db:
        assert len(db.records(key)) == 1
        with closing(sqlite3.connect(db.path)) as connection:
            assert "note" in columns(connection, "runs")


def test_problems_on_record_before_there_were_shapes_are_near(
    tmp_path: Path, monkeypatch, environment, make_record, key: Key
) -> None:
    """A file of the first schema, as its own code filled it."""
    problems = [canonical_json({"M": m, "N": 4096, "dtype": "fp16"}) for m in (17, 24)]
    with closing(sqlite3.connect(tmp_path / f"{key.device}.sqlite", isolation_level=None)) as old:
        monkeypatch.setattr(schema, "STEPS", schema.STEPS[:1])
        old.execute("PRAGMA journal_mode = WAL")
        schema.migrate(old)
        rows = [record_to_row(make_record(problem=problem), 1, "2026") for problem in problems]
        rows += [record_to_row(make_record(problem=problems[0], config="other"), 1, "2026")]
        rows += [record_to_row(make_record(problem="[]", provenance=Provenance.PREDICTED), 1, "2026")]
        for table, row in [("runs", environment_to_row(environment, "2026")), *[("records", row) for row in rows]]:
            old.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)
    monkeypatch.undo()
    with TuningDB.open(key.device, tmp_path) as db:
        assert db.best(key) is None
        answer = db.best(key, near=Near(("M",)))
        assert answer is not None
        assert answer.reason == "near shape M=16→17"
        with closing(sqlite3.connect(db.path)) as connection:
            placed = connection.execute("SELECT problem, size0, size1, size2 FROM shapes ORDER BY size0").fetchall()
        assert placed == [(problems[0], 17, 4096, None), (problems[1], 24, 4096, None)]


def test_there_is_a_file_of_every_former_schema() -> None:
    kept = {path.stem for path in SCHEMAS.glob("*.sqlite")}
    assert kept >= {step.__name__ for step in schema.STEPS[:-1]}
    assert kept == {path.stem for path in SCHEMAS.glob("*.jsonl")}


@pytest.mark.parametrize("kept", sorted(SCHEMAS.glob("*.sqlite")), ids=lambda path: path.stem)
def test_a_file_of_a_former_schema_is_brought_up(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rtx3090-82sm.sqlite"
    shutil.copy(kept, path)
    steps = [step.__name__ for step in schema.STEPS]
    with closing(sqlite3.connect(path)) as connection:
        applied = [name for (name,) in connection.execute("SELECT name FROM _sqlite_migrations ORDER BY id")]
        before = tables(connection)
    # A released step is never edited: it makes what it made then.
    assert applied == steps[: steps.index(kept.stem) + 1]
    with monkeypatch.context() as patch, closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        patch.setattr(schema, "STEPS", schema.STEPS[: len(applied)])
        schema.migrate(connection)
        assert tables(connection) == before

    with closing(open_file(path)) as file:
        said = io.BytesIO()
        export(file, "rtx3090-82sm", said)
    assert said.getvalue() == kept.with_suffix(".jsonl").read_bytes()
    with (
        closing(sqlite3.connect(path)) as connection,
        closing(sqlite3.connect(":memory:", isolation_level=None)) as new,
    ):
        schema.migrate(new)
        assert tables(connection) == tables(new)
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with TuningDB.open("rtx3090-82sm", tmp_path, read_only=True) as db:
        measured = [record for record in db.find(op="gemm", provenance=Provenance.MEASURED) if record.times]
        assert len(measured) == 2
        answer = db.best(measured[0].key)
        assert answer is not None
        assert answer.record.times == min((record.times for record in measured), key=lambda times: times.median_us)
        assert answer.provenance is Provenance.MEASURED


def tables(connection: sqlite3.Connection) -> dict[str, set[tuple]]:
    """Tables with their columns, indexes and views with their text: `ALTER TABLE` writes a table's otherwise."""
    found: dict[str, set[tuple]] = {}
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall():
        if kind == "table":
            found[name] = set(connection.execute(f"SELECT name, type, [notnull], pk FROM pragma_table_info('{name}')"))
        else:
            found[name] = {(" ".join((sql or "").split()),)}
    return found


@pytest.mark.parametrize("read_only", [False, True])
def test_a_newer_file_is_refused_untouched(tmp_path: Path, read_only: bool) -> None:
    with TuningDB.open("a10-72sm", tmp_path) as db:
        path = db.path
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO _sqlite_migrations VALUES (99, 'tilewright', 's0099_future', 'some day')")
    before = path.read_bytes()
    with pytest.raises(DatabaseSchemaError) as caught:
        TuningDB.open("a10-72sm", tmp_path, read_only=read_only)
    message = str(caught.value)
    assert str(path) in message
    assert "s0099_future" in message
    assert "upgrade tilewright" in message
    assert "--db" in message
    assert "\n" not in message
    assert path.read_bytes() == before


def test_a_database_of_something_else_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "a10-72sm.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(DatabaseSchemaError, match="not Tilewright's"):
        TuningDB.open("a10-72sm", tmp_path)
    assert path.read_bytes() == before


def test_the_view_has_one_row_per_key(raw: sqlite3.Connection, db: TuningDB, run_id: int, make_record) -> None:
    db.add_many(
        [
            make_record("a", 5.0),
            make_record("b", 3.0),
            make_record("c", 1.0, spills=8),
            make_record("d", 0.5, provenance=Provenance.PREDICTED),
            make_record("e", 9.0, op="conv"),
        ],
        run_id,
    )
    assert raw.execute("SELECT op, config, median_us FROM best ORDER BY op").fetchall() == [
        ("conv", "e", 9.0),
        ("gemm", "b", 3.0),
    ]


@pytest.mark.parametrize(
    ("query", "parameters", "index"),
    [
        (lookup._BEST_FIRST, 3, "best_first"),
        (lookup._GROUPS, 3, "measured_problems"),
        (
            shapes._query(Near(("M",)), "gemm", 86, shapes.split('{"M":16}'), 1.0)[0],
            10,
            "COVERING INDEX shapes_of_a_class",
        ),
        ("SELECT id, problem FROM shapes WHERE class IS NULL", 0, "unplaced"),
        (lookup._REFUTED, 2, "one_outcome"),
    ],
)
def test_lookups_use_their_index(raw: sqlite3.Connection, query: str, parameters: int, index: str) -> None:
    plan = [row[3] for row in raw.execute(f"EXPLAIN QUERY PLAN {query}", [1] * parameters)]
    assert any(index in line for line in plan), plan
    assert not any(line.startswith("SCAN records") or line == "SCAN shapes" for line in plan), plan

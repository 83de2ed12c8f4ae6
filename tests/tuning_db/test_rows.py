from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tuning_db import (
    DatabaseError,
    Environment,
    Key,
    Provenance,
    Record,
    Resources,
    Status,
    Times,
    TuningDB,
    canonical_json,
)
from tilewright.tuning_db.rows import (
    environment_to_row,
    insertion,
    record_to_row,
    row_to_environment,
    row_to_record,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
COUNT = st.integers(0, 2**40)
TIME = st.floats(1e-6, 1e12)
JSON = st.dictionaries(TEXT, st.integers() | st.booleans() | TEXT).map(canonical_json)
KEYS = st.builds(Key, TEXT, TEXT, JSON, st.just("a10-72sm"), st.integers(50, 200), TEXT, TEXT, TEXT)
RESOURCES = st.none() | st.builds(Resources, COUNT, COUNT, COUNT, COUNT)
TIMES = st.tuples(st.lists(TIME, min_size=3, max_size=3).map(sorted), st.integers(1, 2**40)).map(
    lambda drawn: Times(drawn[0][1], drawn[0][0], drawn[0][2], drawn[1])
)


@st.composite
def records(draw: st.DrawFn) -> Record:
    status = draw(st.sampled_from(Status))
    return Record(
        key=draw(KEYS),
        config=draw(JSON),
        status=status,
        provenance=draw(st.sampled_from([Provenance.MEASURED, Provenance.PREDICTED])),
        times=draw(TIMES) if status is Status.OK else None,
        resources=draw(RESOURCES),
        message=draw(TEXT),
        predicted_us=draw(st.none() | TIME),
        created_at=draw(st.datetimes().map(lambda moment: moment.isoformat())),
    )


@given(records())
@settings(deadline=None)  # a loaded machine is no defect
def test_a_record_comes_back_from_its_row(record: Record) -> None:
    assert row_to_record(record_to_row(record, 1, "unused")) == record


@pytest.fixture(scope="module")
def a10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(st.lists(records(), max_size=5))
@settings(max_examples=40, deadline=None)
def test_records_come_back_from_the_file(a10: Path, environment: Environment, given_records: list[Record]) -> None:
    with TuningDB.open("a10-72sm", a10) as db:
        db.add_many(given_records, db.start_run(environment))
    newest = {(record.key, record.config, record.provenance): record for record in given_records}
    with TuningDB.open("a10-72sm", a10, read_only=True) as db:
        for (key, config, provenance), record in newest.items():
            assert record in db.records(key)
            found = db.get(key, config)
            assert found is not None
            assert found == record or (provenance, found.provenance) == (Provenance.PREDICTED, Provenance.MEASURED)


def test_a_record_without_a_time_of_its_own_gets_the_stores(make_record) -> None:
    row = record_to_row(make_record(), 1, "2026-01-01T00:00:00+00:00")
    assert row["created_at"] == "2026-01-01T00:00:00+00:00"


@pytest.mark.parametrize("time_us", [float("inf"), float("nan")])
def test_a_time_that_is_not_finite_is_refused(make_record, time_us: float) -> None:
    with pytest.raises(ValueError, match=r"median_us=(inf|nan)"):
        record_to_row(make_record(time_us=time_us), 1, "")


def test_a_message_that_is_no_text_is_kept_readable(make_record, db: TuningDB, run_id: int, key: Key) -> None:
    db.add(make_record(time_us=None, status=Status.COMPILE_ERROR, message="ptxas: \udcff bad"), run_id)
    assert [record.message for record in db.records(key)] == ["ptxas: ? bad"]


def test_an_edited_row_is_no_record(make_record) -> None:
    row = record_to_row(make_record(), 1, "")
    with pytest.raises(ValueError, match=r"^status='fine' is none there is$"):
        row_to_record({**row, "status": "fine"})


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("op", b"gemm", "op=b'gemm' is no text"),
        ("message", None, "message=None is no text"),
        ("arch", "86", "arch='86' is no integer"),
        ("median_us", "fast", "median_us='fast' is no number"),
        ("samples", 2.5, "samples=2.5 is no integer"),
        ("median_us", None, "median_us=None is no number"),
        ("registers", "x", "registers='x' is no integer"),
        ("shared_bytes", None, "shared_bytes=None is no integer"),
        ("predicted_us", float("inf"), "predicted_us=inf is no finite number"),
        ("p10_us", 1e9, "times must be 0 < p10 <= median <= p90"),
    ],
)
def test_a_row_with_a_value_of_another_kind_is_no_record(make_record, column: str, value: object, reason: str) -> None:
    resources = Resources(32, 0, 0, 1024)
    row = record_to_row(replace(make_record(), resources=resources), 1, "2026-01-01T00:00:00+00:00")
    assert row_to_record(row).resources == resources
    with pytest.raises(ValueError, match=re.escape(reason)):
        row_to_record({**row, column: value})


@pytest.mark.parametrize(("column", "value"), [("extra", "[]"), ("extra", None), ("extra", "{"), ("host", 5)])
def test_a_row_of_runs_that_is_none(environment: Environment, column: str, value: object) -> None:
    row = environment_to_row(environment, "2026-01-01T00:00:00+00:00")
    assert row_to_environment(row) == environment
    with pytest.raises(ValueError, match=r"extra=|host=|Expecting"):
        row_to_environment({**row, column: value})


def test_environments_come_back(db: TuningDB, environment: Environment) -> None:
    first = db.start_run(environment)
    second = db.start_run(replace(environment, driver="", cuda="", extra={}))
    runs = db.runs()
    assert list(runs) == [first, second]
    assert runs[first][1] == environment
    assert runs[second][1] == replace(environment, driver="", cuda="", extra={})
    assert runs[first][0].endswith("+00:00")


def test_a_row_takes_the_place_of_its_like_or_fails(db: TuningDB, make_record, run_id: int) -> None:
    row = record_to_row(make_record(), run_id, "2026-01-01T00:00:00+00:00")
    for _ in range(2):
        db._file.write(lambda connection: connection.execute(insertion("records", row), row))
    assert len(list(db.find())) == 1
    statement = insertion("records", row, replace=False)
    with pytest.raises(DatabaseError, match="UNIQUE"):
        db._file.write(lambda connection: connection.execute(statement, row))

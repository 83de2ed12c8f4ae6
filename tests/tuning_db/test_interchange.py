"""Exports and imports: the round trip, determinism, and what a broken or hostile file does: nothing but one line."""

from __future__ import annotations

import io
import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tuning_db import (
    DatabaseCorruptError,
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
from tilewright.tuning_db.errors import DatabaseAccessError, ExportFileError
from tilewright.tuning_db.file import open_file
from tilewright.tuning_db.interchange import MOST_LINE_BYTES, export, in_key_order, read_export

DEVICE = "rtx3090-82sm"
MOMENT = "2026-01-31T12:00:00.000000+00:00"


def exported(db: TuningDB, **options) -> bytes:
    stream = io.BytesIO()
    export(db._file, db.device, stream, **options)
    return stream.getvalue()


def read(text: bytes, folder: Path, objection=lambda record: None) -> list[Record]:
    """The records of an export."""
    staging = folder / "staged.sqlite"
    for path in folder.glob("staged.sqlite*"):
        path.unlink()
    device, file = read_export(io.BytesIO(text), "in.jsonl", staging, objection)
    with closing(TuningDB(device, file)) as db:
        return list(db.find())


@pytest.fixture
def filled(db: TuningDB, environment: Environment, make_record) -> TuningDB:
    first, second = db.start_run(environment), db.start_run(replace(environment, host="other"))
    made = [make_record(canonical_json({"BLOCK_M": tile}), tile / 7, created_at=MOMENT) for tile in (16, 32, 64)]
    failed = make_record("{}", None, status=Status.TIMEOUT, message="“slow”\n\0\x7f", created_at=MOMENT)
    db.add_many([*made, replace(failed, resources=None)], first)
    db.add(
        make_record("{}", 3, provenance=Provenance.PREDICTED, op="conv2d", predicted_us=3.0, created_at=MOMENT), second
    )
    return db


@pytest.fixture
def lines(filled: TuningDB) -> list[dict]:
    """A good file: a header, two runs, five records."""
    return [json.loads(line) for line in exported(filled).splitlines()]


def joined(lines: list[dict]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_an_export_has_everything(filled: TuningDB, tmp_path: Path) -> None:
    text = exported(filled)
    assert set(read(text, tmp_path / "copy")) == set(filled.find())
    header, *rest = map(json.loads, text.splitlines())
    assert header == {"format": "tilewright-records", "version": 1, "device": DEVICE, "runs": 2, "records": 5}
    assert [line["host"] for line in rest[:2]] == ["lab", "other"]
    assert [line["run"] for line in rest[2:]].count(2) == 1


def test_the_same_records_give_the_same_bytes(filled: TuningDB, tmp_path: Path, environment: Environment) -> None:
    text = exported(filled)
    assert exported(filled) == text
    # Another history: other ids, other order, a run that has no record.
    with TuningDB.open(DEVICE, tmp_path / "other") as other:
        other.start_run(replace(environment, host="nobody"))
        started = {run: at for run, (at, _) in filled.runs().items()}
        environments = {run: environment for run, (_, environment) in filled.runs().items()}
        for run in (2, 1):
            new = other.start_run(environments[run])
            other._file.write(lambda db, new=new, run=run: db.execute(
                "UPDATE runs SET started_at = ? WHERE id = ?", (started[run], new)
            ))  # fmt: skip
            other.add_many(reversed(list(filled.find(run_id=run))), new)
        assert exported(other) == text


def test_ops_can_be_chosen(filled: TuningDB, tmp_path: Path) -> None:
    text = exported(filled, ops=["conv2d"])
    assert [record.key.op for record in read(text, tmp_path / "copy")] == ["conv2d"]
    assert json.loads(text.splitlines()[0])["runs"] == 1
    assert exported(filled, ops=["attention"]).count(b"\n") == 1


def test_pages_are_joined_without_gap(db: TuningDB, run_id: int, make_record, tmp_path: Path) -> None:
    db.add_many((make_record(canonical_json({"n": number}), created_at=MOMENT) for number in range(2500)), run_id)
    assert len({record.config for record in read(exported(db), tmp_path / "copy")}) == 2500
    rows = db._file.read(lambda connection: [row["config"] for row in in_key_order(connection)])
    assert len(rows) == len(set(rows)) == 2500


def test_an_export_sees_one_state(filled: TuningDB, make_record) -> None:
    """What another connection writes in the midst of it is left out, and does not wait."""

    class Stream(io.BytesIO):
        written = False

        def write(self, line) -> int:
            if not self.written:
                self.written = True
                with closing(sqlite3.connect(filled.path, timeout=1)) as other, other:
                    other.execute("DELETE FROM records")
            return super().write(line)

    stream = Stream()
    assert export(filled._file, DEVICE, stream) == 5
    assert stream.getvalue().count(b"\n") == 8
    assert list(filled.find()) == []


def test_an_error_of_the_stream_is_not_the_databases(filled: TuningDB) -> None:
    class Full(io.BytesIO):
        def write(self, line) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        export(filled._file, DEVICE, Full())
    assert exported(filled)


def test_what_is_no_record_is_not_exported(filled: TuningDB) -> None:
    filled._file.write(lambda db: db.execute("UPDATE records SET config = '{ }' WHERE op = 'conv2d'"))
    with pytest.raises(DatabaseCorruptError, match=r"record 5 is no record \('{ }' is no canonical JSON object\)"):
        exported(filled)
    with (
        pytest.raises(DatabaseAccessError, match=r"there is no .*a10-72sm.sqlite: tune"),
        closing(open_file(filled.path.with_name("a10-72sm.sqlite"), read_only=True)) as absent,
    ):
        export(absent, "a10-72sm", io.BytesIO())


HEADER, RUN, RECORD = 0, 1, 3
GOOD_HEADER = {"format": "tilewright-records", "version": 1, "device": "a10-72sm", "runs": 1, "records": 0}


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        (HEADER, {"format": "cubin"}, ":1: format='cubin': this is no file of `autotune export`"),
        (HEADER, {"version": 2}, ":1: version=2 is a newer Tilewright's: upgrade tilewright"),
        (HEADER, {"version": 10**900}, f":1: version=1{'0' * 59}… (901 characters) is a newer Tilewright's: upgrade"),
        (HEADER, {"version": 0}, ":1: version=0 must be an integer of at least 1"),
        (HEADER, {"version": "1"}, ":1: version='1' must be an integer"),
        (HEADER, {"device": ""}, ":1: device='' must be a board and its SM count, as rtx3090-82sm"),
        *(
            (HEADER, {"device": name}, f":1: device={name!r} must be a board and its SM count, as rtx3090-82sm")
            for name in ("foo", "../../x-1sm", "RTX3090-82sm", "a10-0sm", "a10-72", "-1sm", "a10--72sm", "a10-1sm\n", 7)
        ),
        (HEADER, {"records": 10**9}, ":1: records=1000000000 must be an integer from 0 to 10000000"),
        (HEADER, {"records": 4}, ":8: there are more lines than the header says"),
        (HEADER, {"records": 6}, ":9: the file ends where a record should be"),
        (HEADER, {"runs": 3}, ":4: "),
        (HEADER, {"note": 1}, ":1: 'note' is no field"),
        (RUN, {"run": 2}, ":3: run=2 is given twice"),
        (RUN, {"host": 5}, ":2: host=5 must be a text"),
        (RUN, {"extra": []}, ":2: extra=[] must be an object"),
        (RUN, {"started_at": "yesterday"}, ":2: started_at='yesterday' must be a time as 2026-"),
        (RECORD, {"run": 7}, ":4: run=7 is no run of this file"),
        (RECORD, {"run": "1"}, ":4: run='1' must be an integer"),
        (RECORD, {"status": "okay"}, ":4: status='okay' must be one of ok, invalid"),
        (RECORD, {"provenance": "transferred"}, ":4: provenance='transferred' must be one of measured, predicted"),
        (RECORD, {"status": "timeout"}, ":4: a record has times exactly when its status is ok"),
        (RECORD, {"times": None}, ":4: a record has times exactly when its status is ok"),
        (RECORD, {"times": {"median_us": 1}}, ":4: times.p10_us is missing"),
        (RECORD, {"times": [1, 1, 1, 1]}, ":4: times=[1, 1, 1, 1] must be an object, or null"),
        (RECORD, {"resources": {"registers": -1}}, ":4: resources.spill_bytes is missing"),
        (RECORD, {"predicted_us": -3.5}, ":4: predicted_us=-3.5 must be a number of µs from 0.001 to 1e+12, or null"),
        (RECORD, {"problem": {"M": [1]}}, ":4: problem={'M': [1]} must be an object of plain values"),
        (RECORD, {"config": "{}"}, ":4: config='{}' must be an object of plain values"),
        (RECORD, {"arch": 2**70}, ":4: arch=1180591620717411303424 must be an integer"),
        (RECORD, {"message": "\ud800"}, r":4: message='\ud800' must be a text"),
        (RECORD, {"created_at": "2026-01-31T12:00:00Z"}, ":4: created_at='2026-01-31T12:00:00Z' must be a time"),
        (RECORD, {"created_at": "2026-13-31T12:00:00+00:00"}, ":4: created_at='2026-13-31T12:00:00+00:00' must be a"),
        (
            RECORD,
            {"times": {"median_us": 1, "p10_us": 100, "p90_us": 1, "samples": 1}},
            ":4: times must be 0 < p10 <= median <= p90",
        ),
        (RECORD, {"op": ""}, ":4: op='' must be a text that is not empty"),
        (RECORD, {"device": "a10-72sm"}, ":4: 'device' is no field"),
    ],
)  # fmt: skip
def test_one_wrong_value_is_one_line(lines: list[dict], tmp_path: Path, line: int, changes: dict, said: str) -> None:
    lines[line] |= changes
    with pytest.raises(ExportFileError) as caught:
        read(joined(lines), tmp_path)
    message = str(caught.value)
    assert message.startswith("in.jsonl:")
    assert said in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("value", [0, -1, True, "1", None, 1e400, 5e-324, 1e308])
def test_a_time_that_is_none(lines: list[dict], tmp_path: Path, value: object) -> None:
    times = {"median_us": value, "p10_us": 1, "p90_us": 1, "samples": 1}
    if value in (5e-324, 1e308):
        times |= {"p10_us": value, "p90_us": value}
    lines[RECORD] |= {"times": times}
    with pytest.raises(ExportFileError, match=r"^in.jsonl:4: "):
        read(joined(lines), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", ":1: the file ends where the header should be"),
        (b"\n", ":1: '' is no JSON"),
        (b"\x00" * 100, ":1: "),
        (b"SQLite format 3\x00\n", ":1: "),
        (b"[" * 2_000_000, f":1: the line is over {MOST_LINE_BYTES} bytes"),
        (b"[" * 500_000 + b"\n", "is nested too deeply"),
        (b'{"format":"tilewright-records"', ":1: the line has no end: the file was cut short"),
        (b"null\n", ":1: None is no JSON object"),
        (b'{"a":1,"a":2}\n', ":1: 'a' is given twice"),
        (b'{"a":{"b":[1e999]}}\n', ":1: '1e999' is no finite number"),
        (
            b'{"format":"tilewright-records","version":1,"device":"a10-72sm","runs":1,"records":0}\n',
            ":2: the file ends where a run",
        ),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_no_export(tmp_path: Path, text: bytes, said: str) -> None:
    with pytest.raises(ExportFileError) as caught:
        read(text, tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_cut_anywhere_is_refused(lines: list[dict], tmp_path: Path) -> None:
    text = joined(lines)
    assert len(read(text, tmp_path)) == 5
    for length in {0, *range(1, len(text), 97), len(text) - 1}:
        with pytest.raises(ExportFileError):
            read(text[:length], tmp_path)


def test_the_same_record_twice_is_refused(lines: list[dict], tmp_path: Path) -> None:
    lines[HEADER]["records"] = 6
    with pytest.raises(ExportFileError, match=r"^in.jsonl:9: an earlier line has the same key, configuration"):
        read(joined([*lines, lines[-1]]), tmp_path)


def test_an_objection_names_the_line(lines: list[dict], tmp_path: Path) -> None:
    config = canonical_json(lines[4]["config"])
    with pytest.raises(ExportFileError, match=r"^in.jsonl:5: no such tile$"):
        read(joined(lines), tmp_path, lambda record: "no such tile" if record.config == config else None)


def test_a_long_stream_takes_little_memory(tmp_path: Path, lines: list[dict]) -> None:
    """Lines of nearly the longest length, more of them together than is ever held."""
    import tracemalloc

    count = 40
    record = lines[RECORD] | {"message": "m" * (MOST_LINE_BYTES - 4096)}

    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self.number = -1

        def readline(self, size=-1) -> bytes:
            self.number += 1
            if self.number == 0:
                return joined([lines[HEADER] | {"runs": 1, "records": count}])
            if self.number == 1:
                return joined([lines[RUN]])
            return joined([record | {"config": {"n": self.number}}]) if self.number < count + 2 else b""

        def read(self, size=-1) -> bytes:
            return b""

    tracemalloc.start()
    try:
        _, file = read_export(Stream(), "in.jsonl", tmp_path / "staged.sqlite")  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    file.close()
    assert peak < count * MOST_LINE_BYTES * 0.7


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORD = TEXT.filter(bool)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | TEXT | FLOATS
PLAIN = st.dictionaries(TEXT, SCALARS, max_size=4)
POSITIVE = st.floats(min_value=1e-3, max_value=1e12)
COUNT = st.integers(0, 2**40)
RECORDS = st.builds(
    lambda key, config, provenance, times, status, resources, message, predicted: Record(
        key, config, Status.OK if times else status, provenance, times, resources, message, predicted, MOMENT
    ),
    st.builds(Key, WORD, WORD, PLAIN.map(canonical_json), st.just(DEVICE), st.integers(1, 9999), WORD, WORD, WORD),
    PLAIN.map(canonical_json),
    st.sampled_from([Provenance.MEASURED, Provenance.PREDICTED]),
    st.none()
    | st.tuples(st.lists(POSITIVE, min_size=3, max_size=3).map(sorted), st.integers(1, 2**40)).map(
        lambda drawn: Times(drawn[0][1], drawn[0][0], drawn[0][2], drawn[1])
    ),
    st.sampled_from([status for status in Status if status is not Status.OK]),
    st.none() | st.builds(Resources, COUNT, COUNT, COUNT, COUNT),
    TEXT,
    st.none() | POSITIVE,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(RECORDS, max_size=4, unique_by=lambda record: (record.key, record.config, record.provenance)))
def test_any_record_comes_back_as_it_was(tmp_path_factory, records: list[Record]) -> None:
    folder = tmp_path_factory.mktemp("any")
    with TuningDB.open(DEVICE, folder) as db:
        db.add_many(records, db.start_run(Environment("", "", "", "", "", "")))
        text = exported(db)
    assert set(read(text, folder / "copy")) == set(records)

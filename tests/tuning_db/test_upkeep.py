from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tilewright.tuning_db import DatabaseSchemaError, Environment, Provenance, Status, TuningDB
from tilewright.tuning_db.errors import DatabaseAccessError, DatabaseCorruptError, DatabaseError
from tilewright.tuning_db.file import damage_mark
from tilewright.tuning_db.record import Record
from tilewright.tuning_db.upkeep import MOST_FINDINGS, Revision, check, overview, prune

OLD, NEW = (
    Revision("gemm", "rev-a", "3.9.0", "13.0.88", "graph-1"),
    Revision("gemm", "rev-b", "3.9.0", "13.0.88", "graph-1"),
)
ANCIENT, RECENT = "2025-01-01T00:00:00.000000+00:00", "2026-01-01T00:00:00.000000+00:00"


@pytest.fixture
def filled(db: TuningDB, environment: Environment, make_record) -> TuningDB:
    """Of each revision a measured, a predicted and a failed record; of the old one an older measured one too."""
    run = db.start_run(environment)
    for revision in ("rev-a", "rev-b"):
        measured = make_record('{"n":1}', kernel_hash=revision, created_at=RECENT)
        failed = replace(make_record('{"n":2}', None, status=Status.TIMEOUT, kernel_hash=revision), resources=None)
        predicted = make_record('{"n":1}', provenance=Provenance.PREDICTED, kernel_hash=revision)
        db.add_many([measured, failed, predicted], run)
    db.add(
        make_record('{"n":3}', kernel_hash="rev-a", created_at=ANCIENT, problem='{"M":1}'), db.start_run(environment)
    )
    return db


def spoil(db: TuningDB, statement: str) -> None:
    with closing(sqlite3.connect(db.path)) as other, other:
        other.execute("PRAGMA foreign_keys = OFF")
        other.execute(statement)


def test_an_overview(filled: TuningDB, tmp_path: Path) -> None:
    view = overview(filled.path)
    assert (view.path, view.devices) == (filled.path, ("rtx3090-82sm",))
    assert (view.runs, view.problems, view.records) == (2, 2, 7)
    assert view.counts == {
        (Status.OK, Provenance.MEASURED): 3,
        (Status.OK, Provenance.PREDICTED): 2,
        (Status.TIMEOUT, Provenance.MEASURED): 2,
    }
    assert view.revisions == {OLD: 4, NEW: 3}
    assert view.oldest == ANCIENT
    assert view.newest is not None
    assert view.newest > RECENT
    assert view.bytes == filled.path.stat().st_size > 0
    with TuningDB.open("a10-72sm", tmp_path) as empty:
        view = overview(empty.path)
        assert (view.devices, view.records, view.oldest, view.revisions) == ((), 0, None, {})
    with pytest.raises(DatabaseAccessError, match="there is no"):
        overview(tmp_path / "absent.sqlite")


def test_what_only_the_kernels_know_is_a_finding_too(filled: TuningDB) -> None:
    def objection(record: Record) -> str | None:
        return (
            "no such configuration" if record.key.kernel_hash == "rev-a" and record.status is Status.TIMEOUT else None
        )

    assert check(filled.path, objection) == ["record 2: no such configuration"]
    spoil(filled, "UPDATE records SET status = 'okay' WHERE id = 2")
    assert check(filled.path, objection) == ["record 2: it is no record (status='okay' is none there is)"]


def test_a_whole_file_has_no_findings(filled: TuningDB, tmp_path: Path) -> None:
    assert check(filled.path) == []
    with TuningDB.open("a10-72sm", tmp_path) as empty:
        assert check(empty.path) == []


DEEP = '{"a":' * 100000 + "1" + "}" * 100000


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        (
            "UPDATE records SET status = 'okay' WHERE id = 3",
            "record 3: it is no record (status='okay' is none there is)",
        ),
        (
            "UPDATE records SET status = replace(hex(zeroblob(50000)), '0', 'x') WHERE id = 3",
            f"record 3: it is no record (status='{'x' * 59}… (100002 characters) is none there is)",
        ),
        (f"UPDATE records SET config = '{DEEP}' WHERE id = 3", "record 3: it is no record (it is nested too deeply)"),
        ("UPDATE records SET median_us = NULL WHERE id = 3", "record 3: it is no record (median_us=None is no"),
        ("UPDATE records SET op = 'conv2d' WHERE id = 3", "record 3: it doesn't match its key"),
        ("UPDATE records SET config = '{ }' WHERE id = 3", "record 3: its config is no canonical JSON: '{ }'"),
        ("UPDATE records SET config = 'x' WHERE id = 3", "record 3: it is no record (Expecting value"),
        ("UPDATE records SET config = x'00' WHERE id = 3", "record 3: it is no record"),
        ("UPDATE records SET op = x'00' WHERE id = 3", "record 3: it is no record (op=b'\\x00' is no text"),
        ("UPDATE records SET registers = 'x' WHERE id = 3", "record 3: it is no record (registers='x' is no integer"),
        ("UPDATE records SET shared_bytes = NULL WHERE id = 3", "record 3: it is no record (shared_bytes=None is no"),
        ("UPDATE records SET p90_us = 1e-9 WHERE id = 3", "record 3: it is no record (times must be 0 < p10 <= median"),
        ("UPDATE records SET message = CAST(x'ff41' AS TEXT) WHERE id = 3", "record 3: its message is no text: "),
        (
            "UPDATE records SET op = CAST(x'ff41' AS TEXT) WHERE id = 3",
            "record 3: it is no record ('utf-8' codec can't",
        ),
        ("UPDATE records SET device = 'a10-72sm' WHERE id = 3", "record 3: it doesn't match its key"),
        ("UPDATE records SET run_id = 99 WHERE id = 3", "record 3 is of a run that there is not"),
    ],
)
def test_a_row_that_someone_edited_is_found(filled: TuningDB, statement: str, finding: str) -> None:
    spoil(filled, statement)
    before = filled.path.read_bytes()
    (found,) = check(filled.path)
    assert found.startswith(finding)
    assert filled.path.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE runs SET extra = '[]'", "run 1: it is no run (extra='[]' is no JSON object"),
        ("UPDATE runs SET host = CAST(x'ff41' AS TEXT)", "run 1: its host is no text: "),
    ],
)
def test_a_run_that_someone_edited_is_found(filled: TuningDB, statement: str, finding: str) -> None:
    spoil(filled, statement)
    assert check(filled.path)[0].startswith(finding)
    with pytest.raises(DatabaseCorruptError, match="`autotune db check`"):
        filled.runs()


def test_texts_that_are_none_are_found_wherever_they_are(db: TuningDB, run_id: int, make_record) -> None:
    db.add_many((make_record(f'{{"n":{number}}}') for number in range(1003)), run_id)
    spoil(db, "UPDATE records SET config = CAST(x'ff41' AS TEXT) WHERE id = 1000")
    (found,) = check(db.path)
    assert found.startswith("record 1000: it is no record")


def test_a_file_under_the_name_of_another_device_is_found(filled: TuningDB) -> None:
    filled.close()
    renamed = filled.path.rename(filled.path.with_name("a10-72sm.sqlite"))
    found = "its records are of 'rtx3090-82sm', whose file is rtx3090-82sm.sqlite: "
    assert check(renamed) == [f"{found}rename it"]
    filled.path.write_bytes(renamed.read_bytes())  # a name that is taken already
    merge = f"autotune merge {renamed} --db {renamed.parent}"
    assert check(renamed) == [f"{found}merge it into that with {merge}, and remove it"]


def test_those_who_list_prune_or_add_refuse_records_of_others(filled: TuningDB, make_record) -> None:
    filled.refuse_other_devices()
    folder = filled.path.parent
    filled.close()
    filled.path.rename(folder / "a10-72sm.sqlite")
    with TuningDB.open("a10-72sm", folder) as db:
        with pytest.raises(DatabaseError) as refused:
            db.refuse_other_devices()
        wanted = "its records are of 'rtx3090-82sm', whose file is rtx3090-82sm.sqlite: rename it"
        assert str(refused.value) == f"{db.path}: {wanted}"
        own = make_record()
        db.add(replace(own, key=replace(own.key, device="a10-72sm")), db.start_run(next(iter(db.runs().values()))[1]))
        with pytest.raises(DatabaseError, match=r"has records of 'a10-72sm' and 'rtx3090-82sm', and a file is of one"):
            db.refuse_other_devices()


def test_a_stranger_among_the_records_is_found(filled: TuningDB, make_record) -> None:
    filled.device = "a10-72sm"
    filled.add(make_record(device="a10-72sm"), 1)
    assert check(filled.path) == ["record 8: it is of 'a10-72sm', and others of 'rtx3090-82sm'"]


def test_not_every_bad_row_is_listed(db: TuningDB, run_id: int, make_record) -> None:
    db.add_many((make_record(f'{{"n":{number}}}') for number in range(MOST_FINDINGS + 5)), run_id)
    spoil(db, "UPDATE records SET status = 'okay'")
    findings = check(db.path)
    assert len(findings) == MOST_FINDINGS + 1
    assert findings[-1] == "there may be more"


def test_damaged_pages_are_found(filled: TuningDB, make_record) -> None:
    filled.add_many((make_record(f'{{"k":{number}}}') for number in range(500)), 1)
    filled.close()
    size = filled.path.stat().st_size
    with filled.path.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\xff" * 8192)
    findings = check(filled.path)
    assert findings
    assert all("\n" not in line for line in findings)
    filled.path.write_bytes(b"nothing of the kind" * 99)
    damage_mark(filled.path).touch()
    marked, damage = check(filled.path)
    assert "met damage here before" in marked
    assert "is damaged or no database" in damage


def test_a_newer_file_is_not_judged(filled: TuningDB) -> None:
    spoil(filled, "INSERT INTO _sqlite_migrations VALUES (99, 'tilewright', 's0999_future', 'some day')")
    with pytest.raises(DatabaseSchemaError, match="upgrade tilewright"):
        check(filled.path)


def left(db: TuningDB) -> list[tuple[str, str, str]]:
    return sorted((record.key.kernel_hash, record.config, str(record.provenance)) for record in db.find())


NEW_ONES = [("rev-b", '{"n":1}', "measured"), ("rev-b", '{"n":1}', "predicted"), ("rev-b", '{"n":2}', "measured")]


def test_what_nothing_asks_for_goes(filled: TuningDB, make_record) -> None:
    pruned = prune(filled._file, lambda revision: revision == NEW)
    assert (pruned.records, pruned.runs) == (2, 0)
    assert left(filled) == [("rev-a", '{"n":1}', "measured"), ("rev-a", '{"n":3}', "measured"), *NEW_ONES]
    # What is left of the old revision still answers.
    answer = filled.best(make_record(problem='{"M":1}').key)
    assert answer is not None
    assert answer.reason == "other revision"
    assert prune(filled._file, lambda revision: revision == NEW).records == 0


def test_what_is_older_goes_too(filled: TuningDB) -> None:
    assert prune(filled._file, lambda revision: revision == NEW, before=RECENT).records == 3
    assert left(filled) == [("rev-a", '{"n":1}', "measured"), *NEW_ONES]
    assert prune(filled._file, lambda revision: True, before="9").records == 0


def test_runs_go_with_their_last_record_but_not_one_of_today(filled: TuningDB) -> None:
    filled.start_run(replace(next(iter(filled.runs().values()))[1], host="just started"))
    spoil(filled, f"UPDATE runs SET started_at = '{ANCIENT}' WHERE id < 3")
    pruned = prune(filled._file, lambda revision: False, before=datetime.now(UTC).isoformat())
    assert (pruned.records, pruned.runs) == (7, 2)
    assert [environment.host for _, environment in filled.runs().values()] == ["just started"]


@pytest.mark.parametrize("kept", [(), (OLD,), (NEW,), (OLD, NEW)])
def test_a_dry_run_counts_what_a_real_one_removes_and_only_reads(filled: TuningDB, kept: tuple[Revision, ...]) -> None:
    filled.start_run(next(iter(filled.runs().values()))[1])
    spoil(filled, f"UPDATE runs SET started_at = '{ANCIENT}'")
    before = left(filled), filled.runs()
    for earlier in (None, RECENT, "9"):
        with TuningDB.open(filled.device, filled.path.parent, read_only=True) as reader:
            said = prune(reader._file, lambda revision: revision in kept, before=earlier, dry_run=True)
        assert (left(filled), filled.runs()) == before
    done = prune(filled._file, lambda revision: revision in kept, before="9")
    assert (said.records, said.runs) == (done.records, done.runs)
    assert done.runs >= 1


def test_the_space_is_given_back(filled: TuningDB, make_record) -> None:
    records = (
        make_record(f'{{"k":{number}}}', kernel_hash="rev-a", provenance=Provenance.PREDICTED) for number in range(3000)
    )
    filled.add_many(records, 1)
    filled._file.compact()
    size = filled.path.stat().st_size
    pruned = prune(filled._file, lambda revision: revision == NEW)
    assert pruned.records == 3002
    assert pruned.bytes == size - filled.path.stat().st_size > size // 2
    assert check(filled.path) == []

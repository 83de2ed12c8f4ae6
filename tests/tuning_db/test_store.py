from __future__ import annotations

import sqlite3
import tempfile
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tilewright.tuning_db import Environment, Key, Provenance, Record, Status, TuningDB, UsageError
from tilewright.tuning_db.env import SHIPPED
from tilewright.tuning_db.errors import ExportFileError

PREDICTED = Provenance.PREDICTED


def configs(records: list[Record]) -> list[str]:
    return [record.config for record in records]


def test_a_record_is_there_for_others_when_add_returns(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    db.add(make_record("a", 2.0), run_id)
    with TuningDB.open(key.device, db.path.parent, read_only=True) as other:
        (record,) = other.records(key)
    assert record.config == "a"
    assert record.created_at.endswith("+00:00")


def test_every_outcome_is_kept(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    for status in Status:
        time_us = 1.0 if status is Status.OK else None
        db.add(make_record(str(status), time_us, status=status, message=f"why {status}"), run_id)
    assert [record.status for record in db.records(key)] == list(Status)
    assert db.stats() == {(status, Provenance.MEASURED): 1 for status in Status}


def test_the_newest_replaces_the_same_configuration_and_provenance(db, run_id, make_record, key: Key) -> None:
    db.add(make_record("a", 1.0), run_id)
    db.add(make_record("a", 0.5, provenance=PREDICTED), run_id)
    db.add(make_record("b", 1.0), run_id)
    db.add(make_record("a", None, status=Status.INCORRECT), run_id)
    assert db.stats() == {
        (Status.OK, PREDICTED): 1,
        (Status.OK, Provenance.MEASURED): 1,
        (Status.INCORRECT, Provenance.MEASURED): 1,
    }
    assert db.get(key, "a").status is Status.INCORRECT
    assert configs(db.records(key)) == ["a", "b", "a"]


def test_get_prefers_what_was_measured(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    assert db.get(key, "a") is None
    db.add(make_record("a", 0.5, provenance=PREDICTED), run_id)
    assert db.get(key, "a").provenance is PREDICTED
    db.add(make_record("a", 9.0), run_id)
    assert db.get(key, "a").provenance is Provenance.MEASURED
    assert db.get(key, "b") is None


def test_many_are_added_all_or_none(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    with pytest.raises(ValueError, match="finite"):
        db.add_many([make_record("a"), make_record("b", float("nan"))], run_id)
    assert db.records(key) == []
    db.add_many((make_record(str(i)) for i in range(250)), run_id)
    assert configs(db.records(key)) == [str(i) for i in range(250)]
    db.add_many([], run_id)


def test_another_devices_record_is_refused(db: TuningDB, run_id: int, make_record) -> None:
    with pytest.raises(UsageError, match=r"a10-72sm doesn't belong in .*rtx3090-82sm"):
        db.add(make_record(device="a10-72sm"), run_id)


def test_an_unknown_run_is_refused(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    with pytest.raises(UsageError, match="no run 77"):
        db.add(make_record(), 77)
    assert db.records(key) == []


def test_find_goes_through_pages(db: TuningDB, run_id: int, make_record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.tuning_db.store._PAGE", 3)
    db.add_many([make_record(str(i)) for i in range(7)], run_id)
    found = db.find()
    assert next(found).config == "0"
    db.add(make_record("new"), run_id)
    assert configs(list(found)) == [*"123456", "new"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "abcd"),
        ({"op": "conv"}, "b"),
        ({"problem": "{}"}, "c"),
        ({"status": Status.TIMEOUT}, "d"),
        ({"provenance": PREDICTED}, "a"),
        ({"op": "gemm", "provenance": Provenance.MEASURED}, "cd"),
        ({"run_id": 1}, "abcd"),
        ({"run_id": 2}, ""),
    ],
)
def test_find_takes_what_is_given(db: TuningDB, run_id: int, make_record, given: dict, expected: str) -> None:
    db.add(make_record("a", provenance=PREDICTED), run_id)
    db.add(make_record("b", op="conv"), run_id)
    db.add(make_record("c", problem="{}"), run_id)
    db.add(make_record("d", None, status=Status.TIMEOUT), run_id)
    assert "".join(configs(list(db.find(**given)))) == expected


def test_top_is_measured_then_predicted(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    guess = {"provenance": PREDICTED}
    db.add_many(
        [
            make_record("slow", 9.0),
            make_record("fast", 3.0),
            make_record("spills", 1.0, spills=4),
            make_record("wrong", None, status=Status.INCORRECT),
            make_record("elsewhere", 1.0, triton="3.8.0"),
            make_record("guess", 2.0, **guess),
            make_record("better guess", 1.0, **guess),
            make_record("fast", 0.5, **guess),
            make_record("wrong", 0.1, **guess),
            make_record("spills", 0.2, **guess),
            make_record("of another model", 0.3, protocol="model-1", **guess),
        ],
        run_id,
    )
    order = ["fast", "slow", "better guess", "guess"]
    for k in range(6):
        assert configs(db.top(key, k)) == order[:k]


def test_read_only_is_that(tmp_path: Path, environment: Environment, make_record, key: Key) -> None:
    with TuningDB.open(key.device, tmp_path / "none", read_only=True) as db:
        assert db.best(key) is None
        assert db.top(key, 3) == db.records(key) == list(db.find()) == []
        assert db.stats() == db.runs() == {}
        with pytest.raises(UsageError, match="read-only"):
            db.start_run(environment)
    assert not (tmp_path / "none").exists()
    with TuningDB.open(key.device, tmp_path) as db:
        run_id = db.start_run(environment)
    with TuningDB.open(key.device, tmp_path, read_only=True) as db, pytest.raises(UsageError, match="read-only"):
        db.add(make_record(), run_id)


def test_threads_share_one_object(db: TuningDB, run_id: int, make_record, key: Key) -> None:
    errors = []

    def work(name: str) -> None:
        try:
            for i in range(20):
                db.add(make_record(f"{name}{i}"), run_id)
                assert db.best(key) is not None
        except Exception as error:  # noqa: BLE001 - shown below, in the thread that can fail the test
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(db.records(key)) == 80


def test_a_run_that_is_pruned_while_it_goes_on_is_begun_again(
    db: TuningDB, make_record, key: Key, environment: Environment
) -> None:
    run_id = db.start_run(environment)
    with closing(sqlite3.connect(db.path)) as pruning, pruning:
        pruning.execute("DELETE FROM runs")
    with TuningDB.open(key.device, db.path.parent) as other:
        assert other.start_run(replace(environment, host="other")) == run_id  # SQLite's numbers come again
    db.add(make_record('{"x":1}'), run_id)
    db.add(make_record('{"x":2}'), run_id)
    assert len(db.runs()) == 2
    (host,) = {entry["run"]["host"] for entry in db.entries(key).values()}
    assert host == environment.host
    with pytest.raises(UsageError, match="has no run 99: start_run gives the id"):
        db.add(make_record('{"x":3}'), 99)


def test_outcomes_go_one_at_a_time_from_file_to_file(
    db: TuningDB, run_id: int, make_record, key: Key, environment: Environment, tmp_path: Path
) -> None:
    second = db.start_run(replace(environment, host="other"))
    db.add_many([make_record('{"x":1}'), make_record('{"x":2}', None, status=Status.TIMEOUT, message="slow")], run_id)
    db.add(make_record('{"x":3}', 3.0), second)
    db.add(make_record('{"x":4}', 3.0, op="conv2d"), second)
    entries = db.entries(key)
    assert list(entries) == ['{"x":1}', '{"x":2}', '{"x":3}']
    assert db.entry(key, '{"x":3}') == entries['{"x":3}']
    with TuningDB.open(key.device, tmp_path / "other") as other:
        assert other.bring([entries['{"x":3}']], "here").added == 1
        assert other.bring(entries.values(), "here").added == 2
        assert other.bring(entries.values(), "here").known == 3
        assert other.entries(key) == entries
        assert [run for _, run in sorted(other.runs().values(), key=lambda each: each[1].host)] == [
            environment,
            replace(environment, host="other"),
        ]


def test_of_a_measured_and_a_predicted_outcome_the_measured_one_goes(
    db: TuningDB, run_id: int, make_record, key
) -> None:
    db.add(make_record("{}", 1.0, provenance=PREDICTED), run_id)
    db.add(make_record("{}", 2.0), run_id)
    db.add(make_record("{}", 3.0, provenance=PREDICTED), run_id)
    assert db.entry(key, "{}")["record"]["provenance"] == "measured"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: {"run": entry["run"]}, "is no record with its run ('record')"),
        (lambda entry: {**entry, "run": {**entry["run"], "extra": float("nan")}}, "is no record with its run"),
        (lambda entry: {**entry, "record": {**entry["record"], "status": "fine"}}, "status='fine'"),
        (lambda entry: {**entry, "record": [1]}, "is no record with its run"),
        (lambda entry: "text", "is no record with its run"),
    ],
)
def test_what_is_no_outcome_is_not_brought(
    db, run_id, make_record, key: Key, tmp_path: Path, change, said: str
) -> None:
    db.add_many([make_record('{"x":1}'), make_record('{"x":2}')], run_id)
    good, other = db.entries(key).values()
    with TuningDB.open(key.device, tmp_path / "other") as target:
        with pytest.raises(ExportFileError) as caught:
            target.bring([good, change(other)], "there")
        assert str(caught.value).startswith("there:")
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert target.entries(key) == {}


def test_outcomes_are_brought_without_a_temporary_file(
    db: TuningDB, run_id: int, make_record, key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is no obstacle, and a process that is killed meanwhile leaves nothing behind."""
    db.add(make_record('{"x":1}'), run_id)
    with TuningDB.open(key.device, tmp_path / "other") as target:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        seen: list[Path] = []
        entries = db.entries(key).values()
        assert target.bring(entries, "there", lambda record: seen.extend(Path.cwd().iterdir())).added == 1
        assert seen == []
        assert target.entries(key) == db.entries(key)


def test_an_objection_keeps_an_outcome_out(db: TuningDB, run_id: int, make_record, key: Key, tmp_path: Path) -> None:
    db.add(make_record('{"x":1}'), run_id)
    with (
        TuningDB.open(key.device, tmp_path / "other") as target,
        pytest.raises(ExportFileError, match="not x=1"),
    ):
        target.bring(db.entries(key).values(), "there", lambda record: "not x=1" if '"x":1' in record.config else None)


def test_shipped_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment, make_record, key) -> None:
    assert TuningDB.open_shipped(key.device) is None  # off
    monkeypatch.setenv(SHIPPED, str(tmp_path))
    assert TuningDB.open_shipped(key.device) is None
    with TuningDB.open(key.device, tmp_path) as db:
        db.add(make_record("a"), db.start_run(environment))
    shipped = TuningDB.open_shipped(key.device)
    assert shipped is not None
    with shipped:
        assert configs(shipped.best_of_each()) == ["a"]
        with pytest.raises(UsageError, match="was opened read-only"):
            shipped.note({"a": "b"})


def test_without_ones_own_file_the_others_answer(tmp_path: Path, monkeypatch, environment, make_record, key) -> None:
    monkeypatch.setenv(SHIPPED, str(tmp_path / "shipped"))
    for folder, changes in ((tmp_path, {"device": "a10-72sm"}), (tmp_path / "shipped", {}), (tmp_path, {})):
        record = make_record(folder.name, **changes)
        with TuningDB.open(record.key.device, folder) as db:
            db.add(record, db.start_run(environment))
    (tmp_path / f"{key.device}.sqlite").write_bytes(b"no database" * 99)
    with TuningDB.without_own(key.device, tmp_path) as db:
        offered: list[Record] = []
        assert db.best(key, accept=lambda record: bool(offered.append(record))) is None
        assert configs(offered) == ["shipped", tmp_path.name]
        assert db.skipped == {}

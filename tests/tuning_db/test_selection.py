from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.tuning_db import Provenance, Status, Times, TuningDB
from tilewright.tuning_db.selection import BestFew


@pytest.fixture
def chosen(db: TuningDB, run_id: int, make_record):
    """Which of some records are chosen, by configuration."""

    def choose(few: BestFew, *changes: dict) -> list[str]:
        db.add_many([make_record(**change) for change in changes], run_id)

        def action(connection) -> list[str]:
            ids = few.ids(connection)
            assert len(set(ids)) == len(ids)
            return [connection.execute("SELECT config FROM records WHERE id = ?", (i,)).fetchone()[0] for i in ids]

        return db._file.read(action)

    return choose


def nothing(op: str, problem: str) -> None:
    return None


def test_the_fastest_of_each_problem(chosen) -> None:
    times = {"slow": 9.0, "fast": 1.0, "middling": 2.0}
    changes = [{"config": name, "time_us": time_us} for name, time_us in times.items()]
    others = [{"config": f"other {name}", "time_us": 10 * us, "problem": '{"M":8}'} for name, us in times.items()]
    assert sorted(chosen(BestFew(2, nothing), *changes, *others)) == [
        *("fast", "middling", "other fast", "other middling")
    ]
    assert len(chosen(BestFew(99, nothing))) == 6


def test_the_default_is_chosen_however_slow_and_never_twice(chosen) -> None:
    asked = []

    def default(op: str, problem: str) -> str | None:
        asked.append((op, problem))
        return "default" if problem == '{"M":8}' else None

    changes = [{"config": name, "time_us": us} for name, us in {"a": 1.0, "b": 2.0, "c": 3.0, "default": 4.0}.items()]
    of_another = [{**change, "problem": '{"M":8}'} for change in changes]
    assert sorted(chosen(BestFew(2, default), *changes, *of_another)) == ["a", "a", "b", "b", "default"]
    assert len(asked) == 2
    assert sorted(chosen(BestFew(4, default))) == sorted(["a", "b", "c", "default"] * 2)


def test_failures_spills_and_predictions_are_left_out(chosen) -> None:
    failures = [
        {"config": str(status), "time_us": None, "times": None, "status": status}
        for status in Status
        if status is not Status.OK
    ]
    predicted = {"config": "predicted", "time_us": 0.1, "provenance": Provenance.PREDICTED}
    spills = {"config": "spills", "time_us": 0.1, "spills": 8}
    assert chosen(BestFew(9, nothing), *failures, predicted, spills, {"config": "good"}) == ["good"]


FIRST, LAST = "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"


def test_of_revisions_and_protocols_the_one_measured_last_and_what_is_among_the_fastest_of_all(chosen) -> None:
    new = [{"config": f"new {us}", "time_us": us, "created_at": LAST} for us in (10.0, 20.0, 30.0)]
    old = [
        {"config": f"old {us}", "time_us": us, "kernel_hash": "rev-a", "created_at": FIRST} for us in (5.0, 15.0, 40.0)
    ]
    other = {"config": "as old", "time_us": 12.0, "protocol": "graph-0", "created_at": FIRST}
    assert chosen(BestFew(2, nothing), *new, *old, other) == ["new 10.0", "new 20.0", "old 5.0"]
    assert sorted(chosen(BestFew(4, nothing))) == [
        *("as old", "new 10.0", "new 20.0", "new 30.0", "old 15.0", "old 5.0")
    ]


def test_a_configuration_is_taken_of_the_revision_that_has_it_last(chosen) -> None:
    old = {"kernel_hash": "rev-a", "created_at": FIRST}
    few = BestFew(9, nothing, lambda op, config: config.removesuffix(" of old"))
    found = chosen(few, {"config": "a", "time_us": 3.0}, {**old, "config": "a of old"}, {**old, "config": "b"})
    assert found == ["a", "b"]


def test_the_default_is_taken_of_each_revision_that_gives_any(chosen) -> None:
    """By it their times compare."""
    old = {"kernel_hash": "rev-a", "created_at": FIRST}
    new = [{"config": "default", "time_us": 9.0}, {"config": "new", "time_us": 5.0}]
    of_old = [{**old, "config": "default", "time_us": 9.0}, {**old, "config": "old", "time_us": 4.0}]
    unused = {"config": "default", "time_us": 9.0, "protocol": "graph-0", "created_at": FIRST}
    found = chosen(BestFew(1, lambda op, problem: "default"), *new, *of_old, unused)
    assert sorted(found) == ["default", "default", "new", "old"]


def test_each_toolchain_has_its_own(chosen) -> None:
    found = chosen(
        BestFew(1, nothing), {"config": "a"}, {"config": "b", "triton": "3.8.0"}, {"config": "c", "ptxas": "1"}
    )
    assert sorted(found) == ["a", "b", "c"]


def test_equal_times_are_chosen_by_configuration_not_by_arrival(tmp_path: Path, environment, make_record, key) -> None:
    for order in ("ab", "ba"):
        with TuningDB.open(key.device, tmp_path / order) as db:
            records = [make_record(config, times=Times.single(1.0)) for config in order]
            db.add_many(records, db.start_run(environment))
            (row_id,) = db._file.read(BestFew(1, nothing).ids)
            assert db._file.rows("SELECT config FROM records WHERE id = ?", (row_id,))[0]["config"] == "a"

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tilewright.tuning_db import Key, Near, Provenance, Record, Status, Times, TuningDB, canonical_json
from tilewright.tuning_db.env import SHIPPED

MEASURED, TRANSFERRED, PREDICTED = Provenance.MEASURED, Provenance.TRANSFERRED, Provenance.PREDICTED


def shape(m: int, **more: object) -> str:
    return canonical_json({"M": m, "N": 4096, "dtype": "fp16", **more})


NEAR_IN_M = Near(("M",))


# Every kind of evidence, best first: what differs from the question, and the answer's provenance and reason. Each is
# slower than the one below it, so that no time can explain the order.
LADDER = [
    ({}, MEASURED, "exact"),
    ({"protocol": "graph-0"}, TRANSFERRED, "other protocol"),
    ({"triton": "3.8.0"}, TRANSFERRED, "other toolchain"),
    ({"ptxas": "12.8", "protocol": "graph-0"}, TRANSFERRED, "other toolchain, other protocol"),
    ({"kernel_hash": "rev-a"}, TRANSFERRED, "other revision"),
    ({"kernel_hash": "rev-a", "triton": "3.8.0"}, TRANSFERRED, "other revision, other toolchain"),
    ({"problem": shape(12)}, TRANSFERRED, "near shape M=16→12"),
    ({"problem": shape(12), "kernel_hash": "rev-a"}, TRANSFERRED, "near shape M=16→12, other revision"),
    ({"problem": shape(24)}, TRANSFERRED, "near shape M=16→24"),
    ({"device": "a10-72sm"}, TRANSFERRED, "board a10-72sm"),
    ({"device": "a10-72sm", "triton": "3.8.0"}, TRANSFERRED, "board a10-72sm, other toolchain"),
    ({"device": "a40-84sm", "kernel_hash": "rev-a"}, TRANSFERRED, "board a40-84sm, other revision"),
    ({"device": "a10-72sm", "problem": shape(17)}, TRANSFERRED, "near shape M=16→17, board a10-72sm"),
    ({"provenance": PREDICTED, "protocol": "model-1"}, PREDICTED, "exact"),
]

# Never an answer, whatever else there is.
NEVER = [
    {"op": "conv"},
    {"problem": shape(16, layout="t")},
    {"device": "h200-132sm", "arch": 90},
    {"provenance": PREDICTED, "protocol": "model-0"},
    {"provenance": PREDICTED, "protocol": "model-1", "kernel_hash": "rev-a"},
    {"provenance": PREDICTED, "protocol": "model-1", "problem": shape(12)},
    {"provenance": PREDICTED, "protocol": "model-1", "device": "a10-72sm"},
    {"spills": 8},
    {"time_us": None, "status": Status.INCORRECT},
]


@pytest.fixture
def fill(tmp_path: Path, environment, make_record):
    """Adds records to the files of their devices; the order of time is the order given."""
    count = 0

    def add(*changes: dict, folder: Path = tmp_path) -> None:
        nonlocal count
        for change in changes:
            count += 1
            change = {"config": f"{count:03}", "created_at": f"2026-01-01T00:{count:02}:00+00:00", **change}
            record = make_record(**change)
            with TuningDB.open(record.key.device, folder) as db:
                db.add(record, db.start_run(environment))

    return add


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the shipped files."""
    folder = tmp_path / "shipped"
    monkeypatch.setenv(SHIPPED, str(folder))
    return folder


@pytest.fixture
def ship(fill, shipped: Path):
    """As `fill`, to the shipped files of their devices."""
    return lambda *changes: fill(*changes, folder=shipped)


@pytest.fixture
def ask(tmp_path: Path, key: Key):
    def best(**options):
        with TuningDB.open(key.device, tmp_path, read_only=True) as db:
            return db.best(key, **{"predicted_protocol": "model-1", "near": NEAR_IN_M, **options})

    return best


@pytest.mark.parametrize("step", range(len(LADDER)), ids=lambda step: LADDER[step][2])
def test_the_best_evidence_there_is(fill, ask, step: int) -> None:
    slower_first = [{**change, "time_us": 1000.0 - at} for at, (change, _, _) in enumerate(LADDER)]
    fill(*reversed(slower_first[step:]), *NEVER)
    answer = ask()
    assert answer is not None
    assert (answer.provenance, answer.reason) == LADDER[step][1:]
    assert answer.record.times.median_us == 1000.0 - step


def test_no_evidence_no_answer(fill, ask) -> None:
    assert ask() is None
    fill(*NEVER)
    assert ask() is None


def test_refused_candidates_give_way_in_order(fill, ask) -> None:
    fill(*[{**change, "time_us": 1000.0 - at} for at, (change, _, _) in enumerate(LADDER)])
    offered: list[Record] = []

    def refuse(record: Record) -> bool:
        offered.append(record)
        return False

    assert ask(accept=refuse) is None
    assert [record.times.median_us for record in offered] == [1000.0 - at for at in range(len(LADDER))]


def test_the_first_accepted_is_the_answer(fill, ask) -> None:
    fill({"config": "a", "time_us": 1.0}, {"config": "b", "time_us": 2.0}, {"config": "c", "time_us": 3.0})
    assert ask().record.config == "a"
    assert ask(accept=lambda record: record.config != "a").record.config == "b"


def test_the_newest_toolchain_answers_with_its_fastest(fill, ask) -> None:
    fill(
        {"triton": "3.7.0", "time_us": 4.8},
        {"triton": "3.8.0", "time_us": 5.0, "config": "fast"},
        {"triton": "3.8.0", "time_us": 9.0, "config": "slow and last"},
    )
    assert ask().record.config == "fast"


SAME_PROBLEM = [
    (change, reason) for change, _, reason in LADDER if change.keys() <= {"protocol", "triton", "kernel_hash"}
]


@pytest.mark.parametrize(
    "change", [change for change, _ in SAME_PROBLEM[1:]], ids=[reason for _, reason in SAME_PROBLEM[1:]]
)
def test_what_is_faster_beyond_noise_answers_though_it_is_less_close(fill, ask, change: dict) -> None:
    fill({"config": "a", "time_us": 10.0})
    fill({**change, "config": "b", "time_us": 9.6})
    assert ask().record.config == "a"
    fill({**change, "config": "c", "time_us": 9.4})
    assert (ask().record.config, ask().provenance) == ("c", TRANSFERRED)


def test_a_configuration_is_judged_by_the_closest_key_that_has_it(fill, ask) -> None:
    fill({"config": "a", "time_us": 10.0}, {"config": "b", "time_us": 12.0})
    fill({"config": "b", "time_us": 5.0, "kernel_hash": "rev-a"})
    assert (ask().record.config, ask().reason) == ("a", "exact")


def test_times_of_another_protocol_are_brought_to_scale(fill, ask) -> None:
    """One that takes half the time of all, as with a warm cache, must not win by that; nor lose by taking twice as
    much."""
    fill({"config": "a", "time_us": 10.0}, {"config": "b", "time_us": 12.0})
    fill(*({"config": config, "time_us": us, "protocol": "warm-0"} for config, us in (("a", 5.0), ("c", 4.9))))
    assert ask().record.config == "a"
    fill(*({"config": config, "time_us": us, "protocol": "slow-0"} for config, us in (("a", 20.0), ("d", 16.0))))
    assert (ask().record.config, ask().reason) == ("d", "other protocol")


def test_a_field_that_an_earlier_revision_lacks_is_no_other_configuration(fill, ask) -> None:
    here = {"config": '{"A":1,"PAIRS":false}', "time_us": 12.0}
    earlier = {"config": '{"A":1}', "time_us": 5.0, "kernel_hash": "rev-a"}
    fill({"config": '{"A":2,"PAIRS":false}', "time_us": 10.0}, here, earlier)
    assert ask().reason == "other revision"
    assert ask(defaults={"PAIRS": False}).record.config == '{"A":2,"PAIRS":false}'


def test_a_configuration_that_is_nested_too_deeply_is_one_that_nobody_knows(fill, ask) -> None:
    deep = '{"a":' * 100000 + "1" + "}" * 100000
    fill({"kernel_hash": "rev-a", "config": deep}, {"kernel_hash": "rev-a", "config": '{"T":1}', "time_us": 90.0})
    answer = ask(accept=lambda record: record.config != deep, defaults={"NEW": False})
    assert answer.record.config == '{"T":1}'


def test_what_failed_here_is_known_without_the_field_that_is_new(fill, ask) -> None:
    fill({"config": '{"A":1}', "time_us": 1.0, "kernel_hash": "rev-a"}, {"config": "b", "kernel_hash": "rev-a"})
    fill({"config": '{"A":1,"PAIRS":false}', **WRONG})
    assert ask(defaults={"PAIRS": False}).record.config == "b"


def test_the_incumbent_gives_way_to_another_revisions_only_beyond_noise(fill, ask) -> None:
    fill({"config": "default", "times": spread(10.0, 1.0)}, {"config": "fastest", "times": spread(9.9, 1.0)})
    fill({"config": "b", "time_us": 9.6, "kernel_hash": "rev-a"})
    assert ask(incumbent="default").record.config == "default"
    fill({"config": "c", "time_us": 9.0, "kernel_hash": "rev-a"})
    assert ask(incumbent="default").record.config == "c"


def test_beyond_the_fastest_that_are_weighed_too_the_closest_key_judges(
    tmp_path: Path, key: Key, environment, make_record
) -> None:
    many = [make_record(str(at), 10.0 + at) for at in range(100)]
    old = [make_record(str(at), 1.0 + at, kernel_hash="rev-a") for at in (90, 99)]
    with TuningDB.open(key.device, tmp_path) as db:
        db.add_many([*many, *old, make_record("new", 30.0, kernel_hash="rev-a")], db.start_run(environment))
        offered: list[str] = []
        assert db.best(key, accept=lambda record: bool(offered.append(record.config))) is None
    assert sorted(offered) == sorted([*map(str, range(100)), "new"])
    assert offered[:10] == [str(at) for at in range(10)]


def test_of_two_equally_fast_it_hangs_on_neither_order_nor_file(tmp_path: Path, fill, ask, key: Key) -> None:
    fill({"config": "b", "time_us": 3.0}, {"config": "a", "time_us": 3.0}, {"config": "c", "time_us": 4.0})
    assert ask().record.config == "a"
    with TuningDB.open(key.device, tmp_path) as db:
        assert [record.config for record in db.top(key, 3)] == ["a", "b", "c"]
        assert [record.config for record in db.best_of_each()] == ["a"]


def test_a_slow_configuration_of_a_closer_key_is_known_by_its_form_beyond_those_that_are_weighed(fill, ask) -> None:
    """It was slow under the closer key, which wrote it without a field that the other one has."""
    fill(*({"config": f'{{"a":{at}}}', "time_us": 10.0 + at, "kernel_hash": "rev-b"} for at in range(70)))
    fill({"config": '{"a":69,"b":1}', "time_us": 1.0, "kernel_hash": "rev-b", "triton": "3.5.1"})
    assert ask(defaults={"b": 1}).record.config == '{"a":0}'
    assert ask(defaults={"b": 2}).record.config == '{"a":69,"b":1}'


def test_the_nearest_shape_goes_first_in_whatever_order_they_are_stored(fill, ask) -> None:
    fill({"problem": shape(20)}, {"problem": shape(112)}, {"problem": shape(17)}, {"problem": shape(40)})
    assert ask().reason == "near shape M=16→17"


def test_equal_distances_go_to_the_newest(fill, ask) -> None:
    fill({"problem": shape(8), "time_us": 1.0}, {"problem": shape(32), "time_us": 9.0})
    assert ask().reason == "near shape M=16→32"
    fill({"problem": shape(8), "config": "later"})
    assert ask().reason == "near shape M=16→8"


def test_without_a_distance_no_other_shape_is_asked(fill, ask) -> None:
    fill({"problem": shape(12)}, {"problem": shape(17), "device": "a10-72sm"})
    assert ask(near=None) is None


def test_as_many_near_shapes_are_asked_as_there_are(fill, ask) -> None:
    """More than are read at first."""
    fill(*[{"problem": shape(m), "config": str(m)} for m in range(17, 60)])
    assert ask(accept=lambda record: record.config == "59").reason == "near shape M=16→59"


SPILLS = {"spills": 4}
WRONG = {"time_us": None, "status": Status.INCORRECT}
TOO_BIG = {"time_us": None, "status": Status.OUT_OF_RESOURCES, "provenance": PREDICTED, "protocol": "model-1"}
NOT_HERE = [(failure, evidence) for failure in (SPILLS, WRONG, TOO_BIG) for evidence, _, _ in LADDER[1:]]
NOT_HERE.remove((TOO_BIG, LADDER[-1][0]))  # the one outcome replaces the other


@pytest.mark.parametrize(("failure", "evidence"), NOT_HERE)
def test_what_failed_here_is_not_answered_from_elsewhere(fill, ask, failure: dict, evidence: dict) -> None:
    fill({**evidence, "config": "bad", "time_us": 1.0}, {**evidence, "config": "good", "time_us": 9.0})
    assert ask().record.config == "bad"
    fill({"config": "bad", **failure})
    assert ask().record.config == "good"


def test_what_failed_elsewhere_may_be_answered(fill, ask) -> None:
    fill({"triton": "3.8.0", "config": "a", "time_us": None, "status": Status.COMPILE_ERROR}, {"config": "a"})
    assert ask().reason == "exact"


def test_boards_are_asked_without_a_file_of_ones_own(fill, ask, tmp_path: Path, key: Key) -> None:
    fill({"device": "a10-72sm"})
    assert ask().reason == "board a10-72sm"
    assert not (tmp_path / f"{key.device}.sqlite").exists()


def test_boards_that_cannot_be_asked_are_noted(fill, tmp_path: Path, key: Key) -> None:
    fill({"device": "a10-72sm"})
    bad = tmp_path / "a40-84sm.sqlite"
    bad.write_bytes(b"this is no database" * 100)
    with TuningDB.open(key.device, tmp_path) as db:
        assert db.skipped == {}
        answer = db.best(key)
        assert answer is not None
        assert answer.reason == "board a10-72sm"
        assert list(db.skipped) == [bad]
    assert bad.exists()


def test_boards_are_asked_only_where_this_one_has_no_answer(fill, tmp_path: Path, key: Key) -> None:
    fill({"device": "a10-72sm"}, {})
    (tmp_path / "a40-84sm.sqlite").write_bytes(b"this is no database" * 100)
    with TuningDB.open(key.device, tmp_path) as db:
        answer = db.best(key)
        assert answer is not None
        assert answer.reason == "exact"
        assert db.skipped == {}  # the damaged one was not opened


def test_a_copy_of_the_file_is_no_other_board(fill, ask, tmp_path: Path, key: Key) -> None:
    fill({})
    (tmp_path / f"{key.device}.sqlite").rename(tmp_path / "backup.sqlite")
    assert ask() is None


def spread(median_us: float, width_us: float, samples: int = 30) -> Times:
    return Times(median_us, median_us - width_us / 2, median_us + width_us / 2, samples)


@pytest.mark.parametrize(
    ("fastest", "incumbent", "answered"),
    [
        (spread(9.9, 1.0), spread(10.0, 1.0), "default"),  # 0.1 µs of difference, 0.25 µs of noise
        (spread(9.0, 1.0), spread(10.0, 1.0), "fastest"),
        (spread(9.9, 0.1), spread(10.0, 0.1), "fastest"),
        (Times.single(9.999), Times.single(10.0), "fastest"),  # without noise any difference counts
        (spread(9.0, 1.0), None, "fastest"),
    ],
)
def test_the_incumbent_stays_unless_it_is_beaten_beyond_noise(
    tmp_path: Path, key: Key, environment, make_record, fastest: Times, incumbent: Times | None, answered: str
) -> None:
    with TuningDB.open(key.device, tmp_path) as db:
        run = db.start_run(environment)
        db.add(make_record("fastest", times=fastest), run)
        db.add(make_record("slowest", times=spread(11.0, 1.0)), run)
        if incumbent is not None:
            db.add(make_record("default", times=incumbent), run)
        found = db.best(key, incumbent="default")
        assert found is not None
        assert found.record.config == answered
        top = [record.config for record in db.top(key, 9, incumbent="default")]
        assert top[0] == answered
        assert sorted(top) == sorted(record.config for record in db.records(key))


def test_an_incumbent_that_failed_gives_way(tmp_path: Path, key: Key, environment, make_record) -> None:
    with TuningDB.open(key.device, tmp_path) as db:
        run = db.start_run(environment)
        db.add(make_record("fastest", times=spread(9.9, 1.0)), run)
        db.add(make_record("default", times=None, status=Status.INCORRECT), run)
        found = db.best(key, incumbent="default")
        assert found is not None
        assert found.record.config == "fastest"


def test_evidence_is_what_the_steps_of_transfer_would_ask(fill, tmp_path: Path, key: Key) -> None:
    fill({})  # this very key is no evidence for itself
    fill(*({"problem": shape(12), "time_us": 9.0 - n} for n in range(3)))
    fill({"kernel_hash": "rev-a"}, {"kernel_hash": "rev-a"}, {"device": "a10-72sm"}, {"device": "a10-72sm"})
    fill({"problem": shape(24), "time_us": None, "status": Status.INCORRECT}, {"device": "h200-132sm", "arch": 90})
    with TuningDB.open(key.device, tmp_path, read_only=True) as db:
        found = db.evidence(key, near=NEAR_IN_M, most=9)
        assert [(reason, len(records)) for reason, records in found] == [
            ("other revision", 2),
            ("near shape M=16→12", 3),
            ("board a10-72sm", 2),
        ]
        times = [record.times for record in found[1][1]]
        assert [each.median_us for each in times if each is not None] == [7.0, 8.0, 9.0]
        assert [reason for reason, _ in db.evidence(key, near=NEAR_IN_M, least=3, most=9)] == ["near shape M=16→12"]
        assert [reason for reason, _ in db.evidence(key, near=NEAR_IN_M, most=1)] == ["other revision"]
        assert [reason for reason, _ in db.evidence(key, most=9)] == ["other revision", "board a10-72sm"]


@pytest.mark.parametrize("step", range(len(LADDER) - 1), ids=lambda step: LADDER[step][2])
def test_shipped_records_answer_as_ones_own_do(ship, ask, tmp_path: Path, step: int) -> None:
    slower_first = [{**change, "time_us": 1000.0 - at} for at, (change, _, _) in enumerate(LADDER)]
    ship(*reversed(slower_first[step:]), *NEVER)
    answer = ask()
    _, provenance, reason = LADDER[step]
    assert (answer.provenance, answer.reason) == (provenance, f"{reason}, shipped")
    assert answer.record.times.median_us == 1000.0 - step
    assert [path.name for path in tmp_path.iterdir()] == ["shipped"]


@pytest.mark.parametrize("step", range(len(LADDER) - 1), ids=lambda step: LADDER[step][2])
def test_of_one_rank_ones_own_answer_first(fill, ship, ask, step: int) -> None:
    change, provenance, reason = LADDER[step]
    fill({**change, "time_us": 9.0})
    ship({**change, "time_us": 8.7}, LADDER[-1][0])
    offered: list[Record] = []
    answer = ask(accept=lambda record: not offered.append(record))
    assert (answer.provenance, answer.reason, answer.record.times.median_us) == (provenance, reason, 9.0)
    assert ask(accept=lambda record: record != offered[0]).reason == f"{reason}, shipped"


@pytest.mark.parametrize("change", [change for change, _ in SAME_PROBLEM], ids=[reason for _, reason in SAME_PROBLEM])
def test_what_was_measured_here_under_this_very_key_answers_before_all_that_was_shipped(
    fill, ship, ask, change: dict
) -> None:
    ship({**change, "config": "theirs", "time_us": 1.0})
    assert ask().record.config == "theirs"
    fill({"config": "mine", "time_us": 9.0})
    assert (ask().record.config, ask().reason) == ("mine", "exact")
    assert ask(accept=lambda record: record.config != "mine").record.config == "theirs"


@pytest.mark.parametrize("step", range(1, len(LADDER) - 1), ids=lambda step: LADDER[step][2])
def test_of_one_rank_shipped_records_answer_where_they_are_faster_beyond_noise(fill, ship, ask, step: int) -> None:
    fill({**LADDER[step][0], "time_us": 9.0})
    ship({**LADDER[step][0], "time_us": 8.0})
    assert ask().reason == f"{LADDER[step][2]}, shipped"


@pytest.mark.parametrize("step", range(1, len(LADDER)), ids=lambda step: LADDER[step][2])
def test_shipped_records_of_a_better_rank_answer_before_ones_own(fill, ship, ask, step: int) -> None:
    fill(LADDER[step][0])
    ship(LADDER[step - 1][0])
    assert ask().reason == f"{LADDER[step - 1][2]}, shipped"


@pytest.mark.parametrize("failure", [SPILLS, WRONG, TOO_BIG])
def test_what_failed_here_is_not_answered_as_shipped(fill, ship, ask, failure: dict) -> None:
    ship({"config": "bad", "time_us": 1.0}, {"config": "good", "time_us": 9.0})
    assert ask().record.config == "bad"
    fill({"config": "bad", **failure})
    assert ask().record.config == "good"


def test_among_shipped_records_too_the_incumbent_stays_unless_it_is_beaten(ship, ask) -> None:
    ship({"config": "fastest", "times": spread(9.9, 1.0)}, {"config": "default", "times": spread(10.0, 1.0)})
    assert ask().record.config == "fastest"
    assert ask(incumbent="default").record.config == "default"


def test_an_incumbent_of_another_key_has_no_place_to_stay_in(fill, ship, ask) -> None:
    for add in (fill, ship):
        add(
            {"triton": "3.8.0", "config": "fastest", "times": spread(9.9, 1.0)},
            {"triton": "3.8.0", "config": "default", "times": spread(10.0, 1.0)},
        )
        assert ask(incumbent="default").record.config == "fastest"


def test_shipped_records_are_evidence_the_same_problem_first(fill, ship, tmp_path: Path, key: Key) -> None:
    fill({}, {"kernel_hash": "rev-a"}, {"problem": shape(12)})
    ship({"time_us": 2.0}, {"time_us": 1.0}, {"kernel_hash": "rev-a"}, {"device": "a10-72sm"})
    with TuningDB.open(key.device, tmp_path, read_only=True) as db:
        found = db.evidence(key, near=NEAR_IN_M, most=9)
    assert [(reason, len(records)) for reason, records in found] == [
        ("exact, shipped", 2),
        ("other revision", 1),
        ("other revision, shipped", 1),
        ("near shape M=16→12", 1),
        ("board a10-72sm, shipped", 1),
    ]
    assert [record.times.median_us for record in found[0][1] if record.times] == [1.0, 2.0]


def test_shipped_records_can_be_left_out(ship, ask, monkeypatch: pytest.MonkeyPatch) -> None:
    ship({}, {"device": "a10-72sm"})
    assert ask() is not None
    monkeypatch.setenv(SHIPPED, "0")
    assert ask() is None


def test_the_shipped_folder_may_be_ones_own(ship, shipped: Path, key: Key) -> None:
    ship({}, {"triton": "3.8.0"}, {"device": "a10-72sm"})
    with TuningDB.open(key.device, shipped, read_only=True) as db:
        offered: list[Record] = []
        assert db.best(key, accept=lambda record: bool(offered.append(record))) is None
        assert [record.key.device for record in offered] == [key.device, key.device, "a10-72sm"]
        assert [reason for reason, _ in db.evidence(key, most=9)] == ["other toolchain", "board a10-72sm"]


def edited(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement)


UNREADABLE = {
    "garbage": lambda path: path.write_bytes(b"this is no database" * 100),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "another program's": lambda path: path.unlink() or edited(path, "CREATE TABLE notes (text)"),
    "a newer Tilewright's": lambda path: edited(
        path, "INSERT INTO _sqlite_migrations VALUES (99, 'tilewright', 's0999_future', 'some day')"
    ),
    "no records": lambda path: edited(path, "UPDATE records SET median_us = NULL"),
    "a folder": lambda path: path.unlink() or path.mkdir(),
}


@pytest.mark.parametrize("damage", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("board", ["rtx3090-82sm", "a10-72sm"])
def test_a_shipped_file_that_cannot_be_read_is_a_warning(
    fill, ship, shipped: Path, tmp_path: Path, key: Key, damage, board: str
) -> None:
    fill({"provenance": PREDICTED, "protocol": "model-1"})
    ship({"device": board})
    path = shipped / f"{board}.sqlite"
    damage(path)
    before = None if path.is_dir() else path.read_bytes()
    with TuningDB.open(key.device, tmp_path, read_only=True) as db:
        with pytest.warns(RuntimeWarning) as warned:
            answer = db.best(key, predicted_protocol="model-1")
        assert answer is not None
        assert answer.reason == "exact"
        assert list(db.skipped) == [path]
    for warning in warned:
        text = str(warning.message)
        assert text.startswith(
            f"{path}: the records that were shipped with tilewright can't be read and are left out ("
        )
        assert text.endswith("): install it again, or set TILEWRIGHT_SHIPPED=0")
        assert "\n" not in text
    assert len(warned) == 1
    assert (None if path.is_dir() else path.read_bytes()) == before


def test_a_shipped_file_under_another_boards_name_answers_for_its_own(ship, ask, shipped: Path, key: Key) -> None:
    ship({"device": "a10-72sm"})
    shutil.move(shipped / "a10-72sm.sqlite", shipped / f"{key.device}.sqlite")
    assert (ask().provenance, ask().reason) == (TRANSFERRED, "board a10-72sm, shipped")


def test_a_file_under_another_boards_name_answers_for_its_own(fill, ask, tmp_path: Path, key: Key) -> None:
    fill({"device": "a10-72sm"})
    shutil.move(tmp_path / "a10-72sm.sqlite", tmp_path / f"{key.device}.sqlite")
    assert (ask().provenance, ask().reason) == (TRANSFERRED, "board a10-72sm")

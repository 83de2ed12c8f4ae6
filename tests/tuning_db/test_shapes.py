from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.tuning_db import Near, TuningDB, canonical_json, schema
from tilewright.tuning_db.rows import record_to_row
from tilewright.tuning_db.shapes import COLUMNS, FARTHEST, distance, nearest, place, split

NEAR = Near(("M", "N"), ("groups",), (("N", 16),))
ASKED = {"M": 64, "N": 256, "K": 32, "groups": 4, "dtype": "fp16", "bias": None, "gated": False}


def text(**changes: object) -> str:
    return canonical_json({**ASKED, **changes})


@pytest.fixture
def connection() -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as opened:
        schema.migrate(opened)
        yield opened


def fill(connection: sqlite3.Connection, problems: list[str]) -> None:
    connection.execute("DELETE FROM shapes")
    for problem in problems:
        connection.execute("INSERT OR IGNORE INTO shapes (op, arch, problem) VALUES ('gemm', 86, ?)", (problem,))
    place(connection)


def ask(connection: sqlite3.Connection, near: Near = NEAR, asked: str = text(), arch: int = 86) -> list:
    return list(nearest(lambda sql, values: connection.execute(sql, values).fetchall(), near, "gemm", arch, asked))


def test_sizes_are_the_positive_integers() -> None:
    assert split(text(page=0, left=-1, scale=2.0)).sizes == {"K": 32, "M": 64, "N": 256, "groups": 4}


@pytest.mark.parametrize(
    "change", [{"dtype": "bf16"}, {"bias": "fp16"}, {"gated": True}, {"groups": 0}, {"bias": 1}, {"more": 1}], ids=str
)
def test_what_is_no_size_is_the_class(change: dict) -> None:
    assert split(text(**change)).digest != split(text()).digest
    assert split(text(M=1, N=2, K=3, groups=4)).digest == split(text()).digest


@pytest.mark.parametrize("garbage", ["", "[]", "7", "null", "{", '"M"'])
def test_what_is_no_problem_is_near_nothing(connection: sqlite3.Connection, garbage: str) -> None:
    fill(connection, [garbage, text()])
    assert distance(NEAR, garbage, garbage) is None
    assert ask(connection, asked=garbage) == []
    assert ask(connection, asked=text(M=65)) == [(text(), pytest.approx(0.02236781))]


def test_more_sizes_than_there_are_columns_stay_in_the_class(connection: sqlite3.Connection) -> None:
    many = {f"x{place:02}": 8 for place in range(len(COLUMNS) + 1)}
    near = Near(tuple(many))
    first, last = min(many), max(many)
    others = [{**many, first: 16}, {**many, last: 16}, {**many, "x07": 2**63}]
    fill(connection, [canonical_json(other) for other in others])
    assert ask(connection, near, canonical_json(many)) == [(canonical_json(others[0]), 1.0)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"M": 128}, 1),
        ({"M": 32}, 1),
        ({"M": 16, "N": 1024}, 4),
        ({"M": 65, "N": 4096}, None),  # over 4
        ({"M": 1024}, 4),
        ({"M": 1025}, None),
        ({"groups": 999}, 0),
        ({"K": 33}, None),
        ({"N": 255}, None),
        ({"M": 63}, 0.022720077),
        ({"dtype": "bf16"}, None),
    ],
    ids=str,
)
def test_distance_is_in_doublings(connection: sqlite3.Connection, change: dict, expected: float | None) -> None:
    assert distance(NEAR, text(), text(**change)) == expected
    fill(connection, [text(**change), text()])
    assert ask(connection) == ([] if expected is None else [(text(**change), expected)])


def test_the_op_has_the_last_word(connection: sqlite3.Connection) -> None:
    near = Near(("M",), accept=lambda problem: json.loads(problem)["M"] % 3 == 0)
    fill(connection, [text(M=m) for m in (65, 66, 67, 72)])
    assert [json.loads(problem)["M"] for problem, _ in ask(connection, near)] == [66, 72]
    assert distance(near, text(), text(M=65)) is None


def test_the_problem_itself_and_other_archs_are_left_out(connection: sqlite3.Connection) -> None:
    fill(connection, [text()])
    assert ask(connection) == []
    assert ask(connection, asked=text(M=65), arch=80) == []
    assert len(ask(connection, asked=text(M=65))) == 1


sizes = st.integers(1, 600)
problems = st.builds(lambda m, n, k, g: text(M=m, N=n, K=k, groups=g), sizes, sizes, st.sampled_from([31, 32]), sizes)


@settings(deadline=None)
@given(
    st.lists(problems, max_size=60, unique=True),
    problems,
    st.sampled_from([NEAR, Near(("M", "N", "groups")), Near(("M", "N", "K", "groups"), (), (("M", 2), ("N", 16)))]),
)
def test_the_query_finds_what_the_rule_says_in_its_order(found: list[str], asked: str, near: Near) -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        schema.migrate(connection)
        fill(connection, found)
        answers = ask(connection, near, asked)
    far = {problem: distance(near, asked, problem) for problem in found if problem != asked}
    assert {problem: pytest.approx(away) for problem, away in answers} == {
        problem: away for problem, away in far.items() if away is not None
    }
    assert [away for _, away in answers] == sorted(away for _, away in answers)
    assert all(0 <= away <= FARTHEST for _, away in answers)


def stored(db: TuningDB) -> list[tuple[str, str | None]]:
    return [(row["problem"], row["class"]) for row in db._file.rows("SELECT problem, class FROM shapes ORDER BY id")]


def test_a_shape_comes_with_its_first_record_and_goes_with_its_last(db: TuningDB, run_id: int, make_record) -> None:
    db.add_many([make_record("a", problem=text(M=1)), make_record("b", problem=text(M=1))], run_id)
    db.add(make_record("a", problem=text(M=1)), run_id)  # replaces
    db.add(make_record("a", problem=text(M=2)), run_id)
    placed = [(text(M=m), split(text()).digest) for m in (1, 2)]
    assert stored(db) == placed
    for config, left in (("a", placed[:1]), ("b", [])):
        with closing(sqlite3.connect(db.path)) as tool, tool:
            tool.execute("DELETE FROM records WHERE config = ?", config)
        assert stored(db) == left


def test_what_can_not_be_answered_has_no_shape(db: TuningDB, run_id: int, make_record) -> None:
    db.add(make_record(spills=4), run_id)
    db.add(make_record("b", None, status="invalid"), run_id)
    db.add(make_record("c", provenance="predicted"), run_id)
    assert stored(db) == []


def test_a_row_that_another_tool_wrote_is_placed_with_the_next_transaction(db, run_id: int, make_record) -> None:
    db.add(make_record(problem=text(M=1)), run_id)
    row = record_to_row(make_record(problem=text(M=2)), run_id, "2026")
    with closing(sqlite3.connect(db.path)) as tool, tool:
        tool.execute(f"INSERT INTO records ({', '.join(row)}) VALUES (:{', :'.join(row)})", row)
    assert stored(db)[1] == (text(M=2), None)
    db.note({"anything": "else"})
    assert [digest for _, digest in stored(db)] == [split(text()).digest] * 2

from __future__ import annotations

import pytest

from tilewright.tuning_db import strict_json as is_

NOT_PLAIN = [{"a": []}, {"a": {}}, {"a": 2**63}, {"a": "\ud800"}, [], 1]


def test_an_object_is_read() -> None:
    assert is_.read_object('{"a": [1, {"b": "µ"}], "c": null}'.encode()) == {"a": [1, {"b": "µ"}], "c": None}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "is no JSON"),
        (b'{"a": 1', "is no JSON"),
        (b"[1]", "[1] is no JSON object"),
        (b'"text"', "'text' is no JSON object"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"b": {"a": 1, "a": 2}}', "'a' is given twice"),
        (b'{"a": NaN}', "NaN is no JSON"),
        (b'{"a": -Infinity}', "-Infinity is no JSON"),
        (b'{"a": 1e999}', "'1e999' is no finite number"),
        (b'{"\\u001b[2J": [1e999]}', "'1e999' is no finite number"),
        (b'{"a": "\xff"}', "byte 0xff at 7 is no UTF-8"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "99999999999999999999… is an integer of 5000 digits"),
        (b"x" * 1000, "(1002 characters) is no JSON"),
    ],
)
def test_what_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        is_.read_object(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (is_.text, ["", "µ", "a\nb"], [1, None, "\ud800", ["a"]]),
        (is_.line, ["", "µ 1.0"], ["a\nb", "\x1b[31m", "\0", "\u2028", "\ud800", 1, None]),
        (is_.name, ["a"], ["", "a\nb", "\x1b[31m", "\udfff", 0]),
        (is_.word, ["a"], ["", "\udfff", 0]),
        (is_.one_of(("a", "b")), ["a"], ["c", None, ["a"]]),
        (is_.integer(1, 9), [1, 9], [0, 10, True, 1.0, "1", None]),
        (is_.integer(), [0, 2**63 - 1], [-1, 2**63, 10**400]),
        (is_.positive, [1, 0.5], [0, -1, float("nan"), float("inf"), True, "1", None, 10**400]),
        (is_.optional(is_.positive), [None, 1.0], [0, "1"]),
        (
            is_.plain,
            [{}, {"a": 1, "b": None, "c": "d", "e": True, "f": 0.5}],
            [{"a": []}, {"a": {}}, {"a": 2**63}, [], 1],
        ),
        (is_.anything, [{}, {"a": [{"b": 1}]}], [[], None, {"a": ["\ud800"]}]),
    ],
)
def test_what_may_stand_where(check: is_.Check, good: list, bad: list) -> None:
    assert [check(value) for value in good] == [None] * len(good)
    assert all(check(value) for value in bad), [value for value in bad if not check(value)]


def test_fields_are_these_and_no_others() -> None:
    fields = {"a": is_.integer(), "b": is_.optional(is_.text)}
    is_.check_fields({"a": 1, "b": None}, fields)
    for values, reason in [
        ({"a": 1}, "b is missing"),
        ({"a": 1, "b": None, "c": 2}, "'c' is no field (fields: a, b)"),
        ({"a": -1, "b": None}, "a=-1 must be an integer of at least 0, below 2^63"),
        ({"a": 1, "b": 2}, "b=2 must be a text, or null"),
        ({"a": "x" * 500, "b": None}, "(502 characters) must be an integer"),
    ]:
        with pytest.raises(ValueError, match=r".") as caught:
            is_.check_fields(values, fields)
        assert reason in str(caught.value)

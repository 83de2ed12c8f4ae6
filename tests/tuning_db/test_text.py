from __future__ import annotations

import pytest

from tilewright.tuning_db.text import counted, did_you_mean, one_line, printable, shown


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("a\n\x1b[31m", r"'a\n\x1b[31m'"),
        (None, "None"),
        ("x" * 78, repr("x" * 78)),
        ("x" * 79, f"'{'x' * 59}… (81 characters)"),
    ],
)
def test_values_are_one_short_line(value: object, said: str) -> None:
    assert shown(value) == said


def test_what_is_said_becomes_a_line() -> None:
    assert one_line(ValueError("first\n second\t third\n\nlast\n")) == "first second third last"


def test_one_is_no_plural() -> None:
    assert [counted(number, "trial") for number in (0, 1, 2)] == ["0 trials", "1 trial", "2 trials"]


def test_lines_command_no_terminal() -> None:
    assert printable("a\x1b[31mb\nc\u202e ×") == "a?[31mb c? ×"


def test_the_nearest_name_is_named() -> None:
    assert did_you_mean("gem", {"conv2d": 1, "gemm": 2}) == "; did you mean gemm?"
    assert did_you_mean("zzz", ("conv2d", "gemm")) == ""

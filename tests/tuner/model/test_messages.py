from __future__ import annotations

import logging

import pytest

from tilewright.tuner.model.messages import (
    LONGEST_LINE,
    LONGEST_NAME,
    fault,
    legible,
    listed,
    quiet,
    quoted,
)


def test_names_are_quoted_escaped_and_cut() -> None:
    assert quoted("conv1/w") == "'conv1/w'"
    assert quoted("a\n\x1b[31m") == "'a\\n\\x1b[31m'"
    assert len(quoted("n" * 10**6)) == LONGEST_NAME + 3


def test_names_are_shown_as_they_are_if_a_terminal_can() -> None:
    assert legible("blk[/0]/mm: é") == "blk[/0]/mm: é"
    assert legible("a\n\x1b[31m") == "'a\\n\\x1b[31m'"
    assert len(legible("n" * 10**6)) == LONGEST_NAME + 3


def test_what_a_library_says_becomes_a_line() -> None:
    assert fault(ValueError("first\n second\t third\n\nthe whole model")) == "first second third"
    assert fault("bell\x07 and\x00 null") == "bell? and? null"
    assert len(fault("long " * 1000)) <= LONGEST_LINE + 1


def test_a_few_of_many_names() -> None:
    assert listed(["a", "b"]) == "'a', 'b'"
    assert listed(list("abcdefg")) == "'a', 'b', 'c', 'd', 'e' and 2 more"


def test_quiet_keeps_the_libraries_from_printing_and_no_longer(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("onnxscript.optimizer")
    with quiet():
        log.warning("in between")
    log.warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]

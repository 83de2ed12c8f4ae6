"""Text in messages: values, faults and names from elsewhere, as parts of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def shown(value: object) -> str:
    """A value in a message: one line of at most 80 characters."""
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:60]}… ({len(words)} characters)"


def counted(number: int, noun: str) -> str:
    """A number of things: `1 trial`, `2 trials`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(said: object) -> str:
    """What an error, or a library, says, without the line ends and the indents in it."""
    return " ".join(str(said).split())


def printable(line: str) -> str:
    """A line for a terminal, which takes what isn't printable for commands: a blank or a ? instead."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "?" for sign in line)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What a message says after a name that nobody knows: the nearest of those that are known; empty where none is
    near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""

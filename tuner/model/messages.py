"""Words of a file that isn't trusted, or of a library, as part of one line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from tilewright.tuning_db.text import one_line, printable

LONGEST_NAME = 80
LONGEST_LINE = 400


def quoted(name: str) -> str:
    """A name out of a file: in quotes, control characters escaped, cut where it is longer than `LONGEST_NAME`."""
    return repr(name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + "…")


def legible(name: str) -> str:
    """A name out of a file for a terminal's eyes: as it is if it is short and printable, else `quoted`."""
    return name if name.isprintable() and len(name) <= LONGEST_NAME else quoted(name)


def fault(error: BaseException | str) -> str:
    """What a library says of a fault, as one line of printable characters, at most `LONGEST_LINE` of them."""
    # After an empty line onnx's checker prints the whole node with its attributes.
    line = printable(one_line(str(error).split("\n\n", 1)[0]))
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + "…"


def listed(names: list[str], most: int = 5) -> str:
    """A few of the names, quoted, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(quoted(name) for name in names[:most]) + more


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the ONNX libraries from printing, as warnings of the `logging` module, what they left as it was."""
    logs = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)

"""How a command ends before its end: one line on stderr, and its exit status."""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import NoReturn

from tilewright.tuning_db.errors import DatabaseError, MissingDependencyError, PackError, TilewrightError, UsageError
from tilewright.tuning_db.text import one_line, printable

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
"""Nobody reads stdout any more: as a shell has it of a program that SIGPIPE ended."""

EXIT_TERMINATED = 143


class TerminatedError(BaseException):
    """SIGTERM, or SIGHUP: as Ctrl-C, it ends the run through every `finally`, so that no worker stays behind."""


def heed_sigterm() -> None:
    """From now on SIGTERM raises `TerminatedError`, and SIGHUP, of a terminal that is closed, unless it is ignored as
    under `nohup`."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, frame: object) -> None:
    raise TerminatedError


def status_of(error: TilewrightError) -> int:
    """The exit status for an error of ours: whether the command was called wrongly, as by naming a GPU that is not
    here, or failed."""
    wrong = UsageError | DatabaseError | PackError | MissingDependencyError
    return EXIT_USAGE if isinstance(error, wrong) else EXIT_FAILED


def exit_with(line: str, status: int) -> NoReturn:
    """Says why, in one line, and exits."""
    with contextlib.suppress(OSError):  # a terminal that was closed
        print(printable(one_line(line)), file=sys.stderr)
    sys.exit(status)

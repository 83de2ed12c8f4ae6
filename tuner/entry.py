"""The entry point of the command `autotune`: Ctrl-C and SIGTERM are one line from the first moment on.

The command itself takes some twenty times as long to import as this, in which it can catch nothing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Runs the command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminate)
    try:
        from tilewright.tuner import cli
    except KeyboardInterrupt:
        _end("interrupted", 130)
    cli.main()  # which heeds them in its own way


def _terminate(number: int, frame: object) -> None:
    _end("terminated", 143)


def _end(how: str, status: int) -> NoReturn:
    with contextlib.suppress(OSError):  # a terminal that was closed
        if sys.stderr is not None:
            print(f"\nautotune: {how}: nothing was begun", file=sys.stderr)
    sys.exit(status)

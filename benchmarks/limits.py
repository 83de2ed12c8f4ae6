"""A limit on what may never end on a GPU: who waits for a kernel that waits for ever takes no signal."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator

LIMIT_S = 180.0
"""Of a case: it may wait two minutes for tuning runs on the same GPU (`benchmarks.torch_board.TURN_S`), compiles what
was not compiled ahead, and takes some seconds."""

MOST_S = 1e6
"""Of a limit: one without an end is more than a clock can count."""

GRACE_S = 10.0
"""Until Python's threads are not waited for either."""

EXIT_HUNG = 1


@contextlib.contextmanager
def limited(what: str, limit_s: float, ending: Callable[[str], None]) -> Iterator[None]:
    """Ends the process, with one line and `EXIT_HUNG`, where what is within takes longer than so many seconds.

    A thread does, which first hands `ending` the line, so that results are kept: only what is within may be changing
    them. Where native code keeps Python's lock, the process ends `GRACE_S` later with a traceback on stderr.
    """
    over, limit_s = threading.Event(), min(limit_s, MOST_S)
    line = f"{what}: no end in {limit_s:.0f} s; a kernel may wait for ever"

    def watch() -> None:
        if over.wait(limit_s):
            return
        with contextlib.suppress(Exception):  # a full disk, a closed pipe: it ends all the same
            ending(line)
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)

    thread = threading.Thread(target=watch, daemon=True, name="limit")
    thread.start()
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a stderr that is closed
        faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=sys.__stderr__)  # type: ignore[arg-type]
    try:
        yield
    finally:
        over.set()
        faulthandler.cancel_dump_traceback_later()

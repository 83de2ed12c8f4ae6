"""Processes that measure on one GPU take turns: a time taken while another's kernel runs is no time at all.

Runs of one host that measure on the same GPU find each other by a lock on a file named after it, in the folder for
temporary files: those that have one folder for them, of whichever user. The system drops the lock of a process that
ends, in whatever way.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from tilewright.tuner.locks import locked

POLL_S = 0.002
"""Between two tries for a GPU that is busy: a turn is some tenths of a second."""


class BusyError(Exception):
    """Others had the GPU for as long as one waits for it."""


@contextlib.contextmanager
def turn(folder: Path | None, gpu: str, wait_s: float) -> Iterator[None]:
    """The GPU to oneself, while the block runs.

    Args:
        folder: where the runs of a host leave their locks; None takes no lock.
        gpu: what the GPU is called by everybody, such as its PCI address.
        wait_s: how long to wait for it.

    Raises:
        BusyError: it took longer.
    """
    descriptor = None if folder is None else _opened(folder / f"tilewright-gpu-{gpu.replace(':', '-')}.lock")
    if descriptor is None:
        yield
        return
    try:
        deadline = time.monotonic() + wait_s
        while not locked(descriptor):
            if time.monotonic() >= deadline:
                raise BusyError(f"others measure on {gpu} since {wait_s:g} s")
            time.sleep(POLL_S)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int | None:
    """The lock file; None where there can't be one: whoever measures there does so unprotected.

    It is opened for reading, which is enough for a lock, and made only where there is none: in a folder that everybody
    writes to, Linux refuses to open another user's file with O_CREAT (`fs.protected_regular`).
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(2):
        with contextlib.suppress(FileNotFoundError):
            return _descriptor(path, flags)
        try:
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            continue  # another process was faster
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, 0o644)  # whatever the umask: others have to read it
        return descriptor
    return None


def _descriptor(path: Path, flags: int) -> int | None:
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError:
        return None

"""Locks on open files: held until the file is closed, at the latest as the process ends, in whatever way."""

from __future__ import annotations

import fcntl


def locked(descriptor: int) -> bool:
    """Whether the lock on an open file is ours now, without waiting for it.

    It counts as ours where there are no locks, as on some network file systems.
    """
    # Not filelock's, which opens the file itself, for writing: of another user's lock file one may only read, and a
    # worker's folder has to hold the lock of the very file that it was made with.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True

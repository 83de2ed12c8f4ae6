"""Temporary folders of worker processes, and of imports: gone when their owner closes them, or at the next start if it
was killed.

A folder is its owner's for as long as that process holds the lock on the folder's lock file. The system drops the lock
when the process ends, in whatever way, so no process number has to be trusted, and a folder in use is never removed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from tilewright.tuner.locks import locked

PREFIX = "tilewright-worker-"
LOCK_FILE = "owner.lock"
"""Tells our folders from others of such a name, too."""


class WorkerFolder:
    """An empty temporary folder that belongs to this process, in `parent` or where temporary files go by default."""

    def __init__(self, parent: Path | None = None) -> None:
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            self._descriptor = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
            # One who looked between the file's making and its locking takes it for abandoned: then it is his.
            if locked(self._descriptor) and (self.path / LOCK_FILE).exists():
                return
            os.close(self._descriptor)

    def remove(self) -> None:
        """Removes the folder with all in it; a second call does nothing."""
        if self._descriptor >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._descriptor)
            self._descriptor = -1


def remove_abandoned(parent: Path | None = None) -> None:
    """Removes this user's folders whose owner has ended; others, and what can't be removed, are left as they are."""
    with suppress(OSError):
        for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
            with suppress(OSError):
                _remove_if_abandoned(folder)


def _remove_if_abandoned(folder: Path) -> None:
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
        return
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_NOFOLLOW)
    try:
        # Where there are no locks this fails, and no folder is found abandoned.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)

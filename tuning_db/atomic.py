"""Writing a file whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tilewright.tuning_db.errors import UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file `path` when the block ends well; before that, and else, nothing changes.

    They are written to a temporary file in the same folder, which is renamed; one that a killed writer left is removed.
    Permissions are those that the file had, or that a new one gets. A link stays one, to a file that changed; a pipe or
    a terminal is written to as it is.

    Raises:
        UsageError: the folder isn't there or can't be written, `path` is a folder, or the disk is full.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file in it")
    if path.exists() and not path.is_file():
        try:
            with path.open("wb") as given:
                yield given
        except OSError as error:
            raise _explained(path, error) from None
        return
    path = path.resolve()
    _remove_abandoned(path)
    try:
        stream, temporary = _begun(path)
    except OSError as error:
        raise UsageError(f"{path} can't be written ({error.strerror}): name a file in a folder that can") from None
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            if path.exists():
                temporary.chmod(path.stat().st_mode & 0o777)
            temporary.replace(path)  # before it is closed, and so no longer locked
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _explained(path, error) from None
        raise


def _begun(path: Path) -> tuple[BinaryIO, Path]:
    """A temporary file for `path`, locked while it is open: one that is not is of a writer that was killed."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        stream = temporary.open("xb")
        with suppress(OSError):  # a file system without locks, where nothing is removed either
            fcntl.flock(stream, fcntl.LOCK_EX)
        if os.fstat(stream.fileno()).st_nlink:
            return stream, temporary
        stream.close()  # another writer saw it before it was locked


def _remove_abandoned(path: Path) -> None:
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.part")
    with suppress(OSError):
        for each in path.parent.iterdir():
            if name.fullmatch(each.name):
                with suppress(OSError), each.open("r+b") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    each.unlink()


def _explained(path: Path, error: OSError) -> Exception:
    """With the path and what to do, where the disk is full; others may be of whatever the bytes come from."""
    if error.errno not in _FULL:
        return error
    return UsageError(f"{path} can't be written ({error.strerror}): free some space, or name a file elsewhere")

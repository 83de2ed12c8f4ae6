from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tilewright.tuner.locks import locked


def test_a_lock_is_one_open_files_until_that_is_closed(tmp_path: Path) -> None:
    one, other = (os.open(tmp_path / "lock", os.O_RDONLY | os.O_CREAT, 0o600) for _ in range(2))
    assert locked(one)
    assert locked(one)
    assert not locked(other)
    os.close(one)
    assert locked(other)
    os.close(other)


def test_where_there_are_no_locks_it_counts_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    descriptor = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    assert locked(descriptor)
    os.close(descriptor)

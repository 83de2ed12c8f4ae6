"""Folders of worker processes: there while their owner is, and not much longer."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.tuner import temporary
from tilewright.tuner.temporary import LOCK_FILE, PREFIX, WorkerFolder, remove_abandoned

OWNER = """
import sys, time
from pathlib import Path
from tilewright.tuner.temporary import WorkerFolder
folder = WorkerFolder(Path(sys.argv[1]))
(folder.path / "sub").mkdir()
(folder.path / "sub" / "kernel.ptx").write_text("//")
print(folder.path, flush=True)
time.sleep(600)
"""


def test_a_folder_is_removed_with_all_in_it(tmp_path: Path) -> None:
    folder = WorkerFolder(tmp_path)
    assert folder.path.parent == tmp_path
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "file").touch()
    folder.remove()
    folder.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_outlives_others_that_clean_up_and_not_its_owner(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        try:
            remove_abandoned(tmp_path)
            assert (folder / "sub" / "kernel.ptx").exists()
        finally:
            owner.send_signal(signal.SIGKILL)
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_ours_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{PREFIX}of-somebody").mkdir()  # no lock file: only the name is like ours
    (tmp_path / f"{PREFIX}file").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK_FILE).touch()
    (tmp_path / f"{PREFIX}link").symlink_to(elsewhere)
    linked = tmp_path / f"{PREFIX}linked-lock"
    linked.mkdir()
    (linked / LOCK_FILE).symlink_to(elsewhere / LOCK_FILE)
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before

    abandoned = tmp_path / f"{PREFIX}abandoned"
    abandoned.mkdir()
    (abandoned / LOCK_FILE).touch()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)  # another user's
    remove_abandoned(tmp_path)
    assert abandoned.exists()
    monkeypatch.undo()
    remove_abandoned(tmp_path)
    assert not abandoned.exists()


def test_nowhere_to_look_is_nothing_to_do(tmp_path: Path) -> None:
    remove_abandoned(tmp_path / "missing")


@pytest.mark.parametrize("removed", [False, True])
def test_a_folder_that_was_taken_for_abandoned_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: bool
) -> None:
    """One that cleans up comes between the lock file and its locking: it has locked it, or has removed the folder."""
    flock, held = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not held:
            (folder,) = tmp_path.iterdir()
            held.append(os.open(folder / LOCK_FILE, os.O_RDWR))
            flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            if removed:
                (folder / LOCK_FILE).unlink()
                folder.rmdir()
                os.close(held[0])
        flock(descriptor, operation)

    monkeypatch.setattr(temporary.fcntl, "flock", late)
    folder = WorkerFolder(tmp_path)
    assert len(list(tmp_path.iterdir())) == (1 if removed else 2)
    assert (folder.path / LOCK_FILE).exists()
    if not removed:
        os.close(held[0])
    folder.remove()


def test_a_file_system_without_locks_is_used_and_never_cleaned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(temporary.fcntl, "flock", unsupported)
    folder = WorkerFolder(tmp_path)
    remove_abandoned(tmp_path)
    assert folder.path.exists()
    folder.remove()
    assert not folder.path.exists()

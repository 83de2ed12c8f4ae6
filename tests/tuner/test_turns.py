"""Turns on a GPU: one process at a time, whatever becomes of the others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.tuner.turns import BusyError, turn

GPU = "0000:17:00.0"
HOLDER = """
import sys, time
from pathlib import Path
from tilewright.tuner.turns import turn
with turn(Path(sys.argv[1]), sys.argv[2], 10.0):
    print("mine", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, gpu: str) -> subprocess.Popen[str]:
    """Another process that has the GPU, until its stdin ends."""
    command = [sys.executable, "-c", HOLDER, str(folder), gpu]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "mine\n"
    return process


def test_another_process_waits_until_the_turn_is_over(tmp_path: Path) -> None:
    process = holder(tmp_path, GPU)
    with pytest.raises(BusyError, match=GPU), turn(tmp_path, GPU, 0.05):
        raise AssertionError("the GPU was another's")
    with turn(tmp_path, "0000:65:00.0", 0.05):
        pass  # another GPU is nobody's
    process.communicate("", timeout=30)
    with turn(tmp_path, GPU, 0.05):
        pass


def test_a_process_that_is_killed_gives_its_turn_back(tmp_path: Path) -> None:
    process = holder(tmp_path, GPU)
    process.kill()
    process.communicate(timeout=30)
    with turn(tmp_path, GPU, 5.0):
        pass


def test_a_turn_ends_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), turn(tmp_path, GPU, 0.05):
        raise ZeroDivisionError
    with turn(tmp_path, GPU, 0.05):
        pass


def test_no_folder_or_one_that_can_t_be_written_is_no_hindrance(tmp_path: Path) -> None:
    with turn(None, GPU, 0.05), turn(tmp_path / "missing", GPU, 0.05):
        pass


def test_other_users_may_take_the_lock(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with turn(tmp_path, GPU, 0.05):
            pass
    finally:
        os.umask(before)
    (lock,) = tmp_path.iterdir()
    assert lock.stat().st_mode & 0o777 == 0o644


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("kept")
    (tmp_path / f"tilewright-gpu-{GPU.replace(':', '-')}.lock").symlink_to(target)
    with turn(tmp_path, GPU, 0.05):
        pass
    assert target.read_text() == "kept"

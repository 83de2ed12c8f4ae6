from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.tuner.counting import SMALL
from tilewright.tuner import machine
from tilewright.tuner.machine import heed_machine_fault, machine_fault, was_killed
from tilewright.tuner.tune import autotune
from tilewright.tuning_db.errors import CompileError, MachineError
from tilewright.tuning_db.store import TuningDB


def of_errno(number: int, *names: str) -> OSError:
    return OSError(number, os.strerror(number), *names)


def because_of(reason: Exception) -> CompileError:
    """As compiling raises what Triton raised."""
    error = CompileError(f"{type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (of_errno(errno.ENOTDIR, "/dev/null/x"), "/dev/null/x: Not a directory: see to that, or name another place"),
        (of_errno(errno.EROFS, "/srv"), "/srv: Read-only file system: see to that"),
        (of_errno(errno.EMFILE, "/tmp/a"), "/tmp/a: Too many open files: raise the limit of open files"),
        (of_errno(errno.ENOSPC), "(temporary files): No space left on device: make room"),
        (MemoryError(), "out of memory: give fewer --jobs"),
    ],
)
def test_what_fails_of_the_machine_is_told_with_its_place(reason: Exception, said: str) -> None:
    assert said in machine_fault(reason)
    assert machine_fault(because_of(reason)) == machine_fault(reason)


def test_a_write_that_does_not_say_where_it_was_names_the_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert machine_fault(of_errno(errno.ENOSPC)).startswith(f"{tmp_path / 'cache'} (Triton's cache) or ")


def test_a_refusal_is_no_fault_of_the_machine() -> None:
    from triton.runtime.errors import PTXASError

    refused = PTXASError("`ptxas` failed with error code 255\nptxas /tmp/x.ptx, line 5; error : Feature 'x'")
    for error in (refused, because_of(refused), OSError("could not get source code"), KeyError("arch")):
        assert machine_fault(error) == ""


def test_where_ptxas_fails_for_want_of_room_it_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = CompileError("PTXASError: Internal Triton PTX codegen error")
    heed_machine_fault(refusal)
    monkeypatch.setattr(machine.tempfile, "tempdir", "/proc/nowhere")
    with pytest.raises(FileNotFoundError, match="/proc/nowhere"):
        heed_machine_fault(refusal)


@pytest.mark.parametrize(("code", "killed"), [(-9, True), (-11, False), (255, False)])
def test_a_ptxas_that_was_killed_may_be_no_refusal(code: int, killed: bool) -> None:
    from triton.runtime.errors import PTXASError

    try:
        try:
            raise subprocess.CalledProcessError(code, "ptxas")
        except subprocess.CalledProcessError as error:
            raise PTXASError(f"`ptxas` failed with error code {error.returncode}")  # noqa: B904 - as Triton does
    except PTXASError as error:
        refused = because_of(error)
    assert was_killed(refused) is killed


def test_a_run_that_the_machine_fails_ends_and_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "file" / "cache"
    nowhere.parent.write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(nowhere))
    with pytest.raises(MachineError, match="cache: Not a directory: see to that"):
        autotune("sm_86", problems=[SMALL], trials=1, jobs=1, db=tmp_path / "db")
    with TuningDB.open("rtx3090-82sm", tmp_path / "db", read_only=True) as database:
        assert not list(database.find())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (result,) = autotune("sm_86", problems=[SMALL], trials=1, jobs=1, db=tmp_path / "db")
    assert result.config is not None

"""What a process takes over from the notes of another, and when it doesn't."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from tilewright.kernels import identity
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import prediction_protocol, record_key, remember
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.store import TuningDB

DEVICE = resolve_device("rtx3090")
PROBLEM = GemmProblem(16, 16, 32)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A process that knows nothing yet."""
    identity.forget()
    yield
    identity.forget()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[TuningDB]:
    with TuningDB.open(DEVICE.key, tmp_path) as opened:
        yield opened


def notes(database: TuningDB) -> dict[str, str]:
    return dict(map(tuple, database._file.rows("SELECT stamp, value FROM identities")))


def test_what_was_noted_is_taken_over(database: TuningDB, monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out = record_key(GEMM, PROBLEM, DEVICE), prediction_protocol(GEMM)
    remember(GEMM, DEVICE, database)
    assert sorted(stamp.rpartition(" ")[0] for stamp in notes(database)) == ["code gemm", "prediction gemm", "ptxas 86"]
    identity.forget()
    # Were any of it worked out again, it would fail.
    monkeypatch.setattr("tilewright.kernels.lookup.module_hash", None)
    monkeypatch.setattr("tilewright.kernels.lookup.ptxas_version", None)
    identity.recall(database, GEMM, DEVICE.arch)
    assert (record_key(GEMM, PROBLEM, DEVICE), prediction_protocol(GEMM)) == worked_out


def test_notes_are_of_one_kernel_and_arch(database: TuningDB) -> None:
    remember(GEMM, DEVICE, database)
    identity.forget()
    identity.recall(database, CONV2D, 90)
    assert identity._known == {}
    identity.recall(database, CONV2D, 86)
    assert list(identity._known) == ["ptxas 86"]


@pytest.mark.parametrize("change", ["touched", "longer", "new", "gone"])
def test_changed_files_have_other_notes(
    database: TuningDB, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    (tmp_path / "code" / "ops").mkdir(parents=True)
    file = tmp_path / "code" / "ops" / "jit.py"
    file.write_text("x = 1")
    (tmp_path / "code" / "kernel.py").write_text("")
    monkeypatch.setattr(identity, "_KERNELS", str(tmp_path / "code"))
    monkeypatch.setattr(identity, "_UNSETTLED_S", 0.0)
    remember(GEMM, DEVICE, database)
    if change == "touched":
        os.utime(file, ns=(0, file.stat().st_mtime_ns))  # only the change time tells
    elif change == "longer":
        file.write_text("x = 12")
    elif change == "new":
        (file.parent / "tiles.py").write_text("")
    else:
        file.unlink()
    identity.forget()
    identity.recall(database, GEMM, DEVICE.arch)
    assert list(identity._known) == ["ptxas 86"]
    remember(GEMM, DEVICE, database)
    assert len(notes(database)) == 5


def test_what_was_changed_just_now_is_not_noted(database: TuningDB, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(identity, "_KERNELS", str(tmp_path))
    (tmp_path / "new.py").write_text("")
    remember(GEMM, DEVICE, database)
    assert [stamp.rpartition(" ")[0] for stamp in notes(database)] == ["ptxas 86"]


def test_what_changed_while_it_was_hashed_is_not_noted(
    database: TuningDB, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(identity, "_UNSETTLED_S", 0.0)
    monkeypatch.setattr(identity, "_KERNELS", str(tmp_path))
    (tmp_path / "jit.py").write_text("x = 1")
    prediction_protocol(GEMM)
    record_key(GEMM, PROBLEM, DEVICE)
    (tmp_path / "jit.py").write_text("x = 2")
    remember(GEMM, DEVICE, database)
    assert [stamp.rpartition(" ")[0] for stamp in notes(database)] == ["ptxas 86"]


@pytest.mark.parametrize("place", ["empty", "missing", "an archive"])
def test_without_source_files_nothing_is_noted(
    database: TuningDB, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "an archive").write_bytes(b"PK")
    monkeypatch.setattr(identity, "_KERNELS", str(tmp_path / place))
    remember(GEMM, DEVICE, database)
    identity.recall(database, CONV2D, DEVICE.arch)
    assert [stamp.rpartition(" ")[0] for stamp in notes(database)] == ["ptxas 86"]


@pytest.mark.parametrize("name", ["TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"])
def test_another_ptxas_is_asked_itself(database: TuningDB, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    remember(GEMM, DEVICE, database)
    identity.forget()
    monkeypatch.setenv(name, "/elsewhere/ptxas")
    identity.recall(database, GEMM, DEVICE.arch)
    assert "ptxas 86" not in identity._known
    monkeypatch.delenv(name)
    monkeypatch.setitem(vars(triton.knobs.nvidia), "ptxas", "/elsewhere/ptxas")
    identity.recall(database, GEMM, DEVICE.arch)
    assert "ptxas 86" not in identity._known


def test_a_kernel_that_is_not_registered_is_always_hashed(database: TuningDB) -> None:
    """Its code may lie where no stamp looks, under the name of one that is."""
    remember(GEMM, DEVICE, database)
    other = replace(GEMM, jit_functions=CONV2D.jit_functions)
    assert record_key(other, PROBLEM, DEVICE).kernel_hash != record_key(GEMM, PROBLEM, DEVICE).kernel_hash


def test_notes_are_the_same_for_the_next_process(database: TuningDB) -> None:
    remember(GEMM, DEVICE, database)
    program = f"""
import sys
from pathlib import Path
from tilewright.kernels import identity
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.tuning_db.store import TuningDB
with TuningDB.open({DEVICE.key!r}, Path({str(database.path.parent)!r}), read_only=True) as database:
    identity.recall(database, GEMM, 86)
print(sorted(value for _, value in identity._known.values()))
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(notes(database).values()))

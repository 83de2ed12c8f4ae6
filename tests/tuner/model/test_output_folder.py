"""The folder of a run: its own, and nobody else's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.tuner.model.output_folder import RESUME, check_output, output_folder
from tilewright.tuning_db.errors import UsageError

NAMES = ("model.fused.onnx", "report.json", "README.md")


def test_it_is_made_and_given_up(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    for _ in range(2):
        with output_folder(tmp_path / "a" / "b", NAMES, model) as folder:
            assert (folder.path, folder.resume) == (tmp_path / "a" / "b", tmp_path / "a" / "b" / RESUME)
            assert folder.resume.is_dir()
            (folder.path / "report.json").touch()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    with output_folder(tmp_path, NAMES, tmp_path / "m.onnx"):
        code = (
            "import sys; from pathlib import Path; from tilewright.tuner.model.output_folder import output_folder\n"
            "try:\n    with output_folder(Path(sys.argv[1]), (), Path('m.onnx')): print('in')\n"
            "except Exception as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        f"--output {tmp_path}: another run writes to it: wait for its end, or name another folder"
    )


def test_what_killed_runs_had_begun_is_removed(tmp_path: Path) -> None:
    (tmp_path / RESUME).mkdir()
    ours = [".model.fused.onnx.0a.part", ".model.fused.00ff.data.0a.part", f"{RESUME}/.int8.npz.0a.part"]
    theirs = [".other.onnx.0a.part", "model.fused.onnx"]
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    (tmp_path / RESUME / "files.json").write_text(json.dumps(NAMES))
    with output_folder(tmp_path, NAMES, tmp_path / "m.onnx"):
        assert not any((tmp_path / name).exists() for name in ours)
        assert all((tmp_path / name).exists() for name in theirs)


@pytest.mark.parametrize("note", [None, "{", "[" * 100_000, "1"])
def test_a_folder_without_a_note_of_its_files_is_somebody_elses(tmp_path: Path, note: str | None) -> None:
    (tmp_path / RESUME).mkdir()
    if note is not None:
        (tmp_path / RESUME / "files.json").write_text(note)
    (tmp_path / "README.md").write_text("precious")
    with pytest.raises(UsageError, match=r"its README.md was not written by autotune, and would be replaced"):
        output_folder(tmp_path, NAMES, tmp_path / "m.onnx").__enter__()
    assert (tmp_path / "README.md").read_text() == "precious"


def test_reports_and_engines_of_runs_before_are_retired(tmp_path: Path) -> None:
    engines = ("model.fp16.engine", "model.fp16.engine.json", "model.int8.engine")
    with output_folder(tmp_path, (*NAMES, *engines), tmp_path / "m.onnx") as folder:
        for name in (*NAMES, *engines, "other.engine"):
            (tmp_path / name).touch()
        folder.keep([tmp_path / name for name in (*NAMES, *engines)], tmp_path / "m.onnx")
    with output_folder(tmp_path, NAMES, tmp_path / "m.onnx") as folder, folder.staged() as new:
        files = [new / name for name in ("model.fused.onnx", "model.fp16.onnx", "report.json")]
        for file in files:
            file.write_text(file.name)
        folder.place(files[:2], files[2:])
    assert {path.name for path in tmp_path.iterdir()} == {
        *(RESUME, "model.fused.onnx", "model.fp16.onnx", "other.engine", "model.int8.engine", "report.json"),
        *(name for name in NAMES if name.endswith((".md", ".html"))),
    }
    assert (tmp_path / "report.json").read_text() == "report.json"


def test_files_are_put_in_their_places_together(tmp_path: Path) -> None:
    """With the permissions that are there, behind a link that is there; data first, the last report last."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.touch()
    elsewhere.chmod(0o600)
    build = tmp_path / "build"
    with output_folder(build, NAMES, tmp_path / "m.onnx") as folder:
        (build / "report.json").touch()
        (build / "model.fused.onnx").symlink_to(elsewhere)
        with folder.staged() as new:
            files = [new / name for name in ("model.fused.onnx", "model.fused.0123456789abcdef.data", "report.json")]
            for file in files:
                file.write_text(file.name)
            assert not (build / "report.json").read_text()
            folder.place(files[:2], files[2:])
        assert not new.exists()
    assert (build / "model.fused.onnx").is_symlink()
    assert (elsewhere.read_text(), elsewhere.stat().st_mode & 0o777) == ("model.fused.onnx", 0o600)
    assert (build / "report.json").read_text() == "report.json"


def test_what_a_killed_run_had_staged_goes(tmp_path: Path) -> None:
    left = tmp_path / RESUME / "new"
    left.mkdir(parents=True)
    (left / "model.fused.onnx").touch()
    with output_folder(tmp_path, NAMES, tmp_path / "m.onnx") as folder:
        assert not left.exists()  # gigabytes, maybe, before the minutes of a run
        with folder.staged() as new:
            assert not list(new.iterdir())


def test_the_model_is_not_replaced(tmp_path: Path) -> None:
    model, link = tmp_path / "model.fused.onnx", tmp_path / "link.onnx"
    model.touch()
    link.symlink_to(model)
    for name in (model, link):
        with pytest.raises(
            UsageError, match=r"model.fused.onnx is the model itself, and would be replaced: name another"
        ):
            output_folder(tmp_path, NAMES, name).__enter__()
    assert not (tmp_path / RESUME).exists()


@pytest.mark.parametrize("name", NAMES)
def test_other_peoples_files_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# Notes on tilewright")
    with pytest.raises(UsageError, match=rf"its {name} was not written by autotune, and would be replaced"):
        output_folder(tmp_path, NAMES, tmp_path / "m.onnx").__enter__()
    assert not (tmp_path / RESUME).exists()
    (tmp_path / name).unlink()
    for _ in range(2):  # what a run writes, one that is killed as well, is there for the next
        with output_folder(tmp_path, NAMES, tmp_path / "m.onnx"):
            (tmp_path / name).write_text("its own")
    (tmp_path / "model.int8.onnx").touch()
    with pytest.raises(UsageError, match=r"its model.int8.onnx was not written by autotune"):
        check_output(tmp_path, ["model.int8.onnx"], tmp_path / "m.onnx")


def test_data_of_models_before_is_removed(tmp_path: Path) -> None:
    old, used, theirs = (f"model.fused.{digit * 16}.data" for digit in "abc")
    model = tmp_path / "m.onnx"
    model.write_text(f"location {used} offset 0")
    (tmp_path / theirs).touch()
    for name in (old, used, "model.fused.dddddddddddddddd.data"):
        (tmp_path / name).touch()
        with output_folder(tmp_path, NAMES, model) as folder:
            folder.keep([tmp_path / "model.fused.onnx", tmp_path / name], model)
    # What the model reads, what the run wrote, and what no run did.
    assert {path.name for path in tmp_path.glob("*.data")} == {used, theirs, name}


def test_what_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UsageError, match=r"--output .*inside can't be written \(Not a directory\): name a folder that can"
    ):
        output_folder(tmp_path / "file" / "inside", (), tmp_path / "m.onnx").__enter__()
    (tmp_path / "report.json").mkdir()
    with pytest.raises(UsageError, match=r"report.json is a folder, and a file of that name is to be written"):
        output_folder(tmp_path, NAMES, tmp_path / "m.onnx").__enter__()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / RESUME).touch()
    with pytest.raises(UsageError, match=r"can't be written \(File exists\)"):
        output_folder(tmp_path / "taken", (), tmp_path / "m.onnx").__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="Permission denied"):
        output_folder(tmp_path / "new", (), tmp_path / "m.onnx").__enter__()

"""`autotune --model`: exit status, one line for a mistake, nothing half-written."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from examples.model import images, network
from tests.tuner.model.networks import written
from tests.tuner.model.qdq import quantised

ROOT = Path(__file__).parent.parent.parent.parent


def keys(value: Any, beneath: Collection[str]) -> Iterator[str]:
    """Every key of a document but those beneath some, which are names of the model's."""
    if isinstance(value, list):
        for each in value:
            yield from keys(each, beneath)
    elif isinstance(value, dict):
        for name, each in value.items():
            yield name
            if name not in beneath:
                yield from keys(each, beneath)


def test_a_model_goes_the_whole_way(autotune, tmp_path: Path, model_db: Path) -> None:
    model, data = written(tmp_path)
    build = tmp_path / "build"
    arguments = ("--device", "sm_86", "--model", model, "--output", build, "--calibration", data, "--trials", "1")
    status, out, err = autotune(*arguments, "--db", model_db)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split()[:2] == ["layer", "op"]
    (block,) = (line.split() for line in lines if line.startswith("block "))
    assert (block[1], block[-1]) == ("FusedConv2dBiasResidual", "predicted")
    assert "the whole model: " in out
    assert f"written to {build}: README.md, model.fp16.onnx, model.fused.onnx, report.html, report.json" in out
    assert "not here: times are predicted" in err
    status, out, err = autotune(*arguments, "--db", model_db, "--json", "--quiet")
    assert (status, err) == (0, "")
    assert json.loads(out) == json.loads((build / "report.json").read_text())


@pytest.mark.parametrize("missing", ["onnx", "onnx_ir", "onnxscript"])
def test_without_its_libraries_one_line_says_how_to_get_them(missing: str, tmp_path: Path) -> None:
    script = f"import sys; sys.modules[{missing!r}] = None; from tilewright.tuner.cli import main; main()"
    arguments = ("--device", "sm_86", "--model", str(tmp_path / "m.onnx"), "--output", str(tmp_path / "build"))
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.splitlines() == [
        f"autotune: error: whole models need {missing}, which is not installed: "
        "pip install onnx onnxscript onnx_ir onnxruntime"
    ]
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_came_quantised(autotune, tmp_path: Path) -> None:
    model, data = written(tmp_path)
    onnx.save(quantised(onnx.load(model), {"image": np.load(data)["image"][:2]}), model)
    status, out, _ = autotune("--device", "sm_86", "--model", model, "--calibration", data, "--dry-run")
    assert status == 0
    assert "the model came quantised: 4 of 4 layers are in 8 bits, and no other gets them" in out.splitlines()
    _, out, _ = autotune("--device", "sm_86", "--model", model, "--calibration", data, "--dry-run", "--json", "--quiet")
    assert json.loads(out)["given"] == {
        "layers": dict.fromkeys(("stem", "block", "hidden", "head"), "int8"),
        "reasons": {},
    }


def test_a_dry_run_says_what_would_be_done(autotune, tmp_path: Path) -> None:
    model, data = written(tmp_path)
    arguments = ("--device", "sm_86", "--model", model, "--calibration", data, "--dry-run")
    status, out, _ = autotune(*arguments)
    assert status == 0
    assert out.splitlines()[0].split() == ["workload", "op", "count", "GFLOP", "FLOPs", "bytes", "problem"]
    assert "of which 4 are fused" in out
    assert "came quantised" not in out
    status, out, err = autotune(*arguments, "--json", "--quiet")
    assert (status, err) == (0, "")
    (documented,) = re.findall(
        r"With `--model` and `--dry-run` it is\n\n```\n(.*?)```",
        (ROOT / "docs" / "command-line.md").read_text(),
        re.DOTALL,
    )
    for key in keys(json.loads(out), beneath=("patterns", "layers", "reasons", "ends", "problem")):
        assert f'"{key}"' in documented
    assert json.loads(out)["fusion"]["patterns"] == {
        "conv2d + activation": 2, "conv2d + residual": 1, "gemm + activation": 1,
    }  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"network.onnx", "images.npz"}


def test_a_missed_budget_is_a_failed_run(autotune, tmp_path: Path, model_db: Path) -> None:
    model, data = written(tmp_path)
    arguments = ("--device", "sm_86", "--model", model, "--output", tmp_path / "build", "--calibration", data)
    status, out, _ = autotune(*arguments, "--max-error", "sqnr=300", "--trials", "1", "--db", model_db)
    assert status == 1
    assert "outside the error budget: " in out


def test_names_are_neither_markup_nor_commands(autotune, tmp_path: Path, model_db: Path) -> None:
    model, data = written(tmp_path)
    proto = onnx.load(model)
    proto.graph.node[0].name = "blk[/0]/conv"
    proto.graph.node[-1].name = "\x1b[31mhead\n" + "n" * 300
    onnx.save(proto, model)
    arguments = ("--device", "sm_86", "--model", model, "--calibration", data)
    for more in (("--dry-run",), ("--output", tmp_path / "build", "--trials", "1", "--db", model_db)):
        status, out, err = autotune(*arguments, *more)
        assert status == 0
        assert "blk[/0]/conv" in out
        assert all(line.isprintable() for line in (out + err).splitlines())
        assert "n" * 100 not in out + err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "x:1"), "--shape goes with --model FILE"),
        (("--precision", "int8"), "--precision goes with --model FILE"),
        (("--dry-run",), "--dry-run goes with --model FILE"),
        (("--model", "m.onnx"), "--model needs --output DIR"),
        (("--model", "m.onnx", "--output", "o", "--suite", "bert"), "--suite does not go with --model"),
        (("--model", "m.onnx", "--output", "o", "--problem", "M=1,N=1,K=1"), "--problem does not go with --model"),
        (("--model", "m.onnx", "--output", "o", "--precision", "int3"), "int3"),
        (("--model", "m.onnx", "--output", "o", "--samples", "300000000"), "must be a whole number, from 2 to 65536"),
        (("--model", "nowhere.onnx", "--output", "o"), "nowhere.onnx"),
    ],
)
def test_wrong_options_are_one_line(autotune, tmp_path: Path, monkeypatch, arguments, said) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = autotune("--device", "sm_86", *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line
    assert list(tmp_path.iterdir()) == []


def spoiled(folder: Path, how: str) -> tuple[Path, Path]:
    """The network and its data, one of them spoiled."""
    model, data = written(folder)
    proto = onnx.load(model)
    if how == "text":
        model.write_text("this is no model")
    elif how == "pickle":
        model.write_bytes(pickle.dumps({"graph": []}))
    elif how == "truncated":
        model.write_bytes(model.read_bytes()[:-700])
    elif how == "cycle":
        proto.graph.node[2].input[0] = "r2"
        onnx.save(proto, model)
    elif how == "external":
        onnx.save(proto, model, save_as_external_data=True, location="weights.bin", size_threshold=16)
        (folder / "weights.bin").unlink()
    elif how == "traversal":
        (folder.parent / "weights.bin").write_bytes(bytes(100000))
        onnx.save(proto, model, save_as_external_data=True, location="weights.bin", size_threshold=16)
        spoil = onnx.load(model, load_external_data=False)
        for tensor in spoil.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../weights.bin"
        onnx.save(spoil, model)
    elif how == "dims":
        onnx.save(network("batch"), model)
    elif how == "nan":
        tensor = next(each for each in proto.graph.initializer if each.name == "w3")
        array = np.array(onnx.numpy_helper.to_array(tensor))
        array[3, 5] = np.nan
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
        onnx.save(proto, model)
    elif how == "none":
        np.savez(data, image=images(2)[:0])
    elif how == "shape":
        np.savez(data, image=images(4)[:, :, 1:])
    elif how == "name":
        np.savez(data, picture=images(4))
    return model, data


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("text", "network.onnx"),
        ("pickle", "network.onnx"),
        ("truncated", "network.onnx"),
        ("cycle", "the graph is cyclic: "),
        ("external", "weights.bin"),
        ("traversal", "../weights.bin"),
        ("dims", "--shape"),
        ("nan", "NaN"),
        ("none", "image"),
        ("shape", "(4, 3, 11, 12)"),
        ("name", "picture"),
    ],
)
def test_spoiled_files_are_one_line_and_nothing_is_written(autotune, tmp_path: Path, how, said) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    model, data = spoiled(folder, how)
    build = tmp_path / "build"
    status, out, err = autotune(
        "--device", "sm_86", "--model", model, "--output", build, "--calibration", data, "--quiet"
    )  # fmt: skip
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line
    assert "defect of Tilewright" not in line
    assert not build.exists()


@pytest.mark.parametrize("dry_run", [False, True])
def test_paths_are_looked_at_before_the_model_is_read(autotune, tmp_path: Path, monkeypatch, dry_run: bool) -> None:
    from tilewright.tuner.model import flow

    def read(*_: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr(flow, "prepare", read)
    model, _ = written(tmp_path)
    file, other = tmp_path / "file", tmp_path / "other"
    file.touch()
    other.mkdir()
    (other / "README.md").write_text("of somebody")
    link, long = tmp_path / "link", tmp_path / ("x" * 300)
    link.symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    good = ("--output", tmp_path / "build")
    for more, said in (
        (("--output", other), f"--output {other}: its README.md was not written by autotune"),
        (("--output", file), f"--output {file} is a file: name a folder"),
        (
            ("--output", file / "in"),
            f"--output {file / 'in'} can't be written ({file} is a file): name a folder that can",
        ),
        (("--output", link), f"--output {link} can't be written ({link} leads nowhere): name a folder that can"),
        (("--output", long), "can't be looked at: File name too long"),
        ((*good, "--calibration", long), "can't be looked at: File name too long"),
        ((*good, "--db", long), "can't be looked at: File name too long"),
        ((*good, "--db", ""), "the folder of the databases (--db) is empty: name one"),
        ((*good, "--db", file), f"{file} is a file: name the folder it is in (--db)"),
        (
            (*good, "--calibration", tmp_path / "absent"),
            f"--calibration {tmp_path / 'absent'} isn't there: give an .npz",
        ),
    ):
        dry = ("--dry-run",) if dry_run else ()
        status, out, err = autotune("--device", "sm_86", "--model", model, *more, *dry)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert said in err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_can_not_be_written_is_one_line(autotune, tmp_path: Path) -> None:
    model, data = written(tmp_path)
    file = tmp_path / "file"
    file.touch()
    arguments = ("--device", "sm_86", "--model", model, "--calibration", data, "--quiet")
    for output, said in ((file, "is a file"), (file / "build", "can't be written")):
        status, out, err = autotune(*arguments, "--output", output)
        assert (status, out) == (2, "")
        assert said in err
        assert len(err.splitlines()) == 1

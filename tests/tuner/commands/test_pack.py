from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.tuner.commands.test_exchange import fill, record
from tilewright.kernels.pack import Pack
from tilewright.tuner import packing


@pytest.mark.smoke
def test_what_is_on_record_is_packed(autotune, tmp_path: Path) -> None:
    output = tmp_path / "my out.pack"
    fill(tmp_path / "db", record(3.0), record(2.0, tile=1))
    status, out, err = autotune("pack", "--device", "sm_86", "--db", tmp_path / "db", "--output", output, "--jobs", "1")
    assert status == 0
    digest = hashlib.sha256(output.read_bytes()).hexdigest()
    line, hash_line = out.splitlines()
    assert line.startswith(f"{output}: 1 problem of rtx3090-82sm (1 measured), 1 kernel, ")
    assert hash_line == f"SHA-256 {digest}"
    assert f"`export TILEWRIGHT_PACK='{output}'`" in err
    (entry,) = Pack(output).entries
    assert (entry.op, entry.config, entry.time_us) == ("gemm", record(2.0, tile=1).config, 2.0)


def test_named_problems_and_constants(autotune, tmp_path: Path) -> None:
    output = tmp_path / "out.pack"
    problem = ("--kernel", "rmsnorm", "--problem", "M=16,N=64")
    arguments = ("--constant", "eps=1e-5", "--constant", "eps=0.5", "--json", "--jobs", "1", "--db", tmp_path)
    status, out, err = autotune("pack", "--device", "a10", "--output", output, *problem, *arguments)
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["device"] == "a10-72sm"
    assert document["sha256"] == hashlib.sha256(output.read_bytes()).hexdigest()
    assert document["bytes"] == output.stat().st_size
    assert document["kernels"] == 3
    (problem,) = document["problems"]
    assert (problem["op"], problem["provenance"]) == ("rmsnorm", "predicted")


def test_what_a_program_called(autotune, tmp_path: Path) -> None:
    output, calls = tmp_path / "out.pack", tmp_path / "calls.txt"
    calls.write_text("gemm M=16,N=16,K=16\nrmsnorm M=16,N=64\n")
    arguments = ("--calls", calls, "--kernel", "rmsnorm", "--json", "--jobs", "1", "--db", tmp_path)
    status, out, err = autotune("pack", "--device", "a10", "--output", output, *arguments)
    assert (status, err) == (0, "")
    assert [problem["op"] for problem in json.loads(out)["problems"]] == ["rmsnorm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "there is nothing to pack: no result for a10-72sm is on record in {db}: tune the device first, or name "),
        (("--kernel", "conv2d"), "no result of conv2d for a10-72sm is on record in {db}"),
        (("--kernel", "gem"), "did you mean gemm?"),
        (("--suite", "bert"), "unknown suite 'bert'"),
        (("--problem", "M=1"), "missing N, K"),
        (("--problem", "M=16,N=16,K=16", "--constant", "eps"), "--constant 'eps' is not NAME=NUMBER, as in eps=1e-5"),
        (("--problem", "M=16,N=16,K=16", "--constant", "eps=1e-5"), "no problem to pack takes a constant 'eps'"),
        (("--jobs", "0"), "--jobs"),
    ],
)
def test_a_mistake_is_one_line(autotune, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    output, db = tmp_path / "out.pack", tmp_path / "db"
    db.mkdir()
    status, out, err = autotune("pack", "--device", "a10", "--output", output, "--db", db, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message.format(db=db) in err
    assert list(tmp_path.rglob("*")) == [db]


def test_a_pack_replaces_no_database(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "Pool", None)  # nothing is compiled for it
    path = fill(tmp_path, record(3.0))
    before = path.read_bytes()
    status, out, err = autotune("pack", "--device", "rtx3090", "--db", tmp_path, "--output", path)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{path} is a database, which would be lost" in err
    assert path.read_bytes() == before


def test_where_it_cannot_be_written(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "Pool", None)  # nothing is compiled for it
    for output, reason in ((tmp_path, "is a folder"), (tmp_path / "absent" / "p", "can't be written (No such file")):
        status, _, err = autotune("pack", "--device", "a10", "--output", output, "--problem", "M=16,N=16,K=16")
        assert (status, err.count("\n")) == (2, 1)
        assert reason in err


def test_no_pack_is_written_to_stdout(autotune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stdout is: a pipe, or a file that the shell opened, which the pack would take the place of."""
    monkeypatch.setattr(packing, "Pool", None)  # nothing is compiled for it
    for output in ("-", "/dev/stdout", "/proc/self/fd/1"):
        status, out, err = autotune("pack", "--device", "a10", "--output", output, "--problem", "M=16,N=16,K=16")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"a pack is a file that programs open by its name: --output can't be stdout ({output})" in err


def test_a_frozen_process_makes_no_pack_and_tunes_nothing(autotune, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    problem = ("--problem", "M=16,N=16,K=16", "--db", tmp_path)
    for command in (("pack", "--device", "a10", "--output", tmp_path / "p", *problem), ("--device", "a10", *problem)):
        status, out, err = autotune(*command)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "TILEWRIGHT_FROZEN is set: n" in err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "perhaps")
    status, _, err = autotune("--device", "a10", *problem)
    assert (status, err.count("\n")) == (2, 1)
    assert "TILEWRIGHT_FROZEN='perhaps' is neither on nor off" in err

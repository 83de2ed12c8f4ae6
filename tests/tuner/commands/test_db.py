from __future__ import annotations

import json
import os
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tuner.commands.test_exchange import DEVICE, fill, kept, record
from tilewright.tuner import cli
from tilewright.tuning_db import Provenance


def test_path(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert autotune("db", "path", "--db", tmp_path) == (0, f"{tmp_path}\n", "")
    monkeypatch.setenv("TILEWRIGHT_DB_DIR", str(tmp_path / "from variable"))
    assert autotune("db", "path", "--device", "sm_86")[1] == f"{tmp_path}/from variable/rtx3090-82sm.sqlite\n"
    assert list(tmp_path.iterdir()) == []


def test_path_of_a_name_that_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary) -> None:
    monkeypatch.setattr(sys, "argv", ["autotune", "db", "path", "--db", os.fsdecode(bytes(tmp_path) + b"/db\xff")])
    with pytest.raises(SystemExit):
        cli.main()
    assert capfdbinary.readouterr().out == bytes(tmp_path) + b"/db\xff\n"


def test_without_a_command_of_its_own_it_shows_the_help(autotune) -> None:
    status, out, err = autotune("db")
    assert (status, out) == (2, "")
    assert err.startswith("Usage: autotune db ")
    lines = err.splitlines()
    assert {"path", "stats", "check", "prune"} <= {line.split()[0] for line in lines if line.startswith("  ")}


def test_stats(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path, record(3.0), record(2.0, tile=1))
    status, out, err = autotune("db", "stats", "--db", tmp_path)
    assert status == 0
    header, row = out.splitlines()
    cells = dict(zip(header.split(), row.split(), strict=True))
    assert cells["database"] == "rtx3090-82sm.sqlite"
    assert [cells[name] for name in ("records", "ok", "measured", "predicted", "problems")] == ["2", "2", "2", "0", "1"]
    assert err == f"databases in {tmp_path}: 1\n"
    status, out, _ = autotune("db", "stats", "--db", tmp_path, "--device", "rtx3090", "--json")
    (database,) = json.loads(out)["databases"]
    assert database["path"] == str(path)
    assert database["devices"] == [DEVICE.key]
    assert database["counts"] == [{"status": "ok", "provenance": "measured", "records": 2}]
    assert [revision["op"] for revision in database["revisions"]] == ["gemm"]


def test_stats_of_a_folder_with_a_file_that_cannot_be_read(autotune, tmp_path: Path) -> None:
    fill(tmp_path, record(3.0))
    (tmp_path / "a10-72sm.sqlite").write_text("no database " * 99)
    status, out, err = autotune("db", "stats", "--db", tmp_path)
    assert status == 2
    assert "rtx3090-82sm.sqlite" in out
    assert "a10-72sm.sqlite is damaged or no database" in err
    (tmp_path / "empty").mkdir()
    assert autotune("db", "stats", "--db", tmp_path / "empty")[:2] == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        ("db", "stats"),
        ("db", "check"),
        ("db", "prune", "--device", "a10"),
        ("show", "--device", "a10"),
        ("pack", "--device", "a10", "--output", "out.pack"),
        ("pack", "--device", "a10", "--output", "out.pack", "--problem", "M=16,N=16,K=16"),
    ],
)
def test_a_folder_that_is_none_is_a_mistake(
    autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = fill(tmp_path, record(3.0))
    for folder, kind in (
        (path, "a file: name the folder it is in"),
        (tmp_path / "absent", "not there: name the folder"),
    ):
        status, out, err = autotune(*command, "--db", folder)
        assert (status, out) == (2, "")
        assert f"{folder} is {kind}" in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out.pack").exists()


def test_checking_where_there_is_none_says_so(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    own.mkdir()
    status, _, err = autotune("db", "check", "--db", own)
    assert status == 0
    assert err.startswith(f"there is no database in {own}")
    for command in ("check", "stats"):
        status, out, err = autotune("db", command, "--device", "rtx3090", "--db", own)
        wanted = f"autotune: error: there is no {own}/rtx3090-82sm.sqlite: tune that device first, or name its folder"
        assert (status, out, err) == (2, "", f"{wanted} (--db)\n")
    shipped = fill(tmp_path / "shipped", record(2.0))
    monkeypatch.setenv("TILEWRIGHT_SHIPPED", str(shipped.parent))
    only = f"there is no database in {own}: only what was shipped was checked\n"
    assert autotune("db", "check", "--device", "rtx3090", "--db", own) == (0, f"{shipped}: ok\n", only)
    assert autotune("db", "stats", "--device", "rtx3090", "--db", own)[0] == 0


def test_shipped_databases_are_shown_and_checked_too(autotune, tmp_path: Path, monkeypatch) -> None:
    own, shipped = fill(tmp_path / "own", record(3.0)), fill(tmp_path / "shipped", record(2.0), record(1.0, tile=1))
    (shipped.parent / "a10-72sm.sqlite").write_text("no database " * 99)
    monkeypatch.setenv("TILEWRIGHT_SHIPPED", str(shipped.parent))
    status, out, err = autotune("db", "stats", "--db", own.parent, "--device", "rtx3090")
    assert status == 0
    assert [line.rsplit(maxsplit=8)[0].split("  ")[0] for line in out.splitlines()[1:]] == [
        "rtx3090-82sm.sqlite",
        "rtx3090-82sm.sqlite (shipped)",
    ]
    assert err == f"databases in {own.parent}: 1, and 1 shipped in {shipped.parent}\n"
    status, out, err = autotune("db", "stats", "--db", own.parent, "--json")
    assert status == 2
    assert "a10-72sm.sqlite is damaged or no database" in err
    assert [(each["path"], each["shipped"]) for each in json.loads(out)["databases"]] == [
        (str(own), False),
        (str(shipped), True),
    ]
    status, out, _ = autotune("db", "check", "--db", own.parent)
    assert status == 1
    assert f"{own}: ok\n" in out
    assert f"{shipped}: ok\n" in out
    # Named as a folder of databases, it is shown as one, and once.
    status, out, _ = autotune("db", "stats", "--db", shipped.parent, "--device", "rtx3090", "--json")
    assert [each["shipped"] for each in json.loads(out)["databases"]] == [False]


def test_check(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path, record(3.0))
    assert autotune("db", "check", "--db", tmp_path) == (0, f"{path}: ok\n", "")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE records SET op = 'conv2d'")
    (tmp_path / "a10-72sm.sqlite").write_text("no database " * 99)
    status, out, _ = autotune("db", "check", "--db", tmp_path)
    assert status == 1
    damaged, edited = out.splitlines()
    assert damaged.startswith(f"{tmp_path}/a10-72sm.sqlite: is damaged or no database") or "a10-72sm.sqlite" in damaged
    assert edited == f"{path}: record 1: it doesn't match its key"
    status, out, _ = autotune("db", "check", "--db", tmp_path, "--device", "rtx3090", "--json")
    assert status == 1
    assert json.loads(out)["databases"] == [
        {"path": str(path), "ok": False, "findings": ["record 1: it doesn't match its key"]}
    ]


def test_prune(autotune, tmp_path: Path) -> None:
    current = record(3.0)
    stale = replace(current, key=replace(current.key, kernel_hash="of old"), created_at="2025-01-01T00:00:00+00:00")
    predicted = replace(stale, provenance=Provenance.PREDICTED)
    path = fill(tmp_path, current, stale, predicted)
    before = path.read_bytes()
    status, out, _ = autotune("db", "prune", "--device", "rtx3090", "--db", tmp_path, "--dry-run")
    assert (status, out) == (0, f"{path}: 1 records and 0 runs would be removed\n")
    assert path.read_bytes() == before
    status, out, _ = autotune("db", "prune", "--device", "rtx3090", "--db", tmp_path)
    assert out.startswith(f"{path}: 1 records and 0 runs removed")
    assert len(kept(tmp_path)) == 2
    arguments = ("--older-than", "30", "--json")
    status, out, _ = autotune("db", "prune", "--device", "rtx3090", "--db", tmp_path, *arguments)
    document = json.loads(out)
    assert (document["records"], document["dry_run"]) == (1, False)
    assert kept(tmp_path) == [replace(current, created_at="")]


def test_a_dry_run_only_reads(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "a10-72sm.sqlite"
    damaged.write_text("no database " * 99)
    status, out, err = autotune("db", "prune", "--device", "a10", "--db", tmp_path, "--dry-run")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{damaged} is damaged or no database" in err
    assert list(tmp_path.iterdir()) == [damaged]
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    path = fill_frozen(tmp_path / "frozen", monkeypatch)
    arguments = ("db", "prune", "--device", "rtx3090", "--db", path.parent)
    assert autotune(*arguments, "--dry-run")[:2] == (0, f"{path}: 0 records and 0 runs would be removed\n")
    status, _, err = autotune(*arguments)
    assert status == 2
    assert "TILEWRIGHT_FROZEN is set: nothing is written" in err


def fill_frozen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was filled while this process was not frozen."""
    with monkeypatch.context() as thawed:
        thawed.delenv("TILEWRIGHT_FROZEN")
        return fill(folder, record(3.0))


def test_a_file_under_the_name_of_another_board_is_refused(autotune, counted, tmp_path: Path) -> None:
    path = fill(tmp_path, record(3.0))
    path.rename(wrong := tmp_path / "h100-132sm.sqlite")
    before = wrong.read_bytes()
    said = f"{wrong}: its records are of 'rtx3090-82sm', whose file is rtx3090-82sm.sqlite: rename it"
    assert autotune("db", "check", "--db", tmp_path)[1] == f"{said}\n"
    (tmp_path / "arriving").mkdir()
    header = {"format": "tilewright-records", "version": 1, "device": "h100-132sm", "runs": 0, "records": 0}
    (tmp_path / "arriving" / "some.jsonl").write_text(json.dumps(header) + "\n")
    problem = ("--problem", "M=64,N=64,K=64")
    for command in (
        ("show", "--device", "h100"),
        ("export", "--device", "h100"),
        ("db", "prune", "--device", "h100"),
        ("db", "prune", "--device", "h100", "--dry-run"),
        ("pack", "--device", "h100", "--output", tmp_path / "out.pack"),
        ("pack", "--device", "h100", "--output", tmp_path / "out.pack", *problem),
        ("--device", "h100", *problem),
        ("import", tmp_path / "arriving" / "some.jsonl"),
    ):
        status, out, err = autotune(*command, "--db", tmp_path)
        assert (status, out, err.splitlines()[-1]) == (2, "", f"autotune: error: {said}")
    assert wrong.read_bytes() == before
    assert [*tmp_path.glob("*.sqlite"), *tmp_path.glob("*.pack")] == [wrong]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune",), "Missing option '--device'"),
        (("prune", "--device", "a10"), "a10-72sm.sqlite: nothing to prune"),
        (("prune", "--device", "a10", "--older-than", "800000"), "'800000' must be a whole number, from 0 to 36500"),
        (("prune", "--device", "a10", "--older-than", "-1"), "--older-than"),
        (("stats", "--device", "rtx309"), "no device is called"),
        (("mend",), "No such command 'mend'"),
    ],
)
def test_a_mistake_is_one_line(autotune, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = autotune("db", *arguments, *(() if "mend" in arguments else ("--db", tmp_path)))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "db").exists()

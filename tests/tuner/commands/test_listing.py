"""What the listing commands list; `autotune show` is tested with a run, in test_cli.py."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace

import pytest

from tests.tuner.commands.test_exchange import fill, record


@pytest.mark.smoke
def test_devices_lists_every_board(autotune) -> None:
    from tilewright.kernels.catalogue import CATALOGUE

    status, out, _ = autotune("devices")
    assert status == 0
    header, *rows = out.splitlines()
    assert {device.board for device in CATALOGUE} <= {line.split()[0] for line in rows}
    assert header.endswith("  note")
    (reference,) = [line for line in rows if line.endswith("reference board of sm_86")]
    assert reference.startswith("rtx3090 ")


@pytest.mark.smoke
def test_suites_lists_every_suite_and_its_ops(autotune) -> None:
    from tilewright.tuner.suites import SUITES

    status, out, _ = autotune("suites")
    assert status == 0
    header, *rows = (line.split() for line in out.splitlines())
    assert header[:2] == ["suite", "workloads"]
    assert set(header[2:]) == {workload.op for workload in SUITES["all"]}
    assert {row[0]: int(row[1]) for row in rows} == {name: len(suite) for name, suite in SUITES.items()}
    for row in rows:
        assert sum(map(int, row[2:])) == int(row[1])


@pytest.mark.smoke
def test_devices_and_suites_as_json(autotune) -> None:
    from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS
    from tilewright.tuner.suites import SUITES

    status, out, err = autotune("devices", "--json")
    assert (status, err) == (0, "")
    listed = {each["board"]: each for each in json.loads(out)["devices"]}
    assert listed.keys() >= {device.board for device in CATALOGUE}
    assert {name for name, each in listed.items() if each["reference"]} == set(REFERENCE_BOARDS.values())
    a10 = listed["a10"]
    assert (a10["key"], a10["arch"], a10["sms"], a10["live"]) == ("a10-72sm", "sm_86", 72, "")
    assert a10["tensor_tflops"]["fp16"] > 0
    status, out, err = autotune("suites", "--json")
    assert (status, err) == (0, "")
    suites = json.loads(out)["suites"]
    assert {each["suite"]: each["workloads"] for each in suites} == {name: len(all_) for name, all_ in SUITES.items()}
    assert all(sum(each["ops"].values()) == each["workloads"] for each in suites)


def test_show_as_json(autotune, tmp_path, monkeypatch) -> None:
    shipped = fill(tmp_path / "shipped", record(3.0))
    mine = record(4.0)
    old = replace(mine, key=replace(mine.key, kernel_hash="a" * 64))
    own = fill(tmp_path / "own", mine, old)
    monkeypatch.setenv("TILEWRIGHT_SHIPPED", str(shipped.parent))
    status, out, err = autotune("show", "--device", "rtx3090", "--db", own.parent, "--json")
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["device"] == "rtx3090-82sm"
    assert [(each["path"], each["shipped"]) for each in document["databases"]] == [
        (str(own), False),
        (str(shipped), True),
    ]
    here, there = (each["results"] for each in document["databases"])
    assert {each["kernel_hash"]: each["current"] for each in here} == {mine.key.kernel_hash: True, "a" * 64: False}
    (only,) = there
    assert (only["op"], only["problem"], only["config"]) == ("gemm", mine.key.problem, mine.config)
    assert (only["time_us"], only["provenance"], only["triton"]) == (3.0, "measured", mine.key.triton)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("TILEWRIGHT_SHIPPED", "0")
    status, out, err = autotune("show", "--device", "rtx3090", "--db", tmp_path / "empty", "--json")
    assert (status, err, json.loads(out)["databases"][0]["results"]) == (0, "", [])


def test_show_of_a_device_that_nothing_is_on_record_for(autotune, tmp_path) -> None:
    status, out, err = autotune("show", "--device", "a10", "--db", tmp_path)
    assert (status, out) == (0, "")
    assert err.startswith("0 results on record in ")
    assert list(tmp_path.iterdir()) == []


def test_show_says_what_was_tuned_here_and_what_was_shipped(autotune, tmp_path, monkeypatch) -> None:
    shipped = fill(tmp_path / "shipped", record(3.0))
    (tmp_path / "own").mkdir()
    monkeypatch.setenv("TILEWRIGHT_SHIPPED", str(shipped.parent))
    status, out, err = autotune("show", "--device", "rtx3090", "--db", tmp_path / "own")
    assert status == 0
    header, row = out.splitlines()
    assert header.split()[-2:] == ["from", "when"]
    assert row.split()[-2] == "shipped"
    own = tmp_path / "own" / shipped.name
    assert err == f"0 results on record in {own}, 1 shipped in {shipped}\n"
    assert not own.exists()
    fill(own.parent, record(4.0))
    _, out, err = autotune("show", "--device", "rtx3090", "--db", own.parent)
    assert [line.split()[-2] for line in out.splitlines()[1:]] == ["here", "shipped"]
    assert err == f"1 results on record in {own}, 1 shipped in {shipped}\n"


def test_show_tells_revisions_apart(autotune, tmp_path) -> None:
    mine = record(3.0)
    fill(tmp_path, mine, *(replace(mine, key=replace(mine.key, kernel_hash=mark * 64)) for mark in "ab"))
    status, out, err = autotune("show", "--device", "rtx3090", "--db", tmp_path)
    assert status == 0
    header, *rows = (line.split() for line in out.splitlines())
    place = header.index("revision") - len(header)
    assert header[place - 1] == "provenance"
    assert sorted(row[place] for row in rows) == ["aaaaaaaa", "bbbbbbbb", "this"]
    assert {row[place - 1] for row in rows} == {"measured"}
    assert err.startswith("3 results on record")


def test_show_of_an_op_that_is_gone(autotune, tmp_path) -> None:
    mine = record(3.0)
    fill(tmp_path, replace(mine, key=replace(mine.key, op="gone")))
    status, out, _ = autotune("show", "--device", "rtx3090", "--db", tmp_path)
    assert status == 0
    assert mine.key.kernel_hash[:8] in out


@pytest.mark.parametrize(("config", "shown"), [("x", "x"), ("[1]", "[1]"), ('{"BLOCK_M":7,"of_old":true}', "7 of_old")])
def test_show_of_a_configuration_that_is_none_shows_what_there_is(autotune, tmp_path, config: str, shown: str) -> None:
    path = fill(tmp_path, record(3.0))
    with closing(sqlite3.connect(path)) as raw, raw:
        raw.execute("UPDATE records SET config = ?", (config,))
    status, out, _ = autotune("show", "--device", "rtx3090", "--db", tmp_path)
    assert status == 0
    assert f" {shown} " in out.splitlines()[1]


def test_show_of_what_is_no_text_for_a_terminal(autotune, tmp_path) -> None:
    mine = record(3.0)
    key = replace(mine.key, op="[/op]", problem='{"a":"[/b]"}', triton="3.9\x1b[2JX")
    fill(tmp_path, replace(mine, key=key, config='{"a":"[/c]"}'))
    status, out, _ = autotune("show", "--device", "rtx3090", "--db", tmp_path)
    assert status == 0
    assert "\x1b" not in out
    assert [text in out for text in ("[/op]", '{"a":"[/b]"}', "[/c]", "3.9?[2JX")] == [True] * 4
    assert autotune("db", "stats", "--db", tmp_path)[0] == 0

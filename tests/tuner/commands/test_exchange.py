"""Records from one folder to another: exports, imports and merges as people type them."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.tuning_db.test_file import no_space
from tilewright.kernels import GemmProblem, choose, resolve_device
from tilewright.kernels.lookup import prediction_protocol, record_key
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.tuner.commands import exchange
from tilewright.tuner.installation import default_text
from tilewright.tuner.temporary import LOCK_FILE, PREFIX
from tilewright.tuning_db import (
    DatabaseAccessError,
    Environment,
    Provenance,
    Record,
    Resources,
    Status,
    Times,
    TuningDB,
    interchange,
)

DEVICE = resolve_device("rtx3090")
PROBLEM = GemmProblem(64, 64, 128)


def record(time_us: float, samples: int = 10, tile: int = 0) -> Record:
    config = GEMM.space.configs(PROBLEM, DEVICE)[tile].to_json()
    times, resources = Times(time_us, time_us, time_us, samples), Resources(64, 0, 0, 4096)
    return Record(record_key(GEMM, PROBLEM, DEVICE), config, Status.OK, Provenance.MEASURED, times, resources)


def fill(folder: Path, *records: Record) -> Path:
    with TuningDB.open(DEVICE.key, folder) as db:
        db.add_many(records, db.start_run(Environment("0.1.0", "3.9.0", "12.9.86", "3.12", folder.name, "cold-l2-1")))
        return db.path


def kept(folder: Path) -> list[Record]:
    with TuningDB.open(DEVICE.key, folder, read_only=True) as db:
        return [replace(record, created_at="") for record in db.find()]


@pytest.fixture
def stdin(monkeypatch):
    def give(text: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))

    return give


def test_a_round_trip_gives_the_same_bytes(autotune, tmp_path: Path, stdin) -> None:
    fill(tmp_path / "here", record(3.0), record(2.0, tile=1))
    out = tmp_path / "out.jsonl"
    status, text, err = autotune("export", "--device", "sm_86", "--db", tmp_path / "here", "--output", out)
    assert (status, text) == (0, "")
    assert err == f"2 records of rtx3090-82sm exported to {out}\n"
    status, text, err = autotune("import", out, "--db", tmp_path / "there")
    assert status == 0
    assert text.startswith(f"{out}: 2 records: 2 added, 0 replaced, ")
    assert kept(tmp_path / "there") == kept(tmp_path / "here")
    status, text, err = autotune("export", "--device", "rtx3090", "--db", tmp_path / "there", "--kernel", "gemm")
    assert text.encode() == out.read_bytes()
    stdin(out.read_bytes())
    status, text, err = autotune("import", "-", "--db", tmp_path / "there", "--json")
    (document,) = json.loads(text)
    assert document["source"] == "stdin"
    assert (document["added"], document["known"]) == (0, 2)


def test_the_best_few_and_the_default(autotune, tmp_path: Path) -> None:
    default = replace(record(9.0), config=str(default_text("gemm", PROBLEM.to_json(), DEVICE)))
    others = [each for each in (record(2.0 + tile, tile=tile) for tile in range(4)) if each.config != default.config]
    failed = replace(record(1.0, tile=4), status=Status.INCORRECT, times=None)
    fill(tmp_path / "here", default, *others, failed)
    out = tmp_path / "out.jsonl"
    status, text, err = autotune(
        "export", "--device", "rtx3090", "--db", tmp_path / "here", "--best", "2", "--output", out
    )
    assert (status, text, err) == (0, "", f"3 records of rtx3090-82sm exported to {out}\n")
    assert autotune("import", out, "--db", tmp_path / "there")[0] == 0
    assert {each.config for each in kept(tmp_path / "there")} == {default.config, *(o.config for o in others[:2])}


def test_a_database_to_be_shipped_is_answered_from(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "here", record(3.0), record(2.0, tile=1), record(1.0, tile=2))
    out = tmp_path / "shipped" / "rtx3090-82sm.sqlite"
    command = ("export", "--device", "rtx3090", "--best", "1", "--format", "sqlite", "--output", out)
    status, _, err = autotune(*command, "--db", tmp_path / "here")
    assert (status, err.count("\n")) == (2, 1)
    assert "name a file in a folder that can" in err
    out.parent.mkdir()
    status, text, err = autotune(*command, "--db", tmp_path / "here")
    assert (status, text) == (0, "")
    assert err == f"1 records of rtx3090-82sm exported to {out}\n"
    monkeypatch.setenv("TILEWRIGHT_SHIPPED", str(out.parent))
    monkeypatch.setenv("TILEWRIGHT_DB_DIR", str(tmp_path / "fresh"))
    choice = choose(GEMM, PROBLEM, DEVICE)
    assert (choice.time_us, choice.reason) == (1.0, "exact, shipped")
    first = out.read_bytes()
    # The shipped folder is a folder of databases like any other: a file of it is made again from itself.
    assert autotune(*command, "--db", out.parent)[0] == 0
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_of_a_database_to_be_shipped_it_is_said_what_is_never_answered_as_measured(autotune, tmp_path: Path) -> None:
    old = record(2.0)
    fill(tmp_path, record(3.0, tile=1), replace(old, key=replace(old.key, kernel_hash="of old")))
    out = tmp_path / "out.sqlite"
    _, _, err = autotune("export", "--device", "rtx3090", "--format", "sqlite", "--output", out, "--db", tmp_path)
    assert err.splitlines() == [
        f"2 records of rtx3090-82sm exported to {out}",
        "1 of them are of other kernels or another timing protocol than these: answered as transferred only",
    ]


def test_predictions_in_a_database_to_be_shipped_are_told_apart(autotune, tmp_path: Path) -> None:
    guess = record(2.0)
    key = replace(guess.key, protocol=prediction_protocol(GEMM))
    fill(tmp_path, record(3.0, tile=1), replace(guess, key=key, provenance=Provenance.PREDICTED))
    command = ("export", "--device", "rtx3090", "--format", "sqlite", "--db", tmp_path, "--output")
    _, _, err = autotune(*command, tmp_path / "all.db")
    assert err.splitlines()[1:] == [
        "1 of them are predictions, which no lookup asks a shipped file for: --best leaves them out"
    ]
    assert autotune(*command, tmp_path / "few.db", "--best", "1")[2].count("\n") == 1


def test_where_nothing_was_measured_there_is_no_best(autotune, tmp_path: Path) -> None:
    guesses = [replace(record(2.0, tile=tile), provenance=Provenance.PREDICTED) for tile in range(2)]
    fill(tmp_path / "here", *guesses)
    out = tmp_path / "out"
    command = ("export", "--device", "rtx3090", "--best", "3", "--db", tmp_path / "here")
    for more in ((), ("--output", out), ("--format", "sqlite", "--output", out), ("--kernel", "gemm")):
        status, text, err = autotune(*command, *more)
        assert (status, text, err.count("\n")) == (2, "", 1)
        assert "none of the 2 records of rtx3090-82sm is a measured time, and --best takes no other" in err
    assert not out.exists()
    assert autotune(*command, "--kernel", "conv2d", "--output", out)[0] == 0  # of which there are none at all


@pytest.mark.parametrize("form", ["jsonl", "sqlite"])
def test_an_export_replaces_no_database(autotune, tmp_path: Path, form: str) -> None:
    path = fill(tmp_path, record(3.0))
    (tmp_path / "link").symlink_to(path)
    for output in (path, tmp_path / "link"):
        before = path.read_bytes()
        command = ("export", "--device", "rtx3090", "--db", tmp_path, "--format", form, "--output", output)
        status, out, err = autotune(*command)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{output} is a database, which would be lost: name another file (--output)" in err
        assert path.read_bytes() == before


def test_lines_replace_no_shipped_database(autotune, tmp_path: Path) -> None:
    fill(tmp_path / "here", record(3.0))
    out = tmp_path / "shipped.sqlite"
    command = ("export", "--device", "rtx3090", "--db", tmp_path / "here", "--output", out)
    for _ in range(2):
        assert autotune(*command, "--format", "sqlite")[0] == 0
    before = out.read_bytes()
    status, _, err = autotune(*command)
    assert status == 2
    assert "is a database, which would be lost" in err
    assert out.read_bytes() == before


def test_evidence_decides(autotune, tmp_path: Path) -> None:
    fill(tmp_path / "here", record(3.0, samples=10), record(5.0, samples=50, tile=1))
    fill(tmp_path / "there", record(4.0, samples=20), record(2.0, samples=5, tile=1), record(9.0, tile=2))
    status, text, _ = autotune("merge", tmp_path / "there", "--db", tmp_path / "here", "--json")
    assert status == 0
    (document,) = json.loads(text)
    counts = {name: document[name] for name in ("added", "replaced", "kept", "known")}
    assert counts == {"added": 1, "replaced": 1, "kept": 1, "known": 0}
    assert sorted(each.times.median_us for each in kept(tmp_path / "here")) == [4.0, 5.0, 9.0]
    with TuningDB.open(DEVICE.key, tmp_path / "here", read_only=True) as db:
        assert [environment.host for _, environment in db.runs().values()] == ["here", "there"]


def test_a_database_of_a_former_schema_is_merged_and_stays(autotune, tmp_path: Path) -> None:
    schemas = Path(__file__).parents[2] / "tuning_db" / "schemas"
    source = Path(shutil.copy(schemas / "s0001_runs_and_records.sqlite", tmp_path / "of old.sqlite"))
    before = source.read_bytes()
    assert autotune("merge", source, "--db", tmp_path / "here")[0] == 0
    assert source.read_bytes() == before
    text = autotune("export", "--device", "rtx3090", "--db", tmp_path / "here")[1]
    assert text.encode() == (schemas / "s0001_runs_and_records.jsonl").read_bytes()


def test_a_database_without_records_brings_none(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path / "empty")
    status, out, err = autotune("merge", path, "--db", tmp_path / "here", "--json")
    assert (status, json.loads(out), err) == (0, [], f"{path} has no records\n")
    assert not (tmp_path / "here").exists()


def test_one_broken_file_of_several_leaves_all_as_it_was(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path / "here", record(3.0))
    fill(tmp_path / "there", record(2.0, samples=99), record(1.0, tile=1))
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    autotune("export", "--device", "rtx3090", "--db", tmp_path / "there", "--output", good)
    bad.write_bytes(good.read_bytes().replace(b'"median_us":2.0', b'"median_us":-2.0'))
    before, records = path.read_bytes(), kept(tmp_path / "here")
    for db in (tmp_path / "here", tmp_path / "new"):
        status, out, err = autotune("import", good, bad, "--db", db)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"autotune: error: {bad}:")
        assert "times.median_us=-2.0 must be a number of µs from 0.001 to 1e+12" in err
    assert path.read_bytes() == before
    assert kept(tmp_path / "here") == records
    assert not (tmp_path / "new").exists()


def test_one_broken_database_of_several_leaves_all_as_it_was(autotune, tmp_path: Path) -> None:
    good, bad = fill(tmp_path / "good", record(2.0)), fill(tmp_path / "worse", record(1.0, tile=1))
    with closing(sqlite3.connect(bad)) as connection, connection:
        connection.execute("UPDATE records SET problem = '{}'")
    for arguments in ((), ("--json",)):
        status, out, err = autotune("merge", good, bad, "--db", tmp_path / "new", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"{bad}: record 1 doesn't match its key" in err
        status, out, err = autotune("merge", bad, "--db", tmp_path / "new", *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "new").exists()
    before = good.read_bytes()
    status, out, err = autotune("merge", fill(tmp_path / "third", record(1.0)), good, "--db", good.parent)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "can't be merged into itself" in err
    assert good.read_bytes() == before


@pytest.mark.parametrize("json_too", [False, True])
def test_what_was_brought_in_before_a_failure_is_said(autotune, tmp_path: Path, json_too: bool, monkeypatch) -> None:
    sources = [fill(tmp_path / name, record(time)) for name, time in (("one", 3.0), ("two", 2.0))]
    merge = exchange.merge_files

    def failing(target, source, device):
        if source.path == sources[1]:
            raise DatabaseAccessError(f"{target.path} (database or disk is full): free some space")
        return merge(target, source, device)

    monkeypatch.setattr(exchange, "merge_files", failing)
    status, out, err = autotune("merge", *sources, "--db", tmp_path / "here", *(["--json"] if json_too else []))
    assert status == 2
    kept_line, error = err.splitlines()
    assert kept_line == "1 of 2 sources were brought in: the same command goes on with the others"
    assert "disk is full" in error
    if json_too:
        assert [(each["source"], each["added"]) for each in json.loads(out)] == [(str(sources[0]), 1)]
    else:
        assert out.startswith(f"{sources[0]}: 1 records: 1 added")
    assert len(kept(tmp_path / "here")) == 1


def test_a_configuration_that_is_none_of_the_kernels_is_refused(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path / "here", replace(record(3.0), config='{"BLOCK_M":16}'))
    good = fill(tmp_path / "good", record(2.0))
    status, _, err = autotune("merge", good, path, "--db", tmp_path / "there")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{path}: record 1 is not valid for these kernels (GemmConfig is missing BLOCK_N" in err
    assert not (tmp_path / "there").exists()
    out = tmp_path / "out.jsonl"
    autotune("export", "--device", "rtx3090", "--db", tmp_path / "here", "--output", out)
    status, _, err = autotune("import", out, "--db", tmp_path / "there")
    assert (status, err.count("\n")) == (2, 1)
    assert "out.jsonl:3: GemmConfig is missing BLOCK_N" in err


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_an_import_leaves_no_temporary_files_and_removes_those_of_one_that_was_killed(
    autotune, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "here", record(3.0))
    out = tmp_path / "out.jsonl"
    autotune("export", "--device", "rtx3090", "--db", tmp_path / "here", "--output", out)
    killed = temporary / f"{PREFIX}killed"
    killed.mkdir()
    (killed / LOCK_FILE).touch()
    during = []

    def reading(stream, name, staging, objection):
        during.extend([staging.parent.parent == temporary, (staging.parent / LOCK_FILE).exists(), killed.exists()])
        return read_export(stream, name, staging, objection)

    read_export = interchange.read_export
    monkeypatch.setattr(interchange, "read_export", reading)
    assert autotune("import", out, "--db", tmp_path / "there")[0] == 0
    assert during == [True, True, False]
    assert list(temporary.iterdir()) == []


def test_no_room_for_temporary_files_is_no_matter_of_the_databases(autotune, tmp_path: Path, temporary: Path) -> None:
    fill(tmp_path / "here", record(3.0))
    out = tmp_path / "out.jsonl"
    autotune("export", "--device", "rtx3090", "--db", tmp_path / "here", "--output", out)
    with no_space():
        status, _, err = autotune("import", out, "--db", tmp_path / "there")
    assert (status, err.count("\n")) == (2, 1)
    assert f"error: {temporary}/" in err
    assert "name another folder for temporary files in TMPDIR" in err
    assert "--db" not in err
    temporary.rmdir()
    status, _, err = autotune("import", out, "--db", tmp_path / "there")
    assert (status, err) == (
        2,
        f"autotune: error: {temporary} can't be written (No such file or directory): name another folder in TMPDIR\n",
    )


def test_a_full_disk_under_stdout_is_told(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, record(3.0))
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=full))
        status, _, err = autotune("export", "--device", "rtx3090", "--db", tmp_path)
    assert (status, err) == (
        2,
        "autotune: error: stdout can't be written (No space left on device): free some space, or name a file "
        "(--output)\n",
    )


def test_what_is_no_source_is_named_as_one(autotune, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    empty, foreign = tmp_path / "folder" / "a10-72sm.sqlite", tmp_path / "foreign.sqlite"
    empty.touch()
    with closing(sqlite3.connect(foreign)) as connection:
        connection.execute("CREATE TABLE cats (name)")
    for source, said in (
        (foreign, f"{foreign} is a SQLite database, but not Tilewright's: name another file, or "),
        (empty.parent, f"{empty} is empty and no database: tune that device first, or remove it"),
    ):
        status, out, err = autotune("merge", source, "--db", tmp_path / "db")
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert said in err
    assert "is empty and no database" in autotune("db", "check", "--db", empty.parent)[1]


def test_records_of_a_board_that_nobody_knows_come_with_a_warning(autotune, tmp_path: Path) -> None:
    mine = record(3.0)
    for number, (device, status, said) in enumerate(
        (
            ("rtx3090-82sm", 0, ""),
            ("rtx9090-999sm", 0, "autotune: warning: rtx9090-999sm is neither a board of `autotune devices` nor a GPU"),
            ("foo", 2, "its records are of 'foo', which must be a board and its SM count, as rtx3090-82sm"),
        )
    ):
        here = tmp_path / str(number)
        with TuningDB.open(device, here / "from") as db:
            run = db.start_run(Environment("0.1.0", "3.9.0", "12.9.86", "3.12", "there", "cold-l2-1"))
            db.add(replace(mine, key=replace(mine.key, device=device)), run)
            path = db.path
        got, _, err = autotune("merge", path, "--db", here / "to")
        assert (got, err.count("\n"), said in err) == (status, bool(said), True)
        assert [each.stem for each in (here / "to").glob("*.sqlite")] == ([device] if status == 0 else [])
        out = here / "out.jsonl"
        with out.open("wb") as stream, TuningDB.open(device, here / "from", read_only=True) as db:
            interchange.export(db._file, device, stream)
        got, _, err = autotune("import", out, "--db", here / "too")
        assert (got, err.count("\n")) == (status, bool(said))
        assert (here / "too").exists() == (status == 0)


def test_a_newer_export_and_a_newer_database_are_refused_with_what_to_do(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path / "here", record(3.0))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO _sqlite_migrations VALUES (99, 'tilewright', 's0999_future', 'some day')")
    newer = tmp_path / "newer.jsonl"
    newer.write_text('{"format":"tilewright-records","version":2}\n')
    for command in (
        ("export", "--device", "rtx3090", "--db", path.parent),
        ("merge", path, "--db", tmp_path / "new"),
        ("import", newer, "--db", tmp_path / "new"),
    ):
        status, out, err = autotune(*command)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "upgrade tilewright" in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "--device", "a10"), "a10-72sm.sqlite: tune that device first"),
        (("export",), "Missing option '--device'"),
        (("export", "--device", "rtx3090", "--kernel", "gem"), "did you mean gemm?"),
        (("export", "--device", "rtx3090", "--format", "sqlite"), "--output can't be stdout (-)"),
        (("export", "--device", "rtx3090", "--best", "0"), "--best"),
        (("export", "--device", "rtx3090", "--format", "csv"), "--format"),
        (("import",), "Missing argument"),
        (("import", "absent.jsonl"), "absent.jsonl can't be read: No such file"),
        (("import", "."), ". can't be read: Is a directory"),
        (("import", ""), "the name of a file to import is empty: name one, or - for stdin"),
        (("import", "{gzip}"), "gzip:1: it is compressed by gzip: gunzip it first"),
        (("import", "-", "-"), "stdin (-) can be read once"),
        (("merge", "absent.sqlite"), "there is no absent.sqlite"),
        (("merge", "{empty}"), "has no database: name a file, or a folder of *.sqlite"),
        (("merge", "{text}"), "is no whole database; an export is for `autotune import`"),
    ],
)
def test_a_mistake_is_one_line(autotune, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("a text " * 99)
    (tmp_path / "gzip").write_bytes(gzip.compress(b'{"format":"tilewright-records"}'))
    places = {name: tmp_path / name for name in ("empty", "text", "gzip")}
    status, out, err = autotune(*(each.format(**places) for each in arguments), "--db", tmp_path / "db")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert not (tmp_path / "db").exists()


def test_an_export_that_fails_leaves_the_file_there_was(autotune, tmp_path: Path) -> None:
    path = fill(tmp_path / "here", record(3.0))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE records SET status = 'okay'")
    out = tmp_path / "out.jsonl"
    out.write_text("the one before")
    status, _, err = autotune("export", "--device", "rtx3090", "--db", path.parent, "--output", out)
    assert (status, err.count("\n")) == (2, 1)
    assert out.read_text() == "the one before"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["here", "out.jsonl"]


def test_ctrl_c_says_what_it_leaves(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "here", record(3.0))
    out = tmp_path / "out.jsonl"

    def interrupted(file, device, stream, **options) -> int:
        stream.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(interchange, "export", interrupted)
    status, _, err = autotune("export", "--device", "rtx3090", "--db", tmp_path / "here", "--output", out)
    assert status == 130
    assert err.strip() == "autotune: interrupted: what was being written is as it was before"
    assert not out.exists()

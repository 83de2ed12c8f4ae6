"""The command line: exit status, one line for a mistake, results on stdout and all else on stderr."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tests.tuner.commands.test_exchange import fill, record
from tests.tuner.commands.test_tune import SMALL
from tilewright.tuner import cli
from tilewright.tuning_db.env import compiling_environment

COMMAND = (sys.executable, "-c", "from tilewright.tuner.cli import main; main()")


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "rtx309"), "no device is called 'rtx309'; nearest: rtx3090"),
        (("--device", "cuda:-1"), "no GPU is called 'cuda:-1': the first is cuda:0; `autotune devices` lists boards"),
        (("--device", "sm_86", "--problem", ""), "the text of a GemmProblem is empty: write NAME=VALUE, with commas"),
        (("--device", "sm_70"), "sm_7"),
        (("--device", "sm_86", "--kernel", "gem"), "unknown op 'gem'; did you mean gemm?"),
        (("--device", "sm_86", "--suite", "bert"), "unknown suite 'bert'"),
        (("--device", "sm_86", "--suite", "resnet"), "unknown suite 'resnet'; did you mean resnet50?"),
        (("--device", "sm_86", "--suite", "llama3-8b", "--kernel", "conv2d"), "there is nothing to do"),
        (("--device", "sm_86", "--problem", "M=64,N=64"), "missing K"),
        (("--device", "sm_86", "--problem", "M=64,N=0,K=64"), "N=0 must be from 1"),
        (("--device", "sm_86", "--problem", "M=-1,N=1,K=64"), "M=-1 must be from 1"),
        (("--device", "sm_86", "--problem", "M=a,N=1,K=64"), "M='a' must be an integer"),
        (("--device", "sm_86", "--problem", "64x64x64"), "is not NAME=VALUE"),
        (("--device", "sm_86", "--problem", "M=1,N=1,K=1,activation=gulu"), "unknown activation 'gulu'"),
        (("--device", "sm_86", "--problem", "M=1,N=1,K=1,dtype=fp8e4m3"), "fp8e4m3 needs sm_89 or newer"),
        (("--device", "sm_75", "--problem", "M=1,N=1,K=1,dtype=bf16"), "bf16 needs sm_80 or newer"),
        (("--device", "sm_86", "--trials", "0"), "'--trials': '0' must be a whole number, at least 1"),
        (("--device", "sm_86", "--trials", "many"), "'many' must be a whole number, at least 1"),
        (("--device", "sm_86", "--timeout", "0"), "Invalid value for '--timeout': 0.0 is not in the range"),
        (("--device", "sm_86", "--jobs", "-2"), "Invalid value for '--jobs': '-2' must be a whole number, at least 1"),
        (("--device", "sm_86", "--workers", "0"), "Invalid value for '--workers': '0' must be a whole number"),
        (("--device", "sm_86", "--workers", "2"), "workers=2 need a GPU each, and rtx3090 is not here"),
        (("--device",), "--device"),
        ((), "--device is missing"),
        (("--devise", "sm_86"), "--devise"),
        (("tune",), "tune"),
        (("show",), "--device"),
        (("--device", "sm_86", "show"), "--device goes after show (see"),
        (("--device", "sm_86", "devices"), "--device is no option of devices (see"),
        (("--json", "devices"), "--json goes after devices (see"),
        (("--device", "sm_86", "db", "path"), "--device goes after the subcommand of db (see"),
        (("--quiet", "db", "path"), "--quiet is no option of db (see"),
        (("show", "--debug"), "--debug goes before the subcommand: autotune --debug show … (see"),
        (("db", "path", "--debug"), "--debug goes before the subcommand: autotune --debug db path … (see"),
        (("show", "--retune"), "No such option"),
        (("--db", "/tmp/x", "show", "--device", "a10"), "--db goes after show (see"),
        (("--device", "sm_86", "--timeout", "nan"), "timeout=nan must be more than 0"),
        (("--device", "sm_86", "--db", ""), "--db"),
        (("--device", "sm_86", "--db", "~nobody-of-that-name/x"), "~nobody-of-that-name/x"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(autotune, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    db = tmp_path / "db"
    extra = ("--db", str(db)) if arguments[:1] == ("--device",) and "--db" not in arguments else ()
    if {"show", "db", "devices"} & {*arguments} or len(arguments) == 1:
        extra = ()
    status, out, err = autotune(*arguments, *extra)
    assert status == 2
    assert out == ""
    assert err.startswith("autotune: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not db.exists()


def test_a_database_that_cannot_be_used_is_one_line(autotune, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = autotune(*SMALL, "--quiet", "--db", tmp_path / "file")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{tmp_path / 'file'} is a file, where the folder of databases should be: " in err
    assert "--db" in err


def test_a_newer_database_is_refused_untouched(autotune, tmp_path: Path) -> None:
    autotune(*SMALL, "--db", tmp_path)
    path = tmp_path / "rtx3090-82sm.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE _sqlite_migrations SET name = 's9999_of_tomorrow' WHERE id = 1")
    connection.close()
    before = path.read_bytes()
    status, _, err = autotune(*SMALL, "--quiet", "--db", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert "upgrade tilewright" in err
    assert path.read_bytes() == before


def test_a_corrupt_database_is_set_aside_by_name_and_the_run_goes_on(autotune, tmp_path: Path) -> None:
    path = tmp_path / "rtx3090-82sm.sqlite"
    path.write_bytes(b"no database at all")
    status, _, err = autotune(*SMALL, "--db", tmp_path)
    assert status == 0
    (aside,) = tmp_path.glob("*.corrupt-*")
    assert str(aside) in err
    assert aside.read_bytes() == b"no database at all"


def test_a_defect_is_one_line_and_debug_shows_it(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.tuner import tune

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("something\nbroke")

    monkeypatch.setattr(tune, "tune", broken)
    status, _, err = autotune(*SMALL, "--quiet", "--db", tmp_path)
    assert (status, err.count("\n")) == (1, 1)
    assert "RuntimeError: something broke (a defect of Tilewright: `autotune --debug …` shows where)" in err
    line = err.splitlines()[-1]
    status, _, err = autotune(*SMALL, "--debug", "--quiet", "--db", tmp_path)
    assert (status, err.splitlines()[0], err.splitlines()[-1]) == (1, "Traceback (most recent call last):", line)


def test_debug_goes_before_a_subcommand(autotune, tmp_path: Path) -> None:
    arguments = ("export", "--device", "sm_86", "--db", str(tmp_path))
    status, _, line = autotune(*arguments)
    assert (status, line.count("\n")) == (2, 1)
    status, _, err = autotune("--debug", *arguments)
    assert (status, err.startswith("Traceback"), err.endswith(f"DatabaseAccessError: {line[17:]}{line}")) == (
        2,
        True,
        True,
    )
    status, out, _ = autotune("--debug", "db", "path", "--db", tmp_path)
    assert (status, out) == (0, f"{tmp_path}\n")
    # The value of another option is none.
    status, _, err = autotune("export", "--device", "sm_86", "--db", "--debug")
    assert (status, err.count("\n")) == (2, 1)


def test_an_end_before_its_time_says_what_it_leaves(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.tuner import tune

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tune, "tune", interrupted)
    # A folder of the name of a subcommand is none.
    status, _, err = autotune(*SMALL, "--quiet", "--db", "db")
    assert status == 130
    assert err.strip() == "autotune: interrupted: finished trials are kept, the same command goes on from there"


def test_a_stream_that_knows_no_greek_goes_on(tmp_path: Path) -> None:
    environment = {**compiling_environment(), "PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "show", "--device", "a10", "--db", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr.count("\n")) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "closed", "status", "said"),
    [
        (("export", "--device", "sm_86"), "1", 2, "autotune: error: stdout is closed: name a file (--output)"),
        (("import", "-"), "0", 2, "autotune: error: stdin is closed: name a file"),
        (("--device", "nosuch"), "2", 2, ""),
        (("devices",), "1", 0, ""),
        (("db", "path"), "0 1 2", 0, ""),
    ],
)
def test_a_stream_that_is_closed(
    tmp_path: Path, arguments: tuple[str, ...], closed: str, status: int, said: str
) -> None:
    fill(tmp_path, record(3.0))
    folder = () if arguments[0] in ("devices", "--device") else ("--db", str(tmp_path))
    closing = [f"os.close({number})" for number in closed.split()]
    program = f"import os, sys; {'; '.join(closing)}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    run = subprocess.run(
        [sys.executable, "-c", program, *COMMAND[1:], *arguments, *folder],
        env=compiling_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout, run.stderr.strip()) == (status, "", said)


@pytest.mark.parametrize("lost", ["reader", "disk"])
def test_a_run_goes_on_where_nobody_reads_what_it_says(tmp_path: Path, lost: str) -> None:
    if lost == "disk":
        stderr = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, stderr = os.pipe()
        os.close(reading)
    run = subprocess.run(
        [*COMMAND, *SMALL, "--db", str(tmp_path), "--json"],
        env={**compiling_environment(), "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        stdout=subprocess.PIPE,
        stderr=stderr,
        timeout=120,
    )
    os.close(stderr)
    assert run.returncode == 0
    assert json.loads(run.stdout)["results"][0]["provenance"] == "predicted"


@pytest.mark.parametrize("arguments", [("devices",), ("db", "path"), ("db", "stats", "--json"), ("export",)])
@pytest.mark.parametrize("lost", ["reader", "disk"])
def test_results_that_cannot_be_written_have_a_status(tmp_path: Path, lost: str, arguments: tuple[str, ...]) -> None:
    fill(tmp_path, record(3.0))
    more = () if arguments[0] == "devices" else ("--device", "rtx3090", "--db", str(tmp_path))
    if lost == "disk":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, stdout = os.pipe()
        os.close(reading)
    run = subprocess.run(
        [*COMMAND, *arguments, *more],
        env=compiling_environment(),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(stdout)
    if lost == "reader":
        assert (run.returncode, run.stderr) == (141, "")
    else:
        elsewhere = "name a file (--output)" if arguments == ("export",) else "send it elsewhere"
        line = f"stdout can't be written (No space left on device): free some space, or {elsewhere}"
        assert (run.returncode, run.stderr) == (2, f"autotune: error: {line}\n")


def test_sigterm_ends_the_run_and_its_workers(tmp_path: Path) -> None:
    process = _start(tmp_path, "--suite", "bert-base", "--trials", "16")
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err.strip().splitlines()[-1].startswith("autotune: terminated: finished trials are kept")
    assert "Traceback" not in err
    assert not _processes_of(tmp_path)


def test_help_cuts_no_summary_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in (cli.cli, cli.db.db):
        for name, command in group.commands.items():
            assert len(command.short_help or "") in range(10, 50), name


def test_version(autotune) -> None:
    assert autotune("--version")[1].startswith("autotune, version 0.")


def test_a_checkout_that_is_not_installed_has_a_version_too(autotune, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr("importlib.metadata.version", absent)
    monkeypatch.setattr("tilewright.tuning_db.version.version", absent)
    assert autotune("--version")[:2] == (0, "autotune, version 0+unknown\n")


def test_ctrl_c_is_one_line_status_130_and_leaves_no_process(tmp_path: Path) -> None:
    process = _start(tmp_path, "--suite", "bert-base", "--trials", "16")
    # As a terminal does it: to the whole foreground group.
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err.strip().splitlines()[-1].startswith("autotune: interrupted: finished trials are kept")
    assert "Traceback" not in err
    assert 1 <= _count(tmp_path / "rtx3090-82sm.sqlite") < 64
    assert not _processes_of(tmp_path)


def _start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a session of its own, when it has its first outcome and its two workers."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from tilewright.tuner.cli import main; main()",
            "--device",
            "sm_86",
            *arguments,
            "--jobs",
            "2",
            "--db",
            str(folder),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**compiling_environment(), "TRITON_CACHE_DIR": str(folder / "triton")},
    )
    path = folder / "rtx3090-82sm.sqlite"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (path.exists() and _count(path) >= 1):
        time.sleep(0.05)
    assert len(_processes_of(folder)) >= 3, "the command and its two workers"
    return process


def _count(path: Path) -> int:
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return int(connection.execute("SELECT count(*) FROM records").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def _processes_of(folder: Path) -> list[str]:
    """Processes whose environment names the folder, as that of the command and of all it starts does."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in environment:
                found.append(command.replace(b"\0", b" ").decode())
    return found

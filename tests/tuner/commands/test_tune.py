"""A run over kernels from the command line: what is tuned, and what is said of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.tuner.simulated_worker import Scenario
from tests.tuner.simulation import GPUS, PROBLEM, simulated

SMALL = ("--device", "sm_86", "--problem", "M=64,N=64,K=128", "--trials", "2", "--jobs", "2")


@pytest.mark.smoke
def test_it_tunes_and_then_answers_from_the_cache(autotune, tmp_path: Path) -> None:
    status, out, err = autotune(*SMALL, "--db", tmp_path)
    assert status == 0
    header, row = out.strip().splitlines()
    assert header.split()[0] == "workload"
    assert row.startswith("M=64,N=64,K=128 ")
    assert row.rstrip().endswith("predicted")
    assert "NVIDIA GeForce RTX 3090 (rtx3090, sm_86, 82 SMs), not here: times are predicted" in err
    assert "[1/1] M=64,N=64,K=128" in err
    assert str(tmp_path / "rtx3090-82sm.sqlite") in err

    status, out, err = autotune(*SMALL, "--db", tmp_path, "--json", "--quiet")
    assert status == 0
    assert err == ""
    document = json.loads(out)
    assert document["compiled"] == 0
    assert [result["cached"] for result in document["results"]] == [True]

    status, out, err = autotune("show", "--device", "rtx3090", "--db", tmp_path)
    assert status == 0
    assert "M=64,N=64,K=128" in out
    assert "1 results on record" in err


def test_a_user_without_a_home_names_a_folder(
    autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted
) -> None:
    for name in ("TILEWRIGHT_DB_DIR", "HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    for command in (SMALL, ("db", "path")):
        status, out, err = autotune(*command)
        assert (status, out) == (2, "")
        assert "no folder of databases is named, with --db or TILEWRIGHT_DB_DIR, and" in err.splitlines()[-1]
    status, _, err = autotune(*SMALL, "--db", tmp_path)
    assert status == 0
    assert f"export TILEWRIGHT_DB_DIR={tmp_path}" in err


def test_several_workers_measure_and_one_that_cannot_is_named(
    autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilewright.kernels import devices

    monkeypatch.setattr(devices, "resolve_device", lambda name: GPUS[0])
    scenario = Scenario(str(tmp_path / "journal"), absent=[1])
    with simulated(scenario, scenario, tmp_path):
        arguments = ("--device", "cuda:0", "--problem", str(PROBLEM), "--trials", "4", "--jobs", "1", "--workers")
        status, out, err = autotune(*arguments, "2", "--db", tmp_path / "db")
        assert status == 0
        assert out.rstrip().endswith("measured")
        assert "the other workers did the work of one: " in err
        assert "cuda:1 is busy or unavailable" in err
        status, out, err = autotune(*arguments, "5", "--db", tmp_path / "other")
    assert (status, out) == (2, "")
    assert err.splitlines() == [
        "autotune: error: workers=5 need as many GPUs of a100-108sm: here are cuda:0, cuda:1, cuda:2, cuda:3"
    ]
    assert not (tmp_path / "other").exists()


def test_a_storage_is_shared_and_one_that_cannot_be_opened_is_one_line(autotune, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'studies.sqlite'}"
    for host in ("one", "two"):
        status, out, err = autotune(*SMALL, "--db", tmp_path / host, "--storage", url, "--json", "--quiet")
        assert (status, err) == (0, "")
        assert [result["cached"] for result in json.loads(out)["results"]] == [host == "two"]
    missing = "sqlite:////nowhere/studies.sqlite"
    for arguments, said in (
        (("--storage", missing), f"the storage {missing} can't be opened: unable to open database file"),
        (("--storage", "redis://:secret@host/0"), "the storage redis://host/0 is of no kind that SQLAlchemy knows"),
        (("--storage", url, "--retune"), "retune and storage (--retune, --storage) exclude each other"),
    ):
        status, out, err = autotune(*SMALL, "--db", tmp_path / "three", *arguments)
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith(f"autotune: error: {said}")
    assert not (tmp_path / "three").exists()


def test_a_device_without_tensor_cores_says_so(autotune, tmp_path: Path) -> None:
    status, _, err = autotune("--device", "sm_75", "--problem", "M=16,N=16,K=32", "--trials", "1", "--db", tmp_path)
    assert status == 0
    assert "no tensor-core path" in err


def test_a_run_in_which_nothing_worked_is_status_1(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.tuner import tuning_run
    from tilewright.tuner.runner import Outcome
    from tilewright.tuning_db.record import Status

    class Refused(tuning_run.PredictionRunner):
        def run(self, kernel, problem, configs, deadline):
            for config in configs:
                yield config, Outcome(Status.COMPILE_ERROR, message="ptxas refused\x1b it")

    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: Refused(compiler, device))
    status, out, _ = autotune(*SMALL, "--quiet", "--db", tmp_path)
    assert status == 1
    assert out.splitlines()[-1] == "M=64,N=64,K=128: compile_error: ptxas refused? it"


def test_a_kernel_of_a_suite(autotune, tmp_path: Path) -> None:
    arguments = ("--suite", "mobilenet-v2", "--suite", "bert-base", "--kernel", "attention", "--trials", "1")
    status, out, _ = autotune("--device", "sm_86", *arguments, "--quiet", "--db", tmp_path)
    assert status == 0
    _, *rows = out.strip().splitlines()
    assert [row.split("  ")[0] for row in rows] == ["bert-base attention"]


def test_what_a_program_called_is_tuned(autotune, counted, tmp_path: Path) -> None:
    calls = tmp_path / "calls.txt"
    calls.write_text("gemm M=64,N=64,K=128\nrmsnorm M=16,N=64\n")
    arguments = ("--calls", calls, "--trials", "1", "--json", "--quiet", "--db", tmp_path / "db")
    status, out, err = autotune("--device", "sm_86", *arguments)
    assert (status, err) == (0, "")
    assert [result["op"] for result in json.loads(out)["results"]] == ["gemm", "rmsnorm"]
    status, out, _ = autotune("--device", "sm_86", "--kernel", "rmsnorm", *arguments)
    assert status == 0
    assert [result["op"] for result in json.loads(out)["results"]] == ["rmsnorm"]


def test_calls_that_are_none_are_the_only_line(autotune, tmp_path: Path) -> None:
    calls = tmp_path / "calls.txt"
    calls.write_text("gemm M=64\n")
    for command in (
        ("--device", "sm_86", "--calls", calls, "--db", tmp_path / "db"),
        ("pack", "--device", "sm_86", "--calls", calls, "--db", tmp_path, "--output", tmp_path / "pack"),
        ("--device", "sm_86", "--calls", calls, "--model", "m.onnx", "--output", tmp_path / "made"),
    ):
        status, out, err = autotune(*command)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert ("calls.txt, line 1" in err) != ("--calls does not go with --model" in err)
    assert list(tmp_path.iterdir()) == [calls]


def test_what_is_named_twice_is_tuned_once(autotune, counted, tmp_path: Path) -> None:
    suites = ("--suite", "bert-base", "--suite", "bert-base", "--suite", "all", "--kernel", "attention")
    status, out, _ = autotune("--device", "sm_86", *suites, "--trials", "1", "--json", "--quiet", "--db", tmp_path)
    assert status == 0
    problems = [json.dumps(result["problem"]) for result in json.loads(out)["results"]]
    assert len(problems) == len(set(problems)) > 1
    problems = ("--problem", "M=64,N=64,K=128", "--problem", "K=128,N=64,M=64")
    status, out, _ = autotune("--device", "sm_86", *problems, "--trials", "1", "--json", "--quiet", "--db", tmp_path)
    assert [result["workload"] for result in json.loads(out)["results"]] == ["M=64,N=64,K=128"]


def test_a_folder_of_shipped_records_that_is_none_is_told(
    autotune, counted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "absent"
    said = f"autotune: warning: TILEWRIGHT_SHIPPED={folder} is no folder: nothing that was shipped is found"
    for value, lines in ((folder, [f"{said} (0 leaves it out)"]), ("0", [])):
        monkeypatch.setenv("TILEWRIGHT_SHIPPED", str(value))
        for command in ((*SMALL, "--quiet"), ("show", "--device", "sm_86"), ("db", "stats")):
            status, _, err = autotune(*command, "--db", tmp_path / "db")
            assert status == 0
            assert [line for line in err.splitlines() if "warning" in line] == lines


def test_a_narrow_terminal_cuts_nothing(autotune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, out, _ = autotune(*SMALL, "--quiet", "--db", tmp_path)
    assert "…" not in out
    assert "M=64,N=64,K=128" in out
    assert "provenance" in out
    assert "predicted" in out

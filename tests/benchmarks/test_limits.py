"""What never ends ends the run, and what was measured before is kept."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks import limits
from benchmarks.cases import cases
from benchmarks.gluon import chosen_cases
from benchmarks.limits import EXIT_HUNG, LIMIT_S, limited
from benchmarks.torch_board import TURN_S
from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parent.parent.parent

# The second case waits in native code for ever, where no signal's handler has its turn.
HUNG = """
import ctypes, math, sys
from pathlib import Path
from benchmarks import gluon, gpu, limits
from benchmarks.rehearsal import RehearsalBoard

name, library, out = sys.argv[1:]
compared = []

class Hung(RehearsalBoard):
    def compare(self, case, contenders):
        compared.append(case)
        if len(compared) == 2:
            lock, mutex = getattr(ctypes, library)(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
            lock(mutex)
            lock(mutex)
        return super().compare(case, contenders)

gpu.LIMIT_S = gluon.LIMIT_S = 0.5
limits.GRACE_S = 0.5
if name == "gpu":
    gpu.run(Hung("h200"), gpu.cases()[:3], math.inf, Path(out))
else:
    gluon.run(Hung("h200"), math.inf, Path(out), gluon.chosen_cases()[:3])
"""


@pytest.mark.parametrize("name", ["gpu", "gluon"])
@pytest.mark.parametrize("library", ["CDLL", "PyDLL"], ids=["without Python's lock", "with it"])
def test_a_case_without_an_end_ends_the_run_and_the_others_are_kept(tmp_path: Path, name: str, library: str) -> None:
    program = [sys.executable, "-c", HUNG, name, library, tmp_path]
    done = subprocess.run(program, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True, timeout=100)
    first, second, third = [
        f"{case.family.name}: {case.name}" for case in (cases if name == "gpu" else chosen_cases)()[:3]
    ]
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert done.returncode == EXIT_HUNG
    assert [f"{row['family']}: {row['name']}" for row in document["cases"]] == [first]
    if library == "PyDLL":
        assert "pthread" not in (tmp_path / f"{name}.json").read_text()
        assert "in compare" in done.stderr
        return
    line = f"{second}: no end in 0 s; a kernel may wait for ever"
    assert done.stderr.splitlines()[-1] == f"error: {line}"
    assert document["errors"] == [line]
    assert document["left_out"] == [second, third]
    assert f"Not measured: {line}." in (tmp_path / f"{name}.md").read_text()


def test_what_ends_in_time_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[object] = []
    monkeypatch.setattr(limits.os, "_exit", ended.append)
    with limited("a case", math.inf, ended.append):
        (watching,) = (thread for thread in threading.enumerate() if thread.name == "limit")
    with pytest.raises(KeyError), limited("a case that fails", 60.0, ended.append):
        raise KeyError
    watching.join(10.0)
    assert not watching.is_alive()
    assert ended == []


def test_a_limit_that_is_passed_ends_the_process_whatever_became_of_the_results(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended, status = threading.Event(), []

    def leave(code: int) -> None:
        status.append(code)
        ended.set()

    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(limits.os, "_exit", leave)
    with limited("peaks", 0.01, full):
        assert ended.wait(60.0)
    assert status == [EXIT_HUNG]
    assert capfd.readouterr().err == "error: peaks: no end in 0 s; a kernel may wait for ever\n"


def test_a_case_may_wait_for_its_turn_first() -> None:
    assert LIMIT_S > TURN_S + 30

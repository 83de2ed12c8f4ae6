from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tilewright.tuning_db.env import compiling_environment

INTERRUPTED = """
import os, signal, sys
from importlib.metadata import EntryPoint

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which a background job's parent may have ignored

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.Signals[sys.argv[3]])

sys.meta_path.insert(0, Interrupting())
EntryPoint("autotune", sys.argv[2], "console_scripts").load()()
"""


@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        ("SIGINT", 130, "autotune: interrupted: nothing was begun"),
        ("SIGTERM", 143, "autotune: terminated: nothing was begun"),
        ("SIGHUP", 143, "autotune: terminated: nothing was begun"),
    ],
)
def test_an_end_before_the_command_is_imported_is_one_line(number: str, status: int, line: str) -> None:
    root = Path(__file__).parents[2]
    entry = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["autotune"]
    for module in ("tilewright.tuner.cli", "click"):
        program = [sys.executable, "-c", INTERRUPTED, module, entry, number]
        run = subprocess.run(program, env=compiling_environment(), capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout) == (status, "")
        assert run.stderr.strip() == line


def test_it_runs_the_command() -> None:
    program = [sys.executable, "-c", "from tilewright.tuner.entry import main; main()", "--version"]
    run = subprocess.run(program, env=compiling_environment(), capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("autotune, version ")

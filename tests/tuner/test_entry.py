from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from tilewright.tuning_db.env import compiling_environment

INTERRUPTED = """
import sys
from importlib.metadata import EntryPoint

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
EntryPoint("autotune", sys.argv[2], "console_scripts").load()()
"""


def test_ctrl_c_before_the_command_is_imported_is_one_line() -> None:
    root = Path(__file__).parents[2]
    entry = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]["autotune"]
    for module in ("tilewright.tuner.cli", "click", "rich.table"):
        program = [sys.executable, "-c", INTERRUPTED, module, entry]
        run = subprocess.run(program, env=compiling_environment(), capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout) == (130, "")
        assert run.stderr.strip() == "autotune: interrupted: nothing was begun"


def test_it_runs_the_command() -> None:
    program = [sys.executable, "-c", "from tilewright.tuner.entry import main; main()", "--version"]
    run = subprocess.run(program, env=compiling_environment(), capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("autotune, version ")

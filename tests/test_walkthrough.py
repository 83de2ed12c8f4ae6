"""docs/models.md is walked through: every command of it runs, in order, and leaves what the page says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "models.md").read_text()


def commands() -> list[str]:
    """The commands of the walk-through, in order."""
    (part,) = re.findall(r"^## A walk through\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    return [text.strip() for text in re.findall(r"^```\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)]


@pytest.mark.timeout(600)
def test_the_walk_through(tmp_path: Path) -> None:
    environment = {**compiling_environment(), "TILEWRIGHT_DB_DIR": str(tmp_path / "db"), "PYTHONPATH": str(ROOT)}
    work = tmp_path / "work"
    work.mkdir()
    said = []
    for command in commands():
        words = shlex.split(command.replace("examples/", f"{ROOT / 'examples'}/"))
        main = ["-c", "from tilewright.tuner.cli import main; main()"]
        program = [sys.executable, *{"autotune": main, "python": []}[words[0]]]
        done = subprocess.run(
            [*program, *words[1:]], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        said.append(done.stdout)
    made = {path.name for path in (work / "build").iterdir()}
    (table,) = re.findall(r"`build` then holds\n\n(.*?)\n\n", PAGE, re.DOTALL)
    named = set(re.findall(r"`([\w.]+)`", table)) - {"fp32"}
    assert made == {name for name in named if "engine" not in name}
    assert "4 distinct workloads" in said[1]
    assert said[-1].strip() == "(2, 6)"


def test_python_calls_of_the_page(tmp_path: Path) -> None:
    inlining, snippet = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    environment = {**compiling_environment(), "TILEWRIGHT_DB_DIR": str(tmp_path / "db"), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(ROOT / "examples" / "model.py")], cwd=tmp_path, env=environment, check=True)
    snippet = "from tilewright.tuner.tune import TuningOptions\n" + snippet.replace(
        'calibration="images.npz"', 'calibration="images.npz", tuning=TuningOptions(trials=1)'
    )
    done = subprocess.run(
        [sys.executable, "-c", snippet + inlining],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    time, provenance, met = done.stdout.split()
    assert float(time) > 0
    assert (provenance, met) == ("predicted", "True")
    assert not onnx.load(tmp_path / "build" / "model.inlined.onnx").functions

"""Every benchmark runs as it says, prints a table and writes JSON with its environment. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"cpu", "cores", "platform", "python", "tilewright", "triton"}
BENCHMARKS = {
    "cache_lookup": ["--records", "300", "--processes", "1"],
    "dispatch_overhead": [],
    "lookup_regret": [
        *("--seeds", "1", "--space", "benchmarks/replay/convolution__RTX_2080_Ti.npz"),
        *("--space", "benchmarks/replay/convolution__RTX_Titan.npz"),
    ],
    "compile_rate": ["--configs", "2", "--rounds", "1"],
    "model_memory": ["--megabytes", "16"],
    "search_quality": [
        *("--space", "benchmarks/replay/pnpoly__RTX_3060_laptop.npz", "--budget", "12", "--seeds", "2"),
        *("--strategy", "random", "--strategy", "tilewright"),
    ],
}

OF_A_TEST_FILE = {
    "estimates",
    "gluon",
    "gluon_ahead",
    "gpu",
    "heuristics",
    "landscape",
    "prediction",
    "profiling",
    "performance",
    "quantisation",
    "weight_only",
}
"""Those that need more than a file of figures: `test_gpu.py` and its siblings."""


def test_every_benchmark_is_run_here() -> None:
    with_a_command = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    assert with_a_command == {*BENCHMARKS, *OF_A_TEST_FILE}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_runs_and_writes_its_figures(name: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", *BENCHMARKS[name], "--json", str(figures)]
    run = subprocess.run(command, cwd=ROOT, env=compiling_environment(), capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert "━" in run.stdout
    document = json.loads(figures.read_text())
    assert set(document["environment"]) >= ENVIRONMENT
    assert document["results"]

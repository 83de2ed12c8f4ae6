"""Runs that are killed anywhere, and go on; runs whose time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.killed_runs import JOBS
from tests.tuner.simulated_worker import Scenario, time_us
from tests.tuner.simulation import BOARD, PROBLEM, ROOT, simulated, space
from tilewright.tuner import gpu_runner, runner
from tilewright.tuner.temporary import PREFIX
from tilewright.tuner.tune import autotune

SCRIPT = "tests.tuner.killed_runs"
PER_RUN_S = 30.0
TRIALS = 12
"""Of 25 configurations: which ones, and so the winner, is the search's choice."""


def killed_runs(folder: Path, workers: int, trials: int, points: list[str]) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    temporary = folder / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-m", SCRIPT, str(folder / "runs"), str(workers), str(trials), "never", *points],
        env={**environment, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=PER_RUN_S * (len(points) + trials),
        check=True,
    )
    assert done.stderr == ""
    # What a killed run leaves behind goes when workers start the next time: no more can be there than of the last one.
    assert len(list(temporary.glob(f"{PREFIX}*"))) <= 2 + workers
    return [json.loads(line) for line in done.stdout.splitlines()]


POINTS = {
    0: ["before add 1", "after add 6", "end compile 3"],
    1: [
        "before add 5",
        "after add 5",
        "begin compile 1",
        "end measure 6",
        "begin measure 13",  # the comparison of the best
        "0.6 s",
    ],
    3: ["after add 7", "begin measure 3", "begin measure 13"],
}
"""By the number of workers; without any, nothing is measured."""


@pytest.mark.parametrize("workers", POINTS)
def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path, workers: int) -> None:
    check_resumption(tmp_path, workers, POINTS[workers])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_can_be_killed_at_every_step(tmp_path: Path, workers: int) -> None:
    steps = range(1, TRIALS + 1)
    adds = [f"{moment} add {step}" for moment in ("before", "after") for step in steps]
    tasks = [
        f"{moment} {task} {step}" for task in ("compile", "measure") for moment in ("begin", "end") for step in steps
    ]
    times = [f"{0.2 + 0.05 * step:.2f} s" for step in range(16)]
    check_resumption(tmp_path, workers, [*adds, *tasks, *times])


def check_resumption(folder: Path, workers: int, points: list[str]) -> None:
    never, *killed = killed_runs(folder, workers, TRIALS, points)
    assert never["codes"] == [0]
    assert len(never["recorded"]) == TRIALS
    assert set(never["trials"].values()) == {1}
    for case in killed:
        first, last = case["codes"]
        # A moment on the clock may be after the end, where the machine is fast.
        assert first == -signal.SIGKILL or (first == 0 and case["point"].endswith(" s")), case["point"]
        assert last == 0
        assert case["integrity"] == "ok"
        assert case["winner"] == never["winner"], case["point"]
        assert case["recorded"] == never["recorded"], case["point"]
        repeated = sum(case["trials"].values()) - sum(never["trials"].values())
        assert 0 <= repeated <= (workers or JOBS), case["point"]
        if case["point"].startswith("after add") and workers == 1:
            assert repeated == 0


def test_a_run_that_is_killed_after_every_trial_ends_as_one_that_is_not(tmp_path: Path) -> None:
    trials = 5
    never, case = killed_runs(tmp_path, 1, trials, ["every add"])
    # The finalists' outcomes are added together.
    assert case["codes"] == [-signal.SIGKILL] * (trials + 1) + [0, 0]
    assert case["winner"] == never["winner"]
    assert case["recorded"] == never["recorded"]
    assert set(case["trials"].values()) == {1}


TIMEOUT_S = 3.0
TRIAL_TIMEOUT_S = 2.0


@pytest.mark.parametrize("fault", ["", "endless kernel", "compiler hang"])
def test_the_time_is_overrun_by_one_trial_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(runner, "COMPILE_TIMEOUT_S", TRIAL_TIMEOUT_S)
    monkeypatch.setattr(gpu_runner, "MEASURE_TIMEOUT_S", TRIAL_TIMEOUT_S)
    best = min((config.to_dict() for config in space()), key=time_us)
    faults = {config.to_json(): fault for config in space() if fault and config.to_dict() != best}
    scenario = Scenario(str(tmp_path / "journal"), faults)
    # Without faults the time is not to be up, however slow the machine is.
    allowed = TIMEOUT_S if fault else 100.0
    with simulated(scenario, scenario, tmp_path):
        start = time.monotonic()
        results = autotune(BOARD, problems=[PROBLEM], trials=25, timeout=allowed, jobs=8, db=tmp_path / "db")
        elapsed = time.monotonic() - start
    assert elapsed < allowed + TRIAL_TIMEOUT_S + 2.0
    if fault:
        # One after the other, the trials would have taken ten times as long, and more.
        assert results.results[0].trials < 15
    else:
        assert results.results[0].trials == 25

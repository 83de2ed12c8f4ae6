"""A run with faults of every kind at a tenth of its trials each: what it ends with, and what it says of them."""

from __future__ import annotations

import math
import random
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.in_place import HALVE, HalveConfig, HalveProblem
from tests.tuner.simulated_worker import FAULTS, Scenario, time_us
from tests.tuner.simulation import BOARD, PROBLEM, simulated, space
from tilewright.kernels.problem import Config
from tilewright.tuner import gpu_runner, tuning_run
from tilewright.tuner import runner as runner_module
from tilewright.tuner.pool import Worker
from tilewright.tuner.results import Results
from tilewright.tuner.runner import Compiler, Outcome
from tilewright.tuner.tune import autotune
from tilewright.tuning_db.record import Record, Status, canonical_json
from tilewright.tuning_db.store import TuningDB

COMPILE_TIMEOUT_S = 1.0
MEASURE_TIMEOUT_S = 3.0  # interpreted kernels on a busy machine take one

EXPECTED = {
    "compiler abort": (
        Status.COMPILE_ERROR,
        "the compiler aborted (SIGABRT): Pipeliner.cpp:42: Assertion `numStages > 1' failed.",
    ),
    "compiler hang": (Status.TIMEOUT, "no answer in 1 s: killed"),
    "endless kernel": (Status.TIMEOUT, "no answer in 3 s: killed"),
    "illegal address": (
        Status.RUNTIME_ERROR,
        "the measurement ended with exit status 70: "
        "error: cudaErrorIllegalAddress: an illegal memory access was encountered",
    ),
    "out of memory": (Status.RUNTIME_ERROR, "Out of memory allocating"),
    "wrong result": (Status.INCORRECT, "elements"),
    "killed from outside": (
        Status.RUNTIME_ERROR,
        "the measurement was killed (SIGKILL), perhaps for want of memory",
    ),
}


@pytest.fixture
def timeouts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float]]:
    """Of every request that ended so: the message, the seconds allowed, and those from taking it up to its answer."""
    found: list[tuple[str, float, float]] = []
    original = Worker.request

    def request(self: Worker, request: Any, timeout: float) -> dict[str, Any]:
        self.start()  # belongs to what the process before died of
        began = time.monotonic()
        reply = original(self, request, timeout)
        if reply["status"] == Status.TIMEOUT:
            found.append((reply["message"], timeout, time.monotonic() - began))
        return reply

    monkeypatch.setattr(Worker, "request", request)
    return found


def run(folder: Path, faults: dict[str, str]) -> tuple[Results, dict[str, Record]]:
    folder.mkdir()
    compiling = Scenario(journal=str(folder / "compiling"), faults=faults)
    measuring = Scenario(journal=str(folder / "measuring"), faults=faults, real=True)
    with simulated(compiling, measuring, folder):
        results = autotune(BOARD, problems=[PROBLEM], trials=len(space()), jobs=2, db=folder / "db")
    with TuningDB.open(BOARD.key, folder / "db", read_only=True) as database:
        return results, {record.config: record for record in database.find()}


def test_every_fault_is_on_record_and_the_winner_is_that_of_a_run_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeouts: list[tuple[str, float, float]]
) -> None:
    monkeypatch.setattr(runner_module, "COMPILE_TIMEOUT_S", COMPILE_TIMEOUT_S)
    monkeypatch.setattr(gpu_runner, "MEASURE_TIMEOUT_S", MEASURE_TIMEOUT_S)
    faultless, records = run(tmp_path / "without", {})
    assert {record.status for record in records.values()} == {Status.OK}
    winner = min((config.to_dict() for config in space()), key=time_us)
    assert faultless.results[0].config == winner

    # A tenth of all trials, or just over, for each of seven faults; which, the seed decides. Not the winner: what
    # crashes can't win. But whose process somebody kills, once, is none that crashes.
    others = sorted(config.to_json() for config in space() if config.to_dict() != winner)
    share = math.ceil(len(space()) / 10)
    random.Random(0).shuffle(others)
    faults = {config: fault for i, fault in enumerate(FAULTS) for config in others[i * share : (i + 1) * share]}
    assert len(faults) == 7 * share

    faulty, records = run(tmp_path / "with", {**faults, canonical_json(winner): "killed at first"})
    assert faulty.results[0].config == winner
    assert faulty.results[0].status is Status.OK
    assert len(records) == faulty.results[0].trials == len(space())
    for config, record in records.items():
        status, message = EXPECTED[faults[config]] if config in faults else (Status.OK, "")
        assert record.status is status, (faults.get(config), record)
        assert message in record.message
        assert bool(record.message) == (config in faults)
    hangs = [config for config, fault in faults.items() if EXPECTED[fault][0] is Status.TIMEOUT]
    assert len(timeouts) >= len(hangs)
    for message, allowed, taken in timeouts:
        assert message == f"no answer in {allowed:g} s: killed"
        assert allowed <= taken < allowed + 2


IN_PLACE = [HalveConfig(2**power) for power in range(3, 15)]


def outcomes_in_place(folder: Path, faults: dict[str, str]) -> dict[Config, Outcome]:
    """What becomes of every configuration of an op that overwrites its input, in the same isolation."""
    folder.mkdir()
    compiling = Scenario(journal=str(folder / "compiling"), faults=faults)
    measuring = Scenario(journal=str(folder / "measuring"), faults=faults, real=True, in_place=True)
    problem = HalveProblem(1000)
    with simulated(compiling, measuring, folder), closing(tuning_run.Pool(2)) as pool:
        runner = gpu_runner.GpuRunner(Compiler(pool, BOARD), BOARD)
        with closing(runner):
            found = dict(runner.run(HALVE, problem, IN_PLACE))
            best = sorted(
                (config for config, outcome in found.items() if outcome.times is not None),
                key=lambda config: found[config].times.median_us,
            )[:4]
            return found | dict(runner.finalists(HALVE, problem, best))


def test_faults_of_a_kernel_that_overwrites_its_input_cost_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each trial, those after a fault too, finds the input whole: else the gate would refuse it."""
    monkeypatch.setattr(runner_module, "COMPILE_TIMEOUT_S", COMPILE_TIMEOUT_S)
    monkeypatch.setattr(gpu_runner, "MEASURE_TIMEOUT_S", MEASURE_TIMEOUT_S)
    winner, *others = sorted(IN_PLACE, key=lambda config: time_us(config.to_dict()))
    faults = {config.to_json(): fault for config, fault in zip(others[1:], FAULTS, strict=False)}
    assert len(faults) == len(FAULTS) == 7
    found = outcomes_in_place(tmp_path / "with", {**faults, winner.to_json(): "killed at first"})
    assert set(found) == set(IN_PLACE)
    for config, outcome in found.items():
        status, message = EXPECTED[faults[config.to_json()]] if config.to_json() in faults else (Status.OK, "")
        assert outcome.status is status, (config, outcome)
        assert message in outcome.message
    measured = {config: outcome for config, outcome in found.items() if outcome.times is not None}
    assert min(measured, key=lambda config: measured[config].times.median_us) == winner

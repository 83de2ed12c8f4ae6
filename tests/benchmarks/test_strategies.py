from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import landscape_file, strategies
from benchmarks.prediction import before_compiling, by_prediction
from benchmarks.replay_tables import Table, load
from benchmarks.strategies import STRATEGIES, Strategy, available, evidence_of, predicting, tilewright
from tests.benchmarks.tables import save

BUDGET = 14  # Optuna's samplers draw the first 10 at random


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    return load(save(tmp_path_factory.mktemp("tables") / "toy__A.npz"))


def observed(strategy: Strategy, table: Table, seed: int, budget: int = BUDGET, **more: Any) -> list[int]:
    rows: list[int] = []

    def observe(row: int) -> float:
        rows.append(row)
        return float(table.times[row])

    strategy(table, budget, seed, observe, **more)
    return rows


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_spends_its_budget_on_different_configurations(name: str, table: Table) -> None:
    found, missing = available()
    if name in missing:
        pytest.skip(missing[name])
    rows = observed(found[name], table, seed=3)
    assert len(rows) == len(set(rows)) == BUDGET
    assert all(isinstance(row, int) and 0 <= row < len(table.times) for row in rows)
    assert observed(found[name], table, seed=3) == rows
    assert observed(found[name], table, seed=4) != rows


@pytest.mark.parametrize("name", STRATEGIES)
def test_it_gets_through_a_table_of_which_most_fail(name: str, table: Table) -> None:
    found, missing = available()
    if name in missing:
        pytest.skip(missing[name])
    times = np.where(np.arange(len(table.times)) % 4 == 0, table.times, np.nan)
    rows = observed(found[name], Table(table.name, table.axes, table.indices, times, table.repeats), seed=0, budget=30)
    assert len(rows) == len(set(rows)) == 30


def test_what_another_gpu_left_leads_to_the_same_optimum(table: Table) -> None:
    everything = evidence_of(table, None, seed=0)
    assert table.fraction(observed(tilewright, table, 0, evidence=[everything])[0]) == 1.0


def test_evidence_is_the_times_of_those_that_worked(table: Table) -> None:
    rows = {config: row for row, config in enumerate(table.configs)}
    everything = evidence_of(table, None, seed=0)
    assert len(everything.times_us) == int((~np.isnan(table.times)).sum())
    assert "toy__A".removeprefix("toy__") in everything.reason
    drawn = evidence_of(table, 48, seed=0)
    assert 0 < len(drawn.times_us) <= 48
    for config, time_us in (*everything.times_us.items(), *drawn.times_us.items()):
        assert time_us == pytest.approx(1000 * table.times[rows[config]])
    assert set(evidence_of(table, 48, seed=1).times_us) != set(drawn.times_us)
    assert len(evidence_of(table, 1000, seed=0).times_us) == len(everything.times_us)


def test_what_is_not_installed_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(strategies, "find_spec", lambda name: None)
    monkeypatch.setattr(strategies, "version", absent)
    found, missing = available()
    assert set(found) == {"tilewright", "random", "optuna-tpe"}
    assert missing == {
        "optuna-gp": "PyTorch is not installed (pip install torch)",
        "kernel-tuner": "Kernel Tuner is not installed (pip install -e '.[bench]')",
    }


@pytest.mark.parametrize(("release", "good"), [("1.5.0", True), ("1.10", True), ("1.4.0", False), ("1.0.0b6", False)])
def test_a_kernel_tuner_that_is_too_old_is_not_run(release: str, good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "version", lambda name: release)
    found, missing = available()
    assert ("kernel-tuner" in found) == good
    if not good:
        assert missing["kernel-tuner"] == f"Kernel Tuner {release} is older than 1.5 (pip install -e '.[bench]')"


def test_optuna_learns_of_the_configuration_that_was_tried(table: Table, tmp_path: Path) -> None:
    """On a list with holes, most proposals of a sampler that knows only the axes have to be moved."""
    import optuna

    class First(optuna.samplers.RandomSampler):
        """Always asks for the first value of each axis; keeps the study's last trials."""

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
            self.trials = study.get_trials(deepcopy=True)
            return 0

    sampler = First()
    rows: list[int] = []

    def observe(row: int) -> float:
        rows.append(row)
        return float(table.times[row])

    strategies._optuna(sampler, table, 6, observe)
    told = {
        tuple(trial.params[name] for name in table.axes): trial.value
        for trial in sampler.trials
        if trial.state == optuna.trial.TrialState.COMPLETE
    }
    assert told == {tuple(map(int, table.indices[row])): table.times[row] for row in rows[:5]}


def test_a_landscape_is_searched_with_its_prediction_and_the_default() -> None:
    path = min(landscape_file.SHIPPED.glob("*.npz"), key=lambda file: file.stat().st_size)
    table, landscape = load(path), landscape_file.load(path)
    rows = observed(predicting, table, 0, landscape=landscape)
    assert len(rows) == len(set(rows)) == BUDGET
    configs = list(landscape.rows)
    for row in rows:  # the table's row is the landscape's
        assert tuple(getattr(configs[row], name) for name in table.axes) == tuple(
            getattr(table.configs[row], name) for name in table.axes
        )
    assert configs[rows[0]] == by_prediction(landscape, before_compiling(landscape))[0]
    default = landscape.kernel.default(landscape.problem, landscape.device)
    assert (default in [configs[row] for row in rows[:2]]) == (default in landscape.rows)

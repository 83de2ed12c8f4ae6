"""Search strategies that a replay compares: the tuner's own, and what others offer.

A strategy is a function of a table, a budget, a seed and `observe`, which takes a row and returns its time in ms, NaN
for a failure. It observes as many rows as the budget allows, none twice, and returns.
"""

from __future__ import annotations

import random as python_random
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.landscape_file import Landscape
from benchmarks.prediction import priors
from benchmarks.replay_tables import Table
from tilewright.tuner.search import Candidates, Evidence, Search

Observe = Callable[[int], float]
Strategy = Callable[[Table, int, int, Observe], None]

OURS = "tilewright"
US_PER_MS = 1000.0

KERNEL_TUNER_STRATEGY = "adaptive_tabu_greywolf"
KERNEL_TUNER_SINCE = (1, 5)
"""The release whose interface between a strategy and its runner is used here."""


def tilewright(table: Table, budget: int, seed: int, observe: Observe, evidence: Sequence[Evidence] = ()) -> None:
    """The tuner's search, one proposal at a time, without a prediction or a default: a table has neither."""
    candidates = Candidates(table.axes, table.configs, evidence=evidence, seed=seed)
    _replayed(Search(candidates), table.configs, budget, observe)


def predicting(table: Table, budget: int, seed: int, observe: Observe, landscape: Landscape) -> None:
    """The tuner's search of a problem of ours, with the prediction and the default configuration that a run has; the
    table is that of the landscape's file."""
    predicted_us = priors(landscape)
    default = landscape.kernel.default(landscape.problem, landscape.device)
    candidates = Candidates(
        landscape.axes(),
        list(predicted_us),
        default if default in landscape.rows else None,  # of a revision with another default
        predicted_us=list(predicted_us.values()),
        seed=seed,
    )
    _replayed(Search(candidates), list(landscape.rows), budget, observe)  # in the order of the table's rows


def _replayed(search: Search, configs: Sequence[Any], budget: int, observe: Observe) -> None:
    rows = {config: row for row, config in enumerate(configs)}
    for _ in range(budget):
        for trial, config in search.ask(1):
            time_ms = observe(rows[config])
            search.tell(trial, None if np.isnan(time_ms) else time_ms * US_PER_MS)


def evidence_of(source: Table, trials: int | None, seed: int) -> Evidence:
    """What a run on another GPU left: `trials` configurations drawn at random, or all, with the times of those that
    worked."""
    rows = np.arange(len(source.times))
    if trials is not None:
        rows = np.random.default_rng(seed).choice(rows, min(trials, len(rows)), replace=False)
    worked = rows[~np.isnan(source.times[rows])]
    return Evidence(f"board {source.gpu}", {source.configs[row]: source.times[row] * US_PER_MS for row in worked})


def random(table: Table, budget: int, seed: int, observe: Observe) -> None:
    """Rows at random."""
    for row in np.random.default_rng(seed).permutation(len(table.times))[:budget]:
        observe(int(row))


def optuna_tpe(table: Table, budget: int, seed: int, observe: Observe) -> None:
    """Optuna's default sampler, moved to the nearest valid configuration that is untried."""
    import optuna

    _optuna(optuna.samplers.TPESampler(seed=seed), table, budget, observe)


def optuna_gp(table: Table, budget: int, seed: int, observe: Observe) -> None:
    """Optuna's Gaussian process (needs PyTorch), moved likewise."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.GPSampler(seed=seed, deterministic_objective=True)
    _optuna(sampler, table, budget, observe)


def _optuna(sampler: Any, table: Table, budget: int, observe: Observe) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Axes of numbers by their place, so that a sampler knows their order.
    distributions: dict[str, Any] = {
        name: optuna.distributions.IntDistribution(0, len(values) - 1)
        if all(isinstance(value, int | float) for value in values)
        else optuna.distributions.CategoricalDistribution(range(len(values)))
        for name, values in table.axes.items()
    }
    study = optuna.create_study(sampler=sampler)
    untried = np.ones(len(table.times), dtype=bool)
    for _ in range(budget):
        trial = study.ask(distributions)
        wanted = np.array([trial.params[name] for name in table.axes])
        rows = np.flatnonzero(untried)
        row = int(rows[np.argmin(np.abs(table.indices[rows] - wanted).sum(axis=1))])
        untried[row] = False
        time_ms = observe(row)
        params = dict(zip(table.axes, map(int, table.indices[row]), strict=True))
        if params == trial.params and not np.isnan(time_ms):
            study.tell(trial, time_ms)
            continue
        # What is learned belongs to the configuration that was tried.
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        if not np.isnan(time_ms):
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=time_ms))


def kernel_tuner(table: Table, budget: int, seed: int, observe: Observe) -> None:
    """Kernel Tuner's adaptive tabu grey wolf optimiser with its default options: of its strategies the one that comes
    nearest the optimum of the shipped spaces in 100 trials.

    All is theirs (strategy, search space, cost function, budget) but the runner, which treats a table as that of their
    simulation mode does: with one seed both try the same. A proposal that was tried before is answered from memory and
    costs no trial, there as here. The strategy ends after 5000 proposals, repeated ones included; what is left of the
    budget goes to another run of it.
    """
    from kernel_tuner.interface import Options, strategy_map
    from kernel_tuner.searchspace import Searchspace
    from kernel_tuner.util import TuningBudget

    # Their strategies draw from the generators of the process.
    python_random.seed(seed)
    np.random.seed(seed)
    params = {name: list(values) for name, values in table.axes.items()}
    configs = [tuple(getattr(config, name) for name in params) for config in table.configs]
    known = {row: dict(zip(params, config, strict=True)) for row, config in enumerate(configs)}
    space = Searchspace(None, None, None, from_cache={"tune_params": params, "cache": known})
    trials = TuningBudget(max_fevals=budget)
    options = Options(
        objective=["time"],
        objective_higher_is_better=[False],
        strategy_options=Options(max_fevals=budget),
        budget=trials,
        verbose=False,
    )
    runner = _TableRunner({config: row for row, config in enumerate(configs)}, observe)
    while not trials.is_done():
        strategy_map[KERNEL_TUNER_STRATEGY].tune(space, runner, options)


class _TableRunner:
    """What Kernel Tuner's cost function asks of a runner, over a table."""

    def __init__(self, rows: Mapping[tuple[Any, ...], int], observe: Observe) -> None:
        self._rows = rows
        self._observe = observe
        self._results: dict[int, dict[str, Any]] = {}

    def add_strategy_time(self, seconds: float) -> None:
        """Theirs to account for; here the caller's clock does."""

    def run(self, configs: Sequence[Sequence[Any]], options: Any) -> list[dict[str, Any] | None]:
        """A result of each configuration; None for those that the budget has nothing left for."""
        from kernel_tuner.util import RuntimeFailedConfig

        results: list[dict[str, Any] | None] = []
        for config in configs:
            if options.budget.is_done():
                results.append(None)
                continue
            row = self._rows[tuple(config)]
            if row not in self._results:
                time_ms = self._observe(row)
                failed = np.isnan(time_ms)
                self._results[row] = {"__error__": RuntimeFailedConfig()} if failed else {"time": time_ms}
                options.budget.add_evaluations(1)
            results.append(dict(self._results[row]))
        return results


STRATEGIES: dict[str, Strategy] = {
    OURS: tilewright,
    "random": random,
    "optuna-tpe": optuna_tpe,
    "optuna-gp": optuna_gp,
    "kernel-tuner": kernel_tuner,
}


def available() -> tuple[dict[str, Strategy], dict[str, str]]:
    """The strategies that can run here, by name, and why each of the others can't."""
    missing = {}
    if find_spec("torch") is None:
        missing["optuna-gp"] = "PyTorch is not installed (pip install torch)"
    try:
        release = version("kernel-tuner")
    except PackageNotFoundError:
        missing["kernel-tuner"] = "Kernel Tuner is not installed (pip install -e '.[bench]')"
    else:
        if tuple(map(int, release.split(".")[:2])) < KERNEL_TUNER_SINCE:
            wanted = ".".join(map(str, KERNEL_TUNER_SINCE))
            missing["kernel-tuner"] = f"Kernel Tuner {release} is older than {wanted} (pip install -e '.[bench]')"
    return {name: strategy for name, strategy in STRATEGIES.items() if name not in missing}, missing

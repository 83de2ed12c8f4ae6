"""The search for one problem's configuration: an Optuna study over the configurations that are worth trying.

Ask-and-tell, in batches, so that the compilers run in parallel. The first proposals are the best predicted
configuration, the default one and the next best predicted; after those Optuna's sampler proposes, and each proposal is
moved to the nearest configuration that is valid and untried, so that no trial is spent twice. With one seed, the same
outcomes give the same proposals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.kernels.problem import Config
from tilewright.kernels.space import Space

if TYPE_CHECKING:
    import optuna

SEEDED_SHARE = 0.75
"""Share of the trials that go to the best predicted configurations before the sampler takes over: while a prediction is
all there is to go by, most trials follow it; the rest look where it would not."""


class Search:
    """One problem's study.

    `configs` are the configurations worth trying, best predicted first; `known` is what `learn` takes.
    """

    def __init__(
        self,
        space: Space[Any, Any],
        configs: Sequence[Config],
        default: Config,
        *,
        trials: int,
        known: Mapping[Config, float | None] = MappingProxyType({}),
        seed: int = 0,
    ) -> None:
        import optuna  # 0.3 s: not paid by a run that the cache answers

        # The study's log is the tuner's own progress; Optuna's would print a line for every trial.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._axes = {name: list(values) for name, values in space.axes.items()}
        self._distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.CategoricalDistribution(values) for name, values in self._axes.items()
        }
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=max(1, trials // 2)
        )
        self._study = optuna.create_study(sampler=sampler, direction="minimize")
        # The best predicted before the default: of one trial, a program should get no less than of none.
        pool = list(dict.fromkeys((*configs[:1], default, *configs[1:])))
        self._untried = {config: row for row, config in enumerate(pool)}
        self._places = np.array([self._place(config) for config in pool], dtype=float)
        self._pool = pool
        self._seeds = pool[: max(1, round(trials * SEEDED_SHARE))]
        self.learn(known)

    def learn(self, known: Mapping[Config, float | None]) -> None:
        """Takes in the times (None for failures) of configurations that this search has not proposed, and won't now."""
        for config, time_us in known.items():
            self._untried.pop(config, None)
            if time_us is not None and self._on_axes(config):
                self._study.add_trial(
                    self._optuna.trial.create_trial(
                        params=self._params(config), distributions=self._distributions, value=time_us
                    )
                )
        self._seeds = [config for config in self._seeds if config in self._untried]

    def ask(self, count: int) -> list[tuple[optuna.trial.Trial, Config]]:
        """Up to `count` proposals, none of them proposed before; empty when every configuration was."""
        asked: list[tuple[optuna.trial.Trial, Config]] = []
        while len(asked) < count and self._untried:
            if self._seeds:
                config = self._seeds.pop(0)
                if self._on_axes(config):
                    self._study.enqueue_trial(self._params(config))
                trial = self._study.ask(self._distributions)
            else:
                trial = self._study.ask(self._distributions)
                config = self._nearest(trial.params)
            self._untried.pop(config, None)
            asked.append((trial, config))
        return asked

    def tell(self, trial: optuna.trial.Trial, config: Config, time_us: float | None) -> None:
        """The outcome of a proposal; None when it failed."""
        states = self._optuna.trial.TrialState
        if time_us is None:
            self._study.tell(trial, state=states.FAIL)
        elif self._on_axes(config) and trial.params != self._params(config):
            # The trial was moved to another configuration: what is learned belongs there.
            self._study.tell(trial, state=states.FAIL)
            self._study.add_trial(
                self._optuna.trial.create_trial(
                    params=self._params(config), distributions=self._distributions, value=time_us
                )
            )
        else:
            self._study.tell(trial, time_us)

    def _nearest(self, params: Mapping[str, Any]) -> Config:
        """The untried configuration fewest steps along the axes away; the best predicted among equals."""
        rows = np.fromiter(self._untried.values(), dtype=int)
        wanted = np.array([self._axes[name].index(params[name]) for name in self._axes], dtype=float)
        steps = np.abs(self._places[rows] - wanted).sum(axis=1)
        nearest: Config = self._pool[rows[int(np.argmin(steps))]]
        return nearest

    def _params(self, config: Config) -> dict[str, Any]:
        return {name: getattr(config, name) for name in self._axes}

    def _on_axes(self, config: Config) -> bool:
        return all(getattr(config, name) in values for name, values in self._axes.items())

    def _place(self, config: Config) -> list[float]:
        """Index of the configuration on each axis; a default off an axis lies beside its nearest value."""
        place = []
        for name, values in self._axes.items():
            value = getattr(config, name)
            place.append(float(values.index(value) if value in values else np.searchsorted(values, value)))
        return place

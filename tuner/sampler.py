"""`EnumeratedSampler`: an Optuna sampler for a space that is known as a list of its valid configurations.

    configs = [{"BLOCK_M": m, "num_warps": w} for m in (32, 64, 128) for w in (4, 8) if m * w < 1024]
    sampler = EnumeratedSampler(configs, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: measure(trial.suggest_categorical("BLOCK_M", sampler.axes["BLOCK_M"]), …), n_trials=30)

Samplers that know axes and not the list propose what is invalid, or what was tried, and moving that to the nearest
valid one makes them stick. This one ranks the whole list (`ranking`).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tilewright.tuner.ranking import Elsewhere, Ranking
from tilewright.tuner.surrogate import Array, encode
from tilewright.tuning_db.errors import UsageError


class EnumeratedSampler(BaseSampler):
    """Proposes configurations of a list, none twice; one objective, minimised or maximised.

    Objective values must be positive and count by their logarithm: times, rates, energies. A trial that fails, or is
    pruned before it reported a value, teaches that its like may fail. Proposals still running count as tried with the
    outcome expected of them, so that any number can be asked for at once, also by several processes with one storage.
    When every configuration was tried, the first is proposed again, and a study that is optimising stops.

    Args:
        configs: the valid configurations, each with the same names. Values are numbers (numerical axes), or anything
            else that Optuna's categorical distribution takes.
        axes: the values of each name; those that occur if left out. Trials suggest with these as categorical choices,
            in this order.
        priors: for each, the logarithm of the objective it expects of every configuration, of (configurations).
        elsewhere: of each other search of the same kind (for another device, say) the configurations that worked, in
            the list or not, with a value for each, positive and the smaller the better.
        first: indices of configurations to try before any other.
        starters: configurations to try after those, far from them and from each other; a few if left out.
        seed: the same seed and outcomes give the same proposals.
        counts: which trials of a study say something of their configuration; all if left out. One that doesn't leaves
            it untried.

    Raises:
        UsageError: an empty list, names that differ, or values that are not on the axes.
    """

    def __init__(
        self,
        configs: Sequence[Mapping[str, Any]],
        *,
        axes: Mapping[str, Sequence[Any]] | None = None,
        priors: Sequence[Array] = (),
        elsewhere: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[float]]] = (),
        first: Sequence[int] = (),
        starters: int | None = None,
        seed: int = 0,
        counts: Callable[[FrozenTrial], bool] = lambda trial: True,
    ) -> None:
        if not configs:
            raise UsageError("a sampler needs at least one configuration; got none")
        names = list(configs[0]) if axes is None else list(axes)
        for config in configs:
            if config.keys() != set(names):
                raise UsageError(f"configuration {dict(config)} must have exactly the names {', '.join(names)}")
        if axes is None:
            axes = {name: list(dict.fromkeys(config[name] for config in configs)) for name in names}
        self.axes: dict[str, tuple[Any, ...]] = {name: tuple(values) for name, values in axes.items()}
        """The values of each name, in the order of the categorical choices."""
        self.distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in self.axes.items()
        }
        """For `Study.ask`, or to create trials with."""
        self._configs = [dict(config) for config in configs]
        self._rows: dict[tuple[Any, ...], int] = {}
        for row, config in enumerate(self._configs):
            for name, value in config.items():
                if value not in self.axes[name]:
                    raise UsageError(f"{name}={value!r} is not on its axis {self.axes[name]}")
            if self._rows.setdefault(self._values(config), row) != row:
                raise UsageError(f"configuration {config} is in the list twice")
        for prior in priors:
            if np.shape(prior) != (len(configs),):
                raise UsageError(f"a prior of shape {np.shape(prior)} must have a value for each of {len(configs)}")
        others = [dict(config) for tried, _ in elsewhere for config in tried]
        for config in others:
            if config.keys() != set(names):
                raise UsageError(f"configuration {config} must have exactly the names {', '.join(names)}")
        features = encode(self.axes, [*self._configs, *others])
        self.features = features[: len(configs)]
        """Of every configuration, as the surrogate sees it: array of (configurations, features)."""
        searches, start = [], len(configs)
        for tried, values in elsewhere:
            if len(tried) != len(values):
                raise UsageError(f"{len(tried)} configurations tried elsewhere need a value each; got {len(values)}")
            for value in values:
                if not (math.isfinite(value) and value > 0):
                    raise UsageError(f"a value from elsewhere is {value}: {type(self).__name__} needs positive ones")
            if len(tried):
                searches.append(Elsewhere(features[start : start + len(tried)], np.log(values)))
            start += len(tried)
        self._ranking = Ranking(
            self.features, priors=priors, elsewhere=searches, first=first, starters=starters, seed=seed
        )
        self._independent = RandomSampler(seed=seed)
        self._counts = counts
        self._lock = threading.Lock()
        self._proposed: dict[
            tuple[str, int], int
        ] = {}  # by study and trial, until the storage shows the trial's values

    @property
    def expected_improvement(self) -> float:
        """By what part of the best value the last proposal is expected to improve on it; infinite for one that was not
        the surrogate's."""
        return self._ranking.expected_improvement

    def row_of(self, params: Mapping[str, Any]) -> int:
        """The index in the list of a trial's parameters.

        Raises:
            UsageError: they are of no configuration in the list.
        """
        row = self._row(params)
        if row is None:
            raise UsageError(f"{dict(params)} is no configuration of the list")
        return row

    def propose(self, study: Study) -> int | None:
        """The index in the list of what to try next, with no trial made for it; None when everything was tried."""
        with self._lock:
            return self._ranking.propose(*self._outcomes(study))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes: they are proposed together."""
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The proposal for a trial."""
        if not search_space:
            return {}
        with self._lock:
            row = self._ranking.propose(*self._outcomes(study, trial.number))
            if row is None:
                row = 0
                with contextlib.suppress(RuntimeError):  # of a study that isn't optimising
                    study.stop()
            self._proposed[study.study_name, trial.number] = row
        return dict(self._configs[row])

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value of a parameter that is no axis of the list."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _outcomes(self, study: Study, asking: int | None = None) -> tuple[list[int], list[float], list[int]]:
        """Rows tried, with what is to be small; and rows proposed whose outcomes are not known."""
        if len(study.directions) > 1:
            raise UsageError(f"{type(self).__name__} has one objective; the study has {len(study.directions)}")
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        known: dict[int, float] = {}
        pending: list[int] = []
        for trial in study.get_trials(deepcopy=False):
            if trial.number == asking or not self._counts(trial):
                continue
            row = self._row(trial.params)
            if row is None:
                row = self._proposed.get((study.study_name, trial.number))
            if row is None:
                continue  # of another list
            if not trial.state.is_finished():
                pending.append(row)
                continue
            self._proposed.pop((study.study_name, trial.number), None)
            value = _value(trial)
            if value is not None and not value > 0:
                raise UsageError(f"trial {trial.number} has value {value}: {type(self).__name__} needs positive ones")
            if value is not None:
                known.pop(row, None)  # tried again: the newest counts
                known[row] = sign * math.log(value)
            elif row not in known:
                known[row] = math.nan
        return list(known), list(known.values()), pending

    def _row(self, params: Mapping[str, Any]) -> int | None:
        if not self.axes.keys() <= params.keys():
            return None
        return self._rows.get(self._values(params))

    def _values(self, config: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(config[name] for name in self.axes)


def _value(trial: FrozenTrial) -> float | None:
    """What a finished trial is worth; None for a failure."""
    if trial.state is TrialState.COMPLETE:
        return trial.value
    if trial.state is TrialState.PRUNED and trial.intermediate_values:
        last = trial.intermediate_values[max(trial.intermediate_values)]
        return last if math.isfinite(last) else None
    return None

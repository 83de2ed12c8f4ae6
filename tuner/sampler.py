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
import numbers
import sys
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

PROPOSAL = "tilewright:proposal"
"""The system attribute of a trial with what was proposed for it: the place of each value on its axis."""


def _every(trial: FrozenTrial) -> bool:
    return True


class EnumeratedSampler(BaseSampler):
    """Proposes configurations of a list, none twice; one objective, minimised or maximised.

    Objective values must be positive and count by their logarithm: times, rates, energies. A trial that fails, or is
    pruned before it reported a positive value, teaches that its like may fail. Proposals still running, and enqueued
    configurations, count as tried with the outcome expected of them, so that any number can be asked for at once, also
    by several processes with one storage: each proposal is kept with its trial, in the storage, and given up where
    another trial has the same. (Two processes that keep theirs within milliseconds may still try one: the storage has
    no lock.) When every configuration was tried, the first is proposed again, and a study that is optimising stops.

    Args:
        configs: the valid configurations, at least one, each a mapping with the same names. Values are finite numbers
            (of a numerical axis), or anything else that Optuna's categorical distribution takes.
        axes: by name, all the values it may have, in the order that trials suggest them in as categorical choices. By
            default those that occur in `configs`.
        priors: predictions, each a float array of shape (len(configs),): the logarithm of the objective value that it
            expects of each configuration, finite. Where the objective is maximised, the negative of it.
        elsewhere: what other searches of the same kind (for another device, say) measured, each a pair of lists of one
            length: configurations, in `configs` or not, and their values, above 0, of which smaller ones are better.
        first: indices into `configs`, of those to try before any other.
        starters: how many to try after `first`, far from them and from each other, at least 0. By default a few.
        seed: an integer from 0 to 2³² - 1; the same seed and outcomes give the same proposals.
        counts: given a finished trial, whether its outcome says something of its configuration, which otherwise remains
            untried. By default every trial's does.

    Raises:
        UsageError: an empty list; names that differ; values that are not on the axes, or not finite; indices or a seed
            that are out of range.
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
        counts: Callable[[FrozenTrial], bool] = _every,
    ) -> None:
        if not configs:
            raise UsageError("a sampler needs at least one configuration; got none")
        names = list(configs[0]) if axes is None else list(axes)
        for config in configs:
            if config.keys() != set(names):
                raise UsageError(f"configuration {dict(config)} must have exactly the names {', '.join(names)}")
        self._configs = [{name: _plain(value) for name, value in config.items()} for config in configs]
        if axes is None:
            axes = {name: _distinct(name, [config[name] for config in self._configs]) for name in names}
        self.axes: dict[str, tuple[Any, ...]] = {name: tuple(map(_plain, values)) for name, values in axes.items()}
        """The values of each name, in the order of the categorical choices."""
        for name, choices in self.axes.items():
            for value in choices:
                _check_value(name, value)
        self.distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(values) for name, values in self.axes.items()
        }
        """For `Study.ask`, or to create trials with."""
        self._rows: dict[tuple[Any, ...], int] = {}
        for row, config in enumerate(self._configs):
            for name, value in config.items():
                if value not in self.axes[name]:
                    raise UsageError(f"{name}={value!r} is not on its axis {self.axes[name]}")
            if self._rows.setdefault(self._values(config), row) != row:
                raise UsageError(f"configuration {config} is in the list twice")
        priors = [_logarithms(prior, self._configs) for prior in priors]
        if not all(_is_index(row, len(configs)) for row in first):
            raise UsageError(f"first={list(first)} must be indices of the list, 0 to {len(configs) - 1}")
        if starters is not None and not _is_index(starters, sys.maxsize):
            raise UsageError(f"{starters=} must be at least 0, an integer")
        if not _is_index(seed, 2**32):
            raise UsageError(f"{seed=} must be an integer from 0 to {2**32 - 1}")
        tried_elsewhere = [
            {name: _plain(value) for name, value in config.items()} for tried, _ in elsewhere for config in tried
        ]
        for config in tried_elsewhere:
            if config.keys() != set(names):
                raise UsageError(f"configuration {config} must have exactly the names {', '.join(names)}")
            for name, value in config.items():
                _check_value(name, value)
        features = encode(self.axes, [*self._configs, *tried_elsewhere])
        self.features = features[: len(configs)]
        """Of every configuration, as the surrogate sees it: array of (configurations, features)."""
        searches, start = [], len(configs)
        for tried, values in elsewhere:
            if len(tried) != len(values):
                raise UsageError(f"{len(tried)} configurations tried elsewhere need a value each; got {len(values)}")
            for value in values:
                if not _is_positive(value):
                    raise UsageError(f"a value from elsewhere is {value!r}: {type(self).__name__} needs positive ones")
            if len(tried):
                searches.append(Elsewhere(features[start : start + len(tried)], np.log(values)))
            start += len(tried)
        self._ranking = Ranking(
            self.features, priors=priors, elsewhere=searches, first=first, starters=starters, seed=seed
        )
        self._independent = RandomSampler(seed=seed)
        self._counts = counts
        self._lock = threading.Lock()

    @property
    def expected_improvement(self) -> float:
        """By what part of the best value the last proposal is expected to improve on it; infinite for one that was not
        the surrogate's."""
        return self._ranking.expected_improvement

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def find(self, params: Mapping[str, Any]) -> int | None:
        """The index in the list of a trial's parameters; None where they are of no configuration in it."""
        if not self.axes.keys() <= params.keys():
            return None
        try:
            return self._rows.get(self._values(params))
        except TypeError:  # some value can't be hashed
            return None

    def row_of(self, params: Mapping[str, Any]) -> int:
        """As `find`, of parameters that must be of the list.

        Raises:
            UsageError: they are of no configuration in it.
        """
        row = self.find(params)
        if row is None:
            raise UsageError(f"{dict(params)} is no configuration of the list")
        return row

    def propose(self, study: Study) -> int | None:
        """The index in the list of what to try next, with no trial made for it; None when everything was tried."""
        with self._lock:
            return self._ranking.propose(*self._outcomes(study))

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Proposes at once where Optuna may ask no sampler: for axes of one value each, or all of them enqueued.

        Raises:
            UsageError: as `sample_relative`.
        """
        known = all(distribution.single() for distribution in self.distributions.values())
        if known or trial.system_attrs.get("fixed_params"):
            self.sample_relative(study, trial, self.distributions)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All axes: they are proposed together."""
        return dict(self.distributions)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The proposal for a trial.

        Raises:
            UsageError: some of the axes are to be left out, or what was enqueued is of no configuration of the list.
        """
        if not search_space:
            return {}
        if missing := self.axes.keys() - search_space.keys():
            raise UsageError(
                f"{type(self).__name__} proposes {', '.join(self.axes)} together, and {', '.join(sorted(missing))} is "
                "fixed by another sampler: leave the other configurations out of the list instead"
            )
        with self._lock:
            row = self._given(study, trial)
            while row is None:
                row = self._ranking.propose(*self._outcomes(study, trial.number))
                if row is None:
                    with contextlib.suppress(RuntimeError):  # of a study that isn't optimising
                        study.stop()
                    return dict(self._configs[0])
                if row in self._held(study, lambda number: number != trial.number):
                    row = None  # another has proposed it meanwhile
                    continue
                self._keep(study, trial, row)
                if row in self._held(study, lambda number: number < trial.number):
                    row = None  # at the very moment
            self._keep(study, trial, row)
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
        for trial in self._trials(study):
            if trial.number == asking or not self._counts(trial):
                continue
            row = self._row(trial)
            if row is None:
                continue  # of another list
            if not trial.state.is_finished():
                pending.append(row)
                continue
            value = _value(trial)
            if value is not None and not value > 0:
                raise UsageError(f"trial {trial.number} has value {value}: {type(self).__name__} needs positive ones")
            if value is not None:
                known.pop(row, None)  # tried again: the newest counts
                known[row] = sign * math.log(value)
            elif row not in known:
                known[row] = math.nan
        return list(known), list(known.values()), pending

    def _given(self, study: Study, trial: FrozenTrial) -> int | None:
        """The row of a trial that has one already: enqueued, or tried anew after its process died. Where a part of a
        configuration was enqueued, one with that part, untried if there is any; None of a trial that has nothing."""
        given = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        kept = self._proposed(trial)
        if kept is not None and _agree(given, self._configs[kept]):
            return kept
        fixed = {name: value for name, value in given.items() if name in self.axes}
        if not fixed:
            return None
        held = self._held(study, lambda number: number != trial.number)
        rows = [row for row, config in enumerate(self._configs) if _agree(fixed, config)]
        if not rows:
            raise UsageError(f"no configuration of the list has {fixed}, which was enqueued: enqueue what one has")
        rows = [row for row in rows if row not in held] or rows
        return rows[int(np.random.default_rng((trial.number, len(rows))).integers(len(rows)))]

    def _keep(self, study: Study, trial: FrozenTrial, row: int) -> None:
        """Keeps a proposal where every process finds it: a trial has no parameters until an objective asks for them."""
        places = {name: self.axes[name].index(value) for name, value in self._configs[row].items()}
        if trial.system_attrs.get(PROPOSAL) != places:
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, places)
            trial.system_attrs[PROPOSAL] = places

    def _held(self, study: Study, among: Callable[[int], bool]) -> set[int | None]:
        """The rows of the trials whose number is among those."""
        return {self._row(trial) for trial in self._trials(study) if among(trial.number) and self._counts(trial)}

    def _trials(self, study: Study) -> list[FrozenTrial]:
        # Of the whole study, of which some pruners show a sampler a part.
        return study._storage.get_all_trials(study._study_id, deepcopy=False)

    def _row(self, trial: FrozenTrial) -> int | None:
        """The row that a trial tries or has tried; None for one of another list, or a mixture that this one lacks."""
        if self.axes.keys() <= trial.params.keys():
            return self.find(trial.params)
        row = self._proposed(trial)
        if row is None and not trial.state.is_finished():
            row = self.find(trial.system_attrs.get("fixed_params", {}))  # enqueued
        # An objective may have been given other values than those proposed.
        return row if row is not None and _agree(trial.params, self._configs[row]) else None

    def _proposed(self, trial: FrozenTrial) -> int | None:
        places = trial.system_attrs.get(PROPOSAL)
        return None if places is None else self.find(self._at(places))

    def _at(self, places: Any) -> dict[str, Any]:
        """The values at the places of a proposal; none for one of other axes."""
        try:
            return {name: self.axes[name][place] for name, place in places.items()}
        except (AttributeError, KeyError, IndexError, TypeError):
            return {}

    def _values(self, config: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(config[name] for name in self.axes)


def _plain(value: Any) -> Any:
    """A number of NumPy's as Python's, which every storage takes."""
    return value.item() if isinstance(value, np.generic) else value


def _is_index(row: Any, count: int) -> bool:
    return isinstance(row, int | np.integer) and not isinstance(row, bool) and bool(0 <= row < count)


def _is_positive(value: Any) -> bool:
    try:
        return math.isfinite(value) and value > 0
    except (TypeError, OverflowError):  # no number, or one past all floats
        return False


def _agree(given: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether what is given of a configuration is as there; other parameters are of no account."""
    return all(config[name] == value for name, value in given.items() if name in config)


def _distinct(name: str, values: Sequence[Any]) -> list[Any]:
    """The values, each once."""
    try:
        return list(dict.fromkeys(values))
    except TypeError:
        for value in values:
            _check_value(name, value)
        raise


def _logarithms(prior: Any, configs: Sequence[Mapping[str, Any]]) -> Array:
    """A prior as numbers, one for each configuration, all finite."""
    if np.shape(prior) != (len(configs),):
        raise UsageError(f"a prior of shape {np.shape(prior)} must have a value for each of {len(configs)}")
    try:
        expected = np.asarray(prior, dtype=float)
    except (TypeError, ValueError):
        raise UsageError("a prior must have a logarithm, a number, for each configuration") from None
    for value, config in zip(expected, configs, strict=True):
        if not math.isfinite(value):
            raise UsageError(f"a prior expects {value} of {config}: it needs a finite logarithm")
    return expected


def _check_value(name: str, value: Any) -> None:
    try:
        hash(value)
        fine = not isinstance(value, numbers.Real) or math.isfinite(value)
    except (TypeError, OverflowError):
        fine = False
    if not fine:
        raise UsageError(f"{name}={value!r} must be a finite number, or anything that can be hashed")


def _value(trial: FrozenTrial) -> float | None:
    """What a finished trial is worth; None for a failure."""
    if trial.state is TrialState.COMPLETE:
        return trial.value
    if trial.state is TrialState.PRUNED and trial.intermediate_values:
        last = trial.intermediate_values[max(trial.intermediate_values)]
        return last if math.isfinite(last) and last > 0 else None
    return None

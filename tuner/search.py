"""The search for one problem's configuration: an Optuna study over the configurations that are worth trying.

Ask-and-tell, in batches, so that the compilers run in parallel. The first proposals are the best predicted
configuration, the default one and what else the priors recommend; from then on `EnumeratedSampler` proposes from the
list, none twice. With one seed, the same outcomes give the same proposals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.kernels.problem import Config

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from tilewright.tuner.sampler import EnumeratedSampler

RECOMMENDED = 3
"""Configurations that the priors recommend to try first, at least one of each prior."""

PLATEAU = 0.001
"""Improvement expected of the best proposal, as a part of the time, below which a search has come to its end: timing
noise is more."""

PLATEAU_BATCHES = 2
"""Batches in a row of which no proposal is expected to improve more, until the search ends."""

MOST_JOINED = 150
"""Trials made elsewhere that the search's own process takes in, those of the nearest sources; of a source with more, a
process of its own gives a prior, and what was tried there counts as it is. That process has a limit of its own,
`priors.MOST_TRIALS`: what joins, of all sources together, shares `ranking.MOST_FITTED` with the trials made here."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Outcomes of configurations tried elsewhere: on another board, a near shape, by an earlier revision."""

    reason: str
    times_us: Mapping[Config, float]


class Candidates:
    """The list of configurations that a search goes through, and what is expected of them.

    Args:
        axes: the values of each of a configuration's fields.
        configs: the configurations worth trying.
        default: tried among the first; it need not be one of `configs`. None where there is no such thing.
        predicted_us: what each of `configs` is predicted to take; without it, nothing is.
        evidence: what is known of the configurations elsewhere.
        exploring: whether to try a few configurations that nothing speaks for: of no use where outcomes are predicted.
        seed: of the search.

    Attributes:
        pool: the configurations, none twice.
        axes: the values of each field, with those that only the default has.
    """

    def __init__(
        self,
        axes: Mapping[str, Sequence[Any]],
        configs: Sequence[Config],
        default: Config | None = None,
        *,
        predicted_us: Sequence[float] | None = None,
        evidence: Sequence[Evidence] = (),
        exploring: bool = True,
        seed: int = 0,
    ) -> None:
        self._names = list(axes)
        self.pool: list[Config] = list(dict.fromkeys((*configs, *(() if default is None else (default,)))))
        self._places = {config: place for place, config in enumerate(self.pool)}
        # A default off an axis puts its value on it.
        self.axes = {
            name: tuple(dict.fromkeys((*values, *(getattr(config, name) for config in self.pool))))
            for name, values in axes.items()
        }
        predicted: list[Any] = []
        if predicted_us is not None:
            expected = dict(zip(configs, predicted_us, strict=True))
            # Of a default that the space does not recommend nothing good is expected.
            slowest = max(expected.values(), default=1.0)
            predicted.append(np.log([expected.get(config, slowest) for config in self.pool]))
        self._priors = [*predicted]
        self._joined: list[tuple[list[dict[str, Any]], list[float]]] = []
        left = MOST_JOINED
        expectations = self._expectations(evidence, seed)
        for each, prior in zip(evidence, expectations, strict=True):
            if len(each.times_us) > left:
                self._priors.append(prior)
                continue
            left -= len(each.times_us)
            self._joined.append(([self.fields(config) for config in each.times_us], list(each.times_us.values())))
        self._first = self._recommended(default, [*predicted, *expectations])
        self._starters = None if exploring else 0
        self._seed = seed

    def sampler(self, counts: Callable[[FrozenTrial], bool] = lambda trial: True) -> EnumeratedSampler:
        """A new one that proposes from `pool`, by index; `counts` as it takes it."""
        from tilewright.tuner.sampler import EnumeratedSampler  # brings Optuna, as `Search`

        return EnumeratedSampler(
            [self.fields(config) for config in self.pool],
            axes=self.axes,
            priors=self._priors,
            elsewhere=self._joined,
            first=self._first,
            starters=self._starters,
            seed=self._seed,
            counts=counts,
        )

    def fields(self, config: Config) -> dict[str, Any]:
        """A configuration as a trial's parameters."""
        return {name: getattr(config, name) for name in self._names}

    def _recommended(self, default: Config | None, priors: Sequence[Any]) -> list[int]:
        """The best by the first prior before the default: of one trial, a program should get no less than of none."""
        best = [int(np.argmin(prior)) for prior in priors]
        if priors:
            best += map(int, np.argsort(np.mean(priors, axis=0), kind="stable")[:RECOMMENDED])
        recommended = list(dict.fromkeys(best))[: max(RECOMMENDED, len(priors))]
        place_of_default = [] if default is None else [self._places[default]]
        return [*recommended[:1], *place_of_default, *recommended[1:]]

    def _expectations(self, evidence: Sequence[Evidence], seed: int) -> list[Any]:
        """What each piece of evidence leads to expect of the pool, as logarithms."""
        if not evidence:
            return []
        from tilewright.tuner.priors import prior_from_trials
        from tilewright.tuner.surrogate import encode

        elsewhere = [[(config, us) for config, us in each.times_us.items()] for each in evidence]
        others = [config for trials in elsewhere for config, _ in trials]
        features = encode(self.axes, [self.fields(config) for config in (*self.pool, *others)])
        priors, start = [], len(self.pool)
        for trials in elsewhere:
            own = features[start : start + len(trials)]
            start += len(trials)
            log_times = np.array([math.log(time_us) for _, time_us in trials])
            priors.append(prior_from_trials(features[: len(self.pool)], own, log_times, seed=seed))
        return priors


class Search:
    """One problem's study, of these candidates."""

    def __init__(self, candidates: Candidates) -> None:
        import optuna  # 0.3 s: not paid by a run that the cache answers

        # The study's log is the tuner's own progress; Optuna's would print a line for every trial.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._candidates = candidates
        self._sampler = candidates.sampler()
        self._untried = set(candidates.pool)
        self._study = optuna.create_study(sampler=self._sampler, direction="minimize")
        self._flat = 0

    @property
    def finished(self) -> bool:
        """Whether all were tried, or nothing better is expected: `PLATEAU`."""
        return not self._untried or self._flat >= PLATEAU_BATCHES

    def learn(self, known: Mapping[Config, float | None]) -> None:
        """Takes in the times in µs (None for failures) of configurations that this search has not proposed, and won't
        now."""
        states = self._optuna.trial.TrialState
        for config, time_us in known.items():
            if config in self._untried:
                self._untried.discard(config)
                self._study.add_trial(
                    self._optuna.trial.create_trial(
                        params=self._candidates.fields(config),
                        distributions=self._sampler.distributions,
                        value=time_us,
                        state=states.FAIL if time_us is None else states.COMPLETE,
                    )
                )

    def ask(self, count: int) -> list[tuple[optuna.trial.Trial, Config]]:
        """Up to `count` proposals, none of them proposed before; empty when every configuration was."""
        asked: list[tuple[optuna.trial.Trial, Config]] = []
        improvement = 0.0
        for _ in range(min(count, len(self._untried))):
            trial = self._study.ask(self._sampler.distributions)
            config = self._candidates.pool[self._sampler.row_of(trial.params)]
            self._untried.discard(config)
            improvement = max(improvement, self._sampler.expected_improvement)
            asked.append((trial, config))
        self._flat = self._flat + 1 if improvement < PLATEAU else 0
        return asked

    def tell(self, trial: optuna.trial.Trial, time_us: float | None) -> None:
        """The outcome of a proposal in µs; None when it failed."""
        if time_us is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, time_us)

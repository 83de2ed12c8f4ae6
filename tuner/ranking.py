"""Which configuration of a list to try next: the one whose expected improvement is the largest.

How it goes, for a list of valid configurations that is known as a whole:

1. What the caller names comes first, then a few configurations far from those and from each other.
2. After that a Gaussian process over the logarithm of the times (`surrogate`) ranks the whole list. The worse half of
   the times counts as equally bad, but for those near the best: where configurations are bad, nothing is to be learned
   from how bad.
3. Priors, what something else says of the same list (a prediction, records of another board), are its mean, in a
   weighted sum. The weights are fitted anew after every trial by non-negative least squares, so that a prior that
   misleads goes to 0 and the process, which models what the priors leave over, takes its place.
4. Trials made elsewhere (of another board, a near shape), where there are few, are the process's own: it sees of which
   search a trial is, by a feature whose length scale tells how alike the searches are (Swersky et al., Multi-Task
   Bayesian Optimization, 2013). What a prior leaves out comes with that: how sure it is, and the length scales.
5. A failure has no time and leaves none in the process, for a cliff there would bend what is learned of its neighbours.
   A second process, over whether a configuration worked, gives the chance that one does, and the expected improvement
   is weighed with it.
6. Proposals that wait for their outcome count as tried with the expected outcome (kriging believer), so that a batch
   is spread.

Measured on published spaces by `python -m benchmarks.search_quality`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.special import ndtr

from tilewright.tuner.surrogate import SPREAD_ELSEWHERE, Array, GaussianProcess, Posterior, one_thread

STARTERS = 6
"""Trials before the process takes over where there is no prior."""

STARTERS_WITH_PRIOR = 2
"""Trials far from what the priors recommend, where there are some: they show how far the priors are to be trusted."""

TRUST_ELSEWHERE = 20
"""Trials that the spread of times elsewhere counts as, beside that of the trials here."""

NEAR_BEST = 0.5
"""Logarithm of how much slower than the best a time may be and still count as it is: 1.65 times."""

PRIOR_RIDGE = 0.005
"""How strongly the weights of priors hold to equal ones, which is what they are before any trial."""

ALWAYS_FITTED = 20
"""Trials up to which the hyperparameters are fitted after each; from then on after every `FITTED_EVERY`."""

FITTED_EVERY = 5

FITTED_BESIDE_ELSEWHERE = 6
"""The same beside trials from elsewhere, of a list that is ranked as a whole: they tell the hyperparameters more than
another trial does, and these are kept from then on. On the replayed spaces later fits make searches no better, and
slower."""

MOST_FITTED = 200
"""Trials the process is fitted to at the most: the better half of these, and an even share of the rest. A fifth more
are added one by one until it is fitted again."""

MOST_RANKED = 20_000
"""Configurations ranked at a time; of a longer list those near the best and a random part, drawn anew at every fit."""

UNSURE = 0.02
"""Variance added to that of whether a configuration works: of one just like a success, 1 in 5,000 may fail."""

LEAST_CHANCE = 1e-3
"""That anything works: a region is never ruled out."""

_LEAST_SPREAD = 1e-3
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Trials of another search of the same kind.

    Attributes:
        features: of (trials, features), encoded together with the list's.
        values: the logarithm of the time of each, all finite.
    """

    features: Array
    values: Array


class Ranking:
    """Proposals from one list, by `features` of (configurations, features) as `encode` makes them.

    Args:
        features: of every configuration of the list.
        priors: for each, the logarithm of the time it expects of every configuration, of (configurations).
        elsewhere: trials of other searches.
        first: rows to try before any other, in this order.
        starters: rows to try after those, far from them and from each other; by default none with trials from
            elsewhere, `STARTERS_WITH_PRIOR` with priors alone, or with `first` `STARTERS` in all.
        seed: of what is drawn at random. The same seed and outcomes give the same proposals.
    """

    def __init__(
        self,
        features: Array,
        *,
        priors: Sequence[Array] = (),
        elsewhere: Sequence[Elsewhere] = (),
        first: Sequence[int] = (),
        starters: int | None = None,
        seed: int = 0,
    ) -> None:
        # A column for each search elsewhere: 1 of its trials, 0 of all others.
        self._features = features = np.hstack([features, np.zeros((len(features), len(elsewhere)))])
        self._seed = seed
        self._first = list(dict.fromkeys(first))
        self._priors = np.stack([_flattened(prior) for prior in priors], axis=1) if priors else None
        self._elsewhere = _TrialsElsewhere(features, elsewhere, self._priors)
        self._level = higher_level if elsewhere else level
        if starters is None and elsewhere:
            starters = 0
        if starters is None:
            starters = STARTERS_WITH_PRIOR if priors else max(0, STARTERS - len(self._first))
        self._starters = [*self._first, *spread(features, starters, self._first, np.random.default_rng(seed))]
        self._process = GaussianProcess(features.shape[1], SPREAD_ELSEWHERE if elsewhere else 1.0)
        self._working = GaussianProcess(features.shape[1])
        self._model: _Model | None = None
        self.expected_improvement = float("inf")
        """Of the last proposal: by what part of the time it is expected to be faster than the best. Infinite for one
        that the process did not make."""

    def propose(self, rows: Sequence[int], values: Sequence[float], pending: Iterable[int] = ()) -> int | None:
        """The next row to try; None when all are taken.

        Args:
            rows: those tried, in the order of their outcomes, none of them twice.
            values: what is to be small, for each: the logarithm of the time, NaN for a failure.
            pending: rows proposed whose outcomes are not known.
        """
        with one_thread():
            return self._propose(rows, values, pending)

    def _propose(self, rows: Sequence[int], values: Sequence[float], pending: Iterable[int]) -> int | None:
        waiting = [row for row in dict.fromkeys(pending) if row not in set(rows)]
        taken = np.zeros(len(self._features), dtype=bool)
        taken[[*rows, *waiting]] = True
        self.expected_improvement = float("inf")
        if taken.all():
            return None
        for row in self._starters:
            if not taken[row]:
                return row
        tried, outcomes = np.asarray(rows, dtype=np.intp), np.asarray(values, dtype=float)
        worked = np.isfinite(outcomes)
        if worked.sum() < 3:
            draw = np.random.default_rng((self._seed, int(taken.sum())))
            return int(draw.choice(np.flatnonzero(~taken)))
        model = self._updated(tried, outcomes, worked)
        known = _clipped(outcomes[worked][model.used], self._level)
        mean, deviation = self._expected(model, known, waiting)
        gain = _expected_improvement(mean, deviation, known.min())
        gain *= model.chance()
        gain[taken[model.candidates]] = -np.inf
        best = int(np.argmax(gain))
        self.expected_improvement = max(0.0, float(gain[best]))
        if not np.isfinite(gain[best]):  # every candidate of a long list's part is taken
            draw = np.random.default_rng((self._seed, int(taken.sum())))
            return int(draw.choice(np.flatnonzero(~taken)))
        return int(model.candidates[best])

    def _expected(self, model: _Model, known: Array, waiting: Sequence[int]) -> tuple[Array, Array]:
        """Mean and standard deviation of every candidate's value."""
        prior: Array = np.zeros(len(model.candidates))
        if self._priors is not None:
            told = self._priors[model.candidates]
            weights = _weights(told[model.trials], known)
            prior = told @ weights
        rest = known - prior[model.trials]
        middle, width = rest.mean(), max(self._elsewhere.spread_with(rest), _LEAST_SPREAD)
        values = np.concatenate([model.values_elsewhere, (rest - middle) / width])
        if model.due:
            model.fit(values)
        places = model.places(waiting)
        model.posterior.add(places)
        count = len(prior)
        deviation = width * model.posterior.deviation()[:count]
        model.posterior.drop(len(places))
        return prior + middle + width * model.posterior.mean(values)[:count], deviation

    def _updated(self, tried: Rows, outcomes: Array, worked: NDArray[np.bool_]) -> _Model:
        """The model with these outcomes: the last one with what is new added, or a new one when a fit is due."""
        good, failed = tried[worked], tried[~worked]
        model = self._model
        if model is None or not model.extends(good, failed) or self._is_due(model, len(good)):
            candidates = self._candidates(tried, outcomes)
            model = self._model = _Model(
                self._process,
                self._working,
                self._features,
                good,
                outcomes[worked],
                failed,
                candidates,
                self._elsewhere,
            )
        else:
            model.extend(good, failed)
        return model

    def _is_due(self, model: _Model, count: int) -> bool:
        """Whether the hyperparameters are to be fitted again to so many successful trials, and the candidates of a long
        list chosen again."""
        if count <= model.fitted:
            return False
        if len(self._elsewhere) and model.ranks_all:
            known = len(model.posterior.trials) + count - len(model.good)
            return count <= FITTED_BESIDE_ELSEWHERE or known >= 1.2 * MOST_FITTED
        return count <= ALWAYS_FITTED or count // FITTED_EVERY > model.fitted // FITTED_EVERY

    def _candidates(self, tried: Rows, values: Array) -> Rows:
        """Rows to rank: all, or of a long list the tried, those nearest the best few, and some at random."""
        count = len(self._features)
        if count <= MOST_RANKED:
            return np.arange(count)
        kept = {int(row) for row in (*tried, *self._starters)}
        if self._priors is not None:
            kept |= {int(row) for row in np.argsort(self._priors.mean(axis=1), kind="stable")[: MOST_RANKED // 4]}
        for row in tried[np.argsort(values, kind="stable")[:4]]:  # NaN comes last
            away = ((self._features - self._features[row]) ** 2).sum(axis=1)
            kept |= {int(near) for near in np.argpartition(away, MOST_RANKED // 16)[: MOST_RANKED // 16]}
        draw = np.random.default_rng((self._seed, len(tried)))
        others = draw.choice(count, MOST_RANKED - len(kept), replace=False) if len(kept) < MOST_RANKED else ()
        return np.array(sorted(kept.union(map(int, others))), dtype=np.intp)


class _TrialsElsewhere:
    """Trials from elsewhere, as the process takes them in: what the priors leave over, standardised search by search.

    Args:
        features: of the list, with the columns of the searches.
        searches: the trials.
        priors: of (configurations, priors), flattened.
    """

    def __init__(self, features: Array, searches: Sequence[Elsewhere], priors: Array | None) -> None:
        columns = np.eye(len(searches))
        rows = [np.zeros((0, features.shape[1]))]
        values, widths = [np.zeros(0)], []
        for search, column in zip(searches, columns, strict=True):
            rest = _clipped(search.values)
            if priors is not None:
                told = priors[_nearest(features[:, : search.features.shape[1]], search.features)]
                rest = rest - told @ _weights(told, rest)
            width = max(float(rest.std()), _LEAST_SPREAD)
            rows.append(np.hstack([search.features, np.tile(column, (len(rest), 1))]))
            values.append((rest - rest.mean()) / width)
            widths.append(width)
        self.features = np.concatenate(rows)
        self.values = np.concatenate(values)
        self._variance = float(np.mean(np.square(widths))) if widths else 0.0

    def __len__(self) -> int:
        return len(self.values)

    def spread_with(self, rest: Array) -> float:
        """The standard deviation of values here, as far as they are enough to tell, or else elsewhere."""
        trust = TRUST_ELSEWHERE if len(self) else 0
        return float(np.sqrt((rest.var() * len(rest) + self._variance * trust) / (len(rest) + trust)))


def _nearest(features: Array, others: Array) -> Rows:
    """The row of `features` that each of `others` is nearest to."""
    exact = {row.tobytes(): place for place, row in enumerate(np.ascontiguousarray(features))}
    found = [exact.get(other.tobytes(), -1) for other in np.ascontiguousarray(others)]
    for place in (place for place, row in enumerate(found) if row < 0):
        found[place] = int(np.argmin(((features - others[place]) ** 2).sum(axis=1)))
    return np.array(found, dtype=np.intp)


class _Model:
    """Both processes for one set of candidates and hyperparameters."""

    def __init__(
        self,
        process: GaussianProcess,
        working: GaussianProcess,
        features: Array,
        good: Rows,
        values: Array,
        failed: Rows,
        candidates: Rows,
        elsewhere: _TrialsElsewhere,
    ) -> None:
        self._process = process
        self._working = working
        self.candidates = candidates
        self.ranks_all = len(candidates) == len(features)
        # Of a list ranked as a whole a row's place is the row.
        self._place = None if self.ranks_all else {int(row): i for i, row in enumerate(candidates)}
        self.good = list(map(int, good))
        self.fitted = len(self.good)  # as many as the hyperparameters were fitted to
        self.failed = list(map(int, failed))
        self.used = _worth_fitting(values, MOST_FITTED)
        # The more was tried here, the fewer from elsewhere.
        used_elsewhere = _worth_fitting(elsewhere.values, max(0, MOST_FITTED - len(self.used)))
        self.values_elsewhere = elsewhere.values[used_elsewhere]
        self._features = np.concatenate([features[candidates], elsewhere.features[used_elsewhere]])
        self.due = True
        self.posterior = Posterior(process, self._features)
        self.posterior.trials = [*range(len(candidates), len(self._features)), *self.places(good[self.used])]
        self._works: Posterior | None = None

    @property
    def trials(self) -> list[int]:
        """Where the trials made here are among the candidates."""
        return self.posterior.trials[len(self.values_elsewhere) :]

    def places(self, rows: Iterable[int]) -> list[int]:
        """Where rows are among the candidates; those that are not there are left out."""
        if self._place is None:
            return [int(row) for row in rows]
        return [self._place[int(row)] for row in rows if int(row) in self._place]

    def fit(self, values: Array) -> None:
        """Fits the hyperparameters to the values of the trials used, and conditions on them."""
        trials = self.posterior.trials
        self._process.fit(self._features[trials], values)
        self.posterior = Posterior(self._process, self._features)
        self.posterior.add(trials)
        self.due = False

    def extends(self, good: Rows, failed: Rows) -> bool:
        """Whether these are the outcomes this model knows and others after them, all of them candidates."""
        news = {*map(int, good), *map(int, failed)} - {*self.good, *self.failed}
        return (
            list(map(int, good[: len(self.good)])) == self.good
            and list(map(int, failed[: len(self.failed)])) == self.failed
            and len(self.places(news)) == len(news)
        )

    def extend(self, good: Rows, failed: Rows) -> None:
        """Takes in the outcomes that are new."""
        new_good, new_failed = good[len(self.good) :], failed[len(self.failed) :]
        self.used = np.concatenate([self.used, np.arange(len(self.good), len(good))])
        self.posterior.add(self.places(new_good))
        if self._works is not None:
            self._works.add(self.places([*new_good, *new_failed]))
        self.good += map(int, new_good)
        self.failed += map(int, new_failed)

    def chance(self) -> Array | float:
        """The chance that each candidate works: that a process through 1 where one did and 0 where not is over ½."""
        if not self.failed:
            return 1.0
        failed = set(self.places(self.failed))
        if self._works is None:
            trials = self.places([*self.good, *self.failed])
            if len(trials) > MOST_FITTED:  # as many of both as there are of both
                trials = [trials[place] for place in np.linspace(0, len(trials) - 1, MOST_FITTED).astype(int)]
            worked = np.array([place not in failed for place in trials], dtype=float)
            self._working.fit(self._features[trials], _standardised(worked)[0])
            self._works = Posterior(self._working, self._features)
            self._works.add(trials)
        worked = np.array([place not in failed for place in self._works.trials], dtype=float)
        values, middle, width = _standardised(worked)
        mean = middle + width * self._works.mean(values)
        deviation = np.sqrt((width * self._works.deviation()) ** 2 + UNSURE)
        chance: Array = np.maximum(ndtr((mean - 0.5) / deviation), LEAST_CHANCE)
        return chance[: len(self.candidates)]


def _standardised(values: Array) -> tuple[Array, float, float]:
    """Values of mean 0 and variance 1, with the mean and the standard deviation they had; 0.1 at the least."""
    middle, width = float(values.mean()), max(float(values.std()), 0.1)
    return (values - middle) / width, middle, width


def spread(features: Array, count: int, taken: Sequence[int], draw: np.random.Generator) -> list[int]:
    """`count` rows far from each other and from `taken`: of 512 drawn at random, always the farthest from those."""
    pool = draw.choice(len(features), min(512, len(features)), replace=False)
    chosen = list(taken)
    away = np.full(len(pool), np.inf)
    for row in chosen:
        away = np.minimum(away, ((features[pool] - features[row]) ** 2).sum(axis=1))
    while len(chosen) < min(count + len(taken), len(features)):
        row = int(pool[int(np.argmax(away))])
        if row in chosen:  # the pool is used up
            break
        chosen.append(row)
        away = np.minimum(away, ((features[pool] - features[row]) ** 2).sum(axis=1))
    return chosen[len(taken) :]


def _worth_fitting(values: Array, most: int) -> Rows:
    """Indices of the values the process is to know, in their order: the better half of `most`, and an even share of the
    rest."""
    if len(values) <= most:
        return np.arange(len(values))
    order = np.argsort(values, kind="stable")
    half = most // 2
    rest = order[half:][np.linspace(0, len(order) - half - 1, most - half).astype(int)]
    return np.sort(np.concatenate([order[:half], rest]))


def level(values: Array) -> float:
    """Above which values count as equally bad: the median, or `NEAR_BEST` over the least where that is more."""
    return max(float(np.median(values)), float(values.min()) + NEAR_BEST)


def higher_level(values: Array) -> float:
    """As `level` where trials from elsewhere show what is bad: what is told of four in five values is how bad they are,
    and of few trials how far to trust the others."""
    return max(float(np.quantile(values, 0.8)), float(values.min()) + 2 * NEAR_BEST)


def _clipped(values: Array, most: Callable[[Array], float] = level) -> Array:
    return np.minimum(values, most(values))


def _flattened(prior: Array) -> Array:
    return np.asarray(np.minimum(prior, level(prior)) - level(prior))


def _weights(told: Array, known: Array) -> Array:
    """Of each prior, by how its values of (trials, priors) go with those of the trials; equal ones without evidence."""
    count = told.shape[1]
    ridge = np.sqrt(PRIOR_RIDGE)
    left = np.concatenate([told - told.mean(axis=0), ridge * np.eye(count)])
    right = np.concatenate([known - known.mean(), np.full(count, ridge / count)])
    weights: Array = nnls(left, right)[0]
    return weights


def _expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """Expectation of max(0, best - value) for normal values (Jones et al., 1998)."""
    z = (best - mean) / deviation
    gain: Any = deviation * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
    least: Array = np.maximum(gain, 0.0)
    return least

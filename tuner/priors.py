"""What trials made elsewhere (another board, a near shape, an earlier revision) lead to expect of a list."""

from __future__ import annotations

import numpy as np

from tilewright.tuner.ranking import level
from tilewright.tuner.surrogate import SPREAD_ELSEWHERE, Array, GaussianProcess, Posterior, one_thread

MOST_TRIALS = 150
"""Trials that a prior is fitted to: of more, the best 40 and a random part of the rest."""

_BEST = 40


def prior_from_trials(features: Array, trials: Array, log_times: Array, *, seed: int = 0) -> Array:
    """The logarithm of the time expected of each configuration: array of (configurations).

    A Gaussian process through the trials, by the same reading of their times as `ranking` has; a configuration that was
    tried itself is expected to take what it took.

    Args:
        features: of the list, of (configurations, features).
        trials: features of the trials, encoded together with the list, of (trials, features).
        log_times: of the trials, all of them finite.
    """
    with one_thread():
        return _prior_from_trials(features, trials, log_times, np.random.default_rng(seed))


def _prior_from_trials(features: Array, trials: Array, log_times: Array, draw: np.random.Generator) -> Array:
    order = np.argsort(log_times, kind="stable")
    if len(order) > MOST_TRIALS:
        order = np.concatenate([order[:_BEST], draw.choice(order[_BEST:], MOST_TRIALS - _BEST, replace=False)])
    most = level(log_times[order])
    values = np.minimum(log_times[order], most)
    middle, spread = values.mean(), max(float(values.std()), 1e-3)
    process = GaussianProcess(features.shape[1], SPREAD_ELSEWHERE)
    process.fit(trials[order], (values - middle) / spread)
    posterior = Posterior(process, np.concatenate([features, trials[order]]))
    posterior.add(range(len(features), len(features) + len(order)))
    expected: Array = (middle + spread * posterior.mean((values - middle) / spread))[: len(features)]
    places = {row.tobytes(): place for place, row in enumerate(np.ascontiguousarray(features))}
    for row, log_time in zip(np.ascontiguousarray(trials), log_times, strict=True):
        place = places.get(row.tobytes())
        if place is not None:
            expected[place] = min(float(log_time), most)
    return expected

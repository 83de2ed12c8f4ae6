from __future__ import annotations

import numpy as np
import pytest

from tilewright.tuner import priors
from tilewright.tuner.priors import prior_from_trials
from tilewright.tuner.ranking import level

pytestmark = pytest.mark.smoke


def table(count: int = 300) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    features = draw.random((count, 3))
    return features, 2 * np.abs(features[:, 0] - 0.4) + np.abs(features[:, 1] - 0.7)


def test_a_few_trials_tell_where_the_good_ones_are() -> None:
    features, log_times = table()
    trials = np.random.default_rng(1).choice(300, 60, replace=False)
    expected = prior_from_trials(features, features[trials], log_times[trials])
    assert expected.shape == (300,)
    best = np.argsort(expected)[:10]
    assert log_times[best].mean() < np.quantile(log_times, 0.06)


def test_what_was_tried_itself_is_expected_to_take_what_it_took() -> None:
    features, log_times = table()
    trials = np.arange(0, 300, 5)
    expected = prior_from_trials(features, features[trials], log_times[trials])
    np.testing.assert_allclose(expected[trials], np.minimum(log_times[trials], level(log_times[trials])))


def test_trials_that_are_not_in_the_list_count_too() -> None:
    features, log_times = table()
    expected = prior_from_trials(features[:200], features[200:], log_times[200:])
    assert np.corrcoef(expected, log_times[:200])[0, 1] > 0.8


def test_of_many_trials_the_best_and_a_part_of_the_rest_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors, "MOST_TRIALS", 50)
    features, log_times = table()
    one, other = (prior_from_trials(features, features[:250], log_times[:250], seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, other)
    assert log_times[np.argsort(one)[:10]].mean() < np.quantile(log_times, 0.05)


def test_one_trial_is_enough_to_say_something() -> None:
    features, log_times = table(10)
    expected = prior_from_trials(features, features[:1], log_times[:1])
    assert np.isfinite(expected).all()

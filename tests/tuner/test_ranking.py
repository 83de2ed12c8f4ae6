from __future__ import annotations

import itertools

import numpy as np
import pytest

from tilewright.tuner import ranking
from tilewright.tuner.ranking import Elsewhere, Ranking, spread
from tilewright.tuner.surrogate import GaussianProcess, encode

pytestmark = pytest.mark.smoke

AXES = {"m": (16, 32, 64, 128, 256), "n": (16, 32, 64, 128, 256), "warps": (1, 2, 4, 8), "stages": (1, 2, 3, 4)}
LIST = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
FEATURES = encode(AXES, LIST)


def log_time(config: dict) -> float:
    """Best at 128 × 64 on 4 warps with 3 stages; NaN where a tile has too few warps."""
    if config["m"] * config["n"] > 2048 * config["warps"]:
        return float("nan")
    steps = [abs(np.log2(config[name] / best)) for name, best in (("m", 128), ("n", 64), ("warps", 4))]
    return float(0.3 * steps[0] + 0.2 * steps[1] + 0.15 * steps[2] + 0.1 * abs(config["stages"] - 3))


TIMES = np.array([log_time(config) for config in LIST])
BEST = int(np.nanargmin(TIMES))
NOTHING = ranking._TrialsElsewhere(FEATURES, [], None)


def search(trials: int, batch: int = 1, **options) -> list[int]:
    proposals = Ranking(FEATURES, **options)
    rows: list[int] = []
    while len(rows) < trials:
        pending: list[int] = []
        for _ in range(min(batch, trials - len(rows))):
            row = proposals.propose(rows, TIMES[rows], pending)
            assert row is not None
            pending.append(row)
        rows += pending
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_the_best_of_400_is_found_in_30_trials(seed: int) -> None:
    assert BEST in search(30, seed=seed)


def test_a_batch_holds_no_proposal_twice_and_is_spread() -> None:
    rows = search(40, batch=8, seed=1)
    assert len(set(rows)) == 40
    assert BEST in rows


def test_one_seed_gives_one_search_and_another_another() -> None:
    assert search(20, seed=3) == search(20, seed=3)
    assert search(20, seed=3) != search(20, seed=4)


def test_what_is_named_first_comes_first() -> None:
    assert search(3, first=[7, 5, 7, 9]) == [7, 5, 9]


def test_every_row_is_proposed_once_and_then_none() -> None:
    proposals = Ranking(FEATURES[:20])
    rows: list[int] = []
    while (row := proposals.propose(rows, TIMES[rows])) is not None:
        rows.append(row)
    assert sorted(rows) == list(range(20))


def test_what_is_like_failures_is_less_likely_to_work() -> None:
    rows = np.random.default_rng(0).choice(len(LIST), 40, replace=False)
    worked = ~np.isnan(TIMES[rows])
    processes = (GaussianProcess(FEATURES.shape[1]) for _ in range(2))
    model = ranking._Model(
        *processes, FEATURES, rows[worked], TIMES[rows[worked]], rows[~worked], np.arange(len(LIST)), NOTHING
    )
    chance = model.chance()
    assert isinstance(chance, np.ndarray)
    assert 0 < chance.min() < chance.max() < 1
    assert chance[np.isnan(TIMES)].mean() < 0.6 * chance[~np.isnan(TIMES)].mean()


def test_of_many_trials_the_chance_knows_successes_and_failures_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_FITTED", 20)
    failed, worked = np.flatnonzero(np.isnan(TIMES))[::2][:50], np.flatnonzero(~np.isnan(TIMES))[::2][:50]
    processes = (GaussianProcess(FEATURES.shape[1]) for _ in range(2))
    model = ranking._Model(*processes, FEATURES, worked, TIMES[worked], failed, np.arange(len(LIST)), NOTHING)
    model.chance()
    assert model._works is not None
    assert len(model._works.trials) == 20
    assert sum(bool(np.isnan(TIMES[row])) for row in model._works.trials) == 10


def test_failures_leave_no_cliff_among_their_neighbours() -> None:
    """The best lies beside configurations that fail, and is found all the same."""
    neighbours = [row for row, config in enumerate(LIST) if sum(config[n] != LIST[BEST][n] for n in AXES) == 1]
    assert np.isnan(TIMES[neighbours]).any()
    assert all(BEST in search(30, seed=seed) for seed in range(3, 6))


def test_a_list_of_which_nothing_works_is_tried_to_its_end() -> None:
    proposals = Ranking(FEATURES[:12])
    rows: list[int] = []
    while (row := proposals.propose(rows, [float("nan")] * len(rows))) is not None:
        rows.append(row)
    assert len(rows) == 12


def test_equal_times_are_no_trouble() -> None:
    proposals = Ranking(FEATURES)
    rows: list[int] = []
    for _ in range(15):
        rows.append(proposals.propose(rows, [1.0] * len(rows)))
    assert len(set(rows)) == 15


def test_a_good_prior_is_followed() -> None:
    prior = np.where(np.isnan(TIMES), 5.0, TIMES) + 0.05 * np.random.default_rng(0).standard_normal(len(LIST))
    first = list(np.argsort(prior)[:2])
    found = np.nanmin(TIMES[search(8, priors=[prior], first=first)])
    assert found <= np.nanmin(TIMES) + 0.1
    weights = ranking._weights(prior[:40, None], np.nan_to_num(TIMES[:40], nan=5.0))
    assert weights[0] == pytest.approx(1, abs=0.1)


def test_a_prior_that_misleads_goes_to_nothing() -> None:
    prior = -np.where(np.isnan(TIMES), 2.0, TIMES)
    assert BEST in search(45, priors=[prior], first=list(np.argsort(prior)[:2]))
    worked = np.flatnonzero(~np.isnan(TIMES))[:40]
    assert ranking._weights(prior[worked, None], TIMES[worked])[0] < 1e-6


def test_of_two_priors_the_one_that_is_right_gets_the_weight() -> None:
    worked = np.flatnonzero(~np.isnan(TIMES))[::7][:30]
    noise = np.random.default_rng(0).standard_normal(len(worked))
    right, wrong = ranking._weights(np.stack([TIMES[worked], noise], axis=1), TIMES[worked])
    assert right > 0.9
    assert wrong < 0.1


def elsewhere(times: np.ndarray, count: int = 60) -> Elsewhere:
    """Outcomes of `count` configurations, drawn at random; the best tenth here is left out."""
    known = np.flatnonzero(np.nan_to_num(TIMES, nan=-1.0) > np.nanquantile(TIMES, 0.1))
    rows = np.random.default_rng(1).choice(known, count, replace=False)
    return Elsewhere(FEATURES[rows], times[rows])


def test_trials_made_elsewhere_shorten_a_search_though_none_of_them_was_good() -> None:
    seen = elsewhere(3.0 + 1.5 * TIMES)
    best = [int(np.argmin(((FEATURES - seen.features[place]) ** 2).sum(axis=1))) for place in np.argsort(seen.values)]
    beside = [np.nanmin(TIMES[search(10, elsewhere=[seen], first=best[:3], seed=seed)]) for seed in range(6)]
    alone = [np.nanmin(TIMES[search(10, first=best[:3], seed=seed)]) for seed in range(6)]
    assert max(beside) <= 0.1
    assert np.mean(beside) < np.mean(alone)


def test_trials_made_elsewhere_that_mislead_are_recognised() -> None:
    assert BEST in search(40, elsewhere=[elsewhere(-TIMES)])


def test_of_two_searches_elsewhere_the_one_that_is_alike_is_believed() -> None:
    both = [elsewhere(-TIMES), elsewhere(TIMES)]
    assert BEST in search(30, elsewhere=both)
    assert BEST in search(30, elsewhere=both[::-1])


def test_of_trials_elsewhere_what_a_prior_leaves_over_is_taken_in() -> None:
    features = np.hstack([FEATURES, np.zeros((len(LIST), 1))])
    known = np.flatnonzero(~np.isnan(TIMES))[::5]
    prior = np.minimum(np.nan_to_num(TIMES, nan=1.0), np.nanmedian(TIMES))[:, None]
    seen = Elsewhere(FEATURES[known], 7.0 + TIMES[known])
    beside, alone = ranking._TrialsElsewhere(features, [seen], prior), ranking._TrialsElsewhere(features, [seen], None)
    assert beside.features.shape == alone.features.shape == (len(known), FEATURES.shape[1] + 1)
    assert set(beside.features[:, -1]) == {1.0}
    assert alone.values.std() == pytest.approx(1)
    assert beside.spread_with(np.zeros(1)) < 0.1 * alone.spread_with(np.zeros(1))


def test_the_more_is_tried_here_the_less_is_taken_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_FITTED", 30)
    proposals = Ranking(FEATURES, elsewhere=[elsewhere(TIMES)])
    rows = [int(row) for row in np.flatnonzero(~np.isnan(TIMES))[::7]]
    told = []
    for count in (5, 25, 35):
        proposals.propose(rows[:count], TIMES[rows[:count]])
        assert proposals._model is not None
        told.append((len(proposals._model.values_elsewhere), len(proposals._model.trials)))
    assert told == [(25, 5), (5, 25), (0, 30)]


@pytest.mark.parametrize(
    ("told", "most_ranked", "fitted"),
    [
        (False, 20_000, [*range(6, 21), 25, 30, 35, 40, 45, 50]),
        (True, 20_000, [3, 4, 5, 6, 16, 26, 36, 46]),  # 50 of both are fitted, and 10 more added
        (True, 100, [*range(3, 21), 25, 30, 35, 40, 45, 50]),
    ],
)
def test_hyperparameters_are_fitted_as_often_as_trials_tell_them_something(
    monkeypatch: pytest.MonkeyPatch, told: bool, most_ranked: int, fitted: list[int]
) -> None:
    monkeypatch.setattr(ranking, "MOST_FITTED", 50)
    monkeypatch.setattr(ranking, "MOST_RANKED", most_ranked)
    works = np.where(np.isnan(TIMES), 3.0, TIMES)
    proposals = Ranking(FEATURES, elsewhere=[elsewhere(works)] if told else [])
    counts, fit = [], ranking._Model.fit
    monkeypatch.setattr(ranking._Model, "fit", lambda model, values: (counts.append(model.fitted), fit(model, values)))
    rows: list[int] = []
    for _ in range(54):
        rows.append(proposals.propose(rows, works[rows]))
    assert counts == fitted


def test_a_batch_beside_trials_from_elsewhere_holds_no_proposal_twice() -> None:
    rows = search(40, batch=8, elsewhere=[elsewhere(TIMES)])
    assert len(set(rows)) == 40
    assert BEST in rows


def test_expected_improvement_shrinks_as_the_search_goes_on() -> None:
    proposals = Ranking(FEATURES, seed=0)
    rows: list[int] = []
    gains = []
    for _ in range(60):
        rows.append(proposals.propose(rows, TIMES[rows]))
        gains.append(proposals.expected_improvement)
    assert gains[0] == float("inf")
    assert max(gains[-5:]) < 0.01 < max(gains[10:20])


def test_a_long_list_is_ranked_in_part_and_still_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_RANKED", 100)
    rows = search(60, seed=0)
    assert len(set(rows)) == 60
    assert np.nanmin(TIMES[rows]) <= np.nanmin(TIMES) + 0.2


def test_of_many_trials_a_part_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "MOST_FITTED", 20)
    rows = search(60, seed=0)
    assert len(set(rows)) == 60
    assert BEST in rows


def test_spread_rows_are_far_from_each_other_and_from_those_taken() -> None:
    rows = spread(FEATURES, 4, [0], np.random.default_rng(0))
    assert len({0, *rows}) == 5
    every = FEATURES[[0, *rows]]
    least = min(float(((a - b) ** 2).sum()) for a, b in itertools.combinations(every, 2))
    at_random = FEATURES[np.random.default_rng(0).choice(len(LIST), 5)]
    assert least > 2 * min(float(((a - b) ** 2).sum()) for a, b in itertools.combinations(at_random, 2))


def test_the_nearest_row_is_the_row_itself_where_it_is_there() -> None:
    assert ranking._nearest(FEATURES, FEATURES[[5, 300]]).tolist() == [5, 300]
    between = 0.6 * FEATURES[[7]] + 0.4 * FEATURES[[6]]
    assert ranking._nearest(FEATURES, np.concatenate([between, FEATURES[[9]]])).tolist() == [7, 9]

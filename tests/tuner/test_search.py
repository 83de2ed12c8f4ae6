from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

from tilewright.kernels.problem import Config
from tilewright.kernels.space import Space
from tilewright.tuner.search import Search

pytestmark = pytest.mark.smoke


@dataclass(frozen=True, slots=True)
class Pair(Config):
    x: int
    y: int


AXES = {"x": (1, 2, 4, 8, 16), "y": (1, 2, 3, 4, 5)}
SPACE: Space = Space(Pair, AXES, fits=lambda *_: None, useful=lambda *_: None)
# Every other configuration is invalid, so that most proposals have to be moved.
VALID = [Pair(x, y) for x in AXES["x"] for y in AXES["y"] if (AXES["x"].index(x) + y) % 2 == 0]


def time_of(config: Pair) -> float:
    return 10.0 + abs(config.x - 8) + 3 * abs(config.y - 2)


def run(trials: int, *, known: dict[Config, float | None] | None = None, seed: int = 0, batch: int = 3) -> list[Pair]:
    search = Search(SPACE, VALID, Pair(4, 4), trials=trials, known=known or {}, seed=seed)
    tried: list[Pair] = []
    while len(tried) < trials:
        asked = search.ask(min(batch, trials - len(tried)))
        if not asked:
            break
        for trial, config in asked:
            search.tell(trial, config, None if config.x == 1 else time_of(config))
            tried.append(config)
    return tried


def test_the_best_predicted_comes_first_then_the_default_then_the_next_best() -> None:
    tried = run(8)
    predicted = [config for config in VALID if config != Pair(4, 4)]
    assert tried[:6] == [predicted[0], Pair(4, 4), *predicted[1:5]]


def test_no_configuration_is_tried_twice_and_none_is_invalid() -> None:
    tried = run(100)
    assert len(tried) == len(set(tried)) == len(set(VALID) | {Pair(4, 4)})
    assert set(tried) == set(VALID) | {Pair(4, 4)}


def test_what_is_learned_between_proposals_is_not_proposed_any_more() -> None:
    search = Search(SPACE, VALID, Pair(4, 4), trials=100, seed=0)
    first = [config for _, config in search.ask(3)]
    learned = dict.fromkeys([config for config in VALID if config not in first][:5], 20.0)
    search.learn(learned)
    rest = [config for _, config in search.ask(100)]
    assert {*first, *learned, *rest} == {*VALID, Pair(4, 4)}
    assert len(first) + len(learned) + len(rest) == len({*VALID, Pair(4, 4)})
    finished = [trial for trial in search._study.trials if trial.value is not None]
    assert [trial.value for trial in finished] == [20.0] * 5


def test_known_configurations_are_not_tried_again() -> None:
    known: dict[Config, float | None] = {config: time_of(config) for config in VALID[:5]}
    known[VALID[5]] = None
    tried = run(100, known=known)
    assert not set(tried) & set(known)
    assert len(tried) == len(set(VALID) | {Pair(4, 4)}) - len(known)


def test_one_seed_gives_one_search() -> None:
    assert run(12, seed=1) == run(12, seed=1)


def test_a_default_off_the_axes_is_tried_too() -> None:
    search = Search(SPACE, VALID, Pair(3, 9), trials=4, known={}, seed=0)
    asked = search.ask(2)
    assert asked[1][1] == Pair(3, 9)
    for trial, config in asked:
        search.tell(trial, config, 1.0)
    assert search.ask(1)


def test_the_sampler_learns_from_what_it_is_told() -> None:
    """Over many seeds, the trials after the seeded ones are better than trials at random would be."""
    big_axes = {"x": tuple(range(1, 31)), "y": tuple(range(1, 31))}
    space: Space = Space(Pair, big_axes, fits=lambda *_: None, useful=lambda *_: None)
    everything = [Pair(x, y) for x in big_axes["x"] for y in big_axes["y"]]
    mean_of_all = sum(map(time_of, everything)) / len(everything)
    sampled = []
    for seed in range(5):
        search = Search(space, everything, Pair(15, 15), trials=40, known={}, seed=seed)
        for index in range(40):
            ((trial, config),) = search.ask(1)
            search.tell(trial, config, time_of(config))
            if index >= 30:
                sampled.append(time_of(config))
    assert sum(sampled) / len(sampled) < 0.8 * mean_of_all


def test_equal_configurations_hash_equally() -> None:
    assert len({Pair(1, 1), dataclasses.replace(Pair(2, 1), x=1)}) == 1

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tilewright.tuning_db.weighing import MARGIN, merged, scales


def test_of_one_key_the_order_is_its_own() -> None:
    times = {"incumbent": 2.0, "fastest": 1.0, "slow": 3.0}
    assert list(merged([times])) == [(0, config) for config in times]
    assert list(merged([])) == []


def test_a_less_close_key_is_heard_where_it_is_faster_beyond_noise() -> None:
    assert next(merged([{"a": 10.0}, {"b": 9.6}])) == (0, "a")
    assert next(merged([{"a": 10.0}, {"b": 9.4}])) == (1, "b")
    # 5 % less than the one before it each, which is no noise between the first and the last.
    assert next(merged([{"a": 10.0}, {"b": 9.6}, {"c": 9.3}])) == (2, "c")


def test_a_configuration_comes_once_from_the_closest_key() -> None:
    assert list(merged([{"a": 10.0, "b": 12.0}, {"b": 1.0, "c": 30.0}])) == [(0, "a"), (0, "b"), (1, "c")]


def test_times_are_scaled_by_the_configurations_that_two_keys_share() -> None:
    assert scales([{"a": 10.0, "b": 20.0}, {"a": 5.0, "c": 1.0}, {"c": 2.0}, {"d": 1.0}]) == [1.0, 2.0, 1.0, 1.0]
    assert scales([{"a": 10.0, "b": 10.0, "c": 10.0}, {"a": 10.0, "b": 5.0, "c": 1.0}]) == [1.0, 2.0]


KEYS = st.lists(st.dictionaries(st.sampled_from("abcdef"), st.floats(0.1, 1e3)), max_size=5)


@given(KEYS)
def test_every_configuration_comes_once(keys: list[dict[str, float]]) -> None:
    found = list(merged(keys))
    assert sorted(config for _, config in found) == sorted({config for key in keys for config in key})
    for place, config in found:
        assert all(config not in closer for closer in keys[:place])


@given(KEYS.filter(any))
def test_the_first_is_within_the_margins_of_the_fastest(keys: list[dict[str, float]]) -> None:
    in_order = [dict(sorted(key.items(), key=lambda pair: pair[1])) for key in keys]
    scale = scales(in_order)
    seen: dict[str, float] = {}
    for place, key in enumerate(in_order):
        for config, time in key.items():
            seen.setdefault(config, time * scale[place])
    _, config = next(merged(in_order))
    assert seen[config] <= min(seen.values()) * (1 + MARGIN) * (1 + 1e-9)

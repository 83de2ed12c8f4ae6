"""The search on models whose noise is known: independent noise of each layer, in power."""

from __future__ import annotations

import itertools
import math

import optuna
import pytest

from tilewright.tuner.model.precision.budget import Evaluation, search
from tilewright.tuning_db.errors import UsageError

KINDS = ("int8", "fp16")
TIMES = {"a": 8.0, "b": 4.0, "c": 2.0, "d": 1.0, "e": 1.0}  # µs that int8 saves
NOISE = {"a": 0.010, "b": 0.050, "c": 0.001, "d": 0.030, "e": 0.002}
FLOOR = 0.0005


class Model:
    """Evaluates plans, and remembers them."""

    def __init__(self, budget: float, most: int | None = None) -> None:
        self.budget, self.most = budget, most
        self.asked: list[dict[str, str]] = []

    def __call__(self, plan):
        if self.most is not None and len(self.asked) >= self.most:
            raise KeyboardInterrupt
        assert plan not in self.asked
        self.asked.append(dict(plan))
        return self.evaluation(plan)

    def evaluation(self, plan):
        low = [layer for layer, kind in plan.items() if kind == "int8"]
        error = math.hypot(FLOOR, *(NOISE[layer] for layer in low))
        time = 20 - sum(TIMES[layer] for layer in low)
        return Evaluation(time, error, error <= self.budget, {"top1": 1 - error})

    def best_time(self):
        plans = (dict(zip(NOISE, kinds, strict=True)) for kinds in itertools.product(KINDS, repeat=len(NOISE)))
        return min(found.time_us for found in map(self.evaluation, plans) if found.within)


LAYERS = dict.fromkeys(NOISE, KINDS)


@pytest.mark.parametrize("budget", [0.1, 0.055, 0.04, 0.02, 0.0101, 0.005, 0.0006])
def test_the_answer_is_inside_the_budget_and_as_fast_as_any(budget):
    model = Model(budget)
    found = search(LAYERS, TIMES, model)
    assert found.met
    assert found.chosen.evaluation.error <= budget
    assert found.chosen.evaluation.time_us == model.best_time()
    assert found.chosen.evaluation == model.evaluation(found.chosen.plan)


def test_all_layers_in_the_fewest_bits_is_one_trial_where_it_will_do():
    model = Model(0.1)
    search(LAYERS, TIMES, model)
    assert model.asked == [dict.fromkeys(NOISE, "int8")]


def test_a_budget_that_nothing_meets_is_said_to_be_missed():
    found = search(LAYERS, TIMES, Model(0.0001))
    assert not found.met
    assert found.chosen.plan == dict.fromkeys(NOISE, "fp16")
    assert not found.to_dict()["chosen"]["within"]


def test_the_front_has_no_plan_that_another_beats():
    found = search(LAYERS, TIMES, Model(0.02))
    points = [(each.evaluation.time_us, each.evaluation.error) for each in found.front]
    assert points == sorted(points)
    assert [error for _, error in points] == sorted((error for _, error in points), reverse=True)
    for each in found.tried:
        time, error = each.evaluation.time_us, each.evaluation.error
        assert any(t <= time and e <= error for t, e in points)
    assert found.noise == pytest.approx({layer: math.hypot(FLOOR, noise) for layer, noise in NOISE.items()})


def test_a_layer_of_one_kind_keeps_it():
    layers = {**LAYERS, "b": ("fp16",)}
    found = search(layers, TIMES, Model(0.02))
    assert {each.plan["b"] for each in found.tried} == {"fp16"}
    only = search({"b": ("fp16",)}, {}, Model(0.02))
    assert only.met
    assert len(only.tried) == 1


def test_kinds_between_the_fewest_and_the_most_bits_are_tried():
    """A layer that is too noisy in int8 goes to the kind between, not all the way up."""

    def evaluate(plan):
        error = {"int8": 0.1, "fp8": 0.01, "fp16": 0.001}[plan["a"]]
        return Evaluation({"int8": 1.0, "fp8": 2.0, "fp16": 3.0}[plan["a"]], error, error <= 0.02)

    found = search({"a": ("int8", "fp8", "fp16")}, {"a": 2.0}, evaluate)
    assert found.chosen.plan == {"a": "fp8"}


@pytest.mark.parametrize("budget", [0.1, 0.055, 0.02, 0.0101, 0.0031, 0.0006])
def test_where_the_next_bits_will_do_no_layer_has_more(budget):
    """Weights of 4 and of 8 bits: the noise of 8 is a fiftieth."""
    asked = []

    def evaluate(plan):
        asked.append(plan)
        error = math.hypot(
            FLOOR, *(NOISE[layer] * {"w4": 1, "w8": 0.02, "fp16": 0}[kind] for layer, kind in plan.items())
        )
        time = sum(TIMES[layer] * {"w4": 1, "w8": 2, "fp16": 4}[kind] for layer, kind in plan.items())
        return Evaluation(time, error, error <= budget)

    found = search(dict.fromkeys(NOISE, ("w4", "w8", "fp16")), TIMES, evaluate)
    assert found.met
    if budget > 0.002:
        assert {kind for plan in asked for kind in plan.values()} <= {"w4", "w8"}
    two = [dict(zip(NOISE, kinds, strict=True)) for kinds in itertools.product(("w4", "w8"), repeat=len(NOISE))]
    best = min((each.time_us for each in map(evaluate, two) if each.within), default=math.inf)
    assert found.chosen.evaluation.time_us <= best


@pytest.mark.parametrize("wild", [("a",), ("a", "c"), tuple(NOISE)])
def test_layers_that_make_infinities_stay_in_more_bits(wild):
    model = Model(0.04)

    def evaluate(plan):
        found = model(plan)
        broken = any(plan[layer] == "int8" for layer in wild)
        return Evaluation(found.time_us, math.inf, False) if broken else found

    found = search(LAYERS, TIMES, evaluate)
    assert found.met
    tame = {layer: TIMES[layer] for layer in NOISE if layer not in wild}
    most = 20 - sum(TIMES.values()) + sum(TIMES[layer] for layer in wild)
    assert {found.chosen.plan[layer] for layer in wild} == {"fp16"}
    # "b" has more noise than the budget lets in; all others that are left fit together.
    assert found.chosen.evaluation.time_us == most + tame.get("b", 0.0)
    # Each was tried alone and with all others: never again.
    assert all(sum(plan[layer] == "int8" for plan in model.asked) == 2 for layer in wild)


def test_infinities_in_the_most_bits_are_no_floor():
    """Layers that each make a model finite again, as 8 bits do of what fp16 has no room for."""

    def evaluate(plan):
        low = [layer for layer, kind in plan.items() if kind == "int8"]
        error = math.hypot(*(NOISE[layer] for layer in low)) if "a" in low else math.inf
        return Evaluation(20 - sum(TIMES[layer] for layer in low), error, error <= 0.04)

    found = search(LAYERS, TIMES, evaluate)
    assert found.met
    assert found.chosen.plan["a"] == "int8"
    nothing = search(LAYERS, TIMES, lambda plan: Evaluation(1.0, math.inf, False))
    assert not nothing.met


def test_a_damaged_study_is_set_aside_and_told(tmp_path):
    file = tmp_path / "precision.sqlite"
    file.write_bytes(b"no database, but as long as a page of one" * 100)
    with pytest.warns(RuntimeWarning, match=r"precision.sqlite was damaged and is now .*precision.sqlite.damaged"):
        found = search(LAYERS, TIMES, Model(0.02), study=file)
    assert found.met
    assert (tmp_path / "precision.sqlite.damaged").exists()


@pytest.mark.parametrize("killed_after", [1, 3, 6, 8])
def test_a_search_that_was_killed_goes_on(tmp_path, killed_after):
    file = tmp_path / "precision.sqlite"
    whole = search(LAYERS, TIMES, Model(0.02))
    first = Model(0.02, killed_after)
    with pytest.raises(KeyboardInterrupt):
        search(LAYERS, TIMES, first, study=file)
    second = Model(0.02)
    found = search(LAYERS, TIMES, second, study=file)
    assert found.chosen == whole.chosen
    assert len(first.asked) + len(second.asked) <= len(whole.tried) + 1  # the one in flight may be tried again
    assert not [plan for plan in first.asked if plan in second.asked]
    third = Model(0.02)
    assert search(LAYERS, TIMES, third, study=file).chosen == whole.chosen
    assert third.asked == []
    # Another search in the same file starts afresh; and the file is a study that anybody can open.
    assert search(LAYERS, TIMES, Model(0.1), study=file, name="other").met
    study = optuna.load_study(study_name="precision", storage=f"sqlite:///{file}")
    assert len(study.best_trials) == len(whole.front)


def test_progress_is_told():
    told = []
    search(LAYERS, TIMES, Model(0.02), progress=lambda done, most: told.append((done, most)))
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    assert len({most for _, most in told}) == 1
    assert told[-1][0] <= told[-1][1]


@pytest.mark.parametrize(("layers", "words"), [({}, "no layers"), ({"a": ()}, "'a' has no precision")])
def test_nothing_to_choose_from_is_told(layers, words):
    with pytest.raises(UsageError, match=words):
        search(layers, {}, Model(1.0))

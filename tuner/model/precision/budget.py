"""Which layers may be computed in fewer bits: the search for the fastest plan whose error is inside a budget.

A plan gives every layer one of a few kinds, from the fewest bits to the most. The search tries, in this order,

1. all layers in the fewest bits, and all in the most: if the first will do, that is the answer. Where there are kinds
   between, all in the ones before the most: if these will do, they are the most that is looked at;
2. each layer alone in the fewest bits: the noise that it adds to the outputs. One that makes them NaN or infinite is
   not tried in these any more;
3. by halving, how much noise may be let in: of a noise, the layers that save the most time while adding no more than
   that. Noise of different layers is nearly independent, so it adds up as power does, and which layers those are is a
   knapsack problem;
4. which of the raised layers can go back, the one that saves the most time first.

Every plan that was tried is a trial of an Optuna study with two objectives, predicted or measured time and error; its
Pareto front is what there is to choose from. The study is a SQLite file: a search that was killed goes on from it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.tuning_db.errors import UsageError

Plan = Mapping[str, str]
"""The kind of each layer, by the layer's name."""

HALVINGS = 8
"""Plans that are tried to find how much noise may be let in."""

MOST_RETURNS = 8
"""How many of the raised layers are tried in fewer bits again: each costs a run of the model, and gains ever less."""

_CAPACITY = 2000
"""Steps in which the knapsack counts noise power: with 100 layers its rounding is at most a twentieth of the whole."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a plan costs and how well it does."""

    time_us: float
    error: float  # the second objective: less is better
    within: bool  # whether it is inside the budget
    details: Mapping[str, Any] = field(default_factory=dict)  # plain values, kept with the trial


@dataclass(frozen=True, slots=True)
class TriedPlan:
    """A plan that was tried."""

    plan: Plan
    evaluation: Evaluation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search found."""

    chosen: TriedPlan  # the fastest inside the budget; if none is, the one of the least error
    met: bool
    tried: tuple[TriedPlan, ...]  # in the order in which they were tried
    front: tuple[TriedPlan, ...]  # those that no other beats in both time and error, fastest first
    noise: Mapping[str, float]  # the error with one layer alone in the fewest bits

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "met": self.met,
            "chosen": _row(self.chosen),
            "front": [_row(each) for each in self.front],
            "trials": len(self.tried),
            "noise": dict(self.noise),
        }


def _row(tried: TriedPlan) -> dict[str, Any]:
    result = tried.evaluation
    return {
        "plan": dict(tried.plan),
        "time_us": result.time_us,
        "error": result.error,
        "within": result.within,
        **result.details,
    }


def search(
    layers: Mapping[str, Sequence[str]],
    saved_us: Mapping[str, float],
    evaluate: Callable[[Plan], Evaluation],
    *,
    study: Path | None = None,
    name: str = "precision",
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> Outcome:
    """The fastest plan inside the budget, as far as the steps above find it.

    Args:
        layers: of each layer the kinds that it may have, the fewest bits first. A layer of one kind keeps it.
        saved_us: what each layer's fewest bits save against its most, in µs.
        evaluate: tries a plan. It is asked for every plan once at most.
        study: the SQLite file in which trials are kept; in memory if left out. Trials of another `name` in it are
            another search's.
        name: of the search: whatever an evaluation depends on should be in it.
        progress: called with the plans tried and the most that may be.

    Raises:
        UsageError: there are no layers, or one has no kind.
    """
    for layer, kinds in layers.items():
        if not kinds:
            raise UsageError(f"layer {layer!r} has no precision to choose from")
    if not layers:
        raise UsageError("there are no layers whose precision could be chosen")
    book = _Book(layers, evaluate, study, name, progress)
    free = [layer for layer, kinds in layers.items() if len(kinds) > 1]
    book.most = 3 + len(free) + HALVINGS + MOST_RETURNS
    low = {layer: kinds[0] for layer, kinds in layers.items()}
    high = {layer: kinds[-1] for layer, kinds in layers.items()}
    if book.met(low) or not free:
        return book.outcome({})
    middle = {layer: kinds[max(0, len(kinds) - 2)] for layer, kinds in layers.items()}
    if middle != low and book.met(middle):
        high = middle  # more bits than these no layer needs
    floor = book.tried(high)
    noise = {layer: book.tried({**high, layer: low[layer]}).error for layer in free}
    # NaN and infinities have no power, and add up to nothing. Where the most bits make them as well, there is no floor.
    least_error = floor.error if math.isfinite(floor.error) else 0.0
    power = {
        layer: max(error * error - least_error * least_error, 0.0)
        for layer, error in noise.items()
        if math.isfinite(error)
    }
    plan: dict[str, str] = dict(high)
    least, most = 0.0, sum(power.values())
    allowed = max(power.values(), default=0.0)
    before = len(book)
    # What has been tried costs nothing, and does not count.
    while len(book) < before + HALVINGS and most > least * (1 + 1 / _CAPACITY):
        chosen = _knapsack({layer: (power[layer], saved_us.get(layer, 0.0)) for layer in power}, allowed)
        asked = {**high, **{layer: low[layer] for layer in chosen}}
        if book.met(asked):
            least, plan = allowed, asked
        else:
            most = allowed
        # Noise spans decades: the middle is that of its logarithm.
        allowed = math.sqrt(max(least, most * 1e-3) * most)
    if floor.within:
        raised = sorted(
            (layer for layer in free if plan[layer] == high[layer] != low[layer]),
            key=lambda layer: -saved_us.get(layer, 0.0),
        )
        for layer in raised[:MOST_RETURNS]:
            kinds = layers[layer]
            for kind in kinds[0 if layer in power else 1 : kinds.index(high[layer])]:
                if book.met({**plan, layer: kind}):
                    plan[layer] = kind
                    break
    return book.outcome(noise)


def _knapsack(layers: Mapping[str, tuple[float, float]], allowed: float) -> list[str]:
    """Of layers with the power that each adds and the time that it saves, those that save the most together while
    adding no more than `allowed`."""
    if allowed <= 0:
        return [layer for layer, (power, _) in layers.items() if power == 0]
    best = np.zeros(_CAPACITY + 1)
    taken = []
    for power, saved in layers.values():
        weight = math.ceil(power / allowed * _CAPACITY)
        with_it = np.full(_CAPACITY + 1, -1.0)
        if weight <= _CAPACITY and saved > 0:
            with_it[weight:] = best[: _CAPACITY + 1 - weight] + saved
        taken.append(with_it > best)
        best = np.maximum(best, with_it)
    left, chosen = _CAPACITY, []
    for (layer, (power, _)), took in reversed(list(zip(layers.items(), taken, strict=True))):
        if took[left]:
            chosen.append(layer)
            left -= math.ceil(power / allowed * _CAPACITY)
    return chosen


def _study(name: str, file: Path | None) -> Any:
    import optuna

    return optuna.create_study(
        study_name=name,
        storage=None if file is None else f"sqlite:///{file}",
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.RandomSampler(seed=0),
        load_if_exists=True,
    )


class _Book:
    """The plans that were tried, in a study."""

    def __init__(
        self,
        layers: Mapping[str, Sequence[str]],
        evaluate: Callable[[Plan], Evaluation],
        file: Path | None,
        name: str,
        progress: Callable[[int, int], None],
    ) -> None:
        import optuna
        from sqlalchemy.exc import DatabaseError, OperationalError

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._layers, self._evaluate, self._progress = layers, evaluate, progress
        self.most = 0
        try:
            self._study = _study(name, file)
        except DatabaseError as error:
            if file is None or isinstance(error, OperationalError):  # locked, or the disk is full
                raise
            # It only saves time.
            aside = file.replace(file.with_name(f"{file.name}.damaged"))
            warnings.warn(f"{file} was damaged and is now {aside}: plans are tried again", RuntimeWarning, stacklevel=2)
            self._study = _study(name, file)
        self._known: dict[tuple[tuple[str, str], ...], Evaluation] = {}
        for trial in self._study.get_trials(states=(optuna.trial.TrialState.COMPLETE,)):
            plan = {layer: trial.params.get(layer, kinds[-1]) for layer, kinds in layers.items()}
            self._known[_key(plan)] = Evaluation(
                trial.values[0],
                trial.values[1],
                trial.user_attrs["within"],
                json.loads(trial.user_attrs["details"]),
            )

    def __len__(self) -> int:
        return len(self._known)

    def tried(self, plan: Plan) -> Evaluation:
        """What is known of a plan; it is tried if that is nothing."""
        key = _key(plan)
        if key not in self._known:
            self._study.enqueue_trial(dict(plan))
        while key not in self._known:
            # What a killed search had queued comes first, and is worth as much.
            trial = self._study.ask()
            asked = {layer: str(trial.suggest_categorical(layer, list(kinds))) for layer, kinds in self._layers.items()}
            found = self._evaluate(asked)
            trial.set_user_attr("within", found.within)
            trial.set_user_attr("details", json.dumps(dict(found.details)))
            self._study.tell(trial, [found.time_us, found.error])
            self._known[_key(asked)] = found
            self._progress(len(self._known), self.most)
        return self._known[key]

    def met(self, plan: Plan) -> bool:
        return self.tried(plan).within

    def outcome(self, noise: Mapping[str, float]) -> Outcome:
        tried = tuple(TriedPlan(dict(key), found) for key, found in self._known.items())
        inside = [each for each in tried if each.evaluation.within]
        if inside:
            chosen = min(inside, key=lambda each: (each.evaluation.time_us, each.evaluation.error))
        else:
            chosen = min(tried, key=lambda each: (each.evaluation.error, each.evaluation.time_us))
        return Outcome(chosen, bool(inside), tried, _front(tried), noise)


def _key(plan: Plan) -> tuple[tuple[str, str], ...]:
    return tuple(plan.items())


def _front(tried: Sequence[TriedPlan]) -> tuple[TriedPlan, ...]:
    """The plans that no other beats in one objective without losing in the other."""
    front: list[TriedPlan] = []
    for each in sorted(tried, key=lambda each: (each.evaluation.time_us, each.evaluation.error)):
        if not front or each.evaluation.error < front[-1].evaluation.error:
            front.append(each)
    return tuple(front)

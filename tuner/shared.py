"""The search for one problem's configuration by several processes, on several hosts: one study in a shared storage.

Each configuration is tried once over all of them. How that is made sure without a lock:

- A trial is made under way with its configuration in one transaction, and the storage numbers trials in the order of
  these transactions. So whoever reads the study after making trial n sees all that have a lower number.
- A trial holds its configuration if no trial with a lower number does. Of those that claim one at a time just one
  does; the others see that and withdraw. The budget is kept the same way: trial n is withdrawn if as many
  configurations as the budget allows are held by trials with lower numbers.
- A trial that is void (withdrawn, or ended without an outcome) never holds anything again. So a process that died with
  a trial under way, and was given up by `Storage`, leaves its configuration to whoever asks next: that comes before
  what the sampler would propose.

The outcome of a trial, a record with its run, is in one of the trial's attributes, so that every host can bring the
outcomes of all into the file of the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tilewright.kernels.problem import Config
from tilewright.tuner.search import PLATEAU, PLATEAU_BATCHES, Candidates
from tilewright.tuner.storage import Storage
from tilewright.tuning_db.record import Key, canonical_json

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from tilewright.tuning_db.interchange import Entry

OUTCOME = "tilewright_outcome"
"""The attribute of a trial with its record and run."""

WITHDRAWN = "tilewright_withdrawn"
"""The attribute of a trial that was given back untried."""

FLAT = "tilewright_plateau"
"""The attribute of a study of which a process expects no improvement any more."""

MOST_LOST = 2
"""Processes lost with a configuration until it counts as failed: as a process that measures, it is tried again once."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A configuration that is this process's to try."""

    config: Config
    trial: int  # its id in the storage
    lost: int  # how many processes have died with it


class SharedSearch:
    """One problem's study in a shared storage, as this process takes part in it.

    Used as a context manager, it gives back at its end what it has claimed and not told. Not safe to share between
    threads. Every method raises `StorageError` where the storage fails.

    Args:
        storage: where the study is; others find it by the key and the candidates, which all must be equal.
        key: of the outcomes.
        candidates: what to try.
    """

    def __init__(self, storage: Storage, key: Key, candidates: Candidates) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._states = optuna.trial.TrialState
        self._storage = storage
        self._candidates = candidates
        self._sampler = candidates.sampler(counts=_holds)
        self._rows = {config: row for row, config in enumerate(candidates.pool)}
        self.name = f"tilewright {key.op} {study_digest(key, candidates)}"
        self._study = storage.study(self.name, self._sampler)
        self._mine: set[int] = set()
        self._noticed: set[int] = set()
        self._flat = 0
        self._others = False  # had trials under way when this process last asked
        with storage.explained():
            self._id = storage.rdb.get_study_id_from_name(self.name)
            if not self._study.user_attrs:
                self._study.set_user_attr("problem", key.problem)
                self._study.set_user_attr("device", key.device)

    def at_plateau(self) -> bool:
        """Whether nothing better is expected, by this process or another: see `search.PLATEAU`."""
        with self._storage.explained():
            return self._flat >= PLATEAU_BATCHES or bool(self._study.user_attrs.get(FLAT))

    @property
    def tried(self) -> int:
        """Configurations that have an outcome, whoever tried them."""
        return len(self.outcomes())

    def waiting(self) -> bool:
        """Whether to ask again: others have trials under way, or had when this process last asked.

        Those that have ended since may be lost or given back, so that there is something to ask for again.
        """
        with self._storage.explained():
            return self._others or self._under_way_elsewhere(self._trials())

    def outcomes(self) -> dict[Config, Entry]:
        """What became of the configurations tried; of one that was tried in two places, the later outcome."""
        found = {}
        with self._storage.explained():
            for trial in self._trials():
                if OUTCOME in trial.user_attrs:
                    found[self._config(trial)] = trial.user_attrs[OUTCOME]
        return found

    def publish(self, known: Mapping[Config, Entry]) -> None:
        """Adds outcomes of configurations that nobody in this study has tried or is trying."""
        with self._storage.explained():
            held = {self._config(trial) for trial in self._trials() if _holds(trial)}
            for config, entry in known.items():
                if config not in held and config in self._rows:
                    time_us = _time_us(entry)
                    state = self._states.FAIL if time_us is None else self._states.COMPLETE
                    self._study.add_trial(self._trial(config, state, time_us, {OUTCOME: entry}))

    def ask(self, count: int, budget: int, *, only_lost: bool = False) -> list[Claim]:
        """Up to `count` configurations that are now this process's to try: first those that others were lost with.

        Args:
            count: how many at the most.
            budget: how many configurations the study is to try, in all.
            only_lost: no new ones.
        """
        claims: list[Claim] = []
        improvement, proposed = 0.0, False
        with self._storage.explained():
            self._give_up_the_dead()
            while len(claims) < count:
                trials = self._trials()
                self._others = self._under_way_elsewhere(trials)
                held = {self._config(trial) for trial in trials if _holds(trial)}
                if len(held) >= budget:
                    break
                lost = Counter(self._config(trial) for trial in trials if _is_lost(trial))
                config = next((each for each in lost if each not in held), None)
                if config is None and not only_lost:
                    row = self._sampler.propose(self._study)
                    if row is not None:
                        config = self._candidates.pool[row]
                        improvement = max(improvement, self._sampler.expected_improvement)
                        proposed = True
                if config is None:
                    break
                trial = self._claimed(config, budget)
                if trial is not None:
                    claims.append(Claim(config, trial, lost[config]))
        if proposed:
            self._flat = self._flat + 1 if improvement < PLATEAU else 0
            if self._flat >= PLATEAU_BATCHES:
                with self._storage.explained():
                    self._study.set_user_attr(FLAT, True)
        return claims

    def tell(self, claim: Claim, entry: Entry) -> None:
        """The outcome of a claim. It is left out if this process was taken for dead, and others have the claim now."""
        self._end(claim.trial, {OUTCOME: entry}, _time_us(entry))

    def withdraw(self, claims: Iterable[Claim]) -> None:
        """Gives claims back untried, those that were told left out."""
        for claim in claims:
            if claim.trial in self._mine:
                self._end(claim.trial, {WITHDRAWN: True}, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from tilewright.tuning_db.errors import StorageError

        if isinstance(error, StorageError) and not self._storage.answers:
            return  # to withdraw would take as long again, and what is left under way others retry in a minute
        try:
            for trial in sorted(self._mine):
                self._end(trial, {WITHDRAWN: True}, None)
        except StorageError:
            if error is None:
                raise  # else what went wrong first is what to tell

    def _claimed(self, config: Config, budget: int) -> int | None:
        """The id of a new trial that holds the configuration; None if another does, or the budget is used up."""
        rdb = self._storage.rdb
        trial = rdb.create_new_trial(self._id, self._trial(config, self._states.RUNNING))
        self._mine.add(trial)
        self._storage.beat(trial)
        number = rdb.get_trial_number_from_id(trial)
        earlier = {self._config(each) for each in self._trials() if each.number < number and _holds(each)}
        if config in earlier or len(earlier) >= budget:
            self._end(trial, {WITHDRAWN: True}, None)
            return None
        return trial

    def _end(self, trial: int, attributes: Mapping[str, Any], time_us: float | None) -> None:
        rdb = self._storage.rdb
        # A trial that was given up stays as it is.
        with self._storage.explained(), contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
            for name, value in attributes.items():
                rdb.set_trial_user_attr(trial, name, value)
            self._finish(trial, time_us)
        self._mine.discard(trial)
        self._storage.rest(trial)

    def _finish(self, trial: int, time_us: float | None) -> None:
        if time_us is None:
            self._storage.rdb.set_trial_state_values(trial, self._states.FAIL)
        else:
            self._storage.rdb.set_trial_state_values(trial, self._states.COMPLETE, [time_us])

    def _give_up_the_dead(self) -> None:
        for trial in self._trials():
            if trial.state.is_finished() or trial._trial_id in self._mine:
                continue
            if OUTCOME in trial.user_attrs:  # all that its process had left to do
                with contextlib.suppress(self._optuna.exceptions.UpdateFinishedTrialError):
                    self._finish(trial._trial_id, _time_us(trial.user_attrs[OUTCOME]))
            elif trial._trial_id not in self._noticed:
                # Its process may have died before the first heartbeat, and only what had one can be missed: each
                # process that comes along gives one.
                self._noticed.add(trial._trial_id)
                self._storage.rdb.record_heartbeat(trial._trial_id)
        self._storage.give_up_the_dead(self._study)

    def _trials(self) -> list[FrozenTrial]:
        """Those of the list: other tools may add to a study what is not one of its configurations."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial for trial in trials if self._sampler.find(trial.params) is not None]

    def _under_way_elsewhere(self, trials: Iterable[FrozenTrial]) -> bool:
        return any(_under_way(trial) and trial._trial_id not in self._mine for trial in trials)

    def _trial(
        self, config: Config, state: Any, time_us: float | None = None, attributes: Mapping[str, Any] | None = None
    ) -> FrozenTrial:
        return self._optuna.trial.create_trial(
            params=self._candidates.fields(config),
            distributions=self._sampler.distributions,
            state=state,
            value=time_us,
            user_attrs=dict(attributes or {}),
        )

    def _config(self, trial: FrozenTrial) -> Config:
        return self._candidates.pool[self._sampler.row_of(trial.params)]


def study_digest(key: Key, candidates: Candidates) -> str:
    """What makes two searches one: the key of their outcomes, and the list they go through. SHA-256, hexadecimal."""
    content = {
        "key": key.digest(),
        "axes": [[name, list(values)] for name, values in candidates.axes.items()],
        "configs": sorted(config.to_json() for config in candidates.pool),
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _holds(trial: FrozenTrial) -> bool:
    """Whether the trial's configuration is tried, or being tried, by it."""
    return OUTCOME in trial.user_attrs or _under_way(trial)


def _under_way(trial: FrozenTrial) -> bool:
    if trial.state.name == "WAITING":  # of another tool, which no run takes up
        return False
    return not trial.state.is_finished() and not trial.user_attrs.keys() & {OUTCOME, WITHDRAWN}


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether the trial's process died with it under way."""
    return trial.state.is_finished() and not trial.user_attrs.keys() & {OUTCOME, WITHDRAWN}


def _time_us(entry: Entry) -> float | None:
    """The median time of an outcome; None if it has none, or is no outcome, which whoever brings it home finds out."""
    try:
        time_us = float(entry["record"]["times"]["median_us"])
    except (KeyError, TypeError, ValueError):
        return None
    return time_us if math.isfinite(time_us) and time_us > 0 else None

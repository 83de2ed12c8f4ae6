from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import optuna
import pytest

from tilewright.tuner.sampler import PROPOSAL, EnumeratedSampler
from tilewright.tuning_db.errors import UsageError

pytestmark = pytest.mark.smoke

CONFIGS = [
    {"m": m, "warps": w, "layout": layout}
    for m, w, layout in itertools.product((16, 32, 64, 128), (1, 2, 4, 8), ("row", "col"))
    if m * w < 512
]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def time_of(config: dict) -> float:
    return 10 + abs(np.log2(config["m"] / 64)) + 2 * abs(np.log2(config["warps"] / 4)) + (config["layout"] == "row")


def objective(sampler: EnumeratedSampler):
    def suggested(trial: optuna.Trial) -> float:
        config = {name: trial.suggest_categorical(name, values) for name, values in sampler.axes.items()}
        assert config in CONFIGS
        return float(time_of(config))

    return suggested


def studied(trials: int, sampler: EnumeratedSampler, direction: str = "minimize") -> optuna.Study:
    study = optuna.create_study(sampler=sampler, direction=direction)
    study.optimize(objective(sampler), n_trials=trials)
    return study


def tried(study: optuna.Study) -> list[tuple]:
    return [tuple(trial.params.values()) for trial in study.trials]


def test_any_study_can_use_it() -> None:
    study = studied(20, EnumeratedSampler(CONFIGS, seed=0))
    assert len(set(tried(study))) == 20
    assert study.best_params == {"m": 64, "warps": 4, "layout": "col"}


def test_what_is_large_can_be_wanted() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.optimize(lambda trial: 1000 / objective(sampler)(trial), n_trials=20)
    assert study.best_params == {"m": 64, "warps": 4, "layout": "col"}


def test_one_seed_gives_one_study() -> None:
    assert tried(studied(15, EnumeratedSampler(CONFIGS, seed=1))) == tried(
        studied(15, EnumeratedSampler(CONFIGS, seed=1))
    )


def test_proposals_asked_for_at_once_differ() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    seen = []
    for _ in range(3):
        asked = [study.ask(sampler.distributions) for _ in range(5)]
        seen += [tuple(trial.params.values()) for trial in asked]
        for trial in asked:
            study.tell(trial, time_of(trial.params))
    assert len(set(seen)) == 15


def test_threads_get_different_proposals() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective(sampler), n_trials=16, n_jobs=4)
    assert len(set(tried(study))) == 16


def test_another_process_sees_what_is_running() -> None:
    storage = optuna.storages.InMemoryStorage()
    studies = []
    for _ in range(2):
        sampler = EnumeratedSampler(CONFIGS, seed=0)
        studies.append(
            (optuna.create_study(sampler=sampler, storage=storage, study_name="one", load_if_exists=True), sampler)
        )
    asked = [study.ask(sampler.distributions).params for _ in range(4) for study, sampler in studies]
    assert len({tuple(params.values()) for params in asked}) == 8


def test_processes_see_what_others_propose_before_their_objectives_ask_for_it() -> None:
    storage = optuna.storages.InMemoryStorage()
    samplers = [EnumeratedSampler(CONFIGS, seed=0) for _ in range(2)]
    studies = [
        optuna.create_study(sampler=sampler, storage=storage, study_name="one", load_if_exists=True)
        for sampler in samplers
    ]
    pairs = list(zip(studies, samplers, strict=True))
    asked = [sampler.row_of(study.ask().relative_params) for _ in range(4) for study, sampler in pairs]
    assert len(set(asked)) == 8


def test_of_two_equal_proposals_the_later_trial_makes_another(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    earlier = study._storage.create_new_trial(study._study_id)  # of a process that is still proposing
    proposing, proposed = sampler._ranking.propose, []

    def meanwhile(*known):
        proposed.append(proposing(*known))
        if len(proposed) == 1:
            config = CONFIGS[proposed[0]]
            places = {name: sampler.axes[name].index(value) for name, value in config.items()}
            study._storage.set_trial_system_attr(earlier, PROPOSAL, places)
        return proposed[-1]

    monkeypatch.setattr(sampler._ranking, "propose", meanwhile)
    row = sampler.row_of(study.ask(sampler.distributions).params)
    assert proposed == [proposed[0], row]
    assert row != proposed[0]


def test_what_a_later_trial_proposed_while_this_one_was_thinking_is_left_to_it(monkeypatch) -> None:
    sampler, other = (EnumeratedSampler(CONFIGS, seed=0) for _ in range(2))
    study = optuna.create_study(sampler=sampler)
    theirs = optuna.load_study(study_name=study.study_name, storage=study._storage, sampler=other)
    proposing, asked = sampler._ranking.propose, []

    def slowly(*known):
        row = proposing(*known)
        if not asked:
            asked.append(other.row_of(theirs.ask().relative_params))
            assert asked == [row]
        return row

    monkeypatch.setattr(sampler._ranking, "propose", slowly)
    assert sampler.row_of(study.ask().relative_params) not in asked


@pytest.mark.parametrize("asked_for", [0, 1])
def test_a_trial_that_ends_before_it_asks_for_every_value_was_tried(asked_for: int) -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    rows = []

    def broken(trial: optuna.Trial) -> float:
        rows.append(sampler.row_of(trial.relative_params))
        for name in list(sampler.axes)[:asked_for]:
            trial.suggest_categorical(name, sampler.axes[name])
        if asked_for and len(rows) % 2:
            return 1.0 + len(rows)
        raise RuntimeError

    study.optimize(broken, n_trials=len(CONFIGS), catch=RuntimeError)
    assert sorted(rows) == list(range(len(CONFIGS)))


def test_what_is_enqueued_is_tried_once() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    wanted = [CONFIGS[7], CONFIGS[2]]
    for config in wanted:
        study.enqueue_trial(config)
    row = sampler.propose(study)
    assert row is not None
    assert CONFIGS[row] not in wanted
    study.optimize(objective(sampler), n_trials=len(CONFIGS))
    assert tried(study)[:2] == [tuple(config.values()) for config in wanted]
    assert len(set(tried(study))) == len(CONFIGS)


def test_what_is_enqueued_and_fails_before_it_asks_was_tried() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial(CONFIGS[3])
    rows = []

    def broken(trial: optuna.Trial) -> float:
        rows.append(sampler.row_of(trial.relative_params))
        raise RuntimeError

    study.optimize(broken, n_trials=len(CONFIGS), catch=RuntimeError)
    assert rows[0] == 3
    assert sorted(rows) == list(range(len(CONFIGS)))


def test_a_part_of_a_configuration_may_be_enqueued() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    for _ in range(3):
        study.enqueue_trial({"m": 64, "note": [1]})
    study.optimize(objective(sampler), n_trials=len(CONFIGS))
    assert [m for m, _, _ in tried(study)[:3]] == [64] * 3
    assert len(set(tried(study))) == len(CONFIGS)


def test_what_is_enqueued_in_part_is_tried_again_where_all_such_were() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    with_8 = [config for config in CONFIGS if config["warps"] == 8]
    for _ in range(len(with_8) + 1):
        study.enqueue_trial({"warps": 8})
    study.optimize(objective(sampler), n_trials=len(with_8) + 1)  # which asserts that each is of the list
    assert set(tried(study)) == {tuple(config.values()) for config in with_8}


@pytest.mark.parametrize("enqueued", [{"warps": 16}, {"m": 128, "warps": 8}, {"m": 128, "warps": 8, "layout": "row"}])
def test_what_is_enqueued_and_no_configuration_has_is_refused(enqueued: dict) -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.enqueue_trial({**enqueued, "note": 1})
    with pytest.raises(UsageError) as caught:
        study.ask()
    assert str(caught.value) == (
        f"no configuration of the list has {enqueued}, which was enqueued: enqueue what one has"
    )
    study.optimize(objective(sampler), n_trials=3)
    assert len(set(tried(study)[1:])) == 3


def test_a_mixture_that_is_none_of_the_list_is_nothing_learned() -> None:
    sampler = EnumeratedSampler(CONFIGS[:6], axes={"m": (16, 32), "warps": (1, 2, 4), "layout": ("row", "col")})
    study = optuna.create_study(sampler=sampler)
    trial = study.ask()
    proposed = trial.relative_params
    mixture = {"m": 32, "warps": 1, "layout": "row"}
    assert mixture not in CONFIGS[:6]
    trial.storage.set_trial_param(trial._trial_id, "m", 1, sampler.distributions["m"])
    for name in ("warps", "layout"):
        place = sampler.axes[name].index(mixture[name])
        trial.storage.set_trial_param(trial._trial_id, name, place, sampler.distributions[name])
    study.tell(trial, 1000.0)
    assert sampler._outcomes(study) == ([], [], [])
    assert proposed in CONFIGS[:6]


def test_a_trial_that_is_tried_anew_keeps_what_it_had() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    lost = study.ask()
    row = sampler.row_of(lost.relative_params)
    study.tell(lost, state=optuna.trial.TrialState.FAIL)
    attributes = study.trials[0].system_attrs
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, system_attrs=attributes))
    assert sampler.row_of(study.ask().relative_params) == row


def test_with_a_pruner_that_divides_a_study_nothing_is_tried_twice() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.HyperbandPruner(1, 4))
    study.optimize(objective(sampler), n_trials=16)
    assert len(set(tried(study))) == 16


def test_pruned_at_a_value_that_is_not_positive_is_a_failure() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler, direction="maximize")

    def accuracy(trial: optuna.Trial) -> float:
        objective(sampler)(trial)
        trial.report(0.0, 0)
        raise optuna.TrialPruned

    study.optimize(accuracy, n_trials=12)
    assert len(set(tried(study))) == 12


def test_a_study_can_be_pickled_and_copied() -> None:
    study = studied(6, EnumeratedSampler(CONFIGS, seed=0))
    for again in (pickle.loads(pickle.dumps(study)), copy.deepcopy(study)):
        again.optimize(objective(again.sampler), n_trials=3)
        assert len(set(tried(again))) == 9


def test_numbers_of_numpy_are_numbers() -> None:
    ours = EnumeratedSampler([{"m": m} for m in (16, 32, 48, 64)])
    theirs = EnumeratedSampler([{"m": m} for m in np.array([16, 32, 48, 64])])
    assert np.array_equal(ours.features, theirs.features)
    assert np.isfinite(EnumeratedSampler([{"m": m} for m in (3, 5, 2**70)]).features).all()


def test_the_list_at_its_end_stops_the_study() -> None:
    study = studied(100, EnumeratedSampler(CONFIGS, seed=0))
    assert set(tried(study)) == {tuple(config.values()) for config in CONFIGS}
    assert len(study.trials) <= len(CONFIGS) + 1


def test_a_list_of_one_configuration_stops_the_study() -> None:
    sampler = EnumeratedSampler(CONFIGS[:1], seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(objective(sampler), n_trials=100)
    assert len(study.trials) <= 2
    assert study.ask(sampler.distributions).params == CONFIGS[0]


def test_failed_and_pruned_trials_are_not_tried_again() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)

    def failing(trial: optuna.Trial) -> float:
        value = objective(sampler)(trial)
        if trial.number % 3 == 1:
            raise ValueError
        if trial.number % 3 == 2:
            trial.report(value, 0)
            raise optuna.TrialPruned
        return value

    study.optimize(failing, n_trials=len(CONFIGS), catch=ValueError)
    assert len(set(tried(study))) == len(CONFIGS)


def test_trials_of_another_list_are_passed_over() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.add_trial(
        optuna.trial.create_trial(
            params={"other": 1.0}, distributions={"other": optuna.distributions.FloatDistribution(0, 2)}, value=-3.0
        )
    )
    study.optimize(objective(sampler), n_trials=8)
    assert len(set(tried(study)[1:])) == 8


def test_first_and_priors() -> None:
    prior = np.log([time_of(config) for config in CONFIGS])
    best = int(np.argmin(prior))
    study = studied(3, EnumeratedSampler(CONFIGS, first=[3, best], priors=[prior]))
    assert tried(study)[:2] == [tuple(CONFIGS[3].values()), tuple(CONFIGS[best].values())]


def test_priors_of_what_is_maximised_are_negative() -> None:
    prior = np.log([1000 / time_of(config) for config in CONFIGS])
    sampler = EnumeratedSampler(CONFIGS, priors=[-prior], seed=0)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.optimize(lambda trial: 1000 / objective(sampler)(trial), n_trials=4)
    assert study.best_value == pytest.approx(1000 / min(map(time_of, CONFIGS)))


def test_trials_made_elsewhere_are_told() -> None:
    """Of a device that takes twice the time; its best are left out."""
    known = sorted(CONFIGS, key=time_of)[len(CONFIGS) // 10 :: 5]
    trials = [(known, [2 * time_of(config) for config in known])]
    best = min(map(time_of, CONFIGS))
    study = studied(12, EnumeratedSampler(CONFIGS, elsewhere=trials, seed=0))
    assert study.best_value <= 1.1 * best
    # Configurations that are not in the list count as well.
    listed = [config for config in CONFIGS if config not in known]
    sampler = EnumeratedSampler(listed, elsewhere=trials, seed=0)
    assert sampler.features.shape[0] == len(listed)
    assert studied(12, sampler).best_value <= 1.1 * best


def test_a_parameter_that_is_no_axis_is_drawn_at_random() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: objective(sampler)(trial) + trial.suggest_float("clock", 0, 1), n_trials=6)
    assert len({trial.params["clock"] for trial in study.trials}) == 6


def test_mistakes_are_told() -> None:
    with pytest.raises(UsageError, match="at least one configuration; got none"):
        EnumeratedSampler([])
    with pytest.raises(UsageError, match=r"configuration \{'m': 1\} must have exactly the names m, n"):
        EnumeratedSampler([{"m": 1, "n": 2}, {"m": 1}])
    with pytest.raises(UsageError, match=r"m=3 is not on its axis \(1, 2\)"):
        EnumeratedSampler([{"m": 3}], axes={"m": (1, 2)})
    with pytest.raises(UsageError, match=r"configuration \{'m': 1\} is in the list twice"):
        EnumeratedSampler([{"m": 1}, {"m": 1}])
    with pytest.raises(UsageError, match=r"a prior of shape \(3,\) must have a value for each of 2"):
        EnumeratedSampler([{"m": 1}, {"m": 2}], priors=[np.zeros(3)])
    with pytest.raises(UsageError, match=r"2 configurations tried elsewhere need a value each; got 1"):
        EnumeratedSampler([{"m": 1}], elsewhere=[([{"m": 1}, {"m": 2}], [1.0])])
    with pytest.raises(UsageError, match=r"a value from elsewhere is -1.0: EnumeratedSampler needs positive ones"):
        EnumeratedSampler([{"m": 1}], elsewhere=[([{"m": 2}], [-1.0])])
    for value in ("1", None, [1.0], 10**400, float("nan")):
        with pytest.raises(UsageError, match=r"a value from elsewhere is .*: EnumeratedSampler needs positive ones"):
            EnumeratedSampler([{"m": 1}], elsewhere=[([{"m": 2}], [value])])
    with pytest.raises(UsageError, match=r"configuration \{'n': 2\} must have exactly the names m"):
        EnumeratedSampler([{"m": 1}], elsewhere=[([{"n": 2}], [1.0])])
    with pytest.raises(UsageError, match=r"a prior expects nan of \{'m': 2\}: it needs a finite logarithm"):
        EnumeratedSampler([{"m": 1}, {"m": 2}], priors=[np.array([0.0, np.nan])])
    with pytest.raises(UsageError, match=r"first=\[2\] must be indices of the list, 0 to 1"):
        EnumeratedSampler([{"m": 1}, {"m": 2}], first=[2])
    for first in ([1.0], [True], ["1"]):
        with pytest.raises(UsageError, match=r"first=.* must be indices of the list, 0 to 1"):
            EnumeratedSampler([{"m": 1}, {"m": 2}], first=first)
    with pytest.raises(UsageError, match=r"a prior must have a logarithm, a number, for each configuration"):
        EnumeratedSampler([{"m": 1}, {"m": 2}], priors=[np.array([0.0, "x"], dtype=object)])
    for starters in (-1, 1.5, "1"):
        with pytest.raises(UsageError, match=r"starters=.* must be at least 0, an integer"):
            EnumeratedSampler([{"m": 1}, {"m": 2}], starters=starters)
    for seed in (-1, 1.5, "1", None, 2**32):
        with pytest.raises(UsageError, match=r"seed=.* must be an integer from 0 to 4294967295"):
            EnumeratedSampler([{"m": 1}, {"m": 2}], seed=seed)
    for value in (float("inf"), float("nan"), [1], 10**400):
        with pytest.raises(UsageError, match=r"m=.* must be a finite number, or anything that can be hashed"):
            EnumeratedSampler([{"m": 1}, {"m": value}], axes={"m": (1, value)})
        with pytest.raises(UsageError, match=r"m=.* must be a finite number, or anything that can be hashed"):
            EnumeratedSampler([{"m": 1}, {"m": value}])
        with pytest.raises(UsageError, match=r"m=.* must be a finite number, or anything that can be hashed"):
            EnumeratedSampler([{"m": 1}, {"m": 2}], elsewhere=[([{"m": value}], [1.0])])
    sampler = EnumeratedSampler(CONFIGS)
    study = optuna.create_study(sampler=optuna.samplers.PartialFixedSampler({"m": 64}, sampler))
    with pytest.raises(UsageError, match=r"proposes m, warps, layout together, and m is fixed by another sampler"):
        study.ask().suggest_categorical("warps", sampler.axes["warps"])
    assert list(sampler.distributions) == ["m", "warps", "layout"]
    with pytest.raises(UsageError, match=r"\{'m': 5\} is no configuration of the list"):
        EnumeratedSampler([{"m": 1}, {"m": 2}]).row_of({"m": 5})


def test_an_objective_that_is_no_positive_number_is_refused() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler)
    trial = study.ask(sampler.distributions)
    study.tell(trial, -1.0)
    with pytest.raises(UsageError, match=r"trial 0 has value -1.0: EnumeratedSampler needs positive ones"):
        study.ask(sampler.distributions)


def test_two_objectives_are_refused() -> None:
    sampler = EnumeratedSampler(CONFIGS, seed=0)
    study = optuna.create_study(sampler=sampler, directions=["minimize", "minimize"])
    with pytest.raises(UsageError, match="has one objective; the study has 2"):
        study.ask(sampler.distributions)


def test_a_trial_that_does_not_count_leaves_its_configuration_untried() -> None:
    sampler = EnumeratedSampler(CONFIGS[:3], counts=lambda trial: not trial.user_attrs)
    study = optuna.create_study(sampler=sampler)
    for config in CONFIGS[:3]:
        void = optuna.trial.create_trial(
            params=config,
            distributions=sampler.distributions,
            state=optuna.trial.TrialState.FAIL,
            user_attrs={"void": True} if config is CONFIGS[1] else {},
        )
        study.add_trial(void)
    assert sampler.propose(study) == 1
    assert len(study.trials) == 3


def test_what_is_proposed_without_a_trial_is_what_a_trial_would_get() -> None:
    one, other = (EnumeratedSampler(CONFIGS, seed=3) for _ in range(2))
    study = studied(10, one)
    row = one.propose(study)
    again = optuna.create_study(sampler=other)
    again.add_trials(study.trials)
    assert CONFIGS[row] == again.ask(other.distributions).params
    study.add_trials([optuna.trial.create_trial(params=c, distributions=one.distributions, value=1.0) for c in CONFIGS])
    assert one.propose(study) is None

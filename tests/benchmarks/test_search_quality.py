from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import landscape_file
from benchmarks.replay_tables import Table
from benchmarks.search_quality import Task, main, overall, run, summary, tasks, winner
from tests.benchmarks.tables import AXES, arrays, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tables of one kernel on four GPUs, two of which share a chip, and of another kernel on one."""
    for seed, gpu in enumerate(("A100", "W6600", "RTX_2080_Ti", "RTX_Titan")):
        content = arrays(seed)
        save(tmp_path / f"toy__{gpu}.npz", **{**content, "time": content["time"] * (1 + seed)})
    save(tmp_path / "lone__A100.npz")
    return tmp_path


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_a_summary_is_of_the_scores_at_the_checkpoints() -> None:
    quick = [0.5] * 9 + [0.9] * 5 + [0.96] * 6 + [0.99] * 10
    slow = [0.1] * 9 + [0.6] * 10 + [0.95] + [1.0] * 10
    row = summary([quick, slow], [1.0, 4.0])
    assert row["mean"] == pytest.approx({"10": 0.75, "20": 0.955, "30": 0.995})
    # Interpolated: a tenth of the way from the lesser to the greater.
    assert row["p10"] == pytest.approx({"10": 0.63, "20": 0.951, "30": 0.991})
    assert (row["evals95"], row["evals98"]) == (17.5, 21.0)
    assert row["ms_per_trial"] == 2.5


def test_a_summary_of_a_budget_that_is_no_checkpoint_ends_with_it() -> None:
    assert list(summary([[0.5] * 15], [1.0])["mean"]) == ["10", "15"]
    assert list(summary([[0.5] * 7], [1.0])["p10"]) == ["7"]
    assert list(summary([[0.5] * 100], [1.0])["mean"]) == ["10", "20", "30", "50", "100"]
    assert list(summary([[0.5] * 120], [1.0])["mean"]) == ["10", "20", "30", "50", "100", "120"]


@pytest.mark.parametrize(("reaching", "evals"), [(0, None), (1, None), (2, 3.0), (3, 3.0)])
def test_what_most_seeds_never_reach_takes_no_number_of_evaluations(reaching: int, evals: float | None) -> None:
    scores = [[0.1, 0.2, 0.97]] * reaching + [[0.1, 0.2, 0.3]] * (3 - reaching)
    row = summary(scores, [1.0] * 3)
    assert row["evals95"] == evals
    assert row["evals98"] is None


def test_overall_is_the_mean_over_spaces_and_the_median_of_evaluations() -> None:
    def row(score: float, evals: float | None) -> dict[str, Any]:
        return {
            "mean": {"10": score},
            "p10": {"10": score / 2},
            "evals95": evals,
            "evals98": None,
            "ms_per_trial": 10 * score,
        }

    means = overall({"a": {"s": row(0.2, 4), "t": row(1.0, 1)}, "b": {"s": row(0.4, None)}, "c": {"s": row(0.6, 8)}})
    assert means["s"]["spaces"] == 3
    assert means["t"]["spaces"] == 1
    assert means["s"]["mean"]["10"] == pytest.approx(0.4)
    assert means["s"]["p10"]["10"] == pytest.approx(0.2)
    assert (means["s"]["evals95"], means["s"]["evals98"]) == (8.0, None)
    assert means["s"]["ms_per_trial"] == pytest.approx(4.0)


@pytest.mark.parametrize("strategy", ["random", "tilewright"])
def test_a_search_scores_the_best_that_it_has_found(strategy: str, folder: Path) -> None:
    scores, ms = run(Task(folder / "toy__A100.npz", strategy, 0, 12, noise=False))
    assert len(scores) == 12
    assert scores == sorted(scores)
    assert 0.0 < scores[-1] <= 1.0
    assert ms > 0
    assert run(Task(folder / "toy__A100.npz", strategy, 0, 12, noise=False))[0] == scores


def test_a_search_of_more_trials_than_configurations_keeps_its_score(folder: Path) -> None:
    scores, _ = run(Task(folder / "toy__A100.npz", "random", 0, 70, noise=False))
    assert len(scores) == 70
    assert scores[49:] == [1.0] * 21


def test_a_search_with_noise_scores_the_true_time_of_what_it_measures_to_be_best(tmp_path: Path) -> None:
    # The second always measures as the best and is not; the third failed.
    content = {"X": np.array([[0, 0, 0], [1, 0, 0], [2, 0, 0]]), "time": np.array([1.0, 1.25, np.nan])}
    repeats = np.array([[1.0] * 8, [0.5] * 8, [np.nan] * 8])
    path = save(tmp_path / "toy__A.npz", **content, times=repeats)
    noisy, _ = run(Task(path, "random", 0, 3, noise=True))
    exact, _ = run(Task(path, "random", 0, 3, noise=False))
    assert noisy[-1] == 0.8
    assert exact[-1] == 1.0


def test_the_winner_is_found_by_measuring_the_best_few_again() -> None:
    times = np.array([2.0, 1.0, 4.0, 5.0, 6.0, np.nan, 0.5])
    table = Table("toy__A", {}, np.arange(7)[:, None], times, np.repeat(times[:, None], 32, axis=1))
    draw = np.random.default_rng(0)
    # Row 0 was lucky once; row 6 would have won, but was not among the best four.
    assert winner(table, [5, 0, 1, 2, 3, 6], [np.nan, 0.4, 1.0, 1.5, 1.6, 9.0], draw) == 0.5
    assert winner(table, [5, 6], [np.nan, 9.0], draw) == 1.0
    assert winner(table, [5], [np.nan], draw) == 0.0


def test_what_other_gpus_left_is_of_the_same_kernel_and_chips_that_are_shared_stand_apart(folder: Path) -> None:
    space = folder / "toy__RTX_2080_Ti.npz"
    every = list(tasks([space], folder, ["random", "tilewright"], budget=5, seeds=3, noise=False))
    by_label: dict[str, list[Task]] = {}
    for task in every:
        by_label.setdefault(task.label, []).append(task)
    plain = ["random", "tilewright"]
    transferred = ["tilewright+100", "tilewright+tables", "tilewright+100, same chip", "tilewright+tables, same chip"]
    assert sorted(by_label) == sorted(plain + transferred)
    assert all([task.seed for task in each] == [0, 1, 2] for each in by_label.values())
    assert all(not task.sources for label in plain for task in by_label[label])

    def sources(label: str) -> list[list[str]]:
        return [[path.stem for path in task.sources] for task in by_label[label]]

    assert sources("tilewright+100") == [["toy__A100"], ["toy__W6600"], ["toy__A100"]]
    assert sources("tilewright+tables") == [["toy__A100", "toy__W6600"]] * 3
    assert sources("tilewright+100, same chip") == sources("tilewright+tables, same chip") == [["toy__RTX_Titan"]] * 3
    assert {task.cached for task in by_label["tilewright+100"]} == {100}
    assert {task.cached for task in by_label["tilewright+tables"]} == {None}


def test_a_kernel_with_one_gpu_learns_from_none(folder: Path) -> None:
    every = list(tasks([folder / "lone__A100.npz"], folder, ["tilewright"], budget=5, seeds=2, noise=False))
    assert [task.label for task in every] == ["tilewright"] * 2


def test_no_other_gpu_counts_without_a_folder_of_tables_or_for_other_strategies(folder: Path) -> None:
    space = folder / "toy__A100.npz"
    assert len(list(tasks([space], None, ["tilewright"], budget=5, seeds=1, noise=False))) == 1
    assert len(list(tasks([space], folder, ["random"], budget=5, seeds=1, noise=False))) == 1


def test_a_search_learns_from_another_gpu(folder: Path) -> None:
    """The tables differ by a factor, so the first proposal is the best there is."""
    sources = (folder / "toy__W6600.npz",)
    scores, _ = run(Task(folder / "toy__A100.npz", "tilewright", 0, 2, noise=False, sources=sources))
    assert scores[0] == 1.0


def test_the_figures_are_written_as_json(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the command sets it: it goes back after the test
    figures = tmp_path / "figures.json"
    spaces = [folder / "toy__RTX_2080_Ti.npz", folder / "lone__A100.npz"]
    arguments: list[object] = ["--budget", 15, "--seeds", 2, "--jobs", 1, "--json", figures, "--transfer", folder]
    for space in spaces:
        arguments += ["--space", space]
    for strategy in ("random", "tilewright"):
        arguments += ["--strategy", strategy]
    result = command(*arguments)
    assert result.exit_code == 0, result.output
    document = json.loads(figures.read_text())
    assert document["ours"] == "tilewright"
    assert (document["seeds"], document["noise"]) == (2, False)
    assert list(document["spaces"]) == ["toy__RTX_2080_Ti", "lone__A100"]
    assert list(document["spaces"]["lone__A100"]) == ["random", "tilewright"]
    assert set(document["spaces"]["toy__RTX_2080_Ti"]) == set(document["results"])
    assert len(document["results"]) == 6
    for rows in document["spaces"].values():
        for row in rows.values():
            assert set(row) == {"mean", "p10", "evals95", "evals98", "ms_per_trial"}
            assert set(row["mean"]) == set(row["p10"]) == {"10", "15"}
            assert 0 <= row["p10"]["10"] <= row["mean"]["10"] <= row["mean"]["15"] <= 1
            assert row["evals95"] is None or 1 <= row["evals95"] <= 15
            assert row["ms_per_trial"] > 0
    assert "toy__RTX_2080_Ti" in result.output
    assert "mean over spaces, 2 seeds" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "greedy"], "strategy 'greedy' can't run: there are tilewright, random, optuna-tpe"),
        (["--space", "{bad}"], "{bad} has no configuration that worked"),
        (["--space", "{good}", "--transfer", "{folder}"], "{bad} has no configuration that worked"),
        (["--space", "{good}", "--space", "{twin}"], "more than one space is named toy__A100"),
        (["--space", "{good}", "--json", "{folder}/none/figures.json"], "there is no folder {folder}/none"),
    ],
)
def test_a_mistake_ends_the_command_with_one_line(folder: Path, arguments: list[str], said: str) -> None:
    (folder / "other").mkdir()
    places = {
        "good": folder / "toy__A100.npz",
        "twin": save(folder / "other" / "toy__A100.npz"),
        "bad": save(folder / "toy__bad.npz", time=np.full(len(arrays()["time"]), np.nan)),
        "folder": folder,
    }
    result = command(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == 2
    assert said.format(**places) in result.output
    assert len(result.output.splitlines()) == 1


def test_a_strategy_that_is_not_installed_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import search_quality

    monkeypatch.setattr(search_quality, "available", lambda: ({}, {"optuna-gp": "it is absent (pip install it)"}))
    result = command("--space", folder / "toy__A100.npz", "--strategy", "optuna-gp")
    assert result.exit_code == 2
    assert result.output.splitlines() == ["Error: strategy 'optuna-gp' can't run: it is absent (pip install it)"]


def test_a_strategy_that_is_named_twice_runs_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import search_quality

    asked: list[Task] = []

    def measure(every: list[Task], jobs: int) -> dict[str, Any]:
        asked.extend(every)
        return {"toy": {"random": summary([[1.0]], [0.0])}}

    monkeypatch.setattr(search_quality, "measure", measure)
    result = command("--space", folder / "toy__A100.npz", "--seeds", 2, "--strategy", "random", "--strategy", "random")
    assert result.exit_code == 0, result.output
    assert [(task.strategy, task.seed) for task in asked] == [("random", 0), ("random", 1)]


def test_what_was_left_out_is_named_at_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import search_quality, strategies

    absent = {"kernel-tuner": "it is absent (pip install -e '.[bench]')"}
    monkeypatch.setattr(search_quality, "available", lambda: ({"random": strategies.random}, absent))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = command("--space", folder / "toy__A100.npz", "--budget", 3, "--seeds", 1, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "kernel-tuner was left out: it is absent (pip install -e '.[bench]')"


def test_tables_whose_axes_differ_are_not_learned_from(folder: Path) -> None:
    save(folder / "toy__B100.npz", dom=np.array(json.dumps({**AXES, "depth": [1, 2, 3, 4, 6]})))
    every = list(tasks([folder / "toy__A100.npz"], folder, ["tilewright"], budget=5, seeds=1, noise=False))
    tables = next(task for task in every if task.label == "tilewright+tables")
    assert [path.stem for path in tables.sources] == ["toy__RTX_2080_Ti", "toy__RTX_Titan", "toy__W6600"]


def test_of_a_landscape_the_search_is_replayed_with_its_prediction_too() -> None:
    path = min(landscape_file.SHIPPED.glob("*.npz"), key=lambda file: file.stat().st_size)
    every = list(tasks([path], None, ["random", "tilewright"], budget=12, seeds=1, noise=False))
    assert [task.label for task in every] == ["random", "tilewright", "tilewright+prediction"]
    assert [task.label for task in tasks([path], None, ["random"], 12, 1, noise=False)] == ["random"]
    plain, predicted = (run(task)[0] for task in every[1:])
    assert plain != predicted
    assert predicted == sorted(predicted)
    assert predicted[-1] > 0


def test_a_landscape_of_another_revision_ends_the_command_with_one_line(tmp_path: Path) -> None:
    shipped = min(landscape_file.SHIPPED.glob("*.npz"), key=lambda file: file.stat().st_size)
    with np.load(shipped, allow_pickle=False) as file:
        content = {name: file[name] for name in file}
    np.savez(tmp_path / "old.npz", **{**content, "version": np.array(0)})
    result = command("--space", tmp_path / "old.npz", "--strategy", "tilewright")
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert "is of version 0 of the format" in result.output

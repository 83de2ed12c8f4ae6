"""Predictions held against landscapes: a measured one of a simulated GPU, and some small enough to know the answer."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from benchmarks import heuristics, landscape
from benchmarks import prediction as module
from benchmarks.landscape_file import SHIPPED, Landscape, Row, load
from benchmarks.prediction import (
    BEFORE,
    COMPILED,
    HEURISTICS,
    RANDOM,
    RECORDED,
    by_prediction,
    drawn,
    expected_best,
    figures,
    main,
    means,
    spearman,
)
from tests.benchmarks.landscape_runs import simulated_landscapes
from tests.benchmarks.test_benchmarks import ENVIRONMENT, ROOT
from tests.tuner.simulated_worker import Scenario
from tests.tuner.simulation import BOARD, PROBLEM
from tilewright.kernels.lookup import prediction_protocol, predictions, record_key
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.prediction import predict
from tilewright.tuner.gpu_runner import TUNING
from tilewright.tuner.runner import Outcome
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.record import Resources, Status, Times

FINE = Resources(100, 0, 0, 32768)
SCORED = sorted(
    ((config, each.time_us) for each, config in predictions(GEMM, PROBLEM, BOARD)), key=lambda pair: pair[1]
)


@pytest.fixture(autouse=True)
def _without_heuristics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is installed here or not."""
    monkeypatch.setattr(heuristics, "installed", lambda: False)


def made(times_us: Mapping[int, float | Status], first: int = 0) -> Landscape:
    """A landscape of configurations by the rank of their predicted time; in place of a time may be a failure."""
    made = Landscape(
        workload="made",
        key=record_key(GEMM, PROBLEM, BOARD),
        device=BOARD,
        space=prediction_protocol(GEMM),
        effort=TUNING,
        seed=0,
        size=len(SCORED),
        environments=[],
    )
    for place, (rank, time_us) in enumerate(times_us.items()):
        config, predicted_us = SCORED[rank]
        if isinstance(time_us, Status):
            outcome = Outcome(time_us, resources=None if time_us is Status.COMPILE_ERROR else FINE)
        else:
            outcome = Outcome(Status.OK, Times.single(time_us), FINE)
        made.rows[config] = Row(outcome, predicted_us, place, place < first)
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 9])
def test_the_expected_best_is_the_mean_over_all_choices(count: int) -> None:
    values = [0.3, 1.0, 0.0, 0.0, 0.7, 0.7]
    every = [max(chosen) for chosen in itertools.combinations(values, min(count, len(values)))]
    assert expected_best(values, count) == pytest.approx(statistics.mean(every))


def test_figures_are_of_the_best_predicted() -> None:
    # By rank of prediction: 100 and 50 µs, a failure, 20 and 25 µs; the others are not in the file.
    found = figures(made({0: 100.0, 1: 50.0, 2: Status.INCORRECT, 3: 20.0, 4: 25.0}))
    assert found[BEFORE]["top"] == pytest.approx({"1": 0.2, "4": 1.0, "8": 1.0, "16": 1.0})
    assert found[RECORDED] == found[BEFORE]
    assert found[RANDOM]["top"]["1"] == pytest.approx((0.2 + 0.4 + 0 + 1.0 + 0.8) / 5)
    assert found[RANDOM]["top"]["4"] == pytest.approx((4 * 1.0 + 0.8) / 5)  # but for the choice without the best
    assert found[RANDOM]["top"]["16"] == 1.0
    # Predicted 1 2 4 5, measured 4 3 1 2: of four, Σd² = 9 + 1 + 4 + 4.
    assert found[BEFORE]["spearman"] == pytest.approx(1 - 6 * 18 / (4 * 15))


def test_a_failure_among_the_best_predicted_counts_as_nothing() -> None:
    top = figures(made({0: Status.OUT_OF_RESOURCES, 1: 50.0, 2: 25.0}))
    assert top[BEFORE]["top"]["1"] == 0.0
    # Once it is compiled, it is known that it spills.
    assert top[COMPILED]["top"]["1"] == 0.5
    assert figures(made({0: Status.COMPILE_ERROR, 1: 50.0}))[COMPILED]["top"]["1"] == 1.0
    # That a result is wrong is only known when it is there.
    assert figures(made({0: Status.INCORRECT, 1: 50.0}))[COMPILED]["top"]["1"] == 0.0


def test_compiled_resources_are_predicted_from() -> None:
    landscape = made({rank: 10.0 + rank for rank in range(4)})
    config = SCORED[0][0]
    slow = Resources(registers=255, spill_bytes=4000, stack_bytes=4000, shared_bytes=60000)
    row = landscape.rows[config]
    landscape.rows[config] = replace(row, outcome=replace(row.outcome, resources=slow))
    wanted = predict(GEMM.work(PROBLEM, config), slow, BOARD).order
    assert module.compiled(landscape)[config] == wanted
    assert by_prediction(landscape, module.compiled(landscape))[-1] == config
    assert by_prediction(landscape, module.before_compiling(landscape))[0] == config


def test_what_was_measured_ahead_of_its_turn_is_no_part_of_the_random_sample() -> None:
    landscape = made({rank: 10.0 + rank for rank in range(6)})
    places = [9, 0, 7, 1, 3, 2]  # of 0 to 5 in the random order; it had come to place 3
    for (config, row), place in zip(list(landscape.rows.items()), places, strict=True):
        landscape.rows[config] = replace(row, place=place, first=place in (9, 0, 7))
    assert drawn(landscape) == [SCORED[rank][0] for rank in (1, 3, 4, 5)]
    assert figures(landscape)[RANDOM]["top"]["1"] == pytest.approx(sum(10 / (10 + rank) for rank in (1, 3, 4, 5)) / 4)


def test_a_default_that_the_space_does_not_list_is_not_ranked_but_may_be_the_best() -> None:
    landscape = made({0: 40.0, 1: 20.0})
    default = GEMM.default(PROBLEM, BOARD)
    assert default not in dict(SCORED)
    landscape.rows[default] = Row(Outcome(Status.OK, Times.single(10.0), FINE), float("nan"), 1, True)
    found = figures(landscape)
    assert found[BEFORE]["top"]["16"] == found[RANDOM]["top"]["16"] == 0.5


@pytest.mark.parametrize("times_us", [[1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
def test_there_is_no_correlation_of_two_or_of_equal_ones(times_us: list[float]) -> None:
    landscape = made(dict(enumerate(times_us)))
    assert spearman(landscape, {config: (False, time_us) for config, time_us in SCORED}) is None


def test_equal_predictions_keep_the_order_of_the_space() -> None:
    landscape = made(dict.fromkeys(range(len(SCORED)), 1.0))
    listed = [config for _, config in predictions(GEMM, PROBLEM, BOARD)]
    assert by_prediction(landscape, dict.fromkeys(reversed(listed), (False, 1.0))) == listed


def test_a_landscape_without_anything_that_worked_is_refused() -> None:
    with pytest.raises(UsageError, match="made has no configuration that worked"):
        figures(made({0: Status.TIMEOUT}))


def test_means_are_of_those_that_have_a_figure() -> None:
    def row(correlation: float | None, reached: float | None) -> dict[str, Any]:
        return {"spearman": correlation, "top": {str(count): reached for count in module.TOPS}}

    found = means({"a": {"m": row(0.5, 0.2), "h": row(None, None)}, "b": {"m": row(None, 0.4)}})
    assert found["m"]["spearman"] == 0.5
    assert found["m"]["top"]["8"] == pytest.approx(0.3)
    assert (found["m"]["landscapes"], found["h"]["landscapes"]) == (2, 1)
    assert found["h"]["top"]["1"] is None
    assert (found["m"]["known"]["1"], found["h"]["known"]["1"]) == (2, 0)
    some = means({"a": {"h": row(None, 0.2)}, "b": {"h": row(None, None)}})
    console = Console(width=120)
    with console.capture() as capture:
        console.print(module.printed("means", some))
    assert "h (2)" in capture.get()
    assert "0.200 (1)" in capture.get()  # of one landscape of the two


SUGGESTED = [SCORED[rank][0] for rank in (3, 1, 0)]


def suggesting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heuristics, "installed", lambda: True)
    monkeypatch.setattr(heuristics, "suggestions", lambda problem, device: SUGGESTED)


def test_suggestions_of_others_are_held_against_the_same_best(monkeypatch: pytest.MonkeyPatch) -> None:
    suggesting(monkeypatch)
    found = figures(made({0: 10.0, 1: 20.0, 2: 5.0, 3: 40.0}))[HEURISTICS]
    assert found["top"] == pytest.approx({"1": 0.125, "4": 0.5, "8": 0.5, "16": 0.5})
    assert found["suggested"] == 3


def test_a_suggestion_that_was_not_measured_leaves_the_figure_out(monkeypatch: pytest.MonkeyPatch) -> None:
    suggesting(monkeypatch)
    assert figures(made({0: 10.0, 2: 5.0, 3: 40.0}))[HEURISTICS]["top"] == {
        "1": 0.125,
        "4": None,
        "8": None,
        "16": None,
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A landscape that the command itself has measured, on a simulated GPU."""
    folder = tmp_path_factory.mktemp("measured")
    out = folder / "small__a100.npz"
    options = ["--problem", str(PROBLEM), "--out", str(out), "--jobs", "1"]
    with simulated_landscapes(Scenario(str(folder / "c")), Scenario(str(folder / "m")), folder):
        done = CliRunner().invoke(landscape.command, options)
    assert done.exit_code == 0, done.output
    return out


def test_the_command_prints_a_table_and_writes_its_figures(measured: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, [str(measured), "--json", str(tmp_path / "figures.json")])
    assert done.exit_code == 0, done.output
    assert "━" in done.output
    assert "nvidia-matmul-heuristics was left out" in done.output
    document = json.loads((tmp_path / "figures.json").read_text())
    assert set(document["environment"]) >= ENVIRONMENT
    assert set(document["results"]["small__a100"]) == {BEFORE, COMPILED, RECORDED, RANDOM}
    # All 25 are in it and all worked; the recorded predictions are those of the model as it is.
    of = document["results"]["small__a100"]
    assert of[BEFORE] == of[RECORDED]
    known = {"landscapes": 1, "known": dict.fromkeys(of[BEFORE]["top"], 1)}
    assert document["mean"] == {method: row | known for method, row in of.items()}
    assert -0.5 < of[BEFORE]["spearman"] < 0.5  # simulated times have nothing to do with the configuration
    best = max(of[BEFORE]["top"]["16"], of[RANDOM]["top"]["16"])
    assert 0 < of[RANDOM]["top"]["1"] < of[RANDOM]["top"]["4"] < best <= 1.0


def test_what_cannot_be_read_is_named_in_one_line(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text")
    for arguments, said in (
        ([tmp_path / "text.npz"], "text.npz is no replayed space: it is no .npz archive"),
        ([measured, "--json", tmp_path / "absent" / "x.json"], "there is no folder"),
    ):
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert done.exit_code == 2
        assert said in done.output


def test_without_files_it_takes_those_that_are_shipped(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHIPPED", tmp_path)
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 2
    assert done.output.strip().endswith("measure some with benchmarks.landscape, or name any")
    load(measured).save(tmp_path / "copy.npz")
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 0
    assert "25 of 25 worked" in done.output


def test_the_page_has_the_figures_on_record() -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / "prediction.json").read_text())
    assert module.markdown(document) in (ROOT / "docs" / "landscapes.md").read_text()
    assert set(document["results"]) == {path.stem for path in SHIPPED.glob("*.npz")}

"""How good the prediction of times is, on measured landscapes: no GPU is needed.

    python -m benchmarks.prediction [FILE.npz ...] [--json FILE]

Of each landscape, all in `benchmarks/landscapes` by default (`benchmarks.landscape` measures them, `docs/landscapes.md`
describes the files):

- Spearman's rank correlation between predicted and measured time, over the random sample of configurations that worked.
- top-1 to top-16: the least measured time of the whole file over the least among the so many best predicted. 1 is the
  best there is; a configuration that failed counts as 0, for trying it was in vain.

`before compiling` predicts from estimated resources, `compiled` from those that the compiler reported, which knows what
spills and so leaves it out; both with the model as it is now. `as recorded` is what was predicted when the landscape
was measured. `random` is the expected figure of so many drawn at random, worked out exactly. All of them choose among
the configurations of the space that are in the file. `nvidia-matmul-heuristics`, where it is installed, is asked about
GEMMs; a figure is missing where not all of its suggestions were measured (`benchmarks.landscape --first` does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from benchmarks import heuristics
from benchmarks.comparison_report import table
from benchmarks.landscape_file import SHIPPED, Landscape, load
from benchmarks.measuring import Mistake, environment, revision
from tilewright.kernels.prediction import MODEL, Prediction, predict
from tilewright.kernels.problem import Config
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.record import Status

TOPS = (1, 4, 8, 16)

BEFORE, COMPILED, RECORDED, RANDOM = "before compiling", "compiled", "as recorded", "random"
HEURISTICS = "nvidia-matmul-heuristics"

Figures = dict[str, Any]
"""`spearman`, and `top`: by how many configurations are tried, as text. None for what is not known."""


def listed(landscape: Landscape) -> list[Config]:
    """The configurations of the space: the default need not be one."""
    return [config for config, row in landscape.rows.items() if not math.isnan(row.predicted_us)]


Order = tuple[bool, float]
"""`Prediction.order`: whether it should spill, and the time in µs."""


def before_compiling(landscape: Landscape) -> dict[Config, Order]:
    """What the model says of estimated resources."""
    return {config: each.order for config, each in _predicted(landscape).items()}


def priors(landscape: Landscape) -> dict[Config, float]:
    """What the tuner's search is told to expect in µs."""
    return {config: each.prior_us for config, each in _predicted(landscape).items()}


def _predicted(landscape: Landscape) -> dict[Config, Prediction]:
    kernel, problem, device = landscape.kernel, landscape.problem, landscape.device
    return {
        config: predict(kernel.work(problem, config), kernel.estimate(problem, config, device), device)
        for config in listed(landscape)
    }


def compiled(landscape: Landscape) -> dict[Config, Order]:
    """What the model says of compiled resources, of what compiled and is within the device's limits."""
    kernel, problem, device = landscape.kernel, landscape.problem, landscape.device
    outcomes = {config: landscape.rows[config].outcome for config in listed(landscape)}
    return {
        config: predict(kernel.work(problem, config), outcome.resources, device).order
        for config, outcome in outcomes.items()
        if outcome.resources is not None and outcome.status is not Status.OUT_OF_RESOURCES
    }


def recorded(landscape: Landscape) -> dict[Config, Order]:
    """The times alone that were predicted from estimated resources when the landscape was measured."""
    return {config: (False, landscape.rows[config].predicted_us) for config in listed(landscape)}


PREDICTIONS = {BEFORE: before_compiling, COMPILED: compiled, RECORDED: recorded}


def drawn(landscape: Landscape) -> list[Config]:
    """The random sample among the configurations: all whose turn had come, also of those that were measured first."""
    reached = max((row.place for row in landscape.rows.values() if not row.first), default=-1)
    return [config for config in listed(landscape) if landscape.rows[config].place <= reached] or listed(landscape)


def by_prediction(landscape: Landscape, predicted: Mapping[Config, Order]) -> list[Config]:
    """Configurations as the tuner ranks them, equal ones in the space's order."""
    axes = landscape.axes()
    places = {name: {value: at for at, value in enumerate(values)} for name, values in axes.items()}

    def key(config: Config) -> tuple[Any, ...]:
        return (*predicted[config], *(places[name][getattr(config, name)] for name in axes))

    return sorted(predicted, key=key)


def fractions(landscape: Landscape) -> dict[Config, float]:
    """Of the least time, what each configuration reaches; 0 for one that failed."""
    times_us, best_us = landscape.times_us, landscape.best_us
    assert best_us is not None
    return {config: best_us / times_us[config] if config in times_us else 0.0 for config in landscape.rows}


def expected_best(values: Sequence[float], count: int) -> float:
    """The mean, over all choices of `count` of the values, of the greatest: all of them, if there are no more."""
    ordered = sorted(values, reverse=True)
    total, left = len(ordered), min(count, len(ordered))
    mean, chance = 0.0, left / total  # that the greatest of all is among the chosen
    for rank, value in enumerate(ordered):
        mean += chance * value
        # That this one is not chosen, and the next one is the greatest that is.
        rest = total - rank - 1
        if rest < left:
            break
        chance *= (rest - left + 1) / rest
    return mean


def spearman(landscape: Landscape, predicted: Mapping[Config, Order]) -> float | None:
    """The rank correlation of times over the random sample, of what worked and is predicted; None for fewer than 3, or
    where all are equal."""
    times_us = landscape.times_us
    configs = [config for config in drawn(landscape) if config in times_us and config in predicted]
    pairs = np.array([(predicted[config][1], times_us[config]) for config in configs]).reshape(-1, 2)
    if len(pairs) < 3 or (pairs == pairs[0]).all(axis=0).any():
        return None
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)


def figures(landscape: Landscape) -> dict[str, Figures]:
    """What is reported of one landscape, by method.

    Raises:
        UsageError: nothing worked in it.
    """
    if landscape.best_us is None:
        raise UsageError(f"the landscape of {landscape.workload} has no configuration that worked")
    reached = fractions(landscape)
    found: dict[str, Figures] = {}
    for method, prediction in PREDICTIONS.items():
        predicted = prediction(landscape)
        order = by_prediction(landscape, predicted)
        top = {str(count): max((reached[config] for config in order[:count]), default=0.0) for count in TOPS}
        found[method] = {"spearman": spearman(landscape, predicted), "top": top}
    sample = [reached[config] for config in drawn(landscape)]
    found[RANDOM] = {"spearman": None, "top": {str(count): expected_best(sample, count) for count in TOPS}}
    if heuristics.installed():
        suggested = heuristics.suggestions(landscape.problem, landscape.device)
        if suggested:
            tops: dict[str, float | None] = {}
            for count in TOPS:
                first = suggested[:count]
                known = all(config in reached for config in first)
                tops[str(count)] = max(reached[config] for config in first) if known else None
            found[HEURISTICS] = {"spearman": None, "top": tops, "suggested": len(suggested)}
    return found


def means(results: Mapping[str, Mapping[str, Figures]]) -> dict[str, Figures]:
    """Each method's mean over the landscapes, of those that have the figure."""
    averages: dict[str, Figures] = {}
    for method in dict.fromkeys(method for result in results.values() for method in result):
        rows = [result[method] for result in results.values() if method in result]
        averages[method] = {
            "landscapes": len(rows),
            "spearman": _mean([row["spearman"] for row in rows]),
            "top": {str(count): _mean([row["top"][str(count)] for row in rows]) for count in TOPS},
            "known": {str(count): sum(row["top"][str(count)] is not None for row in rows) for count in TOPS},
        }
    return averages


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def printed(title: str, methods: Mapping[str, Figures]) -> Table:
    """Methods by what they reach."""
    shown = Table(title=title)
    shown.add_column("", no_wrap=True)
    for heading in ("Spearman", *(f"top-{count}" for count in TOPS)):
        shown.add_column(heading, justify="right")
    for method, row in methods.items():
        if "landscapes" in row:
            method = f"{method} ({row['landscapes']})"  # not every method has every op
        cells = ["-" if row["spearman"] is None else f"{row['spearman']:.3f}"]
        for count, value in row["top"].items():
            known = row.get("known", {}).get(count)
            few = f" ({known})" if known and known < row["landscapes"] else ""
            cells.append("-" if value is None else f"{value:.3f}{few}")
        shown.add_row(method, *cells)
    return shown


def markdown(document: Mapping[str, Any]) -> str:
    """What predictions reach on each landscape, from compiled resources and before compiling, beside random choice, as
    docs/landscapes.md has it."""
    rows = {**document["results"], "mean": document["mean"]}
    tops = [f"top-{count}" for count in TOPS]
    head = ["landscape", "worked, of measured, of all", "", "Spearman", *tops]
    body = []
    for name, methods in rows.items():
        sizes = document["sizes"].get(name)
        first = [name, "" if sizes is None else " / ".join(map(str, sizes))]
        for method in ("before compiling", "compiled", "random"):
            of = methods[method]
            cells = (of["spearman"], *(of["top"][str(count)] for count in TOPS))
            body.append([*first, method, *("" if cell is None else f"{cell:.2f}" for cell in cells)])
            first = ["", ""]
    return "\n".join(table(head, body)) + "\n"


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(files: tuple[Path, ...], json_file: Path | None) -> None:
    """Holds predictions against measured landscapes."""
    console = Console(width=120)
    results: dict[str, dict[str, Figures]] = {}
    sizes: dict[str, tuple[int, int, int]] = {}
    try:
        paths = tuple(dict.fromkeys(files)) or tuple(sorted(SHIPPED.glob("*.npz")))
        if not paths:
            raise UsageError(
                f"there are no landscapes in {SHIPPED}: measure some with benchmarks.landscape, or name any"
            )
        if json_file is not None and not json_file.parent.is_dir():
            raise UsageError(f"{json_file} can't be written: there is no folder {json_file.parent}")
        for path in paths:
            landscape = load(path)
            if path.stem in results:
                raise UsageError(f"more than one landscape is named {path.stem}: {', '.join(map(str, paths))}")
            results[path.stem] = figures(landscape)
            sizes[path.stem] = (len(landscape.times_us), len(landscape.rows), landscape.size)
            worked = f"{len(landscape.times_us)} of {len(landscape.rows)} worked"
            title = f"{landscape.workload} on {landscape.device.board}, {worked}, {landscape.size} in all"
            console.print(printed(title, results[path.stem]))
    except UsageError as error:
        raise Mistake(str(error)) from None
    average = means(results)
    console.print(printed(f"means, of so many landscapes each, model {MODEL}", average))
    if not heuristics.installed():
        console.print(f"{HEURISTICS} was left out: it is not installed (pip install -e '.[bench]')", markup=False)
    if json_file is not None:
        where = {"environment": environment(), "revision": revision(), "model": MODEL}
        document = {**where, "sizes": sizes, "results": results, "mean": average}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"written to {json_file}", markup=False)


if __name__ == "__main__":
    main()

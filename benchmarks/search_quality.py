"""How near the optimum a search comes after so many trials, on replayed spaces: no GPU is needed.

    python -m benchmarks.search_quality [--space FILE.npz ...] [--transfer DIR] [--budget 100] [--seeds 20] [--noise]
                                        [--strategy NAME ...] [--jobs N] [--json FILE]

A search is told the measured time of each configuration that it tries; its score after n trials is the least time of
the whole space over the least that it has found. The tuner's own search (`tilewright`) goes through the code that
`autotune` runs, beside random search, Optuna's samplers and Kernel Tuner's best strategy, each with the same seeds.

With `--transfer`, the tables in that folder of the same kernel on other GPUs are what earlier runs left: as strategy
`tilewright+100` 100 trials of one other GPU, drawn at random; as `tilewright+tables` all that is known of all others.
Pairs of GPUs with the same chip are left out of those and shown as `…, same chip`. Spaces without another GPU have no
such row.

Of a space that is a landscape of a kernel of ours (`benchmarks.landscape`), `tilewright+prediction` is the search as
`autotune` makes it: with the prediction, before anything is compiled, and the default configuration.

With `--noise` a search is told medians of 5 repeats drawn from those measured, and its score is the true one of the
winner among its best 4, measured again 25 times: what a tuner on a GPU does.

`ms per trial` is what a proposal costs the search, on one thread, with everything else the machine does meanwhile.

Kernel Tuner comes with `pip install -e '.[bench]'`; Optuna's Gaussian process needs PyTorch too (`pip install torch`).
What is not installed is left out and named at the end.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table as Printed

from benchmarks import landscape_file
from benchmarks.landscape_file import Landscape
from benchmarks.measuring import Mistake, environment
from benchmarks.replay_tables import Table, load, shipped
from benchmarks.strategies import OURS, Strategy, available, evidence_of, predicting, tilewright
from tilewright.tuning_db.errors import UsageError

CHECKPOINTS = (10, 20, 30, 50, 100)
CACHED_TRIALS = 100
REPEATS = 5
FINALISTS = 4
FINALIST_REPEATS = 25
WARMING_TRIALS = 15  # Optuna's samplers draw the first 10 at random, and import what they need after those


@dataclass(frozen=True)
class Task:
    """One search: picklable, for a process of its own."""

    space: Path
    strategy: str
    seed: int
    budget: int
    noise: bool
    sources: tuple[Path, ...] = ()
    cached: int | None = None  # trials of each source; None for all
    predicted: bool = False  # of a landscape: with the prediction and the default

    @property
    def label(self) -> str:
        """The strategy's row."""
        if self.predicted:
            return f"{self.strategy}+prediction"
        if not self.sources:
            return self.strategy
        same = all(_table(source).chip == _table(self.space).chip for source in self.sources)
        kind = "tables" if self.cached is None else str(self.cached)
        return f"{self.strategy}+{kind}" + (", same chip" if same else "")


@functools.cache
def _table(path: Path) -> Table:
    return load(path)


@functools.cache
def _landscape(path: Path) -> Landscape:
    return landscape_file.load(path)


@functools.cache
def _warm(strategy: str) -> None:
    """A short search, so that no measured one pays for a process's imports."""
    side = 5
    indices = np.array([divmod(row, side) for row in range(side**2)])
    times = 1.0 + np.arange(side**2)
    values = tuple(range(side))
    table = Table("warm", {"x": values, "y": values}, indices, times, times[:, None])
    available()[0][strategy](table, WARMING_TRIALS, 0, lambda row: float(times[row]))


def run(task: Task) -> tuple[list[float], float]:
    """The score after each trial, and the milliseconds that the search took for one."""
    _warm(task.strategy)
    table = _table(task.space)
    rows: list[int] = []
    told: list[float] = []
    draw = np.random.default_rng((task.seed, 1))
    spent = 0.0
    began = time.perf_counter()

    def observe(row: int) -> float:
        nonlocal spent, began
        spent += time.perf_counter() - began
        assert row not in rows, "a strategy may not try a configuration twice"
        rows.append(row)
        told.append(measured(table, row, draw, REPEATS) if task.noise else float(table.times[row]))
        began = time.perf_counter()
        return told[-1]

    strategy: Strategy = available()[0][task.strategy]
    if task.sources:
        evidence = [evidence_of(_table(source), task.cached, task.seed) for source in task.sources]
        strategy = functools.partial(tilewright, evidence=[each for each in evidence if each.times_us])
    if task.predicted:
        strategy = functools.partial(predicting, landscape=_landscape(task.space))
    began = time.perf_counter()
    strategy(table, min(task.budget, len(table.times)), task.seed, observe)
    spent += time.perf_counter() - began
    if task.noise:
        scores = [winner(table, rows[:count], told[:count], draw) for count in range(1, len(rows) + 1)]
    else:
        scores = np.maximum.accumulate([table.fraction(row) for row in rows]).tolist()
    scores += scores[-1:] * (task.budget - len(scores))
    return scores, spent / len(rows) * 1e3


def measured(table: Table, row: int, draw: np.random.Generator, count: int) -> float:
    """The median of repeats drawn from those of a configuration; NaN for one that failed."""
    repeats = table.repeats[row]
    repeats = repeats[~np.isnan(repeats)]
    if np.isnan(table.times[row]):
        return float("nan")
    return float(np.median(draw.choice(repeats, count))) if len(repeats) else float(table.times[row])


def winner(table: Table, rows: Sequence[int], told: Sequence[float], draw: np.random.Generator) -> float:
    """The true score of the one that wins when the best few are measured again."""
    best = [place for place in np.argsort(told, kind="stable")[:FINALISTS] if not np.isnan(told[place])]
    if not best:
        return 0.0
    again = [measured(table, rows[place], draw, FINALIST_REPEATS) for place in best]
    return table.fraction(rows[best[int(np.argmin(again))]])


def summary(scores: Sequence[Sequence[float]], ms: Sequence[float]) -> dict[str, Any]:
    """What is reported of one strategy on one space, from one row of scores a seed."""
    table = np.array(scores)
    budget = table.shape[1]
    points = [*(point for point in CHECKPOINTS if point < budget), budget]

    def evaluations(wanted: float) -> float | None:
        """The median over seeds; None where most never get there."""
        first = [int(np.argmax(row >= wanted)) + 1 if row[-1] >= wanted else np.inf for row in table]
        middle = float(np.median(first))
        return middle if np.isfinite(middle) else None

    return {
        "mean": {str(point): float(table[:, point - 1].mean()) for point in points},
        "p10": {str(point): float(np.quantile(table[:, point - 1], 0.1)) for point in points},
        "evals95": evaluations(0.95),
        "evals98": evaluations(0.98),
        "ms_per_trial": float(np.median(ms)),
    }


def tasks(
    spaces: Sequence[Path], transfer: Path | None, strategies: Sequence[str], budget: int, seeds: int, noise: bool
) -> Iterator[Task]:
    """Every search of a run."""
    others = sorted(transfer.glob("*.npz")) if transfer is not None else []
    for space in spaces:
        table = _table(space)
        sources = [
            path
            for path in others
            if (other := _table(path)).kernel == table.kernel and other.gpu != table.gpu and other.axes == table.axes
        ]
        far = [path for path in sources if _table(path).chip != table.chip]
        near = [path for path in sources if path not in far]
        predicted = OURS in strategies and landscape_file.is_landscape(space)
        if predicted:
            _landscape(space)  # before any search, for one that is of another revision
        for seed in range(seeds):
            for strategy in strategies:
                yield Task(space, strategy, seed, budget, noise)
            if predicted:
                yield Task(space, OURS, seed, budget, noise, predicted=True)
            if OURS in strategies:
                for group in filter(None, (far, near)):
                    one = group[seed % len(group)]
                    yield Task(space, OURS, seed, budget, noise, (one,), CACHED_TRIALS)
                    yield Task(space, OURS, seed, budget, noise, tuple(group))


def measure(every: Sequence[Task], jobs: int) -> dict[str, dict[str, dict[str, Any]]]:
    """The summary of each strategy on each space."""
    # Of the processes started here: threads of several searches on the same processors disturb each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    scores: dict[tuple[str, str], list[tuple[list[float], float]]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for done, (task, result) in enumerate(zip(every, pool.map(run, every, chunksize=4), strict=True)):
            scores.setdefault((_table(task.space).name, task.label), []).append(result)
            if sys.stderr.isatty():
                print(f"\r{done + 1} of {len(every)} searches", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    spaces: dict[str, dict[str, dict[str, Any]]] = {}
    for (space, label), results in scores.items():
        spaces.setdefault(space, {})[label] = summary(*zip(*results, strict=True))
    return spaces


def overall(spaces: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each strategy's mean over the spaces it has."""
    labels = list(dict.fromkeys(label for rows in spaces.values() for label in rows))
    means = {}
    for label in labels:
        rows = [each[label] for each in spaces.values() if label in each]
        means[label] = {
            "spaces": len(rows),
            "mean": _at_each_point(rows, "mean"),
            "p10": _at_each_point(rows, "p10"),
            # A space where most seeds never get there counts as infinitely many.
            "evals95": _median(row["evals95"] for row in rows),
            "evals98": _median(row["evals98"] for row in rows),
            "ms_per_trial": _mean(row["ms_per_trial"] for row in rows),
        }
    return means


def _at_each_point(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float]:
    return {point: _mean(row[kind][point] for row in rows) for point in rows[0][kind]}


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _median(values: Any) -> float | None:
    middle = float(np.median([np.inf if value is None else value for value in values]))
    return middle if np.isfinite(middle) else None


def printed(title: str, rows: dict[str, dict[str, Any]]) -> Printed:
    """Strategies by what they reach."""
    points = list(next(iter(rows.values()))["mean"])
    table = Printed(title=title)
    table.add_column("mean / 10th percentile", no_wrap=True)
    for heading in (*(f"@{point}" for point in points), "to 95 %", "to 98 %", "ms per trial"):
        table.add_column(heading, justify="right", no_wrap=True)
    for label, row in rows.items():
        cells = [f"{row['mean'][point]:.3f} / {row['p10'][point]:.3f}" for point in points]
        cells += ["never" if row[name] is None else f"{row[name]:g}" for name in ("evals95", "evals98")]
        table.add_row(label, *cells, f"{row['ms_per_trial']:.1f}")
    return table


@click.command()
@click.option(
    "--space",
    "spaces",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A table to search; repeatable. All that are shipped, if left out.",
)
@click.option(
    "--transfer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of tables of other GPUs to learn from.",
)
@click.option("--budget", default=100, show_default=True, type=click.IntRange(min=1), help="Trials of a search.")
@click.option("--seeds", default=20, show_default=True, type=click.IntRange(min=1), help="Searches of each kind.")
@click.option("--noise", is_flag=True, help="Tell medians of 5 repeats, and measure the finalists again.")
@click.option("--strategy", "chosen", multiple=True, help="Only this strategy; repeatable.")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes; by default one per processor.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(
    spaces: tuple[Path, ...],
    transfer: Path | None,
    budget: int,
    seeds: int,
    noise: bool,
    chosen: tuple[str, ...],
    jobs: int | None,
    json_file: Path | None,
) -> None:
    """Replays searches on measured spaces."""
    strategies, missing = available()
    chosen = tuple(dict.fromkeys(chosen))
    for name in chosen:
        if name not in strategies:
            reason = missing.get(name, f"there are {', '.join((*strategies, *missing))}")
            raise Mistake(f"strategy {name!r} can't run: {reason}")
    if json_file is not None and not json_file.parent.is_dir():
        raise Mistake(f"{json_file} can't be written: there is no folder {json_file.parent}")
    spaces = tuple(dict.fromkeys(spaces)) or tuple(shipped())
    names = [path.stem for path in spaces]
    for path in spaces:
        if names.count(path.stem) > 1:
            raise Mistake(f"more than one space is named {path.stem}: {', '.join(map(str, spaces))}")
    console = Console(width=150)
    try:
        every = list(tasks(spaces, transfer, chosen or tuple(strategies), budget, seeds, noise))
    except UsageError as error:
        raise Mistake(str(error)) from None
    results = measure(every, jobs or len(os.sched_getaffinity(0)))
    for space, rows in results.items():
        console.print(printed(space, rows))
    means = overall(results)
    console.print(printed(f"mean over spaces, {seeds} seeds" + (", with noise" if noise else ""), means))
    if not chosen:
        for name, reason in missing.items():
            console.print(f"{name} was left out: {reason}", markup=False)  # reasons name extras in brackets
    if json_file is not None:
        document = {
            "environment": environment(),
            "ours": OURS,
            "seeds": seeds,
            "noise": noise,
            "spaces": results,
            "results": means,
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"written to {json_file}", markup=False)


if __name__ == "__main__":
    main()

"""How much slower than the best an answer is that was measured elsewhere: on another board, or on a near shape.

    python -m benchmarks.lookup_regret [--space FILE.npz ...] [--trials 100] [--seeds 20] [--db FOLDER] [--model BOARD]
                                       [--json FILE]

Regret is the time of the answered configuration where it was asked for, over the least time there, minus 1. Every
answer comes from `TuningDB.best`, asked of real files.

- Other board, replayed: tables of one kernel on several GPUs (see `replay/README.md`). The given number of trials,
  drawn at random with each seed, is put on record for one GPU and asked for another that has no record. A configuration
  that fails there gives way to the next, as one whose code doesn't load does. Beside it: what of the regret is the
  transfer's, against the best of the very same trials; what as many trials on the GPU itself give; what the other's
  whole table gives. A lookup carries nothing over to another arch; pairs of different archs are shown all the same,
  asked as if they were of one, for what that rule is worth.
- Near shape and other board, our own kernels: of every problem that was measured in `--db` (the database folder, by
  default) with at least 10 configurations, what is answered without its own records.
- Other key of the very problem: by how much the times of a configuration differ that was measured in `--db` under
  another revision, toolchain or timing protocol as well, for every two of these.
- `--model`: the same near shapes with times by the prediction model for the suites' problems instead of measured ones.
  It tells how the model's landscapes hang together, and nothing of a GPU.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import replay_tables
from benchmarks.measuring import environment
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import check_supported, predictions, record_key
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.installation import present_form
from tilewright.tuner.suites import SUITES
from tilewright.tuning_db.env import SHIPPED, database_dir
from tilewright.tuning_db.errors import ProblemError, RunError, UnknownKernelError, UnsupportedError, UsageError
from tilewright.tuning_db.record import Environment, Key, Provenance, Record, Resources, Status, Times, canonical_json
from tilewright.tuning_db.shapes import FARTHEST
from tilewright.tuning_db.store import TuningDB

ARCHS = {"RTX_2080_Ti": "sm_75", "RTX_Titan": "sm_75", "A6000": "sm_86", "RTX_3060_laptop": "sm_86"}
"""Of the GPUs in the tables; one that is not here has an arch of its own."""

LEAST_CONFIGS = 10
NOWHERE = Environment("benchmark", "", "", "", "", "benchmark")
RESOURCES = Resources(registers=32, spill_bytes=0, stack_bytes=0, shared_bytes=0)


@dataclass(frozen=True)
class Space:
    """The table of one kernel on one GPU."""

    kernel: str
    gpu: str
    times_us: dict[str, float]  # by configuration in canonical JSON; infinite where it failed

    @property
    def arch(self) -> str:
        """As far as it matters which are equal."""
        return ARCHS.get(self.gpu, self.gpu)

    @property
    def least_us(self) -> float:
        """The optimum."""
        return min(self.times_us.values())

    def key(self) -> Key:
        """Of its records. All tables of a kernel are of one problem; archs are one here, see above."""
        return Key(self.kernel, "", "{}", self.gpu.lower(), 0, "", "", "replay")

    def drawn(self, trials: int, generator: np.random.Generator) -> list[tuple[str, float]]:
        """Trials at random, each configuration once."""
        configs = list(self.times_us)
        places = generator.choice(len(configs), min(trials, len(configs)), replace=False)
        return [(configs[place], self.times_us[configs[place]]) for place in places]


def load(path: Path) -> Space:
    """A table from its file.

    Raises:
        UsageError: it is no such table.
    """
    table = replay_tables.load(path)
    configs = [canonical_json({name: getattr(config, name) for name in table.axes}) for config in table.configs]
    times = np.where(np.isnan(table.times), np.inf, table.times * 1e3).tolist()
    return Space(table.kernel, table.gpu, dict(zip(configs, times, strict=True)))


def records_of(key: Key, trials: Iterable[tuple[str, float]]) -> Iterator[Record]:
    """Measured records; failures as such."""
    for config, time_us in trials:
        ok = np.isfinite(time_us)
        yield Record(
            key,
            config,
            Status.OK if ok else Status.RUNTIME_ERROR,
            Provenance.MEASURED,
            Times.single(float(time_us)) if ok else None,
            RESOURCES if ok else None,
        )


def put(folder: Path, records: Iterable[Record]) -> None:
    """Puts records into the files of their devices."""
    by_device: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        by_device[record.key.device].append(record)
    for device, of_it in by_device.items():
        with TuningDB.open(device, folder) as database:
            database.add_many(of_it, database.start_run(NOWHERE))


def other_board(there: Space, here: Space, trials: int, seeds: int) -> dict[str, list[float]]:
    """Regrets on one GPU of what was measured on another, by seed: in all, of the transfer alone, and of as many trials
    on the GPU itself."""
    outcome: dict[str, list[float]] = {"regret": [], "transfer": [], "own": []}
    for seed in range(seeds):
        drawn = there.drawn(trials, np.random.default_rng(seed))
        with tempfile.TemporaryDirectory(prefix="lookup-regret-") as name:
            put(Path(name), records_of(there.key(), drawn))
            with TuningDB.open(here.key().device, Path(name), read_only=True) as database:
                answer = database.best(
                    here.key(), accept=lambda record: bool(np.isfinite(here.times_us[record.config]))
                )
        if answer is None or answer.reason != f"board {there.key().device}":
            raise RunError(f"{trials} trials on {there.gpu} answered {answer} for {here.gpu}: take more")
        time_us = here.times_us[answer.record.config]
        outcome["regret"].append(time_us / here.least_us - 1)
        outcome["transfer"].append(time_us / min(here.times_us[config] for config, _ in drawn) - 1)
        own = here.drawn(trials, np.random.default_rng(seed))
        outcome["own"].append(min(time for _, time in own) / here.least_us - 1)
    return outcome


def whole_table(there: Space, here: Space) -> float:
    """Regret of the best of all configurations on another GPU, of those that run here."""
    runs_here = [(time, config) for config, time in there.times_us.items() if np.isfinite(here.times_us[config])]
    return here.times_us[min(runs_here)[1]] / here.least_us - 1


POOLS = ("all of one arch", "all of two archs")


def replayed(spaces: Sequence[Space], trials: int, seeds: int) -> tuple[Table, dict[str, Any]]:
    """Every ordered pair of GPUs of one kernel, and all together."""
    table = Table(title=f"other board, {trials} trials on record, {seeds} seeds: regret in %")
    for name in ("kernel", "measured on", "asked for"):
        table.add_column(name)
    for name in ("mean", "p50", "p95", "transfer p95", "own trials p95", "whole table"):
        table.add_column(name, justify="right")
    results: dict[str, Any] = {}
    pools: dict[str, dict[str, list[float]]] = {pool: defaultdict(list) for pool in POOLS}

    def add(label: str, cells: Sequence[str], outcome: Mapping[str, list[float]], whole: float | None) -> None:
        one = summary(outcome["regret"])
        one |= {f"{name}_p95": summary(outcome[name])["p95"] for name in ("transfer", "own")}
        results[label] = one | ({} if whole is None else {"whole_table": whole})
        shown = [percent(one[name]) for name in ("mean", "p50", "p95", "transfer_p95", "own_p95")]
        last = "" if whole is None else percent(whole)
        table.add_row(*cells, *shown, last, style="bold" if whole is None else None)

    for there, here in itertools.permutations(spaces, 2):
        if there.kernel == here.kernel:
            outcome = other_board(there, here, trials, seeds)
            for name, values in outcome.items():
                pools[POOLS[there.arch != here.arch]][name] += values
            cells = (there.kernel, there.gpu, here.gpu)
            add(f"{there.kernel}: {there.gpu} → {here.gpu}", cells, outcome, whole_table(there, here))
    for pool, pooled in pools.items():
        if pooled:
            add(pool, (pool, "", ""), pooled, None)
    return table, results


def percent(fraction: float) -> str:
    """As a percentage, without the sign."""
    return f"{100 * fraction:.1f}"


def summary(regrets: Sequence[float]) -> dict[str, float]:
    """How many there are, and their mean, median and 95th percentile where there are any."""
    if not regrets:
        return {"answers": 0}
    quantiles = {f"p{q}": float(np.percentile(regrets, q)) for q in (50, 95)}
    return {"answers": len(regrets), "mean": float(np.mean(regrets)), **quantiles}


@dataclass
class Answers:
    """What was answered to questions whose truth is on record."""

    regrets: list[float]
    distances: list[float]
    asked: int = 0
    unanswered: int = 0
    untimed: int = 0  # answered with a configuration that was not measured on the problem itself

    def ask(self, database: TuningDB, key: Key, times_us: dict[str, float]) -> None:
        """One question, answered without the records of the problem itself on its own board; `times_us` are the truth.

        A configuration that failed on the problem gives way to the next, as it would when it is compiled or loaded.
        """
        kernel = find_kernel(key.op)
        problem = kernel.problem.from_json(key.problem)
        itself = (key.problem, key.device)
        answer = database.best(
            key,
            near=kernel.near(problem),
            accept=lambda record: (
                (record.key.problem, record.key.device) != itself
                and bool(np.isfinite(times_us.get(record.config, 0.0)))
            ),
        )
        self.asked += 1
        if answer is None:
            self.unanswered += 1
        elif answer.record.config not in times_us:
            self.untimed += 1
        else:
            self.regrets.append(times_us[answer.record.config] / min(times_us.values()) - 1)
            other = kernel.problem.from_json(answer.record.key.problem)
            self.distances.append(kernel.distance(problem, other) or 0.0)


def measured_in(folder: Path) -> dict[Key, dict[str, float]]:
    """Every landscape of our own kernels in the files of a folder: times by configuration, infinite where it failed."""
    landscapes: dict[Key, dict[str, float]] = defaultdict(dict)
    for path in sorted(folder.glob("*.sqlite")):
        with TuningDB.open(path.stem, folder, read_only=True) as database:
            for record in database.find(provenance=Provenance.MEASURED):
                landscapes[record.key][record.config] = record.times.median_us if record.times else np.inf
    return {key: times for key, times in landscapes.items() if is_question(key, times)}


def is_question(key: Key, times_us: dict[str, float]) -> bool:
    """Whether a landscape is large enough, and of a kernel and problem that there still are."""
    try:
        find_kernel(key.op).problem.from_json(key.problem)
    except (UnknownKernelError, ProblemError):
        return False
    return sum(map(math.isfinite, times_us.values())) >= LEAST_CONFIGS


def differences(folder: Path) -> list[float]:
    """Of each configuration and every two keys under which it was measured for one problem and board: how much slower
    the slower time is, as a fraction of the faster one."""
    times: dict[tuple[str, ...], dict[Key, float]] = defaultdict(dict)
    for path in sorted(folder.glob("*.sqlite")):
        with TuningDB.open(path.stem, folder, read_only=True) as database:
            for record in database.find(provenance=Provenance.MEASURED):
                if record.times is not None:
                    config = present_form(record.key.op, record.config)
                    of = (record.key.op, record.key.problem, record.key.device, config)
                    times[of][record.key] = record.times.median_us
    pairs = itertools.chain(*(itertools.combinations(each.values(), 2) for each in times.values()))
    return [max(pair) / min(pair) - 1 for pair in pairs]


PARTS = (50, 80, 90, 95)


def differing(found: Sequence[float]) -> tuple[str, dict[str, float]]:
    """A line about differences, and their number and percentiles."""
    percentiles = {f"p{part}": float(np.percentile(found, part)) for part in PARTS}
    said = ", ".join(
        f"{part} % by at most {percent(value)} %" for part, value in zip(PARTS, percentiles.values(), strict=True)
    )
    return f"times under two keys: {len(found)} pairs, {said}", {"pairs": len(found), **percentiles}


@contextmanager
def without_shipped() -> Iterator[None]:
    """Leaves out what comes with the package: it may know the answers."""
    before = os.environ.get(SHIPPED)
    os.environ[SHIPPED] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SHIPPED]
        else:
            os.environ[SHIPPED] = before


def left_out(landscapes: dict[Key, dict[str, float]], *, board: bool) -> dict[str, Answers]:
    """Answers to each landscape's question from the others of its board, or from those of the other boards."""
    answers: dict[str, Answers] = {}
    for device in sorted({key.device for key in landscapes}):
        with tempfile.TemporaryDirectory(prefix="lookup-regret-") as name:
            others = [pair for pair in landscapes.items() if (pair[0].device == device) != board]
            put(Path(name), itertools.chain(*(records_of(key, times.items()) for key, times in others)))
            with without_shipped(), TuningDB.open(device, Path(name), read_only=True) as database:
                for key, times in landscapes.items():
                    if key.device == device:
                        answers.setdefault(key.op, Answers([], [])).ask(database, key, times)
    return answers


def modelled(board: str) -> dict[Key, dict[str, float]]:
    """Landscapes by the prediction model, of the suites' problems, as if they were measured."""
    device = resolve_device(board)
    landscapes: dict[Key, dict[str, float]] = {}
    for workload in {workload.problem: workload for suite in SUITES.values() for workload in suite}.values():
        kernel = find_kernel(workload.op)
        try:
            check_supported(kernel, workload.problem, device)
        except UnsupportedError:
            continue
        found = predictions(kernel, workload.problem, device, coarse=True)
        times = {config.to_json(): prediction.time_us for prediction, config in found}
        if len(times) >= LEAST_CONFIGS:
            landscapes[replace(record_key(kernel, workload.problem, device), protocol="by the model")] = times
    return landscapes


BANDS = (1.0, 2.0, FARTHEST)
"""Distances of near shapes up to which regrets are shown together, from the one before."""


def own_table(title: str, answers: dict[str, Answers]) -> tuple[Table, dict[str, Any]]:
    """The answers of each op, and those within each band of distances."""
    table = Table(title=f"{title}: regret in %")
    for name in ("op", "distance"):
        table.add_column(name)
    for name in ("mean", "p50", "p95", "answers", "not timed", "no answer", "asked"):
        table.add_column(name, justify="right")
    results: dict[str, Any] = {}
    for op, of_it in answers.items():
        counts = {"not_timed": of_it.untimed, "unanswered": of_it.unanswered, "asked": of_it.asked}
        results[op] = summary(of_it.regrets) | counts
        table.add_row(op, "all", *figures(results[op]), *map(str, counts.values()), style="bold")
        for nearer, further in itertools.pairwise((-1.0, *BANDS)):
            inside = [
                regret
                for regret, distance in zip(of_it.regrets, of_it.distances, strict=True)
                if nearer < distance <= further
            ]
            results[op][f"to {further:g}"] = summary(inside)
            table.add_row("", f"to {further:g}", *figures(summary(inside)), "", "", "")
    return table, results


def figures(of: Mapping[str, float]) -> list[str]:
    """A summary's cells."""
    return [percent(of[name]) if of["answers"] else "-" for name in ("mean", "p50", "p95")] + [str(of["answers"])]


@click.command()
@click.option(
    "--space",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Tables to replay; all in benchmarks/replay by default.",
)
@click.option("--trials", default=100, show_default=True, type=click.IntRange(1), help="On record of the other GPU.")
@click.option("--seeds", default=20, show_default=True, type=click.IntRange(1), help="Draws of these trials.")
@click.option("--db", type=click.Path(file_okay=False, path_type=Path), help="Folder of measured databases.")
@click.option("--model", help="Also the near shapes of this board by the prediction model.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write figures.")
def main(
    files: tuple[Path, ...], trials: int, seeds: int, db: Path | None, model: str | None, json_file: Path | None
) -> None:
    """Measures the regret of answers from elsewhere."""
    where = environment()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        spaces = [load(path) for path in files or replay_tables.shipped()]
    except UsageError as error:
        raise click.UsageError(str(error)) from None
    table, results = replayed(spaces, trials, seeds)
    console.print(table)
    document: dict[str, Any] = {"environment": where, "unit": "fraction", "results": results}
    folder = database_dir(db)
    landscapes = measured_in(folder)
    if not landscapes:
        console.print(
            f"near shapes of our own kernels: not measured, for {folder} has no problem with {LEAST_CONFIGS} or more "
            f"measured configurations"
        )
    else:
        for title, board in (("near shape", False), ("other board of the arch", True)):
            table, document[title] = own_table(f"{title}, {folder}", left_out(landscapes, board=board))
            console.print(table)
    found = differences(folder)
    if found:
        line, document["other key"] = differing(found)
        console.print(line)
    if model is not None:
        title = f"near shape on {model} by the prediction model, nothing measured"
        table, document[title] = own_table(title, left_out(modelled(model), board=False))
        console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"written to {json_file}")


if __name__ == "__main__":
    main()

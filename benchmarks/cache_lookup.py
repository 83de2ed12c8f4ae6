"""What it costs to find a configuration: warm, in a fresh process, for a near shape, by prediction.

    python -m benchmarks.cache_lookup [--records 100000] [--processes 9] [--json FILE]

A database with the given number of measured records, of as many problems as fit 100 configurations each, all near each
other, is made in a temporary folder. Then, on the processor alone:

- warm: `plan_for` a problem that was planned before in this process, which is what a call pays whose arrays are new;
- first of a process: `choose` in a process of its own that has done its imports and nothing else, so opening the file
  included; the same for a near shape, where no tuning run has noted the hash of the code, and where the user's own
  database has that note alone and the answer is among the shipped records, 16 of each problem;
- open file: a later question in the process, on a connection that is there;
- prediction: choose a configuration with no database at all, which ranks the coarse space.

The bars are what the design promises for 100,000 records of 1,000 problems. On a machine that others use, the least
time tells more than the median.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.measuring import finish, rounds_us
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.dispatch import plan_for
from tilewright.kernels.lookup import answer, predicted_best, record_key, remember
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuning_db.env import DB_DIR, SHIPPED, compiling_environment
from tilewright.tuning_db.errors import RunError
from tilewright.tuning_db.file import open_file, path_for
from tilewright.tuning_db.record import Environment, Provenance, Record, Resources, Status, Times
from tilewright.tuning_db.selection import BestFew
from tilewright.tuning_db.shipping import write_database
from tilewright.tuning_db.store import TuningDB

CONFIGS_PER_PROBLEM = 100
SHIPPED_PER_PROBLEM = 16
DEVICE = resolve_device("rtx3090")
RESOURCES = Resources(registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=32768)


def fill(folder: Path, count: int) -> list[GemmProblem]:
    """Makes the database; returns the problems on record."""
    problems = [
        GemmProblem(M=16 * (index + 1), N=4096, K=4096) for index in range(max(1, count // CONFIGS_PER_PROBLEM))
    ]
    configs = GEMM.space.configs(replace(problems[-1], M=4096), DEVICE)[:CONFIGS_PER_PROBLEM]
    with TuningDB.open(DEVICE.key, folder) as database:
        run = database.start_run(Environment("benchmark", "", "", "", "", "benchmark"))
        for problem in problems:
            key = record_key(GEMM, problem, DEVICE)
            database.add_many(
                (
                    Record(key, config.to_json(), Status.OK, Provenance.MEASURED, Times.single(10.0 + place), RESOURCES)
                    for place, config in enumerate(configs)
                ),
                run,
            )
    return problems


BARS_US = {
    "warm": 2.0,
    "first of a process, exact": 3000.0,
    "first of a process, exact, shipped": 3000.0,
    "open file, near shape": 1000.0,
}

FIRST = """
import sys, time
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import choose
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
problem, device = GemmProblem.parse(sys.argv[1]), resolve_device(sys.argv[2])
start = time.perf_counter()
choice = choose(GEMM, problem, device)
print((time.perf_counter() - start) * 1e6, choice.reason)
"""


def ship(folder: Path, shipped: Path) -> None:
    """Makes a shipped file of the best of a database."""
    shipped.mkdir()
    best = BestFew(SHIPPED_PER_PROBLEM, lambda op, problem: None)
    with (
        closing(open_file(path_for(DEVICE.key, folder), read_only=True)) as file,
        path_for(DEVICE.key, shipped).open("wb") as stream,
    ):
        write_database(file, DEVICE.key, stream, best=best)


def firsts_us(
    folder: Path, problem: GemmProblem, reason: str, processes: int, shipped: Path | None = None
) -> list[float]:
    """The first lookups of as many processes, which must be answered for this reason."""
    command = [sys.executable, "-c", FIRST, str(problem), DEVICE.board]
    variables = {**compiling_environment(), DB_DIR: str(folder), SHIPPED: str(shipped or 0)}
    times = []
    for _ in range(processes):
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        time_us, _, answered = done.stdout.strip().partition(" ")
        if not answered.startswith(reason):
            raise RunError(f"a process was answered {answered!r} for {problem}, not {reason!r}")
        times.append(float(time_us))
    return times


@click.command()
@click.option("--records", default=100_000, show_default=True, help="Records in the database.")
@click.option("--processes", default=9, show_default=True, type=click.IntRange(1), help="To see the first lookup of.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write figures.")
def main(records: int, processes: int, json_file: Path | None) -> None:
    """Measures the lookup of a configuration."""
    with tempfile.TemporaryDirectory(prefix="cache-lookup-") as name:
        folder = Path(name)
        problems = fill(folder, records)
        known = problems[len(problems) // 2]
        unknown = replace(known, M=known.M + 8)
        # The interpreter's plan: it costs nothing to make, and the dict is the same.
        times = {"warm": rounds_us(lambda: plan_for(GEMM, known, -1), 2000, 41)}
        times["first of a process, code not noted"] = firsts_us(folder, known, "exact", processes)
        with TuningDB.open(DEVICE.key, folder) as database:
            remember(GEMM, DEVICE, database)
        times["first of a process, exact"] = firsts_us(folder, known, "exact", processes)
        times["first of a process, near shape"] = firsts_us(folder, unknown, "near shape", processes)
        with TuningDB.open(DEVICE.key, folder / "own") as database:
            remember(GEMM, DEVICE, database)
        shipped = folder / "shipped"
        ship(folder, shipped)
        for label, problem in (("exact", known), ("near shape", unknown)):
            reason = f"{label}, shipped"
            times[f"first of a process, {reason}"] = firsts_us(folder / "own", problem, label, processes, shipped)
        with TuningDB.open(DEVICE.key, folder, read_only=True) as database:
            times["open file, exact"] = rounds_us(lambda: answer(GEMM, known, DEVICE, database), 2, 101)
            times["open file, near shape"] = rounds_us(lambda: answer(GEMM, unknown, DEVICE, database), 2, 101)
        times["prediction"] = rounds_us(lambda: predicted_best(GEMM, unknown, DEVICE, 1), 1, 5)
    finish(
        f"lookup, {records} records of {len(problems)} problems: medians",
        "µs",
        [(label, statistics.median(rounds)) for label, rounds in times.items()],
        json_file,
        beside={"least": {label: min(rounds) for label, rounds in times.items()}, "bar": BARS_US},
    )


if __name__ == "__main__":
    main()

"""What it costs to find a configuration: in a cold file, in an open one, by prediction, and in the warm dict.

    python -m benchmarks.cache_lookup [--records 20000] [--json FILE]

A database with the given number of measured records, of as many problems as fit 100 configurations each, is made in a
temporary folder. Then, on the processor alone:

- cold file: open the device's file and ask for an exact problem, on a new connection each time;
- open file: ask again on the same connection;
- near shape: ask for a problem that is not on record;
- prediction: choose a configuration with no database at all, which ranks the whole space;
- warm dict: what a call pays whose problem was seen before.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.measuring import Row, finish, median_us
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.dispatch import plan_for
from tilewright.kernels.lookup import answer, predicted_best, record_key
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuning_db.record import Environment, Provenance, Record, Resources, Status, Times
from tilewright.tuning_db.store import TuningDB

CONFIGS_PER_PROBLEM = 100
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


@click.command()
@click.option("--records", default=20_000, show_default=True, help="Records in the database.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write figures.")
def main(records: int, json_file: Path | None) -> None:
    """Measures the lookup of a configuration."""
    with tempfile.TemporaryDirectory(prefix="cache-lookup-") as name:
        folder = Path(name)
        problems = fill(folder, records)
        known = problems[len(problems) // 2]
        unknown = replace(known, M=known.M + 8)

        def cold() -> Any:
            with TuningDB.open(DEVICE.key, folder, read_only=True) as database:
                return answer(GEMM, known, DEVICE, database)

        first = time.perf_counter()
        cold()
        first_us = (time.perf_counter() - first) * 1e6
        rows: list[Row] = [("cold file, first of the process", first_us)]
        with TuningDB.open(DEVICE.key, folder, read_only=True) as database:
            measured: list[tuple[str, Callable[[], Any], int]] = [
                ("cold file", cold, 50),
                ("open file, exact", lambda: answer(GEMM, known, DEVICE, database), 200),
                ("open file, near shape", lambda: answer(GEMM, unknown, DEVICE, database), 20),
                ("prediction", lambda: predicted_best(GEMM, unknown, DEVICE, 1), 5),
                # The interpreter's plan: it costs nothing to make, and the dict is the same.
                ("warm dict", lambda: plan_for(GEMM, known, -1), 20_000),
            ]
            rows += [(label, median_us(call, repeats)) for label, call, repeats in measured]
    finish(f"lookup, {records} records of {len(problems)} problems", "µs", rows, json_file)


if __name__ == "__main__":
    main()

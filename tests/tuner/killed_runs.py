"""Runs of `autotune` that get SIGKILL, and are started again until one ends; on simulated GPUs.

    python -m tests.tuner.killed_runs FOLDER WORKERS TRIALS POINT [POINT …]

A point is where the first run is killed: `before add 3` and `after add 3` (of the database, in the run itself), `begin
compile 3`, `end measure 3` (in a worker's task, over all workers), `every add` (each run after its first new record),
or `0.25 s` (after it began). `never` is not at all. With 0 workers the board is absent, and a trial is a compilation.
Prints one JSON line per point, for a test to judge: how each run ended, the `winner` of the last, how many `trials`
each configuration took in all runs together, and which are `recorded`. Runs are forked from a process that has imported
everything.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna  # noqa: F401

from tests.tuner.simulated_worker import Scenario, read_journal
from tests.tuner.simulation import BOARD, PROBLEM, simulated
from tilewright.tuner.tune import autotune
from tilewright.tuning_db.record import Record
from tilewright.tuning_db.store import TuningDB

JOBS = 2


def die_at(point: str) -> tuple[str, str, int] | None:
    """Arranges that this process dies at the point, or returns what tells a worker to see to it."""
    if match := re.fullmatch(r"(begin|end) (compile|measure) (\d+)", point):
        return match[2], match[1], int(match[3])
    if match := re.fullmatch(r"([\d.]+) s", point):
        threading.Timer(float(match[1]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        return None
    match = re.fullmatch(r"(before|after) add (\d+)", point)
    assert match, point
    add, calls = TuningDB.add_many, Counter[str]()

    def fatal(self: TuningDB, records: Iterable[Record], run_id: int, notes: Mapping[str, str]) -> None:
        records = list(records)
        calls["add"] += bool(records)
        if records and match[1] == "before" and calls["add"] == int(match[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, records, run_id, notes)
        if records and match[1] == "after" and calls["add"] == int(match[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    TuningDB.add_many = fatal  # type: ignore[method-assign]
    return None


def run(folder: Path, number: int, workers: int, trials: int, point: str) -> int:
    """One run in a child; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            kill_at = die_at(point) if point else None
            compiling = Scenario(str(folder / f"compiling-{number}"), kill_at=kill_at)
            measuring = Scenario(str(folder / f"measuring-{number}"), kill_at=kill_at)
            with simulated(compiling, measuring, folder):
                board = BOARD if workers else replace(BOARD, live="")
                results = autotune(
                    board, problems=[PROBLEM], trials=trials, jobs=JOBS, workers=max(1, workers), db=folder / "db"
                )
            (folder / "winner").write_text(json.dumps(results.results[0].config))
        except BaseException as error:  # noqa: BLE001 - a child never returns into the parent's code
            os.write(2, f"{point or 'last'}: {error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def try_point(folder: Path, workers: int, trials: int, point: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    codes = []
    if point == "every add":
        while (code := run(folder, len(codes), workers, trials, "after add 1")) == -signal.SIGKILL:
            codes.append(code)
        codes.append(code)
    elif point != "never":
        codes.append(run(folder, 0, workers, trials, point))
    codes.append(run(folder, len(codes), workers, trials, ""))
    trial = "measuring" if workers else "compiling"
    notes = [each for file in sorted(folder.glob(f"{trial}-*")) for each in read_journal(file)]
    begun = [each["config"] for each in notes if each["moment"] == "begin" and each["config"]]
    with TuningDB.open(BOARD.key, folder / "db") as database:
        recorded = sorted(record.config for record in database.find())
        path = database.path
    with closing(sqlite3.connect(path)) as connection:
        integrity = connection.execute("PRAGMA integrity_check").fetchone()[0]
    return {
        "point": point,
        "codes": codes,
        "winner": json.loads((folder / "winner").read_text()),
        "trials": Counter(json.dumps(config, sort_keys=True, separators=(",", ":")) for config in begun),
        "recorded": recorded,
        "integrity": integrity,
    }


def main(folder: str, workers: str, trials: str, *points: str) -> None:
    for number, point in enumerate(points):
        print(json.dumps(try_point(Path(folder) / str(number), int(workers), int(trials), point)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Processes that meet at a fresh file, each adding records, some killed at random moments.

    python tests/tuning_db/cold_starts.py FOLDER [PROCESSES=16] [ROUNDS=5] [SEED=0]
    nice python tests/tuning_db/cold_starts.py $(mktemp -d) 32 100 | tail -n 1

In each round PROCESSES open the same missing file at once, start a run and add records one by one, each noting in a
journal what `add` has returned from. A third of them go on until they get SIGKILL: half of those while the file is
being made, half when the journal has reached a random length, however fast the machine is. Prints one JSON line per
round, for a test or a reader to judge: `lost` is what the journal has and the file has not. A last line sums up; the
exit status is 1 if a process raised anything, a record was lost, or a file is not whole. The processes are forked from
one that has imported everything and opened nothing: what is tried is the file, not Python's start.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import filelock  # noqa: F401
import sqlite_utils  # noqa: F401

from tilewright.tuning_db import Environment, Key, Provenance, Record, Resources, Status, Times, TuningDB

DEVICE = "a10-72sm"
RECORDS = 10
PATIENCE_S = 60.0  # with a journal that doesn't grow
PAUSE_S = 0.002  # between records, so that the processes overlap
ENVIRONMENT = Environment("0", "3.9.0", "13.0", "3.12", "lab", "graph-1")
KEY = Key("gemm", "hash", "{}", DEVICE, 86, "3.9.0", "13.0", "graph-1")


def work(folder: Path, journal: int, name: str, *, endless: bool) -> None:
    with TuningDB.open(DEVICE, folder) as db:
        if db.set_aside:
            raise RuntimeError(f"set aside {db.set_aside}")
        run_id = db.start_run(ENVIRONMENT)
        for i in itertools.count() if endless else range(RECORDS):
            config = f"{name}-{i}"
            db.add(
                Record(KEY, config, Status.OK, Provenance.MEASURED, Times.single(1.0), Resources(32, 0, 0, 0)), run_id
            )
            os.write(journal, f"{config}\n".encode())  # one write to an O_APPEND file: whole or not there
            time.sleep(PAUSE_S)


def run_round(folder: Path, processes: int, chance: random.Random) -> dict[str, Any]:
    folder.mkdir(parents=True)
    journal = os.open(folder / "journal", os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    doomed = chance.sample(range(processes), processes // 3)
    early = sorted((chance.uniform(0, 0.06), at) for at in doomed[::2])
    # The others alone reach this length, so the wait for it ends.
    late = sorted((chance.randrange(1, (processes - len(doomed)) * RECORDS), at) for at in doomed[1::2])
    began = time.monotonic()
    pids = []
    for at in range(processes):
        pid = os.fork()
        if pid == 0:
            try:
                work(folder, journal, f"{at}", endless=at in doomed)
            except BaseException as error:  # noqa: BLE001 - a child never returns into the parent's code
                os.write(2, f"{at}: {error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        pids.append(pid)
    for delay, at in early:
        time.sleep(max(0.0, began + delay - time.monotonic()))
        os.kill(pids[at], signal.SIGKILL)
    for length, at in late:
        while (folder / "journal").read_bytes().count(b"\n") < length and time.monotonic() < began + PATIENCE_S:
            time.sleep(0.001)
        os.kill(pids[at], signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.close(journal)
    with TuningDB.open(DEVICE, folder) as db:
        kept = {record.config for record in db.records(KEY)}
        path = db.path
    with closing(sqlite3.connect(path)) as connection:
        integrity = connection.execute("PRAGMA integrity_check").fetchone()[0]
    finished = set((folder / "journal").read_text().split())
    return {
        "codes": codes,
        "finished": len(finished),
        "lost": sorted(finished - kept),
        "integrity": integrity,
        "strangers": sorted(p.name for p in folder.iterdir() if "corrupt" in p.name or "damaged" in p.name),
        "seconds": round(time.monotonic() - began, 2),
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, int | float]:
    """Of all rounds together."""
    codes = [code for each in rounds for code in each["codes"]]
    return {
        "rounds": len(rounds),
        "processes": len(codes),
        "killed": codes.count(-signal.SIGKILL),
        "failed": sum(code not in (0, -signal.SIGKILL) for code in codes),
        "finished": sum(each["finished"] for each in rounds),  # records
        "lost": sum(len(each["lost"]) for each in rounds),
        "damaged": sum(each["integrity"] != "ok" or bool(each["strangers"]) for each in rounds),
        "seconds": round(sum(each["seconds"] for each in rounds), 1),
    }


def main(folder: str, processes: str = "16", rounds: str = "5", seed: str = "0") -> None:
    chance = random.Random(int(seed))
    done = []
    for number in range(int(rounds)):
        done.append(run_round(Path(folder) / str(number), int(processes), chance))
        print(json.dumps(done[-1]), flush=True)
    total = summary(done)
    print(json.dumps(total), flush=True)
    if total["failed"] or total["lost"] or total["damaged"]:
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])

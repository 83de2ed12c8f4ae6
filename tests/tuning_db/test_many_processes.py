from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tuning_db import cold_starts
from tilewright.tuning_db import Key, TuningDB

PROCESSES, ROUNDS, RECORDS = 16, 5, 10


def test_cold_starts_at_one_fresh_file(tmp_path: Path) -> None:
    script = Path(__file__).with_name("cold_starts.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "rounds"), str(PROCESSES), str(ROUNDS)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""  # where a process says what it raised
    *rounds, total = (json.loads(line) for line in done.stdout.splitlines())
    assert len(rounds) == ROUNDS
    for round_ in rounds:
        assert set(round_["codes"]) <= {0, -signal.SIGKILL}
        assert round_["lost"] == []
        assert round_["integrity"] == "ok"
        assert round_["strangers"] == []
        assert round_["finished"] >= round_["codes"].count(0) * RECORDS
    killed = sum(round_["codes"].count(-signal.SIGKILL) for round_ in rounds)
    finished = sum(round_["finished"] for round_ in rounds)
    assert killed == PROCESSES // 3 * ROUNDS
    assert total.pop("seconds") > 0
    assert total == {
        "rounds": ROUNDS,
        "processes": PROCESSES * ROUNDS,
        "killed": killed,
        "failed": 0,
        "finished": finished,
        "lost": 0,
        "damaged": 0,
    }
    assert finished > (PROCESSES * ROUNDS - killed) * RECORDS, "no process was killed between two records"


def test_what_goes_wrong_at_cold_starts_is_counted() -> None:
    whole = {"codes": [0, -9], "finished": 12, "lost": [], "integrity": "ok", "strangers": [], "seconds": 1.0}
    bad = {"codes": [0, 1], "lost": ["3-4"], "integrity": "row 7 missing"}
    total = cold_starts.summary([whole, {**whole, **bad}, {**whole, "strangers": ["a.sqlite.corrupt-1"]}])
    assert (total["processes"], total["killed"], total["failed"], total["lost"], total["damaged"]) == (6, 2, 1, 1, 2)


WRITER = """
import sys, time
from pathlib import Path
from tilewright.tuning_db import *
key = Key("gemm", "hash", "{}", "a10-72sm", 86, "3.9.0", "13.0", "graph-1")
with TuningDB.open("a10-72sm", Path(sys.argv[1])) as db:
    run_id = db.start_run(Environment("0", "3.9.0", "13.0", "3.12", "lab", "graph-1"))
    i = 0
    while True:
        record = Record(key, str(i), Status.OK, Provenance.MEASURED, Times.single(1.0), Resources(32, 0, 0, 0))
        db.add(record, run_id)
        print(i, flush=True)
        i += 1
"""


@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_what_add_returned_from_survives_the_signal(tmp_path: Path, signal_: signal.Signals) -> None:
    output = tmp_path / "said"
    with (
        output.open("w") as stdout,
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=stdout, stderr=subprocess.PIPE, text=True
        ) as writer,
    ):
        while output.read_bytes().count(b"\n") < 50 and writer.poll() is None:
            time.sleep(0.005)
        writer.send_signal(signal_)
        error = writer.communicate(timeout=30)[1]
    said = output.read_bytes().count(b"\n")
    assert said >= 50
    if signal_ is signal.SIGINT:
        assert error.splitlines()[-1] == "KeyboardInterrupt"
        assert "ignored" not in error
    key = Key("gemm", "hash", "{}", "a10-72sm", 86, "3.9.0", "13.0", "graph-1")
    with TuningDB.open("a10-72sm", tmp_path) as db:
        assert db.set_aside is None
        assert len(db.records(key)) in (said, said + 1)  # one may be committed and not yet said
        assert db._file.rows("PRAGMA integrity_check")[0][0] == "ok"

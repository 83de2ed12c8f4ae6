"""Makes a file of a schema, as the Tilewright of its time did: `python make.py s0001_runs_and_records`.

The file is made by the released steps up to that one, and its rows by plain SQL. It is made once, when a further step
is added, and kept: `STEP.sqlite`, and `STEP.jsonl`, its export, which tells what must be in it for ever.
"""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from tilewright.tuning_db import schema
from tilewright.tuning_db.interchange import export
from tilewright.tuning_db.record import Key, canonical_json
from tilewright.tuning_db.snapshot import open_snapshot

DEVICE = "rtx3090-82sm"
MEASURED = {"median_us": 12.5, "p10_us": 12.0, "p90_us": 13.25, "samples": 40}
PREDICTED = {"median_us": 11.0, "p10_us": 11.0, "p90_us": 11.0, "samples": 1}
SPILLING = {"registers": 255, "spill_bytes": 8, "stack_bytes": 8, "shared_bytes": 98304}
RESOURCES = {"registers": 128, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 49152}
ROWS = [
    # run, op, M, tile, status, provenance, message, times, resources, predicted_us
    (1, "gemm", 4096, 128, "ok", "measured", "", MEASURED, RESOURCES, 11.0),
    (1, "gemm", 4096, 64, "ok", "measured", "", {**MEASURED, "median_us": 12.25}, RESOURCES, 10.5),
    (
        1,
        "gemm",
        4096,
        256,
        "out_of_resources",
        "measured",
        "8 B a thread spill",
        {},
        {**RESOURCES, "spill_bytes": 8},
        None,
    ),
    (2, "gemm", 4096, 32, "ok", "predicted", "", PREDICTED, RESOURCES, 11.0),
    (2, "gemm", 17, 16, "compile_error", "predicted", "ptxas: “no µ-op”", {}, {}, None),
    (2, "conv2d", 17, 16, "timeout", "measured", "no answer in 30 s: killed", {}, {}, None),
]


def make(step: str, path: Path) -> None:
    names = [each.__name__ for each in schema.STEPS]
    every = schema.STEPS
    schema.STEPS = every[: names.index(step) + 1]
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            schema.migrate(connection)
            for run, host in ((1, "lab"), (2, "laptop")):
                _insert(
                    connection,
                    "runs",
                    {"id": run, "tilewright": "0.1.0", "triton": "3.9.0", "ptxas": "12.9.86", "python": "3.12.3"}
                    | {"host": host, "protocol": "cold-l2-1", "driver": "580.65", "cuda": "13.0"}
                    | {"extra": '{"sm_clock_mhz":1695}', "started_at": f"2026-01-0{run}T12:00:00.000000+00:00"},
                )
            for second, (run, op, m, tile, status, provenance, message, times, resources, predicted) in enumerate(ROWS):
                problem = canonical_json({"M": m, "N": 4096, "dtype": "fp16", "bias": None})
                protocol = "cold-l2-1" if provenance == "measured" else "roofline-2-0123abcd"
                key = Key(op, f"{op}-revision", problem, DEVICE, 86, "3.9.0", "12.9.86", protocol)
                _insert(
                    connection,
                    "records",
                    {"run_id": run, "key_digest": key.digest(), "op": op, "kernel_hash": key.kernel_hash}
                    | {"problem": problem, "device": DEVICE, "arch": 86, "triton": "3.9.0", "ptxas": "12.9.86"}
                    | {"protocol": protocol, "config": canonical_json({"BLOCK_M": tile}), "status": status}
                    | {"provenance": provenance, "message": message, **times, **resources, "predicted_us": predicted}
                    | {"created_at": f"2026-01-0{run}T12:00:0{second}.000000+00:00"},
                )
    finally:
        schema.STEPS = every


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    names = ", ".join(row)
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join(f':{name}' for name in row)})", row)


if __name__ == "__main__":
    database = Path(__file__).with_name(f"{sys.argv[1]}.sqlite")
    database.unlink(missing_ok=True)
    make(sys.argv[1], database)
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(database, folder)  # reading leaves SQLite's side files
        with open_snapshot(Path(copy)) as file, database.with_suffix(".jsonl").open("wb") as stream:
            export(file, DEVICE, stream)

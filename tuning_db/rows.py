"""Records and environments as rows of their tables, and back."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Mapping
from typing import Any

from tilewright.tuning_db.record import Environment, Key, Provenance, Record, Resources, Status, Times, canonical_json

Row = Mapping[str, Any] | sqlite3.Row

KEY = ("op", "kernel_hash", "problem", "device", "arch", "triton", "ptxas", "protocol")
TIMES = ("median_us", "p10_us", "p90_us", "samples")
RESOURCES = ("registers", "spill_bytes", "stack_bytes", "shared_bytes")
ENVIRONMENT = ("tilewright", "triton", "ptxas", "python", "host", "protocol", "driver", "cuda")


def record_to_row(record: Record, run_id: int, created_at: str) -> dict[str, Any]:
    """The row of `records`, without its id; `created_at` stands in where the record has none.

    Raises:
        ValueError: a time that is not finite. SQLite would store NaN as NULL, and the record would not come back.
    """
    times = {name: getattr(record.times, name, None) for name in TIMES}
    for name, value in {**times, "predicted_us": record.predicted_us}.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"a record's times are finite, but {name}={value}")
    return {
        "run_id": run_id,
        "key_digest": record.key.digest(),
        **{name: getattr(record.key, name) for name in KEY},
        "config": record.config,
        "status": str(record.status),
        "provenance": str(record.provenance),
        # A compiler's output may hold bytes that were no text; half a surrogate pair can't be stored.
        "message": record.message.encode("utf-8", "replace").decode(),
        **times,
        **{name: getattr(record.resources, name, None) for name in RESOURCES},
        "predicted_us": record.predicted_us,
        "created_at": record.created_at or created_at,
    }


def row_to_record(row: Row) -> Record:
    """The record of a row of `records`.

    Raises:
        ValueError: the row is none that `record_to_row` makes: someone edited it.
    """
    return Record(
        key=Key(**{name: row[name] for name in KEY}),
        config=row["config"],
        status=Status(row["status"]),
        provenance=Provenance(row["provenance"]),
        times=None if row["median_us"] is None else Times(**{name: row[name] for name in TIMES}),
        resources=None if row["registers"] is None else Resources(**{name: row[name] for name in RESOURCES}),
        message=row["message"],
        predicted_us=row["predicted_us"],
        created_at=row["created_at"],
    )


def insertion(table: str, row: Row, *, replace: bool = True) -> str:
    """The statement that puts such a row into a table, in place of one that a unique index has already; or fails."""
    names = row.keys()
    values = ", ".join(f":{name}" for name in names)
    return f"INSERT {'OR REPLACE ' if replace else ''}INTO {table} ({', '.join(names)}) VALUES ({values})"


def environment_to_row(environment: Environment, started_at: str) -> dict[str, Any]:
    """The row of `runs`, without its id."""
    fields = {name: getattr(environment, name) for name in ENVIRONMENT}
    return {**fields, "extra": canonical_json(environment.extra), "started_at": started_at}


def row_to_environment(row: Row) -> Environment:
    """The environment of a row of `runs`."""
    return Environment(**{name: row[name] for name in ENVIRONMENT}, extra=json.loads(row["extra"]))

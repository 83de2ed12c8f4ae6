"""Records and environments as rows of their tables, and back."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from tilewright.tuning_db.errors import DatabaseCorruptError
from tilewright.tuning_db.record import (
    Environment,
    Key,
    Provenance,
    Record,
    Resources,
    Status,
    Times,
    canonical_json,
    read_json,
)
from tilewright.tuning_db.text import shown

Row = Mapping[str, Any] | sqlite3.Row

KEY = ("op", "kernel_hash", "problem", "device", "arch", "triton", "ptxas", "protocol")
TIMES = ("median_us", "p10_us", "p90_us", "samples")
RESOURCES = ("registers", "spill_bytes", "stack_bytes", "shared_bytes")
M = TypeVar("M", bound=StrEnum)

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


_TEXTS = (*(name for name in KEY if name != "arch"), "config", "status", "provenance", "message", "created_at")
_GROUPS = (dict.fromkeys(TIMES, float) | {"samples": int}, dict.fromkeys(RESOURCES, int))


def row_to_record(row: Row) -> Record:
    """The record of a row of `records`.

    Raises:
        ValueError: the row is not one that `record_to_row` makes: someone edited it, or the disk did.
    """
    for name in _TEXTS:
        if type(row[name]) is not str:
            raise ValueError(f"{name}={shown(row[name])} is no text")
    if type(row["arch"]) is not int:
        raise ValueError(f"arch={shown(row['arch'])} is no integer")
    for group in _GROUPS:
        values = [row[name] for name in group]
        if values.count(None) < len(values):
            for value, (name, kind) in zip(values, group.items(), strict=True):
                if type(value) is not kind and type(value) is not int:
                    raise ValueError(f"{name}={shown(value)} is no {'integer' if kind is int else 'number'}")
    predicted_us = row["predicted_us"]
    if not (predicted_us is None or (type(predicted_us) in (int, float) and math.isfinite(predicted_us))):
        raise ValueError(f"predicted_us={shown(predicted_us)} is no finite number")
    return Record(
        key=Key(**{name: row[name] for name in KEY}),
        config=row["config"],
        status=member_of(Status, row["status"]),
        provenance=member_of(Provenance, row["provenance"]),
        times=None if row["median_us"] is None else Times(**{name: row[name] for name in TIMES}),
        resources=None if row["registers"] is None else Resources(**{name: row[name] for name in RESOURCES}),
        message=row["message"],
        predicted_us=row["predicted_us"],
        created_at=row["created_at"],
    )


def member_of(kind: type[M], word: str) -> M:
    """The member of that kind that a word stands for.

    Raises:
        ValueError: there is none; the message has the word, or the beginning of it.
    """
    try:
        return kind(word)
    except ValueError:
        raise ValueError(f"{kind.__name__.lower()}={shown(word)} is none there is") from None


def record_of(path: Path, row: Row) -> Record:
    """As `row_to_record`, of a row of the file at `path`.

    Raises:
        DatabaseCorruptError: it is no record.
    """
    try:
        return row_to_record(row)
    except ValueError as error:
        raise no_record(path, row, error) from error


def no_record(path: Path, row: Row, error: Exception) -> DatabaseCorruptError:
    """What to say of a row that is no record."""
    return DatabaseCorruptError(f"{path}: record {row['id']} is no record ({error}): delete that row")


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
    """The environment of a row of `runs`.

    Raises:
        ValueError: the row is not one that `environment_to_row` makes.
    """
    fields = {name: row[name] for name in ENVIRONMENT}
    for name, value in fields.items():
        if type(value) is not str:
            raise ValueError(f"{name}={shown(value)} is no text")
    try:
        extra = read_json(row["extra"])
    except TypeError:
        extra = None
    if not isinstance(extra, dict):
        raise ValueError(f"extra={shown(row['extra'])} is no JSON object")
    return Environment(**fields, extra=extra)

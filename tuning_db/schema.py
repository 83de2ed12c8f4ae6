"""The tables of a tuning database, as the steps that make them, and how a file's schema is recognised.

    runs      where and with what a run was made
    records   every outcome: one row per (key, configuration, provenance)
    shapes    every problem that was measured, split into class and sizes: see `tilewright.tuning_db.shapes`
    identities  hashes and versions that are slow to work out, by a stamp of the files they come from
    best      view: the best record of each key, for people with a SQLite tool

The steps are applied with `sqlite_utils.Migrations`, whose table `_sqlite_migrations` in the file names each step and
when it was applied. That table is the one truth about a file's schema: every step there and no other is the current
schema, a name this version doesn't know is a newer one. It is read here with plain SQL and sqlite_utils is imported
only to apply a step, because that import (0.15-0.3 s) takes a hundred times as long as a whole lookup.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.tuning_db import shapes
from tilewright.tuning_db.errors import DatabaseSchemaError

if TYPE_CHECKING:
    from sqlite_utils import Database

MIGRATION_SET = "tilewright"

_ANOTHER = "name another file, or another folder of databases with --db"

ANSWERABLE = "status = 'ok' AND spill_bytes = 0"
"""What a record must be to be answered. Queries repeat this text for SQLite to see that the partial indexes apply."""


def s0001_runs_and_records(db: Database) -> None:
    """The first schema."""
    db.table("runs").create(
        {
            "id": int,
            "tilewright": str,
            "triton": str,
            "ptxas": str,
            "python": str,
            "host": str,
            "protocol": str,
            "driver": str,
            "cuda": str,
            "extra": str,  # JSON
            "started_at": str,  # ISO 8601, UTC
        },
        pk="id",
        not_null={"tilewright", "triton", "ptxas", "python", "host", "protocol", "started_at"},
    )
    records = db.table("records").create(
        {
            "id": int,
            "run_id": int,
            "key_digest": str,
            "op": str,
            "kernel_hash": str,
            "problem": str,  # JSON
            "device": str,
            "arch": int,
            "triton": str,
            "ptxas": str,
            "protocol": str,
            "config": str,  # JSON
            "status": str,
            "provenance": str,
            "message": str,
            "median_us": float,
            "p10_us": float,
            "p90_us": float,
            "samples": int,
            "registers": int,
            "spill_bytes": int,
            "stack_bytes": int,
            "shared_bytes": int,
            "predicted_us": float,
            "created_at": str,  # ISO 8601, UTC
        },
        pk="id",
        foreign_keys=[("run_id", "runs", "id")],
        not_null={
            *("run_id", "key_digest", "op", "kernel_hash", "problem", "device", "arch", "triton", "ptxas", "protocol"),
            *("config", "status", "provenance", "message", "created_at"),
        },
    )
    records.create_index(["key_digest", "config", "provenance"], "one_outcome", unique=True)
    # Both indexes leave failures out: they are most of a search's records and never an answer.
    db.execute(
        "CREATE INDEX best_first ON records (key_digest, provenance, median_us) WHERE status = 'ok' AND spill_bytes = 0"
    )
    # No device column: the file is the device.
    db.execute(
        "CREATE INDEX measured_problems ON records (op, arch, problem, key_digest) "
        "WHERE status = 'ok' AND spill_bytes = 0 AND provenance = 'measured'"
    )
    db.create_view(
        "best",
        """
        SELECT * FROM records WHERE id IN (
            SELECT first_value(id) OVER (PARTITION BY key_digest ORDER BY provenance = 'predicted', median_us, id)
            FROM records WHERE status = 'ok' AND spill_bytes = 0
        )
        """,
    )


def s0002_shapes_and_identities(db: Database) -> None:
    """The nearest problems by an index, and a first lookup that needn't parse every kernel."""
    db.table("shapes").create(
        {
            "id": int,
            "op": str,
            "arch": int,
            "class": str,  # NULL until `shapes.place` has seen the row
            "volume": float,  # sum of the log2 of the sizes
            **{f"size{place}": int for place in range(16)},
            "problem": str,  # JSON
        },
        pk="id",
        not_null={"op", "arch", "problem"},
    )
    db.execute("CREATE UNIQUE INDEX one_shape ON shapes (op, arch, problem)")
    # Near problems are of about one volume; and here is all that a query for them reads, so that it touches no row.
    sizes = ", ".join(f"size{place}" for place in range(16))
    db.execute(f"CREATE INDEX shapes_of_a_class ON shapes (op, arch, class, volume, {sizes})")
    db.execute("CREATE INDEX unplaced ON shapes (id) WHERE class IS NULL")
    # A row comes with the first record that can be answered and goes with the last, whatever wrote or deleted it. (OR
    # IGNORE won't do: in a trigger the OR REPLACE of the statement that fired it holds instead.)
    answerable = "status = 'ok' AND spill_bytes = 0 AND provenance = 'measured'"
    db.execute(
        """
        CREATE TRIGGER shape_of_a_record AFTER INSERT ON records
        WHEN NEW.status = 'ok' AND NEW.spill_bytes = 0 AND NEW.provenance = 'measured' AND NOT EXISTS (
            SELECT 1 FROM shapes WHERE op = NEW.op AND arch = NEW.arch AND problem = NEW.problem
        )
        BEGIN
            INSERT INTO shapes (op, arch, problem) VALUES (NEW.op, NEW.arch, NEW.problem);
        END
        """
    )
    db.execute(
        f"""
        CREATE TRIGGER shape_without_records AFTER DELETE ON records
        BEGIN
            DELETE FROM shapes WHERE op = OLD.op AND arch = OLD.arch AND problem = OLD.problem AND NOT EXISTS (
                SELECT 1 FROM records
                WHERE {answerable} AND op = OLD.op AND arch = OLD.arch AND problem = OLD.problem
            );
        END
        """
    )
    db.execute(
        f"INSERT INTO shapes (op, arch, problem) SELECT DISTINCT op, arch, problem FROM records WHERE {answerable}"
    )
    shapes.place(db.conn)
    db.table("identities").create({"stamp": str, "value": str}, pk="stamp", not_null={"value"})


STEPS: tuple[Callable[[Database], None], ...] = (s0001_runs_and_records, s0002_shapes_and_identities)
"""Every step in order. A released step is never edited: files were made by it."""


def is_current(connection: sqlite3.Connection, path: Path) -> bool:
    """Whether every step has been applied; False where `migrate` has work to do.

    Raises:
        DatabaseSchemaError: a newer Tilewright wrote the file, or something other than Tilewright did.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    applied: set[str] = set()
    if "_sqlite_migrations" in tables:
        query = "SELECT name FROM _sqlite_migrations WHERE migration_set = ?"
        applied = {name for (name,) in connection.execute(query, (MIGRATION_SET,))}
    if tables - {"_sqlite_migrations"} and not applied:
        raise DatabaseSchemaError(f"{path} is a SQLite database, but not Tilewright's: {_ANOTHER}")
    known = {step.__name__ for step in STEPS}
    if newer := sorted(applied - known):
        raise DatabaseSchemaError(
            f"{path} was written by a newer Tilewright (schema {newer[-1]}): upgrade tilewright, or {_ANOTHER}"
        )
    return applied == known


def migrate(connection: sqlite3.Connection) -> None:
    """Apply the steps that are missing, all of them or none.

    The caller holds the file's initialisation lock. The transaction is immediate because a deferred one that reads
    before it writes fails at once, whatever the busy timeout, when another connection has written in between.
    """
    from sqlite_utils import Database, Migrations

    migrations = Migrations(MIGRATION_SET)
    for step in STEPS:
        migrations()(step)
    connection.execute("BEGIN IMMEDIATE")
    try:
        migrations.apply(Database(connection, recursive_triggers=False, execute_plugins=False))
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise

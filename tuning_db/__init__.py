"""The tuning database: one SQLite file per device, with a record of every configuration that was ever tried on it.

Imports nothing heavy: opening a current file and asking it for an answer costs the standard library alone.
"""

from __future__ import annotations

from tilewright.tuning_db.env import database_dir
from tilewright.tuning_db.errors import (
    DatabaseAccessError,
    DatabaseCorruptError,
    DatabaseError,
    DatabaseSchemaError,
    ExportFileError,
    NotPackedError,
    PackError,
    StorageError,
    TilewrightError,
    UsageError,
)
from tilewright.tuning_db.record import (
    Answer,
    Environment,
    Key,
    Provenance,
    Record,
    Resources,
    Status,
    Times,
    canonical_json,
)
from tilewright.tuning_db.shapes import Near
from tilewright.tuning_db.store import Accept, TuningDB

__all__ = [
    "TuningDB",
    "Record",
    "Key",
    "Status",
    "Provenance",
    "Times",
    "Resources",
    "Environment",
    "Answer",
    "Near",
    "Accept",
    "canonical_json",
    "database_dir",
    "TilewrightError",
    "UsageError",
    "DatabaseError",
    "DatabaseCorruptError",
    "DatabaseSchemaError",
    "DatabaseAccessError",
    "StorageError",
    "ExportFileError",
    "PackError",
    "NotPackedError",
]

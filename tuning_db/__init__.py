"""The tuning database: one SQLite file per device, with a record of every configuration that was ever tried on it.

Imports nothing heavy: opening a current file and asking it for an answer costs the standard library alone. The names
are imported when they are asked for: an error alone needs no database.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "database_dir": "env",
    **dict.fromkeys(
        ("Record", "Key", "Status", "Provenance", "Times", "Resources", "Environment", "Answer", "canonical_json"),
        "record",
    ),
    "Near": "shapes",
    **dict.fromkeys(("TuningDB", "Accept"), "store"),
    **{name: "errors" for name in __all__ if name.endswith("Error")},
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

"""The environment variables Tilewright reads, all of them, and where results live by default."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from tilewright.tuning_db.errors import UsageError

DB_DIR = "TILEWRIGHT_DB_DIR"
"""Folder of the tuning databases; default: `tilewright` under the platform's user data directory."""

INTERPRET = "TRITON_INTERPRET"
"""Triton's own switch: kernels run on NumPy arrays in its interpreter. Must be set before Triton is imported."""


def database_dir(override: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the tuning databases: `override`, else `$TILEWRIGHT_DB_DIR`, else the user data directory.

    Raises:
        UsageError: an empty name, or one of a user's home that there is not.
    """
    if override is not None and not os.fspath(override):
        raise UsageError("the folder of the databases (--db) is empty: name one, or leave it out")
    chosen = override or os.environ.get(DB_DIR) or platformdirs.user_data_dir("tilewright", appauthor=False)
    try:
        return Path(chosen).expanduser()
    except RuntimeError as error:
        raise UsageError(f"the folder of the databases {os.fspath(chosen)!r} can't be found: {error}") from None


def interpreting() -> bool:
    """Whether this process was told to interpret kernels, by Triton's own reading of the variable."""
    return os.environ.get(INTERPRET, "").lower() in {"1", "true", "on", "y", "yes"}


def compiling_environment() -> dict[str, str]:
    """This process's environment without the interpreter switch, for a process that compiles."""
    return {name: value for name, value in os.environ.items() if name != INTERPRET}

"""Records that come with the package: measurements of boards that its makers had, in `tuning_db/shipped`.

A file of each such board, in the format and under the name of a user's own database, which is why nothing need be
brought anywhere: a lookup asks it behind the user's own, with the same queries. It is never written to, and may lie in
a folder that can't be. `tilewright.tuning_db.shipping` makes one.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from tilewright.tuning_db.env import SHIPPED, shipped_dir
from tilewright.tuning_db.errors import DatabaseError
from tilewright.tuning_db.file import DatabaseFile, open_file


def shipped_paths() -> list[Path]:
    """The shipped files there are, by name."""
    folder = shipped_dir()
    return [] if folder is None else sorted(folder.glob("*.sqlite"))


def open_shipped(path: Path) -> DatabaseFile:
    """A shipped file, to read; an empty one where it is missing.

    Raises:
        DatabaseError: it can't be read.
    """
    return open_file(path, read_only=True, immutable=True)


def warn_of_unreadable(path: Path, error: DatabaseError) -> None:
    """Says that the records of a shipped file are left out; Python shows one text once in a process."""
    cause = str(error.__cause__ or error).partition("\n")[0]
    warnings.warn(
        f"{path}: the records that were shipped with tilewright can't be read and are left out ({cause}): "
        f"install it again, or set {SHIPPED}=0",
        RuntimeWarning,
        stacklevel=2,
    )

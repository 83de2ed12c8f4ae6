"""The folder that a run writes to: one run's at a time, and nobody's files but those of runs before."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tilewright.tuning_db.errors import UsageError

RESUME = ".resume"
"""What a run that goes on finds here: scales, plans, and the lock."""

_OURS = b"tilewright"  # in every report, readme and model of ours, in one case or another
_TEXTS = (".md", ".json", ".html")


@contextmanager
def output_folder(path: Path, names: Sequence[str], model: Path) -> Iterator[Path]:
    """The folder, made if it isn't there, for as long as the block runs no other run's.

    Args:
        path: of the folder.
        names: of the files that will be written into it.
        model: the file that is read, which none of them may be.

    Raises:
        UsageError: it can't be made or written to, another run writes to it, or one of the files is the model, is a
            folder, or was not written by a run like this one.
    """
    from filelock import FileLock, Timeout

    for name in names:
        _refuse_others(path / name, path, model)
    resume = path / RESUME
    try:
        resume.mkdir(parents=True, exist_ok=True)
        lock = FileLock(resume / "lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"--output {path}: another run writes to it: wait for its end, or name another folder"
        ) from None
    except OSError as error:
        raise UsageError(f"--output {path} can't be written ({_reason(error)}): name a folder that can") from None
    try:
        _sweep(path, names)
        yield path
    finally:
        lock.release()


def _refuse_others(file: Path, folder: Path, model: Path) -> None:
    try:
        if not file.exists():
            return
        if file.is_dir():
            raise UsageError(f"--output {folder}: {file} is a folder, and a file of that name is to be written")
        if model.exists() and file.samefile(model):
            raise UsageError(
                f"--output {folder}: {file} is the model itself, and would be replaced: name another folder"
            )
        if file.suffix in _TEXTS and _OURS not in file.read_bytes().lower():
            raise UsageError(
                f"--output {folder}: its {file.name} was not written by autotune, and would be replaced: name another "
                f"folder"
            )
    except OSError as error:
        raise UsageError(f"--output {folder}: {file} can't be read ({_reason(error)}): name another folder") from None


def _reason(error: OSError) -> str:
    return error.strerror or errno.errorcode.get(error.errno or 0, "unknown reason")


def _sweep(path: Path, names: Sequence[str]) -> None:
    """Removes what killed runs had begun to write: whoever holds the lock writes alone."""
    begun = [each for name in names for each in path.glob(f".{name}.*.part")]
    begun += [each for name in names for each in path.glob(f".{Path(name).stem}.*.data.*.part")]
    for file in (*begun, *(path / RESUME).glob(".*.part")):
        with contextlib.suppress(OSError):
            file.unlink()

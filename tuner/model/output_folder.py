"""The folder that a run writes to: one run's at a time, and nobody's files but those of runs before."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tilewright.tuner.model.write import DATA_FILE
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.record import read_json

RESUME = ".resume"
"""What a run that goes on finds here: scales, plans, the lock, and which files are of runs."""

_NAMES = "files.json"
_NEW = "new"
_CHUNK = 1 << 20  # bytes looked through at a time


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A folder that is a run's own."""

    path: Path
    resume: Path  # in it, for what a run goes on from

    def keep(self, files: Collection[Path], model: Path) -> None:
        """Notes the files that this run has written, and removes data of models that runs before had written here, but
        for what these files are, or the model that was read names.

        Raises:
            UsageError: the note can't be written.
        """
        names = _names(self.resume)
        now = {file.name for file in files}
        old = [name for name in names - now if re.fullmatch(DATA_FILE, name)]
        gone = {name for name in old if not _mentions(model, name)}
        for name in gone:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        _note(self.resume, (names | now) - gone)

    @contextmanager
    def staged(self) -> Iterator[Path]:
        """A folder to write files into that `place` puts in place; it goes when the block ends. What was there before
        is there until then, whatever writing comes to."""
        new = self.resume / _NEW
        try:
            new.mkdir()
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)

    def place(self, files: Sequence[Path], reports: Sequence[Path]) -> None:
        """Puts files that were written in place, those of models before reports: a folder with a report has the models
        that it is of. So reports of runs before go first, and engines of the models among the files.

        Raises:
            OSError, UsageError: one can't be removed or replaced.
        """
        self._retire([file.name for file in reports], [file.name for file in files if file.suffix == ".onnx"])
        # Data before the models that read it.
        for file in (*sorted(files, key=lambda file: file.suffix != ".data"), *reports):
            target = (self.path / file.name).resolve()  # a link stays one
            if target.exists():
                file.chmod(target.stat().st_mode & 0o777)
            try:
                file.replace(target)
            except OSError as error:
                if error.errno != errno.EXDEV:  # where a link leads to another disk
                    raise
                with whole_file(target) as stream, file.open("rb") as source:
                    shutil.copyfileobj(source, stream)

    def _retire(self, reports: Collection[str], models: Collection[str]) -> None:
        for name in _names(self.resume):
            model = name.removesuffix(".json").removesuffix(".engine") + ".onnx"
            if name not in reports and not (".engine" in name and model in models):
                continue
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise UsageError(f"--output {self.path}: {name} can't be removed ({_reason(error)})") from None


def check_output(path: Path, names: Sequence[str], model: Path) -> None:
    """Does nothing for a folder into which files of these names may be written; it need not be there.

    Raises:
        UsageError: one of the files is the model that is read, is a folder, or was not written by a run like this one.
    """
    ours = _names(path / RESUME)
    for name in names:
        file = path / name
        try:
            if not file.exists():
                continue
            if file.is_dir():
                raise UsageError(f"--output {path}: {file} is a folder, and a file of that name is to be written")
            if model.exists() and file.samefile(model):
                raise UsageError(
                    f"--output {path}: {file} is the model itself, and would be replaced: name another folder"
                )
            if name not in ours:
                raise UsageError(
                    f"--output {path}: its {name} was not written by autotune, and would be replaced: name another "
                    f"folder"
                )
        except OSError as error:
            raise UsageError(f"--output {path}: {file} can't be read ({_reason(error)}): name another folder") from None


@contextmanager
def output_folder(path: Path, names: Sequence[str], model: Path) -> Iterator[OutputFolder]:
    """The folder, made if it isn't there, for as long as the block runs no other run's.

    Args:
        path: of the folder.
        names: of the files that will be written into it.
        model: the file that is read, which none of them may be.

    Raises:
        UsageError: it can't be made or written to, another run writes to it, or as `check_output`.
    """
    from filelock import FileLock, Timeout

    resume = path / RESUME
    try:
        check_output(path, names, model)
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
        # Before the first is written: a run that is killed then finds its own files.
        _note(resume, _names(resume) | set(names))
        _sweep(path, names)
        yield OutputFolder(path, resume)
    finally:
        lock.release()


def _names(resume: Path) -> set[str]:
    """The names of files that runs have written; none where there is no note of it."""
    try:
        return set(map(str, read_json((resume / _NAMES).read_text())))
    except (OSError, ValueError, TypeError):
        return set()


def _note(resume: Path, names: Collection[str]) -> None:
    with whole_file(resume / _NAMES) as stream:
        stream.write(json.dumps(sorted(names)).encode() + b"\n")


def _mentions(file: Path, name: str) -> bool:
    """Whether a file has a name in it; true where that can't be told."""
    wanted, before = name.encode(), b""
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                if wanted in before + chunk:
                    return True
                before = chunk[-len(wanted) :]
    except OSError:
        return True
    return False


def _reason(error: OSError) -> str:
    return error.strerror or errno.errorcode.get(error.errno or 0, "unknown reason")


def _sweep(path: Path, names: Sequence[str]) -> None:
    """Removes what killed runs had begun to write: whoever holds the lock writes alone."""
    begun = [each for name in names for each in path.glob(f".{name}.*.part")]
    begun += [each for name in names for each in path.glob(f".{Path(name).stem}.*.data.*.part")]
    shutil.rmtree(path / RESUME / _NEW, ignore_errors=True)
    for file in (*begun, *(path / RESUME).glob(".*.part")):
        with contextlib.suppress(OSError):
            file.unlink()

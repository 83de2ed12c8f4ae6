"""In what order a question is answered: the records that are evidence for it, best evidence first.

| step | evidence                                                                   | provenance  |
|------|----------------------------------------------------------------------------|-------------|
| 1    | measured under this very key                                               | measured    |
| 2    | this problem on this board: other protocol, else toolchain, else revision  | transferred |
| 3    | a near shape on this board                                                 | transferred |
| 4    | another board of the same arch (its own file): this problem, else a near   | transferred |
| 5    | predicted under this very key                                              | predicted   |

Within steps 2-4: smaller distance (see `tilewright.tuning_db.shapes`), then fewer differences in the order revision,
toolchain, protocol, then what was measured here before what was shipped (`tilewright.tuning_db.shipped_records`),
then what was measured last. Records of one key stay together, fastest first, since times of different keys don't
compare. Shipped records of step 1 answer after all of this file's.

The incumbent, which is the default configuration, stays in its place among the outcomes of this very key unless the
fastest beats it beyond noise: `Times.beats`.

Shipped records and steps 2-5 leave out each configuration that has failed, or spilled, on this very problem, board,
revision and toolchain: a guess from elsewhere doesn't outweigh what is known here.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from tilewright.tuning_db.errors import DatabaseCorruptError, DatabaseError
from tilewright.tuning_db.file import DatabaseFile, open_file
from tilewright.tuning_db.record import Answer, Key, Provenance, Record
from tilewright.tuning_db.rows import Row, row_to_record
from tilewright.tuning_db.schema import ANSWERABLE
from tilewright.tuning_db.shapes import Near, nearest
from tilewright.tuning_db.shipped_records import open_shipped, warn_of_unreadable

_FEW = 4

_MEASURED = f"{ANSWERABLE} AND provenance = 'measured' AND op = ?1 AND arch = ?2 AND problem = ?3"

# The last record of each key. GROUP BY would read every record of the problem; this seeks from key to key.
_GROUPS = f"""
    WITH RECURSIVE keys (digest) AS (
        SELECT min(key_digest) FROM records WHERE {_MEASURED}
        UNION ALL
        SELECT (SELECT min(key_digest) FROM records WHERE {_MEASURED} AND key_digest > keys.digest)
        FROM keys WHERE keys.digest IS NOT NULL
    )
    SELECT key_digest, kernel_hash, problem, device, triton, ptxas, protocol, created_at FROM keys
    JOIN records ON id = (SELECT max(id) FROM records WHERE {_MEASURED} AND key_digest = keys.digest)
"""
_BEST_FIRST = (
    f"SELECT * FROM records WHERE {ANSWERABLE} AND key_digest = ? AND provenance = ? ORDER BY median_us, id LIMIT ?"
)
_INCUMBENT = f"SELECT * FROM records WHERE {ANSWERABLE} AND key_digest = ? AND provenance = ? AND config = ?"
_REFUTED = """
    SELECT DISTINCT config FROM records
    WHERE key_digest IN (?, ?) AND (status != 'ok' OR spill_bytes > 0)
"""


@dataclass(frozen=True)
class _Group:
    """The measured records of one key, as evidence for another, or shipped ones for the very same."""

    file: DatabaseFile
    digest: str
    differs: tuple[bool, bool, bool]  # revision, toolchain, protocol
    newest: str
    reason: str
    exact: bool
    shipped: bool


class _Files:
    """The files that a question is put to: the device's own, the shipped one of the device, and those of other boards.
    All but the first are opened when they are asked for; one that can't be read is left out, and noted in `skipped`.

    Args:
        own: of the device, in the user's folder.
        shipped: the folder of the shipped files; None for none.
        skipped: where to note what can't be read, with the reason.
    """

    def __init__(self, own: DatabaseFile, shipped: Path | None, skipped: dict[Path, DatabaseError]) -> None:
        self.own = own
        # Someone may name the folder of the shipped files as that of their own.
        same = shipped is not None and shipped.resolve() == own.path.parent.resolve()
        self._shipped_folder = None if same else shipped
        self._skipped = skipped
        self._opened: list[DatabaseFile] = []
        self._shipped: list[DatabaseFile] = []

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened:
            file.close()

    @cached_property
    def of_device(self) -> list[DatabaseFile]:
        """The device's own file, and the shipped one where there is one."""
        folder = self._shipped_folder
        return [self.own, *([] if folder is None else self._open_shipped([folder / self.own.path.name]))]

    @cached_property
    def of_others(self) -> list[DatabaseFile]:
        """Those of other boards."""
        own, folder = self.own.path, self._shipped_folder
        found = [file for path in sorted(own.parent.glob("*.sqlite")) if path != own for file in self._open(path)]
        if folder is not None:
            found += self._open_shipped(sorted(path for path in folder.glob("*.sqlite") if path.name != own.name))
        return found

    def is_shipped(self, file: DatabaseFile) -> bool:
        """Whether a file is one that came with the package."""
        return file in self._shipped

    @contextmanager
    def noting(self, file: DatabaseFile) -> Iterator[None]:
        """Go on without a file that can't be read, and note why; fail where it is the device's own."""
        try:
            yield
        except DatabaseError as error:
            if file is self.own:
                raise
            self._note(file.path, error, shipped=self.is_shipped(file))

    def _open(self, path: Path, *, shipped: bool = False) -> list[DatabaseFile]:
        try:
            file = open_shipped(path) if shipped else open_file(path, read_only=True)
        except DatabaseError as error:
            self._note(path, error, shipped=shipped)
            return []
        self._opened.append(file)
        return [file]

    def _open_shipped(self, paths: Sequence[Path]) -> list[DatabaseFile]:
        found = [file for path in paths for file in self._open(path, shipped=True)]
        self._shipped += found
        return found

    def _note(self, path: Path, error: DatabaseError, *, shipped: bool) -> None:
        self._skipped[path] = error
        if shipped:
            warn_of_unreadable(path, error)


def answers(
    file: DatabaseFile,
    key: Key,
    predicted_protocol: str,
    near: Near | None,
    skipped: dict[Path, DatabaseError],
    incumbent: str | None = None,
    shipped: Path | None = None,
) -> Generator[Answer, None, None]:
    """Every answer to `key`, best first, read as far as it is consumed.

    `shipped` is the folder of the shipped files. Those, and files of other boards, that can't be read are left out, and
    added to `skipped` with the reason.
    """
    digest = key.digest()
    predicted_digest = replace(key, protocol=predicted_protocol).digest()
    for record in best_first(file, digest, Provenance.MEASURED, incumbent):
        yield Answer(record, Provenance.MEASURED, "exact")
    refuted = {row["config"] for row in file.rows(_REFUTED, (digest, predicted_digest))}
    with _Files(file, shipped, skipped) as files:
        for other in files.of_device[1:]:
            with files.noting(other):
                for record in best_first(other, digest, Provenance.MEASURED, incumbent):
                    if record.config not in refuted:
                        yield Answer(record, Provenance.MEASURED, "exact, shipped")
        for group in _transfers(files, key, near):
            if group.exact:
                continue  # asked before, by its digest: a program waits
            with files.noting(group.file):
                for record in best_first(group.file, group.digest, Provenance.MEASURED):
                    if record.config not in refuted:
                        yield Answer(record, Provenance.TRANSFERRED, group.reason)
    for record in best_first(file, predicted_digest, Provenance.PREDICTED, incumbent):
        if record.config not in refuted:
            yield Answer(record, Provenance.PREDICTED, "exact")


def evidence(
    file: DatabaseFile,
    key: Key,
    near: Near | None,
    skipped: dict[Path, DatabaseError],
    shipped: Path | None = None,
) -> Generator[tuple[str, list[Record]], None, None]:
    """What was measured elsewhere, and by steps 2 to 4 would be asked, in their order: the reason, and all the records
    of one key. Shipped records of `key` itself come first. Read as far as it is consumed."""
    with _Files(file, shipped, skipped) as files:
        for group in _transfers(files, key, near):
            with files.noting(group.file):
                yield group.reason, list(best_first(group.file, group.digest, Provenance.MEASURED))


def best_first(
    file: DatabaseFile, digest: str, provenance: Provenance, incumbent: str | None = None
) -> Iterator[Record]:
    """The answerable records of one key and provenance, fastest first but for the incumbent, no configuration twice.

    The first few are read alone: mostly the first is taken, and there may be thousands.
    """
    seen: set[str] = set()
    for limit in (_FEW, -1):
        rows = file.rows(_BEST_FIRST, (digest, provenance, limit))
        if rows and not seen and incumbent is not None and rows[0]["config"] != incumbent:
            for row in file.rows(_INCUMBENT, (digest, provenance, incumbent)):
                fastest, kept = to_record(file, rows[0]).times, to_record(file, row)
                if fastest is not None and kept.times is not None and not fastest.beats(kept.times):
                    seen.add(incumbent)
                    yield kept
        for row in rows:
            if row["config"] not in seen:
                seen.add(row["config"])
                yield to_record(file, row)
        if len(rows) < _FEW:
            return


def to_record(file: DatabaseFile, row: Row) -> Record:
    """The record of a row of this file.

    Raises:
        DatabaseCorruptError: the row can't have been written by Tilewright.
    """
    try:
        return row_to_record(row)
    except (ValueError, TypeError) as error:
        raise DatabaseCorruptError(
            f"{file.path}: record {row['id']} is no record ({error}): delete that row"
        ) from error


def _transfers(files: _Files, key: Key, near: Near | None) -> Iterator[_Group]:
    """Shipped records of this very key, and steps 2 to 4: the groups of records that could be carried over, best
    first."""
    yield from _ranked(files, files.of_device, key, None)
    if near is not None:
        yield from _ranked(files, files.of_device, key, near)
    yield from _ranked(files, files.of_others, key, None)
    if near is not None:
        yield from _ranked(files, files.of_others, key, near)


def _ranked(files: _Files, asked: Sequence[DatabaseFile], key: Key, near: Near | None) -> Iterator[_Group]:
    """The groups of the same problem, or with `near` of all problems that compare, in order."""
    of_each = [_problems(files, file, key, near) for file in asked]
    for _, equally_far in groupby(heapq.merge(*of_each, key=itemgetter(0)), key=itemgetter(0)):
        found: list[_Group] = []
        for _, problem, file in equally_far:
            with files.noting(file):
                found += _groups(file, key, problem, shipped=files.is_shipped(file))
        found.sort(key=lambda group: group.newest, reverse=True)
        found.sort(key=lambda group: (group.differs, group.shipped))
        yield from found


def _problems(
    files: _Files, file: DatabaseFile, key: Key, near: Near | None
) -> Iterator[tuple[float, str, DatabaseFile]]:
    """The problems of one file that are asked, each with its distance, in order."""
    if near is None:
        yield 0.0, key.problem, file
        return
    with files.noting(file):
        for problem, distance in nearest(file.rows, near, key.op, key.arch, key.problem):
            yield distance, problem, file


def _groups(file: DatabaseFile, key: Key, problem: str, *, shipped: bool) -> Iterator[_Group]:
    for row in file.rows(_GROUPS, (key.op, key.arch, problem)):
        differs = (
            row["kernel_hash"] != key.kernel_hash,
            (row["triton"], row["ptxas"]) != (key.triton, key.ptxas),
            row["protocol"] != key.protocol,
        )
        reasons = [f"near shape {_changes(key.problem, problem)}"] if problem != key.problem else []
        reasons += [f"board {row['device']}"] if row["device"] != key.device else []
        names = ("other revision", "other toolchain", "other protocol")
        reasons += [name for name, changed in zip(names, differs, strict=True) if changed]
        exact = not reasons
        if exact and not shipped:
            continue  # step 1, of this very file
        words = [*(reasons or ["exact"]), *(["shipped"] if shipped else [])]
        yield _Group(file, row["key_digest"], differs, row["created_at"], ", ".join(words), exact, shipped)


def _changes(asked: str, found: str) -> str:
    """What differs between two problems: `M=16→12`, the one asked for first."""
    one, other = json.loads(asked), json.loads(found)
    names = sorted(one.keys() | other.keys())
    return " ".join(f"{name}={one.get(name)}→{other.get(name)}" for name in names if one.get(name) != other.get(name))

"""In what order a question is answered: the records that are evidence for it, best evidence first.

| step | evidence                                                                   | provenance  |
|------|----------------------------------------------------------------------------|-------------|
| 1    | measured under this very key                                               | measured    |
| 2    | this problem on this board: other protocol, else toolchain, else revision  | transferred |
| 3    | a near shape on this board                                                 | transferred |
| 4    | another board of the same arch (its own file): this problem, else a near   | transferred |
| 5    | predicted under this very key                                              | predicted   |

Within steps 2-4: smaller distance (see `tilewright.tuning_db.shapes`), then fewer differences in the order revision,
toolchain, protocol, then what was measured last. Records of one key stay together, fastest first, since times of
different keys don't compare.

The incumbent, which is the default configuration, stays in its place among the outcomes of this very key unless the
fastest beats it beyond noise: `Times.beats`.

Steps 2-5 leave out each configuration that has failed, or spilled, on this very problem, board, revision and
toolchain: a guess from elsewhere doesn't outweigh what is known here.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from tilewright.tuning_db.errors import DatabaseCorruptError, DatabaseError
from tilewright.tuning_db.file import DatabaseFile, open_file
from tilewright.tuning_db.record import Answer, Key, Provenance, Record
from tilewright.tuning_db.rows import Row, row_to_record
from tilewright.tuning_db.schema import ANSWERABLE
from tilewright.tuning_db.shapes import Near, nearest

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
    """The measured records of one key, as evidence for another."""

    file: DatabaseFile
    digest: str
    differs: tuple[bool, bool, bool]  # revision, toolchain, protocol
    newest: str
    reason: str


def answers(
    file: DatabaseFile,
    key: Key,
    predicted_protocol: str,
    near: Near | None,
    skipped: dict[Path, DatabaseError],
    incumbent: str | None = None,
) -> Generator[Answer, None, None]:
    """Every answer to `key`, best first, read as far as it is consumed.

    Files of other boards that can't be read are left out, and added to `skipped` with the reason.
    """
    digest = key.digest()
    predicted_digest = replace(key, protocol=predicted_protocol).digest()
    for record in best_first(file, digest, Provenance.MEASURED, incumbent):
        yield Answer(record, Provenance.MEASURED, "exact")
    refuted = {row["config"] for row in file.rows(_REFUTED, (digest, predicted_digest))}
    for group in _transfers(file, key, near, skipped):
        try:
            for record in best_first(group.file, group.digest, Provenance.MEASURED):
                if record.config not in refuted:
                    yield Answer(record, Provenance.TRANSFERRED, group.reason)
        except DatabaseError as error:
            if group.file is file:
                raise
            skipped[group.file.path] = error
    for record in best_first(file, predicted_digest, Provenance.PREDICTED, incumbent):
        if record.config not in refuted:
            yield Answer(record, Provenance.PREDICTED, "exact")


def evidence(
    file: DatabaseFile, key: Key, near: Near | None, skipped: dict[Path, DatabaseError]
) -> Generator[tuple[str, list[Record]], None, None]:
    """What was measured under other keys that steps 2 to 4 would ask, in their order: the reason, and all the records
    of one key. Read as far as it is consumed."""
    for group in _transfers(file, key, near, skipped):
        with _noting(group.file, None if group.file is file else skipped):
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


def _transfers(file: DatabaseFile, key: Key, near: Near | None, skipped: dict[Path, DatabaseError]) -> Iterator[_Group]:
    """Steps 2 to 4: the groups of records that could be carried over, best first."""
    yield from _ranked([file], key, None)
    if near is not None:
        yield from _ranked([file], key, near)
    with ExitStack() as stack:
        others = []
        for path in sorted(file.path.parent.glob("*.sqlite")):
            if path == file.path:
                continue
            try:
                other = open_file(path, read_only=True)
            except DatabaseError as error:
                skipped[path] = error
            else:
                stack.callback(other.close)
                others.append(other)
        yield from _ranked(others, key, None, skipped)
        if near is not None:
            yield from _ranked(others, key, near, skipped)


def _ranked(
    files: Sequence[DatabaseFile], key: Key, near: Near | None, skipped: dict[Path, DatabaseError] | None = None
) -> Iterator[_Group]:
    """The groups of the same problem, or with `near` of all problems that compare, in order."""
    of_each = [_problems(file, key, near, skipped) for file in files]
    for _, equally_far in groupby(heapq.merge(*of_each, key=itemgetter(0)), key=itemgetter(0)):
        found: list[_Group] = []
        for _, problem, file in equally_far:
            with _noting(file, skipped):
                found += _groups(file, key, problem)
        found.sort(key=lambda group: group.newest, reverse=True)
        found.sort(key=lambda group: group.differs)
        yield from found


def _problems(
    file: DatabaseFile, key: Key, near: Near | None, skipped: dict[Path, DatabaseError] | None
) -> Iterator[tuple[float, str, DatabaseFile]]:
    """The problems of one file that are asked, each with its distance, in order."""
    if near is None:
        yield 0.0, key.problem, file
        return
    with _noting(file, skipped):
        for problem, distance in nearest(file.rows, near, key.op, key.arch, key.problem):
            yield distance, problem, file


def _groups(file: DatabaseFile, key: Key, problem: str) -> Iterator[_Group]:
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
        if reasons:  # no difference at all is step 1, not a transfer
            yield _Group(file, row["key_digest"], differs, row["created_at"], ", ".join(reasons))


def _changes(asked: str, found: str) -> str:
    """What differs between two problems: `M=16→12`, the one asked for first."""
    one, other = json.loads(asked), json.loads(found)
    names = sorted(one.keys() | other.keys())
    return " ".join(f"{name}={one.get(name)}→{other.get(name)}" for name in names if one.get(name) != other.get(name))


@contextmanager
def _noting(file: DatabaseFile, skipped: dict[Path, DatabaseError] | None) -> Iterator[None]:
    """Go on without a file that can't be read, and note why; without `skipped`, fail."""
    try:
        yield
    except DatabaseError as error:
        if skipped is None:
            raise
        skipped[file.path] = error

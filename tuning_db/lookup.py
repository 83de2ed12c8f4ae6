"""In what order a question is answered: the records that are evidence for it, best evidence first.

| step | evidence                                                                   | provenance  |
|------|----------------------------------------------------------------------------|-------------|
| 1    | measured under this very key                                               | measured    |
|      | this problem on this board: other protocol, else toolchain, else revision  | transferred |
| 2    | a near shape on this board                                                 | transferred |
| 3    | another board of the same arch (its own file): this problem, else a near   | transferred |
| 4    | predicted under this very key                                              | predicted   |

All that was measured of one problem on one board is weighed together, shipped or not, unless this very key was measured
here: then this file's own answer before what was shipped (`tilewright.tuning_db.weighing`). The closest key has the
first word, and one that is less close is heard where it is faster beyond noise. The closest has the fewest differences
in the order revision, toolchain, protocol, then was measured here and not shipped
(`tilewright.tuning_db.shipped_records`), then was measured last. Within steps 2 and 3 the nearest problem goes first
(see `tilewright.tuning_db.shapes`), and of those equally near, and of boards, the one with the closest key.

The incumbent, which is the default configuration, stays in its place among the outcomes of this very key unless the
fastest beats it beyond noise: `Times.beats`.

Shipped and transferred records, and predictions, leave out each configuration that has failed, or spilled, on this very
problem, board, revision and toolchain: a guess from elsewhere doesn't outweigh what is known here.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tilewright.tuning_db.errors import DatabaseError
from tilewright.tuning_db.file import DatabaseFile, open_file
from tilewright.tuning_db.record import Answer, Key, Provenance, Record, canonical_json, read_json
from tilewright.tuning_db.rows import record_of
from tilewright.tuning_db.schema import ANSWERABLE
from tilewright.tuning_db.shapes import Near, nearest
from tilewright.tuning_db.shipped_records import open_shipped, warn_of_unreadable
from tilewright.tuning_db.text import printable
from tilewright.tuning_db.weighing import merged

_FEW = 4
_WEIGHED = 64  # of each key, the fastest; the rest go last
_MOST_KEYS = 8  # that are weighed: more are of revisions long gone

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
    f"SELECT * FROM records WHERE {ANSWERABLE} AND key_digest = ? AND provenance = ? ORDER BY median_us, config LIMIT ?"
)
_FASTEST = (
    f"SELECT config, median_us FROM records WHERE {ANSWERABLE} AND key_digest = ? AND provenance = ? "
    "ORDER BY median_us, config LIMIT ?"
)
_OF_CONFIG = f"SELECT * FROM records WHERE {ANSWERABLE} AND key_digest = ? AND provenance = ? AND config = ?"
_REFUTED = """
    SELECT DISTINCT config FROM records
    WHERE key_digest IN (?, ?) AND (status != 'ok' OR spill_bytes > 0)
"""


@dataclass(frozen=True)
class _Group:
    """The measured records of one key in one file, as evidence for it or another."""

    file: DatabaseFile
    digest: str
    problem: str
    device: str
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
        same = shipped is not None and _is_same_folder(shipped, own.path.parent)
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


def _is_same_folder(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is missing
        return False


@dataclass(frozen=True)
class _Question:
    """What is asked, and what an answer is judged by."""

    own: DatabaseFile
    key: Key
    predicted: Key
    near: Near | None
    incumbent: str | None
    defaults: Mapping[str, Any]

    @cached_property
    def refuted(self) -> frozenset[str]:
        """The configurations that have failed here. Read when they are needed, since there may be thousands, and what
        was measured here under this very key is answered without."""
        digests = (self.key.digest(), self.predicted.digest())
        return frozenset(row["config"] for row in self.own.rows(_REFUTED, digests))

    def form(self, config: str) -> str:
        """The text of a configuration as this revision writes it."""
        return present_form(config, self.defaults)


def present_form(config: str, defaults: Mapping[str, Any]) -> str:
    """The text of a configuration with the fields that the revision it is of didn't have; all in canonical JSON.

    Args:
        config: the text; what is no JSON object stays as it is.
        defaults: the fields that may be left out, with what they then are.
    """
    if not defaults:
        return config
    try:
        fields = read_json(config)
    except ValueError:
        return config
    if not isinstance(fields, dict) or fields.keys() >= defaults.keys():
        return config
    return canonical_json({**defaults, **fields})


def answers(
    file: DatabaseFile,
    key: Key,
    predicted_protocol: str,
    near: Near | None,
    skipped: dict[Path, DatabaseError],
    incumbent: str | None = None,
    shipped: Path | None = None,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Generator[Answer, None, None]:
    """Every answer to `key`, best first, read as far as it is consumed.

    `shipped` is the folder of the shipped files. Those, and files of other boards, that can't be read are left out, and
    added to `skipped` with the reason. `defaults` are the fields of a configuration that may be left out, with what
    they then are.
    """
    question = _Question(file, key, replace(key, protocol=predicted_protocol), near, incumbent, defaults)
    with _Files(file, shipped, skipped) as files:
        for group, record in _found(files, question):
            provenance = Provenance.MEASURED if group.exact else Provenance.TRANSFERRED
            yield Answer(record, provenance, group.reason)
    for record in best_first(file, question.predicted.digest(), Provenance.PREDICTED, incumbent):
        if record.config not in question.refuted:
            yield Answer(record, Provenance.PREDICTED, "exact")


def evidence(
    file: DatabaseFile,
    key: Key,
    near: Near | None,
    skipped: dict[Path, DatabaseError],
    shipped: Path | None = None,
) -> Generator[tuple[str, list[Record]], None, None]:
    """What was measured elsewhere, and by steps 1 to 3 would be asked: the reason, and all the records of one key, the
    closest key first. Shipped records of `key` itself come first. Read as far as it is consumed."""
    with _Files(file, shipped, skipped) as files:
        for _, groups in _transfers(files, key, near):
            for group in groups:
                if group.exact and not group.shipped:
                    continue  # the key's own
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
            for row in file.rows(_OF_CONFIG, (digest, provenance, incumbent)):
                fastest, kept = record_of(file.path, rows[0]).times, record_of(file.path, row)
                if fastest is not None and kept.times is not None and not fastest.beats(kept.times):
                    seen.add(incumbent)
                    yield kept
        for row in rows:
            if row["config"] not in seen:
                seen.add(row["config"])
                yield record_of(file.path, row)
        if len(rows) < _FEW:
            return


_Found = Iterator[tuple[_Group, Record]]
_Problem = list[_Group]  # what was measured of one on one board, closest first


def _found(files: _Files, question: _Question) -> _Found:
    """All that was measured, best first, but for what has failed here."""
    for of_others, groups in _transfers(files, question.key, question.near):
        if of_others:
            groups = [group for group in groups if not group.exact]  # a copy of this board's file is no other board
        elif groups[0].exact and not groups[0].shipped:
            # What was measured here under this very key gives way to nobody else's measurements.
            yield from _weighed(files, question, [group for group in groups if not group.shipped])
            groups = [group for group in groups if group.shipped]
        yield from _weighed(files, question, groups)


def _weighed(files: _Files, question: _Question, groups: Sequence[_Group]) -> _Found:
    """The records of one problem on one board, of all keys, best first."""
    if len(groups) == 1:
        (group,) = groups
        for record in _of_group(files, question, group):
            yield group, record
        return
    texts: list[dict[str, str]] = []  # of each key, by its form
    times: list[dict[str, float]] = []
    cut: list[bool] = []
    weighed = groups[:_MOST_KEYS]
    for group in weighed:
        found = _fastest(files, question, group)
        cut.append(len(found) >= _WEIGHED)
        forms = {text: question.form(text) for text, _ in reversed(found)}
        texts.append({form: text for text, form in forms.items()})
        times.append({forms[text]: time for text, time in found})
    done: set[str] = set()
    slower: dict[int, set[str]] = {}  # of closer keys with more than are weighed, all there are
    for place, form in merged(times):
        for at in range(place):
            if cut[at] and at not in slower:
                slower[at] = _forms(files, question, weighed[at])
        if any(form in slower[at] for at in range(place) if cut[at]):
            continue  # that one's comes below
        done.add(form)
        kept = _one(files, question, weighed[place], texts[place][form])
        if kept is not None:
            yield weighed[place], kept
    for group in groups:
        for record in _of_group(files, question, group):
            form = question.form(record.config)
            if form not in done:
                done.add(form)
                yield group, record


def _of_group(files: _Files, question: _Question, group: _Group) -> Iterator[Record]:
    """The records of one key, best first, but for those that have failed here."""
    own = group.exact and not group.shipped
    refuted = frozenset[str]() if own else question.refuted
    incumbent = question.incumbent if group.exact else None
    with files.noting(group.file):
        for record in best_first(group.file, group.digest, Provenance.MEASURED, incumbent):
            if not refuted or question.form(record.config) not in refuted:
                yield record


def _fastest(files: _Files, question: _Question, group: _Group) -> list[tuple[str, float]]:
    """The fastest configurations of one key with their times, but that the incumbent stays first where it does."""
    found: list[tuple[str, float]] = []
    with files.noting(group.file):
        rows = group.file.rows(_FASTEST, (group.digest, Provenance.MEASURED, _WEIGHED))
        found = [(row["config"], row["median_us"]) for row in rows]
        if group.exact and question.incumbent is not None:
            for kept in islice(best_first(group.file, group.digest, Provenance.MEASURED, question.incumbent), 1):
                assert kept.times is not None
                first = (kept.config, kept.times.median_us)
                found = [first, *(pair for pair in found if pair != first)]
    return found


def _one(files: _Files, question: _Question, group: _Group, config: str) -> Record | None:
    """The record of a configuration that may be answered; None where it has failed here, or can't be read any more."""
    if not (group.exact and not group.shipped) and question.form(config) in question.refuted:
        return None
    with files.noting(group.file):
        for row in group.file.rows(_OF_CONFIG, (group.digest, Provenance.MEASURED, config)):
            return record_of(group.file.path, row)
    return None


def _forms(files: _Files, question: _Question, group: _Group) -> set[str]:
    """All configurations of one key, as this revision writes them."""
    found: set[str] = set()
    with files.noting(group.file):
        found |= {
            question.form(row["config"]) for row in group.file.rows(_FASTEST, (group.digest, Provenance.MEASURED, -1))
        }
    return found


def _transfers(files: _Files, key: Key, near: Near | None) -> Iterator[tuple[bool, _Problem]]:
    """Steps 1 to 3: whether they are of other boards, and the groups of records that could answer or be carried over,
    by problem and board, best first."""
    for of_others in (False, True):
        asked = files.of_others if of_others else files.of_device  # opened no earlier than here
        for of_shapes in (None,) if near is None else (None, near):
            for groups in _ranked(files, asked, key, of_shapes):
                yield of_others, groups


def _ranked(files: _Files, asked: Sequence[DatabaseFile], key: Key, near: Near | None) -> Iterator[_Problem]:
    """The groups of the same problem, or with `near` of all problems that compare, in order."""
    of_each = [_problems(files, file, key, near) for file in asked]
    for _, equally_far in groupby(heapq.merge(*of_each, key=itemgetter(0)), key=itemgetter(0)):
        found: list[_Group] = []
        for _, problem, file in equally_far:
            with files.noting(file):
                found += _groups(file, key, problem, shipped=files.is_shipped(file))
        found.sort(key=lambda group: group.newest, reverse=True)
        found.sort(key=lambda group: (group.differs, group.shipped))
        by_board: dict[tuple[str, str], list[_Group]] = {}
        for group in found:
            by_board.setdefault((group.problem, group.device), []).append(group)
        yield from by_board.values()


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
        reasons += [f"board {printable(row['device'])}"] if row["device"] != key.device else []
        names = ("other revision", "other toolchain", "other protocol")
        reasons += [name for name, changed in zip(names, differs, strict=True) if changed]
        exact = not reasons
        words = [*(reasons or ["exact"]), *(["shipped"] if shipped else [])]
        yield _Group(
            file=file,
            digest=row["key_digest"],
            problem=problem,
            device=row["device"],
            differs=differs,
            newest=row["created_at"],
            reason=", ".join(words),
            exact=exact,
            shipped=shipped,
        )


def _changes(asked: str, found: str) -> str:
    """What differs between two problems: `M=16→12`, the one asked for first."""
    one, other = read_json(asked), read_json(found)
    names = sorted(one.keys() | other.keys())
    return " ".join(f"{name}={one.get(name)}→{other.get(name)}" for name in names if one.get(name) != other.get(name))

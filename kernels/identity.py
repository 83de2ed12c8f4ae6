"""What names the code and the compiler here, remembered: a program's first lookup needn't wait for it.

The hash of a kernel comes from parsing its source, which takes 0.2 s, and the version of ptxas from running it. Both
are the same as long as some files are, so a tuning run notes them in its database by a stamp of these files (`note`),
and a lookup that finds a note with the stamp of its own files takes it (`recall`). Without one it works them out.

A stamp is of the paths, sizes, inodes and times of the files, change time included, which no tool can set back: more
than what Python trusts of its own compiled files. On another machine it is another one.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import triton

from tilewright.kernels.compile import triton_version
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.registry import KERNELS
from tilewright.tuning_db import env
from tilewright.tuning_db.store import TuningDB

OF_CODE = ("code", "prediction")
"""What is known of a kernel's code: the hash of it, and the protocol of predictions of its times."""

_UNSETTLED_S = 2.0
"""A file changed so recently may change once more without a new time: the coarsest file systems count in 2 s."""

_KERNELS = str(Path(__file__).resolve().parent)
_NO_KERNELS = ("__pycache__", "tensorrt")
"""Folders here whose code no kernel and no prediction is made of: what is in them asks kernels, not the other way."""

_PTXAS = str(Path(triton.__file__).resolve().parent / "backends" / "nvidia" / "bin")

_known: dict[str, tuple[str | None, str]] = {}  # by name, of this process: the stamp it had before, and the value


def of_code(kernel: Kernel[Any, Any], what: str, compute: Callable[[], str]) -> str:
    """One of `OF_CODE`: what was recalled or computed before, else what `compute` gives. Of a kernel that is not among
    `KERNELS`, whose code may lie anywhere, always the latter."""
    if not any(kernel is known for known in KERNELS):
        return compute()
    name = f"{what} {kernel.name}"
    if name not in _known:
        _known[name] = (_code_stamp(), compute())
    return _known[name][1]


def of_ptxas(arch: int, compute: Callable[[int], str]) -> str:
    """The version of the ptxas for an arch: what was recalled or computed before, else what `compute` gives."""
    name = f"ptxas {arch}"
    if name not in _known:
        _known[name] = (_ptxas_stamp(), compute(arch))
    return _known[name][1]


def recall(database: TuningDB, kernel: Kernel[Any, Any], arch: int) -> None:
    """Takes what the database has noted for the files that are here, unless this process knows better.

    Raises:
        DatabaseError: it can't be read.
    """
    missing = [name for name in _names(kernel, arch) if name not in _known]
    stamps = dict(_stamped(missing))
    noted = database.all_noted([f"{name} {stamp}" for name, stamp in stamps.items()])
    for name, stamp in stamps.items():
        if (value := noted.get(f"{name} {stamp}")) is not None:
            _known[name] = (stamp, value)


def note(database: TuningDB, kernel: Kernel[Any, Any], arch: int) -> None:
    """Notes what this process knows, for the next: what was worked out from the files as they still are.

    Raises:
        DatabaseError: it can't be written.
    """
    known = [name for name in _names(kernel, arch) if name in _known]
    notes = {f"{name} {stamp}": _known[name][1] for name, stamp in _stamped(known) if _known[name][0] == stamp}
    if database.all_noted(list(notes)) != notes:
        database.note(notes)


def forget() -> None:
    """Drops what this process knows: for tests that change code."""
    _known.clear()


def _names(kernel: Kernel[Any, Any], arch: int) -> list[str]:
    return [*(f"{what} {kernel.name}" for what in OF_CODE), f"ptxas {arch}"]


def _stamped(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Those of the names that have a stamp, with it."""
    stamps: dict[str, str | None] = {}
    for name in names:
        of = "ptxas" if name.startswith("ptxas ") else "code"
        if of not in stamps:
            stamps[of] = _ptxas_stamp() if of == "ptxas" else _code_stamp()
        stamp = stamps[of]
        if stamp is not None:
            yield name, stamp


def _code_stamp() -> str | None:
    """Of all the source that kernels are made of. The text that is hashed is Python's, and some of its constants are
    Triton's."""
    try:
        sources = _sources(_KERNELS)
    except OSError:
        return None  # in an archive, say
    return _stamp(sources, f"{sys.version} {triton_version()}")


def _ptxas_stamp() -> str | None:
    """Of Triton's own ptxas; none where Triton was told of another."""
    if vars(triton.knobs.nvidia) or env.ptxas_chosen():
        return None
    return _stamp([f"{_PTXAS}/{name}" for name in ("ptxas", "ptxas-blackwell")])


def _sources(folder: str) -> list[str]:
    found, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                found.append(entry.path)
            elif entry.name not in _NO_KERNELS and entry.is_dir():
                folders.append(entry.path)
    return found + [path for inner in folders for path in _sources(inner)]


def _stamp(paths: list[str], more: str = "") -> str | None:
    """None where a file or all of them are missing, or one was changed just now."""
    try:
        files = [(path, os.stat(path)) for path in sorted(paths)]  # noqa: PTH116 - 70 of them in 0.2 ms
    except OSError:
        return None
    if not files or time.time() - max(now.st_ctime for _, now in files) < _UNSETTLED_S:
        return None
    paths_text = "\0".join([more, *(path for path, _ in files)])
    numbers = [number for _, now in files for number in (now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns)]
    packed = struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
    return hashlib.sha256(paths_text.encode(errors="surrogateescape") + packed).hexdigest()

"""Which problems this process has called, and what each got: for who wants to tune what a program runs.

`called()` lists them. Where `$TILEWRIGHT_CALLS` names a file, each is added to it once, as a line of text that
`autotune --calls FILE` reads: the op, a space, and the problem as `--problem` takes it.
"""

from __future__ import annotations

import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tilewright.kernels.problem import Problem
from tilewright.tuning_db import env
from tilewright.tuning_db.errors import UsageError

if TYPE_CHECKING:
    from tilewright.kernels.lookup import Choice

INTERPRETER = "interpreter"
"""In the place of a device."""

MOST_LOGGED = 65536
"""Problems that a process keeps and writes, and lines of a file that it looks through for those already there: ever new
shapes must not make it grow for ever."""

MOST_BYTES = 64 << 20
"""Of a file of calls: a quarter of a million problems."""


@dataclass(frozen=True, slots=True)
class Call:
    """A problem that was called, where, and the configuration it got there and why."""

    problem: Problem
    device: str  # "cuda:0", or "interpreter"
    choice: Choice

    @property
    def op(self) -> str:
        """The kernel's name, as `autotune --kernel` takes it."""
        return self.problem.op

    def __str__(self) -> str:
        said = self.choice
        known = said.reason if said.provenance is None else f"{said.provenance.value} ({said.reason})"
        time = "" if said.time_us is None else f", {said.time_us:.1f} µs"
        return f"{line_of(self.problem)} on {self.device}: {known}{time}: {said.config}"


def called() -> tuple[Call, ...]:
    """What this process has called so far, each problem once for each device, in the order of the first calls.

    Of a problem that was called with a configuration of the caller's and without, the one that came last for the first
    time is told of. The first 65,536 are kept. What a TensorRT engine launches by itself is not among them.
    """
    return tuple(_calls.values())


def note(problem: Problem, ordinal: int, choice: Choice, named: bool) -> None:
    """Keeps a problem that was called on GPU `ordinal` (-1: in the interpreter); `named`: the caller chose the
    configuration, so that no search would change it. Whoever calls holds a lock."""
    device = f"cuda:{ordinal}" if ordinal >= 0 else INTERPRETER
    key = (problem, device)
    if key in _calls or len(_calls) < MOST_LOGGED:
        _calls[key] = Call(problem, device, choice)
    if named:
        return
    try:
        path = env.calls_file()
        if path is not None and problem not in _written and len(_written) < MOST_LOGGED:
            _written.add(problem)
            _write(path, line_of(problem))
    except UsageError as error:
        _warn(f"{error}: what is called is not noted there")


def line_of(problem: Problem) -> str:
    """A problem in a file of calls."""
    return f"{problem.op} {problem}"


_calls: dict[tuple[Problem, str], Call] = {}
_written: set[Problem] = set()
_places: dict[Path, Path] = {}  # by the names of files, where these led when the first problem was added
_known: dict[Path, set[str]] = {}  # lines that a file had when the first was added


def _write(named: Path, line: str) -> None:
    """Adds a line that is not there yet. A program that runs a model goes on without it, after a warning."""
    path = named
    try:
        if named not in _places:
            _places[named] = named.absolute()  # a program may go to another folder, or the folder may go
        path = _places[named]
        if env.frozen():
            _warn(f"{env.CALLS}={path}: nothing is noted, for {env.FROZEN} is set, and nothing is written then")
            return
        # A pipe that nobody reads would be waited for.
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                _warn(f"{env.CALLS}={path} is no file: what is called is not noted there")
                return
            if path not in _known:
                _known[path] = _lines(stream)
            if line in _known[path]:
                return
            size = os.fstat(descriptor).st_size
            # A last line without an end, as editors and full disks leave it, stays one of its own.
            before = "" if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n" else "\n"
            data = f"{before}{line}\n".encode()
            # One write at the end of the file: lines of several processes don't mix.
            if os.write(descriptor, data) < len(data):
                _warn(f"{env.CALLS}={path}: its last line is cut, for there is no more room: remove that line")
    except OSError as error:
        _warn(f"{env.CALLS}={path} can't be written ({error.strerror}): what is called is not noted there")


def _lines(stream: IO[bytes]) -> set[str]:
    found: set[str] = set()
    for line in stream.read(MOST_BYTES).decode(errors="replace").splitlines():
        found.add(line.lstrip("# \t"))  # what was commented out is known, too
        if len(found) >= MOST_LOGGED:
            break
    return found


def _warn(text: str) -> None:
    # Python shows one text once in a process.
    warnings.warn(text, RuntimeWarning, stacklevel=4)


__all__ = ["Call", "called"]

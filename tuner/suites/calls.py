"""Workloads from what a program called: the files that `$TILEWRIGHT_CALLS` makes (`kernels.call_log`)."""

from __future__ import annotations

import os
from pathlib import Path

from tilewright.kernels.call_log import MOST_BYTES
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.suites.workload import Workload
from tilewright.tuning_db.errors import ProblemError, UnknownKernelError, UsageError
from tilewright.tuning_db.text import shown

LONGEST_LINE = 1000
"""Characters of one call; those of an attention with every term are some 300."""


def read_calls(path: str | os.PathLike[str]) -> tuple[Workload, ...]:
    """The workloads in a file of calls, each once, in the order of the file.

    Each line is an op and a problem, as `gemm M=64,N=64,K=64`; empty lines, and those that begin with #, are passed
    over.

    Raises:
        UsageError: the file can't be read, a line is not a valid call, or there is no call; the message has the place.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            data = stream.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UsageError(f"{file} has more than {MOST_BYTES >> 20} MiB, which is no file of calls")
        text = data.decode("utf-8-sig")  # some editors begin with a mark
    except OSError as error:
        raise UsageError(f"the calls in {file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the calls in {file} can't be read: the byte at {error.start} is no UTF-8") from None
    found: dict[Workload, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            found[_workload(f"{file}, line {number}", line)] = None
    if not found:
        raise UsageError(f"{file} has no calls: a program writes them there with TILEWRIGHT_CALLS={file}")
    return tuple(found)


def _workload(where: str, line: str) -> Workload:
    if len(line) > LONGEST_LINE:
        raise UsageError(f"{where}: a line of {len(line)} characters is no call")
    op, _, text = line.strip().partition(" ")
    try:
        problem = find_kernel(op).problem.parse(text)
    except UnknownKernelError as error:
        raise UsageError(f"{where}: {error}") from None
    except ProblemError as error:
        raise UsageError(f"{where}: {shown(line)} is no call: {error}") from None
    return Workload(str(problem), problem)

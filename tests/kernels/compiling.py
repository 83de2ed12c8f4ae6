"""Compiling from tests: in processes of their own, for the tests' own interprets; `compile_jobs` is what runs there."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tilewright.kernels.problem import Config, Problem
from tilewright.tuning_db.env import compiling_environment

EVERY_DAY = (75, 86, 90)


def archs(*wanted: int, smoke: Collection[int] = ()) -> list[Any]:
    """Parameters of a test for archs. Marked slow are those whose tensor cores are reached by `mma.sync` as those of
    sm_86 are, and sm_100, of which features of every op are compiled always. What is asked of sm_86 in the selection on
    the oldest Triton is asked there alone."""
    marks: dict[int, list[Any]] = {arch: [] if arch in EVERY_DAY else [pytest.mark.slow] for arch in wanted}
    for arch in smoke:
        marks[arch] = [pytest.mark.smoke, *([pytest.mark.slow] if arch == 86 else [])]
    return [pytest.param(arch, marks=marks[arch]) for arch in wanted]


class Compiler:
    """A process that compiles, request by request. It ends with this one, whose pipe it reads."""

    def __init__(self, **environment: str) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("compile_jobs.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=compiling_environment() | environment,
            text=True,
        )

    def replies(self, jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What `compile_jobs` answers; fails with what the process had to say if it ends instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(jobs) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise AssertionError(f"the compiling process ended: {self._errors.read()}")
        replies: list[dict[str, Any]] = json.loads(line)
        return replies

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()


_idle: dict[int, list[Compiler]] = defaultdict(list)
"""By arch: Triton 3.6 settles on how to convert fp8 at the first arch that a process meets."""


@atexit.register
def _close() -> None:
    for compilers in _idle.values():
        while compilers:
            compilers.pop().close()


def compiled(arch: int, jobs: Sequence[tuple[str, Problem, Config | None]], **environment: str) -> list[dict[str, Any]]:
    """What compiling each (op, problem, configuration or None for the default) for an arch gives.

    Processes are kept for the next call, but for those of another environment.
    """
    asked = [
        {"op": op, "problem": problem.to_dict(), "config": config and config.to_dict(), "arch": arch}
        for op, problem, config in jobs
    ]
    kept = _idle[arch]
    compiler = kept.pop() if kept and not environment else Compiler(**environment)
    try:
        replies = compiler.replies(asked)
    except BaseException:  # a time limit too: its answer is still to come
        compiler.close()
        raise
    if environment:
        compiler.close()
    else:
        kept.append(compiler)
    return replies


def described(reply: dict[str, Any]) -> str:
    """One reply in a message."""
    return f"sm_{reply['arch']} {reply['op']} {reply['problem']} {reply['config']}"


def assert_clean(replies: Iterable[dict[str, Any]], *, scratch: bool = True) -> None:
    """All launches compile, without spills and within limits, and no more shared memory is estimated than is taken.

    `scratch`: whether they may have scratch of Triton's own, which descriptors lie in.
    """
    for reply in replies:
        for launch in (reply, *reply["more"]):
            assert "error" not in launch, (described(reply), launch["error"])
            assert launch["over"] is None, (described(reply), launch["over"])
            assert scratch or launch["scratch"] == 0, described(reply)
        assert reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)


def assert_specialised(reply: dict[str, Any]) -> None:
    """A kernel that asks for it is three groups of warps on Hopper, and plain elsewhere."""
    assert "error" not in reply, (described(reply), reply["error"])
    found, hopper = reply["instructions"], reply["arch"] == 90
    assert reply["num_warps"] == (12 if hopper else 4), described(reply)
    assert bool(found["setmaxnreg"]) == hopper, described(reply)
    assert not hopper or reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)

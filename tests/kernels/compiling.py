"""Compiling from tests: in a process of its own, for the tests' own interprets; `compile_jobs` is what runs there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewright.kernels.problem import Config, Problem
from tilewright.tuning_db.env import compiling_environment


def compiled(arch: int, jobs: Sequence[tuple[str, Problem, Config | None]], **environment: str) -> list[dict[str, Any]]:
    """What compiling each (op, problem, configuration or None for the default) for an arch gives. One process compiles
    for one arch: Triton 3.6 settles on how to convert fp8 at the first arch that it meets."""
    asked = [
        {"op": op, "problem": problem.to_dict(), "config": config and config.to_dict(), "arch": arch}
        for op, problem, config in jobs
    ]
    command = [sys.executable, "-P", str(Path(__file__).with_name("compile_jobs.py"))]
    done = subprocess.run(
        command,
        input=json.dumps(asked),
        env=compiling_environment() | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    replies: list[dict[str, Any]] = json.loads(done.stdout)
    return replies


def described(reply: dict[str, Any]) -> str:
    """One reply in a message."""
    return f"sm_{reply['arch']} {reply['op']} {reply['problem']} {reply['config']}"


def assert_specialised(reply: dict[str, Any]) -> None:
    """A kernel that asks for it is three groups of warps on Hopper, and plain elsewhere."""
    assert "error" not in reply, (described(reply), reply["error"])
    found, hopper = reply["instructions"], reply["arch"] == 90
    assert reply["num_warps"] == (12 if hopper else 4), described(reply)
    assert bool(found["setmaxnreg"]) == hopper, described(reply)
    assert not hopper or reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)

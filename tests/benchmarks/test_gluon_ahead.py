"""Kernels in Gluon are compiled ahead under the keys that their launches look for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gluon_ahead
from benchmarks.gluon import ATTENTION_CONFIGS, chosen_cases, configs
from benchmarks.gluon_ahead import Shape, compile_ahead, jobs_of
from tilewright.kernels.devices import resolve_device
from tilewright.tuning_db.env import compiling_environment

ROOT = Path(__file__).parent.parent.parent
DEVICE = resolve_device("h200")

# Without compiling: Triton's hook is given the key first, and may say that the kernel is there.
KEYS = """
import json
from triton import knobs
from triton.runtime import driver
from benchmarks.gluon import chosen_cases, contenders
from benchmarks.gluon_ahead import KINDS, Shape, TargetDriver, compile_job
from tests.benchmarks.test_gluon_ahead import DEVICE, jobs

class Array(Shape):
    # As torch's on a GPU: anywhere, at a multiple of 512 bytes.
    def new_empty(self, shape):
        return Array(tuple(shape), self.kind)
    def data_ptr(self):
        return 0x7F0000000200
    def reshape(self, *shape):
        return Array(super().reshape(*shape).shape, self.kind)

keys = []
knobs.runtime.jit_cache_hook = lambda key, fn, **_: keys.append(f"{fn.name} {key}") or True
for job in jobs():
    compile_job(job)
ahead, keys[:] = list(keys), []
driver.set_active(TargetDriver(90))
for case in chosen_cases():
    problem, kind = case.problem, KINDS[case.problem.dtype]
    if case.op == "attention":
        shapes = {"q": (problem.B, problem.H, problem.Sq, problem.D)}
        shapes["k"] = shapes["v"] = (problem.B, problem.kv_heads, problem.Skv, problem.D)
    else:
        shapes = {"a": (problem.M, problem.K), "w": (problem.N, problem.K)}
        shapes |= {"bias": (problem.N,)} if problem.bias else {}
    arrays = {name: Array(shape, kind) for name, shape in shapes.items()}
    for contender in contenders(case, DEVICE):
        contender.call(arrays)
print(json.dumps([ahead, keys]))
"""


def jobs() -> list[dict[str, Any]]:
    return jobs_of([(case, configs(case, DEVICE)) for case in chosen_cases()], 90)


def test_every_launch_finds_what_was_compiled_ahead_and_nothing_is_compiled_twice() -> None:
    done = subprocess.run(
        [sys.executable, "-c", KEYS], cwd=ROOT, env=compiling_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ahead, launched = json.loads(done.stdout)
    assert len(launched) == sum(len(configs(case, DEVICE)) for case in chosen_cases())
    assert set(launched) == set(ahead)
    assert len(ahead) == len(set(ahead)) < len(launched)


@pytest.mark.slow
def test_what_was_compiled_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    chosen = [next(job for job in jobs() if ("q" in job) is attention) for attention in (False, True)]
    assert compile_ahead(chosen, 250.0) == 2
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len([path for path in kept if path.suffix == ".cubin"]) == 2
    assert compile_ahead(chosen, 250.0) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == kept


def test_no_more_time_is_taken_than_there_is_and_a_failure_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for program, seconds, count in (
        ("while True: pass", 0.1, 0),
        ("raise ValueError", 60.0, 0),
        ("print('compiled')", 60.0, 1),
    ):
        monkeypatch.setattr(gluon_ahead, "COMMAND", (sys.executable, "-c", program))
        assert compile_ahead([{}], seconds) == count


def test_shapes_are_dense() -> None:
    shape = Shape((2, 3, 5, 7), "bfloat16")
    assert (shape.stride(), shape.dtype, len(shape)) == ((105, 35, 7, 1), "torch.bfloat16", 2)
    assert shape.reshape(-1, 5, 7) == Shape((6, 5, 7), "bfloat16")
    assert {job["config"]["STAGES"] for job in jobs() if "q" in job} == {each.STAGES for each in ATTENTION_CONFIGS}

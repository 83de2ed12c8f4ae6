"""From a problem to a plan: prepared once, the next candidate where one is refused, and no lock for a warm call."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tilewright.kernels import Choice, GemmConfig, GemmProblem, dispatch, resolve_device
from tilewright.kernels.dispatch import call_cache, forget_plans, plan_for
from tilewright.kernels.lookup import LIGHTER
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.runtime import InterpretedPlan
from tilewright.tuning_db.errors import (
    CompileError,
    IllegalConfigError,
    LaunchError,
    MissingDependencyError,
    NotPackedError,
    UnsupportedError,
)
from tilewright.tuning_db.record import Provenance

PROBLEM = GemmProblem(16, 16, 16)
DEVICE = replace(resolve_device("rtx3090"), live="cuda:0")
TILES = [GemmConfig(16, 16, 16, GROUP_M=group) for group in range(1, 5)]


@pytest.fixture(autouse=True)
def fresh():
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU on which candidates are TILES, and plans are what `gpu.refuse` leaves of them."""

    class Gpu:
        refuse: dict = {}  # noqa: RUF012 - set by each test
        packed = None  # the binaries that a pack would give
        plans: list = []  # noqa: RUF012
        seconds = 0.0

    def plan(launches, device, ordinal, binaries, *, lasting):
        assert binaries is Gpu.packed
        assert lasting, "a captured CUDA graph may launch its code when the plan is forgotten"
        time.sleep(Gpu.seconds)
        group = dict(launches[0].constexprs)["GROUP_M"]
        Gpu.plans.append((group, device, ordinal))
        if group in Gpu.refuse:
            raise Gpu.refuse[group]
        return f"plan {group}"

    def candidates(kernel, problem, device, *, config=None):
        for tile in [config] if config else TILES:
            yield Choice(tile, Provenance.PREDICTED, "by the test")

    Gpu.plans, Gpu.refuse = [], {}
    monkeypatch.setattr(dispatch, "_device", lambda ordinal: DEVICE)
    monkeypatch.setattr(dispatch, "GpuPlan", plan)
    monkeypatch.setattr(dispatch, "candidates", candidates)
    return Gpu


def test_host_arrays_are_interpreted_with_the_default():
    plan, choice = plan_for(GEMM, PROBLEM, -1)
    assert isinstance(plan, InterpretedPlan)
    assert choice == Choice(GEMM.default(PROBLEM, resolve_device("a100")), None, "interpreted")
    named = plan_for(GEMM, PROBLEM, -1, config=TILES[2])
    assert named[1].config == TILES[2]
    with pytest.raises(IllegalConfigError, match="BLOCK_K=17 must be a power of two"):
        plan_for(GEMM, PROBLEM, -1, config=GemmConfig(16, 16, 17))


def test_what_fits_no_configuration_is_interpreted_by_none():
    """Its positions would wrap around, and the result be wrong."""
    with pytest.raises(
        UnsupportedError,
        match=r"^gemm M=1,N=1,K=2147483647,.* fits no .* on a100, whose limits the interpreter has: ",
    ):
        plan_for(GEMM, GemmProblem(1, 1, 2**31 - 1, dtype="int8"), -1)


def test_the_interpreter_takes_what_no_tuned_gpu_would():
    assert plan_for(GEMM, GemmProblem(16, 16, 32, dtype="fp8e4m3"), -1)[1].reason == "interpreted"


def test_a_plan_is_made_once_for_each_problem_device_and_configuration(gpu):
    first = plan_for(GEMM, PROBLEM, 0)
    assert plan_for(GEMM, GemmProblem(16, 16, 16), 0) is first
    assert len(gpu.plans) == 1
    for arguments in ((PROBLEM, 1), (replace(PROBLEM, alpha=True), 0)):
        assert plan_for(GEMM, *arguments) is not first
    assert plan_for(GEMM, PROBLEM, 0, config=TILES[0]) is not first
    assert gpu.plans == [(1, DEVICE, 0), (1, DEVICE, 1), (1, DEVICE, 0), (1, DEVICE, 0)]


@pytest.mark.parametrize("error", [UnsupportedError, CompileError, LaunchError])
def test_a_refused_candidate_gives_way_to_the_next(gpu, error):
    gpu.refuse = {1: error("8 B a thread spill"), 2: error("no")}
    plan, choice = plan_for(GEMM, PROBLEM, 0)
    assert (plan, choice.config) == ("plan 3", TILES[2])
    assert [group for group, *_ in gpu.plans] == [1, 2, 3]


def test_what_is_lighter_than_the_default_is_tried_and_not_spoken_of(gpu, monkeypatch):
    choices = [Choice(TILES[0], Provenance.DEFAULT, "no evidence"), Choice(TILES[1], Provenance.DEFAULT, LIGHTER)]
    monkeypatch.setattr(dispatch, "candidates", lambda *_, **__: iter(choices))
    gpu.refuse = {1: UnsupportedError("the default spills"), 2: UnsupportedError("and so does that")}
    with pytest.raises(UnsupportedError, match=r"^the default spills$"):
        plan_for(GEMM, PROBLEM, 0)
    gpu.refuse = {1: UnsupportedError("the default spills")}
    assert plan_for(GEMM, PROBLEM, 0) == ("plan 2", choices[1])


def test_when_all_are_refused_the_last_reason_is_given_and_nothing_remembered(gpu):
    gpu.refuse = {group: UnsupportedError(f"refused {group}") for group in range(1, 5)}
    with pytest.raises(UnsupportedError, match=r"^refused 4$"):
        plan_for(GEMM, PROBLEM, 0)
    gpu.refuse = {}
    assert plan_for(GEMM, PROBLEM, 0)[0] == "plan 1"


def test_the_callers_configuration_has_no_stand_in(gpu):
    gpu.refuse = {2: CompileError("ptxas")}
    with pytest.raises(CompileError, match=r"^ptxas$"):
        plan_for(GEMM, PROBLEM, 0, config=TILES[1])


def test_other_errors_are_not_taken_for_a_refusal(gpu):
    gpu.refuse = {1: MemoryError()}
    with pytest.raises(MemoryError):
        plan_for(GEMM, PROBLEM, 0)


def test_many_threads_make_one_plan(gpu):
    gpu.seconds = 0.02
    plans = []
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait()
        plans.append(plan_for(GEMM, PROBLEM, 0))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.plans) == 1
    assert len({id(plan) for plan in plans}) == 1
    gpu.seconds = 0.0


def test_a_warm_call_takes_no_lock(gpu):
    plan_for(GEMM, PROBLEM, 0)
    answers = []
    with dispatch._lock:
        thread = threading.Thread(target=lambda: answers.append(plan_for(GEMM, PROBLEM, 0)[0]), daemon=True)
        thread.start()
        thread.join(10)
    assert answers == ["plan 1"]


FORKED = """
import os, signal, threading
from tilewright.kernels import GemmProblem, dispatch
from tilewright.kernels.ops.gemm.launch import GEMM

begun, go_on, prepare = threading.Event(), threading.Event(), dispatch._prepare

def waiting(*args):
    begun.set()
    assert go_on.wait(60)
    return prepare(*args)

dispatch._prepare = waiting
thread = threading.Thread(target=lambda: dispatch.plan_for(GEMM, GemmProblem(16, 16, 16), -1))
thread.start()
begun.wait(60)
child = os.fork()
if not child:
    signal.alarm(30)  # ends a child that hangs
    dispatch._prepare = prepare
    dispatch.plan_for(GEMM, GemmProblem(16, 16, 16), -1)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go_on.set()
thread.join()
assert len(dispatch._plans) == 1
"""


def test_a_child_forked_while_a_plan_is_made_makes_its_own():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_forgetting_empties_plans_and_the_caches_of_calls(gpu):
    calls = call_cache()
    calls["a call"] = "its plan"
    plan_for(GEMM, PROBLEM, 0)
    forget_plans()
    assert calls == {}
    plan_for(GEMM, PROBLEM, 0)
    assert len(gpu.plans) == 2
    dispatch._call_caches.remove(calls)


def test_plans_are_made_again_rather_than_kept_for_ever(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "MOST_PLANS", 3)
    made = len(gpu.plans)
    for m in (16, 32, 48, 64, 64):
        plan_for(GEMM, replace(PROBLEM, M=m), 0)
    assert len(dispatch._plans) == 1
    assert len(gpu.plans) == made + 4
    plan_for(GEMM, replace(PROBLEM, M=16), 0)
    assert len(gpu.plans) == made + 5


def test_a_gpu_that_is_not_there(monkeypatch):
    dispatch._device.cache_clear()
    monkeypatch.setattr(dispatch, "live_devices", lambda: ())
    with pytest.raises(MissingDependencyError, match=r"^cuda:3 is not among the GPUs found: none$"):
        plan_for(GEMM, PROBLEM, 3)
    monkeypatch.setattr(dispatch, "live_devices", lambda: (DEVICE,))
    assert dispatch._device(0) is DEVICE
    dispatch._device.cache_clear()


class Packed:
    """A pack that has the code of what has these constants."""

    path = "a.pack"

    def __init__(self, constants):
        self.constants = constants

    def binaries(self, launches):
        return ("its code",) if dict(launches[0].constexprs)["ACTIVATION"] in self.constants else None


def test_what_the_pack_has_is_not_compiled(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "pack_for", lambda kernel, device: Packed(["none"]))
    gpu.packed = ("its code",)
    assert plan_for(GEMM, PROBLEM, 0)[0] == "plan 1"
    gpu.packed = None
    constants = (("ACTIVATION", "relu"),)
    assert plan_for(GEMM, PROBLEM, 0, constants=constants)[0] == "plan 1"  # compiled: nothing forbids it
    monkeypatch.setenv("TILEWRIGHT_FROZEN", "1")
    forget_plans()
    with pytest.raises(NotPackedError, match=r"lacks the kernel of gemm .* with GemmConfig.*, activation='relu', and "):
        plan_for(GEMM, PROBLEM, 0, constants=constants)
    with pytest.raises(NotPackedError, match=r"with --constant .*, or call without `config`"):
        plan_for(GEMM, PROBLEM, 0, config=TILES[1], constants=constants)


INTERPRETED_CALL = """
import sys
import numpy as np
from tilewright.kernels import gemm, resolve_device
ones = np.ones((16, 16), np.float16)
assert (gemm(ones, ones) == 16).all()
print("cupy" in sys.modules)
resolve_device("rtx3090")
print("cupy" in sys.modules)
"""


def test_an_interpreted_call_loads_no_cupy(tmp_path):
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(
        "from types import SimpleNamespace as Space\ncuda = Space(runtime=Space(getDeviceCount=int))\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    program = [sys.executable, "-c", INTERPRETED_CALL]
    run = subprocess.run(program, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["False", "True"]  # the second: a board is looked for among live GPUs

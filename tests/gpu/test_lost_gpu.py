"""What becomes of GPU tests when a kernel's fault has cost their process the GPU, or a kernel never ends, rehearsed
with a stand-in driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import test_gluon, test_specialised
from tilewright.tuner.measure import EXIT_AFTER_FAULT

ILLEGAL = "cudaErrorIllegalAddress: an illegal memory access was encountered"
CONFTEST = """
import ctypes
import sys
from types import ModuleType, SimpleNamespace
from tests.conftest import pytest_collection_modifyitems, pytest_terminal_summary  # noqa: F401
from tests.gpu.conftest import pytest_runtest_protocol  # noqa: F401

class CUDARuntimeError(RuntimeError):
    pass

cupy = ModuleType("cupy")
cupy.faults = []
cupy.endless = False
def wait():
    # For ever, and in C: a signal's handler in Python doesn't get its turn.
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
    lock(mutex)
    lock(mutex)
cupy.wait = wait
def synchronize():
    if cupy.endless:
        wait()
    if cupy.faults:
        raise CUDARuntimeError(cupy.faults[-1])
runtime = SimpleNamespace(deviceSynchronize=synchronize, CUDARuntimeError=CUDARuntimeError)
cupy.cuda = SimpleNamespace(runtime=runtime)
sys.modules["cupy"] = cupy
"""
TESTS = """
import cupy

def test_before():
    pass

def test_faulty():
    cupy.faults.append("{error}")

def test_after():
    pass
"""
HUNG = """
import cupy
import pytest

def test_before():
    pass

@pytest.mark.gpu
{limit}
def test_hung():
    {does}

def test_after():
    pass
"""


def run(folder: Path, tests: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(tests)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(folder),
    ]
    return subprocess.run(
        [*command, *arguments, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )


def test_alone_the_run_ends_there(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS.format(error=ILLEGAL), "-p", "no:xdist")
    assert done.returncode == EXIT_AFTER_FAULT, done.stdout + done.stderr
    assert "test_faulty has cost the process its GPU" in done.stdout
    assert "2 passed" in done.stdout


def test_of_several_workers_another_takes_over(tmp_path: Path) -> None:
    done = run(tmp_path, TESTS.format(error=ILLEGAL), "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running 'test_some.py::test_faulty'" in done.stdout
    # Its own report was on its way already.
    assert "1 failed, 3 passed" in done.stdout


@pytest.mark.parametrize(
    "error", ["cudaErrorNoDevice: no CUDA-capable device is detected", "cudaErrorInsufficientDriver"]
)
def test_where_there_is_no_gpu_nothing_is_lost(tmp_path: Path, error: str) -> None:
    done = run(tmp_path, TESTS.format(error=error), "-p", "no:xdist")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.parametrize(
    ("limit", "does", "arguments"),
    [
        pytest.param("", "cupy.wait()", ["--timeout", "2"], marks=pytest.mark.slow),
        ("@pytest.mark.timeout(2)", "cupy.wait()", []),
        pytest.param("@pytest.mark.timeout(2, 'signal')", "cupy.wait()", [], marks=pytest.mark.slow),
        pytest.param("@pytest.mark.timeout(2, func_only=True)", "cupy.wait()", [], marks=pytest.mark.slow),
        ("@pytest.mark.timeout(2)", "cupy.endless = True", []),  # whoever looks after it waits
    ],
)
def test_a_kernel_that_never_ends_costs_its_worker_alone(
    tmp_path: Path, limit: str, does: str, arguments: list[str]
) -> None:
    done = run(tmp_path, HUNG.format(limit=limit, does=does), "-n", "1", *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running 'test_some.py::test_hung'" in done.stdout
    reported = 3 if does == "cupy.endless = True" else 2  # its own report too, as it passed
    assert f"1 failed, {reported} passed" in done.stdout


def test_what_waits_at_barriers_is_not_waited_for_for_long() -> None:
    launching = test_specialised.test_every_launch_gives_the_same_bits_and_they_are_right
    for marks in (test_gluon.pytestmark, launching.pytestmark):  # type: ignore[attr-defined]
        limits = {mark.name: mark.args for mark in marks}
        assert "gpu" in limits
        assert 40 <= limits["timeout"][0] <= 60


def test_alone_it_ends_the_run(tmp_path: Path) -> None:
    done = run(tmp_path, HUNG.format(limit="@pytest.mark.timeout(2)", does="cupy.wait()"), "-p", "no:xdist")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "in test_hung" in done.stdout + done.stderr


SKIPPED = """
import pytest

@pytest.mark.gpu
def test_one():
    pytest.skip("no GPU")

@pytest.mark.gpu
def test_other():
    {does}
"""


@pytest.mark.parametrize(
    ("does", "selected", "said"),
    [("pytest.skip()", "gpu", True), ("pass", "gpu", False), ("pytest.skip()", "not slow", False)],
)
def test_a_gpu_run_in_which_nothing_ran_says_so(tmp_path: Path, does: str, selected: str, said: bool) -> None:
    done = run(tmp_path, SKIPPED.format(does=does), "-p", "no:xdist", "-m", selected)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("no GPU test ran: every one was skipped" in done.stdout) is said

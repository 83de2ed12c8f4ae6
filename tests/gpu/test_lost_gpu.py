"""What becomes of GPU tests when a kernel's fault has cost their process the GPU, rehearsed with a stand-in driver."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.tuner.measure import EXIT_AFTER_FAULT

CONFTEST = """
import sys
from types import ModuleType, SimpleNamespace
from tests.gpu.conftest import pytest_runtest_protocol  # noqa: F401

class CUDARuntimeError(RuntimeError):
    pass

cupy = ModuleType("cupy")
cupy.faults = []
def synchronize():
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


def run(folder: Path, error: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(TESTS.format(error=error))
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
    done = run(tmp_path, "cudaErrorIllegalAddress: an illegal memory access was encountered", "-p", "no:xdist")
    assert done.returncode == EXIT_AFTER_FAULT, done.stdout + done.stderr
    assert "test_faulty has cost the process its GPU" in done.stdout
    assert "2 passed" in done.stdout


def test_of_several_workers_another_takes_over(tmp_path: Path) -> None:
    done = run(tmp_path, "cudaErrorIllegalAddress: an illegal memory access was encountered", "-n", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "crashed while running 'test_some.py::test_faulty'" in done.stdout
    # Its own report was on its way already.
    assert "1 failed, 3 passed" in done.stdout


@pytest.mark.parametrize(
    "error", ["cudaErrorNoDevice: no CUDA-capable device is detected", "cudaErrorInsufficientDriver"]
)
def test_where_there_is_no_gpu_nothing_is_lost(tmp_path: Path, error: str) -> None:
    done = run(tmp_path, error, "-p", "no:xdist")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout

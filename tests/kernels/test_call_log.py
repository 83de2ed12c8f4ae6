"""What a process called: each problem once, with what it got, and in a file that the tuner reads."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from tilewright.kernels import KERNELS, Call, Choice, GemmConfig, GemmProblem, called, conv2d, gemm
from tilewright.kernels import call_log as module
from tilewright.kernels.call_log import line_of, note
from tilewright.kernels.dispatch import forget_plans, plan_for
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.tuner.suites import read_calls
from tilewright.tuning_db.env import CALLS, FROZEN
from tilewright.tuning_db.record import Provenance

ONE, OTHER = GemmProblem(16, 16, 16), GemmProblem(16, 16, 32, dtype="bf16", b_layout="col")
CONFIG = GemmConfig(16, 16, 16)
KNOWN = Choice(CONFIG, Provenance.PREDICTED, "by the test", 2.5)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch):
    for name in ("_calls", "_known", "_places"):
        monkeypatch.setattr(module, name, {})
    monkeypatch.setattr(module, "_written", set())
    forget_plans()
    yield
    forget_plans()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "calls.txt"
    monkeypatch.setenv(CALLS, str(path))
    return path


def test_each_problem_is_told_of_once_in_the_order_of_calls() -> None:
    x = np.ones((2, 32), np.float32)
    for _ in range(3):
        gemm(x, np.ones((32, 16), np.float32), activation="relu")
        gemm(x, np.ones((16, 32), np.float32).T)
    first, second = called()
    assert (first.op, first.device) == ("gemm", "interpreter")
    assert first.problem == GemmProblem(2, 16, 32, dtype="fp32", activation="relu")
    assert second.problem == GemmProblem(2, 16, 32, dtype="fp32", b_layout="col")
    assert str(second).startswith("gemm M=2,N=16,K=32,dtype=fp32,b_layout=col on interpreter: interpreted: GemmConfig(")


def test_a_convolution_of_single_pixels_is_the_product_that_runs() -> None:
    conv2d(np.ones((1, 4, 4, 8), np.float16), np.ones((8, 1, 1, 8), np.float16))
    assert [call.problem for call in called()] == [GemmProblem(16, 8, 8, b_layout="col")]


def test_what_is_known_of_the_choice_is_said() -> None:
    assert str(Call(ONE, "cuda:1", KNOWN)) == (
        f"gemm M=16,N=16,K=16 on cuda:1: predicted (by the test), 2.5 µs: {CONFIG}"
    )
    assert str(Call(ONE, "cuda:1", Choice(CONFIG, None, "named by the caller"))).endswith(
        f": named by the caller: {CONFIG}"
    )


def test_a_problem_on_two_devices_is_two_calls_and_one_line(file: Path) -> None:
    note(ONE, 0, KNOWN, named=False)
    note(ONE, 1, KNOWN, named=False)
    assert [call.device for call in called()] == ["cuda:0", "cuda:1"]
    assert file.read_text() == "gemm M=16,N=16,K=16\n"


def test_so_many_are_kept(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(module, "MOST_LOGGED", 1)
    note(ONE, 0, Choice(CONFIG, None, "named by the caller"), named=True)
    note(OTHER, 0, KNOWN, named=False)
    note(ONE, 0, KNOWN, named=False)
    assert called() == (Call(ONE, "cuda:0", KNOWN),)
    assert file.read_text() == f"{line_of(OTHER)}\n"


def test_the_file_has_what_a_search_would_serve_and_keeps_what_it_had(file: Path) -> None:
    file.write_text("# of the old server\ngemm M=16,N=16,K=16\n")
    plan_for(GEMM, ONE, -1)
    plan_for(GEMM, GemmProblem(16, 16, 64), -1, config=CONFIG)  # a search would change nothing for this one
    plan_for(GEMM, OTHER, -1)
    forget_plans()
    plan_for(GEMM, OTHER, -1)
    assert file.read_text() == (
        "# of the old server\ngemm M=16,N=16,K=16\ngemm M=16,N=16,K=32,dtype=bf16,b_layout=col\n"
    )


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_problem_is_read_as_it_was(kernel, tmp_path: Path) -> None:
    problems = list(dict.fromkeys(problem for _, problem, _ in kernel.feature_cases))
    path = tmp_path / "calls.txt"
    path.write_text("".join(f"{line_of(problem)}\n" for problem in problems))
    assert [workload.problem for workload in read_calls(path)] == problems


def test_processes_that_write_at_once_lose_and_mix_nothing(tmp_path: Path) -> None:
    path = tmp_path / "calls.txt"
    program = (
        "import sys; from tilewright.kernels import Choice, GemmConfig, GemmProblem\n"
        "from tilewright.kernels.call_log import note\n"
        "choice = Choice(GemmConfig(16, 16, 16), None, 'by the test')\n"
        "for size in range(1, 200): note(GemmProblem(size, int(sys.argv[1]), 16), 0, choice, named=False)\n"
    )
    environment = {**os.environ, CALLS: str(path)}
    running = [subprocess.Popen([sys.executable, "-c", program, str(n)], env=environment) for n in (1, 2, 3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert {workload.problem for workload in read_calls(path)} == {
        GemmProblem(size, n, 16) for size in range(1, 200) for n in (1, 2, 3)
    }


def test_a_file_that_cannot_be_written_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALLS, str(tmp_path))
    with pytest.warns(
        RuntimeWarning, match=r"TILEWRIGHT_CALLS=\S+ can't be written \(Is a directory\): what is called"
    ):
        note(ONE, 0, KNOWN, named=False)
    assert called() == (Call(ONE, "cuda:0", KNOWN),)


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        monkeypatch.setenv(CALLS, str(path))
        module._written.clear()
        with pytest.warns(
            RuntimeWarning, match=f"TILEWRIGHT_CALLS={path} is no file: what is called is not noted there"
        ):
            note(ONE, 0, KNOWN, named=False)


def test_a_call_that_was_commented_out_stays_so(file: Path) -> None:
    file.write_text(f"# {line_of(ONE)}\n#{line_of(OTHER)}\n")
    before = file.read_text()
    note(ONE, 0, KNOWN, named=False)
    note(OTHER, 0, KNOWN, named=False)
    assert file.read_text() == before


def test_the_file_stays_where_it_was_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CALLS, "calls.txt")
    monkeypatch.chdir(tmp_path)
    note(ONE, 0, KNOWN, named=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    note(OTHER, 0, KNOWN, named=False)
    assert (tmp_path / "calls.txt").read_text() == f"{line_of(ONE)}\n{line_of(OTHER)}\n"
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_last_line_without_an_end_stays_one_of_its_own(file: Path) -> None:
    file.write_text("gemm M=64,N=64,K=64")
    note(ONE, 0, KNOWN, named=False)
    note(OTHER, 0, KNOWN, named=False)
    assert file.read_text() == f"gemm M=64,N=64,K=64\n{line_of(ONE)}\n{line_of(OTHER)}\n"


def test_a_folder_that_is_gone_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALLS, "calls.txt")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.warns(
        RuntimeWarning, match=r"TILEWRIGHT_CALLS=calls\.txt can't be written \(No such file or directory\)"
    ):
        note(ONE, 0, KNOWN, named=False)
    assert called() == (Call(ONE, "cuda:0", KNOWN),)


def test_a_full_disk_is_a_warning(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: 3)
    with pytest.warns(RuntimeWarning, match="its last line is cut, for there is no more room: remove that line"):
        note(ONE, 0, KNOWN, named=False)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(RuntimeWarning, match=r"can't be written \(No space left on device\)"):
        note(OTHER, 0, KNOWN, named=False)


def test_a_frozen_process_writes_nothing_and_says_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FROZEN, "1")
    with pytest.warns(RuntimeWarning, match="nothing is noted, for TILEWRIGHT_FROZEN is set"):
        note(ONE, 0, KNOWN, named=False)
    assert not file.exists()


def test_without_the_variable_nothing_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALLS, "")
    monkeypatch.setattr(module, "_write", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note(ONE, 0, KNOWN, named=False)


def test_a_home_that_there_is_not_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALLS, "~nobody-of-that-name/calls.txt")
    with pytest.warns(
        RuntimeWarning, match=r"TILEWRIGHT_CALLS '~nobody-of-that-name/calls\.txt' can't be found: .*not noted"
    ):
        plan_for(GEMM, ONE, -1)
    assert [call.problem for call in called()] == [ONE]

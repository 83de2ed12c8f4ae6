"""The parent: replies in spite of every fault, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, as_completed
from pathlib import Path
from typing import Any

import pytest

from tilewright.tuner.pool import KILL_SECONDS, MOST_JOBS, Pool, Worker
from tilewright.tuner.temporary import PREFIX
from tilewright.tuner.worker import LAST_WORD_SECONDS
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import MachineError, UsageError, WorkerError

FAULTY = (sys.executable, "-P", str(Path(__file__).with_name("faulty_worker.py")))
SAY = {"do": "echo", "say": "hello"}

PROMPT_S = 20.0
"""Far longer than a busy machine takes to kill a process, and shorter than what goes wrong: a hang is of minutes, and
what outlives SIGKILL is waited for `KILL_SECONDS`."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One worker: what it says after a fault shows that the fault cost nothing else."""
    with Pool(1, command=FAULTY) as made:
        yield made


def ask(pool: Pool, timeout: float = 30, **request: Any) -> dict[str, Any]:
    return pool.submit(request, timeout).result(timeout=60)


def gone(pid: int) -> bool:
    """Whether a process has ended, with all its threads; one that its parent has yet to reap has."""
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "Z" for thread in threads)
    except (FileNotFoundError, ProcessLookupError):
        return not Path(f"/proc/{pid}").exists()


def wait_for(condition: Any, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def read_pids(file: Path, lines: int = 1) -> list[int]:
    assert wait_for(lambda: file.exists() and file.read_text().count("\n") >= lines), "no task hangs yet"
    return [int(pid) for pid in file.read_text().split()]


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        (
            {"do": "compile", "fault": "abort"},
            "compile_error",
            "the compiler aborted (SIGABRT): Pipeliner.cpp:42: Assertion `numStages > 1' failed.",
        ),
        ({"do": "measure", "fault": "segfault"}, "runtime_error", "the measurement crashed (SIGSEGV)"),
        (
            {"do": "compile", "fault": "die", "signal": "SIGKILL"},
            "compile_error",
            "the compiler was killed (SIGKILL), perhaps for want of memory",
        ),
        ({"do": "leave", "code": 3}, "runtime_error", "the worker ended with exit status 3"),
        ({"do": "leave", "code": 0}, "runtime_error", "the worker ended with exit status 0"),
    ],
    ids=lambda value: value.get("fault", value["do"]) if isinstance(value, dict) else None,
)
def test_a_death_is_a_reply_and_the_next_request_is_answered(
    pool: Pool, request_: dict[str, Any], status: str, message: str
) -> None:
    assert ask(pool, **SAY)["said"] == "hello"
    starts = pool.starts
    killed = {"killed": True} if "SIGKILL" in message else {}
    assert ask(pool, **request_) == {"status": status, "message": message, **killed}
    assert ask(pool, **SAY)["said"] == "hello"
    assert pool.starts == starts + (2 if killed and request_["do"] == "compile" else 1)


@pytest.mark.parametrize("noisy", [False, True])
def test_a_hang_costs_its_timeout_and_takes_its_children_along(pool: Pool, tmp_path: Path, noisy: bool) -> None:
    ask(pool, **SAY)
    start = time.monotonic()
    reply = ask(pool, timeout=0.5, do="compile", fault="hang", pids=str(tmp_path / "pids"), noisy=noisy)
    assert reply == {"status": "timeout", "message": "no answer in 0.5 s: killed"}
    assert 0.5 <= time.monotonic() - start < PROMPT_S
    for pid in read_pids(tmp_path / "pids"):
        assert wait_for(lambda pid=pid: gone(pid))
    assert ask(pool, **SAY)["said"] == "hello"


def test_a_worker_killed_between_requests_is_no_fault_of_the_next(pool: Pool) -> None:
    pid = ask(pool, **SAY)["pid"]
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: gone(pid))
    reply = ask(pool, **SAY)
    assert reply["said"] == "hello"
    assert reply["pid"] != pid


def test_a_worker_killed_from_outside_in_a_request(pool: Pool, tmp_path: Path) -> None:
    future = pool.submit({"do": "measure", "fault": "hang", "pids": str(tmp_path / "pids")}, timeout=60)
    worker, child = read_pids(tmp_path / "pids")
    os.kill(worker, signal.SIGKILL)
    assert future.result(timeout=10) == {
        "status": "runtime_error",
        "message": "the measurement was killed (SIGKILL), perhaps for want of memory",
        "killed": True,
    }
    assert wait_for(lambda: gone(child))


def test_a_compiler_that_somebody_killed_gets_a_second_try_behind_all_others(pool: Pool, tmp_path: Path) -> None:
    request = {"do": "compile", "fault": "die", "signal": "SIGKILL"}
    once = pool.submit({**request, "once": str(tmp_path / "once")}, 30)
    twice = pool.submit(request, 30)
    other = pool.submit(SAY, 30)
    order: list[Any] = []
    for future in (once, twice, other):
        future.add_done_callback(order.append)
    assert once.result(60) == {"status": "ok"}
    assert "the compiler was killed (SIGKILL)" in twice.result(60)["message"]
    assert order == [other, once, twice]
    assert ask(pool, **SAY)["said"] == "hello"


def test_what_a_task_raises_or_prints_costs_no_process(pool: Pool) -> None:
    pid = ask(pool, **SAY)["pid"]
    assert ask(pool, do="fail", key="arch") == {"status": "runtime_error", "message": "KeyError: 'arch'"}
    assert ask(pool, do="compile", fault="fail", key="arch")["status"] == "compile_error"
    assert "not JSON compliant" in ask(pool, do="not_json")["message"]
    assert ask(pool, do="chatter", say="still here") == {"status": "ok", "said": "still here"}
    assert ask(pool, do="shout") == {"status": "ok"}
    assert ask(pool, **SAY)["pid"] == pid


def test_what_the_machine_fails_in_is_no_reply_and_costs_no_process(pool: Pool) -> None:
    pid = ask(pool, **SAY)["pid"]
    with pytest.raises(MachineError) as caught:
        ask(pool, do="compile", fault="fill")
    assert str(caught.value) == (
        "the machine failed the compiler, which is no fault of a configuration and not on record: /full/disk: No space "
        "left on device: make room, or name another place in TRITON_CACHE_DIR and TMPDIR; the same command goes on "
        "from there"
    )
    assert ask(pool, **SAY)["pid"] == pid


def test_a_request_that_is_no_json_fails_alone(pool: Pool) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        ask(pool, do="echo", say=object())
    assert ask(pool, **SAY)["said"] == "hello"


def test_a_large_request_and_reply_pass(pool: Pool) -> None:
    text = "µ" * 300_000  # several times what a pipe holds
    assert ask(pool, do="echo", say=text)["said"] == text


READY = """print('{"id": 0, "reply": {"status": "ok"}}', flush=True); input()\n"""


@pytest.mark.parametrize(
    "nonsense",
    [
        "print('Segmentation fault')",
        "print('[]')",
        """print('{"id": 1}')""",
        """print('{"id": 1, "reply": {"status": "splendid"}}')""",
        """print('{"id": 2, "reply": {"status": "ok"}}')""",
        "print('[' * 100_000)",
        """print('{"id": 1, "reply": {"status": "ok"}}\\\\n{}')""",
        r"sys.stdout.buffer.write(b'\xff\x00\n')",
    ],
)
def test_nonsense_for_a_reply_is_a_fault(nonsense: str) -> None:
    script = f"import sys, time\n{READY}\n{nonsense}\nsys.stdout.flush()\ntime.sleep(60)"
    with Pool(1, command=(sys.executable, "-S", "-c", script)) as pool:
        for starts in (1, 2) if nonsense == "print('[]')" else (1,):
            reply = ask(pool, do="compile") if starts == 1 else ask(pool, do="measure")
            assert reply["status"] == ("compile_error" if starts == 1 else "runtime_error")
            assert "sent what is no reply: b" in reply["message"]
            assert pool.starts == starts


@pytest.fixture
def undead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that seemed to outlive SIGKILL: the first to be waited for after it."""
    found: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def never_at_first(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout == KILL_SECONDS and not found:
            found.append(process)
            raise subprocess.TimeoutExpired(process.args, timeout)
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", never_at_first)
    yield found
    for process in found:
        wait(process, PROMPT_S)


@pytest.mark.parametrize(
    "request_",
    [{"do": "measure", "fault": "hang"}, {"do": "measure", "fault": "die", "signal": "SIGKILL"}],
    ids=lambda request: request["fault"],
)
def test_a_request_whose_process_outlives_sigkill_costs_one_worker_and_no_other(
    undead: list[subprocess.Popen[bytes]], tmp_path: Path, request_: dict[str, Any]
) -> None:
    with Pool(2, command=FAULTY) as pool:
        pool.start()
        reply = ask(pool, timeout=0.5, pids=str(tmp_path / "pids"), **request_)
        (process,) = undead
        reason = f"worker process {process.pid} outlives SIGKILL by {KILL_SECONDS:g} s: the driver hangs"
        assert reply == {"status": "timeout", "message": f"no answer: {reason}"}
        assert [str(error) for error in pool.lost] == [reason]
        # What it holds is not to be had: the other worker does the rest, and nothing is started in its place.
        pids = {ask(pool, **SAY)["pid"] for _ in range(3)}
        assert len(pids) == 1
        assert process.pid not in pids
        assert pool.starts == 2


def test_the_last_worker_whose_process_outlives_sigkill_fails_all_that_waits(
    undead: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    with Pool(1, command=FAULTY) as pool:
        pool.start()
        hung = pool.submit({"do": "measure", "fault": "hang", "pids": str(tmp_path / "pids")}, 0.5)
        waiting = pool.submit(SAY, 30)
        assert hung.result(PROMPT_S)["status"] == "timeout"
        with pytest.raises(WorkerError, match="outlives SIGKILL by 30 s: the driver hangs"):
            waiting.result(PROMPT_S)
        assert len(undead) == len(pool.lost) == pool.starts == 1


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((sys.executable, "-S", "-c", "import tritonn"), "ModuleNotFoundError: No module named 'tritonn'"),
        ((sys.executable, "-S", "-c", ""), "it ended with exit status 0"),
        ((sys.executable, "-S", "-c", "print('hello')"), r"it said b'hello\\n'"),
        (("/no/such/python",), "No such file or directory: '/no/such/python'"),
    ],
)
def test_a_worker_that_never_starts_is_an_error_and_not_a_loop(command: Sequence[str], reason: str) -> None:
    with Pool(2, command=command) as pool:
        futures = [pool.submit(SAY, timeout=30) for _ in range(5)]
        for future in futures:
            with pytest.raises(WorkerError, match=reason):
                future.result(timeout=20)
        with pytest.raises(WorkerError, match="can't be started"):
            pool.submit(SAY, timeout=30)
        with pytest.raises(WorkerError, match="can't be started"):
            pool.start()
        assert pool.starts <= 2 * 2


def test_a_worker_that_can_not_start_leaves_its_work_to_the_others(tmp_path: Path) -> None:
    # The first process to make the folder serves; every other start fails.
    script = "import os, sys, runpy; os.mkdir(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
    command = (sys.executable, "-P", "-c", script, str(tmp_path / "taken"), FAULTY[-1])
    with Pool(3, command=command) as pool:
        futures = [pool.submit({"do": "sleep", "seconds": 0.05}, timeout=30) for _ in range(8)]
        assert len({future.result(timeout=20)["pid"] for future in futures}) == 1


def test_start_up_is_paid_once_per_worker() -> None:
    with Pool(2, command=FAULTY) as pool:
        assert pool.starts == 0
        pool.start(wait=False)
        pool.start()
        assert pool.starts == 2
        replies = [future.result() for future in [pool.submit(SAY, timeout=30) for _ in range(50)]]
        assert len({reply["pid"] for reply in replies}) <= 2
        assert pool.starts == 2


def test_two_workers_work_at_the_same_time() -> None:
    with Pool(2, command=FAULTY) as pool:
        pool.start()
        futures = [pool.submit({"do": "sleep", "seconds": 0.3}, timeout=30) for _ in range(2)]
        first, second = (future.result() for future in as_completed(futures))
        assert first["pid"] != second["pid"]
        assert max(first["start"], second["start"]) < min(first["end"], second["end"])


def test_each_worker_has_arguments_of_its_own() -> None:
    with Pool(2, command=FAULTY, arguments=[("--gpu", "3"), ("--gpu", "1")]) as pool:
        pool.start()
        for _ in range(2):
            futures = [pool.submit({"do": "sleep", "seconds": 0.3}, timeout=30) for _ in range(2)]
            assert sorted(future.result()["arguments"] for future in futures) == [["--gpu", "1"], ["--gpu", "3"]]
    with pytest.raises(UsageError, match="jobs=3 workers need as many"):
        Pool(3, arguments=[(), ()])


def test_one_worker_answers_in_order(pool: Pool) -> None:
    futures = [pool.submit({"do": "sleep", "seconds": 0.01}, timeout=30) for _ in range(5)]
    starts = [future.result()["start"] for future in futures]
    assert starts == sorted(starts)


def test_the_interpreter_switch_stays_with_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TILEWRIGHT_TEST", "kept")
    with Pool(1, command=FAULTY) as pool:
        environ = ask(pool, do="environ")["environ"]
    assert "TRITON_INTERPRET" not in environ
    assert environ["TILEWRIGHT_TEST"] == "kept"


def test_a_pool_has_workers() -> None:
    for jobs in (0, MOST_JOBS + 1):
        with pytest.raises(UsageError, match=f"jobs={jobs} must be from 1 to 1024"):
            Pool(jobs)


# --- ending -----------------------------------------------------------------------------------------------------------


def test_close_kills_cancels_and_leaves_nothing(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())), set(threading.enumerate())
    with Pool(2, command=FAULTY) as pool:
        tmpdir = Path(ask(pool, **SAY)["tmpdir"])
        assert tmpdir.is_dir()
        hang = {"do": "hang", "pids": str(tmp_path / "pids")}
        futures = [pool.submit(hang, timeout=600) for _ in range(4)]
        pids = read_pids(tmp_path / "pids", lines=2)
        futures.append(pool.submit(SAY, timeout=30))
        start = time.monotonic()
    assert time.monotonic() - start < PROMPT_S
    # As `as_completed` sees them: each one has ended.
    for future in as_completed(futures, timeout=5):
        with pytest.raises(CancelledError):
            future.result()
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids[::2]), "our own children are reaped"
    assert (len(list(Path("/proc/self/fd").iterdir())), set(threading.enumerate())) == before
    assert not tmpdir.exists()
    with pytest.raises(WorkerError, match="closed"):
        pool.submit(SAY, timeout=30)
    pool.close()


def test_a_closed_worker_stays_closed() -> None:
    worker = Worker(FAULTY)
    assert worker.request(SAY, 30)["said"] == "hello"
    worker.close()
    with pytest.raises(WorkerError, match="closed"):
        worker.request(SAY, 30)
    assert worker.starts == 1
    never = Worker(FAULTY)
    never.close()
    with pytest.raises(WorkerError, match="closed"):
        never.start()
    assert never.starts == 0


PARENT = """
import sys, threading
from tilewright.tuner.pool import Pool

def main():
    with Pool(2, command=sys.argv[2:]) as pool:
        print(pool.submit({"do": "echo", "say": ""}, 30).result()["pid"], flush=True)
        pool.start()
        hung = pool.submit({"do": "hang", "pids": sys.argv[1]}, 600)
        waiting = [pool.submit({"do": "hang", "pids": sys.argv[1]}, 600) for _ in range(2)]
        try:
            hung.result()
        except KeyboardInterrupt:
            pool.close()
            print("interrupted", *(future.done() for future in [hung, *waiting]), threading.active_count(), flush=True)
            raise
"""


def run_parent(script: str, pids: Path) -> subprocess.Popen[str]:
    command = (sys.executable, "-P", "-X", "dev", "-W", "error", "-c", script, str(pids), *FAULTY)
    return subprocess.Popen(
        command,
        # A parent that is killed leaves its workers' temporary folders behind.
        env={**compiling_environment(), "TMPDIR": str(pids.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with run_parent(f"{PARENT}\nmain()", tmp_path / "pids") as parent:
        try:
            pids = read_pids(tmp_path / "pids", lines=2)  # two that hang, each with a child
            assert not any(gone(pid) for pid in pids)
        finally:
            parent.kill()
        parent.communicate(timeout=10)
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in pids)
    # The temporary folders of its workers are still there, until a pool is made.
    assert len(list(tmp_path.glob(f"{PREFIX}*"))) == 2
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Pool(1, command=FAULTY).close()
    assert not list(tmp_path.glob(f"{PREFIX}*"))


def test_a_worker_whose_compiler_holds_the_lock_ends_with_its_time_where_the_parent_is_gone(tmp_path: Path) -> None:
    script = """
import sys
from tilewright.tuner.pool import Pool
Pool(1, command=sys.argv[2:]).submit({"do": "lock", "pids": sys.argv[1]}, 2.0).result()
"""
    with run_parent(script, tmp_path / "pids") as parent:
        try:
            (pid,) = read_pids(tmp_path / "pids")
        finally:
            parent.kill()
        parent.communicate(timeout=10)
    assert wait_for(lambda: gone(pid), 2.0 + LAST_WORD_SECONDS + 5)


def test_a_worker_whose_compiler_holds_the_lock_is_killed_like_any_other(pool: Pool, tmp_path: Path) -> None:
    reply = ask(pool, timeout=0.5, do="lock", pids=str(tmp_path / "pids"))
    assert reply == {"status": "timeout", "message": "no answer in 0.5 s: killed"}
    assert wait_for(lambda: gone(read_pids(tmp_path / "pids")[0]))


def test_a_request_leaves_no_alarm_behind(pool: Pool) -> None:
    pid = ask(pool, timeout=0.2, **SAY)["pid"]
    time.sleep(0.2 + LAST_WORD_SECONDS + 0.2)
    assert ask(pool, **SAY)["pid"] == pid


def test_control_c_ends_it_all_at_once(tmp_path: Path) -> None:
    with run_parent(f"{PARENT}\nmain()", tmp_path / "pids") as parent:
        try:
            pids = read_pids(tmp_path / "pids", lines=2)
            os.killpg(parent.pid, signal.SIGINT)  # as the terminal does: to the whole group
            out, err = parent.communicate(timeout=PROMPT_S)
        finally:
            parent.kill()
    assert parent.returncode == -signal.SIGINT
    assert out.splitlines()[1] == "interrupted True True True 1"
    assert err.count("Traceback") == 1, "the parent's own"
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in pids)


def test_a_pool_nobody_closes_does_not_hold_the_interpreter(tmp_path: Path) -> None:
    script = """
import os, sys, time
from tilewright.tuner.pool import Pool
pool = Pool(1, command=sys.argv[2:])
pool.submit({"do": "hang", "pids": sys.argv[1]}, 600)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
"""
    with run_parent(script, tmp_path / "pids") as parent:
        out, err = parent.communicate(timeout=20)
    assert (parent.returncode, out, err) == (0, "", "")
    assert all(wait_for(lambda pid=pid: gone(pid)) for pid in read_pids(tmp_path / "pids"))

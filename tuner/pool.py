"""The parent's side of the tuner's worker processes: killable, cheap per task, paid for once per run.

    with Pool(jobs) as pool:
        futures = [pool.submit({"do": "compile", …}, timeout=30) for …]
        for future in as_completed(futures):
            reply = future.result()  # {"status": "ok", …}

`Pool(1)` answers in the order asked, which is what a GPU needs. A request that makes its worker crash, hang or talk
nonsense gets a reply that says so, with a `Status` like any other; the worker is started again for the next request,
and nothing else is lost. Where the machine failed it, such as by a full disk, there is no reply but a `MachineError`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from types import TracebackType
from typing import Any, NamedTuple, Self, overload

from tilewright.tuner.requests import (
    BuildReply,
    BuildRequest,
    CompileReply,
    CompileRequest,
    FinalistsReply,
    FinalistsRequest,
    MeasureReply,
    MeasureRequest,
    Reply,
)
from tilewright.tuner.temporary import WorkerFolder, remove_abandoned
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import MachineError, UsageError, WorkerError
from tilewright.tuning_db.record import Status, read_json

COMMAND = (sys.executable, "-P", "-m", "tilewright.tuner.worker")
"""Starts a worker. -P: the working directory may hold modules of anybody's, under any name."""

START_SECONDS = 120.0
"""How long a worker may import: about a second, but for a cold disk across a network."""

START_ATTEMPTS = 2
"""Starts that fail in a row until a worker is given up: the second rules out a passing want of memory."""

KILL_SECONDS = 30.0
"""How long a killed process may take to die: the driver first waits for, or resets, what runs on the GPU."""

END_SECONDS = 5.0
"""How long a process whose pipes have ended may take to end itself: a second is too short on a busy machine."""

STDERR_BYTES = 16384
"""How much of a worker's latest stderr is kept, to say why it died."""

REPLY_BYTES = 1 << 24
"""A longer reply is a worker gone wild."""

MOST_JOBS = 1024
"""Workers of a pool, each of which takes a thread here and some 100 MB: more than machines have processors for. (A
judgement.)"""

_FAULTS = {
    "compile": (Status.COMPILE_ERROR, "the compiler"),
    "build": (Status.COMPILE_ERROR, "the compiler"),
    "measure": (Status.RUNTIME_ERROR, "the measurement"),
}

_KILLED = "was killed (SIGKILL), perhaps for want of memory"


class Worker:
    """One worker process. Any thread may call any method; requests take turns.

    `environment` is the child's whole environment, `compiling_environment()` when left out.
    """

    def __init__(self, command: Sequence[str] = COMMAND, environment: Mapping[str, str] | None = None) -> None:
        self._command = tuple(command)
        self._environment = compiling_environment() if environment is None else dict(environment)
        self._turn = threading.RLock()  # one start or request at a time
        self._fate = threading.Lock()  # of birth, signal and burial: none is ever signalled that is not ours
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: WorkerFolder | None = None
        self._closed = False
        self.given_up: WorkerError | None = None
        """Why it will not be started again, if that is so."""
        self._ready = False
        self._serial = 0
        self._stderr = b""
        self.starts = 0
        """Processes started so far."""

    def start(self, wait: bool = True) -> None:
        """Starts the process unless it runs; with `wait`, returns when it is ready for requests.

        Raises:
            WorkerError: it can't be started, or the worker is closed.
        """
        with self._turn:
            if self.given_up is not None:
                raise self.given_up
            if self._process is not None and self._ended():
                self._bury()
                if self.given_up is not None:
                    raise self.given_up
            reason = ""
            for _ in range(START_ATTEMPTS):
                try:
                    if self._process is None:
                        self._spawn()
                    if wait and not self._ready:
                        self._exchange(0, b"", START_SECONDS)
                        self._ready = True
                    return
                except TimeoutError:
                    self._bury()
                    reason = f"not ready in {START_SECONDS:g} s"
                except _NonsenseError as error:
                    self._bury()
                    reason = f"it said {error}"
                except _EndedError:
                    manner, last = self._obituary()
                    reason = last or f"it {manner}"
                except OSError as error:
                    reason = str(error)
                if self.given_up is not None:
                    raise self.given_up  # the process that was killed is there still
            self.given_up = WorkerError(f"a worker process can't be started ({' '.join(self._command)}): {reason}")
            raise self.given_up

    def request(self, request: Mapping[str, Any], timeout: float) -> Reply:
        """The worker's reply, or one that says why there is none.

        It comes within about `timeout` seconds of the process being ready. `killed` is True in it if somebody else has
        killed the process (SIGKILL), or its ptxas, which may be no fault of the request. A request whose process can't
        be killed has the status `timeout`, and the worker is given up.

        Raises:
            WorkerError: the process can't be started, or the worker is closed.
            MachineError: the machine failed the task, which says nothing about what was asked.
        """
        status, who = _FAULTS.get(str(request.get("do")), (Status.RUNTIME_ERROR, "the worker"))
        with self._turn:
            self.start()
            killed = False
            self._serial += 1
            self._stderr = b""
            envelope = {"id": self._serial, "timeout": timeout, "request": dict(request)}
            line = json.dumps(envelope).encode() + b"\n"
            try:
                message = self._exchange(self._serial, line, timeout)
            except TimeoutError:
                self._bury()
                status, fault = Status.TIMEOUT, f"no answer in {timeout:g} s: killed"
            except _NonsenseError as error:
                self._bury()
                fault = f"{who} sent what is no reply: {error}"
            except _EndedError:
                manner, last = self._obituary()
                if self._closed:
                    raise WorkerError("the worker was closed while it worked") from None
                killed = manner == _KILLED
                fault = f"{who} {manner}: {last}" if last else f"{who} {manner}"
            except BaseException:
                self._bury()  # an answer still to come would be taken for the next one
                raise
            else:
                if "machine" in message:
                    raise MachineError(
                        f"the machine failed {who}, which is no fault of a configuration and not on record: "
                        f"{message['machine']}; the same command goes on from there"
                    )
                if "error" not in message:
                    reply: Reply = message["reply"]
                    return reply
                fault = message["error"]
            if self.given_up is not None:
                # It may do to the next GPU what it did to this one: so it is not for another worker to try.
                status, killed, fault = Status.TIMEOUT, False, f"no answer: {self.given_up}"
            failure: Reply = {"status": status, "message": fault}
            if killed:
                failure["killed"] = True
            return failure

    def kill(self) -> None:
        """Kills the process now, in the midst of a request if there is one; it is never started again."""
        self._closed = True
        with self._fate:
            self._signal()

    def close(self) -> None:
        """Kills the process and gives back all it held."""
        self.kill()
        with self._turn:
            self._bury()
            if self._folder is not None:
                self._folder.remove()
                self._folder = None

    def _spawn(self) -> None:
        with self._fate:
            if self._closed:
                raise WorkerError("the worker is closed")
            if self._folder is None:
                # A compiler that is killed leaves its temporary files behind: they go when the worker is closed.
                self._folder = WorkerFolder()
            process = subprocess.Popen(
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**self._environment, "TMPDIR": str(self._folder.path)},
                start_new_session=True,
            )
            self._process = process
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        self.starts += 1
        self._ready = False
        self._stderr = b""

    def _exchange(self, serial: int, line: bytes, timeout: float) -> dict[str, Any]:
        """Sends a line and returns the message that answers it. Writing can't block: a hung worker doesn't read."""
        into, out, err = self._pipes()
        poll = select.poll()
        for descriptor in (out, err):
            poll.register(descriptor, select.POLLIN)
        if line:
            poll.register(into, select.POLLOUT)
        deadline = time.monotonic() + timeout
        received = bytearray()
        while (remaining := deadline - time.monotonic()) > 0:
            for descriptor, _ in poll.poll(remaining * 1000):
                if descriptor == into:
                    try:
                        line = line[os.write(into, line) :]
                    except BrokenPipeError:
                        line = b""  # it has ended: so will its replies
                    if not line:
                        poll.unregister(into)
                elif descriptor == err:
                    if not self._drain_stderr():
                        poll.unregister(err)
                else:
                    chunk = os.read(out, 1 << 16)
                    if not chunk:
                        raise _EndedError
                    received += chunk
                    if b"\n" in chunk or len(received) > REPLY_BYTES:
                        return _parse(bytes(received), serial)
        raise TimeoutError

    def _pipes(self) -> tuple[int, int, int]:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        return self._process.stdin.fileno(), self._process.stdout.fileno(), self._process.stderr.fileno()

    def _drain_stderr(self) -> bool:
        """Keeps the end of what stderr has for now; False when there will be no more."""
        # No more rounds than a full pipe needs: what prints without end must not keep us from the clock.
        with contextlib.suppress(BlockingIOError):
            for _ in range(16):
                chunk = os.read(self._pipes()[2], 1 << 16)
                if not chunk:
                    return False
                self._stderr = (self._stderr + chunk)[-STDERR_BYTES:]
        return True

    def _obituary(self) -> tuple[str, str]:
        """Buries the process; how it ended, as in `aborted (SIGABRT)`, and the reason it printed, "" without one."""
        # Its pipes end a moment before itself, and it is to end by its own cause and not by our signal.
        patience = time.monotonic() + END_SECONDS
        while not self._ended() and time.monotonic() < patience:
            time.sleep(0.005)
        self._drain_stderr()
        return _manner(self._bury()), _reason(self._stderr)

    def _ended(self) -> bool:
        """Whether the process is dead. It is not reaped by this: its number stays ours until its group is killed."""
        assert self._process is not None
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None

    def _signal(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _bury(self) -> int:
        """Kills the process and all it started, and reaps it; its exit status as `subprocess` gives it.

        One that outlives that keeps what it holds, such as a GPU: the worker is given up.
        """
        with self._fate:
            process = self._process
            if process is None:
                return 0
            self._signal()
            self._process = None
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
        try:
            return process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            self.given_up = WorkerError(
                f"worker process {process.pid} outlives SIGKILL by {KILL_SECONDS:g} s: the driver hangs"
            )
            return -signal.SIGKILL


class Pool:
    """`jobs` workers that share one queue, first come first served. Use it as a context manager.

    A process starts at its worker's first request, or at `start`. `command` starts one, in `environment`; worker i
    has `arguments[i]` besides, such as the number of the GPU that is its own.
    """

    def __init__(
        self,
        jobs: int,
        *,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = COMMAND,
        arguments: Sequence[Sequence[str]] = (),
    ) -> None:
        if not 1 <= jobs <= MOST_JOBS:
            raise UsageError(f"{jobs=} must be from 1 to {MOST_JOBS}")
        if arguments and len(arguments) != jobs:
            raise UsageError(f"{jobs=} workers need as many {arguments=}")
        remove_abandoned()  # of runs that were killed
        self.jobs = jobs
        self._workers = [Worker((*command, *each), environment) for each in arguments or [()] * jobs]
        self._changed = threading.Condition()  # guards all below
        self._waiting: deque[_Job] = deque()
        self._serving = jobs  # workers not given up
        self._failure: WorkerError | None = None
        self._closed = False
        # Daemons: a pool that nobody closed must not keep the interpreter from its end, where atexit closes it.
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name=f"tilewright-worker-{index}", daemon=True)
            for index, worker in enumerate(self._workers)
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    @property
    def starts(self) -> int:
        """Processes started so far: at most one per job, but for those that took the place of a dead one."""
        return sum(worker.starts for worker in self._workers)

    @property
    def lost(self) -> tuple[WorkerError, ...]:
        """Why workers were given up, whose work the others do."""
        return tuple(worker.given_up for worker in self._workers if worker.given_up is not None)

    def start(self, wait: bool = True) -> None:
        """Starts every process now; with `wait`, returns when all are ready.

        Raises:
            WorkerError: one can't be started.
        """
        for worker in self._workers:
            worker.start(wait=False)
        if wait:
            for worker in self._workers:
                worker.start()

    @overload
    def submit(self, request: CompileRequest, timeout: float) -> Future[CompileReply]: ...
    @overload
    def submit(self, request: BuildRequest, timeout: float) -> Future[BuildReply]: ...
    @overload
    def submit(self, request: MeasureRequest, timeout: float) -> Future[MeasureReply]: ...
    @overload
    def submit(self, request: FinalistsRequest, timeout: float) -> Future[FinalistsReply]: ...
    def submit(self, request: Mapping[str, Any], timeout: float) -> Future[Any]:
        """The reply to come; of one that its worker can't make, what there is in every `Reply`.

        `timeout` is in seconds from when a worker takes the request up. A compilation whose process, or ptxas, somebody
        else killed waits for another turn, once: behind all others, as the memory that it wanted may be there by then.

        The future raises `WorkerError` if no worker can be started, `MachineError` if the machine failed the task,
        `CancelledError` if the pool is closed first.

        Raises:
            WorkerError: as above, if that is known by now, or the pool is closed.
        """
        job = _Job(Future(), request, timeout)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise WorkerError("the pool is closed")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Kills all processes, whatever they are doing, and cancels all requests."""
        with self._changed:
            self._closed = True
            abandoned = [*self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for worker in self._workers:
            worker.kill()
        for job in abandoned:
            job.fail(CancelledError())
        for worker, thread in zip(self._workers, self._threads, strict=True):
            if thread is not threading.current_thread():
                thread.join()
            worker.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, worker: Worker) -> None:
        while (job := self._take()) is not None:
            try:
                reply = worker.request(job.request, job.timeout)
            except WorkerError as error:
                self._give_up(error, job)
                return
            except Exception as error:  # noqa: BLE001 - belongs to who asked, such as a request that is no JSON
                job.fail(error)
            else:
                killed = reply.get("killed") and reply["status"] == Status.COMPILE_ERROR
                if not (killed and self._put_back(job)):
                    job.future.set_result(reply)
            if worker.given_up is not None:
                self._give_up(worker.given_up)
                return

    def _take(self) -> _Job | None:
        """The next job, waited for; None when the pool is closed."""
        with self._changed:
            while not self._closed:
                while self._waiting:
                    job = self._waiting.popleft()
                    # One that came back from a worker is running already.
                    if job.future.running() or job.future.set_running_or_notify_cancel():
                        return job
                self._changed.wait()
        return None

    def _put_back(self, job: _Job) -> bool:
        """Gives a job its second try; False where it had one, or the pool is closed."""
        with self._changed:
            if self._closed or job.again:
                return False
            self._waiting.append(job._replace(again=True))
            self._changed.notify()
            return True

    def _give_up(self, error: WorkerError, job: _Job | None = None) -> None:
        """One worker fewer: the job that it could not begin goes to another, or every job fails with the last."""
        failed = [job] if job is not None else []
        with self._changed:
            self._serving -= 1
            if not self._closed and self._serving:
                self._waiting.extendleft(failed)
                self._changed.notify()
                return
            if not self._closed:
                self._failure = error
                failed += self._waiting
                self._waiting.clear()
        for each in failed:
            each.fail(CancelledError() if self._closed else error)


class _Job(NamedTuple):
    future: Future[Any]
    request: Mapping[str, Any]
    timeout: float
    again: bool = False  # it is its second try

    def fail(self, error: Exception) -> None:
        if isinstance(error, CancelledError) and self.future.cancel():
            self.future.set_running_or_notify_cancel()  # tells `as_completed` and `wait`
        elif self.future.running() or self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class _EndedError(Exception):
    """The process ended without an answer."""


class _NonsenseError(Exception):
    """What came is no answer to the request."""


def _parse(line: bytes, serial: int) -> dict[str, Any]:
    try:
        message: dict[str, Any] = read_json(line.decode())
        failed = "error" in message or "machine" in message
        if message["id"] == serial and (failed or message["reply"]["status"] in set(Status)):
            return message
    except (ValueError, TypeError, LookupError):
        pass
    raise _NonsenseError(repr(line[:80]))


def _manner(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit status {returncode}"
    name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else f"signal {-returncode}"
    if name == "SIGABRT":
        return f"aborted ({name})"
    if name == "SIGKILL":
        return _KILLED
    return f"crashed ({name})"


def _reason(stderr: bytes) -> str:
    """The last line that sounds like one, for LLVM prints a stack beneath; else the last line."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if any(word in line.lower() for word in ("error", "assert", "fatal"))]
    return (telling or lines or [""])[-1]

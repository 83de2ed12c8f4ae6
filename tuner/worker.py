"""The child process of the tuner: a loop over requests, `python -P -m tilewright.tuner.worker [--gpu N]`.

One JSON object a line comes in on stdin, one goes out on a private copy of fd 1, numbered so that a reply can't be
taken for another request's:

    {"id": 7, "timeout": 60.0, "request": {"do": "compile", …}}  →  {"id": 7, "reply": {"status": "ok", …}}
                                                                 or {"id": 7, "error": "KeyError: 'arch'"}
                                                                 or {"id": 7, "machine": "/tmp: No space left …"}

Line 0 is sent unasked, once everything is imported, and GPU N is in use: one that can't be had is no fault of the
configurations to be measured on it. Nothing is ever unpickled. `pool` is the other end.

The process leads a session of its own. That gives its parent one process group to kill, ptxas included, and keeps
the terminal's Ctrl-C from it without SIGINT being ignored, which every ptxas would inherit. When stdin ends, the
parent is gone or through with it, and it ends too, whatever it is doing. In one case it can't see that: compilers hold
Python's lock, and one that hangs holds it forever. Then SIGALRM ends it when the request's time is up, which it is
the parent's to do.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

from tilewright.tuner.machine import heed_machine_fault, machine_fault, was_killed
from tilewright.tuner.requests import (
    BuildReply,
    BuildRequest,
    CompileReply,
    CompileRequest,
    FinalistsReply,
    FinalistsRequest,
    MeasureReply,
    MeasureRequest,
)
from tilewright.tuning_db.errors import CompileError, TilewrightError
from tilewright.tuning_db.record import Status

Request = Mapping[str, Any]
Reply = Mapping[str, Any]
Task = Callable[[Any], Reply]
"""Answers requests of one kind; `requests` has the fields of each."""

LAST_WORD_SECONDS = 1.0
"""How long a task may go on once stdin has ended, or its time is up."""


def compile_task(request: CompileRequest) -> CompileReply:
    """Compiles one configuration and reports what it takes; a refusal gives `compile_error` and the first line of its
    reason."""
    from tilewright.kernels.compile import compile_launch
    from tilewright.kernels.registry import find_kernel

    kernel = find_kernel(request["op"])
    problem = kernel.problem.from_dict(request["problem"])
    config = kernel.space.config.from_dict(request["config"])
    start = time.perf_counter()
    try:
        binaries = [compile_launch(launch, request["arch"]) for launch in kernel.launches(problem, config)]
    except CompileError as error:
        heed_machine_fault(error)
        seconds = time.perf_counter() - start
        return {
            "status": Status.COMPILE_ERROR,
            "message": str(error),
            "killed": was_killed(error),
            "seconds": seconds,
        }
    names = ("registers", "spill_bytes", "stack_bytes", "shared_bytes")
    return {
        "status": Status.OK,
        "resources": {name: max(getattr(binary.resources, name) for binary in binaries) for name in names},
        "num_warps": max(binary.num_warps for binary in binaries),
        "seconds": time.perf_counter() - start,
    }


def build_task(request: BuildRequest) -> BuildReply:
    """Compiles one configuration and hands the code over: what a pack is made of. A refusal as in `compile_task`."""
    from tilewright.kernels.assemble import without_line_info
    from tilewright.kernels.compile import compile_launch
    from tilewright.kernels.registry import find_kernel

    kernel = find_kernel(request["op"])
    problem = kernel.problem.from_dict(request["problem"])
    config = kernel.space.config.from_dict(request["config"])
    constants = tuple(request["constants"].items())
    try:
        launches = [launch.with_constants(constants) for launch in kernel.launches(problem, config)]
        binaries = [asdict(without_line_info(compile_launch(launch, request["arch"]))) for launch in launches]
    except CompileError as error:
        heed_machine_fault(error)
        return {"status": Status.COMPILE_ERROR, "message": str(error), "killed": was_killed(error)}
    for binary in binaries:
        del binary["arch"], binary["ptx"]
        binary["cubin"] = base64.b64encode(binary["cubin"]).decode()
    return {"status": Status.OK, "binaries": binaries}


def measure_task(request: MeasureRequest | FinalistsRequest) -> MeasureReply | FinalistsReply:
    """Checks and times configurations; see `tilewright.tuner.measure`."""
    from tilewright.tuner.measure import measure

    return measure(request)


TASKS: Mapping[str, Task] = {
    "compile": compile_task,
    "build": build_task,
    "measure": measure_task,
}


def prepare() -> None:
    """Pays for the heavy imports before any request's clock runs."""
    import tilewright.kernels.compile
    import tilewright.kernels.registry  # noqa: F401


def serve(tasks: Mapping[str, Task], prepare: Callable[[], None] = lambda: None) -> None:
    """Answers requests until stdin ends."""
    requests, replies = _take_channels()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # death, which takes no lock
    prepare()
    inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    # Read apart from the work, so that the end of stdin is seen by a process that hangs.
    threading.Thread(target=_receive, args=(requests, inbox), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent died over our answer
        _send(replies, _encode({"id": 0, "reply": {"status": Status.OK}}))
        while (line := inbox.get()) is not None:
            _send(replies, _answer(tasks, line))


def _take_channels() -> tuple[BinaryIO, BinaryIO]:
    """Moves both channels to descriptors that no child inherits; stdin is empty and stdout is stderr from now on.

    Triton and ptxas print their failures to stdout, which would be read as replies.
    """
    requests, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    # What was printed before an abort must be out by then: it is the best reason there is.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb", buffering=0)


def _receive(requests: BinaryIO, inbox: queue.SimpleQueue[bytes | None]) -> None:
    for line in requests:
        inbox.put(line)
    inbox.put(None)
    time.sleep(LAST_WORD_SECONDS)
    # Still here: a task hangs. Its ptxas goes with it.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _answer(tasks: Mapping[str, Task], line: bytes) -> bytes:
    envelope = json.loads(line)
    request = envelope["request"]
    signal.setitimer(signal.ITIMER_REAL, envelope["timeout"] + LAST_WORD_SECONDS)
    try:
        # A reply that JSON can't hold is the task's fault like any other.
        return _encode({"id": envelope["id"], "reply": tasks[request["do"]](request)})
    except Exception as error:  # noqa: BLE001 - whatever a task raises costs that task alone
        if of_machine := machine_fault(error):
            return _encode({"id": envelope["id"], "machine": of_machine})
        kind = "" if isinstance(error, TilewrightError) else f"{type(error).__name__}: "
        fault = kind + _first_line(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return _encode({"id": envelope["id"], "error": fault})


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\n"


def _send(replies: BinaryIO, line: bytes) -> None:
    unsent = memoryview(line)
    while unsent:
        unsent = unsent[replies.write(unsent) :]


def main(arguments: Sequence[str]) -> None:
    """Serves; with `--gpu N`, measurements are on that GPU."""
    if not arguments:
        serve(TASKS, prepare)
        return
    option, number = arguments
    assert option == "--gpu", arguments
    ordinal = int(number)

    def prepare_gpu() -> None:
        from tilewright.tuner.measure import use_gpu

        prepare()
        use_gpu(ordinal)

    def measure_there(request: MeasureRequest | FinalistsRequest) -> MeasureReply | FinalistsReply:
        request["ordinal"] = ordinal
        return measure_task(request)

    serve({**TASKS, "measure": measure_there}, prepare_gpu)


if __name__ == "__main__":
    main(sys.argv[1:])

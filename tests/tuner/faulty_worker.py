"""A worker with tasks that go wrong in every way a compiler or a GPU does; run as a script by `test_pool`."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time

from tilewright.tuner.worker import TASKS, Reply, Request, serve


def echo(request: Request) -> Reply:
    return {"status": "ok", "said": request["say"], "pid": os.getpid(), "tmpdir": os.environ["TMPDIR"]}


def environ(request: Request) -> Reply:
    return {"status": "ok", "environ": dict(os.environ), "pid": os.getpid()}


def sleep(request: Request) -> Reply:
    start = time.monotonic()  # of the whole machine, so two processes' intervals compare
    time.sleep(request["seconds"])
    return {"status": "ok", "start": start, "end": time.monotonic(), "pid": os.getpid(), "arguments": sys.argv[1:]}


def chatter(request: Request) -> Reply:
    """Everything that prints to fd 1 in a compiler, or reads the stdin of its parent."""
    print('{"id": 1, "reply": {"status": "ok"}}')
    os.write(1, b"ptxas fatal: to stdout\n")
    subprocess.run(["sh", "-c", "echo from a child; cat"], check=True)
    return {"status": "ok", "said": request["say"]}


def shout(request: Request) -> Reply:
    """More stderr than a pipe holds, then a reply."""
    sys.stderr.write("x" * 1_000_000 + "\nlast words\n")
    sys.stderr.flush()
    return {"status": "ok"}


def abort(request: Request) -> Reply:
    """What an LLVM assertion does: a reason, a stack, SIGABRT."""
    print("Pipeliner.cpp:42: Assertion `numStages > 1' failed.")
    sys.stderr.write("Stack dump:\n0. Program arguments: python\n")
    sys.stderr.flush()
    os.abort()


def segfault(request: Request) -> Reply:
    ctypes.string_at(0)
    raise AssertionError("unreachable")


def die(request: Request) -> Reply:
    """Killed; of those that name the same new file in `once`, only the first."""
    if "once" in request:
        try:
            os.close(os.open(request["once"], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return {"status": "ok"}
    os.kill(os.getpid(), signal.Signals[request["signal"]])
    time.sleep(60)
    raise AssertionError("unreachable")


def leave(request: Request) -> Reply:
    sys.exit(request["code"])


def hang(request: Request) -> Reply:
    """A compiler that never ends, with a ptxas of its own; both numbers go to the file `pids`."""
    child = subprocess.Popen(["sleep", "600"])
    with open(request["pids"], "a") as file:  # noqa: PTH123
        file.write(f"{os.getpid()} {child.pid}\n")
    while True:
        if request.get("noisy"):
            sys.stderr.write("x" * 100_000)
        else:
            time.sleep(60)


def lock(request: Request) -> Reply:
    """A compiler that never ends and keeps Python's lock, as native code may; its number goes to the file `pids`."""
    with open(request["pids"], "a") as file:  # noqa: PTH123
        file.write(f"{os.getpid()}\n")
    ctypes.PyDLL(None).sleep(600)
    raise AssertionError("unreachable")


def fail(request: Request) -> Reply:
    raise KeyError(request["key"])


def fill(request: Request) -> Reply:
    """A disk that is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/disk")


def not_json(request: Request) -> Reply:
    return {"status": "ok", "time": float("nan")}


FAULTS = {
    "echo": echo,
    "environ": environ,
    "sleep": sleep,
    "chatter": chatter,
    "shout": shout,
    "abort": abort,
    "segfault": segfault,
    "die": die,
    "leave": leave,
    "hang": hang,
    "lock": lock,
    "fail": fail,
    "fill": fill,
    "not_json": not_json,
    # What the parent calls a fault depends on the task's name.
    "compile": lambda request: FAULTS[request["fault"]](request),
    "measure": lambda request: FAULTS[request["fault"]](request),
}

if __name__ == "__main__":
    serve({**TASKS, **FAULTS})

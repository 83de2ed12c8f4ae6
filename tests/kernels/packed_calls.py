"""Calls of every op on a simulated GPU, in a process that does nothing but launch: for tests of packs.

    python -m tests.kernels.packed_calls calls        with a pack: what each call chose, loaded and launched, as JSON
    python -m tests.kernels.packed_calls problems     without: the problem that each call is
    python -m tests.kernels.packed_calls call NAME    one call

With `calls` and `call`, an audit hook ends the process at the first thing that a frozen program must not do: write,
rename or delete a file, make a folder, start a process, open a database or a socket, unpickle. It stands from before
Tilewright and Triton are imported. What compiles, predicts or asks a database is replaced by what raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

FORBIDDEN = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime"),
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.system", "subprocess.Popen"),
    *("sqlite3.connect", "socket.connect", "socket.bind", "pickle.find_class"),
    *("shutil.copyfile", "shutil.move", "tempfile.mkstemp", "tempfile.mkdtemp"),
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
    if event in FORBIDDEN or (writes and arguments[0] != os.devnull):
        print(f"forbidden: {event} {arguments}", file=sys.stderr, flush=True)
        os._exit(3)


def refuse(*arguments: Any, **options: Any) -> Any:
    raise AssertionError(f"nothing may be compiled, predicted or looked up, but: {arguments}")


def calls() -> dict[str, Callable[[], Any]]:
    """Each call by name."""
    import numpy as np

    from benchmarks.simulated_gpu import SimulatedArray as Array
    from tilewright.kernels import attention, conv2d, gemm, rmsnorm

    def array(*shape: int, place: int = 1, dtype: Any = np.float16) -> Any:
        return Array(shape, dtype, address=place << 28)

    a, b, bias = array(64, 2048), array(2048, 64, place=2), array(64, place=3)
    image, filters = array(1, 16, 16, 32), array(64, 3, 3, 32, place=2)
    q, k, v = array(1, 8, 1, 64), array(1, 8, 4096, 64, place=2), array(1, 8, 4096, 64, place=3)
    x, weight = array(32, 1024), array(1024, place=2)
    return {
        "gemm": lambda: gemm(a, b, bias=bias, activation="gelu", out=array(64, 64, place=4)),
        "conv2d": lambda: conv2d(image, filters, out=array(1, 14, 14, 64, place=3)),
        "attention": lambda: attention(q, k, v, out=array(1, 8, 1, 64, place=4)),
        "attention with a scale": lambda: attention(q, k, v, scale=0.1, out=array(1, 8, 1, 64, place=4)),
        "rmsnorm": lambda: rmsnorm(x, weight, out=array(32, 1024, place=3)),
        "rmsnorm with an eps": lambda: rmsnorm(x, weight, eps=1e-5, out=array(32, 1024, place=3)),
    }


def problems() -> list[dict[str, Any]]:
    from benchmarks.simulated_gpu import simulated_gpu
    from tilewright.kernels import dispatch, resolve_device

    seen: list[dict[str, Any]] = []

    def noted(kernel: Any, problem: Any, *_: Any) -> Any:
        seen.append({"op": kernel.name, "problem": problem.to_dict()})
        return mock.Mock(), None

    with simulated_gpu(resolve_device("rtx3090")), mock.patch.object(dispatch, "_prepare", noted):
        for each in calls().values():
            each()
    return seen


def run(names: list[str]) -> list[dict[str, Any]]:
    from benchmarks import simulated_gpu
    from tilewright.kernels import compile as compile_path
    from tilewright.kernels import dispatch, lookup, resolve_device

    loaded: list[str] = []
    launched: list[tuple[int, ...]] = []
    done = []
    with ExitStack() as stack:
        driver = stack.enter_context(simulated_gpu.simulated_gpu(resolve_device(os.environ.get("BOARD", "rtx3090"))))
        for place, name in (
            *((compile_path, name) for name in ("_compile", "_assemble", "_cuobjdump", "ptxas_version")),
            *((lookup, name) for name in ("ranked", "recorded_choice", "predicted_best", "TuningDB", "ptxas_version")),
        ):
            stack.enter_context(mock.patch.object(place, name, refuse))
        stack.enter_context(mock.patch("triton.compile", refuse))
        stack.enter_context(
            mock.patch.object(
                simulated_gpu._Nothing, "load", lambda self, cubin: loaded.append(hashlib.sha256(cubin).hexdigest())
            )
        )
        stack.enter_context(
            mock.patch.object(driver, "launchKernel", lambda function, *rest: launched.append(rest[:7]), create=True)
        )
        every = calls()
        for name in names or every:
            before = set(dispatch._plans)
            loaded.clear()
            for _ in range(2):  # the second is a warm one
                launched.clear()
                every[name]()
            (new,) = set(dispatch._plans) - before
            choice = dispatch._plans[new][1]
            done.append(
                {
                    "call": name,
                    "config": choice.config.to_dict(),
                    "provenance": choice.provenance,
                    "reason": choice.reason,
                    "time_us": choice.time_us,
                    "loaded": list(loaded),
                    "launched": list(launched),
                }
            )
    return done


if __name__ == "__main__":
    task, *names = sys.argv[1:]
    if task == "problems":
        print(json.dumps(problems()))
    else:
        sys.addaudithook(forbid)
        print(json.dumps(run(names), sort_keys=True))

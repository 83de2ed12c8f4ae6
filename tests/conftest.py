"""Tests run kernels in Triton's interpreter; `-m gpu` selects those that need a GPU, and then kernels are compiled.

A process does one or the other, so GPU tests are never selected together with others. `TRITON_INTERPRET`, where it is
set, is left as it is: so xdist's workers, which don't know pytest's arguments, do as the process that starts them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import signal
import sys
from collections.abc import Generator

import pytest


def for_a_gpu(arguments: list[str]) -> bool:
    """Whether the last `-m EXPRESSION` among pytest's arguments asks for GPU tests."""
    expression = ""
    for index, argument in enumerate(arguments):
        if argument == "-m":
            expression = " ".join(arguments[index + 1 : index + 2])
        elif argument.startswith("-m"):
            expression = argument[2:].removeprefix("=")
    words = expression.replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and before != "not" for before, word in zip(["", *words], words, strict=False))


# Triton decides when it is imported, so this stands before every import of a test file.
if "triton" in sys.modules and "TRITON_INTERPRET" not in os.environ:
    pytest.exit("triton was imported before tests/conftest.py could set TRITON_INTERPRET: set it yourself", 4)
gpu_wanted = for_a_gpu([*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *sys.argv[1:]])
os.environ.setdefault("TRITON_INTERPRET", "0" if gpu_wanted else "1")

# Arrays are small, and there is a worker for every core: more threads would only take turns.
for library in ("OPENBLAS", "OMP", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

# Answers must not hang on what is shipped for a board; the tests of shipped records name a folder of their own.
os.environ["TILEWRIGHT_SHIPPED"] = "0"

# The same examples in every run: what random ones find belongs in a test, not in whoever runs the tests next.
with contextlib.suppress(ImportError):  # on a GPU's machine, where no test needs it
    from hypothesis import settings

    settings.register_profile("tilewright", derandomize=True)
    settings.load_profile("tilewright")

# A shell's background jobs ignore Ctrl-C, and what a test starts would ignore it too, and never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Fifteen thousand tests and the libraries under them live to the end: the garbage collector, which took a tenth of
    the time to look through them again and again, leaves them out."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU test's time limit is kept by a thread, which ends the process: a signal's handler would wait for the call
    of the driver that waits for the kernel. With several workers another one takes its place."""
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            own = item.get_closest_marker("timeout") or pytest.mark.timeout().mark
            item.add_marker(pytest.mark.timeout(*own.args[:1], **{**own.kwargs, "method": "thread"}), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs a GPU where there is none, or where this process interprets."""
    if item.get_closest_marker("gpu") is None:
        return
    from tilewright.kernels.devices import resolve_device
    from tilewright.tuning_db.env import interpreting
    from tilewright.tuning_db.errors import MissingDependencyError, UnknownDeviceError

    try:
        resolve_device("cuda:0")
    except (MissingDependencyError, UnknownDeviceError) as error:
        pytest.skip(f"no GPU: {error}")
    if interpreting():
        pytest.skip("this process interprets kernels: run `pytest -m gpu` with TRITON_INTERPRET unset")
    if item.get_closest_marker("alone") and int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("it needs the GPU for itself: run `pytest -m 'gpu and alone' -n 0`")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """Says at the end where a run that was to be on a GPU ran nothing: its exit status is 0."""
    yield
    stats = terminalreporter.stats
    if gpu_wanted and stats.get("skipped") and not any(stats.get(key) for key in ("passed", "failed", "error")):
        terminalreporter.write_line("no GPU test ran: every one was skipped, for the reasons above", red=True)

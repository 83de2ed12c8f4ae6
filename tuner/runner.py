"""Trying configurations: the contract, and the runner that predicts. `gpu_runner` has the one that measures."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.compile import over_limits
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.prediction import MODEL, predict
from tilewright.kernels.problem import Config, Problem
from tilewright.tuner.pool import Pool
from tilewright.tuner.requests import CompileReply, CompileRequest
from tilewright.tuning_db.record import Provenance, Resources, Status, Times

COMPILE_TIMEOUT_S = 60.0
"""A configuration that takes longer to compile is no candidate: most take under a second, the worst of those that the
space refuses (256×256 on 4 warps) 17 s."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one configuration."""

    status: Status
    times: Times | None = None
    resources: Resources | None = None
    message: str = ""
    predicted_us: float | None = None


class Compiler:
    """Compiles configurations for one device on a pool of workers, each distinct code once.

    Problems of different shapes often need the same code; `compiled` counts distinct code. What Triton's on-disk cache
    had already is among it.
    """

    def __init__(self, pool: Pool, device: Device) -> None:
        self.jobs = pool.jobs
        self._pool = pool
        self._device = device
        self._futures: dict[Any, Future[CompileReply]] = {}

    @property
    def compiled(self) -> int:
        """Distinct kernels that compiled so far, the refused ones not counted."""
        done = [future for future in self._futures.values() if future.done() and not future.cancelled()]
        return sum(1 for future in done if future.exception() is None and future.result()["status"] == Status.OK)

    def submit(self, kernel: Kernel[Any, Any], problem: Problem, config: Config) -> Future[CompileReply]:
        """The worker's reply to come."""
        key = tuple(launch.specialization for launch in kernel.launches(problem, config))
        future = self._futures.get(key)
        if future is None:
            request: CompileRequest = {
                "do": "compile",
                "op": kernel.name,
                "problem": problem.to_dict(),
                "config": config.to_dict(),
                "arch": self._device.arch,
            }
            future = self._futures[key] = self._pool.submit(request, COMPILE_TIMEOUT_S)
        return future

    def withdraw(self, future: Future[CompileReply]) -> bool:
        """Takes back what was submitted; False if a worker has taken it up already."""
        if not future.cancel():
            return False
        # Compiled after all if it is asked for again.
        self._futures = {key: each for key, each in self._futures.items() if each is not future}
        return True

    def outcome(self, reply: CompileReply) -> Outcome:
        """What a reply says of the configuration on this device: OK means that it compiled and is within limits."""
        status = Status(reply["status"])
        if status is not Status.OK:
            return Outcome(status, message=str(reply.get("message", "")))
        resources = Resources(**reply["resources"])
        limit = over_limits(resources, self._device, reply["num_warps"])
        if limit is not None:
            return Outcome(Status.OUT_OF_RESOURCES, resources=resources, message=limit)
        return Outcome(Status.OK, resources=resources)


class Runner(ABC):
    """Turns configurations into outcomes.

    Guarantees:
        - Every configuration gets exactly one outcome, in any order; a bad one costs its own time and nothing else.
        - With a `deadline` (seconds of `time.monotonic`), those whose turn did not come by then get none, and the rest
          comes within one trial's timeout of it.

    Not safe to share between threads. Raises `WorkerError` if no worker process can be started, `MachineError` if
    the machine failed one.
    """

    provenance: Provenance
    protocol: str
    tell_wait: Callable[[str], None] = staticmethod(lambda reason: None)
    """Hears, once for each wait, why nothing is tried for now: others have what it takes."""

    @abstractmethod
    def run(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config], deadline: float | None = None
    ) -> Iterator[tuple[Config, Outcome]]:
        """The outcomes, as they come."""

    def finalists(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config], deadline: float | None = None
    ) -> Iterator[tuple[Config, Outcome]]:
        """New outcomes of the best few, compared more carefully; none where there is nothing more to learn."""
        return iter(())

    @property
    def lost_workers(self) -> tuple[str, ...]:
        """Why measuring processes were given up, whose work the others do."""
        return ()

    def close(self) -> None:  # noqa: B027 - most runners have nothing of their own to end
        """Ends what the runner started."""


class PredictionRunner(Runner):
    """Compiles for the device and predicts from the compiled resources; nothing runs."""

    provenance = Provenance.PREDICTED
    protocol = MODEL

    def __init__(self, compiler: Compiler, device: Device) -> None:
        self._compiler = compiler
        self._device = device

    def run(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config], deadline: float | None = None
    ) -> Iterator[tuple[Config, Outcome]]:
        for config, compiled in self._compiled(kernel, problem, configs, deadline):
            if compiled.status is not Status.OK:
                yield config, compiled
                continue
            assert compiled.resources is not None
            time_us = predict(kernel.work(problem, config), compiled.resources, self._device).time_us
            yield config, replace(compiled, times=Times.single(time_us), predicted_us=time_us)

    def _compiled(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config], deadline: float | None
    ) -> Iterator[tuple[Config, Outcome]]:
        """Compiles in parallel and yields each configuration with what that showed, as they finish."""
        remaining = deque(configs)
        waiting: dict[Future[CompileReply], list[Config]] = {}
        while True:
            # No more than there are workers for: what else had finished would be lost if the run were killed.
            while remaining and len(waiting) < self._compiler.jobs and not is_past(deadline):
                config = remaining.popleft()
                waiting.setdefault(self._compiler.submit(kernel, problem, config), []).append(config)
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            # One that the machine failed ends the run: what is finished beside it is kept before.
            for future in sorted(done, key=lambda each: each.exception() is not None):
                outcome = self._compiler.outcome(future.result())
                for config in waiting.pop(future):
                    yield config, outcome


def is_past(deadline: float | None) -> bool:
    """Whether a time of `time.monotonic` has come."""
    return deadline is not None and time.monotonic() >= deadline

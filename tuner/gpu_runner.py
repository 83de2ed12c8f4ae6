"""The runner that measures, on live GPUs.

Compilers work ahead in parallel; for each GPU one isolated process holds it, checks each configuration's result and
times it. A configuration that hangs or corrupts the device costs that process, which is started again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from typing import Any

from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.live import live_devices
from tilewright.kernels.lookup import TIMING_PROTOCOL
from tilewright.kernels.prediction import predict
from tilewright.kernels.problem import Config, Problem
from tilewright.tuner.pool import Pool
from tilewright.tuner.requests import (
    CompileReply,
    FinalistsReply,
    FinalistsRequest,
    Measurement,
    MeasureReply,
    MeasureRequest,
)
from tilewright.tuner.runner import Compiler, Outcome, Runner, is_past
from tilewright.tuner.timing import BUDGET_S, CLEARLY_SLOWER
from tilewright.tuning_db.errors import UsageError, WorkerError
from tilewright.tuning_db.record import Provenance, Resources, Status, Times

MEASURE_TIMEOUT_S = 60.0
"""For the gate and the timing of one configuration; both bound themselves to a few seconds."""

INPUT_SEED = 0
"""Of the inputs that are measured on: all configurations have the same."""


@dataclass(frozen=True, slots=True)
class Effort:
    """What is spent on one configuration. A tuning run's, unless said otherwise; a survey of thousands spends less."""

    check: bool = True  # whether results go through the correctness gate
    ragged: bool = True  # whether the gate sees a second problem, which tiles don't divide
    clearly_slower: float = CLEARLY_SLOWER  # times the least time so far: from there on a configuration is given up
    budget_s: float = BUDGET_S  # for the samples, after warm-up


TUNING = Effort()


def equal_gpus(device: Device, count: int) -> tuple[Device, ...]:
    """`count` live GPUs of one board, `device` first: those whose measurements go into one file.

    Raises:
        UsageError: there are fewer of them here, or the device is not here.
    """
    if count < 1:
        raise UsageError(f"workers={count} must be at least 1")
    if count == 1:
        return (device,) if device.live else ()
    if not device.live:
        raise UsageError(f"workers={count} need a GPU each, and {device.board} is not here: its times are predicted")
    others = [each for each in live_devices() if each.live != device.live]
    equal = [device, *(each for each in others if each.key == device.key)]
    if len(equal) < count:
        strangers = [f"{each.live} is {each.key}" for each in others if each.key != device.key]
        raise UsageError(
            f"workers={count} need as many GPUs of {device.key}: here are {', '.join(each.live for each in equal)}"
            + (f" ({'; '.join(strangers)})" if strangers else "")
        )
    return tuple(equal[:count])


@dataclass(eq=False, slots=True)
class _Candidate:
    """One configuration on its way through the compilers to a GPU."""

    config: Config
    code: Future[CompileReply]
    ragged: Future[CompileReply] | None  # the code of the gate's second problem, if there is one
    compiled: Outcome | None = None
    killed: str = ""  # the message, if the process was killed that measured it first

    def unfinished(self) -> list[Future[CompileReply]]:
        """What has to be compiled before it is known what becomes of the candidate."""
        return [future for future in (self.code, self.ragged) if future is not None and not future.done()]

    def failed(self) -> Future[CompileReply] | None:
        """What will never be compiled, because the machine failed or no worker is left; None where nothing is."""
        return next((future for future in (self.code, self.ragged) if future is not None and _has_failed(future)), None)


class GpuRunner(Runner):
    """Measures on `gpus`, all of one board; by default on the one that `device.live` names.

    Each GPU's next trial begins when the last outcome was taken, and so put on record: of a run that is killed, no
    measurement is lost but those in progress, at most one a GPU.
    """

    provenance = Provenance.MEASURED
    protocol = TIMING_PROTOCOL

    def __init__(
        self,
        compiler: Compiler,
        device: Device,
        gpus: Sequence[Device] = (),
        workers: Pool | None = None,
        effort: Effort = TUNING,
    ) -> None:
        self._effort = effort
        self._compiler = compiler
        self._device = device
        ordinals = [each.live.rpartition(":")[2] for each in gpus or (device,)]
        self._gpus = len(ordinals)
        self._workers = workers or Pool(self._gpus, arguments=[("--gpu", ordinal) for ordinal in ordinals])
        self._best_us: dict[Problem, float] = {}
        self._waits = False  # for other runs, as it has told

    def run(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config], deadline: float | None = None
    ) -> Iterator[tuple[Config, Outcome]]:
        candidates = [self._compile(kernel, problem, config) for config in configs]
        measuring: dict[Future[Any], _Candidate] = {}
        while candidates or measuring:
            if is_past(deadline):
                self._withdraw(candidates)
                candidates = []
            for candidate in list(candidates):
                failed = candidate.failed()
                if failed is not None:
                    candidates.remove(candidate)
                    measuring[failed] = candidate  # which raises it, when all that is finished beside it is taken
                    continue
                compiled = self._compiled(candidate)
                if compiled is None:
                    continue
                if compiled.status is not Status.OK:
                    candidates.remove(candidate)
                    yield candidate.config, compiled
                elif len(measuring) < self._gpus and not is_past(deadline):
                    candidates.remove(candidate)
                    measuring[self._measure(kernel, problem, candidate)] = candidate
            compiling = [future for candidate in candidates for future in candidate.unfinished()]
            if measuring or compiling:
                left = None
                if candidates and deadline is not None:
                    # The system's clocks don't count to the end of any number of seconds.
                    left = min(max(0.0, deadline - time.monotonic()), MEASURE_TIMEOUT_S)
                pending: list[Future[Any]] = [*measuring, *compiling]
                wait(pending, left, FIRST_COMPLETED)
            # One that the machine failed ends the run: what is finished beside it is kept before.
            for future in sorted((each for each in measuring if each.done()), key=_has_failed):
                candidate, reply = measuring.pop(future), future.result()
                self._heed(reply)
                if reply.get("busy") and not is_past(deadline):
                    # Other runs had the GPU all the time.
                    measuring[self._measure(kernel, problem, candidate)] = candidate
                    continue
                if reply.get("busy"):
                    continue  # its turn did not come
                again = reply["status"] != Status.COMPILE_ERROR  # what the pool has tried again itself
                if reply.get("killed") and again and not candidate.killed and not is_past(deadline):
                    # By somebody else, as a rule: without a second try the best configuration may be lost to it.
                    candidate.killed = reply["message"]
                    measuring[self._measure(kernel, problem, candidate)] = candidate
                    continue
                yield candidate.config, self._measured(kernel, problem, candidate, reply)

    def finalists(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config], deadline: float | None = None
    ) -> Iterator[tuple[Config, Outcome]]:
        if len(configs) < 2:
            return
        request: FinalistsRequest = {
            **self._request(kernel, problem),
            "finalists": [config.to_dict() for config in configs],
        }
        reply: FinalistsReply = {"status": Status.TIMEOUT, "busy": True}
        while reply.get("busy"):
            timeout = MEASURE_TIMEOUT_S * len(configs)
            if deadline is not None:
                # The last trial may have used up what a run may take beyond its deadline.
                timeout = min(timeout, deadline + MEASURE_TIMEOUT_S - time.monotonic())
                if timeout <= 0:
                    return
            reply = self._workers.submit(request, timeout).result()
            self._heed(reply)
        # A result that was right once and is wrong now was never right; if the comparison as a whole failed, nobody
        # knows which of them did it, and each keeps what was measured of it alone.
        for config, one in zip(configs, reply.get("finalists", ()), strict=False):
            outcome = self._outcome(one)
            if outcome.resources is not None:
                predicted_us = predict(kernel.work(problem, config), outcome.resources, self._device).time_us
                outcome = replace(outcome, predicted_us=predicted_us)
            yield config, outcome

    @property
    def lost_workers(self) -> tuple[str, ...]:
        return tuple(str(error) for error in self._workers.lost)

    def close(self) -> None:
        self._workers.close()

    def _heed(self, reply: MeasureReply | FinalistsReply) -> None:
        """Tells of a wait for other runs, as it begins."""
        busy = reply.get("busy", False)
        if busy and not self._waits:
            self.tell_wait(str(reply.get("message", "")))
        self._waits = busy

    def _compile(self, kernel: Kernel[Any, Any], problem: Problem, config: Config) -> _Candidate:
        code = self._compiler.submit(kernel, problem, config)
        ragged = None
        if self._effort.ragged and kernel.ragged is not None:
            # In parallel, and where a compiler that crashes or hangs is a process of its own: the one that measures
            # finds the code in Triton's cache.
            ragged = self._compiler.submit(kernel, kernel.ragged(problem, config), config)
        return _Candidate(config, code, ragged)

    def _compiled(self, candidate: _Candidate) -> Outcome | None:
        """What compiling has shown; None until that is known."""
        if candidate.compiled is None and candidate.code.done():
            candidate.compiled = self._compiler.outcome(candidate.code.result())
        if candidate.compiled is not None and candidate.compiled.status is Status.OK and candidate.unfinished():
            return None
        return candidate.compiled

    def _withdraw(self, candidates: Sequence[_Candidate]) -> None:
        for candidate in candidates:
            for future in candidate.unfinished():
                self._compiler.withdraw(future)

    def _measure(self, kernel: Kernel[Any, Any], problem: Problem, candidate: _Candidate) -> Future[MeasureReply]:
        best = self._best_us.get(problem)
        skipped = "" if self._effort.ragged else "not wanted"
        if candidate.ragged is not None:
            ragged = self._compiler.outcome(candidate.ragged.result())
            skipped = "" if ragged.status is Status.OK else ragged.message
        request: MeasureRequest = {
            **self._request(kernel, problem),
            "config": candidate.config.to_dict(),
            "skip_ragged": skipped,
            "give_up_above_us": None if best is None else best * self._effort.clearly_slower,
            "budget_s": self._effort.budget_s,
        }
        try:
            return self._workers.submit(request, MEASURE_TIMEOUT_S)
        except WorkerError as error:
            # No worker is left, and one may have finished another candidate before: that comes first.
            none_left: Future[MeasureReply] = Future()
            none_left.set_exception(error)
            return none_left

    def _measured(
        self, kernel: Kernel[Any, Any], problem: Problem, candidate: _Candidate, reply: MeasureReply
    ) -> Outcome:
        outcome = self._outcome(reply)
        if outcome.times is not None:
            self._best_us[problem] = min(outcome.times.median_us, self._best_us.get(problem, outcome.times.median_us))
        assert candidate.compiled is not None
        assert candidate.compiled.resources is not None
        resources = candidate.compiled.resources
        predicted_us = predict(kernel.work(problem, candidate.config), resources, self._device).time_us
        message = outcome.message
        if candidate.killed and message != candidate.killed:
            message = f"{message}; at first, {candidate.killed}".removeprefix("; ")
        return replace(outcome, resources=resources, message=message, predicted_us=predicted_us)

    def _request(self, kernel: Kernel[Any, Any], problem: Problem) -> Measurement:
        return {
            "do": "measure",
            "op": kernel.name,
            "problem": problem.to_dict(),
            "seed": INPUT_SEED,
            "check": self._effort.check,
            "locks": tempfile.gettempdir(),  # of this process: a worker's temporary files are in a folder of its own
        }

    @staticmethod
    def _outcome(reply: MeasureReply) -> Outcome:
        times = reply.get("times")
        resources = reply.get("resources")
        return Outcome(
            Status(reply["status"]),
            times=Times(**times) if times else None,
            resources=Resources(**resources) if resources else None,
            message=str(reply.get("message", "")),
        )


def _has_failed(future: Future[Any]) -> bool:
    """Whether there is an error in place of a reply."""
    return future.done() and (future.cancelled() or future.exception() is not None)

"""The runner that measures, on a live GPU.

Compilers work ahead in parallel; one isolated process holds the GPU, checks each configuration's result and times it. A
configuration that hangs or corrupts the device costs that process, which is started again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import TIMING_PROTOCOL
from tilewright.kernels.prediction import predict
from tilewright.kernels.problem import Config, Problem
from tilewright.tuner.pool import Pool
from tilewright.tuner.runner import Compiler, Outcome, Runner, compile_all
from tilewright.tuner.timing import CLEARLY_SLOWER
from tilewright.tuning_db.record import Provenance, Resources, Status, Times

MEASURE_TIMEOUT_S = 60.0
"""For the gate and the timing of one configuration; both bound themselves to a few seconds."""


class GpuRunner(Runner):
    """Measures on the GPU that `device.live` names."""

    provenance = Provenance.MEASURED
    protocol = TIMING_PROTOCOL

    def __init__(self, compiler: Compiler, device: Device, worker: Pool | None = None) -> None:
        self._compiler = compiler
        self._device = device
        self._ordinal = int(device.live.rpartition(":")[2])
        self._worker = worker or Pool(1)
        self._best_us: dict[Problem, float] = {}

    def run(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config]
    ) -> Iterator[tuple[Config, Outcome]]:
        if kernel.ragged is not None:
            # The gate's second problem, compiled in parallel: the measuring process finds it in Triton's cache.
            for config in configs:
                self._compiler.submit(kernel, kernel.ragged(problem, config), config)
        for config, compiled in compile_all(self._compiler, kernel, problem, configs):
            if compiled.status is not Status.OK:
                yield config, compiled
                continue
            assert compiled.resources is not None
            predicted_us = predict(kernel.work(problem, config), compiled.resources, self._device).time_us
            best = self._best_us.get(problem)
            request = {
                **self._request(kernel, problem),
                "config": config.to_dict(),
                "check": True,
                "give_up_above_us": None if best is None else best * CLEARLY_SLOWER,
            }
            outcome = self._outcome(self._worker.submit(request, MEASURE_TIMEOUT_S).result())
            if outcome.times is not None:
                self._best_us[problem] = min(outcome.times.median_us, best or outcome.times.median_us)
            yield config, replace(outcome, resources=compiled.resources, predicted_us=predicted_us)

    def finalists(
        self, kernel: Kernel[Any, Any], problem: Problem, configs: Sequence[Config]
    ) -> Iterator[tuple[Config, Outcome]]:
        if len(configs) < 2:
            return
        request = {**self._request(kernel, problem), "finalists": [config.to_dict() for config in configs]}
        reply = self._worker.submit(request, MEASURE_TIMEOUT_S * len(configs)).result()
        # A result that was right once and is wrong now was never right; if the comparison as a whole failed, nobody
        # knows which of them did it, and each keeps what was measured of it alone.
        for config, one in zip(configs, reply.get("finalists", ()), strict=False):
            resources = self._compiler.outcome(self._compiler.submit(kernel, problem, config).result()).resources
            outcome = replace(self._outcome(one), resources=resources)
            if resources is not None:
                predicted_us = predict(kernel.work(problem, config), resources, self._device).time_us
                outcome = replace(outcome, predicted_us=predicted_us)
            yield config, outcome

    def close(self) -> None:
        self._worker.close()

    def _request(self, kernel: Kernel[Any, Any], problem: Problem) -> dict[str, Any]:
        return {
            "do": "measure",
            "op": kernel.name,
            "problem": problem.to_dict(),
            "ordinal": self._ordinal,
            "seed": 0,
        }

    @staticmethod
    def _outcome(reply: Mapping[str, Any]) -> Outcome:
        times = reply.get("times")
        resources = reply.get("resources")
        return Outcome(
            Status(reply["status"]),
            times=Times(**times) if times else None,
            resources=Resources(**resources) if resources else None,
            message=str(reply.get("message", "")),
        )

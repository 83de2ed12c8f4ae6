"""Runners that compile nothing and note what they were asked, for tests of whole runs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, ClassVar

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import TIMING_PROTOCOL
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.tuner.runner import Outcome, PredictionRunner
from tilewright.tuning_db.record import Provenance, Status, Times

SMALL = "M=64,N=64,K=128"
DEVICE = resolve_device("rtx3090")


class CountingRunner(PredictionRunner):
    """Predicts without compiling, and notes what it was asked."""

    asked: ClassVar[list[tuple[Any, GemmConfig]]] = []
    fail: ClassVar[bool] = False

    def run(self, kernel: Any, problem: Any, configs: Any, deadline: Any = None) -> Any:
        for config in configs:
            if deadline is not None and time.monotonic() >= deadline:
                return
            self.asked.append((problem, config))
            if self.fail:
                yield config, Outcome(Status.COMPILE_ERROR, message="ptxas refused it")
                continue
            resources = kernel.estimate(problem, config, DEVICE)
            yield config, Outcome(Status.OK, Times.single(1.0 + config.BLOCK_M), replace(resources, spill_bytes=0))


class MeasuringRunner(CountingRunner):
    """As one that measures on a GPU."""

    provenance = Provenance.MEASURED
    protocol = TIMING_PROTOCOL

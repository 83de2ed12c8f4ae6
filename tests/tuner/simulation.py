"""`autotune` on GPUs that are not there: the real run, search, database, runner and pool, over simulated workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from tests.tuner.simulated_worker import Scenario
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import gpu_runner, tuning_run
from tilewright.tuner.pool import Pool
from tilewright.tuning_db.env import compiling_environment

GPUS = [replace(resolve_device("a100"), live=f"cuda:{ordinal}") for ordinal in range(4)]
BOARD = GPUS[0]
PROBLEM = GemmProblem(M=16, N=32, K=64)
"""Of 25 configurations: a run can try them all, and then its winner doesn't hang on the search."""

ROOT = Path(__file__).parents[2]


def space() -> list[Any]:
    """Every configuration of `PROBLEM` that a run may try."""
    gemm = find_kernel("gemm")
    return list(dict.fromkeys((*gemm.space.configs(PROBLEM, BOARD), gemm.default(PROBLEM, BOARD))))


@contextmanager
def simulated(compiling: Scenario, measuring: Scenario, folder: Path) -> Iterator[None]:
    """Runs of this process compile and measure as the scenarios say; `folder` is for the files they need."""
    environment = {**compiling_environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}

    def pool(name: str, scenario: Scenario) -> Any:
        file = scenario.save(folder / f"{name}.json")
        command = (sys.executable, "-P", "-m", "tests.tuner.simulated_worker", str(file))
        return partial(Pool, command=command, environment=environment)

    with (
        mock.patch.object(tuning_run, "Pool", pool("compiling", compiling)),
        mock.patch.object(gpu_runner, "Pool", pool("measuring", measuring)),
        mock.patch.object(gpu_runner, "live_devices", return_value=tuple(GPUS)),
    ):
        yield

"""Records for tests of what the tuning database says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import TIMING_PROTOCOL, record_key
from tilewright.kernels.problem import Config, Problem
from tilewright.tuning_db.record import Environment, Provenance, Record, Resources, Status, Times
from tilewright.tuning_db.store import TuningDB


def put(
    folder: Path,
    kernel: Kernel[Any, Any],
    problem: Problem,
    device: Device,
    config: Config,
    time_us: float,
    **changed: str,
) -> None:
    """Puts a measured outcome into the device's database; `changed` are fields of its key."""
    record = Record(
        key=replace(record_key(kernel, problem, device), **changed),
        config=config.to_json(),
        status=Status.OK,
        provenance=Provenance.MEASURED,
        times=Times.single(time_us),
        resources=Resources(registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=32768),
    )
    with TuningDB.open(device.key, folder) as database:
        run = database.start_run(Environment("0", "3.9.0", "12", "3.11", "here", TIMING_PROTOCOL))
        database.add(record, run)

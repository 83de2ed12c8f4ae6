"""What a run of `autotune` gives, and what it tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tilewright.kernels.device import Device
from tilewright.tuner.runner import Outcome
from tilewright.tuning_db.record import Provenance, Status


@dataclass(frozen=True, slots=True)
class Result:
    """The best configuration of one workload after a run, and what is known of it.

    Attributes:
        workload: the name, or the problem as a text.
        op: the kernel.
        problem: its fields.
        config: the fields of the configuration; None if every one that was tried failed.
        time_us: microseconds, measured as a median or predicted, as `provenance` says; likewise what follows from it.
        tflops: 10¹² floating-point (of integers: integer) operations of the problem a second.
        roofline_fraction: least possible time over this time: 1 is as fast as the board allows.
        registers: of a thread.
        spills: bytes of a thread.
        shared_bytes: of a block.
        provenance: how the time is known; None without one.
        status: `ok`; where there is no configuration, what became of the last, or `timeout` if none was tried.
        message: why that is.
        trials: outcomes on record for this very problem, device, kernel and toolchain.
        cached: whether nothing was tried for it in this run.
    """

    workload: str
    op: str
    problem: dict[str, Any]
    config: dict[str, Any] | None = None
    time_us: float | None = None
    tflops: float | None = None
    roofline_fraction: float | None = None
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    provenance: Provenance | None = None
    status: Status = Status.OK
    message: str = ""
    trials: int = 0
    cached: bool = False


@dataclass(slots=True)
class Results:
    """What a run did. Iterates over its results.

    Attributes:
        device: what was tuned for.
        db: the database file.
        results: one for each workload, in order.
        compiled: kernels that were compiled.
        elapsed_s: seconds.
        set_aside: where a damaged database file was moved.
        lost_workers: why measuring processes were given up, whose work the others did.
    """

    device: Device
    db: Path
    results: list[Result] = field(default_factory=list)
    compiled: int = 0
    elapsed_s: float = 0.0
    set_aside: Path | None = None
    lost_workers: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Result]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is: sent at the start of each workload, after every outcome, as a wait for other runs begins, and
    with the workload's result."""

    workload: str
    index: int  # of the workload, from 0
    workloads: int
    done: int  # trials of this workload
    trials: int
    best_us: float | None
    result: Result | None = None  # with the last event of a workload
    waits: str = ""  # why nothing is tried for now, with the event that a wait begins with


@dataclass(slots=True)
class Reporter:
    """Sends the progress of one workload."""

    send: Callable[[Progress], None]
    workload: str
    index: int
    workloads: int
    trials: int
    done: int = 0
    best_us: float | None = None

    def started(self) -> None:
        """The workload's turn has come."""
        self.send(Progress(self.workload, self.index, self.workloads, self.done, self.trials, None))

    def outcome(self, outcome: Outcome) -> None:
        """A trial has ended."""
        self.done += 1
        if outcome.times is not None and (self.best_us is None or outcome.times.median_us < self.best_us):
            self.best_us = outcome.times.median_us
        self.send(Progress(self.workload, self.index, self.workloads, self.done, self.trials, self.best_us))

    def waiting(self, reason: str) -> None:
        """Nothing is tried for now."""
        self.send(
            Progress(self.workload, self.index, self.workloads, self.done, self.trials, self.best_us, waits=reason)
        )

    def finished(self, result: Result) -> None:
        """The workload is done."""
        event = Progress(
            self.workload, self.index, self.workloads, self.done, self.trials, result.time_us, result=result
        )
        self.send(event)

"""A worker that compiles and measures nothing: it replays times that configurations decide, and goes wrong as told.

    python -m tests.tuner.simulated_worker SCENARIO [--gpu N]

`SCENARIO` is the JSON file of a `Scenario`. With `real`, requests to measure go through `measure` on a `SimulatedGpu`,
so that faults of the GPU are found by what finds them on one; else replies are made here (an endless kernel is the only
fault then), and starting takes 0.2 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.tuner.worker import Reply, Request, serve
from tilewright.tuning_db.record import canonical_json

COMPILER_FAULTS = ("compiler abort", "compiler hang")
GPU_FAULTS = ("endless kernel", "illegal address", "out of memory", "wrong result", "killed from outside")
FAULTS = COMPILER_FAULTS + GPU_FAULTS
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Scenario:
    """What a run of the simulation is like.

    `faults` has the fault of each configuration that has one: of FAULTS, or `killed at first`, which is only once. The
    first measurements of `together` processes wait for each other. At the beginning or `end` of task number `kill_at`
    of its kind (`compile` or `measure`), counted over all processes, the parent is killed.
    """

    journal: str  # every task is noted there as it begins and ends
    faults: Mapping[str, str] = field(default_factory=dict)
    together: int = 0
    kill_at: tuple[str, str, int] | None = None  # ("measure", "begin", 3)
    real: bool = False
    absent: Sequence[int] = ()  # GPUs that can't be taken into use
    in_place: bool = False  # whether workers know `tests.tuner.in_place.HALVE` too

    def save(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


def time_us(config: Mapping[str, Any]) -> float:
    """The time of a configuration: from 10 to 100 µs, with no pattern, the same in every process."""
    digest = hashlib.sha256(canonical_json(config).encode()).digest()
    return 10 + 90 * int.from_bytes(digest[:6], "big") / 2**48


class Simulation:
    def __init__(self, scenario: Scenario, ordinal: int) -> None:
        self.scenario = scenario
        self.ordinal = ordinal
        self.journal = Path(scenario.journal)
        self.parent = os.getppid()
        self.measured = 0

    def compile(self, request: Request) -> Reply:
        self.note(request, "begin")
        fault = self.scenario.faults.get(canonical_json(request["config"]))
        if fault == "compiler abort":
            print("Pipeliner.cpp:42: Assertion `numStages > 1' failed.")
            sys.stderr.write("Stack dump:\n0. Program arguments: python\n")
            os.abort()
        if fault == "compiler hang":
            subprocess.run(["sleep", "600"], check=True)  # as a ptxas that never ends
        self.note(request, "end")
        resources = {"registers": 100, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 32768}
        return {"status": "ok", "resources": resources, "num_warps": request["config"].get("num_warps", 1)}

    def measure(self, request: Request) -> Reply:
        self.note(request, "begin")
        self.measured += 1
        if self.measured == 1 and self.scenario.together:
            self.wait_for_the_others()
        configs = request.get("finalists") or [request["config"]]
        fault = "" if "finalists" in request else self.scenario.faults.get(canonical_json(request["config"]), "")
        if fault == "killed from outside" or (fault == "killed at first" and self.is_first(request)):
            subprocess.run(["kill", "-KILL", str(os.getpid())], check=True)
        if fault == "killed at first":
            fault = ""
        reply = (measured_for_real if self.scenario.real else replayed)(request, fault, configs)
        self.note(request, "end")
        return reply

    def note(self, request: Request, moment: str) -> None:
        entry = {
            "do": request["do"],
            "moment": moment,
            "config": request.get("config"),
            "finalists": request.get("finalists"),
            "ordinal": self.ordinal,
            "pid": os.getpid(),
        }
        end = append(self.scenario.journal, entry)
        if self.scenario.kill_at is None:
            return
        so_far = read_journal(self.journal, end)
        number = sum((each["do"], each["moment"]) == (request["do"], moment) for each in so_far)
        # An orphan has another parent, which is left in peace.
        if (request["do"], moment, number) == tuple(self.scenario.kill_at) and os.getppid() == self.parent:
            os.kill(self.parent, signal.SIGKILL)

    def is_first(self, request: Request) -> bool:
        begun = [each for each in read_journal(self.journal) if each["moment"] == "begin"]
        return sum(each["config"] == request["config"] for each in begun) == 1

    def wait_for_the_others(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while len({each["pid"] for each in read_journal(self.journal)}) < self.scenario.together:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {self.scenario.together} measurements are running at once")
            time.sleep(0.01)


def append(journal: str, entry: Mapping[str, Any]) -> int:
    """One write to a file opened for appending: whole or not there. Where the entry ends."""
    descriptor = os.open(journal, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
    os.write(descriptor, json.dumps(entry).encode() + b"\n")
    end = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.close(descriptor)
    return end


def read_journal(path: Path, end: int | None = None) -> list[dict[str, Any]]:
    """What was noted, in order, up to `end`; nothing where there is no journal yet."""
    return [json.loads(line) for line in path.read_bytes()[:end].splitlines()] if path.exists() else []


def replayed(request: Request, fault: str, configs: Sequence[Mapping[str, Any]]) -> Reply:
    if fault == "endless kernel":
        time.sleep(600)
    assert not fault, f"{fault!r} is for real measurements"
    replies = []
    for config in configs:
        time_one = time_us(config)
        times = {"median_us": time_one, "p10_us": time_one, "p90_us": time_one, "samples": 10}
        resources = {"registers": 100, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 32768}
        replies.append({"status": "ok", "times": times, "resources": resources})
    return {"status": "ok", "finalists": replies} if "finalists" in request else replies[0]


def measured_for_real(request: Request, fault: str, configs: Sequence[Mapping[str, Any]]) -> Reply:
    from tilewright.tuner import measure

    gpu: Any = measure._gpus[0]
    gpu.fault = fault
    if fault == "out of memory":
        measure.forget()  # so that something is allocated
    gpu.times_us = iter([time_us(config) for config in configs])
    return measure.measure({**request, "ordinal": 0})


def prepare_real(in_place: bool) -> None:
    """Interprets kernels in this process, and puts a simulated GPU in the place of a real one."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.tuner.in_place import HALVE
    from tests.tuner.simulated_gpu import SimulatedGpu
    from tilewright.tuner import measure, timing

    if in_place:
        measure.find_kernel = {HALVE.name: HALVE}.__getitem__

    measure._gpus[0] = SimulatedGpu()  # type: ignore[assignment]
    timing.MOST_SETTLE_S = 0.0  # there is no power limit to wait for


def main(scenario_file: str, option: str = "--gpu", ordinal: str = "-1") -> None:
    scenario = Scenario(**json.loads(Path(scenario_file).read_text()))
    assert option == "--gpu"
    if int(ordinal) in scenario.absent:
        sys.exit(f"CUDARuntimeError: cuda:{ordinal} is busy or unavailable")
    simulation = Simulation(scenario, int(ordinal))
    tasks = {"compile": simulation.compile, "measure": simulation.measure}
    serve(tasks, partial(prepare_real, scenario.in_place) if scenario.real else lambda: None)


if __name__ == "__main__":
    main(*sys.argv[1:])

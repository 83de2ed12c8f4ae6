"""Checking and timing configurations on a GPU, in the worker process that may die of it.

    measure({"op": "gemm", "problem": {…}, "config": {…}, "ordinal": 0, "seed": 0, "check": True, …})
    {"status": "ok", "times": {"median_us": 81.2, "p10_us": 80.9, "p90_us": 82.0, "samples": 10}, …}

A configuration is compiled and held against the device's limits, run twice through the correctness gate (`gate`), timed
(`timing`), and run through the gate once more on a small problem that its tiles don't divide, unless it turned out to
be too slow to matter.

An array that an op overwrites in place is an input and an output of one name. Every run begins with it as it was, the
timed ones too: the copy that does so comes before the flush, outside of what is timed.

Runs that measure on one GPU take turns (`turns`): inputs, references and code of the problem are made before, and what
the GPU does is done in one turn for each configuration.

After a fault in a kernel (an illegal address, a failed launch) every later call of the driver fails, so there is no
going on: the reason goes to stderr and the process ends. `pool` makes a `runtime_error` with that reason of it, and
starts another process for the next request.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tilewright.kernels.dtypes import dtype
from tilewright.kernels.kernel import Argument, Kernel
from tilewright.kernels.prediction import roofline_us
from tilewright.kernels.problem import Config, Output, Problem
from tilewright.kernels.registry import find_kernel
from tilewright.kernels.runtime import Plan
from tilewright.tuner import gate
from tilewright.tuner.gpu import Gpu
from tilewright.tuner.machine import heed_machine_fault, was_killed
from tilewright.tuner.requests import FinalistsReply, FinalistsRequest, MeasureReply, MeasureRequest, Timed
from tilewright.tuner.timing import Sampler, Timing, replay_copies, time_one, time_rounds
from tilewright.tuner.turns import BusyError, turn
from tilewright.tuning_db.errors import CompileError, IllegalConfigError, LaunchError, UnsupportedError
from tilewright.tuning_db.record import Status
from tilewright.tuning_db.text import one_line

ALIGNMENT = 256
"""Of every array in device memory, as the driver's own allocations are."""

TURN_S = 20.0
"""How long to wait for other runs' turns on the GPU: well within a request's time, so that a wait is no timeout."""

EXIT_AFTER_FAULT = 70
"""Exit status of a process that a kernel's fault has ended (EX_SOFTWARE of sysexits.h)."""


def measure(request: MeasureRequest | FinalistsRequest) -> MeasureReply | FinalistsReply:
    """The outcome of one configuration, or of several compared; nothing is tried where other runs have the GPU for
    `TURN_S`.

    Raises:
        UsageError: unknown kernel, malformed problem or configuration.
        MissingDependencyError: no such GPU.
    """
    return measure_on(use_gpu(request["ordinal"]), request)


def measure_on(gpu: Gpu, request: MeasureRequest | FinalistsRequest) -> MeasureReply | FinalistsReply:
    """`measure` on a GPU that is in use already."""
    kernel = find_kernel(request["op"])
    problem = kernel.problem.from_dict(request["problem"])
    named = request["finalists"] if "finalists" in request else [request["config"]]
    configs = [kernel.space.config.from_dict(each) for each in named]
    locks = request["locks"]
    # A problem that the host has no memory for is one that can't be measured here.
    faults: tuple[type[Exception], ...] = (LaunchError, MemoryError, *gpu.errors)
    try:
        bench = _bench(gpu, kernel, problem, request["seed"])
        ready = [bench.prepare(config) for config in configs]
        with turn(None if locks is None else Path(locks), gpu.address, TURN_S):
            bench.place()
            if "finalists" in request:
                replies = _finalists(bench, ready, request["check"])
                return {"status": Status.OK, "finalists": replies, "clocks": gpu.clocks()}
            return _single(bench, configs[0], ready[0], request)
    except BusyError as error:
        return {"status": Status.TIMEOUT, "busy": True, "message": str(error)}
    except faults as error:
        return _fault(gpu, error)


def _single(bench: Bench, config: Config, prepared: Prepared, request: MeasureRequest) -> MeasureReply:
    check, skip_ragged = request["check"], request["skip_ragged"]
    if prepared.plan is None:
        return prepared.reply
    reason = bench.gate(prepared.plan) if check else None
    if reason is not None:
        return {**prepared.reply, "status": Status.INCORRECT, "message": reason}
    sampler, method = bench.sampler(prepared.plan)
    timing = time_one(sampler, give_up_above_us=request["give_up_above_us"], budget_s=request["budget_s"])
    reply: MeasureReply = {**prepared.reply, **_times(timing), "method": method, "clocks": bench.gpu.clocks()}
    if not check or timing.gave_up:
        return reply
    return {**reply, "ragged": f"skipped: {skip_ragged}"} if skip_ragged else _with_ragged(bench, config, reply)


def _finalists(bench: Bench, ready: Sequence[Prepared], check: bool) -> list[MeasureReply]:
    """The replies of all, those that passed timed in turns. The gate's ragged problem is left to their first time."""
    replies = [prepared.reply for prepared in ready]
    samplers: dict[int, tuple[Sampler, str]] = {}
    for index, prepared in enumerate(ready):
        if prepared.plan is None:
            continue
        reason = bench.gate(prepared.plan) if check else None
        if reason is not None:
            replies[index] = {**prepared.reply, "status": Status.INCORRECT, "message": reason}
        else:
            samplers[index] = bench.sampler(prepared.plan)
    timings = time_rounds([sampler for sampler, _ in samplers.values()])
    for (index, (_, method)), timing in zip(samplers.items(), timings, strict=True):
        replies[index] = {**replies[index], **_times(timing), "method": method}
    return replies


def _times(timing: Timing) -> Timed:
    return {"times": dataclasses.asdict(timing.times), "gave_up": timing.gave_up, "settled": timing.settled}


def _with_ragged(bench: Bench, config: Config, reply: MeasureReply) -> MeasureReply:
    """The reply after the gate on a small problem that the configuration's tiles don't divide."""
    kernel, problem = bench.kernel, bench.problem
    other = kernel.ragged(problem, config) if kernel.ragged is not None else problem
    if other == problem:
        return {**reply, "ragged": "none"}
    small = Bench(bench.gpu, kernel, other, bench.seed)
    prepared = small.prepare(config)
    if prepared.plan is None:
        # Masks take registers and shared memory: that this problem's code does not fit is no fault of the other's.
        return {**reply, "ragged": f"skipped: {prepared.reply['message']}"}
    small.place()
    reason = small.gate(prepared.plan)
    if reason is None:
        return {**reply, "ragged": "passed"}
    # A record has times exactly when it is right.
    wrong = reply.copy()
    del wrong["times"], wrong["gave_up"], wrong["settled"]
    return {**wrong, "status": Status.INCORRECT, "message": f"on {other}: {reason}", "ragged": "failed"}


class Prepared(NamedTuple):
    """A configuration made ready to run, or the reply that says why it can't."""

    plan: Plan | None
    reply: MeasureReply


class Placed(NamedTuple):
    """An input's place in the device memory that holds all inputs."""

    name: str
    offset: int  # bytes
    data: gate.Bytes  # in host memory, from its first to its last byte, padding included
    dtype: np.dtype[Any]


class Bench:
    """One problem on a GPU: its inputs there, what they should give, and a guarded output."""

    def __init__(self, gpu: Gpu, kernel: Kernel[Any, Any], problem: Problem, seed: int) -> None:
        self.gpu, self.kernel, self.problem, self.seed = gpu, kernel, problem, seed
        self._arrays = problem.inputs(seed)
        self._expected = gate.expect(kernel, problem, self._arrays, seed)
        outputs = problem.outputs()
        self._overwritten = {name: array for name, array in self._arrays.items() if name in outputs}
        # Every configuration has the same arrays; the default stands for all.
        launches = kernel.launches(problem, kernel.default(problem, gpu.device))
        arguments = {each.name: each for launch in launches for each in launch.arguments if each.type is not None}
        self._layouts = {
            name: _layout(output, arguments[f"{name}_ptr"], padded=f"{name}_stride" in arguments)
            for name, output in outputs.items()
        }
        self._strides: dict[str, int] = {}
        if kernel.strides is not None:
            placed = {name: _in_elements(array) for name, array in self._arrays.items()}
            placed |= {name: layout.strides for name, layout in self._layouts.items()}
            self._strides = kernel.strides(problem, placed)
        self._placed, self._slab_bytes = _place(
            {name: array for name, array in self._arrays.items() if name not in self._overwritten}
        )
        self._slabs: list[Any] = []
        self._outs: list[dict[str, Any]] = []
        self._pointers: list[dict[str, Any]] = []
        self._hosts: dict[str, list[gate.Bytes]] = {}
        self._originals: dict[str, Any] = {}
        self._copies: int | None = None

    def place(self) -> None:
        """Puts the arrays into device memory, if they are not there yet: the first of what the GPU is needed for."""
        self._grow(1)

    def prepare(self, config: Config) -> Prepared:
        """Compiles and loads a configuration."""
        try:
            self.kernel.space.check(self.problem, config, self.gpu.device)
            launches = self.kernel.launches(self.problem, config)
            plan = self.gpu.load(launches)
        except IllegalConfigError as error:
            return Prepared(None, {"status": Status.INVALID, "message": str(error)})
        except UnsupportedError as error:
            return Prepared(None, {"status": Status.OUT_OF_RESOURCES, "message": str(error)})
        except CompileError as error:
            heed_machine_fault(error)
            killed = was_killed(error)
            return Prepared(None, {"status": Status.COMPILE_ERROR, "message": str(error), "killed": killed})
        return Prepared(plan, {"status": Status.OK, "resources": dataclasses.asdict(self.gpu.resources(launches))})

    def gate(self, plan: Plan) -> str | None:
        """None, or why two runs of the plan are not accepted."""
        gpu = self.gpu
        if not self._hosts:
            self._hosts = {
                name: [gpu.host_buffer(layout.nbytes) for _ in range(2)] for name, layout in self._layouts.items()
            }
        for run in range(2):
            for name, layout in self._layouts.items():
                poison = gate.poisons(layout.dtype)[run]
                if name in self._overwritten:
                    gpu.upload(self._outs[0][name], layout.holding(self._overwritten[name], poison))
                else:
                    gpu.fill(self._outs[0][name], poison, layout.nbytes)
            plan.run(self._pointers[0], self._strides, gpu.stream)
            for name in self._layouts:
                gpu.download(self._outs[0][name], self._hosts[name][run])
        tolerance = self.kernel.tolerance(self.problem)
        for name, layout in self._layouts.items():
            first, second = self._hosts[name]
            reason = gate.verdict(layout, first, second, self._expected[name], tolerance[name])
            if reason is not None:
                return reason if len(self._layouts) == 1 else f"{name}: {reason}"
        return None

    def sampler(self, plan: Plan) -> tuple[Sampler, str]:
        """What times the plan, and the name of the way it does."""

        launch = plan.bind(tuple(self._pointers[0]), self._strides)

        def run(copy: int) -> None:
            launch(tuple(self._pointers[copy].values()), self.gpu.stream)

        if self._overwritten:
            # No replay: launches in a graph would find what the ones before them left.
            return self.gpu.cold_sampler(run, self._restore), "events"
        if self._copies is None:
            self._copies = self._rotation()
        if self._copies == 0:
            return self.gpu.cold_sampler(run), "events"
        return self.gpu.replay_sampler(run, self._copies), "replay"

    def _restore(self) -> None:
        """Queues copies that make every overwritten array what it was."""
        for name, array in self._overwritten.items():
            layout = self._layouts[name]
            if name not in self._originals:
                self._originals[name] = self.gpu.allocate(layout.nbytes)
                self.gpu.upload(self._originals[name], layout.holding(array, 0))
            self.gpu.copy(self._outs[0][name], self._originals[name], layout.nbytes)

    def _rotation(self) -> int:
        """Copies that replays rotate over, made; 0 for none. Once per problem: its configurations have to compare."""
        device = self.gpu.device
        footprint = self.problem.bytes_moved()
        floor_us = roofline_us(self.problem.flops(), footprint, self.problem.unit, device)
        copies = replay_copies(floor_us, footprint, device.l2_bytes)
        if copies is None:
            return 0
        try:
            self._grow(copies)
        except MemoryError:  # CuPy's OutOfMemoryError is one
            del self._slabs[1:], self._outs[1:], self._pointers[1:]
            self.gpu.release()
            return 0
        return copies

    def _grow(self, copies: int) -> None:
        gpu = self.gpu
        while len(self._pointers) < copies:
            first = not self._outs
            slab = gpu.allocate(self._slab_bytes)
            if not first:
                gpu.copy(slab, self._slabs[0], self._slab_bytes)
            else:
                staging = np.zeros(self._slab_bytes, np.uint8)
                for _, offset, data, _ in self._placed:
                    staging[offset : offset + data.size] = data
                gpu.upload(slab, staging)
            pointers = {
                f"{name}_ptr": gpu.argument(slab, offset, dtype, data.size // dtype.itemsize)
                for name, offset, data, dtype in self._placed
            }
            outs = {}
            for name, layout in self._layouts.items():
                # Only the first copy is looked at, and only it needs its guard zones.
                guard = layout.guard if first else layout.guard % ALIGNMENT
                outs[name] = gpu.allocate(layout.nbytes if first else guard + layout.body)
                elements = layout.body // layout.dtype.itemsize
                pointers[f"{name}_ptr"] = gpu.argument(outs[name], guard, layout.dtype, elements)
            self._slabs.append(slab)
            self._outs.append(outs)
            self._pointers.append(pointers)


def _layout(output: Output, argument: Argument, *, padded: bool) -> gate.OutputLayout:
    """Where an output goes: its rows apart where the kernel takes a stride, off a boundary where none is promised."""
    pitch = output.shape[-1]
    if padded:
        pitch = -(-pitch // 16) * 16 + (16 if argument.aligned else 1)
    kind = np.dtype(dtype(output.dtype).numpy)
    return gate.OutputLayout.of(output.shape, kind, pitch=pitch, aligned=argument.aligned)


def _in_elements(array: np.ndarray[Any, Any]) -> tuple[int, ...]:
    return tuple(stride // array.itemsize for stride in array.strides)


def _place(arrays: Mapping[str, np.ndarray[Any, Any]]) -> tuple[list[Placed], int]:
    """Where each array goes in one piece of device memory, as well aligned there as it is here; and the total."""
    placed, end = [], 0
    for name, array in arrays.items():
        reach = sum((length - 1) * stride for length, stride in zip(array.shape, array.strides, strict=True))
        # All bytes between the first element and the last: column-major and padded arrays are no contiguous ones.
        bits = array.view(f"u{array.itemsize}")  # as_strided knows no fp8
        flat = np.lib.stride_tricks.as_strided(bits, (reach // bits.itemsize + 1,), (bits.itemsize,)).view(np.uint8)
        offset = -(-end // ALIGNMENT) * ALIGNMENT + array.ctypes.data % 16
        placed.append(Placed(name, offset, flat, array.dtype))
        end = offset + flat.size
    return placed, end


def _fault(gpu: Gpu, error: Exception) -> MeasureReply:
    """The reply to a CUDA error that work can go on after; after any other the process ends."""
    text = one_line(error) or type(error).__name__
    if not gpu.alive():
        end_process(text)
    forget()
    return {"status": Status.RUNTIME_ERROR, "message": text}


def end_process(reason: str) -> NoReturn:
    """Ends at once: a normal end would free memory and modules, each with an error of its own, or hang over it."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(EXIT_AFTER_FAULT)


_gpus: dict[int, Gpu] = {}
_latest: Bench | None = None
"""Inputs are kept for the latest problem alone: one is measured with many configurations, and fills gigabytes."""


def forget() -> None:
    """Lets go of the latest problem's arrays."""
    global _latest
    _latest = None


def use_gpu(ordinal: int) -> Gpu:
    """The GPU of that number, taken into use by the first call; raises as `Gpu`."""
    if ordinal not in _gpus:
        _gpus[ordinal] = Gpu(ordinal)
    return _gpus[ordinal]


def _bench(gpu: Gpu, kernel: Kernel[Any, Any], problem: Problem, seed: int) -> Bench:
    global _latest
    if _latest is not None and (_latest.gpu, _latest.kernel.name, _latest.problem, _latest.seed) == (
        gpu,
        kernel.name,
        problem,
        seed,
    ):
        return _latest
    if _latest is not None:
        _latest = None
        gpu.release()
    _latest = Bench(gpu, kernel, problem, seed)
    return _latest

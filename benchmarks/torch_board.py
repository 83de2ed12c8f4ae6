"""The GPU at hand with torch beside us on one stream: times in turns, peaks, dispatch, energy.

A case's contenders are timed by the tuner's own protocol (`tilewright.tuner.timing`): cold L2, one launch between two
events, or for short ones a CUDA graph that rotates over copies of all arrays; in rounds that run forwards and
backwards, so that a drift falls on all alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import Case, computes_all
from benchmarks.contenders import CHECK, Call, Contender, arrays_of, checks, libraries, ours
from benchmarks.measuring import board_environment, environment, median_us, revision
from tilewright.kernels import gemm
from tilewright.kernels.arrays import require_cupy
from tilewright.kernels.device import Device
from tilewright.kernels.dispatch import forget_plans, plan_for
from tilewright.kernels.lookup import recorded_choice
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.prediction import roofline_us
from tilewright.kernels.registry import find_kernel
from tilewright.kernels.runtime import Plan
from tilewright.tuner.gpu import Gpu, read_kernel
from tilewright.tuner.pool import Pool
from tilewright.tuner.runner import Compiler
from tilewright.tuner.timing import Sampler, replay_copies, time_rounds
from tilewright.tuner.turns import turn
from tilewright.tuning_db import env
from tilewright.tuning_db.errors import UsageError

COPY_BYTES = 4 << 30
"""Of the array whose copy gives the bandwidth, where a quarter of the memory is as much: many times any L2."""

MATMUL = 8192
"""Size of the bf16 product that gives the arithmetic peak."""

DISPATCH_CALLS = 300

REPLAYS = 4
"""Of a graph in one step of a closed loop, between two waits."""

COMPARED = 1 << 24
"""Elements of two results that are compared at a time: in fp32 64 MiB of each."""

TURN_S = 120.0
"""How long a case waits for tuning runs on the same GPU."""

ENERGY_S = 1.0
"""Length of a closed loop, at the least: it ends as it begins, where NVML's energy counter moves, which it does every
20 to 100 ms."""

SETTLE_S = 0.3
"""Of the loop before it counts: the power limit acts some tens of milliseconds late."""

RECOMPILE_LIMIT = 256
"""Of one function's variants under torch.compile: one for each case at the most, and torch's own limit is 8."""

PATIENCE_S = 0.5
"""For the energy counter to move: one that stands still is none."""


class Timed(NamedTuple):
    """What came of one contender."""

    median_us: float = 0.0
    p10_us: float = 0.0
    p90_us: float = 0.0
    samples: int = 0
    error: str = ""  # why there are no times
    difference: float | None = None  # max |result - ours| / max |ours|; None where they are not of one function


class TorchGpu(Gpu):
    """A `Gpu` whose graphs torch captures, so that its operators may allocate in them."""

    def __init__(self, ordinal: int, torch: Any) -> None:
        super().__init__(ordinal)
        self._torch = torch
        self.torch_stream = torch.cuda.ExternalStream(self.stream, device=ordinal)

    def capture(self, run: Callable[[int], Any], launches: int, copies: int) -> Callable[[], None]:
        """As `Gpu.capture`; `torch_stream` has to be torch's current one, also for the replays."""
        graph = self._torch.cuda.CUDAGraph()
        results: list[Any] = [None] * copies
        graph.capture_begin(capture_error_mode="relaxed")
        try:
            for index in range(launches):
                # As long as a copy's result is kept, the next one is written elsewhere: to cold memory.
                results[index % copies] = run(index % copies)
        finally:
            graph.capture_end()
        replay: Callable[[], None] = graph.replay
        return replay


class TorchBoard:
    """The live GPU with torch.

    Args:
        ordinal: of the GPU.
        db: folder of the tuning databases that our kernels are looked up in.

    Raises:
        MissingDependencyError, UnknownDeviceError: no GPU, or no CuPy.
        ImportError: no torch.
        UsageError: a torch that can't use the GPU.
    """

    def __init__(self, ordinal: int, db: Path) -> None:
        import torch

        if not torch.cuda.is_available():
            raise UsageError(f"torch {torch.__version__} sees no GPU: install a build for CUDA")
        never_eager(torch)
        os.environ[env.DB_DIR] = str(db)
        forget_plans()
        self.torch = torch
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(ordinal)
        self.gpu = TorchGpu(ordinal, torch)
        self.ordinal = ordinal

    @property
    def device(self) -> Device:
        """The GPU."""
        return self.gpu.device

    @property
    def simulated(self) -> bool:
        """False: what this board gives was measured."""
        return False

    def environment(self) -> dict[str, Any]:
        """Where figures are made."""
        torch = self.torch
        found = environment() | {
            "gpu": torch.cuda.get_device_name(self.ordinal),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "revision": revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        return found | board_environment(self.ordinal)

    def peaks(self) -> dict[str, float]:
        """What the board reaches: a copy's GB/s, read and written, and TFLOP/s of a large bf16 product."""
        torch = self.torch
        with torch.cuda.stream(self.gpu.torch_stream):
            size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
            source = torch.empty(size, dtype=torch.uint8, device="cuda")
            source.random_(0, 256)
            target = torch.empty_like(source)
            copy = time_rounds([self.gpu.cold_sampler(partial(_copy, source, target))])[0].times
            source = target = None
            a, b = (torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            product = time_rounds([self.gpu.cold_sampler(lambda _: torch.mm(a, b.t()))])[0].times
        torch.cuda.empty_cache()
        return {
            "copy_gbs": 2 * size / copy.median_us / 1e3,
            "matmul_tflops": 2 * MATMUL**3 / product.median_us / 1e6,
        }

    def prepare(self, chosen: Sequence[Case], seconds: float) -> int:
        """As `compile_ahead`, on every processor."""
        with Pool(len(os.sched_getaffinity(0))) as pool:
            return compile_ahead(Compiler(pool, self.device), self.device, chosen, env.database_dir(), seconds)

    def chosen(self, case: Case) -> dict[str, Any]:
        """The configuration that our function runs a case with, and what speaks for it."""
        _, choice = plan_for(find_kernel(case.op), case.problem, self.ordinal)
        return {
            "config": choice.config.to_dict(),
            "provenance": str(choice.provenance),
            "reason": choice.reason,
        }

    def contenders(self, case: Case) -> list[Contender]:
        """Ours as looked up, ours by default, and the library's; and what ours is checked by where nothing of the
        library's computes it."""
        kernel = find_kernel(case.op)
        default = kernel.default(case.problem, self.device)
        own = ours(self.torch, case), ours(self.torch, case, default)
        return [*own, *libraries(self.torch, case), *checks(self.torch, case)]

    def compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
        """What came of each, timed in turns; and the method, `replay` or `events`."""
        with turn(Path(tempfile.gettempdir()), self.gpu.address, TURN_S):
            return self._compare(case, contenders)

    def _compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
        torch, gpu = self.torch, self.gpu
        with torch.cuda.stream(gpu.torch_stream), torch.no_grad():
            arrays = [arrays_of(torch, case)]
            found = checked(torch, case, contenders, arrays[0])
            running = [each for each in contenders if not found[each.name].error and each.role != CHECK]
            footprint = case.problem.bytes_moved()
            floor_us = roofline_us(case.problem.flops(), footprint, case.problem.unit, self.device)
            copies = replay_copies(floor_us, footprint, self.device.l2_bytes) or 0
            arrays += [{name: array.clone() for name, array in arrays[0].items()} for _ in range(copies - 1)]
            samplers: dict[str, Sampler] = {}
            for contender in running:
                try:
                    samplers[contender.name] = self._sampler(contender, arrays, copies)
                except Exception as error:  # noqa: BLE001 - as above
                    found[contender.name] = Timed(error=_one_line(error))
            timings = time_rounds(list(samplers.values()))
        for name, timing in zip(samplers, timings, strict=True):
            found[name] = Timed(**dataclasses.asdict(timing.times), difference=found[name].difference)
        samplers.clear()
        arrays.clear()
        torch.cuda.empty_cache()
        gpu.release()
        return {each.name: found[each.name] for each in contenders}, "replay" if copies else "events"

    def _sampler(self, contender: Contender, arrays: Sequence[Any], copies: int) -> Sampler:
        if copies:
            return self.gpu.replay_sampler(lambda copy: contender.call(arrays[copy]), copies)
        # As a graph too: some calls take the host longer than the flush before them takes the GPU.
        replay = self.gpu.capture(lambda copy: contender.call(arrays[copy]), 1, 1)
        return self.gpu.cold_sampler(lambda _: replay())

    def dispatch(self) -> list[tuple[str, float]]:
        """Host time of one call, in µs, the GPU kept from being waited for: ours, the driver's share of it, torch's,
        Triton's launcher."""
        torch = self.torch
        a, b, out = (torch.randn(128, 128, device="cuda", dtype=torch.float16) for _ in range(3))
        buffer, flag = torch.zeros(4096, dtype=torch.int32, device="cuda"), torch.zeros(1, dtype=torch.int32).cuda()
        cupy = require_cupy()
        arrays = [cupy.from_dlpack(each) for each in (a, b, out)]
        plan, _ = plan_for(GEMM, GemmProblem(M=128, N=128, K=128), self.ordinal)
        launch = driver_launch(plan, ("a_ptr", "b_ptr", "out_ptr"), [each.data_ptr() for each in (a, b, out)])
        grid = read_kernel[(1,)]
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("gemm(a, b, out=out), torch's arrays", lambda: gemm(a, b, out=out)),
            ("gemm(a, b), torch's arrays", lambda: gemm(a, b)),
            ("gemm(a, b, out=out), CuPy's arrays", lambda: gemm(arrays[0], arrays[1], out=arrays[2])),
            ("the driver's launch alone, of the same kernel", launch),
            ("torch.mm(a, b, out=out)", lambda: torch.mm(a, b, out=out)),
            ("Triton's launcher, two arguments", lambda: grid(buffer, flag, BLOCK=4096)),
        ]
        rows = []
        for label, call in calls:
            call()
            # The queue holds a thousand launches: within it, no call waits for the GPU.
            rounds = []
            for _ in range(9):
                torch.cuda.synchronize()
                rounds.append(median_us(call, DISPATCH_CALLS, rounds=1))
            rows.append((label, sorted(rounds)[len(rounds) // 2]))
        torch.cuda.synchronize()
        return rows

    def load(self, case: Case, contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
        """Closed loops over captured graphs: calls a second, and joules a call where NVML counts energy. Each contender
        has two, the second in reverse order, so that a drift of clocks and heat falls on all alike."""
        torch, gpu = self.torch, self.gpu
        loops: dict[str, list[Loop]] = {contender.name: [] for contender in contenders}
        footprint = case.problem.bytes_moved()
        copies = min(64, 1 + 4 * self.device.l2_bytes // footprint)
        with torch.cuda.stream(gpu.torch_stream), torch.no_grad():
            arrays = [arrays_of(torch, case)]
            arrays += [{name: array.clone() for name, array in arrays[0].items()} for _ in range(copies - 1)]
            graphs = {}
            for contender in contenders:
                contender.call(arrays[0])

                def one(copy: int, call: Call = contender.call) -> Any:
                    return call(arrays[copy])

                graphs[contender.name] = gpu.capture(one, copies, copies)
            for name in (*graphs, *reversed(graphs)):

                def step(graph: Callable[[], None] = graphs[name]) -> None:
                    for _ in range(REPLAYS):
                        graph()
                    torch.cuda.synchronize()

                loops[name].append(closed_loop(step, self._joules))
            graphs.clear()
        torch.cuda.empty_cache()
        return {name: rates(found, REPLAYS * copies) for name, found in loops.items()}

    def clocks(self) -> dict[str, Any]:
        """As `Gpu.clocks`."""
        return self.gpu.clocks()

    def _joules(self) -> float | None:
        with contextlib.suppress(ImportError):
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByPciBusId(self.gpu.address.encode())
                return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        return None


def never_eager(torch: Any) -> None:
    """Makes what torch compiled run compiled, or fail.

    All epilogues are closures of one code object, whose variants torch counts together. Beyond the limit it runs the
    function as it stands, operator by operator, and says so in its log alone: figures of "compiled elementwise" would
    be of something else.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def compile_ahead(compiler: Compiler, device: Device, chosen: Sequence[Case], db: Path, seconds: float) -> int:
    """Compiles the cases' configurations of ours, those on record and the defaults, into Triton's on-disk cache, where
    the calls find them: one after another they would take minutes of the run. Gives up after so many seconds; how many
    were compiled."""
    futures = []
    for case in chosen:
        kernel = find_kernel(case.op)
        recorded = recorded_choice(kernel, case.problem, device, db)
        configs = [kernel.default(case.problem, device), *([] if recorded is None else [recorded.config])]
        futures += [compiler.submit(kernel, case.problem, config) for config in dict.fromkeys(configs)]
    wait(futures, seconds)
    return compiler.compiled


class Loop(NamedTuple):
    """What a closed loop came to."""

    steps: int
    seconds: float
    joules: float | None  # None where they are not counted


def closed_loop(
    step: Callable[[], None], joules: Callable[[], float | None], clock: Callable[[], float] = time.perf_counter
) -> Loop:
    """Steps for `SETTLE_S` that don't count, and then for `ENERGY_S`, from one move of the counter to another."""

    def until_it_moves(last: float | None) -> int:
        """Steps until the counter has moved, or `PATIENCE_S` have passed."""
        steps, began = 0, clock()
        while last is not None and joules() == last and clock() - began < PATIENCE_S:
            step()
            steps += 1
        return steps

    began = clock()
    while clock() - began < SETTLE_S:
        step()
    until_it_moves(joules())
    steps, before, start = 0, joules(), clock()
    while clock() - start < ENERGY_S:
        step()
        steps += 1
    steps += until_it_moves(joules())
    seconds, after = clock() - start, joules()
    return Loop(steps, seconds, None if before is None or after is None else after - before)


def rates(loops: Sequence[Loop], calls: int) -> dict[str, float]:
    """Calls a second, and joules a call and watts where all loops counted energy, of so many calls a step."""
    count, seconds = calls * sum(loop.steps for loop in loops), sum(loop.seconds for loop in loops)
    found = {"calls_per_s": count / seconds}
    counted = [loop.joules for loop in loops if loop.joules]
    if len(counted) == len(loops):
        found |= {"joules_per_call": sum(counted) / count, "watt": sum(counted) / seconds}
    return found


def driver_launch(plan: Plan, names: Sequence[str], addresses: Sequence[int]) -> Callable[[], None]:
    """The driver's launch alone, on the default stream, of a plan that has one: what a call costs beyond it is ours."""
    launch: Any = plan.bind(names, {})
    bound, given = launch.__self__, []
    start, bound.start = bound.start, lambda *parameters: given.append(parameters)
    launch(addresses, 0)
    bound.start = start

    def alone() -> None:
        bound.start(*given[0])  # of the object that owns the parameters' memory

    return alone


def checked(torch: Any, case: Case, contenders: Sequence[Contender], arrays: Any) -> dict[str, Timed]:
    """What each comes to when it is called once: an error, or, where it computes the very function, how far its result
    is from ours, the first's."""
    found: dict[str, Timed] = {}
    ours_result: Any = None
    for contender in contenders:
        try:
            result = contender.call(arrays)
            torch.cuda.synchronize()
            ours_result = result if ours_result is None else ours_result
            comparable = computes_all(case, contender.role)
            found[contender.name] = Timed(difference=difference(ours_result, result) if comparable else None)
            del result
        except Exception as error:  # noqa: BLE001 - whatever a library refuses a case with, others go on
            found[contender.name] = Timed(error=_one_line(error))
    return found


def difference(ours_result: Any, result: Any) -> float:
    """max |result - ours| / max |ours| over all elements, of torch's tensors; infinite where one has a NaN or an
    infinity that the other has not, and 0 where both are the same."""
    if result.dim() == 4 and ours_result.dim() == 2:
        result = result.permute(0, 2, 3, 1)  # of images, where ours are the rows of a GEMM
    if result.numel() != ours_result.numel():
        raise ValueError(f"a result of {tuple(result.shape)}, where ours is of {tuple(ours_result.shape)}")
    largest = apart = 0.0
    pairs = zip(ours_result.reshape(-1).split(COMPARED), result.reshape(-1).split(COMPARED), strict=True)
    for one, other in ((one.float(), other.float()) for one, other in pairs):
        same = (one == other) | (one.isnan() & other.isnan())
        gap = float((one - other).abs_().masked_fill_(same, 0.0).max())  # infinities that are the same have none
        if not math.isfinite(gap):
            return math.inf
        apart = max(apart, gap)
        largest = max(largest, float(one.abs().nan_to_num_(0.0, 0.0, 0.0).max()))
    return apart / largest if largest else math.inf if apart else 0.0


def _copy(source: Any, target: Any, _: int) -> None:
    target.copy_(source)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

"""How long a configuration should take on a device that need not be there: an analytical model.

The launch runs in waves of SMs · occupancy blocks. With r blocks on the busiest SM, a wave takes

    busy  = overlap(max(r·compute + stalls / r, chain), r·beside, r·shared, r·issue, r·l2, dram, latency) + r·spills
    alone = overlap(chain, shared, issue, l2, dram / r, latency) + spills
    first wave: busy + ends         later waves: max(busy, alone + follow)

`compute` to `l2` are what the main loop of one block needs of its SM, `beside` its exponentials and other work between
dots; `stalls` are its waits at barriers and, without a pipeline, for memory; `chain` is what one block computes and
waits, one after the other, with the tensor cores idle that only neighbours fill; `dram` is the traffic of the whole
wave; `latency` is what waiting for tiles costs in spite of the pipeline. `ends` is a block's time before and after its
loop, which neighbours hide once the blocks are no longer in step; `follow` is what lies between two tiles. Resources
work at the same time, but never quite independently: overlap(x…) = (Σ x⁴)^¼ is the longest of them, and up to a fifth
more when another is as long.

`docs/prediction.md` derives each term, with its source. Each is a function below that can be called alone, and
`predict(..., without={Term.X})` leaves one out, which is how the tests show that it decides something.

The result orders configurations; it is no measurement and is never called one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

from tilewright.kernels.device import SUBPARTITIONS, WARP_SIZE, Device
from tilewright.kernels.work import LINE_BYTES, Dot, Panel, Work, reads_operands_shared
from tilewright.tuning_db.record import Resources

MODEL = "roofline-5"
"""Name and revision of this model: part of every predicted record's key. Change it with any formula or constant."""


class Term(StrEnum):
    """The parts of the model."""

    COMPUTE = "compute"  # padded tiles over the rate of the tensor or CUDA cores
    BESIDE = "beside"  # exponentials and other work beside the dots
    ISSUE = "issue"  # instruction slots, and too few warps or independent mma to keep the tensor cores busy
    SHARED = "shared"  # operands written to shared memory, and read once per warp tile
    L2 = "l2"  # operand tiles through L2
    LINES = "lines"  # rows shorter than a line of the cache
    DRAM = "dram"  # device memory
    REUSE = "reuse"  # panels shared within a wave, by GROUP_M, and kept from wave to wave
    WAVES = "waves"  # a last, partly filled wave
    UNEVEN = "uneven"  # tiles of different lengths, the last of which begins late
    OCCUPANCY = "occupancy"  # resident blocks hide each other's latency
    PIPELINE = "pipeline"  # num_stages of copies in flight
    ALIGNMENT = "alignment"  # narrow loads are not asynchronous and cost instructions
    SPLIT_K = "split_k"  # partial tiles written, read and waited for
    LAUNCH = "launch"  # of kernels and of blocks
    EPILOGUE = "epilogue"  # bytes of the output and residual
    SPILLS = "spills"  # registers kept in local memory


# Constants, none of them but `BLOCK_GAP_CYCLES` fitted to a result of ours; that lines count whole (`l2_cycles`) was
# read off some as well. Cycles are SM clocks at boost; "gpu-benches" are the measured tables of
# github.com/te42kyfo/gpu-benches.
DRAM_EFFICIENCY = 0.9  # gpu-benches: 0.85 to 0.92 on A100, 0.92 to 0.98 on L40; a copy on H200: 4.3 of 4.8 TB/s
COMPUTE_EFFICIENCY = 0.9  # of the dense peak, sustained by a full pipeline
COMPUTE_EFFICIENCY_HOPPER = 0.82  # power holds the clock down: just over what cuBLAS reaches, 0.78 to 0.81 (docs)
MMA_SYNC_SHARE = {9: 0.62, 10: 0.31}
"""Of the peak, by major arch: wgmma and tcgen05 alone reach it. Luo et al., arXiv:2402.13499, find 62.9 % on average on
Hopper; Blackwell has twice the peak, and its mma.sync is taken to be no faster than Hopper's."""
SHARED_BYTES_PER_CYCLE = 128  # per SM: 32 banks of 4 B (CUDA C++ Programming Guide, "Shared Memory")
SM_PORT_BYTES_PER_CYCLE = 64  # what one SM can take from L2 (NVIDIA A100 whitepaper, "L2 cache": 64 B/clk/SM)
L2_BYTES_PER_CYCLE = {75: 23.0, 80: 35.5, 86: 16.6, 89: 14.7, 90: 37.5, 100: 37.5, 120: 14.7}
"""What L2 gives each SM when all ask, by arch: gpu-benches' 2.54, 5.4, 2.43, 5.2 and 9.8 TB/s on V100, A100, A40, L40
and H200 over SMs · clock. sm_75 is taken from V100, sm_100 from sm_90, sm_120 from sm_89, the nearest measured."""
DRAM_LATENCY_CYCLES = 600  # gpu-benches, pointer chasing: 436 V100, 572 A100, 632 L40, 658 H100
L2_LATENCY_CYCLES = 270  # same: 211 A100, 277 L40, 266 H100; up to 430 in the far half of A100
SHARED_LATENCY_CYCLES = 30  # Jia et al., arXiv:1804.06826 and 1903.07486; Luo et al.: 22 to 33
MMA_LATENCY_CYCLES = 33  # m16n8k16 on sm_80 and sm_86 (Sun et al., arXiv:2206.02874), sm_90 (Luo et al.)
FMA_LATENCY_CYCLES = 4  # Jia et al., 1804.06826
LANES_PER_CYCLE = {75: 64, 80: 64}
"""fp32 operations per cycle and SM, by arch; 128 on the others (CUDA C++ Programming Guide, "Throughput of Native
Arithmetic Instructions")."""
SPECIAL_PER_CYCLE = 16  # exponentials and the like per cycle and SM, on every arch (same table)
# Instructions of a warp, counted in the SASS of compiled kernels for sm_86: within 3 % of the loops of 5 tile shapes.
LOOP_INSTRUCTIONS = 40  # per iteration: counters, buffer indices, barriers
COPY_INSTRUCTIONS = 3  # per cp.async of 16 bytes a lane: itself and a 64-bit address
NARROW_INSTRUCTIONS = 8  # per narrower load: address, mask, load, pack, store
MMA_INSTRUCTIONS = 1.5  # per mma.sync: itself, and register moves around every other one
BARRIER_CYCLES = 40  # per iteration: wait for the copies, then for the other warps (a judgement; no source)
LAUNCH_US = 0.9  # between kernels of one stream: 3.8 - 2.9 µs (A. Gray, "Getting Started with CUDA Graphs", NVIDIA)
BLOCK_START_CYCLES = 500  # some 300 instructions before the loop, most of them waiting for another (a judgement)
BLOCK_GAP_CYCLES = {90: 9900}
"""Between a block that has an SM to itself and its successor, beside what `end_cycles` has, by arch; nothing is known
of the others. Measured on an H200 (Triton 3.6; benchmarks/results/h200): 8192×8192×1024 of fp16 in tiles of 128×256
takes 332 µs and, persistent, 232; of the 6.7 µs a wave between them, 1.7 are the ends. At 4096³ it is 223 and 185."""
ATOMIC_CYCLES = 2 * L2_LATENCY_CYCLES  # a fence until the partial tile is in L2, and the atomic there and back


SPILL_DOUBT = 1.5
"""Factor on the time of what should spill, where a search weighs it against others: estimates of registers are off by a
quarter at times, so it may not, and if it does a trial is lost. (A judgement; no source.)"""


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted time and what it is made of."""

    time_us: float
    bound: Term  # what the main loop waits for
    waves: float
    occupancy: int  # resident blocks per SM
    dram_bytes: float
    spill_bytes: int = 0  # a thread, of the resources it was made from

    @property
    def order(self) -> tuple[bool, float]:
        """By which configurations are ranked: what should spill comes last, for such code is refused."""
        return self.spill_bytes > 0, self.time_us

    @property
    def prior_us(self) -> float:
        """What a search expects, in microseconds: of what should spill more than its time."""
        return self.time_us * (SPILL_DOUBT if self.spill_bytes else 1.0)


class Iteration(NamedTuple):
    """Cycles of one main-loop iteration of one block, by resource; 0 for what is left out."""

    compute: float
    beside: float
    idle: float  # factor on `compute` for a block that has the SM to itself
    shared: float
    copied: float  # of `shared`, until a tile is in registers and its buffer free; 0 where the dot reads it in place
    issue: float
    spills: float


class Demand(NamedTuple):
    """Cycles that one wave needs of each resource; 0 for what is left out."""

    compute: float
    beside: float
    shared: float
    issue: float
    l2: float
    dram: float
    pipeline: float  # what latency alone allows: tiles asked for `tiles_ahead` iterations early

    @property
    def longest(self) -> Term:
        """The resource that takes longest."""
        return Term(self._fields[self.index(max(self))])


class Datapath(StrEnum):
    """What a dot becomes."""

    WGMMA = "wgmma"  # wgmma or tcgen05: operands stay in shared memory, read once for 4 warps
    MMA = "mma"  # mma.sync: each warp reads its operands into registers
    FMA = "fma"  # CUDA cores


def predict(work: Work, resources: Resources, device: Device, *, without: Collection[Term] = ()) -> Prediction:
    """The predicted time of a launch, in microseconds.

    `resources` are the compiled kernel's, or an estimate of them; `without` leaves terms out, for ablation.
    """
    if Term.ALIGNMENT in without:
        work = replace(work, vector_bytes=16)
    resident = 1 if Term.OCCUPANCY in without else occupancy(work, resources, device)
    concurrent = device.sms * resident
    total = work.blocks
    full, rest = divmod(total, concurrent)
    waves: list[tuple[float, int, int]] = []  # how many, blocks in each, blocks on the busiest SM
    if Term.WAVES in without:
        waves.append((total / concurrent, concurrent, resident))
    else:
        if full:
            waves.append((full, concurrent, resident))
        if rest:
            waves.append((1, rest, math.ceil(rest / device.sms)))

    iteration = iteration_cycles(work, resources, device, without)
    cycles, traffic, loop = 0.0, 0.0, 0.0
    bound: Term | None = None
    for count, blocks, busiest in waves:
        rate = l2_rate(device, blocks)
        moved = dram_bytes(work, device, blocks, without)
        demand = wave_demand(work, device, iteration, rate, busiest, moved, without)
        stalls = 0.0 if Term.PIPELINE in without else stall_cycles(work, device, demand.pipeline)
        # A warp sits on one sub-partition: the work beside the dots of fewer than four leaves units without any.
        beside = iteration.beside * max(1.0, SUBPARTITIONS / work.num_warps)
        chain = work.iterations * serial_cycles(work, iteration.compute * iteration.idle, beside) + stalls
        busy = busy_cycles(demand, chain, stalls, busiest) + busiest * work.iterations * iteration.spills
        alone = alone_cycles(demand, chain, busiest) + work.iterations * iteration.spills
        ends = end_cycles(work, rate, without)
        # Blocks of the first wave start together: nothing hides their first loads. Later ones start where one ends.
        first = min(count, 1.0) if bound is None else 0.0
        follow = follow_cycles(work, device, rate, resident, without)
        cycles += first * (busy + ends) + (count - first) * max(busy, alone + follow)
        traffic += count * moved
        if bound is None:
            loop = busy
            bound = demand.longest if chain <= 1.25 * max(demand) else Term.PIPELINE
    if work.splits > 1:
        cycles += finish_cycles(work, device, without)
    if Term.UNEVEN not in without:
        cycles += uneven_tiles(work, concurrent) * loop
    time = cycles / device.boost_mhz
    if Term.LAUNCH not in without:
        time += work.launches * LAUNCH_US
    return Prediction(time, bound or Term.LAUNCH, total / concurrent, resident, traffic, resources.spill_bytes)


def overlap(*times: float) -> float:
    """Time of resources that work side by side: the longest, and a little more when others are nearly as long."""
    longest = max(times)
    if longest <= 0.0:
        return 0.0
    total = 0.0
    for time in times:
        share = time / longest
        share *= share
        total += share * share
    return longest * math.sqrt(math.sqrt(total))


def iteration_cycles(work: Work, resources: Resources, device: Device, without: Collection[Term] = ()) -> Iteration:
    """What one iteration of one block needs of its SM."""
    issues = Term.ISSUE not in without
    read = 0.0 if Term.SHARED in without else read_cycles(work, device)
    written = 0.0 if Term.SHARED in without else written_cycles(work)
    return Iteration(
        compute=0.0 if Term.COMPUTE in without else compute_cycles(work, device),
        beside=0.0 if Term.BESIDE in without else beside_cycles(work, device),
        idle=idle_factor(work, device) if issues else 1.0,
        shared=written + read,
        copied=0.0 if datapath(work, device) is Datapath.WGMMA else read,
        issue=issue_cycles(work, device) if issues else 0.0,
        spills=0.0 if Term.SPILLS in without else spill_cycles(work, resources),
    )


def wave_demand(
    work: Work,
    device: Device,
    iteration: Iteration,
    rate: float,
    busiest: int,
    moved: float,
    without: Collection[Term] = (),
) -> Demand:
    """What one wave needs of each resource, with `busiest` blocks on one SM, `rate` bytes per cycle from L2 to each SM,
    and `moved` bytes through device memory."""
    iterations = busiest * work.iterations
    return Demand(
        compute=iterations * iteration.compute,
        beside=iterations * iteration.beside,
        shared=iterations * iteration.shared,
        issue=iterations * iteration.issue,
        l2=0.0 if Term.L2 in without else busiest * l2_cycles(work, rate, without),
        dram=0.0 if Term.DRAM in without else dram_cycles(moved, device),
        pipeline=0.0
        if Term.PIPELINE in without
        else work.iterations * latency_cycles(work, iteration, rate) / tiles_ahead(work, device),
    )


def serial_cycles(work: Work, compute: float, beside: float) -> float:
    """Cycles of one iteration of a block that runs alone: its dots and what lies beside them, one after the other, but
    where the second dot runs during the latter, or two groups of warps take turns at both."""
    if work.specialized:
        return (compute + beside) / 2
    if not work.overlapped:
        return compute + beside
    first, second = work.tile_m * work.tile_n * work.tile_k, math.prod(work.second or (0,))
    during = compute * second / (first + second)
    return compute - during + max(during, beside)


def stall_cycles(work: Work, device: Device, latency: float) -> float:
    """Cycles of a block's main loop in which it computes nothing.

    Whatever stages there are, the warps meet at a barrier and then read shared memory. Without asynchronous copies they
    wait for memory too, `latency` cycles in all.
    """
    synchronised = work.iterations * (BARRIER_CYCLES + SHARED_LATENCY_CYCLES)
    return float(synchronised) if asynchronous(work, device) else synchronised + latency


def busy_cycles(demand: Demand, chain: float, stalls: float, busiest: int) -> float:
    """Cycles until all blocks of a wave have run their loops.

    Of the time that a block stalls, its neighbours leave less unused the more they are.
    """
    compute, beside, shared, issue, l2, dram, latency = demand
    return overlap(max(compute + stalls / busiest, chain), beside, shared, issue, l2, dram, latency)


def alone_cycles(demand: Demand, chain: float, busiest: int) -> float:
    """Cycles of the loop of one of the `busiest` blocks on an SM, if the others were done."""
    _, _, shared, issue, l2, dram, latency = demand
    return overlap(chain, shared / busiest, issue / busiest, l2 / busiest, dram / busiest, latency)


def occupancy(work: Work, resources: Resources, device: Device) -> int:
    """Blocks that an SM holds at once: the least of what registers, shared memory, warps and slots allow; at least 1.

    Registers are given out per warp in units of 256, from the quarter of the file that the warp's sub-partition has;
    shared memory in units of 128 bytes, with 1 KiB more per block than it asks for from sm_80 on. (CUDA C++ Programming
    Guide, "Technical Specifications per Compute Capability"; the CUDA Occupancy Calculator's allocation granularities.)
    """
    registers_per_warp = math.ceil(max(resources.registers, 1) * WARP_SIZE / 256) * 256
    warps = device.registers_per_sm // SUBPARTITIONS // registers_per_warp * SUBPARTITIONS
    shared = math.ceil(resources.shared_bytes / 128) * 128 + (1024 if device.arch >= 80 else 0)
    return max(
        1,
        min(
            warps // work.num_warps,
            device.shared_per_sm // shared if shared else device.blocks_per_sm,
            device.warps_per_sm // work.num_warps,
            device.blocks_per_sm,
        ),
    )


def datapath(work: Work, device: Device) -> Datapath:
    """What Triton lowers the dot to (read off compiled kernels, 3.6 and 3.9)."""
    if work.unit == "fp32" or not device.tensor_tflops:
        return Datapath.FMA
    shared = reads_operands_shared(device, work.unit, work.tile_m, work.num_warps)
    return Datapath.WGMMA if shared else Datapath.MMA


def thread_tile(work: Work, dot: Dot) -> float:
    """Rows plus columns of a dot's result that one thread owns on the FMA path: about square."""
    return 2.0 * math.sqrt(max(1.0, dot.m * dot.n / (work.num_warps * WARP_SIZE)))


def dot_rate(work: Work, device: Device) -> float:
    """FLOP per cycle and SM that the datapath sustains."""
    efficiency = COMPUTE_EFFICIENCY_HOPPER if device.hopper else COMPUTE_EFFICIENCY
    if datapath(work, device) is Datapath.MMA:
        efficiency *= MMA_SYNC_SHARE.get(device.major, 1.0)
    return device.tflops(work.unit) * 1e6 / (device.sms * device.boost_mhz) * efficiency


def compute_cycles(work: Work, device: Device) -> float:
    """Cycles of one block's dot at the SM's rate: 2·BM·BN·BK FLOP, padding and warps that repeat others included."""
    products = 0.0
    for dot in work.dots:
        each_warp = datapath(work, device) is Datapath.MMA
        products += (work.num_warps * dot.rows * dot.columns if each_warp else dot.m * dot.n) * dot.k
    return 2.0 * products / dot_rate(work, device) if products else 0.0


def beside_cycles(work: Work, device: Device) -> float:
    """Cycles of one iteration's work beside its dots, on the CUDA cores and in the units for exponentials.

    It lies between the dots of its own block: only other blocks' dots run at the same time.
    """
    lanes = LANES_PER_CYCLE.get(device.arch, 128)
    return max(work.lane_ops / lanes, work.special_ops / SPECIAL_PER_CYCLE)


def idle_factor(work: Work, device: Device) -> float:
    """How much longer the dot of a block alone takes because too little of it is in flight; 1 when nothing idles.

    Each of the SM's 4 tensor cores needs a warp, and back-to-back mma of one accumulator wait 33 cycles for each
    other: a sub-partition with w warps of i accumulator tiles keeps w·i mma in flight, each of which occupies its
    tensor core for its FLOP over the rate. CUDA cores have a latency of 4 cycles, which 4 accumulators a thread hide.
    """
    path = datapath(work, device)
    if path is Datapath.WGMMA:
        return 1.0
    per_core = work.num_warps / SUBPARTITIONS
    idle = max(1.0, 1 / per_core)
    if path is Datapath.FMA:
        accumulators = work.tile_m * work.tile_n / (work.num_warps * WARP_SIZE)
        return idle * max(1.0, FMA_LATENCY_CYCLES / (accumulators * max(1.0, per_core)))
    if not work.dots:
        return 1.0
    in_flight = min((dot.rows / 16) * (dot.columns / 8) for dot in work.dots) * max(1.0, per_core)
    flop = 2 * 16 * 8 * 32 / work.operand_bytes  # one mma is 32 bytes deep: k16 of fp16, k8 of tf32
    occupied = flop * SUBPARTITIONS / dot_rate(work, device)
    return idle * max(1.0, MMA_LATENCY_CYCLES / (in_flight * occupied))


def issue_cycles(work: Work, device: Device) -> float:
    """Cycles in which the schedulers issue one iteration's instructions, one each a cycle."""
    path = datapath(work, device)
    instructions = float(LOOP_INSTRUCTIONS * work.num_warps) + (work.lane_ops + work.special_ops) / WARP_SIZE
    brought = work.staged_bytes if work.dots else work.load_bytes
    each = COPY_INSTRUCTIONS if work.vector_bytes >= 16 else NARROW_INSTRUCTIONS
    instructions += brought / (WARP_SIZE * work.vector_bytes) * each
    for dot in work.dots:
        if path is Datapath.MMA:
            mma = work.num_warps * (dot.rows / 16) * (dot.columns / 8) * dot.k * work.operand_bytes / 32
            lines = (dot.rows if dot.staged else 0.0) + dot.columns
            ldmatrix = work.num_warps * lines * dot.k * work.operand_bytes / 512  # four 8×8 at a time
            instructions += MMA_INSTRUCTIONS * mma + ldmatrix
        elif path is Datapath.FMA:
            fma = dot.m * dot.n * dot.k / WARP_SIZE
            loads = work.num_warps * thread_tile(work, dot) * dot.k / 4  # four words at a time
            instructions += fma + loads
    return instructions / SUBPARTITIONS


def written_cycles(work: Work) -> float:
    """Cycles in which one iteration's operands are written to shared memory."""
    return work.staged_bytes / SHARED_BYTES_PER_CYCLE


def read_cycles(work: Work, device: Device) -> float:
    """Cycles in which one iteration's operands are read from shared memory, by every warp what it needs."""
    path = datapath(work, device)
    read = 0.0
    for index, dot in enumerate(work.dots):
        if path is Datapath.FMA:
            # Each thread reads its rows and columns, as fp32; about half of a warp's lanes ask for what others ask for.
            read += 0.5 * work.num_warps * WARP_SIZE * thread_tile(work, dot) * dot.k * 4
        elif path is Datapath.WGMMA:
            # One instruction reads 64 rows of A and up to 256 columns of B, for the 4 warps of a group. A of a second
            # dot is in registers.
            groups_across = max(1.0, work.num_warps / 4 * 64 / dot.m)
            columns = min(256.0, dot.n / groups_across)
            lines = dot.n * dot.m / 64 + (dot.m * dot.n / columns if index == 0 else 0.0)
            read += lines * dot.k * work.operand_bytes
        else:
            lines = work.num_warps * ((dot.rows if dot.staged else 0.0) + dot.columns)
            read += lines * dot.k * work.operand_bytes
    return read / SHARED_BYTES_PER_CYCLE


def spill_cycles(work: Work, resources: Resources) -> float:
    """Cycles in which one iteration stores and reloads what spilled, once each, through L1."""
    return 2.0 * resources.spill_bytes * work.num_warps * WARP_SIZE / SHARED_BYTES_PER_CYCLE


def l2_rate(device: Device, blocks: int) -> float:
    """Bytes per cycle that L2 gives each of the SMs that `blocks` keep busy: a few may take all their ports carry."""
    active = min(device.sms, blocks)
    return min(SM_PORT_BYTES_PER_CYCLE, L2_BYTES_PER_CYCLE[device.arch] * device.sms / active)


def l2_bytes(work: Work, without: Collection[Term] = ()) -> float:
    """Bytes between one block and L2: its operands, its share of the epilogue, its partial tile out and in again."""
    total = work.iterations * work.load_bytes
    if Term.EPILOGUE not in without:
        total += work.epilogue_bytes / work.splits
    if Term.SPLIT_K not in without:
        total += 2 * work.workspace_bytes
    return total


def l2_cycles(work: Work, rate: float, without: Collection[Term] = ()) -> float:
    """Cycles in which one block's bytes pass from L2 to its SM, at `rate` bytes per cycle.

    The SM asks for lines, and each takes the time of a whole one through its port: tiles with rows of 32 or 64 bytes
    take as long as those with rows of 128. (Not documented; on an H200 the samples in docs/landscapes.md show it for
    GEMMs and convolutions, with descriptors and without.)
    """
    asked = 0.0 if Term.LINES in without else work.iterations * work.load_lines * LINE_BYTES
    return max(l2_bytes(work, without) / rate, asked / SM_PORT_BYTES_PER_CYCLE)


def asynchronous(work: Work, device: Device) -> bool:
    """Whether tiles are copied while others are computed: cp.async needs sm_80, 4 bytes a load, and 2 stages.

    Without it Triton pipelines nothing: any number of stages compiles to the same code.
    """
    return device.arch >= 80 and work.vector_bytes >= 4 and work.num_stages > 1


def latency_cycles(work: Work, iteration: Iteration, rate: float) -> float:
    """Cycles from asking for a tile until its buffer can take another: device memory answers, the tile passes through
    L2, and where the dot takes its operands from registers, all warps have read it."""
    return DRAM_LATENCY_CYCLES + work.load_bytes / rate + iteration.copied


def tiles_ahead(work: Work, device: Device) -> int:
    """How many iterations before its use a tile is asked for."""
    return work.num_stages - 1 if asynchronous(work, device) else 1


def end_cycles(work: Work, rate: float, without: Collection[Term] = ()) -> float:
    """Cycles that a block spends before its first dot and after its last, with `rate` bytes per cycle from L2."""
    cycles = 0.0
    if Term.LAUNCH not in without:
        cycles += BLOCK_START_CYCLES
    cycles += fill_cycles(work, rate, without)
    if work.splits == 1:
        if Term.EPILOGUE not in without:
            cycles += work.epilogue_bytes / rate
    elif Term.SPLIT_K not in without:
        cycles += work.workspace_bytes / rate + ATOMIC_CYCLES
    return cycles


def fill_cycles(work: Work, rate: float, without: Collection[Term] = ()) -> float:
    """Cycles until the first tile has arrived, while there is nothing to compute."""
    return 0.0 if Term.PIPELINE in without else DRAM_LATENCY_CYCLES + work.load_bytes / rate


def follow_cycles(work: Work, device: Device, rate: float, resident: int, without: Collection[Term] = ()) -> float:
    """Cycles between the loops of two tiles that are computed in one place, one after the other.

    They are the ends of two blocks, and where one fills the SM, the time until it has gone and the other has come. A
    persistent block stays, and has only its epilogue and the next pipeline to fill, which warps that do nothing but
    copy have filled by then.
    """
    ends = end_cycles(work, rate, without)
    launched = Term.LAUNCH not in without
    if work.persistent:
        filled = fill_cycles(work, rate, without) if work.specialized else 0.0
        return ends - (BLOCK_START_CYCLES if launched else 0) - filled
    return ends + (BLOCK_GAP_CYCLES.get(device.arch, 0) if launched and resident == 1 else 0)


def uneven_tiles(work: Work, concurrent: int) -> float:
    """By how much uneven tiles take longer than whole waves of even ones, in loops of the mean tile.

    Blocks start in order, and the last series of tiles begins with the longest. When the last of those starts, what is
    left is the rest of its series and, on average, half a tile in every other place; it ends later than an even
    division of all tiles would by what it is longer than these take (list scheduling; R. Graham, "Bounds on
    Multiprocessing Timing Anomalies", 1969), and no later than waves of nothing but the longest would.
    """
    loops = work.blocks / concurrent
    waves = math.ceil(loops)
    if work.longest <= 1.0 or waves == 0:
        return 0.0
    if waves == 1:
        return work.longest - 1.0
    first = work.descent / work.tiles_m  # tiles of the series that are the longest
    after = (work.descent - first * work.longest) / concurrent
    return max(0.0, min(loops + work.longest - 0.5 - after, waves * work.longest) - waves)


def finish_cycles(work: Work, device: Device, without: Collection[Term] = ()) -> float:
    """Cycles after the last split of the last tile has arrived: it adds up all partial tiles, one after the other, and
    runs the epilogue. Blocks are launched split by split, so all tiles finish at the end of the launch."""
    rate = l2_rate(device, work.tiles)
    cycles = 0.0
    if Term.SPLIT_K not in without:
        cycles += work.splits * (L2_LATENCY_CYCLES + work.workspace_bytes / rate)
    if Term.EPILOGUE not in without:
        cycles += work.epilogue_bytes / rate
    return cycles


def wave_panels(work: Work, blocks: int) -> tuple[int, int]:
    """Distinct panels of A and of B that a wave of `blocks` neighbouring blocks touches, over the batch and the splits.

    Blocks walk GROUP_M tile rows down, then one tile column across (Triton's matmul tutorial, "L2 Cache
    Optimizations"); then the next matrix of the batch, then the next split. Exact for a wave that begins a matrix.
    """
    per_matrix = work.tiles_m * work.tiles_n
    height = min(work.group_m, work.tiles_m)
    matrices, rest = divmod(blocks, per_matrix)
    groups, within = divmod(rest, height * work.tiles_n)
    height_here = min(height, work.tiles_m - groups * height)  # the last group may be lower
    rows = groups * height + min(within, height_here)
    columns = work.tiles_n if groups else math.ceil(within / height_here) if within else 0

    return (
        _distinct(work.panel_a, work.batch, matrices, work.tiles_m, rows),
        _distinct(work.panel_b, work.batch, matrices, work.tiles_n, columns),
    )


def _distinct(panel: Panel, batch: int, matrices: int, whole: int, part: int) -> int:
    """Panels of `matrices` whole matrices with `whole` panels each, and `part` of the next."""
    if not panel.shared_by_batches:
        return matrices * whole + part
    # Every matrix of a split has the same panels: what counts is how many splits are touched.
    splits, begun = divmod(matrices, batch)
    return splits * whole + (whole if begun else part)


def dram_bytes(work: Work, device: Device, blocks: int, without: Collection[Term] = ()) -> float:
    """Bytes that one wave of `blocks` moves between device memory and L2.

    A panel is read once per wave. Of an operand, half an L2's worth is still there at the next wave, and is read once
    in the whole launch, which is charged to the waves by their share of blocks. Without REUSE every block pays for its
    own panels.
    """
    share = blocks / work.blocks
    total = 0.0 if Term.EPILOGUE in without else work.epilogue_bytes * work.tiles * share
    if Term.SPLIT_K not in without and work.workspace_bytes:
        partials = work.workspace_bytes * work.blocks
        total += 2 * partials * share * (1 - kept_share(partials, device))
    if Term.REUSE in without:
        return total + blocks * (work.panel_a.bytes + work.panel_b.bytes)
    a, b = wave_panels(work, blocks)
    for panel, distinct, count in ((work.panel_a, a, work.tiles_m), (work.panel_b, b, work.tiles_n)):
        whole = panel.bytes * count * work.splits * (1 if panel.shared_by_batches else work.batch)
        once = whole * share
        kept = kept_share(whole, device)
        total += kept * once + (1 - kept) * max(once, min(panel.bytes * distinct, whole))
    return total


def kept_share(size: float, device: Device) -> float:
    """The share of `size` bytes that is still in L2 when it is asked for again: half of L2 at most, for the rest of the
    traffic passes through too, and the halves of the largest L2s hold copies of each other's lines."""
    return min(1.0, device.l2_bytes / 2 / size) if size else 1.0


def dram_cycles(moved: float, device: Device) -> float:
    """Cycles in which device memory moves that many bytes."""
    return moved / (device.bandwidth_gbs * DRAM_EFFICIENCY * 1e3) * device.boost_mhz


def roofline_us(flops: float, bytes_moved: float, unit: str, device: Device) -> float:
    """The least time any kernel could take, in microseconds: peak arithmetic or peak bandwidth, whichever is longer.

    (Williams, Waterman & Patterson 2009, "Roofline".)
    """
    return max(flops / (device.tflops(unit) * 1e6), bytes_moved / (device.bandwidth_gbs * 1e3))

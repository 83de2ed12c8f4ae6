"""How long a configuration should take on a device that need not be there: an analytical model.

The launch runs in waves of `concurrent = SMs · occupancy` blocks. A wave lasts as long as its slowest resource:

    T = launches · t_launch + Σ_waves ( overlap( iterations · t_iteration(r), dram(wave) / bandwidth )
                                        + t_start + t_fill + t_epilogue + t_split )

with r blocks resident on the busiest SM (the last wave may hold fewer), and

    t_iteration(r) = wait( overlap( r · compute, r · shared, r · l2, r · addresses ), latency ) + r · (loop + spill)

Resources work at the same time, but never quite independently: overlap(x…) = (Σ x⁴)^¼ is the longest of them, and up
to a fifth more when another is as long.

`docs/prediction.md` derives each term, with its source. Each is a function below that can be called alone, and
`predict(..., without={Term.X})` leaves one out, which is how the tests show that it decides something.

The result orders configurations; it is no measurement and is never called one.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from tilewright.kernels.device import WARP_SIZE, Device
from tilewright.kernels.work import Work
from tilewright.tuning_db.record import Resources

MODEL = "roofline-1"
"""Name and revision of this model: part of the key of every predicted record. Change it with any formula or constant."""


class Term(StrEnum):
    """The parts of the model."""

    COMPUTE = "compute"  # padded tiles over the tensor-core rate
    ISSUE = "issue"  # too few warps or independent mma to keep the tensor cores busy
    SHARED = "shared"  # operands read from shared memory once per warp tile
    L2 = "l2"  # operand tiles through L2
    DRAM = "dram"  # device memory
    REUSE = "reuse"  # panels shared within a wave, by GROUP_M
    WAVES = "waves"  # a last, partly filled wave lasts as long as a full one
    OCCUPANCY = "occupancy"  # resident blocks hide each other's latency
    PIPELINE = "pipeline"  # num_stages of copies in flight
    ALIGNMENT = "alignment"  # narrow loads are not asynchronous and cost issue slots
    SPLIT_K = "split_k"  # partial tiles written, read and waited for
    LAUNCH = "launch"  # of kernels and of blocks
    EPILOGUE = "epilogue"  # bytes of the output and residual
    SPILLS = "spills"  # registers kept in local memory


# Constants, none of them fitted to any result of ours. Cycles are SM clocks at boost.
DRAM_EFFICIENCY = 0.9  # a large copy reaches 4.3 of 4.8 TB/s on an H200, 0.90; similar on GDDR6X boards
COMPUTE_EFFICIENCY = 0.9  # of the dense peak, sustained by a full pipeline; cuBLAS reaches 0.8 to 0.9
SHARED_BYTES_PER_CYCLE = 128  # per SM: 32 banks of 4 B (CUDA C++ Programming Guide, "Shared Memory")
L2_BYTES_PER_CYCLE = 64  # per SM (NVIDIA A100 whitepaper: 5120 B/clk over 80 slices, 108 SMs; 47 to 64 on others)
LOAD_LANES_PER_CYCLE = 32  # threads per cycle that an SM's load/store units address (16 per half SM)
DRAM_LATENCY_CYCLES = (
    600  # 400 to 800, by pointer chasing (Jia et al. 2018, arXiv:1804.06826; Luo et al. 2024, 2402.13499)
)
SHARED_LATENCY_CYCLES = 30  # same sources: 22 to 33
LOOP_INSTRUCTIONS = 24  # of each warp and iteration besides loads and mma: counters, pointers, barriers (read off SASS)
BARRIER_CYCLES = 40  # per iteration: wait for the copies, then for the other warps
MMA_LATENCY_CYCLES = 33  # m16n8k16 on sm_80 to sm_90 (Luo et al. 2024, table of mma latencies)
SUBPARTITIONS = 4  # of an SM, each with its own tensor core and scheduler
LAUNCH_US = 2.5  # back-to-back launches in one stream; 2 to 4 µs across driver versions
BLOCK_START_CYCLES = 700  # first instruction fetches, index arithmetic, descriptor of the block
ATOMIC_CYCLES = 700  # one round trip to L2 with release and acquire


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted time and what it is made of."""

    time_us: float
    bound: Term  # what the main loop waits for
    waves: float
    occupancy: int  # resident blocks per SM
    dram_bytes: float


def predict(work: Work, resources: Resources, device: Device, *, without: Collection[Term] = ()) -> Prediction:
    """The predicted time of a launch, in microseconds.

    `resources` are the compiled kernel's, or an estimate of them; `without` leaves terms out, for ablation.
    """
    resident = 1 if Term.OCCUPANCY in without else occupancy(work, resources, device)
    concurrent = device.sms * resident
    cycles_per_us = device.boost_mhz
    full, rest = divmod(work.blocks, concurrent)
    waves: list[tuple[float, float, int]] = []  # how many, blocks in each, blocks on the busiest SM
    if full:
        waves.append((full, concurrent, resident))
    if rest:
        share = rest / concurrent if Term.WAVES in without else 1.0
        waves.append((share, rest, math.ceil(rest / device.sms)))

    total, traffic = 0.0, 0.0
    bound = Term.COMPUTE
    for count, blocks, busiest in waves:
        iteration, waits_for = iteration_cycles(work, resources, device, busiest, without)
        loop = work.iterations * iteration / cycles_per_us
        wave_bytes = 0.0 if Term.DRAM in without else dram_bytes(work, device, blocks, without)
        dram = wave_bytes / (device.bandwidth_gbs * DRAM_EFFICIENCY * 1e3)
        if dram > loop:
            waits_for = Term.DRAM
        if count >= 1 or not total:
            bound = waits_for
        extra = 0.0
        if Term.LAUNCH not in without:
            extra += BLOCK_START_CYCLES * busiest / resident
        if Term.PIPELINE not in without:
            extra += DRAM_LATENCY_CYCLES  # the pipeline fills before the first dot
        if Term.EPILOGUE not in without:
            extra += epilogue_cycles(work)
        if Term.SPLIT_K not in without and work.splits > 1:
            extra += split_k_cycles(work, busiest)
        total += count * (overlap(loop, dram) + extra / cycles_per_us)
        traffic += count * wave_bytes
    if Term.LAUNCH not in without:
        total += work.launches * LAUNCH_US
    return Prediction(total, bound, work.blocks / concurrent, resident, traffic)


def overlap(*times: float) -> float:
    """Time of resources that work side by side: the longest, and a little more when others are nearly as long."""
    longest = max(times)
    return longest * sum((time / longest) ** 4 for time in times) ** 0.25 if longest else 0.0


def occupancy(work: Work, resources: Resources, device: Device) -> int:
    """Blocks that an SM holds at once: the least of what registers, shared memory, warps and slots allow; at least 1.

    Registers are given out per warp in units of 256, shared memory with 1 KiB more per block than it asks for from
    sm_80 on (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
    """
    registers_per_warp = math.ceil(max(resources.registers, 1) * WARP_SIZE / 256) * 256
    warps = device.registers_per_sm // registers_per_warp
    reserved = 1024 if device.arch >= 80 else 0
    limits = (
        warps // work.num_warps,
        device.shared_per_sm // (resources.shared_bytes + reserved) if resources.shared_bytes else device.blocks_per_sm,
        device.warps_per_sm // work.num_warps,
        device.blocks_per_sm,
    )
    return max(1, min(limits))


def iteration_cycles(
    work: Work, resources: Resources, device: Device, resident: int, without: Collection[Term] = ()
) -> tuple[float, Term]:
    """Cycles of one main-loop iteration of all `resident` blocks of an SM, and which term they are."""
    candidates = {Term.COMPUTE: 0.0}
    if Term.COMPUTE not in without:
        slowdown = 1.0 if Term.ISSUE in without else issue_slowdown(work, device, resident)
        candidates[Term.COMPUTE] = resident * compute_cycles(work, device) * slowdown
    if Term.SHARED not in without:
        candidates[Term.SHARED] = resident * shared_cycles(work, device)
    if Term.L2 not in without:
        candidates[Term.L2] = resident * work.load_bytes / L2_BYTES_PER_CYCLE
    if Term.ALIGNMENT not in without:
        candidates[Term.ALIGNMENT] = resident * alignment_cycles(work)
    slowest = max(candidates, key=lambda term: candidates[term])
    cycles = overlap(*candidates.values())
    if Term.PIPELINE not in without:
        waited = wait_cycles(work, device, cycles, resident, without)
        if waited > 1.25 * cycles:
            slowest = Term.PIPELINE
        cycles = waited
    if Term.ISSUE not in without:
        cycles += resident * work.num_warps * LOOP_INSTRUCTIONS / SUBPARTITIONS
    if Term.SPILLS not in without:
        cycles += resident * spill_cycles(work, resources)
    return cycles, slowest


def compute_cycles(work: Work, device: Device) -> float:
    """Cycles of one block's dot at the SM's rate, padding included: 2·BM·BN·BK / (peak / SMs / clock)."""
    peak_per_cycle = device.tflops(work.unit) * COMPUTE_EFFICIENCY * 1e6 / (device.sms * device.boost_mhz)
    return 2.0 * work.tile_m * work.tile_n * work.tile_k / peak_per_cycle


def warp_tile(work: Work) -> tuple[float, float]:
    """Rows and columns of the output tile that one warp owns: warps are laid out as square as the tile allows."""
    rows, columns = 1, 1
    while rows * columns < work.num_warps:
        if work.tile_m / rows >= work.tile_n / columns and work.tile_m / rows > 16:
            rows *= 2
        else:
            columns *= 2
    return work.tile_m / rows, max(8.0, work.tile_n / columns)


def uses_wgmma(work: Work, device: Device) -> bool:
    """Whether Triton lowers the dot to wgmma or tcgen05, which read operands from shared memory once per 4 warps."""
    tensor = work.unit != "fp32" and bool(device.tensor_tflops)
    return tensor and device.arch // 10 in (9, 10) and work.tile_m >= 64 and work.num_warps >= 4


def issue_slowdown(work: Work, device: Device, resident: int) -> float:
    """How much longer the dot takes because too few mma are in flight; 1 when the tensor cores are never idle.

    Each of the SM's 4 tensor cores needs a warp, and back-to-back mma of one accumulator wait 33 cycles for each
    other: a sub-partition with w warps of i independent accumulators keeps w·i mma in flight. One m16n8k16 occupies
    its tensor core for 4096 FLOPs over the rate.
    """
    warps = resident * work.num_warps
    busy = min(1.0, warps / SUBPARTITIONS)
    if uses_wgmma(work, device) or work.unit == "fp32":
        return 1 / busy
    rows, columns = warp_tile(work)
    in_flight = (rows / 16) * (columns / 8) * max(1.0, warps / SUBPARTITIONS)
    rate = device.tflops(work.unit) * 1e6 / (device.sms * device.boost_mhz * SUBPARTITIONS)
    occupied = 4096 / rate
    return 1 / (busy * min(1.0, in_flight * occupied / MMA_LATENCY_CYCLES))


def shared_cycles(work: Work, device: Device) -> float:
    """Cycles in which one iteration's operands are written to shared memory once and read once per warp tile."""
    written = (work.tile_m + work.tile_n) * work.tile_k * work.operand_bytes
    if uses_wgmma(work, device):
        groups = work.num_warps / 4  # a warp group reads its rows of A, and all of B
        read = (work.tile_m + groups * work.tile_n) * work.tile_k * work.operand_bytes
    else:
        rows, columns = warp_tile(work)
        read = work.num_warps * (rows + columns) * work.tile_k * work.operand_bytes
    return (written + read) / SHARED_BYTES_PER_CYCLE


def alignment_cycles(work: Work) -> float:
    """Cycles in which the load units address one iteration's elements: 32 lanes, `vector_bytes` each."""
    return work.load_bytes / (LOAD_LANES_PER_CYCLE * work.vector_bytes)


def wait_cycles(work: Work, device: Device, busy: float, resident: int, without: Collection[Term] = ()) -> float:
    """Cycles of an iteration whose work takes `busy` cycles for all resident blocks, with what latency adds.

    With s asynchronous stages a tile is asked for s - 1 iterations ahead, and its latency is a resource beside the
    others. With one stage each block waits for memory and only then computes; loads too narrow for cp.async
    (ALIGNMENT), or an arch without it, are one iteration ahead at best. Barriers are exposed unless a neighbour runs.
    """
    asynchronous = device.arch >= 80 and (work.vector_bytes >= 4 or Term.ALIGNMENT in without)
    barriers = (BARRIER_CYCLES + SHARED_LATENCY_CYCLES) / resident
    if work.num_stages == 1:
        return max(busy, busy / resident + DRAM_LATENCY_CYCLES) + barriers
    # mma.sync's buffers are one fewer than the stages: the last is free only once its tile is read into registers.
    ahead = work.num_stages - (1.0 if uses_wgmma(work, device) else 1.5) if asynchronous else 1.0
    return overlap(busy, DRAM_LATENCY_CYCLES / ahead) + barriers


def spill_cycles(work: Work, resources: Resources) -> float:
    """Cycles in which one iteration stores and reloads what spilled, once each, through L1."""
    return 2.0 * resources.spill_bytes * work.num_warps * WARP_SIZE / SHARED_BYTES_PER_CYCLE


def wave_panels(work: Work, blocks: float) -> tuple[float, float]:
    """Distinct panels of A and of B that `blocks` neighbouring blocks touch, over the batch and the splits.

    Blocks walk GROUP_M tile rows down, then one tile column across (Triton's matmul tutorial, "L2 cache
    optimizations"): t tiles of one group cover min(t, GROUP_M) rows and t / GROUP_M columns.
    """
    per_matrix = min(blocks, work.tiles_m * work.tiles_n)
    matrices = blocks / per_matrix
    height = min(work.group_m, work.tiles_m)
    groups = max(1.0, per_matrix / (height * work.tiles_n))
    rows = min(per_matrix, height * groups)
    columns = min(float(work.tiles_n), max(1.0, per_matrix / height))
    a = rows * (1.0 if work.panel_a.shared_by_batches else matrices)
    b = columns * (1.0 if work.panel_b.shared_by_batches else matrices)
    return max(a, 1.0), max(b, 1.0)


def dram_bytes(work: Work, device: Device, blocks: float, without: Collection[Term] = ()) -> float:
    """Bytes that one wave of `blocks` moves between device memory and L2.

    A panel is read once per wave. An operand that stays in L2 from wave to wave (it fits in half of it) is read once
    in the whole launch, which is charged to the waves by their share of blocks. Without REUSE every block pays for its
    own panels.
    """
    share = blocks / work.blocks
    epilogue = 0.0 if Term.EPILOGUE in without else work.epilogue_bytes * work.tiles * share
    if Term.REUSE in without:
        return blocks * (work.panel_a.bytes + work.panel_b.bytes) + epilogue
    a, b = wave_panels(work, blocks)
    total = epilogue
    for panel, distinct, count in ((work.panel_a, a, work.tiles_m), (work.panel_b, b, work.tiles_n)):
        whole = panel.bytes * count * work.splits * (1 if panel.shared_by_batches else work.batch)
        if whole <= device.l2_bytes / 2:
            total += whole * share
        else:
            total += min(panel.bytes * distinct, whole)
    partials = work.workspace_bytes * blocks
    if Term.SPLIT_K not in without and work.workspace_bytes * work.blocks > device.l2_bytes / 2:
        total += 2 * partials
    return total


def epilogue_cycles(work: Work) -> float:
    """Cycles of one tile's stores and residual reads, on their way through L2. Those of the other blocks on the SM
    hide behind the main loops of their neighbours; the last one's are exposed in every wave."""
    return work.epilogue_bytes / L2_BYTES_PER_CYCLE


def split_k_cycles(work: Work, busiest: int) -> float:
    """Cycles at a tile's end: each block writes its partial; the last to arrive reads all of them, in order."""
    write = busiest * work.workspace_bytes / L2_BYTES_PER_CYCLE
    read = work.splits * (work.workspace_bytes / L2_BYTES_PER_CYCLE + SHARED_LATENCY_CYCLES)
    return write + ATOMIC_CYCLES + read + DRAM_LATENCY_CYCLES


def roofline_us(flops: float, bytes_moved: float, unit: str, device: Device) -> float:
    """The least time any kernel could take, in microseconds: peak arithmetic or peak bandwidth, whichever is longer.

    (Williams, Waterman & Patterson 2009, "Roofline".)
    """
    return max(flops / (device.tflops(unit) * 1e6), bytes_moved / (device.bandwidth_gbs * 1e3))

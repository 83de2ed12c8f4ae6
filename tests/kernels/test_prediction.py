"""The model's terms one by one against arithmetic done here, its properties, and what each term decides."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import statistics
import time
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tilewright.kernels import prediction
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.device import Device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.gemm.space import GemmConfig
from tilewright.kernels.prediction import (
    Datapath,
    Demand,
    Iteration,
    Prediction,
    Term,
    datapath,
    dram_bytes,
    occupancy,
    overlap,
    predict,
    roofline_us,
    wave_panels,
)
from tilewright.kernels.work import Panel, Work, warp_tile
from tilewright.tuning_db.record import Resources

BOARDS = {device.board: device for device in CATALOGUE}
RTX3090, A10, A100, H200, T4 = (BOARDS[name] for name in ("rtx3090", "a10", "a100", "h200", "t4"))
NO_SPILLS = Resources(registers=128, spill_bytes=0, stack_bytes=0, shared_bytes=32768)


def a_work(**changes: Any) -> Work:
    """Tiles of 128×128×32 fp16, 8×8 of them over K=1024, unless changed."""
    fields: dict[str, Any] = {
        "tiles_m": 8,
        "tiles_n": 8,
        "splits": 1,
        "batch": 1,
        "group_m": 8,
        "iterations": 32,
        "tile_m": 128,
        "tile_n": 128,
        "tile_k": 32,
        "num_warps": 4,
        "num_stages": 3,
        "unit": "fp16",
        "operand_bytes": 2.0,
        "load_bytes": 16384.0,
        "vector_bytes": 16,
        "panel_a": Panel(128 * 1024 * 2.0),
        "panel_b": Panel(128 * 1024 * 2.0),
        "epilogue_bytes": 128 * 128 * 2.0,
        "workspace_bytes": 0.0,
    }
    return Work(**(fields | changes))


def predicted(
    problem: GemmProblem, config: GemmConfig, device: Device, *, without: frozenset[Term] = frozenset()
) -> Prediction:
    work, resources = GEMM.work(problem, config), GEMM.estimate(problem, config, device)
    return predict(work, resources, device, without=without)


# --- occupancy ---


@pytest.mark.parametrize(
    ("device", "registers", "warps", "shared", "blocks"),
    [
        # CUDA C++ Programming Guide, "Multiprocessor Level": blocks of 512 threads with 64 registers fit twice in 64 K
        # registers; "as soon as the kernel uses one more register, only one block" does.
        (A100, 64, 16, 0, 2),
        (A100, 65, 16, 0, 1),
        (A100, 32, 32, 0, 2),  # 64 warps of an SM / 32
        (RTX3090, 32, 32, 0, 1),  # 48 / 32
        (RTX3090, 16, 1, 0, 16),  # slots for blocks: 16 on sm_86,
        (A100, 16, 1, 0, 32),  # 32 on sm_80
        # Shared memory: 100 KB an SM on sm_86, of which each block takes 1 KB more than it asks for.
        (RTX3090, 32, 4, 49 * 1024, 2),
        (RTX3090, 32, 4, 49 * 1024 + 1, 1),
        (A100, 32, 4, 40 * 1024, 4),  # 164 KB / 41 KB
        (H200, 32, 4, 227 * 1024, 1),
        (T4, 32, 4, 32 * 1024, 2),  # 64 KB, nothing kept back
        # Registers are given out in units of 256 a warp, out of the 16 K of the warp's sub-partition: 200 registers are
        # 6400 a warp, 2 warps a sub-partition and 8 an SM, so 4 blocks of 2 warps, although 65536 / 12800 = 5.
        (A100, 200, 2, 0, 4),
        (A100, 255, 8, 0, 1),
        (A100, 168, 4, 0, 3),  # 5376 a warp, 3 a sub-partition
    ],
)
def test_occupancy_is_what_the_occupancy_calculator_says(
    device: Device, registers: int, warps: int, shared: int, blocks: int
) -> None:
    assert occupancy(a_work(num_warps=warps), Resources(registers, 0, 0, shared), device) == blocks


def test_a_block_that_does_not_fit_still_counts_as_one() -> None:
    assert occupancy(a_work(num_warps=32), Resources(255, 0, 0, 200 * 1024), RTX3090) == 1


# --- one term at a time ---


def test_overlap_is_the_longest_and_a_fifth_more_of_equals() -> None:
    assert overlap(100.0) == 100.0
    assert overlap(0.0, 0.0) == 0.0
    assert overlap(100.0, 0.0, 0.0) == 100.0
    assert overlap(100.0, 100.0) == pytest.approx(118.92, abs=0.01)
    assert overlap(100.0, 50.0) == pytest.approx(100 * 1.0625**0.25)


@pytest.mark.parametrize(
    ("device", "unit", "tile_m", "warps", "path"),
    [
        (RTX3090, "fp16", 128, 4, Datapath.MMA),
        (RTX3090, "fp32", 128, 4, Datapath.FMA),
        (T4, "fp16", 128, 4, Datapath.FMA),
        (T4, "tf32", 128, 4, Datapath.FMA),
        (H200, "bf16", 64, 4, Datapath.WGMMA),
        (H200, "bf16", 32, 4, Datapath.MMA),
        (H200, "bf16", 64, 2, Datapath.MMA),
        (H200, "fp32", 64, 4, Datapath.FMA),
        (BOARDS["b200"], "bf16", 128, 8, Datapath.WGMMA),
        (BOARDS["rtx5090"], "bf16", 128, 8, Datapath.MMA),
    ],
)
def test_datapath(device: Device, unit: str, tile_m: int, warps: int, path: Datapath) -> None:
    assert datapath(a_work(unit=unit, tile_m=tile_m, num_warps=warps), device) is path


@pytest.mark.parametrize(
    ("tile", "warps", "expected"),
    [
        ((128, 128), 4, (64, 64)),
        ((128, 128), 8, (32, 64)),
        ((16, 64), 4, (16, 16)),
        ((256, 16), 4, (64, 16)),
        ((16, 16), 4, (16, 8)),  # two of the warps repeat what the others do
    ],
)
def test_warp_tile(tile: tuple[int, int], warps: int, expected: tuple[int, int]) -> None:
    assert warp_tile(*tile, warps) == expected


def test_compute_is_flop_over_the_rate_of_an_sm() -> None:
    # A100: 312e12 / (108 SMs · 1.41e9 Hz) = 2049 FLOP a cycle, 1844 of them sustained; 2·128·128·32 = 1048576 FLOP.
    assert prediction.compute_cycles(a_work(), A100) == pytest.approx(1048576 / (312e12 / 108 / 1.41e9 * 0.9))
    assert prediction.compute_cycles(a_work(), A100) == pytest.approx(569, abs=1)
    # RTX 3090, fp32 on CUDA cores: 35.6e12 / (82 · 1.695e9) = 256 FLOP a cycle, 128 lanes of 2.
    assert prediction.compute_cycles(a_work(unit="fp32"), RTX3090) == pytest.approx(1048576 / (256.1 * 0.9), rel=1e-3)
    # Hopper: 989.4e12 / (132 · 1.98e9) = 3786; mma.sync (a tile of 32 rows) has 62 % of that.
    assert prediction.compute_cycles(a_work(), H200) == pytest.approx(1048576 / (3785.6 * 0.82), rel=1e-3)
    small = prediction.compute_cycles(a_work(tile_m=32), H200)
    assert small == pytest.approx(1048576 / 4 / (3785.6 * 0.82 * 0.62), rel=1e-3)


def test_warps_that_repeat_others_are_computed_too() -> None:
    tile = {"tile_m": 16, "tile_n": 16}
    two, four = (prediction.compute_cycles(a_work(num_warps=warps, **tile), A100) for warps in (2, 4))
    assert four == pytest.approx(2 * two)


def test_idle_factor() -> None:
    assert prediction.idle_factor(a_work(), A100) == 1.0
    # 2 warps leave 2 of 4 tensor cores idle.
    assert prediction.idle_factor(a_work(num_warps=2), A100) == 2.0
    # One 16×8 mma a warp, 4096 FLOP at a quarter of 1844 a cycle: 8.9 cycles of work every 33.
    one_mma = a_work(tile_m=16, tile_n=32)
    assert prediction.idle_factor(one_mma, A100) == pytest.approx(33 / (4096 * 4 / (312e12 / 108 / 1.41e9 * 0.9)))
    assert prediction.idle_factor(a_work(tile_m=16, tile_n=32), RTX3090) == pytest.approx(33 / 35.6, abs=0.08)
    assert prediction.idle_factor(a_work(num_warps=8), H200) == 1.0
    assert prediction.idle_factor(a_work(num_warps=1, unit="fp32"), A100) == 4.0


@pytest.mark.parametrize(
    ("tile", "warps", "counted"),
    [
        # Instructions of the loop of a compiled fp16 kernel for sm_86, per warp (Triton 3.9, `cuobjdump --dump-sass`).
        ((128, 128, 32), 4, 185),
        ((128, 128, 32), 8, 111),
        ((64, 64, 32), 4, 83),
        ((16, 64, 64), 4, 75),
        ((128, 256, 32), 8, 170),
    ],
)
def test_issue_counts_what_the_compiled_loop_has(tile: tuple[int, int, int], warps: int, counted: int) -> None:
    m, n, k = tile
    cycles = prediction.issue_cycles(a_work(tile_m=m, tile_n=n, tile_k=k, num_warps=warps), RTX3090)
    assert cycles * 4 / warps == pytest.approx(counted, rel=0.06)


def test_narrow_loads_cost_instructions() -> None:
    # 256 rows and columns of 32 elements of 2 bytes are 256 warp loads of 1 element instead of 32 of 8.
    wide, narrow = (prediction.issue_cycles(a_work(vector_bytes=size), A100) for size in (16, 2))
    assert narrow - wide == (256 * 8 - 32 * 3) / 4


def test_fp32_issues_an_fma_per_32_products_and_the_reads_of_its_operands() -> None:
    # 128·128·32/32 FMA; a thread has 128 accumulators, 11.3 rows and columns: 4 warps · 22.6 · 32 / 4 loads.
    plain = prediction.issue_cycles(a_work(unit="fp32"), RTX3090) * 4 - 4 * 40 - 32 * 3
    assert plain == pytest.approx(16384 + 4 * 2 * math.sqrt(128) * 32 / 4)


def test_shared_memory_is_written_once_and_read_by_every_warp() -> None:
    # 256 lines of 64 bytes, 128 bytes a cycle.
    assert prediction.written_cycles(a_work()) == 256 * 64 / 128
    # 4 warps of 64×64 read 128 lines each, 8 warps of 32×64 read 96 each.
    assert prediction.read_cycles(a_work(), A100) == 4 * 128 * 64 / 128
    assert prediction.read_cycles(a_work(num_warps=8), A100) == 8 * 96 * 64 / 128
    # wgmma: A once, B once per 64 rows.
    assert prediction.read_cycles(a_work(), H200) == (128 + 2 * 128) * 64 / 128
    # Two groups of 4 warps on 64 rows take half the columns each, so both read A.
    assert prediction.read_cycles(a_work(tile_m=64, num_warps=8), H200) == (2 * 64 + 128) * 64 / 128
    # fp32: 128 threads, 22.6 words each and step along K, half of them shared within a warp.
    assert prediction.read_cycles(a_work(unit="fp32"), A100) == pytest.approx(
        0.5 * 128 * 22.627 * 32 * 4 / 128, rel=1e-4
    )


def test_spills_are_stored_and_reloaded() -> None:
    # 40 bytes of each of 128 threads, out and in, 128 bytes a cycle.
    assert prediction.spill_cycles(a_work(), replace(NO_SPILLS, spill_bytes=40)) == 2 * 40 * 128 / 128


def test_l2_serves_all_sms_or_a_few_at_the_width_of_their_port() -> None:
    assert prediction.l2_rate(A100, 1000) == 35.5
    assert prediction.l2_rate(A100, 108) == 35.5
    assert prediction.l2_rate(A100, 72) == pytest.approx(35.5 * 108 / 72)
    assert prediction.l2_rate(A100, 1) == 64
    assert all(prediction.l2_rate(device, 1) > 0 for device in CATALOGUE)


def test_l2_bytes_of_a_block() -> None:
    assert prediction.l2_bytes(a_work()) == 32 * 16384 + 32768
    assert prediction.l2_bytes(a_work(), {Term.EPILOGUE}) == 32 * 16384
    # Of 4 blocks of a tile one runs the epilogue; each writes a partial tile, and all 4 are read.
    assert prediction.l2_bytes(a_work(splits=4, workspace_bytes=65536.0)) == 32 * 16384 + 32768 / 4 + 2 * 65536


def test_short_rows_take_as_long_as_whole_lines() -> None:
    # 256 rows of 32 elements of 2 bytes are half a line each: of 32 iterations 8,192 lines, 2 cycles each.
    assert prediction.l2_cycles(a_work(epilogue_bytes=0.0, load_lines=256.0), 64) == 2 * 8192
    assert prediction.l2_cycles(a_work(epilogue_bytes=0.0, load_lines=256.0), 64, {Term.LINES}) == 8192
    # Through a share of L2 that is slower than that the bytes take longer.
    assert prediction.l2_cycles(a_work(epilogue_bytes=0.0, load_lines=256.0), 16) == 32 * 16384 / 16


def test_lines_of_a_gemm_are_rows_of_its_operands() -> None:
    def lines(problem: GemmProblem, block_k: int) -> float:
        return GEMM.work(problem, GemmConfig(128, 64, block_k)).load_lines

    along = GemmProblem(1024, 1024, 1024, b_layout="col")
    assert [lines(along, depth) for depth in (16, 64, 128)] == [192, 192, 384]
    # 32 rows of 64 columns of B are 128 bytes each; of A 32 of 128 rows, 256 bytes.
    assert lines(replace(along, a_layout="col", b_layout="row"), 32) == 32 * 2 + 32
    # Rows that a tile has whole lie side by side.
    assert lines(replace(along, K=16), 16) == (128 + 64) / 4
    assert lines(replace(along, b_layout="row", N=32), 32) == 128 + 32 / 2
    assert lines(replace(along, b_dtype="int4", b_scale="group", group_size=128), 64) == 128 + 64


@pytest.mark.parametrize("tiles", [4, 16, 64])
@pytest.mark.parametrize("slope", [0.0, 0.01, 0.5, 1.0])
def test_uneven_tiles_end_as_late_as_list_scheduling_has_it(tiles: int, slope: float) -> None:
    """Lengths fall from 1 + slope to 1 - slope, causal ones to next to nothing; blocks fill a part of the places, or
    all of them up to 250 times."""
    errors = []
    for heads, group, places in itertools.product((4, 32, 64, 256), (1, 4, 32), (66, 264)):
        lengths = [1 + slope * ((2 * row + 1) / tiles - 1) for row in reversed(range(tiles))]
        group = min(group, heads)
        free = [0.0] * places
        for _ in range(heads // group):
            for length in lengths:
                for _ in range(group):
                    heapq.heappush(free, heapq.heappop(free) + length)
        work = a_work(tiles_m=tiles, tiles_n=1, batch=heads, longest=lengths[0], descent=tiles * group)
        loops = math.ceil(work.blocks / places) + prediction.uneven_tiles(work, places)
        errors.append(loops / max(free) - 1)
    assert statistics.mean(map(abs, errors)) < 0.03
    assert max(errors) < 0.35
    assert min(errors) > -0.1


def test_a_launch_of_uneven_tiles_ends_with_the_longest() -> None:
    """8 tiles on 108 SMs all start at once: the time of the loop is that of one of twice the mean."""
    even = a_work(tiles_m=8, tiles_n=1, epilogue_bytes=0.0)
    apart = [
        predict(replace(even, longest=longest, descent=8.0), NO_SPILLS, A100).time_us for longest in (1.0, 1.001, 2.0)
    ]
    assert apart[1] == pytest.approx(apart[0], rel=0.002)
    assert 1.6 < apart[2] / apart[0] < 2
    assert predict(replace(even, longest=2.0, descent=8.0), NO_SPILLS, A100, without={Term.UNEVEN}).time_us == apart[0]


def test_what_should_spill_is_ranked_last() -> None:
    quick, slow = (predict(a_work(), replace(NO_SPILLS, spill_bytes=spilled), A100) for spilled in (4, 0))
    assert slow.order < replace(quick, time_us=slow.time_us / 2).order
    assert (slow.prior_us, quick.prior_us) == (slow.time_us, 1.5 * quick.time_us)


def test_latency_is_dram_and_transfer_and_the_copy_to_registers() -> None:
    iteration = Iteration(compute=569.0, beside=0.0, idle=1.0, shared=384.0, copied=256.0, issue=185.0, spills=0.0)
    assert prediction.latency_cycles(a_work(), iteration, 32.0) == 600 + 16384 / 32 + 256


@pytest.mark.parametrize(
    ("device", "vector", "stages", "ahead", "asynchronous"),
    [
        (A100, 16, 4, 3, True),
        (A100, 16, 1, 1, False),
        (A100, 2, 4, 1, False),
        (A100, 4, 4, 3, True),
        (T4, 16, 4, 1, False),
    ],
)
def test_stages_count_only_where_copies_are_asynchronous(
    device: Device, vector: int, stages: int, ahead: int, asynchronous: bool
) -> None:
    work = a_work(vector_bytes=vector, num_stages=stages)
    assert prediction.tiles_ahead(work, device) == ahead
    assert prediction.asynchronous(work, device) is asynchronous


def test_a_block_stalls_at_barriers_and_without_stages_for_memory() -> None:
    assert prediction.stall_cycles(a_work(), A100, 19200.0) == 32 * (40 + 30)
    assert prediction.stall_cycles(a_work(num_stages=1), A100, 19200.0) == 32 * (40 + 30) + 19200
    assert prediction.stall_cycles(a_work(), T4, 19200.0) == 32 * (40 + 30) + 19200


def test_blocks_share_an_sm_or_have_it_to_themselves() -> None:
    demand = Demand(compute=900.0, beside=700.0, shared=600.0, issue=300.0, l2=150.0, dram=1500.0, pipeline=100.0)
    assert prediction.busy_cycles(demand, 500.0, 60.0, 3) == overlap(920.0, 700.0, 600.0, 300.0, 150.0, 1500.0, 100.0)
    assert prediction.busy_cycles(demand, 1000.0, 60.0, 3) == overlap(1e3, 700.0, 600.0, 300.0, 150.0, 1500.0, 100.0)
    assert prediction.alone_cycles(demand, 500.0, 3) == overlap(500.0, 200.0, 100.0, 50.0, 500.0, 100.0)


def chained() -> Work:
    """The loop of an attention: 128 queries by 64 keys of 128 elements, in 4 warps."""
    return replace(
        a_work(),
        tile_m=128,
        tile_n=64,
        tile_k=128,
        num_warps=4,
        second=(128, 128, 64),
        lane_ops=6e4,
        special_ops=8192.0,
    )


def test_chained_dots_leave_their_left_operands_in_registers() -> None:
    one, other = chained().dots
    # The warps lie along the rows, and each has all columns.
    assert (one.rows, one.columns, other.rows, other.columns) == (32, 64, 32, 128)
    assert chained().staged_bytes == (64 * 128 + 128 * 64) * 2
    assert prediction.written_cycles(chained()) == 32768 / 128
    # Each of 4 warps reads all of K and of V.
    assert prediction.read_cycles(chained(), A100) == 4 * (64 * 128 + 128 * 64) * 2 / 128
    # On Hopper 64 rows at a time do, and the first dot reads its queries from shared memory too.
    groups = (64 * 128 / 64 + 128) * 128 * 2 + (128 * 128 / 64) * 64 * 2
    assert prediction.read_cycles(chained(), H200) == groups / 128
    flop = 2 * 128 * 64 * 128 * 2
    assert prediction.compute_cycles(chained(), A100) == pytest.approx(flop / prediction.dot_rate(chained(), A100))


def test_work_beside_the_dots_takes_the_longer_of_two_kinds_of_units() -> None:
    assert prediction.beside_cycles(chained(), A100) == 6e4 / 64  # 512 for the exponentials
    assert prediction.beside_cycles(chained(), RTX3090) == 8192 / 16  # 469 for the rest
    assert prediction.beside_cycles(a_work(), A100) == 0
    alone, without = (
        predict(chained(), Resources(168, 0, 0, 65536), A100, without=terms).time_us for terms in ((), {Term.BESIDE})
    )
    assert without < alone


def test_a_kernel_without_dots_has_only_what_it_moves_and_does() -> None:
    work = replace(a_work(), tile_k=0, lane_ops=1024.0, load_bytes=8192.0)
    assert work.dots == ()
    assert prediction.compute_cycles(work, A100) == prediction.read_cycles(work, A100) == 0
    assert prediction.idle_factor(work, A100) == 1
    loads = 8192 / (32 * 16) * 3
    assert prediction.issue_cycles(work, A100) == (40 * work.num_warps + 1024 / 32 + loads) / 4
    assert predict(work, Resources(64, 0, 0, 0), A100).time_us > 0


def test_ends_of_a_block() -> None:
    # Start, first tile, epilogue, at 32 bytes a cycle.
    assert prediction.end_cycles(a_work(), 32.0) == 500 + 600 + 16384 / 32 + 32768 / 32
    split = a_work(splits=4, workspace_bytes=65536.0)
    assert prediction.end_cycles(split, 32.0) == 500 + 600 + 16384 / 32 + 65536 / 32 + 540
    assert prediction.end_cycles(split, 32.0, {Term.SPLIT_K, Term.LAUNCH, Term.PIPELINE}) == 0
    # The last of 64 tiles' splits reads 4 partial tiles and then runs the epilogue; 64 SMs share A100's L2.
    rate = 35.5 * 108 / 64
    assert prediction.finish_cycles(split, A100) == pytest.approx(4 * (270 + 65536 / rate) + 32768 / rate)


def test_one_tile_follows_another() -> None:
    work = a_work(epilogue_bytes=64_000.0)
    ends = prediction.end_cycles(work, 40.0)
    follow = functools.partial(prediction.follow_cycles, rate=40.0)
    # Another block, which on Hopper, where nobody else has the SM, has to come first.
    assert follow(work, H200, resident=1) == ends + prediction.BLOCK_GAP_CYCLES[90]
    assert follow(work, H200, resident=2) == follow(work, A100, resident=1) == ends
    # The same block, which has begun long ago.
    again = replace(work, persistent=True)
    assert follow(again, H200, resident=1) == ends - prediction.BLOCK_START_CYCLES
    # It has the next tile's operands by then, where warps do nothing but copy them.
    fill = prediction.fill_cycles(work, 40.0)
    assert fill == 600 + 16384 / 40
    special = replace(again, specialized=True)
    assert follow(special, H200, resident=1) == ends - prediction.BLOCK_START_CYCLES - fill
    for one, filled in ((work, 0), (again, 0), (special, fill)):
        unlaunched = follow(one, H200, resident=1, without={Term.LAUNCH})
        assert unlaunched == ends - prediction.BLOCK_START_CYCLES - filled


def test_dram_moves_bandwidth_times_time() -> None:
    # 2039 GB/s · 0.9 for a microsecond is 1.8351 MB, and 1410 cycles.
    assert prediction.dram_cycles(1.8351e6, A100) == pytest.approx(1410)


def test_operands_that_stay_in_l2_are_read_once_in_all() -> None:
    work = a_work()  # 2 MB each; A100 has 40 MB
    waves = [dram_bytes(work, A100, 16) for _ in range(4)]
    assert sum(waves) == pytest.approx(2 * 8 * 128 * 1024 * 2 + 64 * 128 * 128 * 2)


def test_panels_of_operands_that_don_t_stay_are_read_every_wave() -> None:
    work = a_work(tiles_m=256, tiles_n=256, panel_a=Panel(1e9), panel_b=Panel(1e9), epilogue_bytes=0.0)
    # A wave of 64 blocks in groups of 8 rows touches 8 + 8 panels; next to nothing of 256e9 bytes is kept in 40 MB.
    assert dram_bytes(work, A100, 64) == pytest.approx(16e9, rel=1e-3)
    assert dram_bytes(work, A100, 64, {Term.REUSE}) == pytest.approx(128e9)


def test_partial_tiles_pass_through_dram_when_l2_can_t_hold_them() -> None:
    small = a_work(splits=4, workspace_bytes=65536.0)  # 16 MB of 40
    without = dram_bytes(small, A100, 256, {Term.SPLIT_K})
    assert dram_bytes(small, A100, 256) == pytest.approx(without)
    # 64 MB on the 6 MB of an RTX 3090: all but 3 MB go out and in again.
    large = replace(small, splits=16)
    extra = dram_bytes(large, RTX3090, 1024) - dram_bytes(large, RTX3090, 1024, {Term.SPLIT_K})
    assert extra == pytest.approx(2 * (64 - 3) * 2**20)


def test_roofline_is_the_longer_of_arithmetic_and_traffic() -> None:
    assert roofline_us(312e6, 0, "fp16", A100) == pytest.approx(1.0)
    assert roofline_us(0, 2039e3, "fp16", A100) == pytest.approx(1.0)
    assert roofline_us(8.1e6, 1, "fp16", T4) == pytest.approx(1.0)  # CUDA cores
    assert roofline_us(71.2e6, 936e3 * 3, "fp8", RTX3090) == pytest.approx(3.0)


# --- L2 reuse, counted block by block ---


def tile_of(pid: int, tiles_m: int, tiles_n: int, group_m: int) -> tuple[int, int]:
    """The kernel's walk, in Python."""
    group = pid // (group_m * tiles_n)
    first_m = group * group_m
    rows = min(tiles_m - first_m, group_m)
    within = pid % (group_m * tiles_n)
    return first_m + within % rows, within // rows


def counted_panels(work: Work, first: int, blocks: int) -> tuple[int, int]:
    a, b = set(), set()
    per_matrix = work.tiles_m * work.tiles_n
    for block in range(first, min(first + blocks, work.blocks)):
        split, tile = divmod(block, work.tiles)  # the grid's first axis, the tiles, runs fastest
        matrix, pid = divmod(tile, per_matrix)
        m, n = tile_of(pid, work.tiles_m, work.tiles_n, work.group_m)
        a.add((split, 0 if work.panel_a.shared_by_batches else matrix, m))
        b.add((split, 0 if work.panel_b.shared_by_batches else matrix, n))
    return len(a), len(b)


@pytest.mark.parametrize("group_m", [1, 3, 4, 8])
@pytest.mark.parametrize("shared", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    ("tiles_m", "tiles_n", "batch", "splits"), [(16, 16, 1, 1), (5, 7, 3, 4), (1, 9, 1, 8), (10, 3, 6, 1)]
)
def test_wave_panels_is_exact_for_waves_that_begin_a_matrix(
    tiles_m: int, tiles_n: int, batch: int, splits: int, shared: tuple[bool, bool], group_m: int
) -> None:
    work = a_work(
        tiles_m=tiles_m,
        tiles_n=tiles_n,
        batch=batch,
        splits=splits,
        group_m=group_m,
        panel_a=Panel(1.0, shared[0]),
        panel_b=Panel(1.0, shared[1]),
    )
    for blocks in range(1, work.blocks + 1):
        assert wave_panels(work, blocks) == counted_panels(work, 0, blocks), blocks


@pytest.mark.parametrize("group_m", [1, 4, 8])
@pytest.mark.parametrize("concurrent", [82, 108, 164, 264])
def test_wave_panels_is_near_the_mean_of_all_waves(concurrent: int, group_m: int) -> None:
    work = a_work(tiles_m=64, tiles_n=64, group_m=group_m)
    starts = range(0, work.blocks - concurrent, concurrent)
    mean = sum(sum(counted_panels(work, first, concurrent)) for first in starts) / len(starts)
    # A wave that begins in the middle of a column, or of a group, touches a few panels more.
    assert sum(wave_panels(work, concurrent)) == pytest.approx(mean, rel=0.2)


# --- the whole ---


def test_one_wave_by_hand() -> None:
    # 64 blocks on 108 SMs: one wave, one block an SM.
    work = a_work()
    result = predict(work, NO_SPILLS, A100)
    rate = 35.5 * 108 / 64
    compute, shared, copied = 1048576 / (312e6 / 108 / 1410 * 0.9), 384.0, 256.0
    issue = (4 * 40 + 32 * 3 + 256 * 1.5 + 4 * 128 * 64 / 512) / 4
    l2 = (32 * 16384 + 32768) / rate
    dram = (2 * 2**21 + 2**21) / (2039 * 0.9 * 1e3) * 1410
    latency = 32 * (600 + 16384 / rate + copied) / 2
    busy = overlap(32 * (compute + 70), 32 * shared, 32 * issue, l2, dram, latency)
    ends = 500 + 600 + 16384 / rate + 32768 / rate
    assert result.time_us == pytest.approx((busy + ends) / 1410 + 0.9)
    assert result.bound is Term.COMPUTE
    assert result.occupancy == 4  # 128 registers · 128 threads
    assert result.waves == pytest.approx(64 / (4 * 108))
    assert result.dram_bytes == pytest.approx(3 * 2**21)


def test_the_last_wave_costs_what_its_blocks_cost() -> None:
    times = {}
    # A last wave of one block is a little quicker than one of 108: it has L2 to itself.
    resources = replace(NO_SPILLS, shared_bytes=160 * 1024)  # one block an SM
    for tiles in (107, 108, 109, 216, 217):
        times[tiles] = predict(a_work(tiles_m=tiles, tiles_n=1), resources, A100, without={Term.DRAM, Term.L2}).time_us
    assert times[107] == pytest.approx(times[108], rel=0.01)
    assert times[109] == pytest.approx(times[216], rel=0.06)
    assert times[109] == pytest.approx(2 * times[108] - 0.9, rel=0.06)
    assert times[217] > 1.3 * times[216]


def test_every_term_removed_leaves_nothing() -> None:
    result = predict(a_work(), replace(NO_SPILLS, spill_bytes=64), A100, without=set(Term))
    assert result.time_us == pytest.approx(0.0, abs=1e-12)


def test_bandwidth_bound_work_is_called_so() -> None:
    decode = GemmProblem(1, 4096, 14336, dtype="bf16")
    config = GemmConfig(16, 32, 128, GROUP_M=1, SPLIT_K=2, num_warps=2, num_stages=4)
    result = predicted(decode, config, H200)
    assert result.bound is Term.DRAM
    assert result.dram_bytes == pytest.approx(decode.bytes_moved(), rel=0.01)


DTYPES = {"fp16": None, "bf16": None, "fp32": None, "tf32": "tf32", "fp8e5m2": None}


@st.composite
def cases(draw: st.DrawFn) -> tuple[GemmProblem, GemmConfig, Device]:
    device = draw(st.sampled_from(CATALOGUE))
    kind = draw(st.sampled_from(sorted(DTYPES)))
    batch = draw(st.sampled_from([1, 1, 2, 64]))
    problem = GemmProblem(
        M=draw(st.sampled_from([1, 2, 16, 17, 100, 1024, 4095, 8192, 2**20])),
        N=draw(st.sampled_from([1, 8, 1000, 1024, 4096, 28672])),
        K=draw(st.sampled_from([1, 8, 64, 1000, 4096, 14336])),
        dtype="fp32" if kind == "tf32" else kind,
        precision=DTYPES[kind],
        batch=batch,
        b_layout=draw(st.sampled_from(["row", "col"])),
        b_broadcast=batch > 1 and draw(st.booleans()),
        bias=draw(st.sampled_from([None, "fp32"])),
        residual=draw(st.sampled_from([None, "fp32"])),
    )
    assume(GEMM.supported(problem, device) is None)
    # One of hundreds fits: drawn one by one, Hypothesis would spend nearly all of its time on the others.
    random = Random(draw(st.integers(0, 2**32 - 1)))
    for _ in range(5000):
        config = GemmConfig(**{name: random.choice(values) for name, values in GEMM.space.axes.items()})
        if GEMM.space.fits(problem, config, device) is None:
            return problem, config, device
    raise AssertionError(f"nothing fits {problem} on {device}")


PROPERTY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@PROPERTY
@given(cases())
def test_never_faster_than_the_roofline(case: tuple[GemmProblem, GemmConfig, Device]) -> None:
    problem, config, device = case
    result = predicted(problem, config, device)
    least = roofline_us(problem.flops(), problem.bytes_moved(), problem.unit, device)
    assert math.isfinite(result.time_us)
    assert result.time_us > least
    assert result.dram_bytes >= 0.999 * problem.bytes_moved()
    assert result.occupancy >= 1


@PROPERTY
@given(cases(), st.integers(1, 4096))
def test_more_spills_are_never_faster(case: tuple[GemmProblem, GemmConfig, Device], spilled: int) -> None:
    problem, config, device = case
    work, resources = GEMM.work(problem, config), GEMM.estimate(problem, config, device)
    worse = replace(resources, spill_bytes=resources.spill_bytes + spilled)
    assert predict(work, worse, device).time_us > predict(work, resources, device).time_us


@PROPERTY
@given(cases())
def test_a_better_board_is_never_slower(case: tuple[GemmProblem, GemmConfig, Device]) -> None:
    problem, config, device = case
    time_us = predicted(problem, config, device).time_us
    rates = {unit: 2 * rate for unit, rate in device.tensor_tflops.items()}
    faster = replace(device, fp32_tflops=2 * device.fp32_tflops, tensor_tflops=rates)
    for better in (
        faster,
        replace(device, bandwidth_gbs=2 * device.bandwidth_gbs),
        replace(device, l2_bytes=2 * device.l2_bytes),
        replace(faster, sms=2 * device.sms, bandwidth_gbs=2 * device.bandwidth_gbs),
    ):
        assert predicted(problem, config, better).time_us <= time_us * (1 + 1e-9), better
    # SMs alone: more of the traffic falls into the first wave, whose ends nothing hides.
    assert predicted(problem, config, replace(faster, sms=2 * device.sms)).time_us <= 1.1 * time_us


@PROPERTY
@given(cases())
def test_more_traffic_is_never_faster(case: tuple[GemmProblem, GemmConfig, Device]) -> None:
    problem, config, device = case
    work, resources = GEMM.work(problem, config), GEMM.estimate(problem, config, device)
    time_us = predict(work, resources, device).time_us
    for worse in (
        replace(work, load_bytes=2 * work.load_bytes),
        replace(work, epilogue_bytes=2 * work.epilogue_bytes),
        replace(work, panel_a=Panel(2 * work.panel_a.bytes), panel_b=work.panel_b),
        replace(work, iterations=2 * work.iterations),
        replace(work, launches=2),
    ):
        assert predict(worse, resources, device).time_us >= time_us


# The others are facts about sharing: without them the launch is another one.
COSTS = sorted(set(Term) - {Term.WAVES, Term.OCCUPANCY, Term.REUSE})


# What copies beside the dots fills the next tile's pipeline, whether launches cost anything or not.
@example((GemmProblem(1, 4096, 8), GemmConfig(128, 16, 16, 1, 1, 4, 1, True, True, True), T4), Term.LAUNCH)
@PROPERTY
@given(cases(), st.sampled_from(COSTS))
def test_a_cost_left_out_is_never_a_cost(case: tuple[GemmProblem, GemmConfig, Device], term: Term) -> None:
    problem, config, device = case
    with_term = predicted(problem, config, device).time_us
    assert predicted(problem, config, device, without=frozenset({term})).time_us <= with_term * (1 + 1e-9)


def test_huge_grids_and_single_blocks_are_finite() -> None:
    for problem in (GemmProblem(1, 1, 1), GemmProblem(2**20, 2**20, 16, batch=16), GemmProblem(1, 2**30, 1)):
        for device in CATALOGUE:
            result = predicted(problem, GemmConfig(16, 16, 32, GROUP_M=1, num_warps=2, num_stages=2), device)
            assert math.isfinite(result.time_us)
            assert result.time_us > 0.9


def test_a_prediction_is_quick() -> None:
    # A lookup of an unseen shape scores thousands of configurations. 35 µs each on a 2-core machine; the limit leaves
    # room for a busy one.
    problem, device = GemmProblem(2048, 4096, 4096), RTX3090
    scored = [
        (GEMM.work(problem, c), GEMM.estimate(problem, c, device)) for c in GEMM.space.configs(problem, device)[:500]
    ]
    best = math.inf
    for _ in range(5):
        begin = time.process_time()
        for work, resources in scored:
            predict(work, resources, device)
        best = min(best, (time.process_time() - begin) / len(scored))
    assert best < 150e-6


# --- the order it gives, on problems whose best configurations are known ---

LLAMA_QKV_1 = GemmProblem(1, 6144, 4096, dtype="bf16")
LLAMA_OUT_2048 = GemmProblem(2048, 4096, 4096, dtype="bf16")
SQUARE_1024 = GemmProblem(1024, 1024, 1024)
SQUARE_8192 = GemmProblem(8192, 8192, 8192, dtype="bf16")
ROWS_160 = GemmProblem(160, 8192, 4096)
RESNET_1X1 = GemmProblem(25088, 256, 64, residual="fp16")  # 64→256 channels at 28×28, 32 images
ATTENTION_QK = GemmProblem(512, 512, 64, batch=64, b_layout="col")
FP32_2048 = GemmProblem(2048, 2048, 2048, dtype="fp32")
ODD_4095 = GemmProblem(4095, 4095, 4095)


def best_of(problem: GemmProblem, device: Device) -> GemmConfig:
    configs = GEMM.space.configs(problem, device)
    return min(configs, key=lambda config: predicted(problem, config, device).time_us)


@pytest.mark.parametrize(
    ("board", "known"),
    [
        # From the lists of Triton's matmul tutorial and of kernels derived from it, for each arch.
        ("rtx3090", GemmConfig(128, 128, 32, 8, 1, 4, 4)),
        ("a10", GemmConfig(128, 256, 32, 8, 1, 8, 4)),
        ("a100", GemmConfig(128, 256, 64, 8, 1, 8, 3)),
        ("rtx4090", GemmConfig(128, 128, 32, 8, 1, 4, 4)),
        # Measured on an H200: benchmarks/results.
        ("h200", GemmConfig(128, 256, 64, 8, 1, 8, 4, PERSISTENT=True, TMA=True)),
    ],
)
def test_large_square_problems_get_large_tiles(board: str, known: GemmConfig) -> None:
    device = BOARDS[board]
    best = best_of(SQUARE_8192, device)
    assert best.BLOCK_M * best.BLOCK_N >= 128 * 128
    assert best.SPLIT_K == 1
    assert best.num_stages > 1
    assert best.GROUP_M > 1
    assert predicted(SQUARE_8192, known, device).time_us < 1.05 * predicted(SQUARE_8192, best, device).time_us


@pytest.mark.parametrize("board", ["rtx3090", "a100", "h200"])
@pytest.mark.parametrize("tile", [(64, 256, 32), (128, 128, 32), (128, 256, 32)])
def test_stages_pay_and_a_single_one_costs(board: str, tile: tuple[int, int, int]) -> None:
    device = BOARDS[board]
    one, two, three = (
        predicted(SQUARE_8192, GemmConfig(*tile, 8, 1, 8, stages), device).time_us for stages in (1, 2, 3)
    )
    assert three <= two < one
    assert one > 1.05 * three


@pytest.mark.parametrize("board", ["rtx3090", "a100", "h200"])
@pytest.mark.parametrize("m", [1, 16])
def test_few_rows_and_columns_get_low_tiles_and_split_k(m: int, board: str) -> None:
    """K and V projections of one token of Llama-3-8B: 64 tiles of 16×16 can't fill the SMs."""
    problem, device = GemmProblem(m, 1024, 4096, dtype="bf16"), BOARDS[board]
    best = best_of(problem, device)
    assert best.BLOCK_M == 16
    assert best.BLOCK_N <= 64
    if board != "rtx3090":
        assert best.SPLIT_K > 1
    one, four = (GemmConfig(16, 32, 64, GROUP_M=1, SPLIT_K=split, num_warps=4, num_stages=4) for split in (1, 4))
    assert predicted(problem, four, device).time_us < predicted(problem, one, device).time_us


def test_the_largest_published_problem_is_of_the_right_size() -> None:
    """cuBLAS does bf16 8192³ at 769 to 798 TFLOP/s on an H200; Triton without TMA or warp specialisation does less."""
    tflops = SQUARE_8192.flops() / predicted(SQUARE_8192, best_of(SQUARE_8192, H200), H200).time_us / 1e6
    assert 500 < tflops < 798


# --- what each term decides ---


class Decided(NamedTuple):
    """`better` is predicted faster than `worse`, by 5 % or more, and no longer is when `term` is left out."""

    term: Term
    problem: GemmProblem
    device: Device
    better: GemmConfig
    worse: GemmConfig
    why: str


DECIDED = (
    Decided(
        Term.COMPUTE, ROWS_160, RTX3090, GemmConfig(32, 128, 32, 4, 1, 8, 3), GemmConfig(128, 128, 32, 4, 1, 8, 3),
        "160 rows are 5 tiles of 32, or 2 of 128 of which one is three quarters padding",
    ),
    Decided(
        Term.ISSUE, FP32_2048, A100, GemmConfig(64, 16, 128, 8, 1, 8, 4), GemmConfig(64, 16, 128, 8, 1, 2, 4),
        "120 KB let one block on an SM, and 2 warps use half of its schedulers",
    ),
    Decided(
        Term.SHARED, ROWS_160, A100, GemmConfig(128, 32, 64, 4, 1, 2, 5), GemmConfig(128, 32, 64, 4, 1, 8, 5),
        "8 warps of 16×32 read every column of B 8 times, 2 warps of 64×32 twice",
    ),
    Decided(
        Term.L2, SQUARE_1024, RTX3090, GemmConfig(128, 64, 16, 1, 1, 2, 5), GemmConfig(16, 64, 16, 1, 1, 2, 5),
        "a tile of 16 rows uses each byte of B from L2 for an eighth of the FLOP of one of 128",
    ),
    Decided(
        Term.LINES, GemmProblem(8192, 8192, 8192, b_layout="col"), H200,
        GemmConfig(128, 128, 64, 8, 1, 4, 5), GemmConfig(128, 128, 16, 8, 1, 4, 5),
        "32 bytes of each row take as long as a line of 128, and are asked for four times as often",
    ),
    Decided(
        Term.DRAM, GemmProblem(8192, 8192, 8192, dtype="fp8e5m2"), A10,
        GemmConfig(128, 64, 64, 8, 1, 8, 3), GemmConfig(128, 64, 64, 1, 1, 8, 3),
        "a wave in one tile row reads all of B from device memory, one in 8 rows an eighth",
    ),
    Decided(
        Term.REUSE, SQUARE_1024, A10, GemmConfig(128, 128, 32, 1, 1, 8, 5), GemmConfig(256, 128, 32, 1, 1, 8, 5),
        "neighbours read a panel together, so 64 blocks cost no more traffic than 32, and 72 SMs are busier",
    ),
    Decided(
        Term.WAVES, SQUARE_1024, H200, GemmConfig(64, 128, 32, 1, 1, 8, 5), GemmConfig(256, 128, 32, 1, 1, 8, 5),
        "128 blocks fill 132 SMs, 32 leave 100 of them idle",
    ),
    Decided(
        Term.OCCUPANCY, ROWS_160, RTX3090, GemmConfig(32, 128, 16, 1, 1, 4, 1), GemmConfig(32, 128, 256, 1, 1, 4, 1),
        "without stages a block waits for memory; of the shallow tile several share an SM, of the deep one one",
    ),
    Decided(
        Term.PIPELINE, LLAMA_OUT_2048, A100, GemmConfig(128, 128, 32, 8, 1, 8, 4), GemmConfig(128, 128, 32, 8, 1, 8, 1),
        "three tiles in flight while one is computed, or none",
    ),
    Decided(
        Term.ALIGNMENT, LLAMA_QKV_1, H200, GemmConfig(16, 128, 128, 1, 4, 8, 5), GemmConfig(16, 128, 16, 1, 4, 8, 5),
        "a 16×16 tile is one element for each of 256 threads: 2 bytes, too narrow for cp.async",
    ),
    Decided(
        Term.SPLIT_K, LLAMA_OUT_2048, RTX3090,
        GemmConfig(128, 256, 64, 4, 1, 8, 3), GemmConfig(128, 256, 64, 4, 16, 8, 3),
        "256 tiles fill 82 SMs three times over; split, they write 16 partial results of 32 MB and read them again",
    ),
    Decided(
        Term.LAUNCH, GemmProblem(2048, 2048, 32, batch=16), A100,
        GemmConfig(128, 256, 32, 4, 1, 8, 2), GemmConfig(32, 32, 32, 4, 1, 8, 2),
        "one iteration of K=32: 65,536 blocks of 32×32 start up, or 2,048 of 128×256",
    ),
    Decided(
        Term.EPILOGUE, RESNET_1X1, A10, GemmConfig(32, 256, 64, 4, 1, 8, 1), GemmConfig(128, 256, 64, 4, 1, 8, 1),
        "residual and result outweigh K=64: while a large tile, alone on its SM, moves them, nothing is computed",
    ),
    Decided(
        Term.SPILLS, ODD_4095, H200, GemmConfig(64, 128, 32, 1, 1, 4, 2), GemmConfig(64, 128, 32, 1, 1, 2, 2),
        "2 warps have twice the elements a thread, each with its own address: they don't fit in registers",
    ),
)  # fmt: skip


@pytest.mark.parametrize("case", DECIDED, ids=lambda case: str(case.term))
def test_each_term_decides_an_order(case: Decided) -> None:
    assert case.why
    times = {}
    for config in (case.better, case.worse):
        assert GEMM.space.fits(case.problem, config, case.device) is None
        assert GEMM.supported(case.problem, case.device) is None
        for without in (frozenset[Term](), frozenset({case.term})):
            times[config, without] = predicted(case.problem, config, case.device, without=without).time_us
    none, without = frozenset[Term](), frozenset({case.term})
    assert times[case.better, none] < 0.95 * times[case.worse, none]
    assert times[case.better, without] >= times[case.worse, without] * (1 - 1e-6)


def test_no_term_is_there_for_nothing() -> None:
    # A GEMM has nothing beside its dots, and even tiles: attention's tests show what those terms decide.
    assert {case.term for case in DECIDED} | {Term.BESIDE, Term.UNEVEN} == set(Term)

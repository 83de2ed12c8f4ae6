"""What an attention configuration means for the model: its work against a count key by key, its estimated resources
against compiled kernels; and the space."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.kernels.ops.attention_cases import conforms
from tilewright.kernels.catalogue import CATALOGUE
from tilewright.kernels.device import MAX_REGISTERS_PER_THREAD
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import (
    AXES,
    SPACE,
    AttentionConfig,
    head_blocks,
    key_blocks,
    tile_heads,
    value_blocks,
)
from tilewright.kernels.prediction import Term, occupancy, predict

BOARDS = {device.board: device for device in CATALOGUE}
LLAMA = AttentionProblem(1, 32, 4096, 4096, 128, Hkv=8, causal=True)
DECODE = AttentionProblem(4, 32, 1, 8192, 128, Hkv=8, kv_lens=True)


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionProblem, AttentionConfig]:
    """Problems small enough to count, and any configuration of them."""
    form = draw(st.sampled_from(["batch", "kv_lens", "varlen", "paged"]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    window = st.sampled_from([None, 0, 5, 40])
    problem = AttentionProblem(
        B=draw(st.integers(1, 3)),
        H=kv_heads * group,
        Sq=draw(st.integers(1, 150)),
        Skv=16 * draw(st.integers(1, 12)) if form == "paged" else draw(st.integers(1, 200)),
        D=draw(st.integers(32, 256)),
        Hkv=kv_heads,
        dtype=draw(st.sampled_from(["fp16", "fp32", "fp8e5m2"])),
        causal=draw(st.booleans()),
        window_left=draw(window),
        window_right=draw(window),
        bias=None if form == "varlen" else draw(st.sampled_from([None, "fp16", "fp32"])),
        varlen=form == "varlen",
        page_size=16 if form == "paged" else 0,
        kv_lens=form in ("paged", "kv_lens"),
        lse=draw(st.booleans()),
        aligned=draw(st.booleans()),
    )
    config = AttentionConfig(**{name: draw(st.sampled_from(values)) for name, values in AXES.items()})
    if SPACE.fits(problem, config, BOARDS["h200"]) is not None:  # as for most that specialise
        config = replace(config, WARP_SPECIALIZE=False, PERSISTENT=False)
    return problem, config if group > 1 else replace(config, PACK=False)


def seen(problem: AttentionProblem, queries: int, keys: int) -> np.ndarray:
    """Which keys each query of a sequence sees."""
    away = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
    right = np.inf if problem.right is None else problem.right
    left = np.inf if problem.window_left is None else problem.window_left
    return (away <= right) & (away >= -left)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_flops_are_those_of_the_pairs_that_are_seen(case):
    problem, _ = case
    pairs = sum(int(seen(problem, *each).sum()) for each in zip(*problem.lengths(), strict=True))
    assert problem.flops() == 2 * problem.H * (problem.D + problem.dim_v) * pairs


@settings(max_examples=150, deadline=None)
@given(cases())
def test_bytes_are_those_that_have_to_be_moved(case):
    problem, _ = case
    element = dtype(problem.dtype).bytes
    total = 0.0
    for queries, keys in zip(*problem.lengths(), strict=True):
        touched = int(seen(problem, queries, keys).any(axis=0).sum()) if queries else 0
        total += touched * problem.kv_heads * (problem.D + problem.dim_v) * element
        total += queries * problem.H * (problem.D * element + problem.dim_v * dtype(problem.output_dtype).bytes)
        total += queries * problem.H * 4 * problem.lse
    if problem.bias is not None:
        total += math.prod(problem.bias_shape) * dtype(problem.bias).bytes
    assert problem.bytes_moved() == int(total)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_splits_cover_every_key_that_a_tile_sees(case):
    problem, config = case
    heads = tile_heads(problem, config)
    for queries, keys in zip(*problem.lengths(), strict=True):
        mask = seen(problem, queries, keys)
        for row in range(0, queries * heads, config.BLOCK_M):
            of_tile = mask[row // heads : (row + config.BLOCK_M - 1) // heads + 1].any(axis=0)
            if of_tile.any():
                first, last = np.flatnonzero(of_tile)[[0, -1]] // config.BLOCK_N
                assert last - first + 1 <= key_blocks(problem, config)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_work_is_that_of_the_launches(case):
    problem, config = case
    work = ATTENTION.work(problem, config)
    forward, *others = ATTENTION.launches(problem, config)
    assert work.launches == 1 + len(others) == (1 if config.SPLIT_KV == 1 else 2)
    assert work.blocks == math.prod(forward.grid)
    assert work.splits == forward.grid[1]
    assert work.num_warps == forward.num_warps * (2 if config.WARP_SPECIALIZE else 1)
    padded = sum(head_blocks(problem.D, config.BLOCK_M, problem.smallest_dim))
    assert problem.D <= work.tile_k < 2 * problem.D
    assert work.tile_k == padded
    assert work.second == (config.BLOCK_M, sum(value_blocks(problem, config)), config.BLOCK_N)
    constants = dict(forward.constexprs)
    assert padded == constants["BLOCK_D"] + constants["TAIL_D"]
    assert work.second[1] == constants["BLOCK_DV"] + constants["TAIL_DV"]
    # All splits' partial results, and room for each.
    partial = sum(4 * scratch.elements for scratch in forward.scratch if scratch.name == "partial")
    assert work.workspace_bytes * work.blocks == pytest.approx(partial)


def test_specialised_blocks_are_three_groups_and_persistent_ones_as_many_as_the_sms():
    problem = AttentionProblem(2, 8, 512, 1024, 128, Hkv=2, dtype="bf16", causal=True, lse=True)
    for persistent in (False, True):
        config = AttentionConfig(128, 128, TMA=True, WARP_SPECIALIZE=True, PERSISTENT=persistent)
        work, (launch,) = ATTENTION.work(problem, config), ATTENTION.launches(problem, config)
        assert (work.num_warps, launch.num_warps) == (8, 4)
        assert (work.specialized, work.persistent) == (True, persistent)
        assert work.blocks == math.prod(launch.grid) == 2 * 8 * 4
        assert launch.on(3).grid == ((3, 1, 1) if persistent else launch.grid)
        assert dict(launch.constexprs)["MASKS"]
        assert dict(launch.constexprs)["WARP_SPECIALIZE"]


def test_what_specialising_can_not_do_says_why():
    board = BOARDS["h200"]
    special = AttentionConfig(128, 128, TMA=True, WARP_SPECIALIZE=True)
    persistent = replace(special, PERSISTENT=True)
    assert SPACE.fits(LLAMA, special, board) is None
    assert SPACE.fits(LLAMA, persistent, board) is None
    for problem, config, why in (
        (LLAMA, replace(special, TMA=False), "WARP_SPECIALIZE goes with TMA"),
        (LLAMA, replace(special, OVERLAP=True), "without OVERLAP"),
        (LLAMA, replace(special, SPLIT_KV=2), "without OVERLAP, PACK and SPLIT_KV"),
        (LLAMA, replace(special, num_warps=8), "not num_warps=8 and BLOCK_M=128"),
        (LLAMA, replace(special, BLOCK_M=64), "not num_warps=4 and BLOCK_M=64"),
        (replace(LLAMA, bias="fp16"), special, "without bias"),
        (replace(LLAMA, dtype="fp8e4m3"), special, "for fp16 and bf16"),
        (replace(LLAMA, varlen=True), special, "sequences of one length"),
        (replace(LLAMA, D=160), replace(special, BLOCK_N=32), "D is computed as 128 and 32"),
        (LLAMA, replace(special, WARP_SPECIALIZE=False, PERSISTENT=True), "PERSISTENT goes with WARP_SPECIALIZE"),
        (replace(LLAMA, strided=True), persistent, "PERSISTENT is for dense queries"),
        (replace(LLAMA, kv_lens=True), persistent, "all of one length"),
        (replace(LLAMA, Sq=4000), persistent, "not Sq=4000 by 128"),
        (replace(LLAMA, Skv=4000), persistent, "Skv=4000 by 128"),
    ):
        assert why in SPACE.fits(problem, config, board), why
    assert "2 tiles on 132 SMs" not in (SPACE.useful(LLAMA, persistent, board) or "")
    assert "SMs leave PERSISTENT blocks fewer than 2" in SPACE.useful(replace(LLAMA, Sq=512), persistent, board)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_work_adds_up_to_what_the_blocks_do(case):
    problem, config = case
    assume(not problem.varlen)
    work = ATTENTION.work(problem, replace(config, SPLIT_KV=1))
    element = dtype(problem.dtype).bytes
    heads = tile_heads(problem, config)
    # Of one key head: what its tiles write, and, where all keys are seen by all, what they read.
    rows = problem.Sq * heads
    lse = 4 * problem.lse
    assert work.tiles * work.epilogue_bytes == pytest.approx(
        problem.B * problem.H * problem.Sq * (problem.dim_v * dtype(problem.output_dtype).bytes + lse)
    )
    assert work.tiles_m == math.ceil(rows / config.BLOCK_M)
    if problem.right is None and problem.window_left is None and not problem.kv_lens:
        assert work.iterations == math.ceil(problem.Skv / config.BLOCK_N)
        keys = problem.Skv * (problem.D + problem.dim_v) * element
        bias = 0 if problem.bias is None else rows / work.tiles_m * problem.Skv * dtype(problem.bias).bytes
        in_bounds = problem.Skv / (work.iterations * min(config.BLOCK_N, problem.Skv))
        assert work.iterations * work.load_bytes * in_bounds == pytest.approx(keys + bias)
        assert work.panel_b.bytes * work.batch == pytest.approx(problem.B * problem.kv_heads * keys)


def test_a_causal_mask_halves_the_iterations_and_a_window_bounds_them():
    config = AttentionConfig(128, 64, num_warps=8)
    whole = ATTENTION.work(replace(LLAMA, causal=False), config).iterations
    assert whole == 64
    assert ATTENTION.work(LLAMA, config).iterations == 33
    windowed = ATTENTION.work(replace(LLAMA, window_left=511), config).iterations
    assert 8 <= windowed <= 12


def test_what_scores_are_put_through_costs_time():
    config, board = AttentionConfig(128, 64, num_warps=8), BOARDS["rtx3090"]

    def time(problem):
        return predict(ATTENTION.work(problem, config), ATTENTION.estimate(problem, config, board), board).time_us

    assert time(LLAMA) < 0.6 * time(replace(LLAMA, causal=False))
    assert time(LLAMA) < time(replace(LLAMA, softcap=True))
    assert time(LLAMA) < time(replace(LLAMA, alibi=True))


def test_splitting_the_keys_of_one_sequence_pays_and_of_many_does_not():
    board = BOARDS["h200"]
    plain, split = AttentionConfig(16, 64, PACK=True, num_stages=3), AttentionConfig(16, 64, 16, True, num_stages=3)

    def time(problem, config):
        return predict(ATTENTION.work(problem, config), ATTENTION.estimate(problem, config, board), board).time_us

    assert time(replace(DECODE, B=1), split) < 0.5 * time(replace(DECODE, B=1), plain)
    assert time(replace(DECODE, B=512), split) > time(replace(DECODE, B=512), plain)


def test_what_lies_beside_the_dots_decides_an_order():
    # Every block of keys rescales 128 sums of each row: 32 keys at a time do it four times as often as 128.
    board = BOARDS["a100"]
    few, many = (
        AttentionConfig(128, 32, num_warps=8, num_stages=3),
        AttentionConfig(128, 128, num_warps=8, num_stages=3),
    )

    def time(config, *without):
        resources = ATTENTION.estimate(LLAMA, config, board)
        return predict(ATTENTION.work(LLAMA, config), resources, board, without=without).time_us

    assert time(many) < 0.95 * time(few)
    assert time(many, Term.BESIDE) > time(few, Term.BESIDE)


def test_heads_that_take_turns_end_earlier_where_rows_see_different_numbers_of_keys():
    # 64 heads of 16 tiles on 264 places: head by head the longest tile of the last one begins late.
    board = BOARDS["h200"]
    causal = AttentionProblem(B=2, H=32, Sq=1024, Skv=1024, D=128, causal=True)
    turns, by_head = (AttentionConfig(64, 64, GROUP_H=heads, num_stages=3) for heads in (32, 1))

    def time(problem, config, *without):
        resources = ATTENTION.estimate(problem, config, board)
        return predict(ATTENTION.work(problem, config), resources, board, without=without).time_us

    assert time(causal, turns) < 0.9 * time(causal, by_head)
    assert time(causal, turns, Term.UNEVEN) == time(causal, by_head, Term.UNEVEN)
    plain = replace(causal, causal=False)
    assert time(plain, turns) == time(plain, by_head)
    assert ATTENTION.work(causal, by_head).longest == pytest.approx(2, abs=0.2)
    # Tiles of a window are of nearly one length, as are those of a few queries over many keys.
    window = replace(causal, Sq=8192, Skv=8192, window_left=1023)
    assert 1 <= ATTENTION.work(window, by_head).longest < 1.15
    assert 1 <= ATTENTION.work(replace(causal, Sq=64, Skv=16384), by_head).longest < 1.01


# Resources, against what was compiled with Triton 3.9: of configurations drawn from the space, and some that spill

# Problem, board, configuration and what else it does; registers, spilled bytes, shared memory.
COMPILED = (
    ("Sq=1024,D=160,causal=true,window_left=512,softcap=true", "a100", (128, 64, 1, False, 8, 4), 255, 80, 163840),
    ("Sq=1024,D=64,dtype=bf16,bias=fp32", "a100", (64, 16, 1, False, 4, 1), 121, 0, 12288),
    ("Sq=1,D=128,dtype=fp8e5m2,page_size=16,kv_lens=true", "a100", (16, 16, 8, True, 2, 2), 164, 0, 8704),
    ("Sq=1024,D=80,Dv=128,alibi=true,kv_lens=true", "a100", (128, 128, 1, False, 8, 2), 255, 72, 73728),
    ("Sq=1024,D=96", "a100", (128, 32, 1, False, 8, 4), 180, 0, 61440),
    ("Sq=1,D=64,dtype=fp8e5m2,kv_lens=true", "a100", (16, 64, 8, True, 4, 1), 80, 0, 6144),
    ("Sq=1024,D=80,alibi=true,kv_lens=true,strided=true", "a100", (128, 128, 1, False, 4, 3), 255, 656, 102400),
    ("Sq=1,D=80,page_size=64,kv_lens=true,strided=true", "a100", (16, 128, 1, True, 4, 4), 166, 0, 74240),
    ("Sq=1024,D=128,bias=fp16,aligned=false", "a100", (128, 16, 1, False, 4, 1), 255, 80, 40960),
    ("Sq=1024,D=32,causal=true", "a100", (128, 128, 1, False, 8, 2), 181, 0, 24576),
    (
        "Sq=1024,D=128,dtype=fp8e5m2,alibi=true,kv_lens=true,strided=true",
        "a100",
        (128, 16, 1, False, 4, 3),
        240,
        0,
        40960,
    ),
    ("Sq=1,D=128,page_size=256,kv_lens=true", "a100", (16, 64, 1, True, 4, 3), 108, 0, 38928),
    ("Sq=1,D=64,dtype=fp32,page_size=64,kv_lens=true,strided=true", "a100", (16, 64, 1, True, 4, 1), 255, 376, 24576),
    ("Sq=1024,D=128,kv_lens=true", "a100", (32, 16, 1, False, 2, 4), 242, 0, 33792),
    ("Sq=1024,D=32", "a100", (128, 256, 1, False, 8, 2), 255, 104, 40960),
    ("Sq=1024,D=40", "a100", (128, 64, 1, False, 2, 1), 255, 328, 16384),
    ("Sq=1024,D=64,aligned=false", "a100", (64, 256, 1, False, 4, 2), 255, 536, 40960),
    ("Sq=1024,D=96,causal=true", "a100", (64, 128, 1, False, 2, 3), 255, 472, 110592),
    ("Sq=1024,D=128,alibi=true,kv_lens=true", "h200", (256, 16, 1, False, 8, 2), 239, 0, 81920),
    ("Sq=1,D=128,dtype=fp32,kv_lens=true", "h200", (16, 64, 1, True, 4, 3), 255, 472, 143424),
    ("Sq=1024,D=128,dtype=bf16,bias=fp16", "h200", (128, 64, 1, False, 4, 4), 255, 280, 212992),
    ("Sq=1,D=32,dtype=fp8e5m2,page_size=16,kv_lens=true", "h200", (16, 64, 1, True, 2, 4), 110, 0, 7424),
    ("Sq=1,D=256,dtype=bf16,kv_lens=true", "h200", (16, 64, 1, True, 4, 4), 176, 0, 206848),
    ("Sq=1,D=128,page_size=256,kv_lens=true", "h200", (16, 32, 1, True, 4, 2), 96, 0, 21504),
    ("Sq=1024,D=128,causal=true,strided=true", "h200", (32, 32, 1, False, 2, 2), 238, 0, 26624),
    ("Sq=1024,D=64,causal=true", "h200", (64, 128, 1, False, 4, 2), 220, 0, 73728),
    ("Sq=1024,D=32,causal=true", "h200", (256, 64, 1, False, 8, 1), 176, 0, 20480),
    ("Sq=1024,D=80,dtype=fp8e5m2,alibi=true,kv_lens=true", "h200", (128, 128, 1, False, 4, 3), 255, 968, 131072),
    ("Sq=1024,D=64,bias=fp32", "h200", (128, 64, 1, False, 8, 4), 127, 0, 180224),
    ("Sq=1024,D=96,causal=true,window_left=512", "h200", (128, 32, 1, False, 4, 4), 232, 0, 73728),
    ("Sq=1024,D=128,causal=true", "h200", (64, 64, 1, False, 4, 2), 170, 0, 81920),
    ("Sq=1024,D=128,bias=fp16", "h200", (128, 16, 1, False, 4, 2), 218, 0, 53248),
    ("Sq=1024,D=128,alibi=true,kv_lens=true", "h200", (64, 16, 1, False, 4, 3), 122, 0, 40960),
    ("Sq=1024,D=128,dtype=fp8e4m3,alibi=true,kv_lens=true", "h200", (16, 256, 1, False, 2, 2), 255, 2184, 77824),
    ("Sq=1024,D=96,dtype=bf16", "h200", (32, 256, 1, False, 2, 2), 255, 328, 155648),
    (
        "Sq=1024,D=64,dtype=fp8e4m3,alibi=true,kv_lens=true,strided=true",
        "h200",
        (64, 128, 1, False, 2, 1),
        255,
        744,
        16384,
    ),
    ("Sq=1024,D=128,causal=true", "h200", (128, 64, 1, False, 8, 2, "OVERLAP"), 204, 0, 98304),
    ("Sq=1024,D=128,dtype=bf16,causal=true", "h200", (128, 128, 1, False, 8, 2, "OVERLAP", "TMA"), 255, 0, 164864),
    ("Sq=1024,D=64,causal=true", "h200", (64, 64, 1, False, 4, 3, "OVERLAP", "TMA"), 142, 0, 58368),
    ("Sq=1024,D=64,Dv=128,causal=true,strided=true", "h200", (128, 64, 1, False, 8, 2, "TMA"), 155, 0, 66560),
    ("Sq=1024,D=128,bias=fp16", "h200", (128, 64, 1, False, 8, 2, "OVERLAP", "TMA"), 218, 0, 114720),
    ("Sq=1024,D=256,causal=true", "h200", (128, 32, 1, False, 8, 2, "OVERLAP", "TMA"), 236, 0, 131120),
    ("Sq=1024,D=96,causal=true,window_left=512", "h200", (128, 32, 1, False, 8, 2, "OVERLAP"), 129, 0, 49152),
    ("Sq=1024,D=128,dtype=fp8e4m3,causal=true", "h200", (128, 64, 1, False, 8, 2, "OVERLAP", "TMA"), 193, 0, 57368),
    ("Sq=1024,D=64,Dv=128,causal=true,strided=true", "b200", (32, 256, 1, False, 4, 2), 255, 408, 118784),
    ("Sq=1024,D=128,dtype=fp8e5m2", "b200", (32, 32, 1, False, 4, 2), 142, 0, 18432),
    ("Sq=1024,D=40,alibi=true,kv_lens=true", "b200", (64, 16, 1, False, 4, 2), 79, 0, 10808),
    ("Sq=1,D=128,page_size=256,kv_lens=true", "b200", (16, 128, 1, True, 4, 3), 177, 0, 73744),
    ("Sq=1024,D=96,kv_lens=true", "b200", (64, 16, 1, False, 4, 3), 88, 0, 28160),
    ("Sq=1024,D=80,bias=fp32,strided=true", "b200", (128, 64, 1, False, 4, 2), 255, 48, 84024),
    ("Sq=1,D=64,page_size=16,kv_lens=true", "b200", (16, 32, 8, True, 2, 4), 98, 0, 11520),
    ("Sq=1024,D=96,dtype=fp8e4m3,bias=fp32", "b200", (16, 128, 1, False, 4, 2), 222, 0, 49152),
    ("Sq=1024,D=64,causal=true,aligned=false", "b200", (256, 32, 1, False, 4, 1), 255, 1248, 36872),
    ("Sq=1024,D=64", "b200", (64, 64, 1, False, 4, 2), 101, 0, 40992),
    ("Sq=1024,D=128", "b200", (16, 32, 1, False, 2, 2), 96, 0, 21504),
    (
        "Sq=1024,D=40,dtype=fp32,causal=true,window_left=512,softcap=true",
        "b200",
        (16, 128, 1, False, 4, 1),
        255,
        88,
        45120,
    ),
    ("Sq=1024,D=160,causal=true", "b200", (32, 64, 1, False, 4, 2), 196, 0, 86016),
    ("Sq=1024,D=256,dtype=fp8e4m3,kv_lens=true", "b200", (64, 64, 1, False, 4, 2), 254, 0, 99328),
    ("Sq=1,D=80,kv_lens=true", "b200", (128, 16, 8, True, 2, 1), 255, 328, 22528),
    ("Sq=1024,D=96,dtype=bf16,causal=true,strided=true", "b200", (64, 64, 1, False, 2, 2), 255, 384, 36864),
)


def estimates():
    for fields, board, values, registers, spilled, shared in COMPILED:
        problem = AttentionProblem.parse(f"B=1,H=8,Hkv=2,Skv=1024,{fields}")
        config = AttentionConfig(
            *values[:4], num_warps=values[4], num_stages=values[5], **dict.fromkeys(values[6:], True)
        )
        yield ATTENTION.estimate(problem, config, BOARDS[board]), registers, spilled, shared


def test_most_register_estimates_are_within_a_third():
    whole = [(mine.registers, real) for mine, real, spilled, _ in estimates() if not spilled]
    near = [0.67 <= mine / real <= 1.5 for mine, real in whole]
    assert len(near) >= 30
    assert sum(near) / len(near) >= 0.85


def test_large_spills_are_foreseen():
    spilling = [mine for mine, _, spilled, _ in estimates() if spilled >= 200]
    assert len(spilling) >= 8
    assert sum(mine.registers == MAX_REGISTERS_PER_THREAD for mine in spilling) / len(spilling) >= 0.8
    false_alarms = [mine for mine, _, spilled, _ in estimates() if mine.spill_bytes > 200 and not spilled]
    assert len(false_alarms) <= 2


def test_shared_memory_is_never_overestimated_and_mostly_exact():
    exact = []
    for mine, _, _, shared in estimates():
        assert mine.shared_bytes <= shared
        exact.append(mine.shared_bytes >= 0.98 * shared)
    assert sum(exact) / len(exact) >= 0.8


@pytest.mark.parametrize("dim", [72, 80, 96])
@pytest.mark.parametrize("rows", [16, 32, 64, 128, 256])
def test_fp8_heads_between_64_and_128_have_no_rest(dim, rows):
    problem = replace(LLAMA, D=dim, Dv=dim, dtype="fp8e4m3")
    config = AttentionConfig(rows, 64)
    assert head_blocks(dim, rows, problem.smallest_dim) == value_blocks(problem, config) == (128, 0)
    assert value_blocks(replace(problem, dtype="bf16"), AttentionConfig(128, 64))[1] in (16, 32)


# The space


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(CATALOGUE))
def test_the_default_fits_whatever_the_problem_and_the_board(case, board):
    problem, _ = case
    config = ATTENTION.default(problem, board)
    assert SPACE.fits(problem, config, board) is None
    resources = ATTENTION.estimate(problem, config, board)
    assert 1 <= resources.registers <= MAX_REGISTERS_PER_THREAD
    assert occupancy(ATTENTION.work(problem, config), resources, board) >= 1


@settings(max_examples=3, deadline=None)  # each looks at the whole product of the axes
@given(cases(), st.sampled_from(CATALOGUE))
def test_narrower_axes_lose_nothing_useful(case, board):
    problem, _ = case
    every = [
        config
        for config in SPACE.product()
        if SPACE.useful(problem, config, board) is None and SPACE.fits(problem, config, board) is None
    ]
    assert SPACE.configs(problem, board) == every


@pytest.mark.parametrize("board", ["a100", "rtx3090", "h200", "rtx5090"])
@pytest.mark.parametrize(
    "problem", [LLAMA, DECODE, replace(DECODE, kv_lens=False), AttentionProblem(1, 12, 512, 512, 64)], ids=str
)
def test_the_space_is_hundreds_of_configurations(problem, board):
    configs = SPACE.configs(problem, BOARDS[board])
    coarse = SPACE.configs(problem, BOARDS[board], coarse=True)
    assert 60 <= len(configs) <= 1500
    assert 8 <= len(coarse) <= len(configs) / 3
    assert {config.num_warps for config in configs} >= {4}
    if problem.Sq == 1:
        assert {config.PACK for config in configs} == {False, True}
        assert {config.SPLIT_KV for config in configs} >= {1, 2, 4}
    else:
        assert {config.PACK for config in configs} == {False}


def test_what_overlapping_and_descriptors_can_not_do_says_why():
    board, tile = BOARDS["h200"], AttentionConfig(128, 64, num_warps=8)
    overlapped, described = replace(tile, OVERLAP=True), replace(tile, TMA=True)
    paged = replace(DECODE, page_size=16)
    assert "OVERLAP is for keys that lie one behind the other" in SPACE.fits(paged, overlapped, board)
    assert "TMA is for keys that lie one behind the other" in SPACE.fits(paged, described, board)
    starts = "whose every row starts at 16 bytes"
    assert starts in SPACE.fits(replace(LLAMA, aligned=False), described, board)
    assert starts in SPACE.fits(replace(LLAMA, D=100), described, board)
    assert "and D is computed as 64 and 32" in SPACE.fits(replace(LLAMA, D=96, Dv=64), described, board)
    assert "and Dv is computed as 64 and 16" in SPACE.fits(replace(LLAMA, Dv=72), described, board)
    assert "at the most 256 rows" in SPACE.fits(replace(LLAMA, D=16), replace(described, BLOCK_N=512), board)
    assert "OVERLAP=1 must be true or false" in SPACE.fits(LLAMA, replace(tile, OVERLAP=1), board)
    for problem in (LLAMA, replace(LLAMA, D=120, strided=True), replace(LLAMA, D=128, varlen=True)):
        assert SPACE.fits(problem, described, board) is None


def test_long_rows_of_enough_heads_come_first():
    board = BOARDS["h200"]
    batch = AttentionProblem(4, 16, 2048, 2048, 128, causal=True)
    assert ATTENTION.default(batch, board).GROUP_H == 32
    assert ATTENTION.default(replace(batch, Sq=8192, Skv=8192), board).GROUP_H == 8
    assert ATTENTION.default(replace(batch, causal=False), board).GROUP_H == 1
    assert ATTENTION.default(replace(batch, B=1, Sq=512), board).GROUP_H == 1


@pytest.mark.parametrize(("sequences", "keys", "on_hopper"), [(1, 131072, 16), (1, 1024, 4), (16, 8192, 1)])
def test_keys_are_split_until_the_sms_have_blocks(sequences, keys, on_hopper):
    problem = AttentionProblem(sequences, 32, 1, keys, 128, Hkv=8, dtype="bf16")
    splits = {board: ATTENTION.default(problem, BOARDS[board]).SPLIT_KV for board in ("h200", "a100")}
    assert splits["h200"] == on_hopper
    assert splits["a100"] in (on_hopper, 2 * on_hopper)  # two blocks each, if there are keys for them


def test_what_runs_beside_the_second_dot_takes_less_time():
    resources = ATTENTION.estimate(LLAMA, AttentionConfig(128, 128, num_warps=8), BOARDS["h200"])

    def time(**choices):
        work = ATTENTION.work(LLAMA, AttentionConfig(128, 128, num_warps=8, **choices))
        return predict(work, resources, BOARDS["h200"]).time_us

    assert time(OVERLAP=True) < 0.95 * time()


def test_what_is_not_worth_trying_says_why():
    board = BOARDS["rtx3090"]
    for config, why in (
        (AttentionConfig(128, 64, SPLIT_KV=64), "SPLIT_KV=64 leaves fewer than 2 of 64 blocks"),
        (AttentionConfig(128, 64, SPLIT_KV=8), "1024 tiles fill 82 SMs with half of SPLIT_KV=8"),
        (AttentionConfig(128, 64, PACK=True), "4096 queries fill a tile of 128 rows"),
        (AttentionConfig(128, 64, num_stages=5), "5 stages are for paged keys"),
        (AttentionConfig(16, 16, num_warps=8), "8 warps of 8 columns are more than 16 keys"),
        (AttentionConfig(128, 128, num_warps=16), "16 warps of 16 rows are more than 128 rows"),
        (AttentionConfig(256, 256, num_warps=8), "registers a thread are so many over 255"),
    ):
        assert why in SPACE.useful(LLAMA, config, board)
    short = AttentionProblem(1, 2, 10, 20, 64)
    assert "a block of 32 over a size of 10 is mostly" in SPACE.useful(short, AttentionConfig(32, 16), board)
    assert "a block of 64 over a size of 20 is mostly" in SPACE.useful(short, AttentionConfig(16, 64), board)
    for config, why in (
        (AttentionConfig(128, 64, OVERLAP=True, num_warps=8), "OVERLAP is for warp groups of wgmma"),
        (AttentionConfig(128, 64, TMA=True, num_warps=8), "TMA is for warp groups of wgmma"),
    ):
        assert why in SPACE.useful(LLAMA, config, board)
    hopper, tile = BOARDS["h200"], AttentionConfig(128, 64, OVERLAP=True, TMA=True, num_warps=8)
    assert SPACE.useful(LLAMA, tile, hopper) is None
    assert "without copies ahead" in SPACE.useful(LLAMA, replace(tile, num_stages=1), hopper)
    assert "in 2 blocks of keys" in SPACE.useful(replace(LLAMA, Skv=100), tile, hopper)
    whole = replace(LLAMA, causal=False)
    assert "GROUP_H=8 is for causal tiles" in SPACE.useful(whole, replace(tile, GROUP_H=8), hopper)
    assert "GROUP_H=8 is for causal tiles" in SPACE.useful(replace(LLAMA, Sq=512), replace(tile, GROUP_H=8), hopper)
    assert "repeats a smaller one with 8 heads" in SPACE.useful(
        replace(LLAMA, H=8, Sq=9000, Skv=9000), replace(tile, GROUP_H=32), hopper
    )
    unaligned = replace(LLAMA, aligned=False)
    assert "without cp.async" in SPACE.useful(unaligned, AttentionConfig(64, 32, num_stages=2), board)
    ieee = replace(LLAMA, dtype="fp32", out_dtype="fp32")
    assert "multiply-adds a thread" in SPACE.useful(ieee, AttentionConfig(64, 64, num_warps=8), board)
    assert "no warp group" in SPACE.useful(LLAMA, AttentionConfig(64, 64, num_warps=2), BOARDS["h200"])


@settings(max_examples=6, deadline=None)
@given(cases(), st.integers(0, 1))
def test_a_ragged_problem_is_small_cut_and_right(case, seed):
    problem, config = case
    config = replace(config, SPLIT_KV=min(config.SPLIT_KV, 2), BLOCK_M=min(config.BLOCK_M, 32))
    config = replace(config, BLOCK_N=min(config.BLOCK_N, 32))
    assume(SPACE.fits(problem, config, BOARDS["a100"]) is None)
    ragged = ATTENTION.ragged(problem, config)
    assert ragged.Sq <= max(2, 2 * config.BLOCK_M)
    assert ragged.H / ragged.kv_heads == problem.H / problem.kv_heads
    assert (ragged.Skv % 16 == 0) == (problem.Skv % 16 == 0)
    if not problem.page_size and problem.Skv >= config.BLOCK_N:
        assert ragged.Skv % config.BLOCK_N or config.BLOCK_N == 16
    conforms(ragged, config, seed=seed)


# Neighbours


def test_distance_counts_doublings():
    assert ATTENTION.distance(LLAMA, LLAMA) == 0
    assert ATTENTION.distance(LLAMA, replace(LLAMA, B=2)) == pytest.approx(1)
    assert ATTENTION.distance(LLAMA, replace(LLAMA, Sq=8193, Skv=8193)) == pytest.approx(2, abs=0.01)
    assert ATTENTION.distance(LLAMA, replace(LLAMA, H=64, Hkv=16)) == 2
    assert ATTENTION.distance(LLAMA, replace(LLAMA, Hkv=4)) == 1
    assert ATTENTION.distance(LLAMA, replace(LLAMA, B=64)) is None
    for change in (
        {"D": 64},
        {"dtype": "bf16", "out_dtype": "bf16"},
        {"causal": False},
        {"softcap": True},
        {"lse": True},
    ):
        assert ATTENTION.distance(LLAMA, replace(LLAMA, **change)) is None
    assert ATTENTION.distance(LLAMA, replace(LLAMA, window_left=512)) is None
    windowed = replace(LLAMA, window_left=511)
    assert ATTENTION.distance(windowed, replace(LLAMA, window_left=1022)) == pytest.approx(1)
    paged = replace(LLAMA, page_size=16, kv_lens=True)
    assert ATTENTION.distance(paged, replace(paged, page_size=64)) == 2
    assert ATTENTION.distance(paged, replace(paged, page_size=0)) is None
    biased = replace(LLAMA, bias="fp16")
    assert ATTENTION.distance(biased, replace(biased, Skv=4097)) is None
    assert ATTENTION.distance(LLAMA, replace(LLAMA, Skv=4097)) == pytest.approx(0, abs=0.01)

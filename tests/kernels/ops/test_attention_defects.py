"""The tests of the fused attention, put to the test: seeded defects, each of which some problem must show."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kernels.defects import exposed, seeded
from tests.kernels.ops.attention_cases import SMALL, conforms
from tilewright.kernels.ops.attention import combine, jit, mainloop, persistent, tiles
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import AttentionConfig

DEFECTS = {
    "causal off by one": ("seen = seen & (offset <= 0)", "seen = seen & (offset <= 1)"),
    "causal aligned at the top left": ("diagonal = keys - queries ", "diagonal = 0 * queries "),
    "window one too wide": ("both(seen, offset >= -window_left)", "both(seen, offset >= -window_left - 1)"),
    "right window forgotten": ("seen = both(seen, offset <= window_right)", "seen = seen"),
    "keys beyond the length": ("            seen = columns\n", "            seen = key[None, :] < 2**30\n"),
    "last keys dropped": ("last = tl.cdiv(tl.maximum(end, 0), BLOCK_N)", "last = tl.maximum(end, 0) // BLOCK_N"),
    "first blocks dropped": ("first = begin // BLOCK_N", "first = tl.cdiv(begin, BLOCK_N)"),
    "edges taken for whole": ("tl.maximum(tl.maximum(end_of_all, 0) // BLOCK_N, whole)", "tl.maximum(last, whole)"),
    "left edge taken for whole": ("tl.maximum(tl.cdiv(begin_of_all, BLOCK_N), first)", "first"),
    "right edge twice": ("block += tl.where(step < jump, 0, over)", "block += tl.where(step < jump, 0, over - 1)"),
    "accumulator not rescaled": (
        "accumulator = tl.dot(weights.to(v.dtype), v, accumulator * correction[:, None],",
        "accumulator = tl.dot(weights.to(v.dtype), v, accumulator,",
    ),
    "tail not rescaled": ("v_tail, accumulator_tail * correction[:, None],", "v_tail, accumulator_tail,"),
    "sum not rescaled": ("total = total * correction + tl.sum(weights, 1)", "total = total + tl.sum(weights, 1)"),
    "highest score not kept": ("        m = higher\n", "        m = tl.maximum(m, 0.0 * higher)\n"),
    "weights in bf16": (
        "weights = tl.exp2(scores * unit - base[:, None])",
        "weights = tl.exp2(scores * unit - base[:, None]).to(tl.bfloat16).to(tl.float32)",
    ),
    "natural instead of binary": ("scale = SCALE * LOG2E", "scale = SCALE * 1.0"),
    "tail of the head dim": ("scores = tl.dot(q_tail, k_tail, scores,", "scores += 0.0 * tl.dot(q_tail, k_tail,"),
    "head of another group": ("tile_head // GROUP", "tile_head % (H // GROUP)"),
    "packed rows of one query": ("query = lane_m // HEADS", "query = lane_m // HEADS * 0"),
    "first sequence's keys": ("k_base += batch_64 * k_batch", "k_base += 0 * k_batch"),
    "value stride of k": (
        "v_rows = v_base + page * v_batch + (key % PAGE) * v_row",
        "v_rows = v_base + page * k_batch + (key % PAGE) * k_row",
    ),
    "page of the sequence before": ("table = block_table_ptr + batch_64 *", "table = block_table_ptr + 0 *"),
    "softcap after bias": ("scores += bias.to(tl.float32) * LOG2E", "scores += 0.5 * bias.to(tl.float32) * LOG2E"),
    "alibi not absolute": ("slope * tl.abs(offset).to(tl.float32)", "slope * offset.to(tl.float32)"),
    "sink in every split": ("m = tl.where(split == 0, tl.zeros", "m = tl.where(split >= 0, tl.zeros"),
    "sink forgotten": ("m = tl.where(split == 0, tl.zeros", "m = tl.where(split < 0, tl.zeros"),
    "log-sum-exp base 2": (
        "tl.store(lse_ptr + row, lse * LN2, mask=inside)",
        "tl.store(lse_ptr + row, lse, mask=inside)",
    ),
    "rows past the end written": (
        "store_tile(out, to_output(accumulator, None, kind), mask_m, mask_dv)",
        "store_tile(out, to_output(accumulator, None, kind), None, mask_dv)",
    ),
    "empty rows divided by zero": ("factor = tl.where(total == 0.0, 0.0, 1.0 / total)", "factor = 1.0 / total"),
    "empty rows are NaN": ('base = tl.where(higher == -float("inf"), 0.0, higher)', "base = higher"),
    "v_scale forgotten": ("factor *= tl.load(v_scale_ptr)", "factor *= 1.0"),
    "splits do not end": ("last = tl.minimum(first + blocks, last)", "last = last"),
    "splits overlap": ("first += split * blocks", "first += split * (blocks - 1)"),
    "one split not combined": (
        "partial = tl.load(partial_ptr + splits",
        "weights = tl.where(tl.arange(0, SPLIT_KV) == 1, 0.0, weights)\n    partial = tl.load(partial_ptr + splits",
    ),
    "splits not weighted": (
        "out = tl.sum(partial * weights[:, None], 0) / total",
        "out = tl.sum(partial, 0) / SPLIT_KV",
    ),
    "heads of the last group": ("tl.num_programs(0) // tiles - group * GROUP_H, GROUP_H)", "GROUP_H, GROUP_H)"),
    "tiles out of turn": ("tile = within // size", "tile = within // GROUP_H"),
    "values of the block at hand": ("behind = tl.maximum(step - 1, lower) * BLOCK_N", "behind = step * BLOCK_N"),
    "values of the last block twice": ("behind = (upper - 1) * BLOCK_N", "behind = (upper - 2) * BLOCK_N"),
    "descriptor of the first keys": ("tl.make_tensor_descriptor(k_base,", "tl.make_tensor_descriptor(k_ptr,"),
    "descriptor of the first values": ("tl.make_tensor_descriptor(v_base,", "tl.make_tensor_descriptor(v_ptr,"),
    "descriptor of too many values": ("(v_base, [keys, DIM_V]", "(v_base, [keys + 1, DIM_V]"),
    "tail of the keys by descriptor": (
        "k_descriptor.load([row + start, TAIL_D])",
        "k_descriptor.load([row + start, 0])",
    ),
    "tail of the values by descriptor": ("v_descriptor.load([start, TAIL_DV])", "v_descriptor.load([start, 0])"),
    "combined log-sum-exp of one split": ("(highest + tl.log2(total)) * LN2", "highest * LN2"),
}


WIDE = {"dtype": "fp32", "lse": True}
PAGED = AttentionProblem(3, 4, 3, 48, 16, Dv=32, Hkv=2, page_size=8, kv_lens=True, sinks=True, **WIDE)
DESCRIBED = AttentionProblem(2, 2, 40, 70, 64, Dv=16, kv_lens=True, **WIDE)

# Problems that between them run every line of the kernels, in the order in which defects are seen soonest: most of them
# need but one or two of these.
EXPOSING = (
    (AttentionProblem(1, 1, 40, 20, 16, causal=True, **WIDE), SMALL),
    (AttentionProblem(1, 1, 40, 70, 16, window_left=20, window_right=9, **WIDE), SMALL),
    (replace(DESCRIBED, D=120, Dv=128), AttentionConfig(64, 16, TMA=True)),
    (AttentionProblem(1, 1, 17, 33, 32, dtype="fp8e5m2", scales=True, out_dtype="fp32"), SMALL),
    (PAGED, AttentionConfig(16, 16, PACK=True)),
    (DESCRIBED, AttentionConfig(64, 16, OVERLAP=True, TMA=True)),
    (
        AttentionProblem(1, 2, 17, 96, 16, softcap=True, bias="fp32", bias_heads=True, **WIDE),
        AttentionConfig(16, 16, SPLIT_KV=4),
    ),
    (AttentionProblem(3, 1, 40, 40, 16, causal=True, **WIDE), AttentionConfig(16, 16, GROUP_H=2)),
    (AttentionProblem(3, 4, 20, 40, 16, Hkv=2, causal=True, varlen=True, alibi=True, sinks=True, **WIDE), SMALL),
    (replace(PAGED, D=16, Dv=16, sinks=True), AttentionConfig(16, 16, SPLIT_KV=2)),
    (AttentionProblem(1, 1, 17, 33, 32, dtype="fp16", out_dtype="fp32"), SMALL),
    (AttentionProblem(2, 4, 40, 70, 24, Hkv=2, causal=True, **WIDE), AttentionConfig(64, 16)),
)


def test_the_kernel_itself_shows_no_defect():
    assert not exposed(conforms, EXPOSING)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_be_seen(defect):
    with seeded((tiles, mainloop, jit, combine), *DEFECTS[defect]):
        assert exposed(conforms, EXPOSING)


DEFECTS_OF_PERSISTENT_BLOCKS = {
    "causal off by one": ("<= (query + diagonal - start)[", "<= (query + diagonal - start + 1)["),
    "causal aligned at the top left": ("diagonal = Skv - Sq ", "diagonal = 0 * Sq "),
    "last keys dropped": ("end = tl.minimum(end, top + BLOCK_M + diagonal)", "end = tl.minimum(end, top + diagonal)"),
    "right window forgotten": ("seen = both(seen, offset <= window_right)", "seen = offset < 2**30"),
    "left window forgotten": ("both(seen, offset >= -window_left)", "both(seen, offset >= -(2**30))"),
    "keys of the window on the right": ("top + BLOCK_M + diagonal + window_right", "top + diagonal + window_right"),
    "first blocks dropped": ("first = begin // BLOCK_N", "first = tl.cdiv(begin, BLOCK_N)"),
    "queries of the first head": ("q_descriptor.load([place * Sq + top, 0])", "q_descriptor.load([top, 0])"),
    "keys of another head": ("place // GROUP * Skv", "place % (H // GROUP) * Skv"),
    "heads of the last group": ("tl.minimum(heads - group * GROUP_H, GROUP_H)", "GROUP_H"),
    "tiles out of turn": ("tile = within // size", "tile = within // GROUP_H"),
    "slope of the first head": ("tl.load(alibi_slopes_ptr + head)", "tl.load(alibi_slopes_ptr)"),
    "sink forgotten": ("total += 1.0", "total += 0.0"),
    "empty rows divided by zero": ("factor = tl.where(total == 0.0, 0.0, 1.0 / total)", "factor = 1.0 / total"),
    "log-sum-exp base 2": ("(m + tl.log2(total)) * LN2", "(m + tl.log2(total))"),
    "rows of the first head": ("row = place.to(tl.int64) * Sq + query", "row = 0 * place.to(tl.int64) + query"),
    "one tile each": ("heads * tiles, tl.num_programs(0), warp", "tl.num_programs(0), tl.num_programs(0), warp"),
}


def exposing_persistent_blocks():
    config = AttentionConfig(128, 32, TMA=True, WARP_SPECIALIZE=True, PERSISTENT=True)
    grouped = AttentionProblem(2, 4, 128, 160, 16, Dv=32, Hkv=2, causal=True, lse=True)
    yield grouped, config
    yield replace(grouped, B=1, H=3, Hkv=3, Sq=256, Skv=256, alibi=True, sinks=True), replace(config, GROUP_H=2)
    yield replace(grouped, Skv=224, causal=False, window_left=40, window_right=9), config
    yield replace(grouped, B=1, Sq=256, Skv=192), config  # the first rows see no key


def test_the_persistent_kernel_itself_shows_no_defect():
    assert not exposed(conforms, exposing_persistent_blocks())


@pytest.mark.parametrize("defect", DEFECTS_OF_PERSISTENT_BLOCKS)
def test_a_defect_of_persistent_blocks_would_be_seen(defect):
    with seeded((tiles, mainloop, persistent), *DEFECTS_OF_PERSISTENT_BLOCKS[defect]):
        assert exposed(conforms, exposing_persistent_blocks())

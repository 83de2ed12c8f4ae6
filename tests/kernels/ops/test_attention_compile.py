"""Compiled attention for GPUs that are not here: its instructions, what it takes, and that no default spills."""

from __future__ import annotations

import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from tests.kernels.compiling import archs, assert_clean, assert_specialised, compiled, described
from tilewright.kernels import resolve_device
from tilewright.kernels.compile import HIDDEN_POINTERS
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.space import SPACE, AttentionConfig

ARCHS = (80, 86, 89, 90, 100, 120)
PREFILL = AttentionProblem(1, 32, 4096, 4096, 128, Hkv=8, causal=True)
DECODE = AttentionProblem(8, 32, 1, 8192, 128, Hkv=8, page_size=16, kv_lens=True)
PROJECTED = AttentionProblem(2, 8, 4096, 4096, 40, strided=True)


def attention_on(arch, jobs):
    return compiled(arch, [("attention", problem, config) for problem, config in jobs])


@pytest.mark.parametrize("arch", archs(*ARCHS, smoke=(86,)))
def test_keys_are_copied_ahead_and_multiplied_on_tensor_cores(arch):
    prefill, decode, projected = attention_on(arch, [(PREFILL, None), (DECODE, None), (PROJECTED, None)])
    tensor = {90: "wgmma", 100: "tcgen05"}.get(arch, "mma.sync")
    for reply, expected in ((prefill, tensor), (decode, "mma.sync"), (projected, tensor)):
        found = reply["instructions"]
        assert found["cp.async"], described(reply)
        assert not found["narrow loads"], described(reply)
        # A warp group of wgmma or tcgen05 needs 64 rows.
        assert [name for name in ("mma.sync", "wgmma", "tcgen05") if found[name]] == [expected], described(reply)
    assert_clean((prefill, decode, projected), scratch=False)
    assert len(decode["more"]) == 1
    assert decode["more"][0]["name"] == "combine_kernel"


@pytest.mark.smoke
def test_the_entry_has_the_present_arguments_and_two_hidden_pointers():
    every = replace(DECODE, alibi=True, sinks=True, softcap=True, bias="fp32", lse=True, strided=True, window_left=99)
    replies = attention_on(86, [(replace(PREFILL, causal=False), None), (every, None)])
    for reply in replies:
        for launch in (reply, *reply["more"]):
            sizes = {"i32": ".u32", "i64": ".u64"}
            expected = [sizes.get(kind, ".u64") for kind in launch["arguments"]] + [".u64"] * HIDDEN_POINTERS
            assert [kind.replace(".b", ".u") for kind in launch["parameters"]] == expected
    plain, full = replies
    # q, k, v; H, Sq, Skv; out.
    assert plain["arguments"] == ["*fp16"] * 3 + ["i32"] * 3 + ["*fp16"]
    assert (len(full["arguments"]), full["arguments"].count("i64")) == (30, 16)


def test_no_mask_is_compiled_where_none_can_be_needed():
    plain = AttentionProblem(1, 8, 1024, 1024, 64)
    ragged = replace(plain, Skv=1023)
    one, two = attention_on(86, [(plain, AttentionConfig(64, 64)), (ragged, AttentionConfig(64, 64))])
    # The loop over whole blocks, and that loop and one over edges.
    assert 2 * one["instructions"]["mma.sync"] == two["instructions"]["mma.sync"]


def test_fp8_scores_are_multiplied_as_fp8_and_values_as_fp16():
    problem = AttentionProblem(1, 8, 1024, 1024, 128, dtype="fp8e4m3")
    (reply,) = attention_on(90, [(problem, AttentionConfig(128, 64, num_warps=8))])
    found = reply["instructions"]
    assert 0 < found["fp8 mma"] < found["wgmma"]


@pytest.mark.smoke
def test_values_are_multiplied_during_the_next_softmax(tmp_path):
    tile = AttentionConfig(128, 64, OVERLAP=True, TMA=True, num_warps=8)
    packed = replace(PREFILL, Skv=4000, varlen=True)
    overlapped = [
        (PREFILL, tile),
        (PREFILL, replace(tile, TMA=False)),
        (replace(PREFILL, causal=False, dtype="bf16"), replace(tile, BLOCK_N=32)),
        (replace(PREFILL, D=64, window_left=999, lse=True), replace(tile, BLOCK_M=64, num_warps=4, num_stages=3)),
        (packed, tile),
    ]
    plain = [(problem, replace(config, OVERLAP=False)) for problem, config in overlapped[::2]]
    jobs = [("attention", problem, config) for problem, config in (*overlapped, *plain)]
    replies = compiled(90, jobs, TRITON_DUMP_PTXAS_LOG="1", TRITON_CACHE_DIR=str(tmp_path))
    for reply in replies:
        assert "error" not in reply, (described(reply), reply["error"])
        scores, values = ["wgmma.commit", "wgmma.wait"], ["wgmma.commit", "ex2"]
        during = reply["order"][:4] == scores + values
        assert during == reply["config"]["OVERLAP"], described(reply)
        # ptxas says so where it waits for every wgmma after all.
        assert "registers" in reply["log"], described(reply)
        assert "serialized" not in reply["log"], described(reply)
        assert reply["over"] is None, (described(reply), reply["over"])
        assert bool(reply["scratch"]) == reply["config"]["TMA"], described(reply)
        assert not (reply["config"]["TMA"] and reply["instructions"]["narrow loads"]), described(reply)


@pytest.mark.smoke
@pytest.mark.parametrize("persistent", [False, True])
def test_a_specialised_loop_is_three_groups_of_warps(persistent):
    tile = AttentionConfig(128, 128, TMA=True, WARP_SPECIALIZE=True, PERSISTENT=persistent)
    jobs = [
        (replace(PREFILL, causal=False, dtype="bf16", Hkv=2), tile),
        (replace(PREFILL, D=64, window_left=999, lse=True, sinks=True), replace(tile, num_stages=3)),
        (replace(PREFILL, Sq=2048, Skv=4096, softcap=True, alibi=True), replace(tile, BLOCK_N=64)),
    ]
    if not persistent:
        jobs += [(replace(PREFILL, Sq=1000, Skv=1234, strided=True, kv_lens=True), tile)]
    for reply in attention_on(90, jobs):
        assert_specialised(reply)
        assert reply["instructions"]["wgmma"], described(reply)
        assert reply["over"] is None, (described(reply), reply["over"])
    for reply in attention_on(86, [(PREFILL, replace(tile, BLOCK_N=32))]):
        assert_specialised(reply)


def sampled(arch, count, seed):
    """Problems and configurations worth trying on the arch's reference board, at random."""
    device, draw = resolve_device(f"sm_{arch}"), random.Random(f"{arch} {seed}")
    while count:
        features = draw.choice([{}, {"causal": True}, {"bias": "fp16"}, {"softcap": True, "window_left": 300}])
        if draw.random() < 0.3:
            features = {"page_size": draw.choice([16, 64]), "kv_lens": True}
        problem = AttentionProblem(
            B=2,
            H=8,
            Sq=draw.choice([1, 4, 1000, 1024]),
            Skv=1024,
            D=draw.choice([40, 64, 80, 128, 256]),
            Hkv=draw.choice([2, 8]),
            dtype=draw.choice(["fp16", "fp16", "bf16", "fp8e5m2"]),
            strided=draw.random() < 0.3,
            **features,
        )
        config = draw.choice(SPACE.configs(problem, device))
        count -= 1
        yield problem, config


def estimates_hold(arch, count, seed):
    exact = 0
    for reply in attention_on(arch, sampled(arch, count, seed)):
        assert "error" not in reply, (described(reply), reply.get("error"))
        real = reply["resources"]["shared_bytes"]
        assert reply["estimate"] <= real, described(reply)
        exact += reply["estimate"] >= 0.98 * real  # but for a few bytes: barriers, page numbers
    return exact / count


@pytest.mark.parametrize("arch", archs(80, 90))
def test_estimated_shared_memory_is_never_over_the_real(arch):
    assert estimates_hold(arch, 3, seed=0) > 0.5


@pytest.mark.parametrize("arch", archs(80, 90))
def test_a_bias_beside_paged_keys_is_copied_as_far_ahead_as_they_are(arch):
    paged = AttentionProblem(2, 4, 128, 512, 64, Hkv=2, bias="fp32", page_size=32, kv_lens=True)
    deep = AttentionConfig(128, 64, num_warps=4, num_stages=5)
    # fp8 terms of so low a tile are no 4 bytes a thread.
    low = replace(paged, Sq=16, bias="fp8e5m2"), AttentionConfig(16, 16, num_stages=3)
    # Keys that are not copied ahead take no stages for page numbers, and the bias is copied all the same.
    odd = replace(paged, D=33, Dv=33), replace(deep, BLOCK_M=64, BLOCK_N=32)
    unaligned = replace(paged, aligned=False), replace(deep, BLOCK_M=64, BLOCK_N=32)
    for reply in attention_on(arch, [(paged, deep), (paged, replace(deep, num_stages=3)), low, odd, unaligned]):
        assert "error" not in reply, (described(reply), reply.get("error"))
        assert 0.9 * reply["resources"]["shared_bytes"] <= reply["estimate"] <= reply["resources"]["shared_bytes"]
    (values,) = attention_on(arch, [(replace(paged, D=33, Dv=64), odd[1])])  # which are copied ahead alone
    assert values["estimate"] <= values["resources"]["shared_bytes"]


def test_a_bias_is_copied_ahead_but_under_overlap():
    problem = AttentionProblem(2, 8, 1000, 1024, 64, bias="fp16")
    tile = AttentionConfig(128, 64, num_warps=4, num_stages=3)
    ahead, loaded = attention_on(90, [(problem, tile), (problem, replace(tile, OVERLAP=True))])
    for reply in (ahead, loaded):
        assert reply["estimate"] <= reply["resources"]["shared_bytes"], described(reply)
    assert ahead["estimate"] - loaded["estimate"] == 2 * 128 * 64 * 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(1, 4))
@pytest.mark.parametrize("arch", ARCHS)
def test_estimated_shared_memory_is_never_over_the_real_in_a_larger_sample(arch, seed):
    assert estimates_hold(arch, 40, seed) > 0.5


# The default configuration

TERMS = {"softcap": True, "alibi": True, "sinks": True, "lse": True}
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "every term": {**TERMS, "bias": "fp32", "bias_heads": True, "causal": True, "window_left": 500},
    "bias, odd keys": {"bias": "fp16", "bias_batch": True, "bias_heads": True, "Skv": 4095},
    "any strides": {**TERMS, "bias": "fp16", "causal": True, "strided": True},
    "unaligned": {**TERMS, "bias": "fp16", "causal": True, "window_left": 500, "strided": True, "aligned": False},
    "paged": {**TERMS, "causal": True, "kv_lens": True, "page_size": 16},
    "paged, unaligned": {**TERMS, "kv_lens": True, "page_size": 16, "strided": True, "aligned": False},
    "varlen": {"varlen": True, "causal": True, "alibi": True, "lse": True},
    "varlen without slopes": {"varlen": True},
}
SHAPES = ((8, 8, 2048), (32, 8, 1), (32, 8, 5), (32, 8, 12), (8, 8, 2000))  # query heads, key heads, queries
DIMS = (64, 128, 256, 40, 72, 80, 88, 96, 112, 160, 192)
KINDS = ("fp16", "bf16", "fp32", "fp8e5m2", "fp8e4m3")


def defaults(arch, rows):
    """The problems of rows of the above that an arch has, each machine code once."""
    device, seen = resolve_device(f"sm_{arch}"), set()
    for features, (heads, kv_heads, queries), dim, kind in rows:
        fields = {"Skv": 4096, **FEATURES[features]}
        problem = AttentionProblem(4, heads, queries, D=dim, Hkv=kv_heads, dtype=kind, **fields)
        if ATTENTION.supported(problem, device) is None:
            config = ATTENTION.default(problem, device)
            code = tuple(launch.specialization for launch in ATTENTION.launches(problem, config))
            if code not in seen:
                seen.add(code)
                yield problem, None


@pytest.mark.parametrize("arch", archs(80, 86, smoke=(86,)))
def test_packed_prefill_of_paged_keys_does_not_spill(arch):
    packed = AttentionProblem(
        4, 32, 1024, 4096, 128, Hkv=8, dtype="bf16", varlen=True, page_size=16, kv_lens=True, causal=True
    )
    wide = AttentionProblem(1, 64, 4096, 192, 128, Hkv=8, varlen=True, page_size=64, kv_lens=True)
    cut = AttentionProblem(2, 8, 100, 4096, 72, Hkv=1, causal=True)
    masked = AttentionProblem(2, 8, 384, 4096, 80, causal=True, varlen=True)
    left = AttentionProblem(2, 8, 300, 4096, 72, varlen=True, window_left=100)
    counted = AttentionProblem(2, 8, 300, 4096, 80, kv_lens=True)
    tested = (packed, wide, cut, masked, left, counted)
    assert_clean(attention_on(arch, [(problem, None) for problem in tested]), scratch=False)


def test_masks_beside_two_blocks_of_a_head_do_not_spill_on_sm_120():
    problem = AttentionProblem(2, 8, 1000, 4096, 96, causal=True)
    assert_clean(attention_on(120, [(problem, None), (replace(problem, D=72, window_left=500), None)]), scratch=False)


@pytest.mark.parametrize("arch", archs(86, 120))
def test_masks_beside_rows_that_end_within_a_block_do_not_spill(arch):
    causal = AttentionProblem(2, 8, 4000, 4000, 128, causal=True)
    packed = AttentionProblem(2, 8, 866, 866, 112, Hkv=2, causal=True, varlen=True, strided=True, dtype="bf16")
    tested = (causal, packed, replace(causal, D=88), replace(causal, D=96, varlen=True), replace(packed, D=100))
    assert_clean(attention_on(arch, [(problem, None) for problem in tested]), scratch=False)


def test_packed_fp8_with_slopes_does_not_spill_on_sm_120():
    assert_clean(attention_on(120, defaults(120, [("varlen", SHAPES[0], 72, "fp8e4m3")])), scratch=False)


@pytest.mark.parametrize("arch", [pytest.param(86, marks=pytest.mark.slow), 90])
def test_the_default_compiles_without_spills(arch):
    rows = [
        ("every term", SHAPES[0], 128, "fp16"),
        ("bias, odd keys", (4, 4, 33), 64, "fp16"),
        ("bias, odd keys", SHAPES[1], 80, "fp8e4m3"),
        ("unaligned", SHAPES[0], 128, "bf16"),
        ("any strides", SHAPES[0], 80, "fp16"),
        ("paged", SHAPES[2], 256, "fp16"),
        ("paged, unaligned", SHAPES[1], 64, "fp8e5m2"),
        ("every term", SHAPES[3], 64, "fp32"),
        ("varlen", SHAPES[0], 256, "fp16"),
        ("varlen", SHAPES[0], 256, "fp8e5m2"),
    ]
    assert_clean(attention_on(arch, defaults(arch, rows)), scratch=False)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_default_compiles_without_spills_whatever_the_problem(arch):
    jobs = list(defaults(arch, itertools.product(FEATURES, SHAPES, DIMS, KINDS)))
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for replies in threads.map(lambda part: attention_on(arch, jobs[part::8]), range(8)):
            assert_clean(replies, scratch=False)

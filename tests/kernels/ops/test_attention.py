"""The fused attention in the interpreter, against float64 and ONNX Runtime: numbers, memory, every form of arrays."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.kernels.conformance import assert_close, pairwise
from tests.kernels.ops.attention_cases import SMALL, conforms, outs_for, run
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.epilogue import FLOATS
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.attention.api import attention
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.attention.reference import heads_of, reference, tolerance
from tilewright.kernels.ops.attention.space import SPACE, AttentionConfig
from tilewright.tuner.config_text import short_config

H200 = resolve_device("h200")


# Every dtype, form, mask, term, head dim and layout, in pairs

CONFIGS = (
    None,
    AttentionConfig(16, 16, num_warps=1),
    AttentionConfig(32, 16),
    AttentionConfig(64, 32, num_stages=1),
    AttentionConfig(16, 32, SPLIT_KV=2),
    AttentionConfig(32, 16, SPLIT_KV=4),
    AttentionConfig(16, 16, PACK=True),
    AttentionConfig(32, 32, SPLIT_KV=2, PACK=True),
    AttentionConfig(16, 16, OVERLAP=True),
    AttentionConfig(64, 16, GROUP_H=8, OVERLAP=True, TMA=True),
    AttentionConfig(32, 16, GROUP_H=4, SPLIT_KV=2, OVERLAP=True),
    AttentionConfig(16, 32, TMA=True),
)

AXES = {
    "dtype": FLOATS,
    "form": ("batch", "kv_lens", "varlen", "paged", "varlen paged"),
    "mask": ("none", "causal", "left", "right", "both", "causal left"),
    "heads": ((2, 2), (3, 1), (4, 2)),
    "Sq": (1, 2, 15, 16, 17, 33),
    "Skv": (1, 15, 16, 17, 40, 65),
    "dims": ((32, 32), (40, 40), (64, 32), (48, 80)),
    "terms": ((), ("softcap",), ("bias",), ("alibi",), ("sinks",), ("softcap", "bias", "alibi", "sinks")),
    "bias_kind": ("fp16", "bf16", "fp32"),
    "bias_dims": tuple(itertools.product((False, True), repeat=3)),
    "out_dtype": (None, *FLOATS),
    "memory": ("dense", "unaligned", "strided", "strided unaligned"),
    "lse": (False, True),
    "config": CONFIGS,
}
PAGE = 8


def problem_of(row):
    """The problem that a row of AXES describes."""
    form, terms = row["form"], set(row["terms"])
    heads, kv_heads = row["heads"]
    d, dv = row["dims"]
    if "varlen" in form:
        terms.discard("bias")
    fields = {}
    if "left" in row["mask"] or row["mask"] == "both":
        fields["window_left"] = 5
    if row["mask"] in ("right", "both"):
        fields["window_right"] = 3
    if "bias" in terms:
        names = ("bias_batch", "bias_heads", "bias_rows")
        fields |= {"bias": row["bias_kind"], **dict(zip(names, row["bias_dims"], strict=True))}
    return AttentionProblem(
        B=2 if form == "batch" else 3,
        H=heads,
        Sq=row["Sq"],
        Skv=-(-row["Skv"] // PAGE) * PAGE if "paged" in form else row["Skv"],
        D=d,
        Hkv=kv_heads,
        Dv=dv,
        dtype=row["dtype"],
        out_dtype=row["out_dtype"],
        causal="causal" in row["mask"],
        softcap="softcap" in terms,
        alibi="alibi" in terms,
        sinks="sinks" in terms,
        varlen="varlen" in form,
        page_size=PAGE if "paged" in form else 0,
        kv_lens="paged" in form or form == "kv_lens",
        lse=row["lse"],
        scales=row["dtype"] == "fp8e4m3",
        strided="strided" in row["memory"],
        aligned="unaligned" not in row["memory"],
        **fields,
    )


def fitting(problem, config):
    """A configuration without the choices that the problem has no place for."""
    config = replace(config, PACK=config.PACK and problem.kv_heads < problem.H)
    config = replace(config, OVERLAP=config.OVERLAP and not problem.page_size)
    # Rows of a bias with gaps between them may start anywhere, which makes all arrays unaligned.
    loose = problem.strided and problem.bias is not None
    return config if SPACE.fits(problem, config, H200) is None and not loose else replace(config, TMA=False)


def config_of(row):
    """A row's configuration, as far as it goes with the row's problem."""
    return None if row["config"] is None else fitting(problem_of(row), row["config"])


def described(row):
    config = config_of(row)
    tile = "default" if config is None else short_config(config.to_dict())
    return f"{problem_of(row)} on {tile}"


ROWS = list(pairwise(AXES))


@pytest.mark.parametrize("row", ROWS, ids=described)
def test_equals_the_reference(row):
    conforms(problem_of(row), config_of(row))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", FLOATS)
def test_equals_the_reference_with_all_terms(kind):
    terms = {"softcap": True, "alibi": True, "sinks": True, "lse": True, "causal": True}
    conforms(AttentionProblem(2, 4, 19, 35, 40, Hkv=2, dtype=kind, bias="fp32", bias_heads=True, **terms), SMALL)
    paged = AttentionProblem(3, 4, 2, 48, 40, Hkv=2, dtype=kind, varlen=True, page_size=16, kv_lens=True, **terms)
    conforms(paged, AttentionConfig(16, 16, SPLIT_KV=2, PACK=True))


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("dim", [16, 17, 24, 40, 64, 72, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_dim(dim, rows):
    problem = AttentionProblem(1, 2, 17, 33, dim, Hkv=1, causal=True, dtype="fp32")
    conforms(problem, AttentionConfig(rows, 16))
    conforms(replace(problem, Dv=None if dim == 16 else 272 - dim, D=dim, lse=True), AttentionConfig(rows, 32))


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("queries", [1, 15, 16, 17, 33])
def test_sizes_around_a_tile(queries, keys):
    problem = AttentionProblem(1, 1, queries, keys, 16, dtype="fp32", lse=True)
    conforms(problem, SMALL)
    conforms(replace(problem, causal=True), SMALL)


# Masks


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("right", [None, 0, 1, 20])
@pytest.mark.parametrize("left", [None, 0, 1, 20])
def test_windows(left, right, split):
    window = {"window_left": left, "window_right": right}
    for queries, keys in ((33, 70), (40, 20)):
        problem = AttentionProblem(1, 1, queries, keys, 16, dtype="fp32", lse=True, **window)
        conforms(problem, AttentionConfig(16, 16, SPLIT_KV=split))


def test_the_last_query_stands_at_the_last_key():
    # Each key's value is its number: with equal scores, the result is the mean of the keys seen.
    values = np.broadcast_to(np.arange(8, dtype=np.float32)[:, None], (8, 16)).reshape(1, 1, 8, 16).copy()
    q, k = np.zeros((1, 1, 3, 16), np.float32), np.zeros((1, 1, 8, 16), np.float32)
    np.testing.assert_allclose(attention(q, k, values, causal=True)[0, 0, :, 0], [2.5, 3.0, 3.5], rtol=1e-6)
    np.testing.assert_allclose(attention(q, k, values, window=(1, 0))[0, 0, :, 0], [4.5, 5.5, 6.5], rtol=1e-6)
    np.testing.assert_allclose(attention(q, k, values, window=(0, 1))[0, 0, :, 0], [5.5, 6.5, 7.0], rtol=1e-6)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("config", [SMALL, AttentionConfig(32, 32)], ids=["16", "32"])
def test_rows_without_a_key_are_zero_and_minus_infinity(config, split):
    # 40 queries at 20 keys: the first 20 see none.
    problem = AttentionProblem(2, 2, 40, 20, 16, dtype="fp32", causal=True, lse=True)
    outs = outs_for(problem)
    run(problem, problem.inputs(0), {name: out.array for name, out in outs.items()}, replace(config, SPLIT_KV=split))
    out, lse = outs["out"].array, outs["lse"].array
    assert (out[:, :, :20] == 0).all()
    assert (lse[:, :, :20] == -np.inf).all()
    assert np.isfinite(lse[:, :, 20:]).all()
    assert np.isfinite(out).all()


NO_SINK_OR = (None, 0.5, -np.inf, -3e38)
"""The last one times log2 e, as it is kept, is infinite."""


@pytest.mark.parametrize(
    "config", [SMALL, replace(SMALL, SPLIT_KV=2), replace(SMALL, TMA=True)], ids=["whole", "split", "descriptors"]
)
@pytest.mark.parametrize("sink", NO_SINK_OR)
@pytest.mark.parametrize("dim", [16, 40])
def test_a_row_that_sees_no_key_is_0_whatever_the_values_hold(config, dim, sink):
    sinks = sink is not None
    problem = AttentionProblem(1, 2, 40, 24, dim, dtype="fp32", causal=True, bias="fp32", lse=True, sinks=sinks)
    arrays = problem.inputs(0)
    if sinks:
        arrays["sinks"][:] = sink
    arrays["bias"][0, 0, 30] = -np.inf  # a row of its own, beside the 16 above the diagonal
    arrays["v"][...] = np.nan
    out, lse = run(problem, arrays, {}, config)
    unseen = np.zeros((2, 40), bool)
    unseen[:, :16] = unseen[:, 30] = True
    assert (out[0][unseen] == 0).all()
    wanted = -np.inf if sink is None or sink < -2.36e38 else sink
    np.testing.assert_allclose(lse[0], np.where(unseen, wanted, lse[0]), rtol=1e-6)
    assert np.isnan(out[0][~unseen]).all()


@pytest.mark.parametrize("sink", NO_SINK_OR)
def test_nor_is_one_of_persistent_blocks(sink):
    sinks = sink is not None
    problem = AttentionProblem(1, 2, 256, 192, 16, dtype="bf16", out_dtype="fp32", causal=True, sinks=sinks)
    arrays = problem.inputs(0)
    if sinks:
        arrays["sinks"][:] = sink
    arrays["v"][...] = np.nan
    out = run(problem, arrays, {}, AttentionConfig(128, 32, TMA=True, WARP_SPECIALIZE=True, PERSISTENT=True))
    out = out[0] if isinstance(out, tuple) else out
    assert (out[0, :, :64] == 0).all()
    assert np.isnan(out[0, :, 64:]).all()


@pytest.mark.parametrize("keys", [33, 65])
def test_a_key_that_weighs_as_much_as_the_sink_counts_in_every_split(keys):
    """The sink is in the first; a later one that sees one key of the same score has a sum of 1, too."""
    problem = AttentionProblem(1, 1, 1, keys, 16, dtype="fp32", sinks=True)
    arrays = problem.inputs(0)
    arrays["q"][...] = arrays["sinks"][...] = 0
    arrays["v"][...] = 1
    arrays["v"][0, 0, -1] = 1000
    out = run(problem, arrays, {}, AttentionConfig(16, 32, SPLIT_KV=2))
    np.testing.assert_allclose(out, (keys - 1 + 1000) / (keys + 1), rtol=1e-5)


def test_keys_that_are_little_beside_the_sink_count():
    problem = AttentionProblem(1, 1, 16, 1024, 16, dtype="fp32", sinks=True)
    arrays = problem.inputs(0)
    arrays["q"][...] = 0
    arrays["sinks"][...] = 22
    arrays["v"][...] = 100
    out = run(problem, arrays, {}, SMALL)
    np.testing.assert_allclose(out, 100 * 1024 * np.exp(-22), rtol=1e-4)


@pytest.mark.parametrize("split", [1, 2])
def test_keys_beyond_the_most_there_may_be_are_not_seen(split):
    """Whatever the configuration: the host divides the keys among splits by `max_seqlen_k`."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((rows, 1, 16)).astype(np.float32) for rows in (1, 200, 200))
    starts = {"cu_seqlens_q": np.array([0, 1], np.int32), "cu_seqlens_k": np.array([0, 200], np.int32)}
    config = AttentionConfig(16, 16, SPLIT_KV=split)
    seen = attention(q, k, v, **starts, max_seqlen_q=1, max_seqlen_k=64, config=config)
    all_of_them = {**starts, "cu_seqlens_k": np.array([0, 64], np.int32)}
    np.testing.assert_array_equal(
        seen, attention(q, k[:64], v[:64], **all_of_them, max_seqlen_q=1, max_seqlen_k=64, config=config)
    )


def test_a_bias_of_minus_infinity_masks_and_makes_no_nan():
    problem = AttentionProblem(1, 2, 18, 40, 16, dtype="fp32", bias="fp32", lse=True)
    arrays = problem.inputs(0)
    arrays["bias"][0, 0, 3] = -np.inf  # a row of its own
    arrays["bias"][0, 0, :, :32] = -np.inf  # the first two blocks, which no position masks
    out, lse = run(problem, arrays, {}, SMALL)
    expected = reference(problem, arrays)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -np.inf).all()
    for name, result in (("out", out), ("lse", lse)):
        assert_close(result, expected[name], tolerance(problem)[name])


def test_blocks_that_no_row_sees_are_never_read():
    problem = AttentionProblem(1, 1, 64, 64, 16, dtype="fp32", causal=True, window_left=20)
    arrays = problem.inputs(0)
    expected = reference(problem, arrays)["out"]

    def with_nan(keys):
        # A value that is read, even for a weight of 0, makes NaN of the result.
        values = arrays["v"].copy()
        values[0, 0, keys] = np.nan
        return run(problem, arrays | {"v": values}, {}, SMALL)

    # Queries 16 to 31 are one tile and see keys up to 31, queries 48 to 63 those from 28 on: blocks from 16 on.
    assert_close(with_nan(slice(32, None))[:, :, 16:32], expected[:, :, 16:32], tolerance(problem)["out"])
    assert_close(with_nan(slice(0, 16))[:, :, 48:], expected[:, :, 48:], tolerance(problem)["out"])


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # NumPy's word on the maximum of a row of NaN
def test_nan_stays_in_its_row_and_column():
    problem = AttentionProblem(1, 1, 20, 24, 16, dtype="fp32", lse=True)
    arrays = problem.inputs(0)
    arrays["q"][0, 0, 5, 3] = np.nan
    arrays["v"][0, 0, 9, 2] = np.nan
    out, lse = run(problem, arrays, {}, SMALL)
    wanted = np.zeros((20, 16), bool)
    wanted[5], wanted[:, 2] = True, True
    np.testing.assert_array_equal(np.isnan(out[0, 0]), wanted)
    np.testing.assert_array_equal(np.isnan(lse[0, 0]), np.arange(20) == 5)


# Terms


def test_a_sink_is_one_more_score_whose_value_is_zero():
    problem = AttentionProblem(2, 4, 17, 31, 16, Hkv=2, dtype="fp32", sinks=True, lse=True)
    arrays = problem.inputs(0)
    sinks = arrays.pop("sinks")
    for config in (SMALL, AttentionConfig(16, 16, SPLIT_KV=2)):
        out, lse = run(problem, arrays, {}, config, sinks=sinks)
        extended = {name: np.concatenate([arrays[name], np.zeros((2, 2, 1, 16), np.float32)], axis=2) for name in "kv"}
        bias = np.zeros((1, 4, 1, 32), np.float32)
        bias[0, :, 0, 31] = sinks
        wanted, wanted_lse = attention(arrays["q"], **extended, bias=bias, return_lse=True)
        np.testing.assert_allclose(out, wanted, atol=2e-6)
        np.testing.assert_allclose(lse, wanted_lse, atol=2e-6)


def test_a_sink_alone_is_the_log_sum_exp():
    q, k = np.ones((1, 2, 3, 16), np.float32), np.ones((1, 2, 1, 16), np.float32)
    sinks = np.array([0.5, -np.inf], np.float32)
    out, lse = attention(q, k, k, sinks=sinks, causal=True, return_lse=True)
    np.testing.assert_allclose(lse[0, :, :2], [[0.5, 0.5], [-np.inf, -np.inf]], rtol=1e-6)
    assert (out[0, :, :2] == 0).all()
    np.testing.assert_allclose(lse[0, 1, 2], 4.0, rtol=1e-6)


@pytest.mark.parametrize("value", [0.5, 30.0, 1000.0])
def test_softcap_and_scale_are_the_callers(value):
    problem = AttentionProblem(1, 1, 17, 24, 16, dtype="fp32", softcap=True)
    arrays = problem.inputs(0)
    for scale in (None, 0.01, 2.5):
        out = attention(**arrays, softcap=value, scale=scale, config=SMALL)
        assert_close(
            out, reference(problem, arrays, scale=scale, softcap=value)["out"], Tolerance(1e-5, 2e-5 + 2e-7 * value)
        )


def test_scores_too_large_to_exponentiate():
    # exp(1000) is infinite: the highest score has to be taken off first. The soft cap's tanh is 1 there.
    q = np.full((1, 1, 2, 16), 60, np.float32)
    k = np.concatenate([np.full((1, 1, 1, 16), 40, np.float32), np.full((1, 1, 1, 16), -40, np.float32)], axis=2)
    v = np.array([3.0, 5.0], np.float32).reshape(1, 1, 2, 1) * np.ones((1, 1, 1, 16), np.float32)
    out, lse = attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(out, 3.0)
    np.testing.assert_allclose(lse, 9600.0)
    _, capped = attention(q, k, v, softcap=30.0, return_lse=True)
    np.testing.assert_allclose(capped, 30.0, rtol=1e-6)


def test_factors_of_fp8_arrays_may_be_numbers_or_arrays():
    problem = AttentionProblem(1, 2, 17, 24, 32, dtype="fp8e4m3", scales=True, out_dtype="fp32")
    arrays = problem.inputs(0)
    expected = run(problem, arrays, {})
    numbers = arrays | {name: float(arrays[name][0]) for name in ("q_scale", "k_scale", "v_scale")}
    np.testing.assert_array_equal(run(problem, numbers, {}), expected)
    # One alone: the others are 1.
    alone = {name: arrays[name] for name in ("q", "k", "v")}
    halved = attention(**alone, v_scale=0.5, out_dtype="fp32")
    np.testing.assert_array_equal(halved, 0.5 * attention(**alone, out_dtype="fp32"))


# Forms


def test_varlen_is_each_sequence_by_itself():
    problem = AttentionProblem(4, 2, 21, 37, 16, dtype="fp32", causal=True, varlen=True, lse=True)
    arrays = problem.inputs(3)
    out, lse = run(problem, arrays, {}, SMALL)
    queries, keys = problem.lengths()
    assert queries.min() == keys.min() == 0
    starts, key_starts = arrays["cu_seqlens_q"], arrays["cu_seqlens_k"]
    for b in range(4):
        if queries[b] and keys[b]:
            q = arrays["q"][starts[b] : starts[b + 1]].swapaxes(0, 1)[None]
            k, v = (arrays[name][key_starts[b] : key_starts[b + 1]].swapaxes(0, 1)[None] for name in "kv")
            alone, alone_lse = attention(q, k, v, causal=True, return_lse=True, config=SMALL)
            np.testing.assert_array_equal(out[starts[b] : starts[b + 1]], alone[0].swapaxes(0, 1))
            np.testing.assert_array_equal(lse[starts[b] : starts[b + 1]], alone_lse[0].swapaxes(0, 1))


@pytest.mark.parametrize("page_size", [1, 4, 16, 24, 64])
@pytest.mark.parametrize("block", [16, 32])
def test_pages_in_any_order_are_the_same_keys(page_size, block):
    problem = AttentionProblem(
        3, 2, 5, 2 * 192 // 3, 16, dtype="fp32", page_size=page_size if 128 % page_size == 0 else 32, kv_lens=True
    )
    if page_size == 24:
        problem = replace(problem, Skv=120, page_size=24)
    arrays = problem.inputs(0)
    table = arrays["block_table"]
    assert (np.diff(table[table != np.iinfo(np.int32).max]) != 1).any()
    config = AttentionConfig(16, block)
    out = run(problem, arrays, {}, config)
    dense = np.zeros((3, 2, problem.Skv, 16), np.float32)
    keys, values = dense, dense.copy()
    for head in heads_of(problem, arrays):
        keys[head.sequence, head.head, : len(head.k)] = head.k
        values[head.sequence, head.head, : len(head.v)] = head.v
    same = attention(arrays["q"], keys, values, kv_lens=arrays["kv_lens"], config=config)
    np.testing.assert_array_equal(out, same)


def test_lengths_beyond_the_cache_or_below_zero_are_cut():
    problem = AttentionProblem(2, 1, 3, 24, 16, dtype="fp32", kv_lens=True)
    arrays = problem.inputs(0)
    dense = {name: np.nan_to_num(arrays[name]) for name in "qkv"}
    cut = attention(**dense, kv_lens=np.array([100, -5], np.int32))
    np.testing.assert_array_equal(cut, attention(**dense, kv_lens=np.array([24, 0], np.int32)))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("split", [2, 4, 8])
def test_splits_change_nothing_and_repeat_to_the_bit(split, pack):
    problem = AttentionProblem(
        3, 4, 2, 100, 40, Hkv=2, dtype="fp32", causal=True, kv_lens=True, sinks=True, alibi=True, lse=True
    )
    arrays = problem.inputs(1)
    whole = run(problem, arrays, {}, SMALL)
    config = AttentionConfig(16, 16, SPLIT_KV=split, PACK=pack)
    once, again = run(problem, arrays, {}, config), run(problem, arrays, {}, config)
    for one, same, other in zip(once, again, whole, strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), same.view(np.uint32))
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_a_sequence_is_split_in_the_same_places_whatever_the_others_are():
    # Batch invariance: where a split ends depends on the longest length the host knows, never on the device's.
    problem = AttentionProblem(3, 2, 1, 96, 16, dtype="fp32", kv_lens=True)
    arrays = problem.inputs(0)
    config = AttentionConfig(16, 16, SPLIT_KV=4)
    dense = {name: np.nan_to_num(arrays[name]) for name in "qkv"}
    first = attention(**dense, kv_lens=np.array([50, 96, 3], np.int32), config=config)[0]
    second = attention(**dense, kv_lens=np.array([50, 1, 60], np.int32), config=config)[0]
    np.testing.assert_array_equal(first, second)


def test_a_maximum_that_is_too_large_changes_nothing():
    problem = AttentionProblem(3, 2, 9, 20, 16, dtype="fp32", varlen=True, causal=True)
    arrays = problem.inputs(0)
    exact = run(problem, arrays, {}, SMALL)
    larger = attention(**arrays, causal=True, max_seqlen_q=40, max_seqlen_k=64, config=SMALL)
    np.testing.assert_array_equal(larger, exact)


# Independent oracles


def by_onnx(q, k, v, mask=None, **attributes):
    """ONNX's Attention, opset 23, by ONNX Runtime on the CPU."""
    arrays = {"Q": q, "K": k, "V": v} | ({} if mask is None else {"M": mask})
    kind = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Attention", [*arrays], ["Y"], **attributes)
    inputs = [onnx.helper.make_tensor_value_info(name, kind, array.shape) for name, array in arrays.items()]
    graph = onnx.helper.make_graph([node], "g", inputs, [onnx.helper.make_tensor_value_info("Y", kind, None)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"causal": True}, {"is_causal": 1}),
        ({"scale": 0.4}, {"scale": 0.4}),
        ({"softcap": 2.0}, {"softcap": 2.0}),
        ({"softcap": 2.0, "bias": True}, {"softcap": 2.0}),
        ({"bias": True, "causal": True}, {"is_causal": 1}),
    ],
    ids=str,
)
def test_equals_onnx_runtime(heads, ours, theirs):
    random = np.random.default_rng(0)
    q = random.standard_normal((2, heads[0], 33, 24)).astype(np.float32)
    k = random.standard_normal((2, heads[1], 33, 24)).astype(np.float32)
    v = random.standard_normal((2, heads[1], 33, 40)).astype(np.float32)
    options = dict(ours)
    mask = None
    if options.pop("bias", False):
        mask = random.standard_normal((2, heads[0], 33, 33)).astype(np.float32)
        mask[:, :, :, 5] = -np.inf
        mask[:, :, 0, 0] = 0
        options["bias"] = mask
    np.testing.assert_allclose(attention(q, k, v, **options), by_onnx(q, k, v, mask, **theirs), atol=3e-6)


def test_the_reference_equals_onnx_runtime_on_cross_attention():
    problem = AttentionProblem(2, 4, 9, 21, 16, Hkv=2, dtype="fp32", bias="fp32", bias_batch=True, bias_heads=True)
    arrays = problem.inputs(0)
    theirs = by_onnx(arrays["q"], arrays["k"], arrays["v"], arrays["bias"])
    np.testing.assert_allclose(reference(problem, arrays)["out"], theirs, atol=2e-6)


# Anything


@st.composite
def problems(draw):
    """Small problems of every form, with any configuration."""
    form = draw(st.sampled_from(["batch", "kv_lens", "varlen", "paged", "varlen paged"]))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    page = draw(st.sampled_from([1, 4, 16, 32])) if "paged" in form else 0
    keys = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(FLOATS))
    dims = st.integers(32 if kind.startswith("fp8") else 16, 48)
    window = st.sampled_from([None, 0, 1, 7, 20])
    problem = AttentionProblem(
        B=draw(st.integers(1, 3)),
        H=kv_heads * group,
        Sq=draw(st.integers(1, 36)),
        Skv=-(-keys // page) * page if page else keys,
        D=draw(dims),
        Hkv=kv_heads,
        Dv=draw(dims),
        dtype=kind,
        out_dtype=draw(st.sampled_from([None, *FLOATS])),
        causal=draw(st.booleans()),
        window_left=draw(window),
        window_right=draw(window),
        softcap=draw(st.booleans()),
        bias=None if "varlen" in form else draw(st.sampled_from([None, "fp16", "bf16", "fp32"])),
        bias_batch=draw(st.booleans()),
        bias_heads=draw(st.booleans()),
        bias_rows=draw(st.booleans()),
        alibi=draw(st.booleans()),
        sinks=draw(st.booleans()),
        varlen="varlen" in form,
        page_size=page,
        kv_lens="paged" in form or form == "kv_lens",
        lse=draw(st.booleans()),
        scales=kind.startswith("fp8") and draw(st.booleans()),
        strided=draw(st.booleans()),
        aligned=draw(st.booleans()),
    )
    config = AttentionConfig(
        draw(st.sampled_from([16, 32, 64])),
        draw(st.sampled_from([16, 32, 64])),
        SPLIT_KV=draw(st.sampled_from([1, 1, 2, 4, 8])),
        PACK=draw(st.booleans()),
        GROUP_H=draw(st.sampled_from([1, 2, 8])),
        OVERLAP=draw(st.booleans()),
        TMA=draw(st.booleans()),
    )
    return problem, fitting(problem, config)


fuzz = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(fuzz, max_examples=30)
@given(problems(), st.integers(0, 2**32 - 1))
def test_any_small_problem_with_any_configuration(case, seed):
    conforms(*case, seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(fuzz, max_examples=1000)
@given(problems(), st.integers(0, 2**32 - 1))
def test_many_small_problems_with_any_configuration(case, seed):
    conforms(*case, seed=seed)


@settings(fuzz, max_examples=60)
@given(problems())
def test_a_part_is_a_part_of_the_whole(case):
    problem, _ = case
    assume(problem.outputs()["out"].shape[0])
    arrays = problem.inputs(0)
    whole = reference(problem, arrays)
    part, chosen, index = problem.part(arrays, np.random.default_rng(0))
    for name, values in reference(part, chosen).items():
        np.testing.assert_allclose(values, whole[name][np.ix_(*index[name])], rtol=1e-12, atol=1e-12)

"""Every way to call the fused attention, and to misuse it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.ops.attention_cases import SMALL, outs_for, run
from tilewright.kernels import resolve_device
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.lookup import check_supported
from tilewright.kernels.ops.attention.api import attention
from tilewright.kernels.ops.attention.launch import ATTENTION
from tilewright.kernels.ops.attention.problem import AttentionProblem, strides
from tilewright.kernels.ops.attention.reference import tolerance
from tilewright.kernels.ops.attention.space import AttentionConfig
from tilewright.tuning_db.errors import (
    IllegalConfigError,
    ProblemError,
    UnsupportedError,
    UnsupportedProblemError,
    UsageError,
)

FORMS = {
    "batch": {"causal": True, "window_left": 7},
    "window": {"window_left": 3, "window_right": 4},
    "bias": {"bias": "fp16", "bias_heads": True},
    "bias of one row": {"bias": "fp32", "bias_batch": True, "bias_rows": False},
    "terms": {"alibi": True, "sinks": True, "softcap": True},
    "lengths": {"kv_lens": True},
    "paged": {"page_size": 8, "kv_lens": True},
    "varlen": {"varlen": True},
    "paged varlen": {"varlen": True, "page_size": 8, "kv_lens": True, "causal": True},
    "fp8": {"dtype": "fp8e5m2", "scales": True},
    "values of another head dim": {"Dv": 16, "out_dtype": "fp32"},
}


@pytest.mark.parametrize("memory", ["dense", "strided", "unaligned", "strided unaligned"])
@pytest.mark.parametrize("form", FORMS)
def test_arrays_of_a_problem_are_recognised_as_that_problem(form, memory, problems):
    problem = AttentionProblem(
        B=3,
        H=4,
        Sq=10,
        Skv=24,
        D=40,
        Hkv=2,
        lse=True,
        strided="strided" in memory,
        aligned="unaligned" not in memory,
        **FORMS[form],
    )
    run(problem, problem.inputs(0), {name: out.array for name, out in outs_for(problem).items()})
    assert problems == [problem]


def test_what_masks_nothing_is_left_out_of_the_problem():
    same = AttentionProblem(1, 1, 4, 9, 16)
    assert AttentionProblem(1, 1, 4, 9, 16, window_left=8, window_right=3) == same
    assert AttentionProblem(1, 1, 4, 9, 16, window_left=7) != same
    assert AttentionProblem(1, 1, 4, 9, 16, window_right=2) != same
    assert AttentionProblem(1, 1, 4, 9, 16, window_right=0) == AttentionProblem(1, 1, 4, 9, 16, causal=True)
    assert AttentionProblem(1, 1, 4, 9, 16, causal=True, window_right=2) == AttentionProblem(
        1, 1, 4, 9, 16, causal=True
    )
    one = AttentionProblem(1, 1, 1, 9, 16)
    assert AttentionProblem(1, 1, 1, 9, 16, causal=True) == one
    several = AttentionProblem(1, 1, 1, 9, 16, varlen=True)  # a sequence may have more queries than are computed
    assert AttentionProblem(1, 1, 1, 9, 16, varlen=True, causal=True) != several
    assert AttentionProblem(1, 1, 1, 9, 16, varlen=True, window_right=2) != several
    assert AttentionProblem(1, 1, 1, 9, 16, varlen=True, window_right=2**30) == several
    assert AttentionProblem(1, 1, 1, 9, 16, varlen=True, window_right=2**30 - 1) != several
    assert AttentionProblem(1, 1, 1, 9, 16, window_right=0, bias_batch=True, bias_rows=False) == one


# Arrays


def random(*shape, kind="fp32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(DTYPES[kind].numpy)


def test_slices_of_one_projection_need_no_copy():
    # (batch, tokens, 3, heads, head dim), as one linear layer leaves q, k and v.
    wide = random(2, 20, 3, 2, 32)
    q, k, v = (wide[:, :, index].swapaxes(1, 2) for index in range(3))
    expected = attention(*(np.ascontiguousarray(x) for x in (q, k, v)), causal=True)
    np.testing.assert_array_equal(attention(q, k, v, causal=True), expected)
    # The result where the next layer wants it: (batch, tokens, heads, head dim).
    out = np.empty((2, 20, 2, 32), np.float32)
    result = attention(q, k, v, causal=True, out=out.swapaxes(1, 2))
    assert np.shares_memory(result, out)
    np.testing.assert_array_equal(out.swapaxes(1, 2), expected)


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (None, 2)}, {"window": (3, 1)}], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("computed", [1, 2, 5])
def test_of_a_longer_sequence_the_first_queries_are_computed(computed, splits, mask):
    starts, tokens, keys = np.array([0, 6, 9], np.int32), random(9, 2, 32), random(18, 2, 32, seed=1)
    ends = np.array([0, 9, 18], np.int32)
    call = {"q": tokens, "k": keys, "v": keys, "cu_seqlens_q": starts, "cu_seqlens_k": ends, "max_seqlen_k": 9, **mask}
    expected, expected_lse = attention(max_seqlen_q=6, return_lse=True, **call)
    out, lse = np.full((9, 2, 32), np.nan, np.float32), np.full((9, 2), np.nan, np.float32)
    config = AttentionConfig(16, 16, SPLIT_KV=splits)
    attention(max_seqlen_q=computed, return_lse=True, out=out, lse=lse, config=config, **call)
    for begin, end in ((0, 6), (6, 9)):
        last = min(begin + computed, end)
        np.testing.assert_allclose(out[begin:last], expected[begin:last], atol=1e-5)
        np.testing.assert_allclose(lse[begin:last], expected_lse[begin:last], atol=1e-5)
        assert np.isnan(out[last:end]).all()
        assert np.isnan(lse[last:end]).all()


@pytest.mark.parametrize("splits", [2, 4])
@pytest.mark.parametrize("right", [None, 7])
def test_their_splits_cover_all_keys_that_they_see(splits, right):
    """Without a limit to the right those are more than `max_seqlen_q` and the window."""
    q, k, v = random(200, 1, 16), random(256, 1, 16, seed=1), random(256, 1, 16, seed=2)
    call = {"cu_seqlens_q": np.array([0, 200], np.int32), "cu_seqlens_k": np.array([0, 256], np.int32)}
    call |= {"max_seqlen_k": 256, "window": (20, right), "return_lse": True}
    expected, expected_lse = attention(q, k, v, max_seqlen_q=200, config=AttentionConfig(16, 16), **call)
    out, lse = attention(q, k, v, max_seqlen_q=4, config=AttentionConfig(16, 16, SPLIT_KV=splits), **call)
    np.testing.assert_allclose(out[:4], expected[:4], atol=1e-5)
    np.testing.assert_allclose(lse[:4], expected_lse[:4], atol=1e-5)


@pytest.mark.parametrize("right", [2**30, 2**31 - 1, 2**31, 2**40])
def test_a_window_of_more_keys_than_there_can_be_is_none(right):
    q, k = random(7, 2, 32), random(9, 2, 32, seed=1)
    call = {"cu_seqlens_q": np.array([0, 3, 7], np.int32), "cu_seqlens_k": np.array([0, 4, 9], np.int32)}
    call |= {"max_seqlen_q": 4, "max_seqlen_k": 5}
    for left in (None, 1):
        wanted = attention(q, k, k, window=(left, None), **call)
        np.testing.assert_array_equal(attention(q, k, k, window=(left, right), **call), wanted)


def test_keys_of_one_sequence_may_serve_a_batch():
    q, k = random(3, 2, 5, 16), random(1, 2, 9, 16, seed=1)
    shared = np.broadcast_to(k, (3, 2, 9, 16))
    np.testing.assert_array_equal(attention(q, shared, shared), attention(q, shared.copy(), shared.copy()))


def test_part_of_a_wider_bias_and_of_a_wider_table():
    q, k = random(1, 2, 5, 16), random(1, 2, 9, 16, seed=1)
    bias = random(1, 2, 5, 16, seed=2)[..., 3:12]
    # Unaligned, it may be run in other tiles.
    np.testing.assert_allclose(attention(q, k, k, bias=bias), attention(q, k, k, bias=bias.copy()), atol=2e-6)
    blocks, lens = random(4, 4, 2, 16), np.array([7], np.int32)
    table = np.array([[2, 0, 99, 99]], np.int32)
    expected = attention(q, blocks, blocks, block_table=table[:, :2].copy(), kv_lens=lens)
    np.testing.assert_array_equal(attention(q, blocks, blocks, block_table=table[:, :2], kv_lens=lens), expected)


def test_result_dtypes():
    for kind, wanted in (("fp16", "fp16"), ("bf16", "bf16"), ("fp32", "fp32"), ("fp8e5m2", "bf16")):
        x = random(1, 1, 4, 32, kind=kind)
        assert attention(x, x, x).dtype == DTYPES[wanted].numpy
        out, lse = attention(x, x, x, out_dtype="fp32", return_lse=True)
        assert (out.dtype, lse.dtype, lse.shape) == (np.float32, np.float32, (1, 1, 4))


def test_an_array_for_the_log_sum_exp_asks_for_it():
    x = random(1, 2, 4, 16)
    lse = np.empty((1, 2, 4), np.float32)
    out, same = attention(x, x, x, lse=lse)
    assert same is lse
    wanted, wanted_lse = attention(x, x, x, return_lse=True)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(lse, wanted_lse)


def test_results_may_not_share_memory_with_what_is_read_or_each_other():
    x = random(3, 1, 2, 4, 16)
    with pytest.raises(ProblemError, match=r"^out may not share memory with k$"):
        attention(x[0], x[1], x[2], out=x[1])
    both = np.empty(1 * 2 * 4 * 16, np.float32)
    with pytest.raises(ProblemError, match=r"^lse may not share memory with out$"):
        attention(x[0], x[1], x[2], out=both.reshape(1, 2, 4, 16), lse=both[:8].reshape(1, 2, 4))


def test_constants_that_are_the_default_share_a_plan(problems):
    x = random(1, 1, 4, 16)
    results = [attention(x, x, x, scale=scale) for scale in (None, 0.25, 1)]
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.array_equal(results[0], results[2])
    assert len(set(problems)) == 1


# Misuse: one line, with the values

Q, K = np.ones((2, 4, 6, 32), np.float16), np.ones((2, 2, 9, 32), np.float16)
TOKENS, STARTS = np.ones((9, 4, 32), np.float16), np.array([0, 4, 9], np.int32)
TABLE, LENS = np.zeros((2, 3), np.int32), np.array([1, 2], np.int32)
VARLEN = {"q": TOKENS, "k": TOKENS, "v": TOKENS, "cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS}
LONGEST = {"max_seqlen_q": 5, "max_seqlen_k": 5}
F = np.float32


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ProblemError, "q is (4, 6, 32) and must be (batch, heads, queries, head dim)", {"q": Q[0]}),
        (ProblemError, "q is (2, 4, 0, 32): no dimension may be 0", {"q": Q[:, :, :0]}),
        (ProblemError, "k is (2, 9, 32) and v is (2, 2, 9, 32): both must be (batch, heads, keys,", {"k": K[0]}),
        (ProblemError, "k is (2, 2, 9, 32) and v is (2, 2, 8, 32): all but the head dim", {"v": K[:, :, :8]}),
        (ProblemError, "k is (2, 2, 9, 16) and q has head dim 32", {"k": K[..., :16], "v": K[..., :16]}),
        (ProblemError, "q has 2 sequences and k is (1, 2, 9, 32)", {"k": K[:1], "v": K[:1]}),
        (ProblemError, "k is (2, 2, 0, 32) and v is (2, 2, 0, 32): no", {"k": K[:, :, :0], "v": K[:, :, :0]}),
        (ProblemError, "H=3 query heads must be a multiple of Hkv=2", {"q": Q[:, :3]}),
        (UnsupportedProblemError, "D=8 must be from 16 to 256", {"q": Q[..., :8], "k": K[..., :8], "v": K[..., :8]}),
        (UnsupportedProblemError, "q is fp16, k is fp32, v is fp16: they must have one dtype", {"k": K.astype(F)}),
        (
            UnsupportedProblemError,
            "dtype='int8': attention takes",
            {name: np.ones((1, 1, 4, 32), np.int8) for name in "qkv"},
        ),
        (UnsupportedProblemError, "q is float64 and must be fp16", {"q": Q.astype(float)}),
        (UnsupportedProblemError, "out_dtype='int8': attention takes", {"out_dtype": "int8"}),
        (ProblemError, "unknown out_dtype='half': attention takes fp16, bf16", {"out_dtype": "half"}),
        (ProblemError, "out is (2, 4, 6, 16) and must be (2, 4, 6, 32)", {"out": np.ones((2, 4, 6, 16), np.float16)}),
        (ProblemError, "out is fp16 and out_dtype='fp32'", {"out": np.ones_like(Q), "out_dtype": "fp32"}),
        (ProblemError, "lse is (2, 4, 7) and must be (2, 4, 6)", {"lse": np.ones((2, 4, 7), F)}),
        (ProblemError, "lse is fp16 and must be fp32", {"lse": np.ones((2, 4, 6), np.float16)}),
        (UnsupportedError, "lse must be contiguous", {"lse": np.ones((2, 4, 12), F)[..., ::2]}),
        (UnsupportedError, "out has strides (0, 192, 32, 1) for shape (2, 4, 6, 32): it overlaps itself",
         {"out": np.broadcast_to(np.ones((1, 4, 6, 32), np.float16), (2, 4, 6, 32))}),
        (UnsupportedError, "its last dimension must be contiguous", {"q": np.ones((2, 4, 6, 64), "f2")[..., ::2]}),
        (UnsupportedError, "k has negative strides", {"k": K[:, :, ::-1]}),
        (ProblemError, "bias is (6, 9) and must be (2 or 1, 4 or 1, 6 or 1, 9)", {"bias": np.ones((6, 9), F)}),
        (ProblemError, "bias is (1, 2, 6, 9) and must be", {"bias": np.ones((1, 2, 6, 9), F)}),
        (ProblemError, "bias is (1, 4, 6, 1) and must be", {"bias": np.ones((1, 4, 6, 1), F)}),
        (ProblemError, "alibi_slopes is (2,) and must be (4,)", {"alibi_slopes": np.ones(2, F)}),
        (UnsupportedProblemError, "alibi_slopes is fp16 and must be fp32", {"alibi_slopes": np.ones(4, np.float16)}),
        (ProblemError, "sinks is (2, 4) and must be (4,)", {"sinks": np.ones((2, 4), F)}),
        (UnsupportedError, "sinks must be contiguous", {"sinks": np.ones(8, F)[::2]}),
        (ProblemError, "kv_lens is (3,) and must be (2,)", {"kv_lens": np.ones(3, np.int32)}),
        (ProblemError, "kv_lens is fp32 and must be int32", {"kv_lens": np.ones(2, F)}),
        (UnsupportedProblemError, "kv_lens is int64 and must be int32", {"kv_lens": np.ones(2, np.int64)}),
        (ProblemError, "scales are for fp8, not dtype='fp16'", {"q_scale": 2.0}),
        (ProblemError, "cu_seqlens_k and max_seqlen_q go with cu_seqlens_q", {"max_seqlen_q": 4}),
        (ProblemError, "max_seqlen_k goes with cu_seqlens_k", {"max_seqlen_k": 4}),
        (ProblemError, "max_seqlen_q must be given: the most queries of a sequence", VARLEN),
        (ProblemError, "max_seqlen_k must be given: the most keys", VARLEN | {"max_seqlen_q": 5}),
        (ProblemError, "q is (2, 4, 6, 32) and must be (tokens, heads, head dim)", VARLEN | LONGEST | {"q": Q}),
        (ProblemError, "cu_seqlens_q needs cu_seqlens_k, or block_table", VARLEN | LONGEST | {"cu_seqlens_k": None}),
        (ProblemError, "cu_seqlens_k is (2,) and must be (3,)", VARLEN | LONGEST | {"cu_seqlens_k": STARTS[:2]}),
        (ProblemError, "cu_seqlens_q is (1,) and must be (sequences + 1,)", VARLEN | {"cu_seqlens_q": STARTS[:1]}),
        (
            UnsupportedProblemError,
            "kv_lens goes with block_table or with keys of one batch",
            VARLEN | LONGEST | {"kv_lens": LENS},
        ),
        (
            UnsupportedProblemError,
            "a bias needs sequences of one length",
            VARLEN | LONGEST | {"bias": np.ones((1, 1, 5, 5), F)},
        ),
        (ProblemError, "block_table needs kv_lens", {"block_table": TABLE}),
        (ProblemError, "block_table is (3,) and must be (2, most blocks", {"block_table": TABLE[0], "kv_lens": LENS}),
        (ProblemError, "k is (9, 2, 32) and v is (9, 2, 32): both must be (blocks, block size",
         {"block_table": TABLE, "kv_lens": LENS, "k": K[:, 0].reshape(9, 2, 32), "v": K[:, 0].reshape(9, 2, 32)}),
        (ProblemError, "paged keys are counted by kv_lens", {"block_table": TABLE, "kv_lens": LENS, "max_seqlen_k": 9}),
        (UsageError, "window=5 must be (left, right)", {"window": 5}),
        (UsageError, "window=-1 must be at least 0, or None", {"window": (-1, 0)}),
        (UsageError, "window=1.5 must be an integer", {"window": (1.5, 0)}),
        (UsageError, "window=array([1]) must be an integer", {"window": (np.array([1]), None)}),
        (UsageError, "max_seqlen_q=array([3]) must be an integer", VARLEN | {"max_seqlen_q": np.array([3])}),
        (UsageError, "max_seqlen_k=array(3) must be an integer", VARLEN | {"max_seqlen_k": np.array(3)}),
        (UsageError, "scale=0 must be a number above 0", {"scale": 0}),
        (UsageError, "scale='2' must be a number above 0", {"scale": "2"}),
        (UsageError, "softcap=-1.0 must be a number above 0", {"softcap": -1.0}),
        (UsageError, "must be a number above 0, of fp32", {"scale": 10**400}),
        (UsageError, "scale=True must be a number above 0, of fp32", {"scale": True}),
        (UsageError, "scale=1e-42 must be a number above 0, of fp32, from 1.18e-38 to 2.36e+38", {"scale": 1e-42}),
        (UsageError, "softcap=3e+38 must be a number above 0, of fp32, from 1.18e-38", {"softcap": 3e38}),
        (UsageError, "softcap=nan must be a number above 0", {"softcap": float("nan")}),
        (UsageError, "max_seqlen_q=0 must be at least 1", VARLEN | {"max_seqlen_q": 0}),
        (UsageError, "config must be an AttentionConfig, not {'BLOCK_M': 16}", {"config": {"BLOCK_M": 16}}),
        (UsageError, "out_dtype=['fp16'] must be a name, as 'fp16'", {"out_dtype": ["fp16"]}),
        (IllegalConfigError, "BLOCK_M=24 must be a power of two", {"config": AttentionConfig(24, 16)}),
        (IllegalConfigError, "SPLIT_KV=3 must be a power of two", {"config": AttentionConfig(16, 16, SPLIT_KV=3)}),
        (IllegalConfigError, "PACK=1 must be true or false", {"config": AttentionConfig(16, 16, PACK=1)}),
        (IllegalConfigError, "the smallest tile of two dots is 16×16", {"config": AttentionConfig(16, 8)}),
        (IllegalConfigError, "PACK=True needs query heads that share key heads",
         {"q": Q[:, :2], "config": AttentionConfig(16, 16, PACK=True)}),
        (IllegalConfigError, "B of shared memory are over", {"config": AttentionConfig(128, 256, num_stages=9)}),
        (IllegalConfigError, "512 registers a thread for", {"config": AttentionConfig(512, 16, num_warps=1)}),
        (UnsupportedError, "a list is no array", {"k": [[1.0]]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_misuse_is_one_line_with_the_values(error, message, call):
    with pytest.raises(error) as raised:
        attention(**({"q": Q, "k": K, "v": K} | call))
    assert type(raised.value) is error
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"B": 0}, "B=0 must be from 1 to 1073741823"),
        ({"Hkv": 0}, "H=2 query heads must be a multiple of Hkv=0"),
        ({"dtype": "fp64"}, "unknown dtype='fp64': attention takes fp16"),
        ({"D": 16, "dtype": "fp8e5m2"}, "D=16 must be from 32 to 256 for fp8e5m2"),
        ({"Dv": 257}, "Dv=257 must be from 16 to 256"),
        ({"window_left": -1}, "window_left=-1 must be at least 0, or None for no limit"),
        ({"page_size": 6, "kv_lens": True}, "Skv=8 must be a multiple of page_size=6"),
        ({"page_size": 4}, "page_size needs kv_lens"),
        ({"varlen": True, "kv_lens": True}, "varlen has its own lengths of keys"),
        ({"varlen": True, "bias": "fp16"}, "a bias needs sequences of one length"),
        ({"bias": "int8"}, "bias='int8': attention takes"),
    ],
    ids=str,
)
def test_problems_that_can_not_be(fields, message):
    with pytest.raises(ProblemError) as raised:
        AttentionProblem(**({"B": 1, "H": 2, "Sq": 4, "Skv": 8, "D": 32} | fields))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_read_only_out_is_not_written():
    out = np.zeros_like(Q)
    out.flags.writeable = False
    with pytest.raises(ProblemError, match=r"^out is read-only$"):
        attention(Q, K, K, out=out, config=SMALL)


@pytest.mark.parametrize(
    ("device", "fields", "reason"),
    [
        ("sm_86", {"dtype": "fp8e4m3"}, "fp8e4m3 needs sm_89 or newer, and rtx3090 is sm_86"),
        ("sm_80", {"out_dtype": "fp8e4m3"}, "fp8e4m3 needs sm_89 or newer, and a100 is sm_80"),
        ("sm_75", {"dtype": "bf16"}, "bf16 needs sm_80 or newer, and t4 is sm_75"),
        ("sm_75", {"bias": "bf16"}, "bf16 needs sm_80"),
    ],
)
def test_dtypes_that_a_device_lacks(device, fields, reason):
    with pytest.raises(UnsupportedError) as raised:
        check_supported(ATTENTION, AttentionProblem(1, 1, 16, 16, 64, **fields), resolve_device(device))
    assert reason in str(raised.value)


def test_aligned_strides_are_in_units_of_16_bytes():
    problem = AttentionProblem(2, 4, 8, 24, 40, out_dtype="fp32", strided=True, bias="fp32")
    of = {"q": (960, 240, 48, 1), "k": (96, 48, 8, 1), "v": (8, 8, 8, 1), "out": (64, 32, 4, 1), "bias": (96, 8, 4, 1)}
    values = strides(problem, of)
    assert [values[f"q_{axis}_stride"] for axis in ("batch", "head", "row")] == [120, 30, 6]
    assert [values[f"out_{axis}_stride"] for axis in ("batch", "head", "row")] == [16, 8, 1]
    # Broadcast dimensions of the bias do not move on.
    assert [values[f"bias_{axis}_stride"] for axis in ("batch", "head", "row")] == [0, 0, 1]
    unaligned = AttentionProblem(2, 4, 8, 24, 40, strided=True, aligned=False)
    assert strides(unaligned, of)["q_row_stride"] == 48


def test_tolerance_grows_with_what_it_is_for():
    base = AttentionProblem(1, 1, 16, 64, 64, dtype="fp32", lse=True)
    assert tolerance(base)["out"].absolute < 1e-5
    assert tolerance(AttentionProblem(1, 1, 16, 64, 64))["out"].absolute > 100 * tolerance(base)["out"].absolute
    # A wrong weight among n is off by about 1/√n: outside, for the coarsest operands.
    for keys in (64, 4096, 2**17):
        for kind in ("fp16", "bf16", "fp8e5m2"):
            bound = tolerance(AttentionProblem(1, 1, 16, keys, 64, dtype=kind, out_dtype="fp32"))["out"].absolute
            assert bound < 0.1 / np.sqrt(keys)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_scale", "k_scale"), [(0.0, 1.0), (1.0, 0.0), (1e-23, 1e-23)])
def test_scales_of_all_zero_arrays_leave_every_key_the_same_share(q_scale, k_scale, causal):
    """A product that is 0 in fp32: the amax of an array of zeros makes such scales."""
    fp8 = np.dtype(DTYPES["fp8e5m2"].numpy)
    q, k, v = (np.random.default_rng(seed).standard_normal((1, 2, 11, 32)).astype(fp8) for seed in range(3))
    scales = {"q_scale": np.full(1, q_scale, np.float32), "k_scale": np.full(1, k_scale, np.float32)}
    result = attention(q, k, v, causal=causal, out_dtype="fp32", **scales)
    wide = v.astype(np.float64)
    seen = np.arange(1, 12)[:, None] if causal else 11
    wanted = (np.cumsum(wide, axis=2) if causal else wide.sum(2, keepdims=True)) / seen
    np.testing.assert_allclose(result, np.broadcast_to(wanted, result.shape), atol=2e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"causal": "no"},
        {"causal": np.array([0, 1])},
        {"return_lse": "no"},
        {"scale": True},
        {"scale": 1e-46},
        {"softcap": 1e39},
        {"q_scale": 0.0},
        {"k_scale": -1.0},
    ],
    ids=str,
)
def test_options_that_can_not_be_are_named(options):
    with pytest.raises(UsageError) as caught:
        attention(Q, K, K, **options)
    assert str(caught.value).startswith(f"{next(iter(options))}=")
    assert "\n" not in str(caught.value)

"""Attention's plugins: which problem tensors make, and that launches for all sizes are right for each."""

from __future__ import annotations

import math

import pytest

from tests.kernels.tensorrt.cases import case, check_launches, check_results
from tilewright.kernels import AttentionConfig, AttentionProblem
from tilewright.tuning_db.errors import ProblemError, UsageError

B = [1, 2, 16]
S = [1, 128, 2000]


def inputs(q=(B, 8, S, 64), kv=(B, 2, S, 64), dtype="fp16"):
    return [(q, dtype), (kv, dtype), (kv, dtype)]


def six(b, q, k):
    return (b, q, b, k, b, k)


def test_any_batch_and_length():
    found = case("FusedAttention", inputs(), causal=1)
    sizes = [six(*each) for each in ((1, 2, 2), (2, 128, 128), (3, 129, 257), (16, 2000, 2000))]
    problem = {"H": 8, "Hkv": 2, "D": 64, "causal": True}
    assert check_launches(found, lambda b, q, _, k, *__: AttentionProblem(B=b, Sq=q, Skv=k, **problem), sizes) >= 20


def test_one_query_of_a_dynamic_number_is_masked_by_the_same_code():
    found = case("FusedAttention", inputs(), causal=1)
    launch = found.launch(found.kernel.default(found.problem(found.profile.opt), _board()))
    assert dict(launch.constexprs)["CAUSAL"] is True
    assert not found.problem(found.profile.min).causal


def _board():
    from tilewright.kernels import resolve_device

    return resolve_device("rtx3090")


def test_windows_and_softcap():
    found = case("FusedAttention", inputs(), window_left=100, window_right=0, softcap=50.0, scale=0.25)
    problem = {"H": 8, "Hkv": 2, "D": 64, "window_left": 100, "causal": True, "softcap": True}
    sizes = [six(*each) for each in ((1, 200, 200), (2, 300, 2000))]
    assert check_launches(found, lambda b, q, _, k, *__: AttentionProblem(B=b, Sq=q, Skv=k, **problem), sizes) >= 10
    assert found.variant.operation.constants(found.tensors, found.attributes) == (("SCALE", 0.25), ("SOFTCAP", 50.0))
    plain = case("FusedAttention", inputs())
    assert plain.variant.operation.constants(plain.tensors, plain.attributes) == (("SCALE", 1 / math.sqrt(64)),)


@pytest.mark.parametrize("bias", [(B, 8, S, S), (1, 8, S, S), (B, 1, 1, S), (1, 1, S, S)], ids=str)
def test_a_bias_is_broadcast_where_its_dimension_is_one(bias):
    found = case("FusedAttentionBias", [*inputs(), (bias, "fp16")])
    flags = {"bias_batch": bias[0] != 1, "bias_heads": bias[1] != 1, "bias_rows": bias[2] != 1}
    problem = {"H": 8, "Hkv": 2, "D": 64, "bias": "fp16", **flags}
    sizes = []
    for b, q, k in ((2, 128, 128), (3, 5, 2000)):
        place = {0: b, 2: q, 3: k}
        sizes.append((*six(b, q, k), *(place[axis] for axis, dim in enumerate(bias) if isinstance(dim, list))))
    assert check_launches(found, lambda b, q, _, k, *__: AttentionProblem(B=b, Sq=q, Skv=k, **problem), sizes) >= 5


def test_the_other_inputs():
    extra = [((8,), "fp32"), ((8,), "fp32"), ((1,), "fp32"), ((1,), "fp32"), ((), "fp32"), ((B,), "int32")]
    plugin = "FusedAttentionAlibiSlopesSinksScalesKvLens"
    found = case(plugin, [*inputs(dtype="fp8e4m3"), *extra], out_dtype="bf16")
    problem = {"H": 8, "Hkv": 2, "D": 64, "dtype": "fp8e4m3", "alibi": True, "sinks": True, "scales": True}
    sizes = [(*six(2, 128, 128), 2), (*six(3, 5, 2000), 3)]
    assert check_launches(
        found,
        lambda b, q, _, k, *__: AttentionProblem(B=b, Sq=q, Skv=k, kv_lens=True, **problem),
        sizes,
        board="rtx4090",
    )


def test_values_of_another_width():
    found = case("FusedAttention", [((2, 4, 64, 96), "bf16"), ((2, 4, 64, 96), "bf16"), ((2, 4, 64, 128), "bf16")])
    assert found.outputs[0].dims == (2, 4, 64, 128)
    assert found.problem({}) == AttentionProblem(B=2, H=4, Sq=64, Skv=64, D=96, Dv=128, dtype="bf16")


@pytest.mark.parametrize("pack", [False, True])
def test_code_for_all_sizes_is_right_for_each(pack):
    length = [1, 33, 64]
    found = case(
        "FusedAttention", [(([1, 2, 2], heads, length, 32), "fp16") for heads in (4, 2, 2)], causal=1, window_left=20
    )
    problem = {"H": 4, "Hkv": 2, "D": 32, "causal": True, "window_left": 20}
    check_results(
        found,
        lambda b, q, _, k, *__: AttentionProblem(B=b, Sq=q, Skv=k, **problem),
        [six(*each) for each in ((1, 1, 1), (2, 33, 33), (1, 1, 64), (2, 16, 40))],
        AttentionConfig(32, 32, PACK=pack),
    )


@pytest.mark.parametrize(
    ("plugin", "tensors", "attributes", "message"),
    [
        ("FusedAttention", inputs(q=(2, 64, 64)), {}, "q has 3 dimensions and must be (B, H, Sq, D)"),
        ("FusedAttention", inputs(kv=(2, 3, 64, 64)), {}, "k is (2, 3, 64, 64) and must be"),
        (
            "FusedAttention",
            inputs(q=(2, 8, 9, 64), kv=(2, 3, 64, 64)),
            {},
            "H=8 query heads must be a multiple of Hkv=3",
        ),
        ("FusedAttention", [*inputs()[:2], ((B, 2, S, 64), "bf16")], {}, "q, k and v are fp16, fp16, bf16"),
        ("FusedAttention", inputs(q=(B, 8, S, S)), {}, "the head dim, dimension 3 of q, must be static"),
        ("FusedAttention", inputs(q=(B, S, S, 64)), {}, "H, dimension 1 of q, must be static"),
        ("FusedAttention", inputs(), {"causal": 2}, "causal=2 must be 0 or 1"),
        ("FusedAttention", inputs(), {"window_left": -2}, "window_left=-2 must be at least 0, or -1"),
        ("FusedAttention", inputs(), {"scale": -1.0}, "scale=-1.0 must be a number above 0"),
        ("FusedAttention", inputs(), {"scale": 1e-45}, "to 2.36e+38, or 0 for the default"),
        ("FusedAttention", inputs(), {"softcap": 3e38}, "softcap=3e+38 must be a number above 0, of fp32, from"),
        ("FusedAttentionSinks", [*inputs(), ((8,), "fp16")], {}, "sinks is fp16 and must be fp32"),
        ("FusedAttentionKvLens", [*inputs(), ((B,), "fp32")], {}, "kv_lens is fp32 and must be int32"),
        ("FusedAttentionSinks", [*inputs(), ((4,), "fp32")], {}, "sinks is (4,) and must be (8,)"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(plugin, tensors, attributes, message):
    with pytest.raises((ProblemError, UsageError)) as caught:
        case(plugin, tensors, **attributes).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

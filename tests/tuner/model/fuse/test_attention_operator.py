"""ONNX's `Attention`: what it says is what the fused node computes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.tuner.model.fuse.forms import Graph, fused, only_fused, operators
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs, plugin_settings, static_shape

B, H, HKV, SQ, SKV, D, DV = 2, 4, 2, 5, 7, 16, 32


def given(g: Graph, rank: int = 4, keys: int = SKV) -> tuple[str, str, str]:
    if rank == 4:
        return g.input("q", B, H, SQ, D), g.input("k", B, HKV, keys, D), g.input("v", B, HKV, keys, DV)
    return g.input("q", B, SQ, H * D), g.input("k", B, keys, HKV * D), g.input("v", B, keys, HKV * DV)


def heads(rank: int) -> dict[str, int]:
    return {} if rank == 4 else {"q_num_heads": H, "kv_num_heads": HKV}


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("rank", [3, 4])
def test_of_three_and_of_four_dimensions(opset, rank):
    g = Graph(opset)
    model, report = fused(g, g("Attention", *given(g, rank), **heads(rank)))
    node = only_fused(model, "FusedAttention")
    assert node.name == "n0"
    assert [static_shape(plugin_inputs(node)[name]) for name in "qkv"] == [
        (B, H, SQ, D),
        (B, HKV, SKV, D),
        (B, HKV, SKV, DV),
    ]
    moves = 0 if rank == 4 else 4
    assert sorted(operators(model)) == ["FusedAttention"] + ["Reshape"] * moves + ["Transpose"] * moves
    assert report.counts() == {"attention": 1}


def test_projections_that_are_split_for_it_are_taken_from_before():
    """Heads that were split, joined for the operator, and split again by it."""
    g = Graph(23)
    x = g.input("x", B, SQ, H * D)
    q = g.reshape(g.transpose(g.reshape(x, B, SQ, H, D), 0, 2, 1, 3), B, H, SQ, D)
    joined = g.reshape(g.transpose(q, 0, 2, 1, 3), B, SQ, H * D)
    out = g(
        "Attention", joined, g.input("k", B, SKV, H * D), g.input("v", B, SKV, H * D), q_num_heads=H, kv_num_heads=H
    )
    model, _ = fused(g, out)
    assert operators(model).count("Transpose") == 4  # q, k, v and the result


def test_scale_and_softcap():
    g = Graph(23)
    model, _ = fused(g, g("Attention", *given(g), scale=0.5, softcap=3.0))
    settings = plugin_settings(only_fused(model, "FusedAttention"))
    assert (settings["scale"], settings["softcap"]) == (0.5, 3.0)


@pytest.mark.parametrize("shape", [(SQ, SKV), (1, SKV), (H, SQ, SKV), (B, 1, SQ, SKV), (B, H, SQ, SKV), (B, 1, 1, SKV)])
@pytest.mark.parametrize("kind", ["fp32", "bool"])
def test_masks(shape, kind):
    g = Graph(23)
    mask = g.input("mask", *shape, dtype=kind)
    feeds = g.feeds(2)
    if kind == "bool" and shape[-2] > 1:
        # A row that sees no key is 0 here and there.
        feeds["mask"][..., 1, :] = False
    if shape[-2] == 1:
        # ONNX Runtime wants that dimension; the bias is to do without it.
        mask = g("Expand", mask, g.shape(SQ, SKV))
    model, _ = fused(g, g("Attention", *given(g), mask), feeds={"mask": feeds["mask"]})
    assert static_shape(plugin_inputs(only_fused(model, "FusedAttentionBias"))["bias"]) == (
        *[1] * (4 - len(shape)),
        *shape,
    )


def test_a_constant_mask_is_known_for_causal_and_a_shorter_one_is_filled_up():
    g = Graph(23)
    q, k, v = given(g)
    mask = np.arange(SKV - 1) <= np.arange(SQ)[:, None] + 1
    # ONNX Runtime takes no shorter masks: the whole one says what is meant.
    whole = np.pad(mask, ((0, 0), (0, 1)))
    wanted = Graph(23)
    given(wanted)
    _, report = fused(wanted, wanted("Attention", "q", "k", "v", wanted.array(whole, bool)))
    model = g.model(g("Attention", q, k, v, g.array(mask, bool)))
    from tests.tuner.model.graphs import results
    from tilewright.tuner.model.fuse import fuse

    expected = results(wanted.model("v0"), wanted.feeds())[0]
    fuse(model)
    assert np.allclose(results(model, g.feeds())[0], expected, atol=1e-5)
    assert report.counts() == {"attention": 1}


def test_a_constant_mask_that_is_a_triangle():
    g = Graph(23)
    mask = np.arange(SKV) <= np.arange(SQ)[:, None] + SKV - SQ
    model, _ = fused(g, g("Attention", *given(g), g.array(mask, bool)))
    assert plugin_settings(only_fused(model, "FusedAttention"))["causal"] == 1


@pytest.mark.parametrize(
    ("keys", "plugin", "settings"),
    [
        (SQ, "FusedAttention", {"causal": 1, "window_right": -1}),
        (SQ + 2, "FusedAttentionBias", {"causal": 0, "window_right": -1}),
        (SQ - 2, "FusedAttention", {"causal": 0, "window_right": 2}),
    ],
)
def test_causal_begins_at_the_first_key(keys, plugin, settings):
    g = Graph(23)
    model, _ = fused(g, g("Attention", *given(g, keys=keys), is_causal=1))
    known = plugin_settings(only_fused(model, plugin))
    assert {name: known[name] for name in settings} == settings


@pytest.mark.parametrize(
    ("rank", "causal", "masked", "present"), list(itertools.product((3, 4), (0, 1), (False, True), (False, True)))
)
def test_past_keys_and_values(rank, causal, masked, present):
    g = Graph(23)
    inputs = [*given(g, rank, SQ), g.input("mask", SQ, 3 + SQ) if masked else ""]
    inputs += [g.input("past_k", B, HKV, 3, D), g.input("past_v", B, HKV, 3, DV)]
    outputs = g("Attention", *inputs, outputs=3, is_causal=causal, **heads(rank))
    model, _ = fused(g, *(outputs if present else outputs[:1]))
    node = only_fused(model, "FusedAttentionBias" if masked else "FusedAttention")
    assert plugin_settings(node)["causal"] == causal
    assert static_shape(plugin_inputs(node)["k"]) == (B, HKV, 3 + SQ, D)
    assert operators(model).count("Concat") == 2


@pytest.mark.parametrize("new", [SQ + 2, SQ - 1])
def test_past_keys_and_more_or_fewer_new_ones_than_queries(new):
    """The operator counts from the end of the past, the kernel from the end of all."""
    g = Graph(23)
    inputs = [*given(g, 4, new), "", g.input("past_k", B, HKV, 3, D), g.input("past_v", B, HKV, 3, DV)]
    outputs = g("Attention", *inputs, outputs=3, is_causal=1, **heads(4))
    model, _ = fused(g, outputs[0])
    (node,) = fused_nodes(model)
    settings = plugin_settings(node)
    assert not settings["causal"]


def test_present_keys_without_past_ones():
    g = Graph(23)
    outputs = g("Attention", *given(g, 3), outputs=3, **heads(3))
    g.declared = {outputs[1]: (B, HKV, SKV, D), outputs[2]: (B, HKV, SKV, DV)}
    model, _ = fused(g, *outputs)
    only_fused(model, "FusedAttention")


def test_present_keys_are_not_scaled_and_not_repeated():
    """Where keys are outputs they are taken as they come: what is upstream of them is left there."""
    g = Graph(23)
    k = g("Mul", g.input("k", B, HKV, SQ, D), g.array(3.0))
    k = g("Gather", k, g.shape(0, 0, 1, 1), axis=1)
    v = g("Gather", g.input("v", B, HKV, SQ, D), g.shape(0, 0, 1, 1), axis=1)
    past = [g.input("past_k", B, H, 3, D), g.input("past_v", B, H, 3, D)]
    outputs = g("Attention", g.input("q", B, H, SQ, D), k, v, "", *past, outputs=3)
    model, _ = fused(g, *outputs)
    assert static_shape(plugin_inputs(only_fused(model, "FusedAttention"))["k"]) == (B, H, 3 + SQ, D)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_counts_of_keys(causal, masked):
    g = Graph(24)
    inputs = [*given(g), g.input("mask", SQ, SKV) if masked else "", "", "", g.input("counts", B, dtype="int64")]
    counts = np.array([SKV, SKV - 1])
    model, _ = fused(g, g("Attention", *inputs, is_causal=causal), feeds={"counts": counts})
    node = only_fused(model, "FusedAttentionBiasKvLens" if masked else "FusedAttentionKvLens")
    assert plugin_settings(node)["causal"] == causal


def test_scores_as_an_output_are_a_miss():
    g = Graph(23)
    out, _, _, scores = g("Attention", *given(g), outputs=4)
    model, report = fused(g, out, scores)
    (miss,) = report.misses
    assert "qk_matmul_output" in miss.reason
    assert not fused_nodes(model)


def test_scores_that_nobody_asks_for_are_none():
    g = Graph(23)
    out, *_ = g("Attention", *given(g), outputs=4)
    model, _ = fused(g, out)
    only_fused(model, "FusedAttention")


def test_heads_that_are_too_wide_are_a_miss():
    g = Graph(23)
    q, k, v = (g.input(name, 1, 2, 3, 300) for name in "qkv")
    _, report = fused(g, g("Attention", q, k, v))
    assert [miss.reason for miss in report.misses] == ["D=300 must be from 16 to 256 for fp32"]


def test_layers_share_the_counts():
    g = Graph(24)
    counts = g.input("counts", B, dtype="int64")
    x = g.input("x", B, H, SKV, D)
    for _ in range(2):
        x = g("Attention", x, x, x, "", "", "", counts)
    model, _ = fused(g, x, feeds={"counts": np.array([3, 7])})
    assert operators(model) == ["Cast", "FusedAttentionKvLens", "FusedAttentionKvLens"]

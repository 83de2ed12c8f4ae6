"""Heads of keys that serve several heads of queries are read once, however they are repeated; and what is around."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from benchmarks.models.architecture import samples, write
from tests.tuner.model.fuse.forms import (
    LEAST,
    SCALE,
    B,
    D,
    Graph,
    H,
    S,
    attend,
    fused,
    heads,
    only_fused,
    operators,
    triangle,
    turned,
)
from tests.tuner.model.graphs import relative_error, results
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import DTYPES, fused_nodes, plugin_inputs, plugin_settings, static_shape
from tilewright.tuner.model.reading.read import read_model


def by_unsqueeze_and_expand(g: Graph, value: str) -> str:
    """Llama's repeat_kv."""
    apart = g("Expand", g("Unsqueeze", value, g.shape(2)), g.shape(B, 2, 2, S, D))
    return g.reshape(apart, B, H, S, D)


def by_reshape_and_tile(g: Graph, value: str) -> str:
    return g.reshape(g("Tile", g.reshape(value, B, 2, 1, S, D), g.shape(1, 1, 2, 1, 1)), B, H, S, D)


def by_concat(g: Graph, value: str) -> str:
    apart = g("Unsqueeze", value, g.shape(2))
    return g.reshape(g("Concat", apart, apart, axis=2), B, H, S, D)


def by_gather(g: Graph, value: str) -> str:
    """torch.repeat_interleave of a constant count."""
    return g("Gather", value, g.shape(0, 0, 1, 1), axis=1)


def before_the_transpose(g: Graph, value: str) -> str:
    flat = g.reshape(g.transpose(value, 0, 2, 1, 3), B, S, 2, 1, D)
    return g.transpose(g.reshape(g("Expand", flat, g.shape(B, S, 2, 2, D)), B, S, H, D), 0, 2, 1, 3)


@pytest.mark.parametrize(
    "repeat",
    [by_unsqueeze_and_expand, by_reshape_and_tile, by_concat, by_gather, before_the_transpose],
    ids=lambda form: form.__name__,
)
def test_repeated_heads_are_read_once(repeat):
    g = Graph()
    k, v = (repeat(g, heads(g, name, 2)) for name in "kv")
    raw = g("Add", g("MatMul", heads(g, "q"), turned(g, k)), g.array(triangle(LEAST)))
    model, _ = fused(g, g("MatMul", g("Softmax", raw, axis=-1), v))
    node = only_fused(model, "FusedAttention")
    assert [static_shape(plugin_inputs(node)[name]) for name in "kv"] == [(B, 2, S, D)] * 2
    assert set(operators(model)) == {"FusedAttention", "Reshape", "Transpose"}


def test_one_head_of_keys_is_broadcast():
    """Falcon: (B, 1, S, D) by the product itself."""
    g = Graph()
    k, v = g.input("k", B, 1, S, D), g.input("v", B, 1, S, D)
    model, _ = fused(g, g("MatMul", g("Softmax", g("MatMul", heads(g, "q"), turned(g, k)), axis=-1), v))
    assert static_shape(plugin_inputs(only_fused(model, "FusedAttention"))["k"]) == (B, 1, S, D)


def test_groups_of_heads_in_five_dimensions():
    """(B, Hkv, groups, S, D) by (B, Hkv, 1, S, D)."""
    g = Graph()
    q = g.reshape(heads(g, "q"), B, 2, 2, S, D)
    k, v = (g("Unsqueeze", heads(g, name, 2), g.shape(2)) for name in "kv")
    out = g("MatMul", g("Softmax", g("MatMul", q, g.transpose(k, 0, 1, 2, 4, 3)), axis=-1), v)
    model, _ = fused(g, g.reshape(out, B, H, S, D))
    assert static_shape(plugin_inputs(only_fused(model, "FusedAttention"))["k"]) == (B, 2, S, D)


def test_heads_in_another_order_are_copied():
    """Tiled instead of repeated one by one: head 0 of the keys serves heads 0 and 2, which kernels don't have."""
    g = Graph()
    k, v = (g("Tile", heads(g, name, 2), g.shape(1, 2, 1, 1)) for name in "kv")
    model, _ = fused(g, g("MatMul", g("Softmax", g("MatMul", heads(g, "q"), turned(g, k)), axis=-1), v))
    assert static_shape(plugin_inputs(only_fused(model, "FusedAttention"))["k"]) == (B, H, S, D)


def test_learned_queries_are_repeated_for_each_image():
    g = Graph()
    q = g.array(np.random.default_rng(0).standard_normal((1, H, 3, D)))
    weights = g("Softmax", g("MatMul", q, turned(g, heads(g, "k"))), axis=-1)
    model, _ = fused(g, g("MatMul", weights, heads(g, "v")))
    assert static_shape(plugin_inputs(only_fused(model, "FusedAttention"))["q"]) == (B, H, 3, D)


def test_a_scale_of_each_head_goes_to_the_queries():
    """Swin V2."""
    g = Graph()
    raw = g("MatMul", heads(g, "q"), turned(g, heads(g, "k")))
    scaled = g("Mul", raw, g.array(np.linspace(0.1, 0.7, H).reshape(H, 1, 1)))
    model, _ = fused(g, attend(g, g("Add", scaled, g.input("position", 1, H, S, S))))
    assert plugin_settings(only_fused(model, "FusedAttentionBias"))["scale"] == 1.0


@pytest.mark.parametrize(
    "name", ["bert_opset17", "bert_opset23", "gpt_opset17", "gpt_opset23", "vit_opset17", "vit_opset23"]
)
def test_every_attention_of_the_seeded_transformers(name, tmp_path):
    model, feeds = read_model(write(name, tmp_path, small=True)), samples(name, 1, small=True)[0]
    fold(model)
    wanted = results(model, feeds)
    report = fuse(model)
    assert report.counts()["attention"] == 2
    assert not [miss for miss in report.misses if miss.pattern == "attention"]
    nodes = [node for node in fused_nodes(model) if node.op_type.startswith("FusedAttention")]
    assert {plugin_settings(node)["causal"] for node in nodes} == {int(name.startswith("gpt"))}
    for got, expected in zip(results(model, feeds), wanted, strict=True):
        assert relative_error(got, expected) <= 1e-5


def test_half_precision_with_its_softmax_in_fp32():
    g = Graph()
    q, k, v = (g.input(name, B, H, S, D, dtype="fp16") for name in "qkv")
    raw = g("Mul", g("MatMul", q, turned(g, k)), g.array(SCALE, np.float16))
    masked = g("Add", raw, g.array(triangle(-65504), np.float16))
    weights = g("Cast", g("Softmax", g("Cast", masked, to=1), axis=-1), to=10)
    # ONNX Runtime rounds scores and weights to fp16 where the node does not.
    model, _ = fused(g, g("MatMul", weights, v), within=2e-3)
    assert plugin_settings(only_fused(model, "FusedAttention"))["causal"] == 1


def test_casts_of_queries_and_keys_alone_are_passed_by():
    """GPT-J: scores in fp32 of a model in fp16."""
    g = Graph()
    q, k, v = (g.input(name, B, H, S, D, dtype="fp16") for name in "qkv")
    raw = g("MatMul", g("Cast", q, to=1), g("Cast", turned(g, k), to=1))
    weights = g("Cast", g("Softmax", g("Mul", raw, g.array(SCALE)), axis=-1), to=10)
    model, _ = fused(g, g("MatMul", weights, v), within=2e-3)
    only_fused(model, "FusedAttention")
    assert "Cast" not in operators(model)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_factors_of_rows_are_of_the_type_of_queries(dtype):
    """They go to the queries, in whose type a factor of fp32 might overflow."""
    g = Graph()
    q, k, v = (g.input(name, B, H, S, D, dtype="fp16") for name in "qkv")
    raw, by = g("MatMul", q, turned(g, k)), g.array(np.linspace(0.1, 0.7, H).reshape(H, 1, 1), dtype)
    raw = g("Mul", raw if dtype is np.float16 else g("Cast", raw, to=1), by)
    weights = g("Softmax", raw, axis=-1)
    _, report = fused(g, g("MatMul", weights if dtype is np.float16 else g("Cast", weights, to=10), v), within=2e-3)
    assert report.counts().get("attention", 0) == (dtype is np.float16)
    if dtype is np.float32:
        (miss,) = [miss for miss in report.misses if miss.pattern == "attention"]
        assert "is fp32, and its queries fp16" in miss.reason


def fp16_but_its_weights(g: Graph) -> str:
    """Masked attention of a module in fp16 as torch's older exporter writes it: with the mask in fp32 weights are, too,
    so that v is cast."""
    q, k, v = (g.input(name, B, H, S, D, dtype="fp16") for name in "qkv")
    raw = g("Cast", g("Mul", g("MatMul", q, turned(g, k)), g.array(SCALE, np.float16)), to=1)
    seen = g.input("seen", B, 1, S, S, dtype="bool")
    masked = g("Add", raw, g("Where", seen, g.array(0.0), g.array(LEAST)))
    weights = g("Softmax", masked, axis=-1)
    guarded = g("Where", g("IsNaN", weights), g.array(0.0), weights)
    return g("MatMul", guarded, g("Cast", v, to=1))


def test_values_are_read_before_their_cast_to_fp32():
    g = Graph()
    # The result is in fp16 between the node and the cast.
    model, _ = fused(g, fp16_but_its_weights(g), within=1e-3)
    node = only_fused(model, "FusedAttentionBias")
    assert {plugin_inputs(node)[name].dtype.name for name in "qkv"} == {"FLOAT16"}
    assert operators(model).count("Cast") == 1
    assert node.outputs[0].dtype.name == "FLOAT16"


def test_a_result_that_is_cast_back_is_cast_nowhere():
    g = Graph()
    model, _ = fused(g, g("Cast", fp16_but_its_weights(g), to=10), within=1e-3)
    only_fused(model, "FusedAttentionBias")
    assert "Cast" not in operators(model)


@pytest.mark.parametrize("to", ["fp32 as well", "fp16 elsewhere, too"])
def test_what_is_cast_for_others_stays_cast(to):
    g = Graph()
    out = fp16_but_its_weights(g)
    outputs = [g("Cast", out, to=10), g("Relu", out) if to == "fp32 as well" else g("Cast", out, to=10)]
    model, _ = fused(g, *outputs, within=1e-3)
    assert operators(model).count("Cast") == (2 if to == "fp32 as well" else 3)


@pytest.mark.parametrize("to", [10, 17, 6], ids=["fp16", "fp8e4m3", "int32"])
def test_a_cast_that_rounds_stays_and_so_does_the_one_back(to):
    g = Graph(23)
    q, k, v = (g.input(name, B, H, S, D) for name in "qkv")
    out = g("Mul", g("Attention", q, k, v), g.array(30.0))  # so that int32 has what to keep
    attended = g("Attention", q, k, v)
    model, _ = fused(g, out, g("Cast", g("Cast", attended, to=to), to=1), within=1e-1 if to != 10 else 1e-3)
    assert operators(model).count("Cast") == 2


def test_a_cast_in_a_branch_stays_there():
    g = Graph()
    out = fp16_but_its_weights(g)
    there = helper.make_node("Cast", [out], ["branched"], "branch_cast", to=10)
    result = helper.make_tensor_value_info("branched", int(DTYPES["fp16"]), [B, H, S, D])
    other = helper.make_node("Cast", [out], ["otherwise"], "other_cast", to=10)
    otherwise = helper.make_tensor_value_info("otherwise", int(DTYPES["fp16"]), [B, H, S, D])
    branches = [helper.make_graph([there], "then", [], [result]), helper.make_graph([other], "else", [], [otherwise])]
    chosen = g("If", g.array(True, np.bool_), then_branch=branches[0], else_branch=branches[1])
    model, _ = fused(g, chosen, within=1e-3)
    only_fused(model, "FusedAttentionBias")


def test_values_that_are_rounded_to_fp16_first_are_read_behind_that():
    g = Graph()
    q, k, v = (g.input(name, B, H, S, D) for name in "qkv")
    rounded = g("Cast", g("Cast", v, to=10), to=1)
    out = g("MatMul", g("Softmax", g("Mul", g("MatMul", q, turned(g, k)), g.array(SCALE)), axis=-1), rounded)
    model, _ = fused(g, out)  # unrounded values would differ by 2⁻¹²
    assert operators(model).count("Cast") == 2


def test_the_operator_may_have_values_of_another_dtype_than_its_result():
    """`Attention`'s Y is of the type of Q and K. ONNX Runtime's body of it takes only one type."""
    made = []
    for cast in (True, False):
        g = Graph(23)
        q, k, v = (g.input(name, B, H, S, D, dtype="fp16") for name in "qkv")
        out = g("Attention", *(g("Cast", each, to=1) for each in (q, k)), g("Cast", v, to=1) if cast else v)
        made.append(g.model(out))
    wanted = results(made[0], g.feeds())[0]
    fuse(made[1])
    assert only_fused(made[1], "FusedAttention").outputs[0].dtype.name == "FLOAT16"
    got = results(made[1], g.feeds())[0]
    assert got.dtype == wanted.dtype
    assert relative_error(got, wanted) <= 1e-3

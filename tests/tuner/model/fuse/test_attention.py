"""Attention as products and a softmax: every way of writing it becomes one node that computes the same."""

from __future__ import annotations

import math

import numpy as np
import pytest

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
    scores,
    triangle,
    turned,
)
from tilewright.tuner.model.graph import plugin_settings


def divided_after(g: Graph) -> str:
    return attend(g, g("Div", g("MatMul", heads(g, "q"), turned(g, heads(g, "k"))), g.array(math.sqrt(D))))


def multiplied_after(g: Graph) -> str:
    return attend(g, scores(g))


def factor_first(g: Graph) -> str:
    product = g("MatMul", heads(g, "q"), turned(g, heads(g, "k")))
    return attend(g, g("Mul", g.array([[[[SCALE]]]]), product))


def on_queries(g: Graph) -> str:
    return attend(g, g("MatMul", g("Mul", heads(g, "q"), g.array(SCALE)), turned(g, heads(g, "k"))))


def on_queries_before_the_split(g: Graph) -> str:
    q = g("Div", g.input("q", B, S, H * D), g.array(math.sqrt(D)))
    q = g.transpose(g.reshape(q, B, S, H, D), 0, 2, 1, 3)
    return attend(g, g("MatMul", q, turned(g, heads(g, "k"))))


def on_both(g: Graph) -> str:
    """torch's scaled_dot_product_attention, as its exporters take it apart."""
    q, k = (g("Mul", heads(g, name), g.array([D**-0.25])) for name in "qk")
    return attend(g, g("MatMul", q, turned(g, k)))


def on_both_after_the_transpose(g: Graph) -> str:
    q = g("Mul", heads(g, "q"), g.array(D**-0.25))
    return attend(g, g("MatMul", q, g("Mul", turned(g, heads(g, "k")), g.array(D**-0.25))))


def split_and_turned_in_one(g: Graph) -> str:
    k = g.transpose(g.reshape(g.input("k", B, S, H * D), B, S, H, D), 0, 2, 3, 1)
    return attend(g, g("Mul", g("MatMul", heads(g, "q"), k), g.array(SCALE)))


def turned_in_three_dimensions(g: Graph) -> str:
    """The dynamo exporter: (B·H, S, D) → (B·H, D, S) between two reshapes."""
    k = g.reshape(heads(g, "k"), B * H, S, D)
    k = g.reshape(g.transpose(k, 0, 2, 1), B, H, D, S)
    q = g("Mul", heads(g, "q"), g.array(D**-0.25))
    return attend(g, g("MatMul", q, g("Mul", k, g.array(D**-0.25))))


def keys_come_turned(g: Graph) -> str:
    k = g.input("k", B, H, D, S)
    return attend(g, g("Mul", g("MatMul", heads(g, "q"), k), g.array(SCALE)))


def packed_and_unbound(g: Graph) -> str:
    """timm: one projection, split by `Gather`s."""
    qkv = g.transpose(g.reshape(g.input("x", B, S, 3 * H * D), B, S, 3, H, D), 2, 0, 3, 1, 4)
    q, k, v = (g("Gather", qkv, g.array(index, np.int64), axis=0) for index in range(3))
    weights = g("Softmax", g("MatMul", g("Mul", q, g.array(SCALE)), turned(g, k)), axis=-1)
    return g.reshape(g.transpose(g("MatMul", weights, v), 0, 2, 1, 3), B, S, H * D)


def three_dimensions(g: Graph) -> str:
    """torch.baddbmm and friends: batch and heads are one axis."""
    q, k, v = (g.reshape(heads(g, name), B * H, S, D) for name in "qkv")
    product = g("MatMul", g("Mul", q, g.array(SCALE)), g.transpose(k, 0, 2, 1))
    out = g("MatMul", g("Softmax", product, axis=2), v)
    return g.reshape(g.transpose(g.reshape(out, B, H, S, D), 0, 2, 1, 3), B, S, H * D)


def values_first(g: Graph) -> str:
    """YOLO11: queries, keys and values are (B, H, D, S), the result too."""
    q, k, v = (g.input(name, B, H, D, S) for name in "qkv")
    weights = g("Softmax", g("Mul", g("MatMul", turned(g, q), k), g.array(SCALE)), axis=-1)
    return g.reshape(g("MatMul", v, turned(g, weights)), B, H * D, S)


def two_dimensions(g: Graph) -> str:
    q, k, v = (g.input(name, S, D) for name in "qkv")
    product = g("Mul", g("MatMul", q, g.transpose(k, 1, 0)), g.array(SCALE))
    return g("MatMul", g("Softmax", product, axis=-1), v)


def einsum(g: Graph) -> str:
    q, k, v = (g.reshape(g.input(name, B, S, H * D), B, S, H, D) for name in "qkv")
    product = g("Mul", g("Einsum", q, k, equation="bqhd, bkhd -> bhqk"), g.array(SCALE))
    return g("Einsum", g("Softmax", product, axis=-1), v, equation="bhqk,bkhd->bqhd")


def einsum_with_an_ellipsis(g: Graph) -> str:
    q, k, v = (heads(g, name) for name in "qkv")
    product = g("Mul", g("Einsum", q, k, equation="...qd,...kd->...qk"), g.array(SCALE))
    return g("Einsum", g("Softmax", product, axis=-1), v, equation="...qk,...kd->...qd")


def einsum_keys_first(g: Graph) -> str:
    k, q, v = (heads(g, name) for name in "kqv")
    product = g("Mul", g("Einsum", k, q, equation="bhjd,bhid->bhij"), g.array(SCALE))
    return g("Einsum", v, g("Softmax", product, axis=-1), equation="bhjd,bhij->bhid")


def guarded_against_nan(g: Graph) -> str:
    """torch's export of scaled_dot_product_attention."""
    weights = g("Softmax", scores(g), axis=-1)
    weights = g("Where", g("IsNaN", weights), g.array(0.0), weights)
    return g("MatMul", weights, heads(g, "v"))


def less_the_largest(g: Graph) -> str:
    raw = scores(g)
    return attend(g, g("Sub", raw, g("ReduceMax", raw, g.shape(-1), keepdims=1)))


def softcapped(g: Graph) -> str:
    """Gemma 2."""
    capped = g("Mul", g("Tanh", g("Div", scores(g, 2.0), g.array(5.0))), g.array(5.0))
    return attend(g, g("Add", capped, g.array(triangle(LEAST))))


def softcapped_by_a_factor(g: Graph) -> str:
    return attend(g, g("Mul", g("Tanh", g("Mul", scores(g), g.array(0.5))), g.array(2.0)))


PLAIN = {
    divided_after: (4, {}),
    multiplied_after: (4, {}),
    factor_first: (4, {}),
    on_queries: (4, {}),
    on_queries_before_the_split: (4, {}),
    on_both: (4, {}),
    on_both_after_the_transpose: (4, {}),
    split_and_turned_in_one: (4, {}),
    turned_in_three_dimensions: (4, {}),
    keys_come_turned: (3, {}),
    packed_and_unbound: (2, {}),
    three_dimensions: (4, {}),
    values_first: (4, {}),
    two_dimensions: (0, {}),
    einsum: (4, {}),
    einsum_with_an_ellipsis: (3, {}),
    einsum_keys_first: (3, {}),
    guarded_against_nan: (3, {}),
    less_the_largest: (3, {}),
    softcapped: (3, {"softcap": 5.0, "causal": 1, "scale": 2.0}),
    softcapped_by_a_factor: (3, {"softcap": 2.0}),
}
"""Forms without a bias: the transposes that are left, at the most, and settings."""


@pytest.mark.parametrize("form", PLAIN, ids=lambda form: form.__name__)
def test_forms(form):
    g = Graph()
    model, report = fused(g, form(g))
    node = only_fused(model, "FusedAttention")
    transposes, settings = PLAIN[form]
    known = plugin_settings(node)
    wanted = {"causal": 0, "softcap": 0.0, "window_left": -1, "window_right": -1, **settings}
    assert {name: known[name] for name in wanted} == pytest.approx(wanted)
    assert "scale" in settings or known["scale"] in (0.0, pytest.approx(SCALE * 1.0))
    left = operators(model)
    assert left.count("Transpose") <= transposes, left
    assert set(left) <= {"FusedAttention", "Transpose", "Reshape", "Gather"}
    assert report.counts() == {"attention": 1}
    assert not report.misses


def test_names_of_nodes_and_values_stay():
    g = Graph()
    out = divided_after(g)
    model, _ = fused(g, out)
    node = only_fused(model, "FusedAttention")
    assert (node.name, node.outputs[0].name) == ("n10", out)

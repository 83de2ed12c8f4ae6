"""What is no attention that kernels have is left, with the reason."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fuse.forms import (
    LEAST,
    B,
    D,
    Graph,
    H,
    S,
    attend,
    fused,
    heads,
    operators,
    scores,
    turned,
)
from tests.tuner.model.graphs import relative_error, results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.fuse.scores import _reaches
from tilewright.tuner.model.graph import fused_nodes


def softmax_of_another_axis(g: Graph) -> str:
    return g("MatMul", g("Softmax", scores(g), axis=2), heads(g, "v"))


def over_queries(g: Graph) -> str:
    return g("MatMul", turned(g, g("Softmax", scores(g), axis=-1)), heads(g, "v"))


def clipped_on_both_sides(g: Graph) -> str:
    return attend(g, g("Clip", scores(g), g.array(-5.0), g.array(5.0)))


def hidden_by_too_little(g: Graph) -> str:
    return attend(g, g("Where", g.input("mask", S, S, dtype="bool"), scores(g), g.array(-100.0)))


def hidden_by_what_may_be_a_bias(g: Graph) -> str:
    return attend(g, g("Where", g.input("mask", S, S, dtype="bool"), scores(g), g.array(-6000.0)))


def no_product(g: Graph) -> str:
    return attend(g, g.input("scores", B, H, S, S))


def masked_before_the_softcap(g: Graph) -> str:
    return attend(g, g("Tanh", g("Add", scores(g), g.input("mask", S, S))))


def a_scale_of_each_key(g: Graph) -> str:
    return attend(g, g("Mul", scores(g), g.input("by", S)))


def negative_scale(g: Graph) -> str:
    return attend(g, scores(g, -0.25))


def small_heads(g: Graph) -> str:
    q, k, v = (g.input(name, B, H, S, 8) for name in "qkv")
    return g("MatMul", g("Softmax", g("MatMul", q, turned(g, k)), axis=-1), v)


def masked_after_the_softmax(g: Graph) -> str:
    weights = g("Where", g.input("mask", S, S, dtype="bool"), g("Softmax", scores(g), axis=-1), g.array(0.0))
    return g("MatMul", weights, heads(g, "v"))


def less_the_largest_of_each_key(g: Graph) -> str:
    raw = scores(g)
    return attend(g, g("Sub", raw, g("ReduceMax", raw, g.shape(-2), keepdims=1)))


def less_the_largest_of_another_query(g: Graph) -> str:
    """Of (S, S) the largest of row i, which is subtracted from column i."""
    q, k, v = (g.input(name, S, D) for name in "qkv")
    raw = g("MatMul", q, g.transpose(k, 1, 0))
    return g("MatMul", g("Softmax", g("Sub", raw, g("ReduceMax", raw, g.shape(-1), keepdims=0)), axis=-1), v)


def a_floor_that_is_scaled_after(g: Graph) -> str:
    return attend(g, g("Mul", g("Max", g("Mul", scores(g), g.array(1e5)), g.array(-1e4)), g.array(1e-5)))


def a_floor_that_becomes_a_ceiling(g: Graph) -> str:
    return attend(g, g("Mul", g("Max", scores(g), g.array(1e4)), g.array(-1.0)))


def a_floor_of_what_rows_are_divided_by(g: Graph) -> str:
    return attend(g, g("Div", g("Max", scores(g), g.array(-1e4)), g.input("by", S, 1)))


LEFT = {
    less_the_largest_of_each_key: "are used more than once",
    less_the_largest_of_another_query: "are used more than once",
    a_floor_that_is_scaled_after: "its scores come by way of Max",
    a_floor_that_becomes_a_ceiling: "its scores come by way of Max",
    a_floor_of_what_rows_are_divided_by: "its scores come by way of Max",
    softmax_of_another_axis: "its softmax is along axis 2 of",
    over_queries: "are not summed over keys",
    clipped_on_both_sides: "its scores come by way of Clip",
    hidden_by_too_little: "puts -100 for hidden scores",
    hidden_by_what_may_be_a_bias: "puts -6000 for hidden scores",
    no_product: "its scores are 'scores', and no product of queries and keys",
    masked_before_the_softcap: "comes before the softcap",
    a_scale_of_each_key: "kernels have one scale",
    negative_scale: "its scale is -0.25",
    small_heads: "D=8 must be from 16 to 256",
    masked_after_the_softmax: "after the softmax, and its scores are not",
}


@pytest.mark.parametrize("form", LEFT, ids=lambda form: form.__name__)
def test_what_is_left_has_a_reason(form):
    g = Graph()
    model, report = fused(g, form(g))
    (miss,) = [miss for miss in report.misses if miss.pattern == "attention"]
    assert LEFT[form] in miss.reason
    assert not any(node.op_type.startswith("FusedAttention") for node in fused_nodes(model))
    assert "Softmax" in operators(model)


@pytest.mark.parametrize("which", ["scores", "weights"])
def test_scores_and_weights_that_are_used_elsewhere_stay(which):
    g = Graph()
    raw = scores(g)
    weights = g("Softmax", raw, axis=-1)
    out = g("MatMul", weights, heads(g, "v"))
    model, report = fused(g, out, g("Relu", {"scores": raw, "weights": weights}[which]))
    (miss,) = [miss for miss in report.misses if miss.pattern == "attention"]
    assert f"its {which}" in miss.reason
    assert "Softmax" in operators(model)


def test_weights_that_are_an_output_stay():
    g = Graph()
    weights = g("Softmax", scores(g), axis=-1)
    _, report = fused(g, g("MatMul", weights, heads(g, "v")), weights)
    assert [miss.reason for miss in report.misses] == [f"its weights, {weights!r}, are an output of the model"]


def test_a_softmax_without_a_product_after_it_is_no_miss():
    g = Graph()
    _, report = fused(g, g("Softmax", g("MatMul", g.input("x", 4, 16), g.input("w", 16, 8)), axis=-1))
    assert not [miss for miss in report.misses if miss.pattern == "attention"]


def test_a_row_that_sees_no_key_is_the_exception():
    """finfo.min in a whole row gives the mean of all values: in ONNX's terms, the bias keeps that."""
    g = Graph()
    out = attend(g, g("Add", scores(g), g.input("mask", B, 1, S, S)))
    mask = np.zeros((B, 1, S, S), np.float32)
    mask[0, 0, 3] = LEAST
    feeds = {**g.feeds(), "mask": mask}
    model = g.model(out)
    wanted = results(model, feeds)[0]
    fuse(model)
    got = results(model, feeds)[0]
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("operator", ["Add", "Max"])
def test_sums_of_a_value_and_itself_are_followed_once(operator, monkeypatch):
    g = Graph()
    value = g.input("x", S, S)
    for _ in range(12):
        value = g(operator, value, value)
    (end,) = g.model(value).graph.outputs
    asked = []
    producer = ir.Value.producer
    monkeypatch.setattr(ir.Value, "producer", lambda value: asked.append(value) or producer(value))
    assert not _reaches(end)
    assert len(asked) < 30  # not 2¹²


def test_a_product_is_found_behind_what_comes_twice():
    g = Graph()
    value = scores(g)
    for _ in range(8):
        value = g("Add", value, value)
    assert _reaches(g.model(value).graph.outputs[0])

"""Packed queries, keys and values come to an attention in as few moves as there can be."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tuner.model.fuse.forms import SCALE, B, D, Graph, H, S, fused, operators, turned
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.graph import fused_nodes

E = H * D


def attention(g: Graph, q: str, k: str, v: str) -> str:
    """Of (B, H, S, D) each."""
    scores = g("Mul", g("MatMul", q, turned(g, k)), g.array(SCALE))
    return g("MatMul", g("Softmax", scores, axis=-1), v)


def place(g: Graph, value: str, index: int, axis: int = 0) -> str:
    return g("Gather", value, g.array(index, np.int64), axis=axis)


def parts(g: Graph, projected: str, count: int = 3) -> list[str]:
    """(S, B, count·E) → so many of (B, H, S, D), as `torch.nn.MultiheadAttention` has them exported."""
    apart = g("Unsqueeze", g.reshape(projected, S, B, count, E), g.shape(0))
    first = g("Squeeze", g.transpose(apart, 3, 1, 2, 0, 4), g.shape(3))
    heads = [g.transpose(g.reshape(place(g, first, index), S, B * H, D), 1, 0, 2) for index in range(count)]
    return [g.reshape(each, B, H, S, D) for each in heads]


def moves(model) -> list[str]:
    return [name for name in operators(model) if name in ("Gather", "Transpose")]


def test_a_packed_projection_is_transposed_once():
    g = Graph()
    projected = g("MatMul", g.input("x", S, B, E), g.array(normal(0, E, 3 * E)))
    model, _ = fused(g, attention(g, *parts(g, projected)))
    assert operators(model) == ["FusedAttention", "FusedGemm", *["Gather"] * 3, "Reshape", "Transpose"]
    (node,) = (node for node in fused_nodes(model) if node.op_type == "FusedAttention")
    assert [value.producer().op_type for value in node.inputs] == ["Gather"] * 3
    assert [int(value.producer().inputs[1].const_value.numpy()) for value in node.inputs] == [0, 1, 2]


def test_keys_and_values_are_packed_and_queries_apart():
    g = Graph()
    q = g.transpose(g.reshape(g.input("q", B, S, E), B, S, H, D), 0, 2, 1, 3)
    model, _ = fused(g, attention(g, q, *parts(g, g.input("x", S, B, 2 * E), 2)))
    assert moves(model) == ["Gather", "Gather", "Transpose", "Transpose"]


@pytest.mark.parametrize("index", [2, -1])
def test_places_of_an_axis_in_the_middle(index):
    """As `unbind` of (B, S, 3, H, D); a place may be counted from the end."""
    g = Graph()
    apart = g.reshape(g.input("x", B, S, 3 * E), B, S, 3, H, D)
    taken = [g.transpose(place(g, apart, each, 2), 0, 2, 1, 3) for each in (0, 1, index)]
    model, _ = fused(g, attention(g, *taken))
    assert moves(model) == [*["Gather"] * 3, "Transpose"]


def test_three_places_of_six_are_no_reason_to_move_the_others():
    g = Graph()
    apart = g.reshape(g.input("x", B, S, 6 * E), B, S, 6, H, D)
    taken = [g.transpose(place(g, apart, each, 2), 0, 2, 1, 3) for each in (0, 2, 5)]
    model, _ = fused(g, attention(g, *taken))
    assert moves(model) == [*["Gather"] * 3, *["Transpose"] * 3]


def test_places_that_are_no_axis_of_the_projection_stay():
    """Of 4, two of which lie before the sequence and two behind it."""
    g = Graph()
    apart = g.transpose(g.reshape(g.input("x", B, 2, S, 2 * E), B, 2, S, 2, H, D), 1, 3, 0, 2, 4, 5)
    first = g.reshape(apart, 4, B, S, H, D)
    taken = [g.transpose(place(g, first, index), 0, 2, 1, 3) for index in (1, 3, 2)]
    model, _ = fused(g, attention(g, *taken))
    assert moves(model) == [*["Gather"] * 3, *["Transpose"] * 4]


def test_what_is_in_order_stays():
    """As many moves as there would be: those that there are have their names."""
    g = Graph()
    first = g.transpose(g.reshape(g.input("x", B, S, 3 * E), B, S, 3, H, D), 2, 0, 3, 1, 4)
    taken = [place(g, first, index) for index in range(3)]
    model, _ = fused(g, attention(g, *taken))
    (node,) = fused_nodes(model)
    assert [value.name for value in node.inputs] == taken


def test_nor_is_one_place_for_all_three():
    g = Graph()
    apart = g.reshape(g.input("x", B, S, 3 * E), B, S, 3, H, D)
    taken = [g.transpose(place(g, apart, 1, 2), 0, 2, 1, 3) for _ in range(3)]
    model, _ = fused(g, attention(g, *taken))
    assert moves(model) == [*["Gather"] * 3, *["Transpose"] * 3]


def test_moves_that_others_need_are_none_the_fewer():
    """Keys and values that are outputs, too, as for a cache."""
    g = Graph()
    apart = g.reshape(g.input("x", B, S, 3 * E), B, S, 3, H, D)
    taken = [g.transpose(place(g, apart, index, 2), 0, 2, 1, 3) for index in range(3)]
    model, _ = fused(g, attention(g, *taken), *taken[1:])
    assert moves(model) == [*["Gather"] * 3, *["Transpose"] * 3]
    assert [value.name for value in model.graph.outputs][1:] == taken[1:]


def test_parts_with_heads_in_another_order_are_not_made_together():
    g = Graph()
    apart = g.reshape(g.input("x", B, S, 3 * E), B, S, 3, H, D)
    q, k = (g.transpose(place(g, apart, index, 2), 0, 2, 1, 3) for index in range(2))
    v = g.transpose(g.reshape(place(g, apart, 2, 2), B, S, D, H), 0, 3, 1, 2)
    model, _ = fused(g, attention(g, q, k, v))
    assert moves(model) == [*["Gather"] * 3, *["Transpose"] * 3]

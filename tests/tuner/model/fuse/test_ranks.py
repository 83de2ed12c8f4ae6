"""Constants of more dimensions than what they go with."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tuner.model.fuse.forms import Graph, fused, operators
from tests.tuner.model.graphs import results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_settings, static_shape


def shapes_stay(g: Graph, output: str, shape: tuple[int, ...]) -> list[str]:
    """The operators that are left of a graph, whose result has a shape before and after."""
    model, feeds = g.model(output), g.feeds()
    before = results(model, feeds)[0]
    assert before.shape == shape
    fuse(model)
    (after,) = results(model, feeds)
    assert after.shape == shape
    assert np.abs(after - before).max() < 1e-5
    assert static_shape(model.graph.outputs[0]) == shape
    return operators(model)


def product(g: Graph, *shape: int) -> str:
    return g("MatMul", g.input("x", *shape), g.array(np.random.default_rng(1).normal(size=(shape[-1], 4))))


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Pow"])
@pytest.mark.parametrize("constant_first", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 4), (1, 1, 1, 2, 4)])
def test_a_constant_that_adds_dimensions(operator, constant_first, shape):
    g = Graph()
    x = g("Abs", product(g, 2, 8))
    c = g.array(1 + np.arange(np.prod(shape)).reshape(shape) % 3)
    left = shapes_stay(g, g(operator, *((c, x) if constant_first else (x, c))), (*(1,) * (len(shape) - 2), 2, 4))
    assert left.count("Reshape") == 1


def test_a_bias_that_adds_a_dimension_is_fused():
    g = Graph()
    c = g.array(np.arange(4).reshape(1, 1, 4))
    left = shapes_stay(g, g("Relu", g("Add", product(g, 2, 8), c)), (1, 2, 4))
    assert "Add" not in left


def test_a_bias_of_a_convolution_that_adds_a_dimension():
    g = Graph()
    w = g.array(np.random.default_rng(0).normal(size=(4, 3, 3, 3)))
    c = g.array(np.arange(4).reshape(1, 1, 4, 1, 1))
    shapes_stay(g, g("Add", g("Conv", g.input("x", 1, 3, 6, 6), w), c), (1, 1, 4, 4, 4))


def test_gelu_of_constants_that_add_a_dimension():
    g = Graph()
    x = product(g, 2, 8)
    gate = g("Add", g("Erf", g("Div", x, g.array(np.full((1, 1, 1), 2**0.5)))), g.array(1.0))
    shapes_stay(g, g("Mul", g("Mul", x, gate), g.array(0.5)), (1, 2, 4))


def test_a_constant_that_repeats_is_left_alone():
    g = Graph()
    left = shapes_stay(g, g("Add", product(g, 2, 8), g.array(np.arange(3).reshape(3, 1, 1))), (3, 2, 4))
    assert "Reshape" not in left


def test_constants_of_as_many_dimensions_stay():
    g = Graph()
    model, _ = fused(g, g("Relu", g("Add", product(g, 2, 8), g.array(np.arange(4).reshape(1, 4)))))
    (node,) = fused_nodes(model)
    assert plugin_settings(node)["activation"] == "relu"
    assert "Reshape" not in operators(model)

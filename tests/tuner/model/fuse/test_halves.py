"""Two `Slice`s that are the halves of a value become one `Split`, and a gate of them one product."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fuse.forms import Graph, fused, only_fused, operators
from tests.tuner.model.graphs import results
from tilewright.tuner.model.fuse.halves import join_slices
from tilewright.tuner.model.graph import plugin_settings

END = np.iinfo(np.int64).max
Numbers = tuple[int, ...]  # of a `Slice`: start, end, axis, and maybe step


def taken(g: Graph, value: str, numbers: Numbers) -> str:
    return g("Slice", value, *(g.shape(number) for number in numbers))


def joined(g: Graph, *outputs: str) -> ir.Model:
    """A graph's model with its slices joined: it must compute what it did before, under the same names."""
    model, feeds = g.model(*outputs), g.feeds()
    before = results(model, feeds)
    join_slices(model)
    assert [value.name for value in model.graph.outputs] == list(outputs)
    for got, wanted in zip(results(model, feeds), before, strict=True):
        assert np.array_equal(got, wanted)
    return model


@pytest.mark.parametrize("activated", [0, 1])
@pytest.mark.parametrize("second_first", [False, True])
def test_a_gate_of_slices_is_one_node(activated, second_first):
    """`h, g = p.chunk(2, -1)` of a model whose batch is open."""
    g = Graph()
    both = g("MatMul", g.input("x", 6, 16), g.array(np.random.default_rng(1).normal(size=(16, 48)) / 4))
    parts = [(0, 24, -1), (24, END, -1)]
    halves = [taken(g, both, numbers) for numbers in (parts[::-1] if second_first else parts)]
    halves = halves[::-1] if second_first else halves
    model, report = fused(g, g("Mul", halves[1 - activated], g("Gelu", halves[activated])))
    assert plugin_settings(only_fused(model, "FusedGemm"))["gated"] == "halves"
    assert report.counts()["gemm + gate"] == 1
    assert len(model.graph) == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 4, -1), (4, 8, -1)),
        ((0, 4, 2), (4, END, 2, 1)),
        ((-8, -4, -1), (-4, 99, 2)),
        ((-END, 4, -1), (4, END, -1)),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_halves_are_joined(first, second, swapped):
    g = Graph()
    value = g("Relu", g.input("x", 2, 3, 8))
    pair = [taken(g, value, numbers) for numbers in ((second, first) if swapped else (first, second))]
    model = joined(g, *pair)
    assert operators(model) == ["Relu", "Split"]
    assert len({node.name for node in model.graph}) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 3, -1), (3, 8, -1)),  # uneven
        ((0, 4, -1), (5, 8, -1)),  # with a gap
        ((0, 5, -1), (4, 8, -1)),  # that overlap
        ((0, 4, -1), (0, 4, -1)),  # the same twice
        ((0, 8, -1, 2), (1, 8, -1, 2)),  # pairs
        ((3, -9, -1, -1), (4, 8, -1)),  # the first in the opposite order
        ((0, 2, 1), (2, 4, 1)),  # of another axis
        ((0, 4, -1), (2, 4, 1)),  # of two axes
    ],
)
def test_what_are_no_halves_stay(first, second):
    g = Graph()
    value = g("Relu", g.input("x", 2, 4, 8))
    assert operators(joined(g, taken(g, value, first), taken(g, value, second))) == ["Relu", "Slice", "Slice"]


def test_halves_of_an_odd_size_stay():
    """chunk(2) of 7 gives 4 and 3."""
    g = Graph()
    value = g("Relu", g.input("x", 2, 7))
    assert operators(joined(g, taken(g, value, (0, 4, 1)), taken(g, value, (4, 8, 1)))) == ["Relu", "Slice", "Slice"]


def test_bounds_that_are_no_constants_stay():
    g = Graph()
    value, middle = g("Relu", g.input("x", 2, 2)), g.input("middle", 1, dtype="int64")
    one = g("Min", middle, g.shape(1))  # 1 of what the feeds have, and unknown to the model
    pair = [g("Slice", value, g.shape(0), one, g.shape(1)), g("Slice", value, one, g.shape(2), g.shape(1))]
    assert operators(joined(g, *pair)).count("Slice") == 2


@pytest.mark.parametrize("use", ["as a whole", "as an output"])
def test_halves_of_what_is_used_elsewhere_stay(use):
    g = Graph()
    value = g("Relu", g.input("x", 2, 8))
    pair = [taken(g, value, numbers) for numbers in ((0, 4, 1), (4, 8, 1))]
    model = joined(g, *pair, g("Neg", value) if use == "as a whole" else value)
    assert operators(model).count("Slice") == 2

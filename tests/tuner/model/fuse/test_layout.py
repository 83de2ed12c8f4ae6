"""Layouts say of a tensor what NumPy makes of it, and plans make it with few nodes."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fuse.forms import Graph
from tilewright.tuner.model.fuse.layout import (
    Source,
    expanded,
    moved,
    plain,
    plan,
    regrouped,
    repeated,
    sizes,
    sources,
    steps,
    swapped,
    transposed,
)


def read(layout, source: np.ndarray) -> np.ndarray:
    """A tensor of a layout, element by element from the source."""
    flat = source.reshape(-1)
    factors = [factor for dim in layout for factor in dim]
    places = np.zeros([size for size, _ in factors], np.int64)
    for axis, (size, stride) in enumerate(factors):
        places += (np.arange(size) * stride).reshape([-1 if other == axis else 1 for other in range(len(factors))])
    return flat[places].reshape(sizes(layout))


def made(steps, array: np.ndarray) -> np.ndarray:
    for word, numbers in steps:
        if word == "Transpose":
            array = array.transpose(numbers)
        else:
            array = array.reshape(numbers) if word == "Reshape" else np.broadcast_to(array, numbers)
    return array


def random_move(random: np.random.Generator, layout, array: np.ndarray):
    """A layout and its tensor after one more move."""
    kind = random.integers(5)
    if kind == 0:
        order = tuple(random.permutation(array.ndim).tolist())
        return transposed(layout, order), array.transpose(order)
    if kind == 1:
        shape = [size for number in array.shape for size in split(random, number)]
        return regrouped(layout, shape), array.reshape(shape)
    if kind == 2 and array.ndim > 1:
        axis = int(random.integers(array.ndim - 1))
        shape = (*array.shape[:axis], array.shape[axis] * array.shape[axis + 1], *array.shape[axis + 2 :])
        return regrouped(layout, shape), array.reshape(shape)
    if kind == 3 and array.size < 1000:
        axis, times, each = int(random.integers(array.ndim)), int(random.integers(1, 4)), bool(random.integers(2))
        copied = np.repeat(array, times, axis) if each else np.concatenate([array] * times, axis)
        return repeated(layout, axis, times, each=each), copied
    shape = tuple(2 if size == 1 and array.size < 1000 else size for size in array.shape)
    return expanded(layout, shape), np.broadcast_to(array, shape)


def split(random: np.random.Generator, number: int) -> list[int]:
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    first = int(random.choice(divisors))
    return [first, number // first]


@pytest.mark.parametrize("seed", range(60))
def test_chains_of_moves_are_what_numpy_makes_of_them(seed):
    random = np.random.default_rng(seed)
    source = np.arange(math.prod(shape := random.choice([1, 2, 3, 4, 6], 4))).reshape(shape)
    layout, array = plain(source.shape), source
    for _ in range(random.integers(1, 7)):
        after, moved_array = random_move(random, layout, array)
        if after is None:  # it would split a factor unevenly
            continue
        layout, array = after, moved_array
        assert np.array_equal(read(layout, source), array)
    planned = steps(source.shape, layout)
    assert np.array_equal(made(planned, source), array)
    words = [word for word, _ in planned]
    assert words.count("Transpose") <= 1
    assert words.count("Expand") <= 1
    assert (not words) == (layout == plain(source.shape) and array.shape == source.shape)


@pytest.mark.parametrize(
    ("shape", "layout", "wanted"),
    [
        # Heads split, as they come: one node.
        ((2, 5, 4, 8), transposed(plain((2, 5, 4, 8)), (0, 2, 1, 3)), (("Transpose", (0, 2, 1, 3)),)),
        # Batch 1, with its dimension in place.
        ((1, 5, 4, 8), transposed(plain((1, 5, 4, 8)), (0, 2, 1, 3)), (("Transpose", (0, 2, 1, 3)),)),
        # One token: nothing moves.
        ((2, 1, 4, 8), transposed(plain((2, 1, 4, 8)), (0, 2, 1, 3)), (("Reshape", (2, 4, 1, 8)),)),
        ((3, 4), plain((3, 4)), ()),
        ((3, 4), swapped(plain((3, 4))), (("Transpose", (1, 0)),)),
        ((1, 6), expanded(plain((1, 6)), (5, 6)), (("Expand", (5, 6)),)),
    ],
)
def test_plans_are_short(shape, layout, wanted):
    assert steps(shape, layout) == wanted


def test_what_does_not_divide_is_no_reshape():
    turned = transposed(plain((4, 6)), (1, 0))
    assert regrouped(turned, (8, 3)) is None
    assert regrouped(plain((4, 6)), (8, 3)) == plain((8, 3))
    assert regrouped(plain((4, 6)), (5, 5)) is None
    assert expanded(plain((4, 6)), (5, 6)) is None


def chain(*nodes) -> ir.Value:
    """The last value of a graph that `nodes` write from its input x (2, 3, 4)."""
    g = Graph()
    value = g.input("x", 2, 3, 4)
    for node in nodes:
        value = node(g, value)
    return g.model(value).graph.outputs[0]


def test_sources_go_through_moves_and_factors_of_one_number():
    value = chain(
        lambda g, x: g("Mul", g.array(3.0), x),
        lambda g, x: g.transpose(x, 0, 2, 1),
        lambda g, x: g("Div", x, g.array([2.0])),
        lambda g, x: g("Unsqueeze", x, g.shape(1)),
    )
    found = list(sources(value, lambda layout: layout, scaled=True))
    assert [(source.factor, source.moves) for source in found] == [(1, 3), (1, 3), (0.5, 2), (0.5, 1), (1.5, 0)]
    assert found[-1].value.name == "x"
    assert found[-1].layout == regrouped(transposed(plain((2, 3, 4)), (0, 2, 1)), (2, 1, 4, 3))
    assert len(list(sources(value, lambda layout: layout, scaled=False))) == 2


@pytest.mark.parametrize(
    "node",
    [
        lambda g, x: g("Mul", x, g.array(np.ones((3, 1)))),
        lambda g, x: g("Mul", x, g.array(np.full((1, 1, 1, 1), 2.0))),
        lambda g, x: g("Div", g.array(2.0), x),
        lambda g, x: g("Relu", x),
        lambda g, x: g("Gather", x, g.shape(0, 2), axis=1),
        lambda g, x: g("Gather", x, g.shape(0, 1, 0, 1), axis=0),
        lambda g, x: g("Concat", x, g("Relu", x), axis=0),
    ],
)
def test_sources_stop_at_what_does_more(node):
    assert len(list(sources(chain(node), lambda layout: layout, scaled=True))) == 1


def test_of_axes_to_drop_one_place_is_enough():
    value = ir.Value(name="mask", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((1, 1, 1, 6)))
    layout = expanded(plain((1, 1, 1, 6)), (2, 4, 5, 6))
    assert layout is not None
    assert plan(Source(value, layout, 1.0, 0), (0, 1, 2)).steps == ()
    whole = plan(Source(value, layout, 1.0, 0), (0, 1))
    assert whole.shape == (1, 1, 5, 6)
    assert [word for word, _ in whole.steps] == ["Reshape", "Expand", "Reshape"]


def test_a_gather_that_repeats_each_place_is_a_move():
    value = chain(lambda g, x: g("Gather", x, g.shape(0, 0, 1, 1, 2, 2), axis=1))
    node = value.producer()
    assert node is not None
    assert moved(node, plain((2, 3, 4))) == repeated(plain((2, 3, 4)), 1, 2, each=True)

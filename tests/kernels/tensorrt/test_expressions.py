"""Numbers that hang on dimensions: what they are, and that TensorRT would work them out alike."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tilewright.kernels.tensorrt.expressions import (
    Expression,
    ceil_div,
    dimension,
    evaluate,
    from_plain,
    is_static,
    lowered,
    minimum,
    product,
    to_plain,
)

X, Y = dimension("x", 0), dimension("y", 1)
SIZES = {("x", 0): 7, ("y", 1): 100}


def test_arithmetic():
    for number, value in (
        (X + 1, 8),
        (1 + X, 8),
        (Y - 2, 98),
        (X * Y, 700),
        (3 * X, 21),
        (Y // 8, 12),
        (ceil_div(Y, 8), 13),
        (minimum(Y, 64), 64),
        (product((X, 2, Y)), 1400),
        (product(()), 1),
        ((X - 9) // 4, -1),  # rounds down, as TensorRT's FLOOR_DIV
    ):
        assert evaluate(number, SIZES) == value


def test_what_is_known_is_worked_out_at_once():
    assert (ceil_div(100, 8), minimum(3, 4), product((2, 3))) == (13, 3, 6)
    assert is_static(7)
    assert not is_static(X)


def test_what_changes_nothing_is_left_out():
    assert X + 0 == X == X * 1 == 1 * X == X // 1 == ceil_div(X, 1)


numbers = st.recursive(
    st.integers(0, 1000) | st.sampled_from([X, Y]),
    lambda inner: (
        st.builds(Expression, st.sampled_from(["+", "-", "*", "min", "max"]), inner, inner)
        | st.builds(Expression, st.sampled_from(["//", "ceil_div"]), inner, st.integers(1, 64))
    ),
    max_leaves=6,
)


@given(numbers)
def test_a_file_holds_them(number):
    assert from_plain(json.loads(json.dumps(to_plain(number)))) == number


class Shape:
    """`tensorrt.plugin.ShapeExpr` as far as it is used: it knows ints on its right, and ints know nothing of it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def _with(self, other: Any, operation: Any) -> Shape:
        return Shape(operation(self.value, other.value if isinstance(other, Shape) else other))

    def __add__(self, other: Any) -> Shape:
        return self._with(other, lambda a, b: a + b)

    def __sub__(self, other: Any) -> Shape:
        return self._with(other, lambda a, b: a - b)

    def __mul__(self, other: Any) -> Shape:
        return self._with(other, lambda a, b: a * b)

    def __floordiv__(self, other: Any) -> Shape:
        return self._with(other, lambda a, b: a // b)


class Plugin:
    """`tensorrt.plugin` likewise."""

    ShapeExpr = Shape

    @staticmethod
    def cdiv(first: Shape, second: Any) -> Shape:
        return first._with(second, lambda a, b: -(-a // b))

    @staticmethod
    def min(first: Shape, second: Any) -> Shape:
        return first._with(second, min)

    @staticmethod
    def max(first: Shape, second: Any) -> Shape:
        return first._with(second, max)


@given(numbers)
def test_lowering_keeps_the_value(number):
    found = lowered(number, {place: Shape(size) for place, size in SIZES.items()}, Plugin)
    assert (found.value if isinstance(found, Shape) else found) == evaluate(number, SIZES)

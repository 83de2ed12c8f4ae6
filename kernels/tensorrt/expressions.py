"""Integers that may hang on dimensions which are known only at run time: sizes, grids and shapes of a plugin.

`Expression` is a tree of the arithmetic that TensorRT evaluates before every launch. The same tree is evaluated here
for given sizes, lowered to `tensorrt.plugin` expressions, and written to a file with a launch plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Sizes = Mapping[tuple[str, int], int]
"""The dimensions of tensors, by name and axis."""

_EVALUATE: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "ceil_div": lambda a, b: -(-a // b),
    "min": min,
    "max": max,
}


@dataclass(frozen=True, slots=True)
class Expression:
    """An operation on two numbers, or (`operation` "dim") the size of one axis of the tensor of that name."""

    operation: str
    left: Number | str
    right: Number

    def __add__(self, other: Number) -> Number:
        return _made("+", self, other)

    def __radd__(self, other: int) -> Number:
        return _made("+", self, other)

    def __sub__(self, other: Number) -> Number:
        return _made("-", self, other)

    def __rsub__(self, other: int) -> Number:
        return _made("-", other, self)

    def __mul__(self, other: Number) -> Number:
        return _made("*", self, other)

    def __rmul__(self, other: int) -> Number:
        return _made("*", self, other)

    def __floordiv__(self, other: Number) -> Number:
        return _made("//", self, other)


Number = int | Expression


def dimension(tensor: str, axis: int) -> Expression:
    """The size of a tensor's axis, as yet unknown."""
    return Expression("dim", tensor, axis)


def ceil_div(left: Number, right: Number) -> Number:
    """left / right, rounded up."""
    return _made("ceil_div", left, right)


def minimum(left: Number, right: Number) -> Number:
    """The smaller of two."""
    return _made("min", left, right)


def product(numbers: tuple[Number, ...]) -> Number:
    """The product of all, 1 of none."""
    total: Number = 1
    for number in numbers:
        total = total * number
    return total


def _made(operation: str, left: Number, right: Number) -> Number:
    if isinstance(left, int) and isinstance(right, int):
        return _EVALUATE[operation](left, right)
    # What changes nothing stays out: TensorRT evaluates these before every launch.
    if (operation == "+" and right == 0) or (operation in ("*", "//", "ceil_div") and right == 1):
        return left
    if operation == "*" and left == 1:
        return right
    return Expression(operation, left, right)


def is_static(number: Number) -> bool:
    """Whether it hangs on no dimension."""
    return isinstance(number, int)


def evaluate(number: Number, sizes: Sizes) -> int:
    """The value for given sizes."""
    if isinstance(number, int):
        return number
    if number.operation == "dim":
        return sizes[number.left, number.right]  # type: ignore[index]  # a dim's are a name and an axis
    assert not isinstance(number.left, str)
    return _EVALUATE[number.operation](evaluate(number.left, sizes), evaluate(number.right, sizes))


def lowered(number: Number, dims: Mapping[tuple[str, int], Any], plugin: Any) -> Any:
    """The number as `tensorrt.plugin` has it: an int, or a `ShapeExpr` made of those in `dims`."""
    if isinstance(number, int):
        return number
    if number.operation == "dim":
        return dims[number.left, number.right]  # type: ignore[index]
    assert not isinstance(number.left, str)
    left, right = lowered(number.left, dims, plugin), lowered(number.right, dims, plugin)
    if isinstance(left, int):
        left = plugin.ShapeExpr(left)  # an int on the left knows nothing of expressions
    return _LOWER[number.operation](left, right, plugin)


_LOWER: dict[str, Callable[[Any, Any, Any], Any]] = {
    "+": lambda a, b, plugin: a + b,
    "-": lambda a, b, plugin: a - b,
    "*": lambda a, b, plugin: a * b,
    "//": lambda a, b, plugin: a // b,
    "ceil_div": lambda a, b, plugin: plugin.cdiv(a, b),
    "min": lambda a, b, plugin: plugin.min(a, b),
    "max": lambda a, b, plugin: plugin.max(a, b),
}


def to_plain(number: Number) -> Any:
    """As JSON has it: an int, or [operation, left, right]."""
    if isinstance(number, int):
        return number
    left = number.left if isinstance(number.left, str) else to_plain(number.left)
    return [number.operation, left, to_plain(number.right)]


def from_plain(value: Any) -> Number:
    """The inverse of `to_plain`."""
    if isinstance(value, int):
        return value
    operation, left, right = value
    return Expression(operation, left if operation == "dim" else from_plain(left), from_plain(right))

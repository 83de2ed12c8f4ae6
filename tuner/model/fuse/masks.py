"""What masks of scores come to: a band of keys that each query sees, which kernels know without reading anything, and
one bias of shape (B or 1, H or 1, Sq or 1, Skv) for the rest.

A constant mask that hides all but a band of diagonals is causal, a window, or both. Everything else stays a bias, made
in the order in which the model applies its masks, and once for all layers that share them.

Of a row that sees no key at all, as of a batch that is padding, a model makes the mean of all values where a large
number stands in the place of scores, and what its scores say where one is added to them. So does the bias: what stands
for a number in the place of scores is so large that fp32 loses the score in the sum (`absorbing`).

Two such rows are the exception to equality. Of masks of -∞ a model gives NaN, and a bias of -∞ gives 0. And where a
constant mask is a band, a query that is padding and stands before its sequence gets the mean over the keys of the band,
and not of all. No other row ever reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.fuse.layout import (
    Layout,
    Maker,
    Plan,
    Shape,
    expanded,
    plan,
    regrouped,
    sources,
    typed,
)
from tilewright.tuner.model.fuse.opening import new_constant
from tilewright.tuner.model.fuse.scores import LOW, Mask, UnmatchedError, uniform
from tilewright.tuner.model.graph import Array, constant, is_constant, static_shape

ABSORBED = -1e8
"""A number from which on fp32 loses most scores that are added to it: its last digit is 8."""

_LARGER, _LEAST = 1e26, -1e38

ABSORBING = float(np.float32(_LEAST)), float(np.float32(LOW * _LARGER))
"""The least finite number that `absorbing` gives of a mask, and the largest, as a bias in fp32 has them."""

_BROADCAST = (0, 1, 2)  # axes of a bias along which one place will do


@dataclass(frozen=True, slots=True)
class Band:
    """Keys that a query sees: from so many before its own place to so many behind it; None: all."""

    left: int | None = None
    right: int | None = None

    def __and__(self, other: Band) -> Band:
        pairs = ((self.left, other.left), (self.right, other.right))
        return Band(*(min((end for end in pair if end is not None), default=None) for pair in pairs))

    def settings(self) -> dict[str, int]:
        """As the plugin has it."""
        found = {} if self.left is None else {"window_left": self.left}
        if self.right is not None:
            found |= {"causal": 1} if self.right == 0 else {"window_right": self.right}
        return found

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Band:
        """That of a plugin's settings, all of them given."""
        left, right = settings["window_left"], 0 if settings["causal"] else settings["window_right"]
        return cls(None if left < 0 else left, None if right < 0 else right)

    def seen(self, queries: int, keys: int) -> Array:
        """Which keys each query sees, of shape (Sq, Skv): the last query stands at the last key."""
        distance = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
        seen = np.ones((queries, keys), bool)
        if self.left is not None:
            seen &= distance >= -self.left
        if self.right is not None:
            seen &= distance <= self.right
        return seen


@dataclass(frozen=True, slots=True)
class Term:
    """A mask as part of a bias."""

    mask: Mask
    plan: Plan


@dataclass(frozen=True, slots=True)
class Masking:
    """All masks of some scores."""

    band: Band
    terms: tuple[Term, ...]

    @property
    def cost(self) -> tuple[int, int]:
        """Moves of data, and nodes."""
        costs = [term.plan.cost for term in self.terms]
        return sum(moves for moves, _ in costs), sum(nodes for _, nodes in costs)

    @property
    def shape(self) -> Shape:
        """That of the bias."""
        return tuple(np.broadcast_shapes(*(term.plan.shape for term in self.terms)))

    def asked(self) -> ir.Value | None:
        """A value as the bias will be, to ask a plugin with; None if there is none."""
        if not self.terms:
            return None
        return ir.Value(name="bias", type=ir.TensorType(_kind(self.terms)), shape=ir.Shape(self.shape))


def absorbing(fill: float) -> float:
    """What is added to a score in a mask's place where the mask puts a number instead of it: larger by so much that
    nothing of the score is left, in the same order as other such numbers down to -10¹², and finite times log₂e, as
    kernels have it. All below come to the same: `masking` has only one of them."""
    return fill if math.isinf(fill) else max(fill * _LARGER, _LEAST)


def _kind(terms: Sequence[Term]) -> ir.DataType:
    """The data type of a bias: that of all masks that are added, or fp32."""
    if any(term.mask.replaces for term in terms):
        return ir.DataType.FLOAT
    kinds = {term.mask.value.dtype for term in terms if term.mask.kind == "add"}
    kind = kinds.pop() if len(kinds) == 1 else None
    return kind or ir.DataType.FLOAT


class Bands:
    """Finds bands in constant masks, in each once."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[Band, Mask | None]] = {}

    def of(self, mask: Mask, planned: Plan, shape: Shape) -> tuple[Band, Mask | None]:
        """The band of a constant mask of scores of a shape (B, H, Sq, Skv), and what is left of it, if anything is."""
        key = (mask, planned.steps, shape)
        if key not in self._known:
            self._known[key] = _parted(mask, planned, shape)
        return self._known[key]


def _parted(mask: Mask, planned: Plan, shape: Shape) -> tuple[Band, Mask | None]:
    array = constant(Maker().follow(None, planned.source, planned.steps, "mask"))
    assert array is not None
    if mask.kind == "hide":
        hides = array == mask.hidden
        array = np.where(hides, np.float32(mask.fill), np.float32(0))
    elif mask.factor != 1:
        array = _times(array, mask.factor)
    found = band(array, *shape[2:])
    if found is not None:
        array = np.where(found.seen(*shape[2:]), array, np.zeros((), array.dtype))
    if not array.any():
        return found or Band(), None
    if found is None and mask.kind == "add" and mask.factor == 1:
        return Band(), mask
    if mask.replaces:
        # Not a sum, in which keys that two masks hide would be further from the others of their row than in the model.
        value = new_constant(_narrowed(hides), f"{mask.value.name}_hides")
        return Band(), replace(mask, value=value, place=shape, hidden=True)
    value = new_constant(_narrowed(array), f"{mask.value.name}_bias")
    return found or Band(), Mask("add", value, shape)


def band(array: Array, queries: int, keys: int) -> Band | None:
    """The band outside of which a mask of shape (B or 1, H or 1, Sq or 1, Skv) hides every key, and inside of which
    none; None if it hides others, or nothing, or all keys of a row."""
    hidden = array <= LOW
    if not hidden.any() or not np.array_equal(hidden.all((0, 1)), hidden.any((0, 1))):
        return None
    seen = ~np.broadcast_to(hidden[0, 0], (queries, keys))
    distance = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
    if not seen.any(axis=1).all():
        return None
    low, high = int(distance[seen].min()), int(distance[seen].max())
    found = Band(None if low <= distance.min() else -low, None if high >= distance.max() else high)
    if low > 0 or high < 0 or not np.array_equal(seen, found.seen(queries, keys)):
        return None
    return found


def _narrowed(array: Array) -> Array:
    """One place of each axis but the last along which all are the same."""
    for axis in _BROADCAST:
        first = array.take([0], axis)
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return np.ascontiguousarray(array)


def _times(array: Array, factor: float) -> Array:
    """A mask times a factor; what was finite stays so."""
    wide = array.astype(np.float64) * factor
    least = float(ml_dtypes.finfo(array.dtype).min)
    return np.where(np.isinf(wide), wide, np.maximum(wide, least)).astype(array.dtype)


def masking(masks: Sequence[Mask], shape: Shape, bands: Bands) -> Masking:
    """What masks of scores of a shape (B, H, Sq, Skv) come to.

    Raises:
        UnmatchedError: one can't be brought into that shape, or what they put in the place of scores can't be told
            apart.
    """
    found, terms = Band(), []
    least: set[float] = set()
    for mask in masks:
        layout, planned = _arranged(mask, shape)
        if mask.kind == "add" and all(not stride for _, stride in layout[3]) and shape[3] > 1:
            continue  # the same for all keys: a softmax does not see it
        known, rest = _known(mask, planned, shape, bands) or (Band(), [Term(mask, planned)])
        found &= known
        terms += rest
        if rest and mask.replaces and absorbing(mask.fill) == _LEAST:
            least.add(mask.fill)
    if len(least) > 1:
        # A row that they hide altogether is the mean of the values of keys with the larger number alone.
        numbers = " and ".join(f"{fill:g}" for fill in sorted(least))
        raise UnmatchedError(f"its masks put {numbers} in the place of scores, which a bias has not both")
    for place, term in enumerate(terms):
        # Of a row that is hidden altogether the model makes what is added afterwards.
        added = any(not each.mask.replaces for each in terms[place + 1 :])
        if added and term.mask.replaces and term.mask.fill > ABSORBED:
            puts = f"its mask {term.mask.value.name!r} puts {term.mask.fill:g} in the place of scores"
            raise UnmatchedError(f"{puts}, and another is added")
    return Masking(found, tuple(terms))


def _known(mask: Mask, planned: Plan, shape: Shape, bands: Bands) -> tuple[Band, list[Term]] | None:
    """The band of a mask that is constant, or of the parts of one that are, and what is left of it; None if no part is
    a band."""
    if is_constant(planned.source):
        found, left = bands.of(mask, planned, shape)
        return found, [] if left is None else [Term(left, _arranged(left, shape)[1])]
    hiding = _hiding(mask)
    if hiding is None:
        return None
    found, rest, parts = Band(), [], list(_parts(hiding))
    for part in parts:
        planned = _arranged(part, shape)[1]
        if is_constant(planned.source):
            known, left = bands.of(part, planned, shape)
            if left is None:
                found &= known
                continue
        rest.append(Term(part, planned))
    return (found, rest) if len(rest) < len(parts) else None


def _hiding(mask: Mask) -> Mask | None:
    """A mask of scores as one that hides, if it is: 0 or a large negative number is added, as a condition says."""
    if mask.kind == "hide":
        return mask
    node = mask.value.producer()
    if node is None or node.domain != "" or node.op_type != "Where":
        return None
    condition, chosen, other = node.inputs
    assert condition is not None
    for value, none, hidden in ((chosen, other, True), (other, chosen, False)):
        fill = None if value is None else uniform(value)
        if none is not None and fill is not None and uniform(none) == 0 and fill * mask.factor <= LOW:
            return Mask("hide", condition, mask.place, fill=fill * mask.factor, hidden=hidden, adds=True)
    return None


def _parts(mask: Mask) -> Iterator[Mask]:
    """The masks that together hide what one hides: operands of `And` where it says what is seen, of `Or` where it says
    what is not. Hugging Face's masks are a causal one and one of padding."""
    seen: set[tuple[ir.Value, bool]] = set()  # one is enough of what comes twice
    waiting = [(mask.value, mask.hidden)]
    while waiting:
        value, hidden = waiting.pop()
        if (value, hidden) in seen:
            continue
        seen.add((value, hidden))
        node = value.producer()
        joins = "Or" if hidden else "And"
        if node is not None and node.domain == "" and node.op_type in (joins, "Not"):
            for operand in reversed(node.inputs):
                assert operand is not None
                waiting.append((operand, hidden != (node.op_type == "Not")))
        else:
            yield replace(mask, value=value, hidden=hidden)


def _arranged(mask: Mask, shape: Shape) -> tuple[Layout, Plan]:
    def view(layout: Layout) -> Layout | None:
        spread = expanded(layout, mask.place)
        return None if spread is None else regrouped(spread, shape)

    found = [(source.layout, plan(source, _BROADCAST)) for source in sources(mask.value, view, scaled=False)]
    if not found:
        where = f"of shape {static_shape(mask.value)} on scores of {mask.place}"
        raise UnmatchedError(f"its mask {mask.value.name!r} {where} is no bias of scores of {shape}")
    return min(found, key=lambda each: each[1].cost)


def make_bias(op: Any, maker: Maker, terms: Sequence[Term], name: str) -> ir.Value:
    """The bias that terms come to."""
    kind, bias = _kind(terms), None
    for term in terms:
        value = maker.follow(op, term.plan.source, term.plan.steps, f"{name}_mask")
        key = (bias, replace(term.mask, value=value), kind)
        bias = maker.once(key, lambda b=bias, m=key[1]: _applied(op, b, m, kind, f"{name}_mask"))  # type: ignore[misc]
    assert bias is not None
    return bias


def _applied(op: Any, bias: ir.Value | None, mask: Mask, kind: ir.DataType, name: str) -> ir.Value:
    """A bias with one more mask."""
    value, dtype = mask.value, kind.numpy()
    own = static_shape(value) or ()
    shape = np.broadcast_shapes(own, (static_shape(bias) or ()) if bias is not None else ())
    if mask.kind == "hide":
        fill = absorbing(mask.fill) if mask.replaces else mask.fill
        fill = fill if math.isinf(fill) else max(fill, float(ml_dtypes.finfo(dtype).min))
        before, condition = constant(bias), constant(value)
        if condition is not None and (bias is None or before is not None):
            there = np.zeros((), dtype) if before is None else before
            made = np.where(condition == mask.hidden, np.asarray(fill, dtype), there)
            return new_constant(made, f"{value.name}_bias" if bias is None else f"{bias.name}_and_{value.name}")
        pair = [new_constant(np.asarray(fill, dtype), "hidden"), bias or new_constant(np.asarray(0, dtype), "seen")]
        chosen, other = pair if mask.hidden else pair[::-1]
        return typed(op.Where(value, chosen, other), ir.TensorType(kind), shape, f"{name}_Where")
    if value.dtype != kind:
        value = typed(op.Cast(value, to=int(kind)), ir.TensorType(kind), own, f"{name}_Cast")
    if mask.factor != 1:
        factor = new_constant(np.asarray(mask.factor, dtype), "factor")
        value = typed(op.Mul(value, factor), ir.TensorType(kind), own, f"{name}_Mul")
    if bias is None:
        return value
    arrays = [constant(each) for each in (bias, value)]
    if arrays[0] is not None and arrays[1] is not None:
        return new_constant(arrays[0] + arrays[1], f"{bias.name}_and_{value.name}")
    return typed(op.Add(bias, value), ir.TensorType(kind), shape, f"{name}_Add")

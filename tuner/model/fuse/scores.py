"""What lies between Q·Kᵀ and its softmax, read from the softmax back: scale, softcap, masks, and in what order.

`read_scores` follows the scores upstream to the product; `read_weights` does the same from the second product back to
the softmax. What masks come to, as one bias and a band of keys, is for `masks.py` to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.fuse.layout import RESHAPES, Layout, Shape, moved, plain
from tilewright.tuner.model.fuse.opening import FLOATS
from tilewright.tuner.model.graph import constant, dtype_name, scalar, static_shape

LOW = -9984.0
"""A mask's value from which on a weight is taken for 0. Models have -10⁴, which in bf16 is -9984, -10⁹, the least of a
data type or -∞; a number nearer to 0 may be a bias that means itself."""

PRODUCTS = ("MatMul", "Einsum")
_LONGEST = 24


class UnmatchedError(Exception):
    """A chain that is not an attention, or not one that is understood; the message says where it stops."""


@dataclass(frozen=True, slots=True)
class Mask:
    """One step of masking scores.

    `add`: scores + factor · value. `hide`: `fill` instead of the score where the boolean value is `hidden`, or, with
    `adds`, added to it there.
    """

    kind: str
    value: ir.Value
    place: Shape  # of the scores there
    factor: float = 1.0
    fill: float = -math.inf
    hidden: bool = False
    adds: bool = False

    @property
    def replaces(self) -> bool:
        """Whether a finite number stands in the place of scores."""
        return self.kind == "hide" and not self.adds and math.isfinite(self.fill)


@dataclass(frozen=True, slots=True)
class Rows:
    """A factor that rows of scores have each their own of: `Mul` or `Div` by a value whose last dimension is 1."""

    operator: str
    value: ir.Value
    place: Shape


@dataclass(slots=True)
class Scores:
    """scores = masks of softcap · tanh(scale · Q·Kᵀ / softcap), or of scale · Q·Kᵀ where softcap is 0."""

    product: ir.Node
    scale: float = 1.0
    softcap: float = 0.0
    rows: list[Rows] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)  # in the order in which they are applied
    places: list[Shape] = field(default_factory=list)  # every shape that the scores have


@dataclass(frozen=True, slots=True)
class Weights:
    """The softmax behind an operand of a product."""

    softmax: ir.Node
    layout: Layout  # of the operand, the softmax's result being the source
    guards: tuple[tuple[ir.Value, bool], ...]  # after the softmax, weights are 0 where a mask has a value
    places: tuple[Shape, ...]


def read_weights(operand: ir.Value) -> Weights | None:
    """The softmax that an operand comes from by way of casts, moves and guards; None if it does not.

    Raises:
        UnmatchedError: it does, but the weights are needed elsewhere, too.
    """
    guards: list[tuple[ir.Value, bool]] = []
    chain: list[ir.Node] = []
    value = operand
    for _ in range(_LONGEST):
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs:
            return None
        chain.append(node)
        if node.op_type == "Softmax":
            break
        if node.op_type == "Where":
            guarded = _guarded(node)
            if guarded is None:
                return None
            value, mask, when = guarded
            guards += [] if mask is None else [(mask, when)]
        elif node.op_type in ("Cast", "Identity", "Transpose", *RESHAPES):
            value = _first(node)
        else:
            return None
    else:
        return None
    *after, softmax = chain
    for each in chain:
        _used_once(each.outputs[0], "weights")
    places = tuple(_shape(each.outputs[0]) for each in chain)
    layout: Layout | None = plain(places[-1])
    for each in reversed(after):
        if layout is not None and each.op_type not in ("Cast", "Where"):
            layout = moved(each, layout)
    if layout is None:
        raise UnmatchedError("its weights are reshaped on their way from the softmax")
    return Weights(softmax, layout, tuple(guards), places)


def _guarded(node: ir.Node) -> tuple[ir.Value, ir.Value | None, bool] | None:
    """Of `Where` that makes some weights 0: the weights, the mask, and its value there; no mask where they are NaN."""
    condition, chosen, other = node.inputs
    assert condition is not None
    assert chosen is not None
    assert other is not None
    weights = other if scalar(chosen) == 0 else chosen if scalar(other) == 0 else None
    if weights is None:
        return None
    asked = condition.producer()
    if asked is not None and asked.op_type == "IsNaN" and asked.inputs[0] is weights and weights is other:
        return weights, None, True
    return weights, condition, weights is other


def read_scores(softmax: ir.Node) -> Scores:
    """What a softmax is of.

    Raises:
        UnmatchedError: no product of queries and keys, or something between that kernels don't have.
    """
    value = _first(softmax)
    shape = _shape(value)
    axis = softmax.attributes.get_int("axis", -1) or 0
    if axis % len(shape) != len(shape) - 1:
        raise UnmatchedError(f"its softmax is along axis {axis} of {shape}: kernels have the last")
    masks: list[Mask] = []  # from the softmax back
    rows: list[Rows] = []
    places: list[Shape] = []
    factor, softcap, shifted = 1.0, 0.0, False
    for _ in range(_LONGEST):
        node = value.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            raise UnmatchedError(_stop(value, node))
        unshifted = _shift(node)
        if not shifted:
            _used_once(value, "scores")
        shifted = unshifted is not None
        place = _shape(value)
        places.append(place)
        if node.op_type in PRODUCTS:
            found = Scores(node, factor, softcap, rows[::-1], masks[::-1], places)
            found.scale *= softcap or 1.0
            return found
        if node.op_type in ("Identity", *RESHAPES) or _is_float_cast(node):
            value = _first(node)
        elif unshifted is not None:
            value = unshifted
        elif node.op_type in ("Max", "Clip") and not rows and _is_floor(node, factor):
            value = _scores_of(node)
        elif node.op_type in ("Mul", "Div"):
            value, by = _multiplied(node)
            number = scalar(by)
            if number is not None and not (number == 0 and node.op_type == "Div"):
                factor *= 1 / number if node.op_type == "Div" else number
            elif (_shape(by) or (1,))[-1] == 1:
                rows.append(Rows(node.op_type, by, place))
            else:
                raise UnmatchedError(
                    f"its scores are multiplied by {by.name!r} of shape {_shape(by)}: kernels have one scale"
                )
        elif node.op_type == "Tanh":
            if softcap or factor <= 0 or rows:
                raise UnmatchedError(f"{node.op_type} {node.name!r} between the product and the softmax is no softcap")
            softcap, factor, value = factor, 1.0, _first(node)
        elif node.op_type in ("Add", "Sub", "Where"):
            if softcap or rows:
                after = "softcap" if softcap else "factors of rows"
                raise UnmatchedError(f"a mask, {node.op_type} {node.name!r}, comes before the {after}")
            value, mask = _masked(node, factor, place)
            masks.append(mask)
        else:
            raise UnmatchedError(_stop(value, node))
    raise UnmatchedError("there is no product of queries and keys near its softmax")


def _stop(value: ir.Value, node: ir.Node | None) -> str:
    if node is None:
        return f"its scores are {value.name!r}, and no product of queries and keys"
    return f"its scores come by way of {node.op_type} {node.name!r}, which kernels don't have"


def _shift(node: ir.Node) -> ir.Value | None:
    """Of scores minus the largest of their row, or of several, which a softmax does not see: the scores."""
    if node.op_type != "Sub":
        return None
    scores, largest = node.inputs
    assert scores is not None
    asked = None if largest is None else largest.producer()
    if largest is None or asked is None or asked.op_type != "ReduceMax" or asked.inputs[0] is not scores:
        return None
    if (_shape(largest) or (1,))[-1] != 1:
        return None  # keys have each their own
    uses = {user for user, _ in scores.uses()}
    return scores if uses == {node, asked} and not scores.is_graph_output() else None


def _multiplied(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Scores and factor of a product or quotient."""
    first, second = node.inputs
    assert first is not None
    assert second is not None
    if node.op_type == "Mul" and scalar(second) is None and (scalar(first) is not None or not _reaches(first)):
        return second, first
    return first, second


def _masked(node: ir.Node, factor: float, place: Shape) -> tuple[ir.Value, Mask]:
    """Scores and mask of a sum, difference or choice, all times a factor."""
    if node.op_type == "Where":
        condition, chosen, other = node.inputs
        assert condition is not None
        assert chosen is not None
        assert other is not None
        for fill_value, scores, hidden in ((chosen, other, True), (other, chosen, False)):
            fill = uniform(fill_value)
            if fill is not None:
                fill *= factor
                if fill > LOW:
                    raise UnmatchedError(
                        f"Where {node.name!r} puts {fill:g} for hidden scores: a mask has {LOW:g} or less"
                    )
                return scores, Mask("hide", condition, place, fill=fill, hidden=hidden)
        raise UnmatchedError(f"Where {node.name!r} chooses between scores and what is no constant")
    first, second = node.inputs
    assert first is not None
    assert second is not None
    if node.op_type == "Sub":
        return first, Mask("add", second, place, factor=-factor)
    # Where both come from products, scores are the one that is not broadcast.
    if _reaches(first) and (_shape(first) == place or not _reaches(second)):
        return first, Mask("add", second, place, factor=factor)
    return second, Mask("add", first, place, factor=factor)


def _reaches(value: ir.Value) -> bool:
    """Whether a value comes from a product, by way of at most `_LONGEST` nodes that scores may go through."""
    seen: set[ir.Node] = set()  # of `Add(a, a)` upon `Add(a, a)` the ways are 2 to the power of the nodes
    level = [value]
    for _ in range(_LONGEST + 1):
        ways: list[ir.Value | None] = []
        for each in level:
            node = each.producer()
            if node is None or node.domain != "" or node in seen:
                continue
            seen.add(node)
            if node.op_type in PRODUCTS:
                return True
            if node.op_type in ("Add", "Mul", "Max"):
                ways += node.inputs
            elif node.op_type == "Where":
                ways += node.inputs[1:]
            elif node.op_type in ("Cast", "Clip", "Div", "Identity", "Sub", "Tanh", *RESHAPES):
                ways += node.inputs[:1]
        level = [way for way in ways if way is not None]
    return False


def _is_floor(node: ir.Node, factor: float) -> bool:
    """Whether a node keeps scores, which are multiplied by a factor after it, above what a mask may put there, and does
    nothing else: `Max` with the least number."""

    def is_low(value: ir.Value | None) -> bool:
        bound = scalar(value)
        return bound is not None and factor > 0 and bound * factor <= LOW

    if node.op_type == "Max":
        return len(node.inputs) == 2 and any(map(is_low, node.inputs))
    low, high = ([*node.inputs[1:], None, None])[:2]
    return high is None and (low is None or is_low(low))


def _scores_of(node: ir.Node) -> ir.Value:
    first = _first(node)
    if node.op_type == "Max" and scalar(first) is not None:
        assert node.inputs[1] is not None
        return node.inputs[1]
    return first


def uniform(value: ir.Value) -> float | None:
    """The number that all elements of a constant are, or None; -∞ and NaN count as numbers."""
    number = scalar(value)
    if number is not None:
        return number
    array = constant(value)
    if array is None or not array.size:
        return None
    flat = array.reshape(-1)
    return float(flat[0]) if np.array_equal(flat, np.full_like(flat, flat[0])) else None


def _is_float_cast(node: ir.Node) -> bool:
    return node.op_type == "Cast" and all(dtype_name(value) in FLOATS for value in (_first(node), node.outputs[0]))


def _used_once(value: ir.Value, what: str) -> None:
    """
    Raises:
        UnmatchedError: someone else uses a value, so that it has to be there anyway.
    """
    if value.is_graph_output():
        raise UnmatchedError(f"its {what}, {value.name!r}, are an output of the model")
    users = {user for user, _ in value.uses()}
    # A guard against NaN asks and chooses.
    asking = {user for user in users if user.op_type == "IsNaN"}
    if len(users - asking) > 1 or (asking and len(users) != 2):
        names = ", ".join(sorted(f"{user.op_type} {user.name!r}" for user in users))
        raise UnmatchedError(f"its {what}, {value.name!r}, are used more than once: by {names}")


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _shape(value: ir.Value) -> Shape:
    """
    Raises:
        UnmatchedError: it is not known.
    """
    shape = static_shape(value)
    if shape is None:
        raise UnmatchedError(f"the shape of {value.name!r} is not known")
    return shape

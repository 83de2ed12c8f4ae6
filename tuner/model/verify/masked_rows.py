"""Rows of attention that see no key, as those of padding in front of a sequence: what a model makes of them means
nothing, and they are left out where two models are compared.

A causal mask and one of padding hide every key of a query that is padding itself. Of such a row a model makes the mean
of values; of which values, or whether NaN, depends on how it applies its masks (docs/models.md). From there on the row
means nothing in what is computed row by row, and no other row reads it, since the same mask hides it as a key.

So values are followed from attentions on, for as long as it is certain where they have the rows: as (B, H, S, D), or as
dimensions in front that come to B·S. Behind anything else, as a mean over rows or the last one alone, all counts again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.fuse.masks import Band
from tilewright.tuner.model.fuse.scores import LOW
from tilewright.tuner.model.graph import is_constant, is_fused, op_of, plugin_inputs, plugin_settings, static_shape

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]

_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu"),
        *("Pow", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh", "Where"),
    }
)
_RESHAPES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_LAST_AXIS = frozenset({"LayerNormalization", "LogSoftmax", "RMSNormalization", "Softmax"})
_PRODUCTS = frozenset({"Gemm", "MatMul"})


@dataclass(frozen=True, slots=True)
class Masking:
    """What decides on the rows of an attention: its bias, which the model works out, and the band of keys seen."""

    bias: str
    band: Band
    shape: tuple[int, int, int]  # B, Sq, Skv

    def rows(self, bias: Array) -> Array:
        """The rows, of shape (B, Sq), whose keys are hidden in every head."""
        batch, queries, keys = self.shape
        hidden = np.asarray(((bias <= LOW) | ~self.band.seen(queries, keys)).all(axis=-1))
        return np.broadcast_to(hidden.all(axis=1), (batch, queries))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value has the rows of attentions, and of which."""

    heads: bool  # as (B, H, S, D); else its first dimensions come to B·S
    batch: int
    length: int
    maskings: frozenset[Masking]

    def leading(self, shape: Shape) -> int | None:
        """How many dimensions of a shape come to B·S; None if none do."""
        sizes = [math.prod(shape[:end]) for end in range(len(shape) + 1)]
        # Of several, as before dimensions of 1, the last.
        found = [end for end, size in enumerate(sizes) if size == self.batch * self.length]
        return found[-1] if found else None


class RowPlaces:
    """Which values of a fused model have rows that an attention may hide altogether, and where.

    Attributes:
        maskings: of the attentions whose bias depends on the inputs, each once.
    """

    def __init__(self, model: ir.Model) -> None:
        self._places: dict[str, _Place] = {}
        found: dict[ir.Value, _Place] = {}
        for node in model.graph:
            for output in node.outputs:
                place = _of_output(node, output, found)
                if place is not None:
                    found[output] = self._places[str(output.name)] = place
        self.maskings = tuple(dict.fromkeys(each for place in found.values() for each in _ordered(place)))

    def masked(self, biases: Mapping[str, Array]) -> MaskedRows:
        """The rows that are hidden, from the values of the biases for one feed."""
        return MaskedRows(self._places, {each: each.rows(biases[each.bias]) for each in self.maskings})


@dataclass(frozen=True, slots=True, eq=False)
class MaskedRows:
    """The rows of one feed that see no key."""

    places: Mapping[str, _Place] = field(default_factory=dict)
    rows: Mapping[Masking, Array] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many rows there are, those of attentions of one length once."""
        lengths = {(each.shape[0], each.shape[1]) for each in self.rows}
        return sum(int(np.count_nonzero(self._joined(length, self.rows))) for length in lengths)

    def of(self, name: str, shape: Shape) -> Array | None:
        """Which elements of a value are of such rows, as an array that goes together with its shape; None: none is."""
        place = self.places.get(name)
        if place is None:
            return None
        rows = self._joined((place.batch, place.length), place.maskings)
        if not rows.any():
            return None
        if place.heads:
            same = len(shape) == 4 and (shape[0], shape[2]) == (place.batch, place.length)
            return rows[:, None, :, None] if same else None
        end = place.leading(shape)
        return None if end is None else rows.reshape(*shape[:end], *(1 for _ in shape[end:]))

    def _joined(self, length: tuple[int, int], maskings: Iterable[Masking]) -> Array:
        joined = np.zeros(length, bool)
        for each in maskings:
            if each.shape[:2] == length:
                joined |= self.rows[each]
        return joined


def _ordered(place: _Place) -> list[Masking]:
    return sorted(place.maskings, key=lambda each: each.bias)


def _of_output(node: ir.Node, output: ir.Value, found: Mapping[ir.Value, _Place]) -> _Place | None:
    shape = static_shape(output)
    if shape is None:
        return None
    if is_fused(node):
        return _of_fused(node, found)
    if node.domain != "":
        return None
    given = [(value, found[value]) for value in node.inputs if value is not None and value in found]
    if not given:
        return None
    if node.op_type in _ELEMENTWISE:
        return _joined([place for value, place in given if static_shape(value) == shape])
    first, place = given[0]
    if first is not node.inputs[0]:
        return None
    before = static_shape(first) or ()
    if node.op_type in _RESHAPES:
        return place if _is_reshaped(place, before, shape) else None
    if node.op_type == "Transpose":
        return _turned(place, before, node.attributes.get_ints("perm", []))
    if node.op_type in _LAST_AXIS:
        axis = node.attributes.get_int("axis", -1) % len(shape)
        return place if output is node.outputs[0] and axis == len(shape) - 1 and _is_apart(place, shape) else None
    if node.op_type in _PRODUCTS:
        matrix = node.inputs[1] is not None and len(node.inputs[1].shape or ()) == 2
        turned = node.attributes.get_int("transA", 0)
        return place if matrix and not turned and _is_apart(place, before) else None
    if node.op_type == "Split":
        axis = node.attributes.get_int("axis", 0) % len(shape)
        return place if axis == len(shape) - 1 and _is_apart(place, shape) else None
    return None


def _of_fused(node: ir.Node, found: Mapping[ir.Value, _Place]) -> _Place | None:
    inputs, settings = plugin_inputs(node), plugin_settings(node)
    op = op_of(node)
    if op == "attention":
        places = [found[inputs["q"]]] if inputs["q"] in found and found[inputs["q"]].heads else []
        q, k = static_shape(inputs["q"]), static_shape(inputs["k"])
        assert q is not None
        assert k is not None
        if "bias" in inputs and not is_constant(inputs["bias"]):
            masking = Masking(str(inputs["bias"].name), Band.of(settings), (q[0], q[2], k[2]))
            places.append(_Place(True, q[0], q[2], frozenset({masking})))
        return _joined(places)
    if op == "gemm":
        rows = [inputs[name] for name in ("a", "residual") if inputs.get(name) in found]
        if settings["trans_a"] or len(inputs["b"].shape or ()) != 2:
            return None
    elif op == "rmsnorm":
        rows = [inputs[name] for name in ("x", "residual") if inputs.get(name) in found]
    else:
        return None
    return _joined([found[value] for value in rows if _is_apart(found[value], static_shape(value) or ())])


def _joined(places: Sequence[_Place]) -> _Place | None:
    """One place of all; None where they are not the same."""
    if not places or len({(place.heads, place.batch, place.length) for place in places}) > 1:
        return None
    first = places[0]
    return _Place(first.heads, first.batch, first.length, frozenset().union(*(place.maskings for place in places)))


def _is_apart(place: _Place, shape: Shape) -> bool:
    """Whether the last dimension of a shape is none of rows."""
    if place.heads:
        return len(shape) == 4
    end = place.leading(shape)
    return end is not None and end < len(shape)


def _is_reshaped(place: _Place, before: Shape, after: Shape) -> bool:
    return before == after if place.heads else place.leading(after) is not None


def _turned(place: _Place, shape: Shape, order: Sequence[int]) -> _Place | None:
    """The place behind a transpose: (B, H, S, D) and (B, S, H, D) become each other."""
    if list(order) == [0, 2, 1, 3] and len(shape) == 4:
        if place.heads:
            return _Place(False, place.batch, place.length, place.maskings)
        if shape[:2] == (place.batch, place.length):
            return _Place(True, place.batch, place.length, place.maskings)
    if place.heads:
        return None
    end = place.leading(shape)
    return place if end is not None and list(order[:end]) == list(range(end)) else None

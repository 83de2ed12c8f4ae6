"""Nodes that stay fp32 for the numbers they compute with, whatever their operators: see rules 3 to 5 of `half.py`.

- **Range**: a value that came near the range's end on the calibration data, or no further than where the type begins to
  lose digits, is computed in fp32, and read so.
- **Constants**: so is what has a constant beyond the range, or one that the type has next to no digits of where it
  multiplies or divides. Masks are none of these: a large negative number that is added to scores, or stands in their
  place, on the way to a softmax, does there what any number does that is large enough; so does one that was seen there.
  But a bias of attention that is to leave nothing of a score (`fuse/masks.py`) has no such number in fp16: it stays.
- **Whole numbers**: integers in floats are indices and classes, exact or wrong. fp32 stays behind a cast from integers
  that the type doesn't hold, and in front of a cast to integers and of an `Equal`, as far as numbers are only moved,
  rounded and computed with one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.fuse.masks import ABSORBING
from tilewright.tuner.model.graph import (
    DTYPES,
    constant,
    dtype_name,
    is_constant,
    is_fused,
    op_of,
    plugin_inputs,
)

Array = np.ndarray[Any, Any]

ARITHMETIC = frozenset(
    ("Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Neg", "Abs", "Sum", "Where", "Max", "Min", "Clip", "Sign")
)
"""Operators that stay fp32 next to one that does: what norms and masks are decomposed into."""

MOVING = frozenset(
    ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Slice", "Gather", "Concat", "Flatten", "Split", "Pad")
)
"""Operators that only move data: ONNX Runtime has them for bf16."""

COMPARISONS = frozenset(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"))

BOUNDS = frozenset(("Clip", "Min", "Max")) | COMPARISONS
"""Operators whose constants are bounds."""

EXACT_SOURCES = ("bool", "int8", "uint8")
"""Integers that fp16 and bf16 hold exactly."""

_FLOATS = ("fp16", "bf16", "fp32", "fp64", "fp8e4m3", "fp8e5m2")

_WHOLE = ARITHMETIC | MOVING | COMPARISONS | {"Floor", "Ceil", "Round", "Mod", "Expand", "Tile"}
"""Operators that make whole numbers of whole numbers, or only move them."""

_MASKING = (
    MOVING
    | {"Add", "Sub", "Mul", "Div", "Neg", "Where", "Sum", "Max", "Min", "Clip", "Expand", "Tile", "Trilu"}
    | {"ScatterND", "ScatterElements"}
)
"""Operators on a mask's way to the softmax."""

_ANY = frozenset(("Cast", "Shape", "Size"))
_SUMS = frozenset(("Add", "Concat", "Max", "Min", "Sub", "Sum", "Where"))
"""Operators that take a value in whatever type it is."""

FUSED_FP32 = frozenset(
    ("a_scale", "b_scale", "x_scale", "w_scale", "q_scale", "k_scale", "v_scale", "out_scale", "alibi_slopes", "sinks")
)
"""Inputs of fused nodes that stay fp32."""

NORM = "rmsnorm"

STREAMS: Mapping[str, tuple[str, ...]] = {"gemm": ("residual",), "conv2d": ("residual",), NORM: ("x", "residual")}
"""Inputs of fused nodes, by op, that they take in fp32 where what makes them is fp32, whatever they compute in."""

MARGIN = 2
"""How often the largest number seen has to fit into the range, and the smallest normal one into it: other inputs have
larger ones, and smaller."""


def limits(dtype: str) -> tuple[float, float]:
    """The largest number of a half-precision type, and its smallest normal one."""
    info = ml_dtypes.finfo(DTYPES[dtype].numpy())
    return float(info.max), float(info.smallest_normal)


@dataclass(slots=True)
class Kept:
    """What stays fp32 for the sake of its numbers."""

    reasons: dict[ir.Node, str] = field(default_factory=dict)
    wide: set[ir.Value] = field(default_factory=set)  # results of fused nodes that are fp32, and their operands not
    whole: set[ir.Value] = field(default_factory=set)  # integers, and what is made of them
    absorbing: set[ir.Value] = field(default_factory=set)  # biases of attention that fused nodes take in fp32


def kept(
    model: ir.Model,
    target: str,
    extremes: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    pinned: frozenset[ir.Value] = frozenset(),
) -> Kept:
    """What stays fp32 in a model whose fp32 values become a half-precision type otherwise, but for `pinned` ones.

    `extremes` has the least and the largest number of values, by their names, of those that were looked at.
    """
    found = Kept()
    nodes = [node for node in model.graph if not _has_subgraphs(node)]
    masks = _constants(nodes, target, pinned, found)
    _absorbing(nodes, target, found)
    largest, smallest = limits(target)
    limit, least = largest / MARGIN, smallest * MARGIN
    seen = {name: max(high, -low) for name, (low, high) in extremes.items()}
    seen = {name: most for name, most in seen.items() if most > limit or 0 < most < least}
    if seen:
        values = {_named(value): value for value in (*model.graph.inputs, *(v for node in nodes for v in node.outputs))}
        for name in [name for name, most in seen.items() if most < least and _is_lost(values.get(name), seen)]:
            del seen[name]
        for name, most in seen.items():
            # What is large below 0 alone, and reaches nothing but softmaxes, is a mask.
            below = most > limit and extremes[name][1] <= limit
            if below and name in values and _to_softmaxes([values[name]], model.graph) is not None:
                masks.add(name)
        _ranges(nodes, {name: most for name, most in seen.items() if name not in masks}, target, found)
    _integers(nodes, target, found)
    return found


def _constants(nodes: Iterable[ir.Node], target: str, pinned: frozenset[ir.Value], found: Kept) -> set[str]:
    """Keeps nodes for their constants; gives the names of what has masks in it."""
    largest, smallest = limits(target)
    masked: set[str] = set()
    for node in nodes:
        if node.op_type in BOUNDS and node.domain == "":
            continue
        for index, value, array in _given(node):
            if value in pinned:
                continue
            beyond = _beyond(array, largest)
            if beyond:
                hidden = _mask(node, value) if beyond < 0 else None
                if hidden is None:
                    found.reasons[node] = f"{beyond:g} is beyond the range of {target}"
                else:
                    masked |= hidden
            elif _vanishes(node, index, array, smallest):
                found.reasons[node] = f"numbers of {_named(value)} are 0 or denormal in {target}"
    return masked


def _absorbing(nodes: Iterable[ir.Node], target: str, found: Kept) -> None:
    """Keeps biases that take the place of scores, which in a type without such numbers would be added to them; and
    what makes them, sums and choices in which one is such a number, or has one."""
    if limits(target)[0] >= -ABSORBING[1]:
        return
    known: dict[ir.Value | None, bool] = {None: False}
    makers: dict[ir.Value, ir.Node] = {}
    seen: set[ir.Node] = set()
    for node in nodes:
        if is_fused(node) and op_of(node) == "attention":
            bias = plugin_inputs(node).get("bias")
            if bias is None or not (bias in makers or _absorbs(bias, known)):
                continue
            found.absorbing.add(bias)
            waiting: list[ir.Value | None] = [bias]
            while waiting:
                value = waiting.pop()
                maker = None if value is None else makers.get(value)
                if maker is not None and maker not in seen:
                    seen.add(maker)
                    found.reasons[maker] = f"it puts numbers in the place of scores, and {target} has none so large"
                    waiting += _summed(maker)
        elif any(value in makers or _absorbs(value, known) for value in _summed(node)):
            makers[node.outputs[0]] = node


def _summed(node: ir.Node) -> Sequence[ir.Value | None]:
    """What a sum is of, or a choice between, in fp32."""
    if node.domain != "" or node.op_type not in ("Add", "Where") or dtype_name(node.outputs[0]) != "fp32":
        return ()
    return node.inputs if node.op_type == "Add" else node.inputs[1:]


def _absorbs(value: ir.Value | None, known: dict[ir.Value | None, bool]) -> bool:
    """Whether a constant has numbers that `fuse/masks.py` puts in the place of scores."""
    if value not in known:
        array = constant(value) if value is not None and dtype_name(value) == "fp32" else None
        least, most = ABSORBING
        known[value] = array is not None and bool(np.any((least <= array) & (array <= most)))
    return known[value]


def _given(node: ir.Node) -> Iterator[tuple[int, ir.Value | None, Array]]:
    """The fp32 constants of a node that would become the lower type, with their places."""
    if node.op_type == "ConstantOfShape" and node.domain == "":
        fill = node.attributes.get("value")
        if fill is not None and dtype_name(node.outputs[0]) == "fp32":
            yield 0, None, fill.as_tensor().numpy()
        return
    wide = {value for name, value in plugin_inputs(node).items() if name in FUSED_FP32} if is_fused(node) else set()
    for index, value in enumerate(node.inputs):
        if value is not None and is_constant(value) and dtype_name(value) == "fp32" and value not in wide:
            array = constant(value)
            if array is not None and array.size:
                yield index, value, array


def _beyond(array: Array, largest: float) -> float:
    """A finite number of an array that is beyond a range, one that is positive if there is one; 0 without any."""
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        finite = array[np.isfinite(array)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if high > largest:
        return high
    return low if low < -largest else 0.0


def _vanishes(node: ir.Node, index: int, array: Array, smallest: float) -> bool:
    """Whether a node multiplies by an array of which the type has next to no digits, or divides by some such number.
    One factor of many that vanishes beside the others is no loss."""
    if node.op_type == "Div" and node.domain == "" and index == 1:
        return bool(np.any((array != 0) & (np.abs(array) < smallest)))
    factor = node.op_type in ("Mul", "MatMul", "Gemm", "Conv") and node.domain == "" and index < 2
    if is_fused(node):
        factor = node.inputs[index] in [plugin_inputs(node).get(name) for name in ("b", "w", "weight")]
    return factor and bool(0 < max(float(array.max()), -float(array.min())) < smallest)


def _mask(node: ir.Node, value: ir.Value | None) -> set[str] | None:
    """The names of all that is made of a node's constant on its way to softmaxes, if it goes nowhere else."""
    if is_fused(node):
        return set() if _is_bias_of_attention(node, value) else None
    if node.domain != "" or node.op_type not in _MASKING | {"ConstantOfShape"}:
        return None
    return _to_softmaxes(node.outputs, node.graph)


def _to_softmaxes(values: Iterable[ir.Value], graph: ir.Graph | ir.Function | None) -> set[str] | None:
    """The names of the values and of all that is made of them on the way to softmaxes; None if any goes elsewhere."""
    seen: set[ir.Value] = set()
    waiting = list(values)
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.is_graph_output():
            return None
        for user, _ in current.uses():
            if user.graph is not graph:
                return None
            if user.op_type in ("Softmax", "LogSoftmax") or _is_bias_of_attention(user, current):
                continue
            if user.domain != "" or user.op_type not in _MASKING:
                return None
            waiting += user.outputs
    return {_named(each) for each in seen}


def _is_bias_of_attention(node: ir.Node, value: ir.Value | None) -> bool:
    return is_fused(node) and op_of(node) == "attention" and plugin_inputs(node).get("bias") is value


def _ranges(nodes: Iterable[ir.Node], seen: Mapping[str, float], target: str, found: Kept) -> None:
    """Keeps what makes or reads values that come near the range's end, or not out of its beginning."""
    largest, smallest = limits(target)
    for node in nodes:
        if node.op_type in _ANY and node.domain == "":
            continue
        read: Iterable[ir.Value | None] = node.inputs
        if is_fused(node):
            streams = STREAMS.get(op_of(node), ())
            read = [each for name, each in plugin_inputs(node).items() if name not in streams or not _computed(each)]
        made = list(node.outputs)
        if is_fused(node):
            found.wide.update(value for value in node.outputs if _named(value) in seen)
            made = []
        if node.op_type in _SUMS and node.domain == "" and not any(_named(value) in seen for value in made):
            # As `_is_lost`; others may read it as well.
            read = [each for each in read if each is not None and seen.get(_named(each), 0.0) >= smallest * MARGIN]
        names = [_named(value) for value in (*read, *made) if value is not None and dtype_name(value) == "fp32"]
        most = max((seen[name] for name in names if name in seen), default=0.0)
        if most >= smallest * MARGIN:
            found.reasons[node] = f"its numbers come to {most:.4g}, and {target} ends at {largest:.4g}"
        elif most:
            found.reasons[node] = f"its numbers only come to {most:.4g}, and {target} loses digits below {smallest:.4g}"


def _is_lost(value: ir.Value | None, seen: Mapping[str, float]) -> bool:
    """Whether a small value is nothing but a term of sums that are not small: there its last digits are lost anyway."""
    uses = () if value is None else value.uses()
    return (
        bool(uses)
        and value is not None
        and not value.is_graph_output()
        and all(
            node.op_type in _SUMS and node.domain == "" and not any(_named(each) in seen for each in node.outputs)
            for node, _ in uses
        )
    )


def _computed(value: ir.Value) -> bool:
    """Whether a node makes a value that stays fp32 where its numbers are large."""
    node = value.producer()
    return node is not None and (node.domain != "" or node.op_type not in _ANY)


def _integers(nodes: Iterable[ir.Node], target: str, found: Kept) -> None:
    """Keeps what computes with whole numbers."""
    nodes = list(nodes)
    for node in nodes:
        if node.domain != "":
            continue
        if node.op_type == "Cast":
            source = None if node.inputs[0] is None else dtype_name(node.inputs[0])
            if source not in (*EXACT_SOURCES, *_FLOATS) and dtype_name(node.outputs[0]) == "fp32":
                found.whole.update(node.outputs)
        elif node.op_type in _WHOLE and any(value in found.whole for value in node.inputs):
            found.reasons.setdefault(node, f"it computes with whole numbers, of which {target} has not all")
            found.whole.update(value for value in node.outputs if dtype_name(value) == "fp32")
    ends: set[ir.Value] = set()  # what becomes integers
    for node in reversed(nodes):
        if node.domain != "":
            continue
        last = node.op_type == "Equal"
        if node.op_type == "Cast":
            last = dtype_name(node.outputs[0]) not in (*_FLOATS, "bool")
        onward = node.op_type in (_WHOLE | {"Cast"}) - COMPARISONS and any(value in ends for value in node.outputs)
        taken = [value for value in node.inputs if value is not None and dtype_name(value) in ("fp32", "fp64")]
        if not taken or not (last or onward):
            continue
        ends.update(taken)
        if node.op_type != "Cast":
            found.reasons.setdefault(node, f"its numbers become integers, of which {target} has not all")


def _has_subgraphs(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())


def _named(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)

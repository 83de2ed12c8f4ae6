"""Random inputs of a model, for where there is no real data.

Floats are standard normal. Integers are indices as a rule: what they look up is followed through the graph, and they
stay below the length of the shortest table. Integers that look up nothing, and truth values, are masks mostly: they are
1, so that nothing is masked out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.feeds import Array, Feed, Feeds, Input
from tilewright.tuner.model.graph import constant, static_shape
from tilewright.tuner.model.messages import quoted
from tilewright.tuning_db.errors import ModelError

# Operators whose output has numbers of their first input and no others.
_CARRIERS = frozenset(
    {"Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile"}
    | {"Transpose", "Unsqueeze"}
)


class RandomFeeds(Feeds):
    """Feeds of a model; each depends on the seed and its number alone."""

    def __init__(self, model: ir.Model, inputs: Sequence[Input], count: int, seed: int) -> None:
        """
        Raises:
            ModelError: an input is an index into a table of no entries.
        """
        super().__init__(count)
        self._inputs = inputs
        self._seed = seed
        self._bounds = {str(value.name): index_bound(value) for value in model.graph.inputs}
        for each in inputs:
            bound = self._bounds[each.name]
            if bound is not None and bound < 1 and each.dtype.kind in "iu":
                raise ModelError(
                    f"input {quoted(each.name)} is an index into a table of no entries: it can't be made up"
                )

    def feed(self, number: int) -> Feed:
        """One of them, from 0."""
        random = np.random.default_rng([self._seed, number])
        return {each.name: self._array(each, random) for each in self._inputs}

    def _array(self, wanted: Input, random: np.random.Generator) -> Array:
        bound = self._bounds[wanted.name]
        if wanted.dtype.kind not in "iub":
            return random.standard_normal(wanted.shape, np.float32).astype(wanted.dtype)
        if bound is None or wanted.dtype.kind == "b":
            return np.ones(wanted.shape, wanted.dtype)
        return random.integers(0, min(bound, int(np.iinfo(wanted.dtype).max)), wanted.shape).astype(wanted.dtype)


def index_bound(value: ir.Value) -> int | None:
    """The length of the shortest table that a value, or what is made of it, is an index into; None if it is none.

    What is added to it on the way is taken off, for positions often begin at 2.
    """
    bounds: list[int] = []
    seen = set()
    waiting = [(value, 0)]
    while waiting:
        current, added = waiting.pop()
        if (current, added) in seen:
            continue
        seen.add((current, added))
        for node, position in current.uses():
            if node.domain != "":
                continue
            if (bound := _table(node, position)) is not None:
                bounds.append(bound - added)
            elif (node.op_type in _CARRIERS and position == 0) or node.op_type == "Concat":
                waiting.extend((output, added) for output in node.outputs)
            elif node.op_type == "Add":
                other = constant(node.inputs[1 - position])
                # Minus infinity is added to no index.
                if other is not None and other.size and math.isfinite(other.max()):
                    waiting.append((node.outputs[0], added + int(other.max())))
    return min(bounds, default=None)


def _table(node: ir.Node, position: int) -> int | None:
    """How many entries the table has that a node's input is an index into."""
    if node.op_type in ("Gather", "GatherElements", "ScatterElements") and position == 1:
        table = node.inputs[0]
        shape = None if table is None else static_shape(table)
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return None if shape is None else shape[axis]
    if node.op_type == "GatherND" and position == 1:
        table = node.inputs[0]
        shape = None if table is None else static_shape(table)
        return None if shape is None else min(shape, default=None)
    if node.op_type == "OneHot" and position == 0:
        depth = constant(node.inputs[1])
        return None if depth is None or not depth.size else int(depth.reshape(-1)[0])
    return None

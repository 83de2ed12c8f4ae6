"""The 8-bit layers that a model came with, in QDQ form: their scales are the model's own, and nothing is calibrated.

A product or convolution that reads `DequantizeLinear` of its activation, on one grid, and whose weights lie on a grid
as well, computes s_x · s_w[n] · Σ (q_x - z_x) · q_w + bias in the original, in floating point. The kernel computes the
same of the integers: exactly, up to the rounding of fp32. What has no such form stays in half precision, between the
steps that it came with.

Weights are constants by then (`folding/quantised.py`), which BatchNorm may have scaled and a transpose turned: their
grids are found in their numbers, channel by channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.tuner.model.graph import DTYPES, constant, fused_nodes, op_of, plugin_inputs
from tilewright.tuner.model.precision.grouped import SMALLEST
from tilewright.tuner.model.precision.output_scales import MOVED, data_of
from tilewright.tuner.model.precision.quantise import (
    ACTIVATIONS,
    QUANTISED,
    WEIGHTS,
    LayerPrecision,
    Weights,
    can_have_zero,
    channel_axis,
    eligible,
)
from tilewright.tuner.model.precision.steps import DEQUANTISE, Grid, grid_of, quantised_constant

Array = np.ndarray[Any, Any]

NEAR: dict[str, dict[str, float]] = {
    "fp32": {"int8": 2.0**-10, "fp8": 2.0**-10},
    "fp16": {"int8": 0.13, "fp8": 0.03},
}
"""How far from a grid a weight may be, in steps of the grid there, by the type that it was dequantised to: what two
roundings in that type leave, one of them BatchNorm's. bf16 leaves half a step of int8, which is anywhere."""

_SIGNED = 128
_LOOKED_AT = 64
"""Weights of a channel that a grid is tried on first."""

_BLOCK = 1 << 22
"""Weights that are looked at at a time."""

_BEHIND = frozenset(("AveragePool", "GlobalAveragePool", "Pad", "Split", "Resize", "Relu", "Clip"))
"""Operators behind a step that make other numbers than those of its grid, or have no 8-bit types."""

_KINDS = {stored: kind for kind, stored in QUANTISED.items()} | {"uint8": "int8"}


@dataclass(frozen=True, slots=True)
class Given:
    """The 8-bit layers that a model came with."""

    plan: dict[str, LayerPrecision] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of layers of 8-bit activations that can't be one

    @property
    def found(self) -> bool:
        """Whether the model came quantised."""
        return bool(self.plan or self.reasons)

    def told(self, layers: int) -> str:
        """What people are told of a model of so many layers that came quantised."""
        return f"the model came quantised: {len(self.plan)} of {layers} layers are in 8 bits, and no other gets them"


def given_layers(model: ir.Model, device: Device) -> Given:
    """The layers of a fused model that compute in 8 bits because the model says so, for `apply_precision`."""
    found = Given()
    known: dict[Any, Weights | None] = {}
    for node in fused_nodes(model):
        if op_of(node) not in WEIGHTS:
            continue
        (activation,) = ACTIVATIONS[op_of(node)]
        origin = _origin(plugin_inputs(node)[activation])
        if not origin.grids:
            continue
        layer = _layer(node, activation, origin, device, known)
        name = node.name or ""
        if isinstance(layer, str):
            found.reasons[name] = layer
        else:
            found.plan[name], found.weights[name] = layer
    return found


@dataclass(slots=True)
class _Origin:
    """What an activation is made of."""

    grids: set[Grid | None] = field(default_factory=set)  # of the steps; None of one that has no one grid
    movers: set[str] = field(default_factory=set)  # operators between that only move numbers or take the largest
    others: set[str] = field(default_factory=set)  # operators between that do more
    raw: bool = False  # a part of it comes from no step


def _origin(value: ir.Value) -> _Origin:
    found, waiting, seen = _Origin(), [value], set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        if node is not None and node.op_type == DEQUANTISE and node.domain == "":
            found.grids.add(grid_of(node))
        elif node is not None and node.domain == "" and node.op_type in MOVED["int8"] | _BEHIND:
            (found.movers if node.op_type in MOVED["int8"] else found.others).add(node.op_type)
            waiting += data_of(node)
        else:
            found.raw = True
    return found


def _layer(
    node: ir.Node, activation: str, origin: _Origin, device: Device, known: dict[Any, Weights | None]
) -> tuple[LayerPrecision, Weights] | str:
    """What a layer computes in that reads what steps give, or why it can't in 8 bits. `known` are the grids of weights
    that were looked for."""
    if origin.others:
        return f"{activation} is quantised in front of {', '.join(sorted(origin.others))}, and not behind"
    grid = next(iter(origin.grids)) if len(origin.grids) == 1 and not origin.raw else None
    if grid is None:
        return f"{activation} has not one constant scale and zero point for all, and kernels take one"
    kind = _KINDS.get(grid.dtype)
    if kind is None:
        return f"{activation} is quantised to {grid.dtype}, and kernels take {' and '.join(QUANTISED.values())}"
    stored = dtype(QUANTISED[kind])
    if device.arch < stored.min_arch:
        return f"the model has it in {stored.name}, which needs sm_{stored.min_arch}"
    if not origin.movers <= MOVED[stored.name]:
        return f"{', '.join(sorted(origin.movers - MOVED[stored.name]))} has no {stored.name}"
    if not SMALLEST <= grid.scale < math.inf:
        return f"the scale of {activation}, {grid.scale:g}, is no positive normal number of fp32"
    weight, inputs = WEIGHTS[op_of(node)], plugin_inputs(node)
    if quantised_constant(inputs[weight]) is not None:
        return f"{weight} stays as it is: it has blocks or another type, or so much is not made constant"
    reason = eligible(node, kind)
    if reason is not None:
        return reason
    zero = grid.zero - (_SIGNED if grid.dtype == "uint8" else 0)
    if zero and (kind != "int8" or not can_have_zero(node)):
        return f"with the zero point {grid.zero} of {activation} it must have no padding (quantise symmetrically)"
    axis = channel_axis(node)
    key = inputs[weight], axis, kind
    if key not in known:
        array = constant(inputs[weight])
        assert array is not None
        known[key] = weights_on_grid(array, axis, kind)
    weights = known[key]
    if weights is None:
        return f"{weight} is not {stored.name} with one scale for each channel and no zero point"
    return LayerPrecision(kind, {activation: grid.scale}, {activation: zero} if zero else {}), weights


def weights_on_grid(weights: Array, axis: int, kind: str) -> Weights | None:
    """Weights as integers (or e4m3 numbers) and a scale for each place along `axis`; None where those of some channel
    are no multiples of one number, up to rounding in their type, that fit into the kind's."""
    near = NEAR.get({np.dtype(np.float32): "fp32", np.dtype(np.float16): "fp16"}.get(weights.dtype, "?"), {}).get(kind)
    if near is None:
        return None
    channels = weights.shape[axis]
    rows = np.moveaxis(weights, axis, 0)
    values = np.empty(rows.shape, DTYPES[QUANTISED[kind]].numpy())
    scales = np.empty(channels, np.float32)
    block = max(1, _BLOCK * channels // max(1, weights.size))
    for start in range(0, channels, block):
        part = slice(start, start + block)
        flat = rows[part].astype(np.float32).reshape(len(rows[part]), -1)
        steps = _steps(flat, kind, near)
        if steps is None:
            return None
        grid = _nearest(flat / steps[:, None], kind)
        values[part] = grid.reshape(rows[part].shape)
        if weights.dtype != np.float32:  # the largest weight has been rounded: all together tell more
            over = grid.astype(np.float32)
            squares = np.square(over).sum(axis=1)
            steps = np.where(squares > 0, (flat * over).sum(axis=1) / np.maximum(squares, 1), steps)
        scales[part] = steps
    return Weights(np.ascontiguousarray(np.moveaxis(values, 0, axis)), scales)


def _steps(rows: Array, kind: str, near: float) -> Array | None:
    """The step of the grid that each row lies on; 1 for one of zeros."""
    largest = np.maximum(rows.max(axis=1, initial=0), -rows.min(axis=1, initial=0))
    if not np.isfinite(largest).all():
        return None
    steps = np.where(largest == 0, np.float32(1), np.float32(0))
    left = np.flatnonzero(largest)
    sample = rows[:, :: max(1, rows.shape[1] // _LOOKED_AT)]
    for peak in _peaks(kind):
        if not left.size:
            break
        tried = (largest[left] / np.float32(peak)).astype(np.float32)
        likely = _is_on(sample[left], tried, kind, near)
        places, over = left[likely], tried[likely]
        fits = _is_on(rows[places], over, kind, near) if places.size else likely[:0]
        steps[places[fits]] = over[fits]
        left = np.setdiff1d(left, places[fits], assume_unique=True)
    return None if left.size else steps


def _peaks(kind: str) -> Iterator[float]:
    """What the largest magnitude of a channel may be on its grid, the usual first."""
    if kind == "int8":
        yield from (127, 128, *range(126, 0, -1))
        return
    numbers = np.arange(1, 127, dtype=np.uint8).view(DTYPES[QUANTISED[kind]].numpy()).astype(np.float64)
    yield from (float(number) for number in numbers[::-1])


def _nearest(values: Array, kind: str) -> Array:
    if kind == "int8":
        return np.clip(np.rint(values), -128, 127).astype(np.int8)
    return values.astype(DTYPES[QUANTISED[kind]].numpy())


def _is_on(rows: Array, steps: Array, kind: str, near: float) -> Array:
    """Of each row, whether all its numbers are near some of the grid with its step."""
    if not math.prod(rows.shape):
        return np.ones(len(rows), bool)
    with np.errstate(over="ignore", invalid="ignore"):
        over = rows / steps[:, None]
        grid = _nearest(over, kind).astype(np.float32)
        away: Array = np.abs(over - grid)
        # e4m3 has 3 bits behind its leading one, and steps of 2^-9 at its beginning.
        room = near if kind == "int8" else near * np.maximum(np.abs(grid) / 16, 2.0**-9)
        return np.asarray((away <= room).all(axis=1))

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
from tilewright.tuner.model.precision.output_scales import root_of
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
from tilewright.tuner.model.precision.steps import DEQUANTISE, Grid, dequantised

Array = np.ndarray[Any, Any]

NEAR = 2.0**-10
"""How far from a grid a weight may be, in steps of the grid: what rounding in fp32 leaves, with room to spare, and a
hundredth of what rounding to fp16 would add."""

_SIGNED = 128
_LOOKED_AT = 64
"""Weights of a channel that a grid is tried on first."""

_BLOCK = 1 << 22
"""Weights that are looked at at a time."""

_KINDS = {stored: kind for kind, stored in QUANTISED.items()} | {"uint8": "int8"}


@dataclass(frozen=True, slots=True)
class Given:
    """The 8-bit layers that a model came with."""

    plan: dict[str, LayerPrecision] = field(default_factory=dict)
    weights: dict[str, Weights] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)  # of layers of 8-bit activations that can't be one


def given_layers(model: ir.Model, device: Device) -> Given:
    """The layers of a fused model that compute in 8 bits because the model says so, for `apply_precision`."""
    found = Given()
    for node in fused_nodes(model):
        if op_of(node) not in WEIGHTS:
            continue
        (activation,) = ACTIVATIONS[op_of(node)]
        source = root_of(plugin_inputs(node)[activation], "int8")
        step = source.producer()
        if step is None or step.op_type != DEQUANTISE or step.domain != "":
            continue
        known = dequantised(source)
        layer: tuple[LayerPrecision, Weights] | str = f"{activation} has not one constant scale and zero point for all"
        if known is not None:
            layer = _layer(node, activation, source, known[1], device)
        name = node.name or ""
        if isinstance(layer, str):
            found.reasons[name] = f"the model has it quantised, and {layer}"
        else:
            found.plan[name], found.weights[name] = layer
    return found


def _layer(
    node: ir.Node, activation: str, source: ir.Value, grid: Grid, device: Device
) -> tuple[LayerPrecision, Weights] | str:
    """What a layer computes in whose activation is made of the numbers of a grid, or why it can't in 8 bits."""
    kind = _KINDS.get(grid.dtype)
    if kind is None:
        return f"{activation} is {grid.dtype}: kernels take {' and '.join(QUANTISED.values())}"
    stored = dtype(QUANTISED[kind])
    if device.arch < stored.min_arch:
        return f"{stored.name} needs sm_{stored.min_arch}"
    if root_of(plugin_inputs(node)[activation], stored.name) is not source:
        return f"what lies between the step and {activation} has no {stored.name}"
    reason = eligible(node, kind)
    if reason is not None:
        return reason
    zero = grid.zero - (_SIGNED if grid.dtype == "uint8" else 0)
    if zero and not can_have_zero(node):
        return f"with the zero point {grid.zero} of {activation} it must have no padding (quantise symmetrically)"
    weight = WEIGHTS[op_of(node)]
    array = constant(plugin_inputs(node)[weight])
    assert array is not None
    weights = weights_on_grid(array, channel_axis(node), kind)
    if weights is None:
        return f"{weight} is not {stored.name} with one scale for each channel and no zero point"
    return LayerPrecision(kind, {activation: grid.scale}, {activation: zero} if zero else {}), weights


def weights_on_grid(weights: Array, axis: int, kind: str) -> Weights | None:
    """Weights as integers (or e4m3 numbers) and a scale for each place along `axis`; None where those of some channel
    are no multiples of one number, up to rounding in fp32, that fit into the type."""
    channels = weights.shape[axis]
    rows = np.moveaxis(weights, axis, 0)
    values = np.empty(rows.shape, DTYPES[QUANTISED[kind]].numpy())
    scales = np.empty(channels, np.float32)
    block = max(1, _BLOCK * channels // max(1, weights.size))
    for start in range(0, channels, block):
        part = slice(start, start + block)
        flat = rows[part].astype(np.float32).reshape(len(rows[part]), -1)
        steps = _steps(flat, kind)
        if steps is None:
            return None
        scales[part] = steps
        values[part] = _nearest(flat / steps[:, None], kind).reshape(rows[part].shape)
    return Weights(np.ascontiguousarray(np.moveaxis(values, 0, axis)), scales)


def _steps(rows: Array, kind: str) -> Array | None:
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
        likely = _is_on(sample[left], tried, kind)
        places, over = left[likely], tried[likely]
        fits = _is_on(rows[places], over, kind) if places.size else likely[:0]
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


def _is_on(rows: Array, steps: Array, kind: str) -> Array:
    """Of each row, whether all its numbers are near some of the grid with its step."""
    if not math.prod(rows.shape):
        return np.ones(len(rows), bool)
    with np.errstate(over="ignore", invalid="ignore"):
        over = rows / steps[:, None]
        grid = _nearest(over, kind).astype(np.float32)
        near: Array = np.abs(over - grid)
        # e4m3 has 3 bits behind its leading one, and steps of 2^-9 at its beginning.
        room = NEAR if kind == "int8" else NEAR * np.maximum(np.abs(grid) / 16, 2.0**-9)
        return np.asarray((near <= room).all(axis=1))

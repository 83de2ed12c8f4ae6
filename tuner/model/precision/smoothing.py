"""Moving the range of activations into weights, channel by channel, before both are quantised.

A few channels of a transformer's activations are many times as large as the rest, and an int8 scale for all of them
leaves the rest few levels. Weights have room: X·W = (X/s)·(s·W) for any s > 0 of input channel j,

    s_j = max|X_j|^α / max|W_j|^(1-α),

with the weights of all layers that read X in the maximum, and one s for all of them. X/s costs nothing where the
factors go into the scale of the norm before, or into the columns of the layer before (`absorbing.py`). In fp32 the
model computes the same as before. (SmoothQuant: Xiao et al., arXiv:2211.10438; between convolutions this is cross-layer
equalisation: Nagel et al., arXiv:1906.04721, section 4.1.)

α is chosen for every X by itself, from `ALPHAS`: the one with the least mean squared error of its layers' results, both
operands rounded. Factors and scales are taken from every other input of the calibration data, and errors on those
between: what makes all channels equally large makes each of them as likely to be cut off on data not seen before. Where
the best gains less than `LEAST_GAIN_DB` X stays as it is.

Where X is read by something else as well, a residual connection above all, the factors can't go into the norm. Then a
`Mul` before the quantised layers divides X, if that gains `MUL_GAIN_DB`: it is another pass over X unless the engine
fuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.bodies import attach_bodies
from tilewright.tuner.model.calibration.feeds import Feed
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import DTYPES, constant, dtype_name, op_of, plugin_inputs, static_shape
from tilewright.tuner.model.precision.absorbing import absorb, carry_out
from tilewright.tuner.model.precision.layer_data import LayerData, activation_of, rounded
from tilewright.tuner.model.precision.quantise import LARGEST, WEIGHTS, dequantised, quantise_weights
from tilewright.tuner.model.precision.rules import layers_to_quantise
from tilewright.tuner.model.session import run

Array = np.ndarray[Any, Any]

ALPHAS = (0.35, 0.5, 0.65, 0.8, 0.9, 1.0)
LEAST_GAIN_DB = 0.5
MUL_GAIN_DB = 6.0
ROWS = 1024
"""Rows of each X on which errors are compared."""

_LARGEST_FACTOR = 1e4


@dataclass(frozen=True, slots=True)
class Smoothed:
    """One activation whose range was moved into weights."""

    value: str
    layers: tuple[str, ...]
    alpha: float
    gain_db: float  # by how much the layers' squared error fell on the rows that were looked at
    into: str  # where the factors went: names of nodes, or of a new `Mul`


@dataclass(slots=True)
class SmoothingReport:
    """What was smoothed, and of every other activation of quantised layers why it was not."""

    smoothed: list[Smoothed] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Site:
    """An activation and the layers that read it."""

    value: ir.Value
    nodes: list[ir.Node]
    data: list[LayerData]
    axis: int
    channels: int
    largest: Array  # |X_j| over all calibration data
    seen: Array  # the same over every other feed
    rows: list[list[Array]]  # of each layer, from the feeds between


def smooth(
    model: ir.Model,
    feeds: Sequence[Feed],
    *,
    kind: str = "int8",
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> SmoothingReport:
    """Smooths a fused fp32 model in place, for the layers that the rules of `rules.py` quantise.

    `feeds` is calibration data; `seed` draws the rows on which errors are compared; `progress` is called with the
    activations looked at and how many there are. Calibrate afterwards: activations have other ranges then.

    Raises:
        ModelError, RunError: see `session.run`.
    """
    report = SmoothingReport()
    sites = _sites(model, kind, report)
    _observe(model, sites, feeds, seed)
    edit = Editor(model)
    for done, site in enumerate(sites, 1):
        _smooth(edit, site, kind, alphas, report)
        progress(done, len(sites))
    edit.tidy()
    attach_bodies(model)
    return report


def _sites(model: ir.Model, kind: str, report: SmoothingReport) -> list[_Site]:
    chosen, _ = layers_to_quantise(model, kind)
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in chosen:
        if op_of(node) in WEIGHTS:
            readers.setdefault(activation_of(node), []).append(node)
    sites = []
    for value, nodes in readers.items():
        data = [LayerData(node) for node in nodes]
        shape = static_shape(value)
        axes = {1 if each.op == "conv2d" else (-2 if each.settings["trans_a"] else -1) for each in data}
        if shape is None or len(axes) > 1 or not all(each.is_matrix for each in data):
            report.left[value.name or ""] = "its layers do not have one axis of channels"
            continue
        axis = axes.pop() % len(shape)
        sites.append(
            _Site(
                value, nodes, data, axis, shape[axis], np.zeros(shape[axis]), np.zeros(shape[axis]), [[] for _ in nodes]
            )
        )
    return sites


def _observe(model: ir.Model, sites: Sequence[_Site], feeds: Sequence[Feed], seed: int) -> None:
    random = np.random.default_rng(seed)
    count = -(-ROWS // max(1, len(feeds) // 2))
    for index, values in enumerate(run(model, feeds, [site.value.name or "" for site in sites])):
        for site in sites:
            x = values[site.value.name or ""].astype(np.float32)
            others = tuple(axis for axis in range(x.ndim) if axis != site.axis)
            largest = np.abs(x).max(axis=others)
            site.largest = np.maximum(site.largest, largest)
            if index % 2 == 0:
                site.seen = np.maximum(site.seen, largest)
            if index % 2 or len(feeds) == 1:
                for data, rows in zip(site.data, site.rows, strict=True):
                    rows.append(data.rows(x, count, random))


def factors_of(largest_x: Array, largest_w: Array, alpha: float) -> Array:
    """s_j = max|X_j|^α / max|W_j|^(1-α), with a geometric mean of 1; 1 where either is 0 throughout."""
    both = (largest_x > 0) & (largest_w > 0)
    factors = np.ones(largest_x.shape)
    factors[both] = largest_x[both] ** alpha / largest_w[both] ** (1 - alpha)
    if both.any():
        factors[both] /= np.exp(np.log(factors[both]).mean())
    return np.clip(factors, 1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


def _smooth(edit: Editor, site: _Site, kind: str, alphas: Sequence[float], report: SmoothingReport) -> None:
    name = site.value.name or ""
    site.data = [LayerData(node) for node in site.nodes]  # weights may have changed since
    rows = [np.concatenate(each, axis=1) for each in site.rows]
    site.rows = []
    largest_w = np.max([_by_channel(data, np.abs(data.matrix())).max(axis=1) for data in site.data], axis=0)
    plain = _error(site, rows, np.ones(site.channels), kind)
    if not plain > 0:
        report.left[name] = "it is rounded without an error"
        return
    errors = {alpha: _error(site, rows, factors_of(site.seen, largest_w, alpha), kind) for alpha in alphas}
    alpha = min(errors, key=lambda each: errors[each])
    gain = 10 * float(np.log10(plain / max(errors[alpha], 1e-300)))
    if gain < LEAST_GAIN_DB:
        report.left[name] = f"the best factors would gain {gain:.1f} dB, less than {LEAST_GAIN_DB:g}"
        return
    factors = factors_of(site.largest, largest_w, alpha)
    shape = [1] * len(static_shape(site.value) or ())
    shape[site.axis] = -1
    others = {node for node, index in site.value.uses() if node not in site.nodes or not _is_activation(node, index)}
    reason = None
    if others or site.value.is_graph_output():
        reason = "it is read by " + (", ".join(repr(node.name) for node in others) or "the caller")
    else:
        changes = absorb(site.value, factors.reshape(shape))
        if isinstance(changes, str):
            reason = changes
        else:
            carry_out(edit, changes)
            into = ", ".join(dict.fromkeys(change.node.name or "" for change in changes))
    if reason is not None:
        if gain < MUL_GAIN_DB:
            report.left[name] = f"{reason}, and a Mul would gain {gain:.1f} dB, less than {MUL_GAIN_DB:g}"
            return
        into = _insert(edit, site, (1 / factors).reshape(shape))
    for node, data in zip(site.nodes, site.data, strict=True):
        _scale_weights(edit, node, data, factors)
    layers = tuple(node.name or "" for node in site.nodes)
    report.smoothed.append(Smoothed(name, layers, alpha, gain, into))


def _by_channel(data: LayerData, matrix: Array) -> Array:
    """A matrix (groups, channels of a group, depth) as (input channels, the rest)."""
    taps = int(np.prod(data.shape[2:])) if data.op == "conv2d" else 1
    groups, rows, depth = matrix.shape
    parted = matrix.reshape(groups, rows, depth // taps, taps)
    return parted.transpose(0, 2, 1, 3).reshape(groups * (depth // taps), -1)


def _per_depth(data: LayerData, factors: Array) -> Array:
    """Factors of input channels as (groups, 1, depth)."""
    taps = int(np.prod(data.shape[2:])) if data.op == "conv2d" else 1
    return np.repeat(factors.reshape(data.groups, -1), taps, axis=1)[:, None, :]


def _error(site: _Site, rows: Sequence[Array], factors: Array, kind: str) -> float:
    """The summed squared error of the layers' results with both operands rounded, each layer's over its results."""
    scale = max(float((site.seen / factors).max()) / LARGEST[kind], float(np.finfo(np.float32).tiny))
    total = 0.0
    for data, x in zip(site.data, rows, strict=True):
        matrix, s = data.matrix().astype(np.float32), _per_depth(data, factors).astype(np.float32)
        weights = dequantised(quantise_weights((matrix * s).reshape(-1, data.depth), 0, kind), 0).reshape(matrix.shape)
        exact = x @ matrix.swapaxes(1, 2)
        error = rounded(x / s, scale, kind) @ weights.swapaxes(1, 2) - exact
        power = float(np.square(exact).sum())
        total += float(np.square(error).sum()) / power if power > 0 else 0.0
    return total


def _scale_weights(edit: Editor, node: ir.Node, data: LayerData, factors: Array) -> None:
    old = data.weight
    array = constant(old)
    assert array is not None
    scaled = data.weights(data.matrix() * _per_depth(data, factors)).astype(array.dtype)
    place = list(plugin_inputs(node)).index(WEIGHTS[data.op])
    node.replace_input_with(place, edit.constant(scaled, f"{old.name}_smooth", old.dtype))


def _insert(edit: Editor, site: _Site, factors: Array) -> str:
    """A `Mul` between the activation and its layers; gives its name."""
    value = site.value
    dtype = DTYPES[dtype_name(value)]
    amount = edit.constant(factors.astype(dtype.numpy()), f"{value.name}_factors", dtype)
    node = edit.node("Mul", [value, amount], value, dtype, base=f"{value.name}_smooth")
    edit.after(value, node)
    for layer in site.nodes:
        for index, given in enumerate(layer.inputs):
            if given is value and _is_activation(layer, index):
                layer.replace_input_with(index, node.outputs[0])
    return node.name or ""


def _is_activation(layer: ir.Node, index: int) -> bool:
    """Whether an input of a layer is what its weights multiply, and not its residual."""
    return list(plugin_inputs(layer))[index] in ("a", "x")


__all__ = ["ALPHAS", "Smoothed", "SmoothingReport", "factors_of", "smooth"]

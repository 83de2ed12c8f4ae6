"""Rounding weights with regard to what they are multiplied by.

Rounded one by one to nearest, weights have independent errors. But inputs of a layer are correlated, neighbouring
pixels above all, so the error of one weight can be made up for by those that are rounded after it. In each output
channel the weights are rounded in order, and each error is spread over the rest so that the layer's mean squared error,

    E[(Σ (ŵ - w) x)²] = (ŵ - w)ᵀ H (ŵ - w),    H = Cov(x),

grows least: w_j ← w_j - e · U_ij, e = (w_i - ŵ_i) / U_ii, with U the upper Cholesky factor of H⁻¹. Weights of the
largest inputs come first. (OBQ: Frantar, Alistarh, arXiv:2208.11580; this form, GPTQ: arXiv:2210.17323.) H is centred,
for a shift of the mean is what `correction.py` takes back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import scipy.linalg

from tilewright.tuner.model.calibration.feeds import Feed
from tilewright.tuner.model.graph import fused_nodes, op_of, plugin_inputs, plugin_settings
from tilewright.tuner.model.precision.grouped import (
    SMALLEST,
    WEIGHT_ONLY,
    GroupedWeights,
    group_of,
    matrix_of,
    quantise_matrix,
    scales_of,
    stored,
    to_integers,
)
from tilewright.tuner.model.precision.layer_data import LayerData, activation_of, layer_input
from tilewright.tuner.model.precision.quantise import (
    ACTIVATIONS,
    QUANTISED,
    WEIGHTS,
    LayerPrecision,
    Weights,
    channel_axis,
    channel_scales,
    to_grid,
)
from tilewright.tuner.model.session import run

Array = np.ndarray[Any, Any]

MUCH = 256
"""How often a unit that rows are measured in goes into the next."""

DAMPING = 0.01
"""Part of H's mean diagonal added to it, as in GPTQ."""

LEAST_DAMPING = 0.001
"""The same for an H that was shrunk."""

ALIKE, AS_THE_MEAN = 2, 8

FLOOR = 1e-6
"""Part of the inputs' mean square that H's diagonal has at the least: less is what sums in fp32 rounded."""

DOUBLINGS = 10
"""How often damping is doubled for an H that has no Cholesky factor; after that weights are rounded to nearest."""

ROWS = 1024
"""Rows of its input that a layer's H is taken from, at the least; twice its depth if that is more."""

LARGEST_DEPTH = 4096
"""Deeper sums are cut into pieces of at most so many products, each with an H of its own: H grows with the square of
the depth, and the time to invert it with the third power."""

GROUP_BYTES = 512 << 20
"""Of covariances that are held at a time; the model is run again for the next ones."""

SMALL = 16
"""Products in a sum up to which groups are multiplied together: depthwise convolutions have 9."""

BLOCK = 128
"""Weights whose errors are spread within a block at once, and over all behind it together."""


@dataclass(slots=True)
class Moments:
    """Mean and covariance of rows, (groups, depth) and for each piece (groups, depth of it, depth of it).

    Sums are those of what rows differ by from the mean of the first ones: of an input that hardly varies, or not at
    all, E[x xᵀ] - E[x] E[x]ᵀ would be what fp32 rounded, and not positive definite.
    """

    pieces: tuple[slice, ...]
    count: int = 0
    origin: Array | None = None
    sums: Array | None = None
    products: list[Array] = field(default_factory=list)

    def add(self, rows: Array) -> None:
        """Takes in rows (groups, count, depth)."""
        if self.sums is None:
            groups, _, depth = rows.shape
            self.sums = np.zeros((groups, depth), np.float64)
            lengths = [piece.stop - piece.start for piece in self.pieces]
            self.products = [np.zeros((groups, length, length), np.float32) for length in lengths]
            self.origin = rows.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
        rows = rows - self.origin
        self.count += rows.shape[1]
        self.sums += rows.sum(axis=1, dtype=np.float64)
        for piece, product in zip(self.pieces, self.products, strict=True):
            part = rows[:, :, piece]
            # NumPy multiplies many small matrices one by one; einsum has a loop of its own for them.
            small = part.shape[2] <= SMALL
            product += np.einsum("gna,gnb->gab", part, part) if small else part.swapaxes(1, 2) @ part

    def rescale(self, factor: np.float32) -> None:
        """As if all rows had been so many times as large."""
        if self.sums is not None and self.origin is not None:
            self.sums *= factor
            self.origin = self.origin * factor
            for product in self.products:
                product *= factor * factor

    def second(self, index: int) -> Array:
        """Of one piece, in float64: E[x xᵀ], and `FLOOR`."""
        assert self.sums is not None
        assert self.origin is not None
        piece = self.pieces[index]
        mean = self.sums[:, piece] / self.count + self.origin[:, 0, piece]
        return self.covariance(index) + mean[:, :, None] * mean[:, None, :]

    def covariance(self, index: int) -> Array:
        """Of one piece, in float64: E[x xᵀ] - E[x] E[x]ᵀ, and `FLOOR`."""
        assert self.sums is not None
        assert self.origin is not None
        piece = self.pieces[index]
        mean = self.sums[:, piece] / self.count
        floor = FLOOR * np.square(mean + self.origin[:, 0, piece]).mean(axis=1)
        result = self.products[index].astype(np.float64) / self.count - mean[:, :, None] * mean[:, None, :]
        return np.asarray(result + floor[:, None, None] * np.eye(mean.shape[1]))


def pieces_of(depth: int) -> tuple[slice, ...]:
    """Pieces of nearly equal length, none longer than `LARGEST_DEPTH`."""
    count = -(-depth // LARGEST_DEPTH)
    edges = [depth * index // count for index in range(count + 1)]
    return tuple(slice(start, end) for start, end in itertools.pairwise(edges))


def shrink(covariance: Array, count: int) -> None:
    """Leaves less, in place, of what lies beside the diagonal of moments (groups, depth, depth) of so many rows: of few
    rows, or of inputs that are independent, that is chance, and rounding by it is worse than to nearest. How much less
    is what brings a sample covariance of Gaussian rows nearest to that of all (the oracle approximating shrinkage of
    Chen et al., arXiv:0907.4698, of correlations); rows of one input are alike, so that `ALIKE` of them count as one.
    And of rows as few as `AS_THE_MEAN` a place that they leave empty may be as large as the mean."""
    depth, rows = covariance.shape[1], count / ALIKE
    for moments in covariance if depth > 1 else ():
        diagonal = np.diagonal(moments).copy()
        scale = 1 / np.where(diagonal > 0, diagonal, 1.0)
        squares = float(scale @ (np.square(moments) @ scale))  # of the correlations
        excess = squares - depth
        part = ((1 - 2 / depth) * squares + depth**2) / ((rows + 1 - 2 / depth) * excess) if excess > 0 else 1.0
        moments *= 1 - min(1.0, part)
        unseen = (AS_THE_MEAN / (rows + AS_THE_MEAN)) ** 2
        np.fill_diagonal(moments, (1 - unseen) * diagonal + unseen * diagonal.mean())


def round_layer(
    matrix: Array,
    scales: Array,
    covariance: Array,
    to_nearest: Callable[[Array], Array],
    count: int,
    sections: Array | None = None,
    damping: float = DAMPING,
) -> Array:
    """Weights on the grid, for one H: `matrix` (groups, channels, depth), `covariance` (groups, depth, depth) of
    `count` rows, and `scales` (groups, channels); or (groups, sections, channels), and `sections` (depth,) says which
    is whose. `to_nearest` rounds weights over their scales. `damping` is the part of H's mean diagonal that is added to
    it. The result has the shape of `matrix`."""
    depth = matrix.shape[2]
    diagonal = np.diagonal(covariance, axis1=1, axis2=2)
    level = diagonal.mean(axis=1)
    level = np.where(level > 0, level, 1.0)  # an input that never varies: any H will do
    order = np.argsort(-diagonal, axis=1, kind="stable")
    h = np.take_along_axis(np.take_along_axis(covariance, order[:, :, None], 1), order[:, None, :], 2)
    # Rows fewer than weights say nothing of most directions: there errors should stay where they are made.
    added = (damping * (1 + depth / count) * level)[:, None, None] * np.eye(depth)
    upper = _inverse_factors(h, added).astype(np.float32)
    w = np.take_along_axis(matrix.astype(np.float32), order[:, None, :], 2)
    if sections is None:
        scales, sections = scales[:, None], np.zeros(depth, np.intp)
    spread = _spread(np.ascontiguousarray(w.swapaxes(1, 2)), scales, sections[order], upper, to_nearest).swapaxes(1, 2)
    result = np.empty(matrix.shape, spread.dtype)
    np.put_along_axis(result, order[:, None, :], spread, 2)
    return result


def _inverse_factors(h: Array, damping: Array) -> Array:
    """The upper Cholesky factor U of each (H + damping)⁻¹ = UᵀU; where there is none for any damping, that of H = 1."""
    for _ in range(DOUBLINGS):
        try:
            return _factors(h + damping)
        except np.linalg.LinAlgError:
            damping = 2 * damping
    return np.broadcast_to(np.eye(h.shape[1]), h.shape)


def _factors(h: Array) -> Array:
    """The upper Cholesky factor U of each H⁻¹ = UᵀU. `h` is overwritten."""
    if len(h) > 1:
        return np.linalg.cholesky(np.linalg.inv(h)).swapaxes(1, 2)
    # A large one: half the work for a symmetric matrix, and in place.
    lower = scipy.linalg.cholesky(h[0], lower=True, check_finite=False, overwrite_a=True)
    inverse, _ = scipy.linalg.lapack.dpotri(lower, lower=1, overwrite_c=1)
    # Cholesky's method reads one triangle: the lower one of the inverse.
    factor = scipy.linalg.cholesky(inverse, lower=True, check_finite=False, overwrite_a=True)
    return np.ascontiguousarray(factor.T)[None]


def _spread(w: Array, scales: Array, sections: Array, upper: Array, to_nearest: Callable[[Array], Array]) -> Array:
    """Rounds weights (groups, depth, channels) one place of the depth after the other, and spreads each error over the
    places behind. `w` is overwritten. Scales are (groups, sections, channels), sections (groups, depth)."""
    result = np.empty(w.shape, to_nearest(w[:0, :0]).dtype)
    depth, groups = w.shape[1], np.arange(len(w))
    for start in range(0, depth, BLOCK):
        end = min(start + BLOCK, depth)
        errors = np.empty((len(w), end - start, w.shape[2]), np.float32)
        for index in range(start, end):
            steps = scales[groups, sections[:, index]]
            on_grid = to_nearest(w[:, index] / steps)
            result[:, index] = on_grid
            error = (w[:, index] - on_grid.astype(np.float32) * steps) / upper[:, index, index, None]
            errors[:, index - start] = error
            w[:, index + 1 : end] -= upper[:, index, index + 1 : end, None] * error[:, None]
        w[:, end:] -= upper[:, start:end, end:].swapaxes(1, 2) @ errors
    return result


def round_weights(
    model: ir.Model,
    plan: Mapping[str, LayerPrecision],
    feeds: Sequence[Feed],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> dict[str, Weights]:
    """Quantised weights of the int8 and fp8 layers of a plan, for `apply_precision`.

    `model` is the fused model in floating point, run over `feeds` for the inputs of the layers, of which `seed` draws
    the rows that are looked at; `progress` is called with the layers done and how many there are. Layers whose weights
    are a batch of matrices are left out.

    Raises:
        ModelError, RunError: see `session.run`.
    """
    layers = {}
    for node in fused_nodes(model):
        precision = plan.get(node.name or "")
        if precision is not None and precision.kind in QUANTISED and op_of(node) in WEIGHTS:
            data = LayerData(node)
            if data.is_matrix:
                layers[node.name or ""] = (node, data, precision)
    result: dict[str, Weights] = {}
    for group in _groups(layers):
        moments = _observe(model, {name: layers[name] for name in group}, feeds, seed)
        for name in group:
            node, data, precision = layers[name]
            result[name] = _rounded(node, data, precision.kind, moments.pop(name))
            progress(len(result), len(layers))
    return result


def round_groups(
    model: ir.Model,
    plan: Mapping[str, LayerPrecision],
    feeds: Sequence[Feed],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, most: None,
) -> dict[str, GroupedWeights]:
    """Quantised weights of the `w8a16` and `w4a16` layers of a plan, for `apply_precision`; arguments as those of
    `round_weights`. H is not centred here: nothing takes back a shift of the mean.

    Raises:
        ModelError, RunError: see `session.run`.
    """
    layers = {}
    shared: dict[Any, list[str]] = {}  # those that have one matrix, in one kind
    for node in fused_nodes(model):
        name = node.name or ""
        precision = plan.get(name)
        if precision is not None and precision.kind in WEIGHT_ONLY:
            layers[name] = (node, LayerData(node), precision)
            key = plugin_inputs(node)["b"], plugin_settings(node)["trans_b"], precision.kind
            shared.setdefault(key, []).append(name)
    others = {names[0]: names for names in shared.values()}
    result: dict[str, GroupedWeights] = {}
    for group in _groups({name: layers[name] for name in others}):
        of = {name: first for first in group for name in others[first]}
        moments = _observe(model, {name: layers[name] for name in of}, feeds, seed, of)
        for first in group:
            node, _, precision = layers[first]
            weights = _rounded_groups(node, WEIGHT_ONLY[precision.kind], moments.pop(first))
            result |= dict.fromkeys(others[first], weights)
            progress(len(result), len(layers))
    return result


Layers = Mapping[str, tuple[ir.Node, LayerData, LayerPrecision]]


def _groups(layers: Layers) -> list[list[str]]:
    """Layers whose covariances fit together."""
    groups: list[list[str]] = []
    held = GROUP_BYTES + 1
    for name, (_, data, _) in layers.items():
        size = 4 * data.groups * sum((piece.stop - piece.start) ** 2 for piece in pieces_of(data.depth))
        if held + size > GROUP_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _observe(
    model: ir.Model, layers: Layers, feeds: Sequence[Feed], seed: int, of: Mapping[str, str] | None = None
) -> dict[str, Moments]:
    """Moments of the quantised inputs of some layers; `of` names those that have theirs together, by one of them."""
    of = {name: name for name in layers} if of is None else of
    moments = {of[name]: Moments(pieces_of(data.depth)) for name, (_, data, _) in layers.items()}
    readers: dict[str, list[str]] = {}
    for name, (node, _, _) in layers.items():
        readers.setdefault(activation_of(node).name or "", []).append(name)
    random = np.random.default_rng(seed)
    units: dict[str, np.float32] = {}
    for values in run(model, feeds, list(readers)):
        for value, names in readers.items():
            for name in names:
                node, data, precision = layers[name]
                count = -(-max(ROWS, 2 * data.depth) // len(feeds))
                rows = data.rows(values[value], count, random)
                # In steps of the grid: squares of very large or small numbers have no room in fp32.
                if precision.kind in QUANTISED:
                    rows = layer_input(rows, data.op, precision)
                    unit = np.float32(precision.scales[ACTIVATIONS[data.op][0]])
                else:
                    # What is infinite or NaN, as of a mask, says nothing of rounding.
                    rows = rows.astype(np.float32)
                    rows = rows[:, np.isfinite(rows).all(axis=(0, 2))]
                    if not rows.size:
                        continue
                    unit = _unit(units.get(of[name]), np.abs(rows).max() / 128)
                    moments[of[name]].rescale(units.get(of[name], unit) / unit)
                    units[of[name]] = unit
                moments[of[name]].add(rows / unit)
    return moments


def _unit(known: np.float32 | None, step: np.float32) -> np.float32:
    """What rows are measured in: the steps of those before, or of these where they are much larger."""
    if known is None or step > MUCH * known:
        return step if step > 0 else known or np.float32(SMALLEST)
    return known


def _rounded(node: ir.Node, data: LayerData, kind: str, moments: Moments) -> Weights:
    axis = channel_axis(node)
    matrix = data.matrix()
    scales = channel_scales(data.weights(matrix), axis, kind)
    by_group = scales.reshape(data.groups, -1)
    parts = [
        round_layer(
            matrix[:, :, piece], by_group, moments.covariance(index), partial(to_grid, kind=kind), moments.count
        )
        for index, piece in enumerate(moments.pieces)
    ]
    return Weights(data.weights(np.concatenate(parts, axis=2)), scales)


def _rounded_groups(node: ir.Node, bits: int, moments: Moments) -> GroupedWeights:
    matrix = matrix_of(node)
    if moments.sums is None:
        return quantise_matrix(matrix, bits)  # nothing that was seen is finite
    seconds = []
    for index in range(len(moments.pieces)):
        second = moments.second(index)
        if not np.isfinite(second).all():
            return quantise_matrix(matrix, bits)
        moments.products[index] = second[:0]  # a deep layer's take hundreds of megabytes: each is held once
        shrink(second, moments.count)
        seconds.append(second)
    group = group_of(matrix.shape[1], bits)
    importance = np.concatenate([np.diagonal(each[0]) for each in seconds])
    scales = scales_of(matrix, bits, importance / max(importance.max(), SMALLEST))
    sections = np.arange(matrix.shape[1]) // (group or matrix.shape[1])
    parts = [
        round_layer(
            matrix[None, :, piece],
            scales.reshape(1, -1, len(matrix)).astype(np.float32),
            seconds[index],
            partial(to_integers, bits=bits),
            moments.count,
            sections[piece],
            LEAST_DAMPING,
        )
        for index, piece in enumerate(moments.pieces)
    ]
    return stored(np.concatenate(parts, axis=2)[0], bits, scales)

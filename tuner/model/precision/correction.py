"""Bias correction: what quantisation adds to a layer's mean is taken off its bias.

Rounded weights and clipped or rounded inputs shift the mean of each output channel,

    shift[n] = Σ_k ŵ[n, k] · E[x̂_k] - Σ_k w[n, k] · E[x_k],

with E over calibration data and, in a convolution, over output pixels; padding counts as the zeros it is. The sum is
linear, so means of the inputs are all that is needed, and the result is exact before the activation.
(Nagel et al., arXiv:1906.04721, section 4.2, and arXiv:2106.08295, section 3.3, empirical bias correction.)

All layers are measured in one pass over the floating-point model: each corrects the shift that it makes itself. In
sequence, each layer measured behind those already corrected, the pass would be repeated for every layer, to take off
also what is left of the shifts of those before it, which are corrected in their own place here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.feeds import Feed
from tilewright.tuner.model.graph import constant, fused_nodes, op_of, plugin_inputs
from tilewright.tuner.model.precision.layer_data import LayerData, activation_of, layer_input
from tilewright.tuner.model.precision.output_scales import can_shift
from tilewright.tuner.model.precision.quantise import (
    ACTIVATIONS,
    QUANTISED,
    WEIGHTS,
    LayerPrecision,
    Weights,
    channel_axis,
    dequantised,
    quantise_weights,
)
from tilewright.tuner.model.session import run

Array = np.ndarray[Any, Any]


def measure_shifts(
    model: ir.Model,
    plan: Mapping[str, LayerPrecision],
    feeds: Sequence[Feed],
    *,
    weights: Mapping[str, Weights] | None = None,
) -> dict[str, Array]:
    """The shift of each output channel's mean of the int8 and fp8 layers of a plan, fp32, before the activation: what
    `apply_precision` takes off as `shifts`.

    `model` is the fused model in floating point, `weights` what `apply_precision` is given. Left out are layers that
    can't have a bias for each channel, or whose weights are a batch of matrices.

    Raises:
        ModelError, RunError: see `session.run`.
    """
    layers = {}
    for node in fused_nodes(model):
        precision = plan.get(node.name or "")
        if precision is None or precision.kind not in QUANTISED or op_of(node) not in WEIGHTS or not can_shift(node):
            continue
        data = LayerData(node)
        if data.is_matrix:
            layers[node.name or ""] = (node, data, precision)
    readers: dict[str, list[str]] = {}
    for name, (node, _, _) in layers.items():
        readers.setdefault(activation_of(node).name or "", []).append(name)
    plain = {name: np.zeros((data.groups, data.depth)) for name, (_, data, _) in layers.items()}
    coarse = {name: mean.copy() for name, mean in plain.items()}
    for values in run(model, feeds, list(readers)):
        for value, names in readers.items():
            x = values[value]
            for name in names:
                _, data, precision = layers[name]
                plain[name] += data.mean_row(x) / len(feeds)
                coarse[name] += data.mean_row(layer_input(x, data.op, precision)) / len(feeds)
    return {
        name: _shift(node, data, precision.kind, plain[name], coarse[name], (weights or {}).get(name))
        for name, (node, data, precision) in layers.items()
    }


def _shift(node: ir.Node, data: LayerData, kind: str, plain: Array, coarse: Array, given: Weights | None) -> Array:
    axis = channel_axis(node)
    matrix = data.matrix()
    hat = data.matrix(dequantised(given or quantise_weights(data.weights(matrix), axis, kind), axis))
    shift = np.einsum("gnk,gk->gn", hat.astype(np.float64), coarse) - np.einsum(
        "gnk,gk->gn", matrix.astype(np.float64), plain
    )
    shift = shift.reshape(-1)
    inputs = plugin_inputs(node)
    for name in (*ACTIVATIONS[data.op], WEIGHTS[data.op]):
        own = constant(inputs.get(f"{name}_scale"))
        if own is not None:
            shift = shift * own.reshape(-1)
    return np.asarray(shift, np.float32)

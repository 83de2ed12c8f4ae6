"""What can be said of a seeded model in numbers: how much its logits depend on its input, whether its activations stay
within bounds, and how loud rounding is at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from benchmarks.models.operators import HEAVY, Array, Feed, Operators, Samples, walk
from benchmarks.models.seeding import moments

ACTIVATIONS = {
    *HEAVY,
    *("BatchNormalization", "LayerNormalization", "RMSNormalization", "Attention", "Concat", "Gelu", "Relu", "Sum"),
}
"""Ops whose outputs are activations. Others make parts of them: squares, means, probabilities, masks of 3.4e38."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model over some inputs."""

    share: float  # of the logits' variance, what is left when each logit's mean over inputs is taken away
    cosine: float  # mean over pairs of inputs, of their logits
    classes: int  # different top-1 classes
    quietest: tuple[float, str]  # least standard deviation of an activation, and the node that makes it
    loudest: tuple[float, str]
    half: float  # relative error of the logits, max |a - b| / max |a|, in half precision
    half_noise: float  # RMS of that error, over the RMS of the logits minus their mean over inputs


class Watch:
    """A step of `walk` that keeps the logits, and the standard deviations of activations.

    `half`: operands of Conv, Gemm and MatMul are rounded to fp16, as where layers are fused and accumulate in fp32.
    """

    def __init__(self, model: ir.Model, logits: str, *, half: bool = False) -> None:
        self.logits: Array = np.empty(0)
        self.deviations: dict[str, float] = {}
        self._operators = Operators(model.graph.opset_imports)
        self._logits = logits
        self._half = half

    def __call__(self, node: ir.Node, inputs: list[Samples | None]) -> list[Samples]:
        if self._half and node.op_type in HEAVY | {"Attention"}:
            inputs = [None if samples is None else [rounded(array) for array in samples] for samples in inputs]
        outputs = self._operators(node, inputs)
        if node.op_type in ACTIVATIONS and outputs[0][0].dtype == np.float32:
            self.deviations[f"{node.op_type} {node.name}"] = float(np.sqrt(moments(outputs[0])[1]))
        if node.outputs[0].name == self._logits:
            self.logits = np.stack([array.reshape(-1) for array in outputs[0]])
        return outputs


def rounded(array: Array) -> Array:
    """To fp16 and back; what is too large for it becomes the largest, as a mask's -3.4e38 must."""
    if array.dtype != np.float32:
        return array
    largest = np.finfo(np.float16).max
    return np.clip(array, -largest, largest).astype(np.float16).astype(np.float32)


def logits_of(model: ir.Model, logits: str, feeds: Sequence[Feed]) -> Array:
    """(inputs, logits), fp32, by ONNX Runtime node by node."""
    watch = Watch(model, logits)
    walk(model, feeds, watch)
    return watch.logits


def input_share(logits: Array) -> float:
    """Variance over inputs, mean over logits, relative to the variance of all logits of all inputs: 1 where the mean
    over inputs says nothing, 0 where all inputs have the same logits."""
    return float(logits.var(0, dtype=np.float64).mean() / logits.var(dtype=np.float64))


def figures(model: ir.Model, logits: str, feeds: Sequence[Feed]) -> Figures:
    """See `Figures`."""
    exact, half = Watch(model, logits), Watch(model, logits, half=True)
    walk(model, feeds, exact)
    walk(model, feeds, half)
    values: np.ndarray[Any, Any] = exact.logits.astype(np.float64)
    error = half.logits - values
    directions = values / np.linalg.norm(values, axis=1, keepdims=True)
    pairs = np.triu_indices(len(values), 1)
    ranked = sorted((deviation, node) for node, deviation in exact.deviations.items())
    return Figures(
        share=input_share(exact.logits),
        cosine=float((directions @ directions.T)[pairs].mean()),
        classes=len(set(values.argmax(1).tolist())),
        quietest=ranked[0],
        loudest=ranked[-1],
        half=float(abs(error).max() / abs(values).max()),
        half_noise=float(np.sqrt((error**2).mean() / (values - values.mean(0)).var())),
    )

"""The real architectures, through reading, folding, fusing and lowering: coverage, equality, and errors that show.

Small ones run always; `pytest -m slow` has the real sizes. `benchmarks/models` makes them, with numbers on which
errors are visible.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from benchmarks.models import ARCHITECTURES, architecture, samples, without, write
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import FusionReport, fuse
from tilewright.tuner.model.graph import copy_of, fused_nodes, op_of
from tilewright.tuner.model.precision.quantise import apply_precision
from tilewright.tuner.model.reading.read import read_model
from tilewright.tuner.model.session import run
from tilewright.tuner.model.workloads import ModelWorkloads, workloads

NAMES = [known.name for known in ARCHITECTURES]
FP32, FP16 = 1e-5, 5e-3
FP16_SMALL = 1e-2
"""Of few channels, whose roundings average out less."""

INPUTS = {True: 4, False: 16}
"""Of small and real ones: an error is held against the largest logit, which of few inputs is small by chance."""


class Prepared:
    """An architecture as it was read, and fused, with inputs and the logits of both."""

    def __init__(self, name: str, folder: Path, small: bool) -> None:
        self.logits = architecture(name).logits
        self.feeds = samples(name, INPUTS[small], seed=1, small=small)
        self.original = read_model(write(name, folder, small=small))
        self.fused = copy_of(self.original)
        fold(self.fused)
        self.report: FusionReport = fuse(self.fused)
        self.workloads: ModelWorkloads = workloads(self.fused)
        self.wanted = self.outputs(self.original)

    def outputs(self, model: ir.Model) -> np.ndarray:
        """The logits of all inputs: (inputs, …)."""
        found = run(model, self.feeds, [self.logits])
        return np.stack([values[self.logits].astype(np.float64) for values in found])

    def errors(self, model: ir.Model) -> tuple[float, float]:
        """max|e| / max|a| of the logits, and of the logits less their means over the inputs."""
        got, wanted = self.outputs(model), self.wanted
        centred = wanted - wanted.mean(axis=0)
        error = np.abs(got - wanted)
        apart = np.abs(got - got.mean(axis=0) - centred)
        return float(error.max() / np.abs(wanted).max()), float(apart.max() / np.abs(centred).max())

    def shows(self, model: ir.Model, bar: float) -> bool:
        """Whether a model's error reaches a bar: on the first input already, or else on all."""
        (first,) = run(model, self.feeds[:1], [self.logits])
        # No more than the error over all inputs, for it is held against their largest logit.
        error = np.abs(first[self.logits] - self.wanted[0]).max() / np.abs(self.wanted).max()
        return bool(error >= bar) or max(self.errors(model)) >= bar


def check(name: str, folder: Path, small: bool, controls: int) -> None:
    """Coverage, equality in fp32, fp16, and that a lost layer shows."""
    prepared = Prepared(name, folder, small)
    assert prepared.workloads.coverage >= 0.95, prepared.workloads.unsupported
    assert max(prepared.errors(prepared.fused)) <= FP32
    half = prepared.errors(apply_precision(prepared.fused, {}, base="fp16"))
    assert half[0] <= FP16_SMALL if small else max(half) <= FP16
    nodes = [node.name or "" for node in fused_nodes(prepared.fused) if op_of(node) in ("gemm", "conv2d")]
    nodes = [node for node in nodes if has_weights(prepared.fused, node)]
    for index in np.linspace(0, len(nodes) - 1, min(controls, len(nodes))).round().astype(int):
        assert prepared.shows(without(prepared.fused, nodes[index]), 10 * FP32), nodes[index]


def has_weights(model: ir.Model, name: str) -> bool:
    """Whether a layer multiplies with a constant."""
    node = next(node for node in fused_nodes(model) if node.name == name)
    return any(value is not None and value.is_initializer() and len(value.shape or ()) > 1 for value in node.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_small_architectures(name, tmp_path):
    check(name, tmp_path, small=True, controls=3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_real_architectures(name, tmp_path):
    """Every fused layer is lost once."""
    check(name, tmp_path, small=False, controls=10**6)


@pytest.mark.parametrize("name", [name for name in NAMES if "opset" in name])
def test_transformers_fuse_every_attention(name, tmp_path):
    prepared = Prepared(name, tmp_path, small=True)
    attentions = [node for node in fused_nodes(prepared.fused) if op_of(node) == "attention"]
    assert len(attentions) == 2
    assert "Softmax" not in {node.op_type for node in prepared.fused.graph}
    if name.startswith("gpt"):
        gated = [
            node for node in fused_nodes(prepared.fused) if node.attributes.get_string("gated", "none") == "halves"
        ]
        assert len(gated) == 2
        norms = [node for node in fused_nodes(prepared.fused) if op_of(node) == "rmsnorm"]
        assert len(norms) == 5

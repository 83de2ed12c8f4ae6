"""Folding small graphs, with their results before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.folding.fold import FoldingReport, fold

CLOSE = 2e-6  # of fp32: a few roundings of weights, that don't add up over a sum


def node(operator: str, used: str, made: str, **attributes: Any) -> onnx.NodeProto:
    names = ["" if name == "-" else name for name in used.split()]
    return helper.make_node(operator, names, made.split(), name=f"{operator}_{made.split()[0]}", **attributes)


def norm(prefix: str, count: int, seed: int = 7) -> dict[str, np.ndarray]:
    """A BatchNormalization's constants, none of them trivial."""
    rng = np.random.default_rng(seed)
    arrays = {
        "scale": rng.uniform(0.5, 2, count) * rng.choice([-1, 1], count),
        "bias": rng.normal(size=count),
        "mean": rng.normal(size=count),
        "var": rng.uniform(0.2, 3, count),
    }
    return {f"{prefix}_{name}": array.astype(np.float32) for name, array in arrays.items()}


def batch_norm(used: str, made: str, prefix: str, **attributes: Any) -> onnx.NodeProto:
    parts = " ".join(f"{prefix}_{name}" for name in ("scale", "bias", "mean", "var"))
    return node("BatchNormalization", f"{used} {parts}", made, **attributes)


def folded(
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int],
    arrays: Mapping[str, np.ndarray],
    *,
    outputs: Sequence[str] = ("y",),
    close: float = CLOSE,
    opset: int = 21,
) -> tuple[list[str], FoldingReport, ir.Model]:
    """Operators left, report and model, which computes what it did before."""
    model = model_of(nodes, {"x": shape}, outputs, arrays, opset=opset)
    x = normal(11, *shape)
    before = results(model, {"x": x})
    report = fold(model)
    after = results(model, {"x": x})
    for name, got, wanted in zip(outputs, after, before, strict=True):
        assert got.shape == wanted.shape, name
        assert relative_error(got, wanted) <= close, name
    assert [value.name for value in model.graph.outputs] == list(outputs)
    assert report.nodes_before == len(nodes)
    assert report.nodes_after == len(model.graph)
    return [node.op_type for node in model.graph], report, model

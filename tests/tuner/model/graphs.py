"""Small graphs for the tests of passes over models, and their results in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import helper, numpy_helper

from tilewright.tuner.model.graph import DTYPES

OPSET = 21


def value(name: str, shape: Sequence[int | str], dtype: str = "fp32") -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(DTYPES[dtype]), shape=ir.Shape(shape))


def model_of(
    nodes: Sequence[Any],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    constants: Mapping[str, np.ndarray],
    *,
    dtype: str = "fp32",
    opset: int = OPSET,
) -> ir.Model:
    """A model of `helper.make_node`s, with shapes inferred."""
    kind = int(DTYPES[dtype])
    graph = helper.make_graph(
        list(nodes),
        "model",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))


def results(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime computes, without optimisations, of a model that passes ONNX's checker."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def normal(seed: int, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """max|got - wanted| / max|wanted|."""
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())

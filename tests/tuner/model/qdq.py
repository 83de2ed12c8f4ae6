"""Models in QDQ form, as quantising tools write them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from tilewright.tuner.model.graph import DTYPES

LARGEST = {"int8": 127.0, "fp8e4m3": 448.0}
LAYERS = ("Conv", "MatMul", "Gemm")


def quantised(
    model: onnx.ModelProto, feed: Mapping[str, np.ndarray], *, dtype: str = "int8", zero: int = 0, integers: bool = True
) -> onnx.ModelProto:
    """A model whose products and convolutions read steps: of activations with one scale, by the feed's largest
    magnitude, and of weights with one for each channel.

    `zero` is the activations' zero point, of data type `dtype`, as is `int8` or `uint8`. Weights are integers and a
    dequantise step, or without `integers` numbers and both steps.
    """
    made = onnx.ModelProto.FromString(model.SerializeToString())
    graph = made.graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    seen = _values(model, feed)
    stored = "int8" if dtype == "uint8" else dtype
    nodes: list[onnx.NodeProto] = []
    known: dict[str, str] = {}

    def tensor(name: str, kind: str, array: np.ndarray) -> str:
        values = array.astype(DTYPES[kind].numpy())
        graph.initializer.append(
            helper.make_tensor(name, int(DTYPES[kind]), array.shape, np.ascontiguousarray(values).tobytes(), raw=True)
        )
        return name

    def steps(name: str, scale: np.ndarray, point: int, kind: str, axis: int | None, constant: bool) -> str:
        along = {} if axis is None else {"axis": axis}
        given = [
            tensor(f"{name}_scale", "fp32", scale),
            tensor(f"{name}_zero", kind, np.full(scale.shape, point)),
        ]
        if constant:
            shape = [-1 if place == axis else 1 for place in range(arrays[name].ndim)]
            tensor(f"{name}_q", kind, _nearest(arrays[name] / scale.reshape(shape), kind))
        else:
            nodes.append(helper.make_node("QuantizeLinear", [name, *given], [f"{name}_q"], name=f"{name}_Q", **along))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}_q", *given], [f"{name}_dq"], name=f"{name}_DQ", **along)
        )
        return f"{name}_dq"

    for node in graph.node:
        if node.op_type in LAYERS:
            x, w = node.input[:2]
            if x not in known:
                scale = np.float32(np.abs(seen[x]).max() / LARGEST[stored])
                known[x] = steps(x, np.asarray(scale), zero, dtype, None, False)
            turned = any(each.name == "transB" and each.i for each in node.attribute)
            axis = 0 if node.op_type == "Conv" or turned else arrays[w].ndim - 1
            others = tuple(place for place in range(arrays[w].ndim) if place != axis)
            scales = (np.abs(arrays[w]).max(axis=others) / LARGEST[stored]).astype(np.float32)
            node.input[0], node.input[1] = known[x], steps(w, scales, 0, stored, axis, integers)
        nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(nodes)
    onnx.checker.check_model(made)
    return made


def _nearest(values: np.ndarray, kind: str) -> np.ndarray:
    return np.rint(values) if kind == "int8" else values


def _values(model: onnx.ModelProto, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every value of a model for a feed."""
    shown = onnx.ModelProto.FromString(model.SerializeToString())
    given = {value.name for value in shown.graph.output}
    names = [name for node in shown.graph.node for name in node.output if name not in given]
    shown.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in names)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    return {**feed, **dict(zip(outputs, session.run(None, dict(feed)), strict=True))}

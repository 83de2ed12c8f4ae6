"""Writes small graphs node by node, for the tests of fusing, and fuses them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from tests.tuner.model.graphs import relative_error, results
from tilewright.tuner.model.fuse import FusionReport, fuse
from tilewright.tuner.model.graph import DTYPES, fused_nodes


class Graph:
    """A graph in the making: values are names."""

    def __init__(self, opset: int = 21) -> None:
        self.opset = opset
        self._nodes: list[Any] = []
        self._inputs: dict[str, tuple[tuple[int, ...], str]] = {}
        self._constants: dict[str, np.ndarray] = {}
        self.declared: dict[str, tuple[int, ...]] = {}  # outputs whose shape inference does not find

    def input(self, name: str, *shape: int, dtype: str = "fp32") -> str:
        self._inputs[name] = shape, dtype
        return name

    def array(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self._constants)}"
        self._constants[name] = np.asarray(values, dtype)
        return name

    def shape(self, *sizes: int) -> str:
        return self.array(sizes, np.int64)

    def __call__(self, operator: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        names = [f"v{len(self._nodes)}" + (f"_{index}" if index else "") for index in range(outputs)]
        node = helper.make_node(operator, list(inputs), names, f"n{len(self._nodes)}", domain=domain, **attributes)
        self._nodes.append(node)
        return names[0] if outputs == 1 else tuple(names)

    def transpose(self, value: str, *order: int) -> str:
        return self("Transpose", value, perm=list(order))

    def reshape(self, value: str, *sizes: int) -> str:
        return self("Reshape", value, self.shape(*sizes))

    def model(self, *outputs: str) -> ir.Model:
        inputs = [
            helper.make_tensor_value_info(name, int(DTYPES[dtype]), list(shape))
            for name, (shape, dtype) in self._inputs.items()
        ]
        graph = helper.make_graph(
            self._nodes,
            "model",
            inputs,
            [onnx.ValueInfoProto(name=name) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self._constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        for output in model.graph.output:
            if output.name in self.declared:
                shape = self.declared[output.name]
                output.CopyFrom(helper.make_tensor_value_info(output.name, onnx.TensorProto.FLOAT, shape))
        return ir.from_proto(model)

    def feeds(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Random data: normal floats, booleans of which two of three are true, integers from 1 to 3."""
        random = np.random.default_rng(seed)
        made = {}
        for name, (shape, dtype) in self._inputs.items():
            if dtype == "bool":
                made[name] = random.random(shape) < 0.67
            elif dtype.startswith("int"):
                made[name] = random.integers(1, 4, shape, DTYPES[dtype].numpy())
            else:
                made[name] = random.standard_normal(shape).astype(DTYPES[dtype].numpy())
        return made


def fused(
    graph: Graph, *outputs: str, feeds: Mapping[str, np.ndarray] | None = None, within: float = 1e-5
) -> tuple[ir.Model, FusionReport]:
    """A graph's model, fused, and what was done to it: it must compute what it did before."""
    feeds = {**graph.feeds(), **(feeds or {})}
    wanted = results(graph.model(*outputs), feeds)
    model = graph.model(*outputs)
    report = fuse(model)
    for got, expected in zip(results(model, feeds), wanted, strict=True):
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        assert relative_error(got, expected) <= within
    return model, report


def operators(model: ir.Model) -> list[str]:
    """The operators of a graph, sorted, but for constants."""
    return sorted(node.op_type for node in model.graph if node.op_type != "Constant")


def only_fused(model: ir.Model, plugin: str) -> ir.Node:
    """The one fused node, which must be of this plugin."""
    nodes = fused_nodes(model)
    assert [node.op_type for node in nodes] == [plugin]
    return nodes[0]


# Parts of attentions as products and a softmax.

B, H, S, D = 2, 4, 6, 16
LEAST = float(np.finfo(np.float32).min)
SCALE = 1 / math.sqrt(D)


def heads(g: Graph, name: str, count: int = H, length: int = S) -> str:
    """(B, S, H·D) → (B, H, S, D), as an input of the model."""
    return g.transpose(g.reshape(g.input(name, B, length, count * D), B, length, count, D), 0, 2, 1, 3)


def turned(g: Graph, value: str) -> str:
    return g.transpose(value, 0, 1, 3, 2)


def scores(g: Graph, scale: float = SCALE) -> str:
    return g("Mul", g("MatMul", heads(g, "q"), turned(g, heads(g, "k"))), g.array(scale))


def attend(g: Graph, value: str) -> str:
    return g("MatMul", g("Softmax", value, axis=-1), heads(g, "v"))


def triangle(fill: float, queries: int = S, keys: int = S) -> np.ndarray:
    """(1, 1, Sq, Skv): `fill` above the diagonal that ends in the last corner."""
    return np.triu(np.full((1, 1, queries, keys), fill, np.float32), keys - queries + 1)

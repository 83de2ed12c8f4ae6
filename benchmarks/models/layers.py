"""The layers of transformers, each in two dialects of ONNX: opset 17, where exporters take attention, norms and
activations apart as PyTorch's does, and opset 23, which has operators for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from benchmarks.models.parameters import Kind, Parameter

DECOMPOSED, OPERATORS = 17, 23
"""The two opsets."""

SCORE_STD = 1.0
"""Standard deviation of scaled attention scores: a query then attends to about a third of its keys, so that what its
queries and keys are matters to the result."""

BRANCH_STD = 0.35
"""Of what attention and the MLP each add to the residual stream, whose first value has 1."""

OUTLIERS = 0.01
BIAS_STD = 0.2
EPS = 1e-6
MASKED = float(np.finfo(np.float32).min)
"""What is added to the scores of keys that a query doesn't see, as in the transformers library."""


class Ops(Protocol):
    """Makers of nodes by op type: inputs (values, or numbers that become initializers), then attributes by name."""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]: ...


class Network:
    """A graph in the making: ops through `op`, parameters without numbers yet, and layers made of both.

    Names of parameters don't depend on the dialect, so both forms of an architecture take the same numbers.
    """

    def __init__(self, name: str, opset: int) -> None:
        self._builder = GraphBuilder(ir.Graph((), (), nodes=(), opset_imports={"": opset}, name=name))
        self.op = cast(Ops, self._builder.op)
        self.operators = opset >= OPERATORS
        self.parameters: dict[str, Parameter] = {}

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """What is made inside has `name` in front of its own."""
        self._builder.push_module(name)
        yield
        self._builder.pop_module()

    def input(self, name: str, dtype: ir.DataType, *shape: int) -> ir.Value:
        """A graph input."""
        return cast(ir.Value, self._builder.input(name, dtype, shape))

    def output(self, value: ir.Value, name: str, *shape: int) -> None:
        """Makes a value a graph output, of fp32."""
        value.name, value.type, value.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        self._builder.graph.outputs.append(value)

    def model(self) -> ir.Model:
        """The finished model, whose other initializers are constants."""
        graph = self._builder.graph
        for name in graph.initializers:
            self.parameters.setdefault(name, Parameter(Kind.CONSTANT))
        return ir.Model(graph, ir_version=10, producer_name="tilewright benchmarks")

    def several(self, op_type: str, count: int, *inputs: ir.Value, **attributes: int) -> list[ir.Value]:
        """All outputs of a node that has several."""
        return list(cast(Any, getattr(self.op, op_type)(*inputs, **attributes, _outputs=count)))

    def parameter(self, name: str, shape: tuple[int, ...], parameter: Parameter) -> ir.Value:
        """An initializer that seeding fills."""
        full = self._builder._qualify_initializer_name(name)
        value = ir.Value(name=full, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self._builder.graph.initializers.add(value)
        self.parameters[full] = parameter
        return value

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """An initializer that has its numbers."""
        return cast(ir.Value, self._builder.initializer(ir.tensor(array, name=name)))

    def linear(
        self, name: str, x: ir.Value, sizes: tuple[int, int], *, std: float = 1.0, bias: bool = True
    ) -> ir.Value:
        """x (…, K) times a (K, N) weight, plus a bias of (N,): MatMul and Add, as PyTorch's `Linear` on three axes."""
        with self.scope(name):
            weight = self.parameter("weight", sizes, Parameter(Kind.WEIGHT, std, axis=1))
            y = self.op.MatMul(x, weight)
            if not bias:
                return y
            return self.op.Add(self.parameter("bias", sizes[1:], Parameter(Kind.BIAS, BIAS_STD * std)), y)

    def gemm(self, name: str, x: ir.Value, sizes: tuple[int, int], *, std: float = 1.0) -> ir.Value:
        """x (M, K) times a transposed (N, K) weight, plus a bias: Gemm, as PyTorch's `Linear` on two axes. Each output
        has zero mean over inputs, as logits of a trained classifier have."""
        with self.scope(name):
            weight = self.parameter("weight", sizes[::-1], Parameter(Kind.WEIGHT, std, channels=True))
            bias = self.parameter("bias", sizes[1:], Parameter(Kind.BIAS, BIAS_STD * std))
            return self.op.Gemm(x, weight, bias, transB=1)

    def layer_norm(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """(x - mean) / √(variance + ε) · weight + bias over the last axis."""
        op = self.op
        with self.scope(name):
            weight = self.parameter("weight", (width,), Parameter(Kind.GAIN, 0.2, 1.0, outliers=OUTLIERS))
            bias = self.parameter("bias", (width,), Parameter(Kind.BIAS, BIAS_STD))
            if self.operators:
                return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=EPS)
            centred = op.Sub(x, op.ReduceMean(x, axes=[-1], keepdims=1))
            variance = op.ReduceMean(op.Pow(centred, 2.0), axes=[-1], keepdims=1)
            return op.Add(op.Mul(op.Div(centred, op.Sqrt(op.Add(variance, EPS))), weight), bias)

    def rms_norm(self, name: str, x: ir.Value, width: int) -> ir.Value:
        """x / √(mean x² + ε) · weight over the last axis."""
        op = self.op
        with self.scope(name):
            weight = self.parameter("weight", (width,), Parameter(Kind.GAIN, 0.2, 1.0, outliers=OUTLIERS))
            if self.operators:
                return op.RMSNormalization(x, weight, axis=-1, epsilon=EPS)
            square = op.ReduceMean(op.Pow(x, 2.0), axes=[-1], keepdims=1)
            return op.Mul(weight, op.Mul(x, op.Div(1.0, op.Sqrt(op.Add(square, EPS)))))

    def gelu(self, x: ir.Value) -> ir.Value:
        """x · (1 + erf(x / √2)) / 2."""
        op = self.op
        if self.operators:
            return op.Gelu(x)
        return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0)), 0.5)

    def silu(self, x: ir.Value) -> ir.Value:
        """x · sigmoid(x), for which opset 23 has no operator either."""
        return self.op.Mul(x, self.op.Sigmoid(x))

    def heads(self, x: ir.Value, sequence: int, heads: int, width: int) -> ir.Value:
        """(1, S, heads · D) as (1, heads, S, D)."""
        return self.op.Transpose(self.op.Reshape(x, [1, sequence, heads, width]), perm=[0, 2, 1, 3])

    def merged(self, x: ir.Value, sequence: int, hidden: int) -> ir.Value:
        """(1, heads, S, D) as (1, S, heads · D)."""
        return self.op.Reshape(self.op.Transpose(x, perm=[0, 2, 1, 3]), [1, sequence, hidden])

    def rotary(self, x: ir.Value, positions: ir.Value, tables: tuple[ir.Value, ir.Value], width: int) -> ir.Value:
        """Rotary position embedding of (1, heads, S, D), halves rotated against each other (J. Su et al., "RoFormer",
        2021). `tables`: cosines and sines, in opset 23 of (positions, D / 2), else of the places at hand, (1, 1, S, D).
        """
        op, half = self.op, width // 2
        if self.operators:
            return op.RotaryEmbedding(x, *tables, positions)
        first, second = op.Slice(x, [0], [half], [3]), op.Slice(x, [half], [width], [3])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return op.Add(op.Mul(x, tables[0]), op.Mul(rotated, tables[1]))

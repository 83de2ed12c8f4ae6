"""What a model asks of the kernels: the problem of every fused node, how often each comes, and what no kernel runs.

A fused node's problem is the one that its plugin makes of it, so what is tuned is what an engine runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from tilewright.kernels.problem import Problem
from tilewright.kernels.tensorrt.catalogue import find_plugin
from tilewright.kernels.tensorrt.operation import Tensor
from tilewright.tuner.model.graph import (
    fused_nodes,
    op_of,
    plugin_settings,
    plugin_tensors,
    static_shape,
)
from tilewright.tuner.suites import Workload
from tilewright.tuner.suites.workload import distinct

UNCOUNTED = (
    "AttnLSTM",
    "CausalConvWithState",
    "ConvInteger",
    "ConvTransposeWithDynamicPads",
    "DecoderAttention",
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "DeformConv",
    "DynamicQuantizeLSTM",
    "DynamicQuantizeMatMul",
    "DynamicSparseAttention",
    "Einsum",
    "FusedConv",
    "FusedGemm",
    "FusedMatMul",
    "FusedMatMulActivation",
    "GRU",
    "GatedDeltaNet",
    "GatedRelativePositionBias",
    "GemmFastGelu",
    "GemmFloat8",
    "GroupQueryAttention",
    "LSTM",
    "LinearAttention",
    "LongformerAttention",
    "MatMulBlockQuantizedFp4Weight",
    "MatMulBlockQuantizedFp8Weight",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulInteger",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "MatMulNBitsMlp",
    "MatMulNBitsQLoRA",
    "MatMulNBitsQkv",
    "MatMulPacked",
    "MoE",
    "MoEPacked",
    "MultiHeadAttention",
    "NhwcConv",
    "NhwcFusedConv",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "QAttention",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
    "QMoE",
    "QOrderedAttention",
    "QOrderedLongformerAttention",
    "QOrderedMatMul",
    "RNN",
    "RouterGateUpProj",
    "SparseAttention",
    "SparsePagedAttention",
    "SparseToDenseMatMul",
    "TransposeMatMul",
    "VarlenCausalConvWithState",
    "WordConvEmbedding",
)
"""Operators that multiply matrices as well, and that no kernel here takes the place of."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A fused node as a problem."""

    node: str
    plugin: str
    problem: Problem

    @property
    def flops(self) -> int:
        """Floating-point operations of one pass, as the op counts them."""
        return self.problem.flops()

    @property
    def bytes(self) -> int:
        """Bytes that have to move."""
        return self.problem.bytes_moved()


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A node that multiplies matrices and is not fused."""

    node: str
    operator: str
    reason: str
    flops: int | None  # None where they can't be told


@dataclass(frozen=True, slots=True)
class ModelWorkloads:
    """All of a model's layers, in the order in which they run."""

    layers: tuple[Layer, ...]
    unsupported: tuple[Unsupported, ...]

    @property
    def flops(self) -> int:
        """Of products, convolutions, attentions and fused norms, as far as they can be counted."""
        return sum(layer.flops for layer in self.layers) + sum(each.flops or 0 for each in self.unsupported)

    @property
    def coverage(self) -> float:
        """The share of `flops` that fused nodes have; 1 for a model without any."""
        return sum(layer.flops for layer in self.layers) / self.flops if self.flops else 1.0

    def distinct(self) -> tuple[Workload, ...]:
        """Each problem once, with how often a pass of the model runs it, under the name of the first layer."""
        return distinct(Workload(layer.node, layer.problem) for layer in self.layers)

    def rows(self) -> list[dict[str, Any]]:
        """A row for every distinct problem: what a table or JSON shows."""
        moved = sum(layer.bytes for layer in self.layers)
        return [
            {
                "first": workload.name,
                "op": workload.op,
                "text": str(workload.problem),
                "problem": workload.problem.to_dict(),
                "count": workload.count,
                "flops": workload.count * workload.problem.flops(),
                "flops_share": workload.count * workload.problem.flops() / self.flops if self.flops else 0.0,
                "bytes": workload.count * workload.problem.bytes_moved(),
                "bytes_share": workload.count * workload.problem.bytes_moved() / moved if moved else 0.0,
            }
            for workload in self.distinct()
        ]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "workloads": self.rows(),
            "unsupported": [
                {"node": each.node, "operator": each.operator, "reason": each.reason, "flops": each.flops}
                for each in self.unsupported
            ],
            "flops": self.flops,
            "coverage": self.coverage,
        }


def problem_of(node: ir.Node) -> Problem:
    """The problem that a fused node's plugin makes of it, in the format that TensorRT is offered last: NHWC memory
    where the channels allow it.

    Raises:
        ModelError: the shape of an input is unknown.
        ProblemError, UsageError: the plugin doesn't take it.
    """
    operation = find_plugin(node.op_type).operation
    tensors, settings = plugin_tensors(node), plugin_settings(node)
    operation.check_static(tensors, settings)
    outputs = operation.outputs(tensors, settings)
    formats = operation.formats(tensors, outputs, settings)[-1]
    placed: dict[str, Tensor] = {
        name: replace(tensor, format=form)
        for (name, tensor), form in zip(tensors.items(), formats[: len(tensors)], strict=True)
    }
    return operation.problem(placed, settings)


def workloads(model: ir.Model, reasons: Mapping[str, str] | None = None) -> ModelWorkloads:
    """The layers of a fused model.

    Args:
        model: with shapes and data types known at its fused nodes.
        reasons: why nodes were not fused, by name: `FusionReport.misses`.
    """
    layers = tuple(Layer(node.name or "", node.op_type, problem_of(node)) for node in fused_nodes(model))
    left = []
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        counted = node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention")
        if node.domain not in ("", "com.microsoft") or not (counted or node.op_type in UNCOUNTED):
            continue
        reason = (reasons or {}).get(node.name or "") or _reason(model, node)
        left.append(Unsupported(node.name or "", node.op_type, reason, flops_of(node)))
    return ModelWorkloads(layers, tuple(left))


def _reason(model: ir.Model, node: ir.Node) -> str:
    if node.graph is not model.graph:
        return "it is inside a control-flow node"
    return f"no pattern takes {node.op_type}"


def flops_of(node: ir.Node) -> int | None:
    """Operations of a node that is not fused, a multiplication and an addition as two; None where shapes are unknown or
    the operator isn't counted."""
    inputs = [None if value is None else static_shape(value) for value in (*node.inputs, None, None)]
    out = static_shape(node.outputs[0]) if node.outputs else None
    if node.op_type in UNCOUNTED or None in (inputs[0], inputs[1], out):
        return None
    first, second = inputs[0] or (), inputs[1] or ()
    assert out is not None
    if node.op_type == "MatMul":
        return 2 * math.prod(out) * first[-1]
    if node.op_type == "Gemm":
        return 2 * math.prod(out) * first[0 if node.attributes.get_int("transA", 0) else 1]
    if node.op_type == "Conv":
        return 2 * math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(first) * math.prod(second[1:])
    if node.op_type == "Attention" and len(first) == 4 and inputs[2] is not None:
        third = inputs[2]
        keys = (static_shape(node.outputs[1]) or second)[2] if len(node.outputs) > 1 else second[2]
        return 2 * math.prod(first[:3]) * keys * (first[3] + third[3])
    return None


def ops(model: ir.Model) -> dict[str, int]:
    """How many fused nodes there are of each op."""
    counts: dict[str, int] = {}
    for node in fused_nodes(model):
        counts[op_of(node)] = counts.get(op_of(node), 0) + 1
    return counts

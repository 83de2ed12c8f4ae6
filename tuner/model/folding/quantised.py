"""Which steps of a model in QDQ form are folded: those of constants, where that loses nothing.

A layer that reads quantised activations has its weights as `DequantizeLinear` of integers, or as that of
`QuantizeLinear` of numbers. Folded, they are constants like others: BatchNorm goes into them, a transpose as well, and
the grid that they lie on is found again (`precision/given.py`). Where weights alone are quantised the steps stay: the
integers are a half or a quarter of the bytes that the numbers would be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from tilewright.tuner.model.graph import dtype_name, is_constant, static_shape

_LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
_STEPS = ("QuantizeLinear", "DequantizeLinear")
_MOVES = frozenset(
    (
        "Transpose",
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Identity",
        "Pad",
        "MaxPool",
        "Slice",
        "Concat",
        "Gather",
    )
)
_STORED = ("int8", "uint8", "int32", "fp8e4m3")

_VECTOR = 1 << 16
"""Elements up to which a vector is none of weights that lie flat."""


def constant_steps(model: ir.Model) -> set[ir.Node]:
    """The quantise and dequantise steps that are folded as soon as what they read is constant."""
    found: set[ir.Node] = set()
    for node in model.graph:
        if node.domain != "" or _has_blocks(node):
            continue
        if node.op_type in _STEPS and is_constant(node.inputs[0]):
            # Vectors whatever reads them: biases, and what norms multiply by.
            shape = static_shape(node.outputs[0])
            if shape is not None and len(shape) < 2 and math.prod(shape) <= _VECTOR and _stored(node) in _STORED:
                found.add(node)
        elif node.op_type in _LAYERS and len(node.inputs) > 1 and _is_dequantised(node.inputs[0]):
            for value in node.inputs[1:]:
                found.update(_steps_before(value))
    return found


def _has_blocks(node: ir.Node) -> bool:
    """Whether a step has a scale for each block of an axis."""
    return bool(node.attributes.get_int("block_size", 0))


def _stored(step: ir.Node) -> str:
    integers = step.outputs[0] if step.op_type == "QuantizeLinear" else step.inputs[0]
    return "?" if integers is None else dtype_name(integers)


def _is_dequantised(value: ir.Value | None) -> bool:
    """Whether a value is computed, and comes from a dequantise step through operators that only move numbers."""
    while value is not None and (node := value.producer()) is not None and node.domain == "":
        if node.op_type == "DequantizeLinear":
            return not is_constant(node.inputs[0])
        if node.op_type not in _MOVES:
            break
        value = node.inputs[0]
    return False


def _steps_before(value: ir.Value | None) -> Iterator[ir.Node]:
    """The steps on the way from a constant to a value, if it comes from one."""
    steps: list[ir.Node] = []
    while value is not None and not is_constant(value):
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _MOVES | {*_STEPS}:
            return
        if node.op_type in _STEPS:
            if _has_blocks(node) or _stored(node) not in _STORED:
                return
            steps.append(node)
        value = node.inputs[0]
    yield from steps

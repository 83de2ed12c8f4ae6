"""Weights that are integers with a dequantise step behind them, of two products that become one: the integers lie side
by side, and one step is behind all.

So weights of 4 bits, as language models come with, are read as they are by the kernel of a gated pair, too
(`precision/weight_only.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.fuse.layout import Maker, typed
from tilewright.tuner.model.fuse.opening import new_constant
from tilewright.tuner.model.graph import constant, dtype_name, is_constant, static_shape

_TURN = [1, 0]


@dataclass(frozen=True, slots=True)
class StepWeights:
    """A matrix that a `DequantizeLinear` of constants gives, most often turned around by a `Transpose` behind it."""

    step: ir.Node
    turned: bool

    @classmethod
    def of(cls, value: ir.Value) -> Self | None:
        """Behind a value; None where that is something else."""
        node, turned = value.producer(), False
        if node is not None and _is(node, "Transpose") and node.attributes.get_ints("perm", _TURN) == tuple(_TURN):
            source = node.inputs[0]
            node, turned = None if source is None else source.producer(), True
        if node is None or not _is(node, "DequantizeLinear") or not all(map(is_constant, node.inputs)):
            return None
        shape = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
        return cls(node, turned) if shape is not None and len(shape) == 2 else None

    @property
    def block(self) -> int:
        """Rows or columns that share a scale; 0: all, or one each."""
        return self.step.attributes.get_int("block_size", 0) or 0

    @property
    def axis(self) -> int | None:
        """That along which scales differ; None where there is one."""
        return None if self.scales.size == 1 else (self.step.attributes.get_int("axis", 1) or 0) % 2

    @property
    def integers(self) -> ir.Value:
        """What is stored."""
        value = self.step.inputs[0]
        assert value is not None
        return value

    @property
    def scales(self) -> np.ndarray[Any, Any]:
        array = constant(self.step.inputs[1])
        assert array is not None
        return array

    @property
    def others(self) -> set[str]:
        """Attributes of the step that no pair knows."""
        return set(self.step.attributes) - {"axis", "block_size", "output_dtype"}

    @property
    def zeros(self) -> np.ndarray[Any, Any] | None:
        given = self.step.inputs[2] if len(self.step.inputs) > 2 else None
        return None if given is None else constant(given)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two such matrices, side by side along an axis of the matrix: 0 or 1."""

    first: StepWeights
    second: StepWeights
    axis: int

    @classmethod
    def of(cls, first: ir.Value, second: ir.Value, axis: int) -> Self | str:
        """Of two values; why not, where they are no matrices of one form."""
        one, other = StepWeights.of(first), StepWeights.of(second)
        if one is None or other is None:
            constants = is_constant(first) or one is not None, is_constant(second) or other is not None
            if not all(constants):
                return "weights that are no constants"
            return f"weights of two forms: {_form(first, one)} and {_form(second, other)}"
        pair = cls(one, other, axis)
        if _form(first, one) != _form(second, other) or {*one.others, *other.others}:
            return f"weights of two forms: {_form(first, one)} and {_form(second, other)}"
        # Blocks go along the rows of the product; and a scale for each row is no scale of the other's rows.
        fitting = {1 - pair.stored_axis} if one.block else {None, pair.stored_axis}
        if {one.axis, other.axis} - fitting:
            return "weights whose scales don't lie side by side as they do"
        return pair

    @property
    def stored_axis(self) -> int:
        """The axis as the integers are stored."""
        return 1 - self.axis if self.first.turned else self.axis

    def stand_in(self) -> ir.Value:
        """A value of the type and shape that the matrix will have."""
        return ir.Value(
            name=self._name("weights"), type=self.first.step.outputs[0].type, shape=ir.Shape(self._shape(turned=True))
        )

    def make(self, op: Any, copies: Maker) -> ir.Value:
        """The nodes, by a rule's `op`, and the value that they give; the constants are kept in `copies`."""
        block = self.first.block
        key = "side by side", *self.first.step.inputs, *self.second.step.inputs, self.stored_axis, block
        given = copies.once(key, self._constants)
        settings = {"axis": 1 - self.stored_axis, "block_size": block} if block else {"axis": self.stored_axis}
        out = self.first.step.outputs[0]
        if out.dtype is not None and out.dtype != given[1].dtype:  # by an attribute of opset 23 and up
            settings["output_dtype"] = int(out.dtype)
        value = typed(
            op.DequantizeLinear(*given, **settings), out.type, self._shape(turned=False), self._name("DequantizeLinear")
        )
        if not self.first.turned:
            return value
        turned = op.Transpose(value, perm=_TURN)
        return typed(turned, out.type, self._shape(turned=True), self._name("Transpose"))

    def _constants(self) -> list[ir.Value]:
        """The integers, the scales and, if there are any, the zero points."""
        integers = _beside(self.first.integers, self.second.integers, self.stored_axis, self._name("integers"))
        parts = [self._spread(each) for each in (self.first, self.second)]
        axis = self.stored_axis if self.first.block else 0
        scales = new_constant(np.concatenate([scales for scales, _ in parts], axis), self._name("scales"))
        made = [integers, scales]
        if any(zeros is not None for _, zeros in parts):
            kind = self.first.integers.dtype
            assert kind is not None
            filled = [np.zeros(scales.shape, kind.numpy()) if zeros is None else zeros for scales, zeros in parts]
            made.append(new_constant(np.concatenate(filled, axis), self._name("zeros")))
        return made

    def _spread(self, half: StepWeights) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
        """Scales and zero points; of one for all, one for each column."""
        scales, zeros = half.scales, half.zeros
        if half.block or half.axis is not None:
            return scales, zeros
        shape = static_shape(half.integers)
        assert shape is not None
        count = shape[self.stored_axis]
        return np.repeat(scales.reshape(1), count), None if zeros is None else np.repeat(zeros.reshape(1), count)

    def _shape(self, *, turned: bool) -> tuple[int, int]:
        shapes = [static_shape(each.integers) for each in (self.first, self.second)]
        assert shapes[0] is not None
        assert shapes[1] is not None
        shape = list(shapes[0])
        shape[self.stored_axis] += shapes[1][self.stored_axis]
        return (shape[1], shape[0]) if turned and self.first.turned else (shape[0], shape[1])

    def _name(self, what: str) -> str:
        names = [each.integers.name for each in (self.first, self.second)]
        return f"{names[0]}_and_{names[1]}_{what}"


def _form(value: ir.Value, weights: StepWeights | None) -> str:
    """What must be the same in both of a pair, in words."""
    if weights is None:
        return f"{dtype_name(value)} without a step"
    scales = weights.step.inputs[1]
    assert scales is not None
    blocks = f" with scales of blocks of {weights.block}" if weights.block else ""
    turned = " behind a transpose" if weights.turned else ""
    kinds = f"{dtype_name(weights.integers)}, scales of {dtype_name(scales)}, as {dtype_name(value)}"
    return f"{kinds}{blocks}{turned}"


def _is(node: ir.Node, operator: str) -> bool:
    return node.op_type == operator and node.domain == ""


def _beside(first: ir.Value, second: ir.Value, axis: int, name: str) -> ir.Value:
    """Two constants side by side, rows of 4 bits without being unpacked."""
    kind, shapes = first.dtype, [static_shape(first), static_shape(second)]
    tensors = [ir.convenience.get_const_tensor(value) for value in (first, second)]
    assert kind is not None
    assert shapes[0] is not None
    assert shapes[1] is not None
    assert tensors[0] is not None
    assert tensors[1] is not None
    sizes = list(shapes[0])
    sizes[axis] += shapes[1][axis]
    if axis == 0 and kind.bitwidth == 4 and shapes[0][0] * shapes[0][1] % 2 == 0:
        packed = np.concatenate([np.frombuffer(tensor.tobytes(), np.uint8) for tensor in tensors if tensor is not None])
        tensor: ir.TensorProtocol = ir.PackedTensor(packed, kind, shape=ir.Shape(sizes), name=name)
    else:
        arrays = [tensor.numpy() for tensor in tensors if tensor is not None]
        tensor = ir.Tensor(np.concatenate(arrays, axis), dtype=kind, name=name)
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(sizes), const_value=tensor)

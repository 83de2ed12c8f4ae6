"""What a form of an operator is written with: its inputs, what is known of them, and the nodes that it becomes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

Array = np.ndarray[Any, Any]


class UnsupportedError(Exception):
    """An operator that stays as it is, and why."""


@dataclass(slots=True)
class Surroundings:
    """The model around a node.

    Attributes:
        types: of the values that inference has found: the data type, and a shape where that is known, with None for a
            dimension that is not.
        weights: tensors that are taken out of the model; forms may add some.
        constants: the tensors that are in it.
        taken: names of values.
        opset: of the standard operators.
    """

    types: Mapping[str, tuple[int, tuple[int | None, ...] | None]]
    weights: MutableMapping[str, ir.TensorProtocol]
    constants: Mapping[str, onnx.TensorProto]
    taken: set[str]
    opset: int
    added: list[onnx.ValueInfoProto] = field(default_factory=list)

    def name(self, base: str) -> str:
        """A name that is free, and now taken."""
        name, count = base, 1
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


class Writer:
    """Nodes in place of one.

    `write("Add", x, y)` adds a node of a standard operator and gives the name of its result, or a tuple of names with
    `outputs` of two and more. Inputs are names of values, None for one that is left out.
    """

    def __init__(self, node: onnx.NodeProto, around: Surroundings) -> None:
        self.node, self.around = node, around
        self.nodes: list[onnx.NodeProto] = []
        self._inputs = list(node.input)
        self._attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        self._base = next(filter(None, node.output), node.op_type)

    def __call__(self, operator: str, *inputs: str | None, outputs: int = 1, **attributes: Any) -> Any:
        names = [self.around.name(f"{self._base}/{operator}") for _ in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        name = f"{self.node.name or self._base}/{operator}"
        self.nodes.append(helper.make_node(operator, [each or "" for each in inputs], names, name=name, **given))
        return names[0] if outputs == 1 else tuple(names)

    def input(self, place: int) -> str:
        """The name of an input.

        Raises:
            UnsupportedError: it isn't there.
        """
        name = self.optional(place)
        if name is None:
            raise UnsupportedError(f"its input {place} is missing")
        return name

    def optional(self, place: int) -> str | None:
        """The name of an input, or None where it isn't given."""
        return (self._inputs[place] or None) if place < len(self._inputs) else None

    def wants(self, place: int) -> bool:
        """Whether the node has an output there."""
        return place < len(self.node.output) and bool(self.node.output[place])

    def attribute(self, name: str, default: Any, kind: type | None = None) -> Any:
        """An attribute's value, texts decoded; `default` where it isn't given.

        Args:
            name: of the attribute.
            default: what it is where it isn't given.
            kind: int, float, str or list; the default's where that is not None.

        Raises:
            UnsupportedError: it is of another kind.
        """
        if name not in self._attributes:
            return default
        found = self._attributes[name]
        found = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
        kind = type(default) if kind is None else kind
        numbers = isinstance(found, list) and all(isinstance(each, int | float) for each in found)
        if not (numbers if kind is list else isinstance(found, kind)):
            raise UnsupportedError(f"its attribute {name} is {found!r:.40}, not of the kind {kind.__name__}")
        return found

    def rank(self, name: str) -> int:
        """How many dimensions a value has.

        Raises:
            UnsupportedError: that isn't known.
        """
        return len(self._known(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """A value's shape.

        Raises:
            UnsupportedError: it isn't known.
        """
        shape = self._known(name)
        if None in shape:
            raise UnsupportedError(f"the shape of {name!r} is not known")
        return tuple(dim for dim in shape if dim is not None)

    def dtype(self, name: str) -> ir.DataType:
        """A value's data type.

        Raises:
            UnsupportedError: it isn't known.
        """
        if name not in self.around.types:
            raise UnsupportedError(f"the data type of {name!r} is not known")
        return ir.DataType(self.around.types[name][0])

    def constant(self, name: str) -> Array:
        """The array behind a weight or another constant.

        Raises:
            UnsupportedError: it is computed, or an input of the model.
        """
        if name in self.around.weights:
            return np.asarray(self.around.weights[name].numpy())
        if name in self.around.constants:
            return np.asarray(numpy_helper.to_array(self.around.constants[name]))
        raise UnsupportedError(f"{name!r} is not a constant")

    def constant_or_none(self, name: str) -> Array | None:
        """The array behind a weight or another constant, or None where it is none."""
        return self.constant(name) if name in self.around.weights or name in self.around.constants else None

    def array(self, array: Array) -> str:
        """A small constant of its own data type."""
        name = self.around.name(f"{self._base}/constant")
        self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array)))
        return name

    def integers(self, *numbers: int) -> str:
        """A vector of int64, as of axes or of a shape."""
        return self.array(np.array(numbers, np.int64))

    def number(self, number: float, like: str) -> str:
        """A scalar of the data type of another value."""
        return str(self("CastLike", self.array(np.array(number, np.float32)), like))

    def weight(self, tensor: ir.TensorProtocol) -> str:
        """A new weight, of whatever size."""
        name = self.around.name(tensor.name or f"{self._base}/weight")
        tensor.name = name
        self.around.weights[name] = tensor
        shape = [int(dim) for dim in tensor.shape.numpy()]
        self.around.added.append(helper.make_tensor_value_info(name, int(tensor.dtype), shape))
        return name

    def shared(self, array: Array, base: str) -> str:
        """A weight that other nodes may have made already: it is one for all of them."""
        found = self.around.weights.get(base)
        alike = found is not None and found.dtype == ir.DataType.from_numpy(array.dtype) and found.shape == array.shape
        if found is not None and alike and np.array_equal(found.numpy(), array):
            return base
        return self.weight(ir.Tensor(np.ascontiguousarray(array), name=base))

    def _known(self, name: str) -> tuple[int | None, ...]:
        found = self.around.types.get(name)
        if found is None or found[1] is None:
            raise UnsupportedError(f"the rank of {name!r} is not known")
        return found[1]

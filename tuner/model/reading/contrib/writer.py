"""What a form of an operator is written with: its inputs, what is known of them, and the nodes that it becomes."""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from tilewright.tuner.model.graph import Names
from tilewright.tuner.model.reading.contrib.inference import Inference

Array = np.ndarray[Any, Any]

MOST_SHARED = 1 << 31
"""Bytes of the masks and angles that forms add, 2 GiB as for what folding adds: a few bytes of a file can ask for the
largest mask again and again, each with another window."""


class UnsupportedError(Exception):
    """An operator that stays as it is, and why."""


@dataclass(slots=True)
class Shared:
    """Weights that forms have added and others may use.

    Attributes:
        names: by type, shape and a digest of what is in them.
        left: bytes that may still be added.
    """

    names: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    left: int = MOST_SHARED


@dataclass(slots=True)
class Surroundings:
    """The model around a node.

    Attributes:
        values: what is known of those in the model.
        weights: tensors that are taken out of the model; forms may add some.
        names: of values and nodes.
        opset: of the standard operators.
        shared: weights that forms have added and others may use.
        added: the graph inputs that stand in for weights that forms have added.
    """

    values: Inference
    weights: MutableMapping[str, ir.TensorProtocol]
    names: Names
    opset: int
    shared: Shared = field(default_factory=Shared)
    added: list[onnx.ValueInfoProto] = field(default_factory=list)


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
        self._names: list[str] = []
        self._added_before = len(around.added)
        self._shared: list[tuple[str, tuple[int, ...], bytes]] = []

    def __call__(self, operator: str, *inputs: str | None, outputs: int = 1, **attributes: Any) -> Any:
        names = [self._free(f"{self._base}/{operator}") for _ in range(outputs)]
        given = {key: value for key, value in attributes.items() if value is not None}
        name = f"{self.node.name or self._base}/{operator}"
        self.nodes.append(helper.make_node(operator, [each or "" for each in inputs], names, name=name, **given))
        return names[0] if outputs == 1 else tuple(names)

    def withdraw(self) -> None:
        """Takes back what has been added to the surroundings, when the form can't be written after all: a weight would
        stay in the model, read by nothing, or be thought to be there when it isn't."""
        for key in self._shared:
            self.around.shared.left += self.around.weights[self.around.shared.names.pop(key)].nbytes
        for name in self._names:
            self.around.names.taken.discard(name)
            self.around.weights.pop(name, None)
            self.around.values.types.pop(name, None)
        del self.around.added[self._added_before :]

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
        found = self.around.values.type_of(name)
        if found is None:
            raise UnsupportedError(f"the data type of {name!r} is not known")
        return ir.DataType(found[0])

    def constant(self, name: str) -> Array:
        """The array behind a weight or another constant.

        Raises:
            UnsupportedError: it is computed, or an input of the model.
        """
        array = self.constant_or_none(name)
        if array is None:
            raise UnsupportedError(f"{name!r} is not a constant")
        return array

    def constant_or_none(self, name: str) -> Array | None:
        """The array behind a weight or another constant, or None where it is none."""
        if name in self.around.weights:
            return np.asarray(self.around.weights[name].numpy())
        found = self.around.values.constant(name)
        return None if found is None else np.asarray(numpy_helper.to_array(found))

    def array(self, array: Array) -> str:
        """A small constant of its own data type."""
        name = self._free(f"{self._base}/constant")
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
        name = self._free(tensor.name or f"{self._base}/weight")
        tensor.name = name
        self.around.weights[name] = tensor
        shape = tuple(int(dim) for dim in tensor.shape.numpy())
        self.around.values.types[name] = int(tensor.dtype), shape
        self.around.added.append(helper.make_tensor_value_info(name, int(tensor.dtype), shape))
        return name

    def shared(self, array: Array, base: str) -> str:
        """A weight that other nodes may have made already, by whatever name: it is one for all of them. Nodes with the
        same `base` may have different ones, as layers with and without a window have.

        Raises:
            UnsupportedError: all of them would be too large.
        """
        array = np.ascontiguousarray(array)
        key = str(array.dtype), array.shape, hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
        shared = self.around.shared
        if key not in shared.names:
            if array.nbytes > shared.left:
                raise UnsupportedError(
                    f"its constant {base!r} has {array.nbytes} bytes: of the {MOST_SHARED} for such constants of all "
                    f"operators {shared.left} are left"
                )
            shared.names[key] = self.weight(ir.Tensor(array, name=base))
            shared.left -= array.nbytes
            self._shared.append(key)
        return shared.names[key]

    def _free(self, base: str) -> str:
        name = self.around.names.free(base)
        self._names.append(name)
        return name

    def _known(self, name: str) -> tuple[int | None, ...]:
        found = self.around.values.type_of(name)
        if found is None or found[1] is None:
            raise UnsupportedError(f"the rank of {name!r} is not known")
        return found[1]

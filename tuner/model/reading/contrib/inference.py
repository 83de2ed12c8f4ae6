"""What is known of a model's values, and what follows from it for others while operators get other forms.

Inference of a whole model for each operator that waits for the one before it would be quadratic: `Inference` infers
the nodes between two such operators alone, when the second one asks.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence

import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx import helper

from tilewright.tuner.model.folding.constants import Budget, fold_constants
from tilewright.tuner.model.graph import static_shape
from tilewright.tuner.model.messages import quiet
from tilewright.tuner.model.reading.names import used
from tilewright.tuner.model.reading.weights import SMALL
from tilewright.tuning_db.errors import ModelError

Type = tuple[int, tuple[int | None, ...] | None]
"""A data type, and a shape where that is known, with None for a dimension that is not."""

_MOST_FOLDED = 1 << 26  # bytes: as much as is folded for the shapes of a whole model
_OF_SHAPES = ("Shape", "Size")


class Inference:
    """Types and constants of a model's values.

    Nodes are given to it (`passed`) in the order of the graph, up to the one whose form is written. It looks at them
    when that asks for something that isn't known yet, and only at those of which something may be new.

    Attributes:
        types: of values, as far as they are known.
        constants: small tensors in the model.
    """

    def __init__(
        self,
        types: MutableMapping[str, Type],
        constants: MutableMapping[str, onnx.TensorProto],
        imports: Sequence[onnx.OperatorSetIdProto],
    ) -> None:
        self.types, self.constants = types, constants
        self._imports = list(imports)
        self._waiting: list[onnx.NodeProto] = []
        self._new: set[str] = set()  # values of which more may be known than inference of the whole model has found
        self._budget = Budget(largest=SMALL, most=_MOST_FOLDED)

    def passed(self, nodes: Iterable[onnx.NodeProto], *, written: bool = False) -> None:
        """Takes note of the next nodes of the graph, which may just have been `written`."""
        for node in nodes:
            if node.domain == "" and (written or self._may_tell(node)):
                self._waiting.append(node)
                self._new.update(node.output)

    def type_of(self, name: str) -> Type | None:
        """A value's type, or None where that isn't known."""
        if not self._is_known(name):
            self._learn()
        return self.types.get(name)

    def constant(self, name: str) -> onnx.TensorProto | None:
        """A value as a constant, or None where it is none."""
        if name not in self.constants and name in self._new:
            self._learn()
        return self.constants.get(name)

    def _may_tell(self, node: onnx.NodeProto) -> bool:
        unknown = any(name and not self._is_known(name) for name in node.output)
        return unknown or any(name in self._new for name in used(node))

    def _is_known(self, name: str) -> bool:
        shape = self.types[name][1] if name in self.types else None
        return shape is not None and None not in shape

    def _learn(self) -> None:
        """Looks at the nodes that wait, as at a model of their own."""
        nodes, self._waiting = self._waiting, []
        model, made = self._model(nodes)
        if not made:
            return
        try:
            # With types checked, for of operators that are functions nothing is inferred else.
            model = onnx.shape_inference.infer_shapes(model, check_type=True)
        except Exception:  # noqa: BLE001 - the C++ code raises several; inference of the whole model tells what is wrong
            return
        for value in model.graph.value_info:
            self._note(value.name, _type(value))
        of_shapes = any(node.op_type in _OF_SHAPES for node in model.graph.node)
        if of_shapes or not all(map(self._is_known, made)):
            # What they lack may follow from the arithmetic of shapes, which inference doesn't do.
            model.graph.output.extend(model.graph.value_info)
            self._fold(model, made)

    def _model(self, nodes: Iterable[onnx.NodeProto]) -> tuple[onnx.ModelProto, set[str]]:
        """The nodes of which something can follow, with what is known of the values before them; what they make."""
        kept: list[onnx.NodeProto] = []
        made: set[str] = set()
        outer: dict[str, None] = {}
        for node in nodes:
            names = [name for name in used(node) if name not in made]
            if all(name in self.types for name in names):
                outer.update(dict.fromkeys(names))
                kept.append(node)
                made.update(name for name in node.output if name)
        graph = onnx.GraphProto(name="nodes", node=kept)
        for name in outer:
            if name in self.constants:
                graph.initializer.append(self.constants[name])
                graph.initializer[-1].name = name
            else:
                graph.input.append(helper.make_tensor_value_info(name, *self.types[name]))
        return helper.make_model(graph, opset_imports=self._imports), made

    def _fold(self, model: onnx.ModelProto, made: set[str]) -> None:
        with quiet():
            worked = ir.from_proto(model)
        try:
            fold_constants(worked, self._budget)
        except ModelError:
            return  # folding of the whole model tells what is wrong
        for node in worked.graph:
            for value in node.outputs:
                shape = static_shape(value)
                if value.name in made and shape is not None and value.dtype is not None:
                    self._note(value.name, (int(value.dtype), shape))
                    constant = node.attributes.get("value") if node.op_type == "Constant" else None
                    if constant is not None:
                        self._keep(value.name, constant.as_tensor())
        for name, value in worked.graph.initializers.items():
            if name in made and value.const_value is not None:
                self._keep(name, value.const_value)

    def _keep(self, name: str, tensor: ir.TensorProtocol) -> None:
        if tensor.nbytes <= SMALL:
            self.constants[name] = ir.to_proto(tensor)
            self._note(name, (int(tensor.dtype), tuple(int(dim) for dim in tensor.shape.numpy())))

    def _note(self, name: str, found: Type | None) -> None:
        if found is not None and not self._is_known(name) and (found[1] is not None or name not in self.types):
            self.types[name] = found


def types_of(graph: onnx.GraphProto) -> dict[str, Type]:
    """The types in a graph that has been inferred."""
    values = (*graph.input, *graph.value_info, *graph.output)
    known = {value.name: found for value in values if (found := _type(value)) is not None}
    return known | {tensor.name: (tensor.data_type, tuple(tensor.dims)) for tensor in graph.initializer}


def constants_of(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The initializers of a graph, and what its `Constant` nodes hold."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain == "" and node.attribute[0].name == "value":
            held[node.output[0]] = node.attribute[0].t
    return held


def _type(value: onnx.ValueInfoProto) -> Type | None:
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        return None
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    return tensor.elem_type, dims if tensor.HasField("shape") else None

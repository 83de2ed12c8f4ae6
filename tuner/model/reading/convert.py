"""One form for all models: functions inlined, one opset, and no operator that onnx's own tools stumble over.

onnx's checker, inliner, converter and inference each refuse some models that are valid and that ONNX Runtime runs; what
is done about that is here.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.inliner
import onnx.version_converter
from onnx import TensorProto, helper, numpy_helper

from tilewright.tuner.model.messages import fault, quoted
from tilewright.tuning_db.errors import ModelError

OPSET = 21
"""What older models are converted to: the first opset with 4-bit types, and with 8-bit floats in every operator."""

QUANTISED_OPSET = 20
"""What older models with `QuantizeLinear`, or operators that will become it, are converted to. From 21 on it has an
attribute `output_dtype`, which ONNX Runtime's optimisations set to int8 where they move a node, and then make its zero
point uint8: the model doesn't load (1.32)."""

_TYPED = {"Clip": (1, 2), "Pad": (2,)}
"""Inputs that were attributes before opset 11, of which the converter makes constants of fp32."""

_KINDS: dict[int, np.dtype] = {
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    TensorProto.DOUBLE: np.dtype(np.float64),
}


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return next(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def check(model: onnx.ModelProto, when: str = "") -> None:
    """
    Raises:
        ModelError: onnx's checker refuses the model, which is so `when`.
    """
    # An output without a shape is invalid to the checker alone: it gets one by inference.
    shaped = [value for value in model.graph.output if value.type.tensor_type.HasField("shape")]
    if len(shaped) < len(model.graph.output):
        original, model = model, onnx.ModelProto()
        model.CopyFrom(original)
        model.graph.ClearField("output")
        model.graph.output.extend(shaped)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # noqa: BLE001 - ValidationError, but C++ code may raise others
        raise ModelError(f"the model is not valid{when}: {fault(error)}") from None


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without functions of its own; the one given may be changed.

    Raises:
        ModelError: they can't be inlined.
    """
    if not model.functions:
        return model
    try:
        # What converts a function of another opset looks for the types of its inputs there alone.
        known = {value.name for value in (*model.graph.input, *model.graph.value_info)}
        model.graph.value_info.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            for tensor in model.graph.initializer
            if tensor.name not in known
        )
        made = onnx.inliner.inline_local_functions(model, convert_version=True)
    except Exception as error:  # noqa: BLE001 - the C++ code raises several
        raise ModelError(f"the model's functions can't be inlined: {fault(error)}") from None
    left = {(function.domain, function.name) for function in made.functions}
    for node in made.graph.node:
        if (node.domain, node.op_type) in left:
            raise ModelError(
                f"function {quoted(node.op_type)} of domain {quoted(node.domain)} can't be inlined: its opset differs "
                f"from the model's, and its nodes can't be converted"
            )
    made.ClearField("functions")
    return made


def converted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of opset 21 at least, or 20 if it is quantised and older; the one given may be changed.

    Raises:
        ModelError: it can't be converted, or is not valid afterwards.
    """
    for entry in model.opset_import:
        if entry.domain == "ai.onnx":
            entry.domain = ""
    version = opset_of(model)
    names = {node.op_type for graph in _graphs(model.graph) for node in graph.node}
    quantised = "QuantizeLinear" in names or any(name.startswith(("QLinear", "QGemm")) for name in names)
    target = QUANTISED_OPSET if quantised else OPSET
    if version >= target:
        return model
    types = _types(model) if version < 11 else {}
    try:
        made = onnx.version_converter.convert_version(model, target)
    except Exception as error:  # noqa: BLE001 - the C++ code raises several
        raise ModelError(
            f"the model can't be converted from opset {version} to {target}: {fault(error)}; export it with {OPSET}"
        ) from None
    _type_constants(made.graph, types)
    check(made, f" once converted from opset {version} to {target}")
    return made


def spell_out(model: onnx.ModelProto) -> None:
    """Writes what onnx's checker and inference stumble over in another way, in place.

    `GroupNormalization` with a scale for each group, as it was from opset 18 to 20 and is deprecated now, becomes
    `InstanceNormalization` of groups. `MeanVarianceNormalization` gets its axes, without which inference fails.
    """
    graphs = list(_graphs(model.graph))
    taken = {name for graph in graphs for node in graph.node for name in (*node.input, *node.output)}
    for graph in graphs:
        if 18 <= opset_of(model) < OPSET and any(map(_has_groups, graph.node)):
            nodes = [each for node in graph.node for each in _by_groups(node, taken)]
            graph.ClearField("node")
            graph.node.extend(nodes)
        for node in graph.node:
            if node.op_type == "MeanVarianceNormalization" and _is_standard(node) and not _attribute(node, "axes"):
                node.attribute.append(helper.make_attribute("axes", [0, 2, 3]))


def typed_casts(model: onnx.ModelProto) -> None:
    """Makes a `Cast` of every `CastLike` of the main graph whose type inference has found, in place: of a constant that
    is a constant again."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    for node in model.graph.node:
        if node.op_type == "CastLike" and _is_standard(node) and types.get(node.output[0]):
            node.op_type = "Cast"
            del node.input[1:]
            node.attribute.append(helper.make_attribute("to", types[node.output[0]]))


def _has_groups(node: onnx.NodeProto) -> bool:
    whole = len(node.input) == 3 and len(node.output) == 1 and _attribute(node, "num_groups") is not None
    return node.op_type == "GroupNormalization" and _is_standard(node) and whole


def _by_groups(node: onnx.NodeProto, taken: set[str]) -> Iterator[onnx.NodeProto]:
    groups, epsilon = _attribute(node, "num_groups"), _attribute(node, "epsilon")
    if groups is None or not _has_groups(node):
        kept = onnx.NodeProto()  # what a field is cleared of is gone
        kept.CopyFrom(node)
        yield kept
        return

    def fresh(part: str) -> str:
        name = f"{node.output[0]}/{part}"
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    (x, scale, bias), (y,) = node.input, node.output
    shape, places, apart, normal = map(fresh, ("shape", "groups", "apart", "normal"))
    yield helper.make_node("Shape", [x], [shape])
    yield helper.make_node(
        "Constant", [], [places], value=numpy_helper.from_array(np.array([0, groups.i, -1], np.int64))
    )
    yield helper.make_node("Reshape", [x, places], [apart])
    number = 1e-5 if epsilon is None else epsilon.f
    yield helper.make_node("InstanceNormalization", [apart, scale, bias], [normal], name=node.name, epsilon=number)
    yield helper.make_node("Reshape", [normal, shape], [y])


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """The element types of the main graph's values."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {tensor.name: tensor.data_type for tensor in graph.initializer}


def _type_constants(graph: onnx.GraphProto, types: dict[str, int]) -> None:
    """Gives constants that the converter has made of attributes the type of what they are used with."""
    made = {node.output[0]: node.attribute[0] for node in graph.node if node.op_type == "Constant" and node.attribute}
    for node in graph.node:
        kind = types.get(node.input[0], 0) if node.op_type in _TYPED and _is_standard(node) else 0
        if kind not in _KINDS:
            continue
        for name in (node.input[slot] for slot in _TYPED[node.op_type] if slot < len(node.input)):
            attribute = made.get(name)
            if attribute is None or attribute.name != "value" or attribute.t.data_type != TensorProto.FLOAT:
                continue
            ends = ml_dtypes.finfo(_KINDS[kind])
            array = np.clip(numpy_helper.to_array(attribute.t).astype(np.float64), float(ends.min), float(ends.max))
            attribute.t.CopyFrom(numpy_helper.from_array(array.astype(_KINDS[kind])))


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every one inside it. Protobuf's parser has bounded how deep they nest."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _is_standard(node: onnx.NodeProto) -> bool:
    return node.domain in ("", "ai.onnx")


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto | None:
    return next((attribute for attribute in node.attribute if attribute.name == name), None)

"""Which operators have standard forms, and putting those in their places: `rewrite`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence

import onnx
import onnx.shape_inference
import onnx_ir as ir

from tilewright.tuner.model.messages import fault, quiet
from tilewright.tuner.model.reading.contrib import (
    attention,
    block_weights,
    elementwise,
    grouped_attention,
    norms,
    products,
    quantised,
    rotary,
)
from tilewright.tuner.model.reading.contrib.writer import Surroundings, UnsupportedError, Writer
from tilewright.tuner.model.reading.names import LARGEST_GRAPH
from tilewright.tuner.model.reading.shapes import fold_for_shapes
from tilewright.tuning_db.errors import ModelError

DOMAIN = "com.microsoft"

FORMS: dict[str, Callable[[Writer], Sequence[str | None]]] = {
    "Attention": attention.attention,
    "BiasAdd": elementwise.bias_add,
    "BiasGelu": elementwise.bias_gelu,
    "BiasSplitGelu": elementwise.bias_split_gelu,
    "EmbedLayerNormalization": norms.embed_layer_norm,
    "FastGelu": elementwise.fast_gelu,
    "FusedConv": products.fused_conv,
    "FusedGemm": products.fused_gemm,
    "FusedMatMul": products.fused_matmul,
    "Gelu": elementwise.gelu,
    "GroupNorm": norms.group_norm,
    "GroupQueryAttention": grouped_attention.group_query_attention,
    "LayerNormalization": norms.layer_norm,
    "MatMulNBits": block_weights.matmul_nbits,
    "MultiHeadAttention": attention.multi_head_attention,
    "NhwcConv": products.nhwc_conv,
    "QGemm": quantised.gemm,
    "QLinearAdd": quantised.add,
    "QLinearAveragePool": quantised.average_pool,
    "QLinearConcat": quantised.concat,
    "QLinearConv": quantised.conv,
    "QLinearGlobalAveragePool": quantised.global_average_pool,
    "QLinearLeakyRelu": quantised.leaky_relu,
    "QLinearMatMul": quantised.matmul,
    "QLinearMul": quantised.multiply,
    "QLinearSigmoid": quantised.sigmoid,
    "QLinearSoftmax": quantised.softmax,
    "QuickGelu": elementwise.quick_gelu,
    "RotaryEmbedding": rotary.rotary_embedding,
    "SimplifiedLayerNormalization": norms.rms_norm,
    "SkipGroupNorm": norms.skip_group_norm,
    "SkipLayerNormalization": norms.skip_layer_norm,
    "SkipSimplifiedLayerNormalization": norms.skip_rms_norm,
}
"""The operators, and what writes each in standard ones."""

_STANDARD: dict[str, int | None] = {
    "LayerNormalization": 17,
    "QLinearConv": None,
    "QLinearMatMul": None,
    "SimplifiedLayerNormalization": None,
}
"""Of those, what is found among the standard operators, and the opset from which it stays what it is: ONNX Runtime has
two of its own there."""


def set_apart(model: onnx.ModelProto) -> None:
    """Gives standard operators that have a form here ONNX Runtime's domain, in place, until they get it: of what is its
    own among them onnx's checker knows nothing."""
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    known = {name for name, since in _STANDARD.items() if since is None or version < since}
    found = [node for node in model.graph.node if node.domain in ("", "ai.onnx") and node.op_type in known]
    for node in found:
        node.domain = DOMAIN
    if found and DOMAIN not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))


def rounds_otherwise(model: onnx.ModelProto) -> bool:
    """Whether ONNX Runtime rounds inside of an operator that has a form where the form doesn't: the results of
    quantised ones to other integers now and then, the inputs of `MatMulNBits` to 8 bits where `accuracy_level` is 4."""
    found = [node for node in model.graph.node if _has_form(node)]
    coarse = any(
        attribute.name == "accuracy_level" and attribute.i == 4 for node in found for attribute in node.attribute
    )
    return coarse or any(node.op_type.startswith("Q") and node.op_type != "QuickGelu" for node in found)


def rewrite(model: onnx.ModelProto, weights: MutableMapping[str, ir.TensorProtocol]) -> dict[str, str]:
    """Puts standard operators in the place of ONNX Runtime's own in the main graph, in place.

    `weights` are the tensors that graph inputs stand in for (`weights.take_weights`); some are put in another form.

    Returns:
        By the name of a node that stays, why it does.

    Raises:
        ModelError: its shapes don't go together.
    """
    graph = model.graph
    reasons: dict[str, str] = {}
    read: set[str] = set()
    folded = False
    for _ in range(max(10, LARGEST_GRAPH * 10 // len(graph.node))):
        if not any(map(_has_form, graph.node)):
            break
        around = _surroundings(model, weights)
        nodes: list[onnx.NodeProto] = []
        reasons, before = {}, len(read)
        for node in graph.node:
            if not _has_form(node):
                nodes.append(node)
                continue
            node.name = node.name or around.name(node.op_type)
            try:
                nodes += _written(node, around)
            except UnsupportedError as error:
                reasons[node.name] = str(error)
                nodes.append(node)
            else:
                read |= {*node.input, node.name}
        if len(read) == before:
            if folded:
                break
            # What they wait for may follow from the arithmetic of shapes, which inference doesn't do.
            known = onnx.shape_inference.infer_shapes(model, check_type=True)
            with quiet():
                worked = ir.from_proto(known)
            fold_for_shapes(worked)
            model.CopyFrom(ir.to_proto(worked))
            graph = model.graph
            folded = True
            continue
        folded = False
        rest = onnx.GraphProto(node=nodes)  # copies: what a field is cleared of is gone
        graph.ClearField("node")
        graph.node.extend(rest.node)
        graph.input.extend(around.added)
    _drop_unused(model, weights, read)
    for node in graph.node:
        if node.domain == DOMAIN and node.op_type in _STANDARD:
            node.domain = ""
    return reasons


def _has_form(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in FORMS


def _written(node: onnx.NodeProto, around: Surroundings) -> list[onnx.NodeProto]:
    """The nodes in place of one, that give what it gave by the same names."""
    write = Writer(node, around)
    made = list(FORMS[node.op_type](write))
    made += [None] * (len(node.output) - len(made))
    for place, name in enumerate(node.output):
        if name and made[place] is None:
            raise UnsupportedError(f"its output {place} is used")
    names: dict[str, str] = {}
    own = {name for each in write.nodes for name in each.output}
    copies = []
    for name, result in zip(node.output, made, strict=False):
        if not name or result is None:
            continue
        if result in own and result not in names:
            names[result] = name
        else:
            copies.append(onnx.helper.make_node("Identity", [names.get(result, result)], [name]))
    for each in write.nodes:
        for field in (each.input, each.output):
            for place, name in enumerate(field):
                field[place] = names.get(name, name)
    return [*write.nodes, *copies]


def _surroundings(model: onnx.ModelProto, weights: MutableMapping[str, ir.TensorProtocol]) -> Surroundings:
    graph = model.graph
    try:
        # With types checked, for of operators that are functions, such as GroupNormalization, nothing is inferred else.
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True).graph
    except Exception as error:  # noqa: BLE001 - the C++ code raises several
        raise ModelError(f"the model's shapes don't go together: {fault(error)}") from None
    types = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.elem_type:
            dims = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
            types[value.name] = tensor.elem_type, dims if tensor.HasField("shape") else None
    constants = {tensor.name: tensor for tensor in graph.initializer}
    types |= {name: (tensor.data_type, tuple(tensor.dims)) for name, tensor in constants.items()}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain == "" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
    taken = set(_names(graph))
    opset = next(int(entry.version) for entry in model.opset_import if entry.domain == "")
    return Surroundings(types, weights, constants, taken, opset)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """All names in a graph and in those inside it, of values and of nodes."""
    yield from (each.name for each in (*graph.input, *graph.initializer))
    for node in graph.node:
        yield node.name
        yield from (*node.input, *node.output)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _names(inner)


def _drop_unused(model: onnx.ModelProto, weights: MutableMapping[str, ir.TensorProtocol], names: set[str]) -> None:
    """Lets go of those weights and constants that nothing reads any more, now that they are in another form."""
    graph = model.graph
    idle = names - set(_names(onnx.GraphProto(node=graph.node))) - {value.name for value in graph.output}
    rest = onnx.GraphProto(
        input=[value for value in graph.input if value.name not in idle & set(weights)],
        initializer=[tensor for tensor in graph.initializer if tensor.name not in idle],
    )
    for name in idle & set(weights):
        del weights[name]
    for field in ("input", "initializer"):
        graph.ClearField(field)
        getattr(graph, field).extend(getattr(rest, field))

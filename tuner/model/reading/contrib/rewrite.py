"""Which operators have standard forms, and putting those in their places: `rewrite`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence

import onnx
import onnx.shape_inference
import onnx_ir as ir

from tilewright.tuner.model.graph import Names
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
from tilewright.tuner.model.reading.contrib.inference import Inference, constants_of, types_of
from tilewright.tuner.model.reading.contrib.writer import Shared, Surroundings, UnsupportedError, Writer
from tilewright.tuner.model.reading.names import LARGEST_GRAPH, all_nodes, subgraphs
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
    "TransposeMatMul": products.fused_matmul,  # its older name
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

_LEAST_ROUNDS = 10
"""How often a model is inferred, however large it is. Most need two: one in which all operators get their forms, those
that wait for others behind them, and one that finds none left."""


def set_apart(model: onnx.ModelProto) -> None:
    """Gives standard operators that have a form here ONNX Runtime's domain, in place, until they get it: of what is its
    own among them onnx's checker knows nothing."""
    version = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    known = {name for name, since in _STANDARD.items() if since is None or version < since}
    nodes = all_nodes(model.graph.node)
    found = [node for node in nodes if node.domain in ("", "ai.onnx") and node.op_type in known]
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


def rewrite(
    model: onnx.ModelProto, weights: MutableMapping[str, ir.TensorProtocol]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Puts standard operators in the place of ONNX Runtime's own in the main graph; the model given may be changed.

    `weights` are the tensors that graph inputs stand in for (`weights.take_weights`); some are put in another form.

    Returns:
        The model, and by the name of a node that stays, why it does.

    Raises:
        ModelError: its shapes don't go together.
    """
    reasons: dict[str, str] = {}
    read: set[str] = set()
    shared = Shared()
    folded = False
    _give_back(_inner_nodes(model.graph))
    rounds = max(_LEAST_ROUNDS, LARGEST_GRAPH * 10 // max(1, len(model.graph.node)))
    for _ in range(rounds):
        if not any(map(_has_form, model.graph.node)):
            break
        around = _surroundings(model, weights, shared)
        nodes: list[onnx.NodeProto] = []
        reasons, progress = {}, False
        for node in model.graph.node:
            written: list[onnx.NodeProto] | None = None
            if _has_form(node):
                node.name = node.name or around.names.free(node.op_type)
                try:
                    written = _written(node, around)
                except UnsupportedError as error:
                    reasons[node.name] = str(error)
                else:
                    read |= {*node.input, node.name}
                    progress = True
            around.values.passed(written or [node], written=written is not None)
            nodes += [node] if written is None else written
        if progress:
            model, folded = _with_nodes(model, nodes, around.added), False
        elif folded:
            break
        else:
            # What they wait for may follow from the arithmetic of shapes, which inference doesn't do.
            model, folded = _folded(model), True
            set_apart(model)  # the branch of an `If` that was taken is part of the main graph now
            _give_back(_inner_nodes(model.graph))
    else:
        limit = f"after {rounds} rounds of inference, the most for a model of its size"
        reasons = {name: f"{reason}, {limit}" for name, reason in reasons.items()}
    _drop_unused(model, weights, read)
    _give_back(model.graph.node)
    return model, reasons | _inside_others(model.graph)


def _inner_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Those inside of control flow."""
    for node in graph.node:
        for inner in subgraphs(node):
            yield from all_nodes(inner.node)


def _give_back(nodes: Iterable[onnx.NodeProto]) -> None:
    """Undoes `set_apart` for nodes that stay: what onnx knows of them is known again."""
    for node in nodes:
        if node.domain == DOMAIN and node.op_type in _STANDARD:
            node.domain = ""


def _inside_others(graph: onnx.GraphProto) -> dict[str, str]:
    """Why those stay that are inside of control flow, by names of their own, which they get."""
    # Of a converted model, an operator that stays what it is from some opset on is a standard one.
    strange = {name for name, since in _STANDARD.items() if since is None}
    found = [node for node in _inner_nodes(graph) if _has_form(node) or (not node.domain and node.op_type in strange)]
    if not found:
        return {}
    named = Counter(node.name for node in all_nodes(graph.node))
    names = Names(set(named))
    for node in found:
        if not node.name or named[node.name] > 1:
            node.name = names.free(node.name or node.op_type)
    return {node.name: "it is inside a control-flow node" for node in found}


def _with_nodes(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], inputs: Sequence[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """A model with other nodes, and more inputs."""
    rest = onnx.GraphProto(node=nodes)  # copies: what a field is cleared of is gone
    model.graph.ClearField("node")
    model.graph.node.extend(rest.node)
    model.graph.input.extend(inputs)
    # A message keeps the memory of what it was cleared of.
    made = onnx.ModelProto()
    made.ParseFromString(model.SerializeToString())
    return made


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose shapes are known where they follow from constants."""
    known = onnx.shape_inference.infer_shapes(model, check_type=True)
    with quiet():
        worked = ir.from_proto(known)
    fold_for_shapes(worked)
    return ir.to_proto(worked)


def _has_form(node: onnx.NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in FORMS


def _written(node: onnx.NodeProto, around: Surroundings) -> list[onnx.NodeProto]:
    """The nodes in place of one, that give what it gave by the same names."""
    write = Writer(node, around)
    try:
        return _nodes(write)
    except UnsupportedError:
        write.withdraw()
        raise


def _nodes(write: Writer) -> list[onnx.NodeProto]:
    node = write.node
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


def _surroundings(
    model: onnx.ModelProto, weights: MutableMapping[str, ir.TensorProtocol], shared: Shared
) -> Surroundings:
    try:
        # With types checked, for of operators that are functions, such as GroupNormalization, nothing is inferred else.
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True).graph
    except Exception as error:  # noqa: BLE001 - the C++ code raises several
        raise ModelError(f"the model's shapes don't go together: {fault(error)}") from None
    values = Inference(types_of(inferred), constants_of(model.graph), model.opset_import)
    opset = next(int(entry.version) for entry in model.opset_import if entry.domain == "")
    return Surroundings(values, weights, Names(set(_names(model.graph))), opset, shared)


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
    gone = idle & weights.keys()
    rest = onnx.GraphProto(
        input=[value for value in graph.input if value.name not in gone],
        initializer=[tensor for tensor in graph.initializer if tensor.name not in idle],
    )
    for name in gone:
        del weights[name]
    for field in ("input", "initializer"):
        graph.ClearField(field)
        getattr(graph, field).extend(getattr(rest, field))

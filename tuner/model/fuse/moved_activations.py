"""Activations behind what moves the result of a product go before it: act(Transpose(x·W)) is Transpose(act(x·W)).

So a product takes them in. Exporters put a `Reshape` and a `Transpose` between a convolution and its activation where
pixels become a sequence, as in SegFormer; and a convolution in one dimension has a `Reshape` behind it here.
"""

from __future__ import annotations

import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.epilogue import ACTIVATION, KINDS
from tilewright.tuner.model.fuse.layout import RESHAPES
from tilewright.tuner.model.fuse.opening import OPEN, inputs_of, is_open, refusal, settings_of

_MOVES = (*RESHAPES, "Transpose")


def move_activations(model: ir.Model) -> bool:
    """Puts activations before the moves between them and an open product that can take them in, in place, and says
    whether there was any. What an activation gave keeps its name, and what lay before it is gone."""
    edit = Editor(model)
    moved = False
    for node in list(model.graph):
        if node.domain != OPEN or node.op_type != "Activation" or node.inputs[0] is None:
            continue
        moves: list[ir.Node] = []
        value = node.inputs[0]
        while (maker := value.producer()) is not None and _is_move(maker) and _goes_nowhere_else(value):
            moves.insert(0, maker)
            assert maker.inputs[0] is not None
            value = maker.inputs[0]
        if not moves or maker is None or not _takes(maker, node) or not _goes_nowhere_else(value):
            continue
        out = ir.Value(name=edit.name(f"{value.name}_activated"), type=value.type, shape=value.shape)
        made = [ir.node("Activation", [value], dict(node.attributes), domain=OPEN, outputs=[out], name=node.name)]
        for move in moves:
            before = move.outputs[0]
            after = ir.Value(name=edit.name(f"{before.name}_activated"), type=before.type, shape=before.shape)
            given = [made[-1].outputs[0], *move.inputs[1:]]
            made.append(ir.node(move.op_type, given, dict(move.attributes), outputs=[after], name=move.name))
        for each in made[:-1]:
            model.graph.insert_before(node, each)
        edit.replace(node, made[-1])
        for move in reversed(moves):
            model.graph.remove(move, safe=True)
        moved = True
    return moved


def _is_move(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in _MOVES


def _takes(product: ir.Node, activation: ir.Node) -> bool:
    """Whether a node is an open product that can have the activation."""
    if not is_open(product) or product.op_type not in KINDS or product.graph is not activation.graph:
        return False
    settings = settings_of(product)
    if settings.get(ACTIVATION, "none") != "none" or "gated" in settings:
        return False
    settings[ACTIVATION] = activation.attributes[ACTIVATION].as_string()
    return refusal(product.op_type, inputs_of(product), settings) is None


def _goes_nowhere_else(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()

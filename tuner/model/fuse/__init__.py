"""Fusing: chains of a model's graph → nodes that are one kernel each.

`fuse` opens matrix products, convolutions and attentions (`opening.py`, `attention.py`), writes activations as one node
each (`activations.py`), lets products take in what follows them (`epilogue.py`), or puts it before them where it moves
their rows (`rows.py`), and closes them: each is then a plugin of ours and a model-local function in one
(`tilewright.tuner.model.bodies`). So is an RMS norm (`rms_norms.py`); layer norms become one node of ONNX's
(`norms.py`), and an `Einsum` that is a matrix product one (`einsums.py`). The rules are `onnxscript.rewriter`'s.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter import pattern

from tilewright.tuner.model import bodies
from tilewright.tuner.model.fuse import (
    activations,
    attention,
    einsums,
    epilogue,
    halves,
    norms,
    packed,
    quantised,
    ranks,
    rms_norms,
    rows,
)
from tilewright.tuner.model.fuse.layout import RESHAPES, Maker
from tilewright.tuner.model.fuse.moved_activations import move_activations
from tilewright.tuner.model.fuse.one_row import OneRow
from tilewright.tuner.model.fuse.opening import OpenConv, OpenGemm, OpenMatMul, close, is_open, register_constants
from tilewright.tuner.model.fuse.outcome import FusionReport, Log, Match, Miss
from tilewright.tuner.model.graph import fused_nodes, is_fused, unique_names

__all__ = ["fuse", "FusionReport", "Match", "Miss"]


def fuse(model: ir.Model) -> FusionReport:
    """Fuses a model in place; what it computes stays the same, up to rounding in fp32.

    Every value that a fused node reads must have a known data type and shape, as `read_model` leaves them; nodes whose
    values have not are left as they are, with that as the reason.
    """
    unique_names(model)
    before = len(model.graph)
    log, copies, rows_of_one = Log(), Maker(), OneRow(model)
    given = {node.name for node in model.graph}
    activations.constants_last(model)
    ranks.lower_constants(model)
    halves.join_slices(model)
    quantised.move_relu(model)
    norms.apply(model, log)
    rms_norms.apply(model, log)
    attention.apply(model, log)
    packed.unpack(model)
    einsums.to_products(model)
    rows_of_one.convolutions(log)
    for rules in (
        pattern.RewriteRuleSet([rule.rule(log) for rule in (OpenMatMul, OpenGemm, OpenConv)]),
        *activations.rules(),
    ):
        rules.apply_to_model(model)
        register_constants(model)
    growing = True
    while growing:
        # All, each time: what one does makes room for another.
        moved = [rows.move_before(model), rows_of_one.move_sums(log), move_activations(model)]
        growing = any([*moved, epilogue.rules(log, copies).apply_to_model(model)])
        register_constants(model)
        # What nobody reads any more would count as a use of what it reads, and end a chain.
        passes.RemoveUnusedNodesPass()(model)
    log.settle()
    epilogue.note_gates(model, log)
    activations.spell_out(model)
    rms_norms.take_sums(model, log)
    log.settle()
    rows_of_one.name_steps()
    ends = {node.name or "": _end(node, given) for node in model.graph if is_open(node) or is_fused(node)}
    close(model)
    bodies.attach_bodies(model)
    for clean in (passes.RemoveUnusedNodesPass(), passes.RemoveUnusedOpsetsPass()):
        clean(model)
    layers = {node.name or "": node.op_type for node in fused_nodes(model)}
    return FusionReport(tuple(log.matches), tuple(log.misses.values()), before, len(model.graph), layers, ends)


def _end(node: ir.Node, given: Collection[str | None]) -> str:
    """Why the chain of a node goes no further. Moves that fusing has made are no nodes of the user's, whose names are
    `given`: of those it says what comes behind."""
    value = node.outputs[0]
    while not value.is_graph_output():
        uses = value.uses()
        if len(uses) != 1:
            return f"its result is used {len(uses)} times"
        ((user, _),) = uses
        if user.name in given or user.domain != "" or user.op_type not in (*RESHAPES, "Transpose"):
            return f"its result goes to {user.op_type} {user.name!r}"
        value = user.outputs[0]
    return "its result is an output of the model"

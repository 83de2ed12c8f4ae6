"""What needn't be done at run time: constants, BatchNorm, and nodes that change nothing. `fold` does it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import (
    cast_cast_rule,
    fuse_pad_into_conv_rule,
    no_op_cast_rule,
    no_op_expand_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
)

from tilewright.tuner.model.folding.affine import fold_affine
from tilewright.tuner.model.folding.constants import Budget, fold_constants
from tilewright.tuner.model.folding.norms import fold_norms
from tilewright.tuner.model.graph import static_shape, unique_names
from tilewright.tuner.model.messages import fault, quiet
from tilewright.tuning_db.errors import ModelError

_ROUNDS = 4
"""How often constants are folded and rules applied: what one does makes room for the other, seldom more than twice."""


@dataclass(frozen=True, slots=True)
class FoldingReport:
    """What `fold` did: nodes of the main graph before and after, and how many were folded, by kind.

    The kinds: `constant` (constant arithmetic, identities, dropout), `no_op` (casts and transposes that change nothing,
    an `Expand` to the same shape, a `Pad` that a convolution does), `sum` (of two: `Add`), `auto_pad` (made explicit),
    those of `affine.fold_affine`, `common` (nodes that compute the same) and `unused`.
    """

    nodes_before: int
    nodes_after: int
    folded: Mapping[str, int]


def fold(model: ir.Model) -> FoldingReport:
    """Folds what is constant into constants and weights, and removes what changes nothing, in place.

    Outputs are those of the model before but for rounding, and have their names. A value that is left keeps its name,
    and is the same as that of this name was before; a node that is left keeps its name. All constants are initializers
    afterwards. What a model may grow by is bounded (`constants.LARGEST_FOLDED`, `constants.MOST_FOLDED`).

    Raises:
        ModelError: a node that can't be what it says, or a BatchNorm of negative variance.
    """
    before = len(model.graph)
    outputs = [str(value.name) for value in model.graph.outputs]
    budget = Budget()
    found: Counter[str] = Counter()
    found["unused"] += _lost(model, common.RemoveUnusedNodesPass())
    for _ in range(_ROUNDS):
        found_before = found.total()
        found["constant"] += _fold_constants(model, budget)
        found["auto_pad"] += _explicit_pads(model)
        found["sum"] += _sums(model)
        found["no_op"] += _lost(model, RewritePass(list(_RULES)), _Identities())
        found["unused"] += _lost(model, common.RemoveUnusedNodesPass())
        _run(model, common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0))
        found.update(fold_affine(model, budget))
        _run(model, _Identities())
        if found.total() == found_before:
            break
    found["common"] += _lost(model, common.DeduplicateInitializersPass(), common.CommonSubexpressionEliminationPass())
    found["unused"] += _lost(model, common.RemoveUnusedNodesPass())
    _run(model, common.RemoveUnusedOpsetsPass())
    _name_outputs(model, outputs)
    _fix_inner_outputs(model)
    unique_names(model)
    return FoldingReport(before, len(model.graph), {kind: count for kind, count in sorted(found.items()) if count})


_RULES = (
    no_op_cast_rule,
    cast_cast_rule,
    no_op_transpose_rule,
    transpose_transpose_rule,
    no_op_expand_rule,
    fuse_pad_into_conv_rule,
)


class _Identities(ir.passes.InPlacePass):
    """`IdentityEliminationPass`, but it leaves those by which a subgraph gives a value from around it: a subgraph may
    only give what it makes itself (onnx, IR specification), and no outer value may take the name of its output."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        held = []
        for graph in model.graph.subgraphs():
            for value in graph.outputs:
                node, source = value.producer(), _behind_identities(value).producer()
                if _is_identity(node) and (source is None or source.graph is not graph):
                    held.append(node)
        for node in held:
            node.domain = _HELD
        result = common.IdentityEliminationPass()(model)
        for node in held:
            node.domain = ""
        return result


_HELD = "tilewright.held"
"""The domain of an `Identity` that a pass is not to see."""


def _is_identity(node: ir.Node | None) -> TypeGuard[ir.Node]:
    if node is None or node.op_type != "Identity" or node.domain != "":
        return False
    return len(node.inputs) == 1 and node.inputs[0] is not None


def _behind_identities(value: ir.Value) -> ir.Value:
    """The value that another is the same as."""
    while _is_identity(node := value.producer()):
        source = node.inputs[0]
        assert source is not None
        value = source
    return value


def _run(model: ir.Model, *passes: ir.passes.PassBase) -> None:
    for each in passes:
        try:
            with quiet():
                each(model)
        except Exception as error:  # noqa: BLE001 - whatever a malformed node makes the library raise
            raise ModelError(f"the model can't be folded: {fault(error.__cause__ or error)}") from None


def _lost(model: ir.Model, *passes: ir.passes.PassBase) -> int:
    """How many nodes the main graph has less after the passes."""
    before = len(model.graph)
    _run(model, *passes)
    return before - len(model.graph)


def _name_outputs(model: ir.Model, names: Sequence[str]) -> None:
    """Gives the outputs their names again: of two that have come to one value, the second is an `Identity` of it."""
    graph = model.graph
    owner: dict[ir.Value, str] = {}
    for value, name in zip(graph.outputs, names, strict=True):
        fixed = value.is_graph_input() or value.is_initializer()
        owner.setdefault(value, str(value.name) if fixed else name)
    for value, name in owner.items():
        if value.name != name:
            value.name = name
    for place, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        if owner[value] != name:
            node = ir.node("Identity", [value], name=f"{name}_Identity")
            (output,) = node.outputs
            output.name, output.type, output.shape = name, value.type, value.shape
            graph.append(node)
            graph.outputs[place] = output


def _fix_inner_outputs(model: ir.Model) -> None:
    """Puts an `Identity` where a subgraph gives one value twice, or its own input. Of the main graph, whose outputs
    have names that callers know, those stay as the file has them."""
    outputs = list(model.graph.outputs)
    model.graph.outputs.clear()
    model.graph.outputs.extend(value for value in dict.fromkeys(outputs) if not value.is_graph_input())
    _run(model, common.OutputFixPass())
    model.graph.outputs.clear()
    model.graph.outputs.extend(outputs)


def _fold_constants(model: ir.Model, budget: Budget) -> int:
    before = len(model.graph)
    fold_constants(model, budget)
    if fold_norms(model, budget):
        fold_constants(model, budget)
    _run(model, _Identities(), common.RemoveUnusedNodesPass())
    return before - len(model.graph)


def _sums(model: ir.Model) -> int:
    """`Sum` of two inputs to `Add`, which every rule for residuals knows; of one to `Identity`."""
    count = 0
    for node in model.graph:
        if node.op_type == "Sum" and node.domain == "" and len(node.inputs) in (1, 2):
            node.op_type = "Add" if len(node.inputs) == 2 else "Identity"
            count += 1
    return count


def _explicit_pads(model: ir.Model) -> int:
    """`auto_pad` of convolutions to `pads`, which the plugins have.

    SAME: the output is ⌈input / stride⌉, and of the (output - 1) · stride + dilation · (kernel - 1) + 1 - input lines
    that are missing the odd one is at the end (SAME_UPPER) or the beginning (SAME_LOWER) (onnx, operator Conv).
    """
    count = 0
    for node in model.graph:
        if node.op_type != "Conv" or node.domain != "" or "auto_pad" not in node.attributes:
            continue
        mode = node.attributes.get_string("auto_pad", "NOTSET")
        x, w, y = (static_shape(value) if value is not None else None for value in (*node.inputs[:2], node.outputs[0]))
        if x is None or w is None or y is None or mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
            continue
        axes = len(x) - 2
        kernel = node.attributes.get_ints("kernel_shape", w[2:])
        strides = node.attributes.get_ints("strides", [1] * axes)
        dilations = node.attributes.get_ints("dilations", [1] * axes)
        if mode.startswith("SAME"):
            missing = [
                max(0, (out - 1) * stride + dilation * (size - 1) + 1 - whole)
                for whole, out, size, stride, dilation in zip(x[2:], y[2:], kernel, strides, dilations, strict=True)
            ]
            less, more = [size // 2 for size in missing], [size - size // 2 for size in missing]
            node.attributes["pads"] = ir.AttrInt64s("pads", [*less, *more] if mode == "SAME_UPPER" else [*more, *less])
        elif mode == "VALID":
            node.attributes["pads"] = ir.AttrInt64s("pads", [0] * 2 * axes)
        del node.attributes["auto_pad"]
        count += 1
    return count

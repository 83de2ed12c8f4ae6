"""Which layers are quantised where nobody says otherwise, and which values are calibrated for it.

Rules, each of which gives the reason that a layer stays at the base precision:

- *First*: a layer that reads a graph input through nothing but shape operators and fixed scaling. Its input has few
  channels, so there is little time to gain, and pixels or samples have 8 bits of their own: rounded once more they lose
  what all that follows builds on.
- *Last*: a layer behind which no other one, convolution or matrix product comes; norms don't count. No later layer
  averages its error away, and a quantised activation right before the logits moves them directly.
- *Softmax and norms* are no layers of int8 or fp8: the integers of a softmax have no room for its small numbers, which
  decide sums over many keys; a norm divides by a statistic, which an error of the largest value shifts as a whole.
- What `quantise.eligible` refuses: products of two activations, operators that are no plugin of ours, shapes that the
  kernel does not take, sums of int8 that its int32 has no room for.

Where weights alone are quantised, no input is rounded, and the first layer is one as all others. The last has 8 bits
where others have 4: it moves the logits directly.

Activations of layers joined by operators that quantisation commutes with (`output_scales.MOVED`) get one scale, the
largest of theirs, so that one step serves all.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from tilewright.kernels.device import Device
from tilewright.tuner.model.graph import fused_nodes, is_constant, is_fused, op_of, plugin_inputs, plugin_settings
from tilewright.tuner.model.precision.grouped import refused
from tilewright.tuner.model.precision.kept import MOVING
from tilewright.tuner.model.precision.output_scales import MOVED, PRODUCERS, shiftable
from tilewright.tuner.model.precision.quantise import ACTIVATIONS, QUANTISED, LayerPrecision, can_have_zero, eligible
from tilewright.tuner.model.precision.zeros import LOWEST
from tilewright.tuning_db.errors import UsageError

FIRST = "first layer: it reads the graph's input, whose own 8 bits would be rounded once more"
LAST = "last layer: nothing behind it averages its error away"

_HEAVY = frozenset(("Conv", "ConvTranspose", "ConvInteger", "MatMul", "MatMulInteger", "Gemm", "Attention", "Einsum"))
_HEAVY |= frozenset(("LSTM", "GRU", "RNN", "If", "Loop", "Scan"))
_SHAPING = MOVING | frozenset(("Cast", "DepthToSpace", "SpaceToDepth", "Expand", "Tile"))
_FIXED = frozenset(("Add", "Sub", "Mul", "Div"))
"""Operators that normalise an input where their other operand is a constant."""


def first_layers(model: ir.Model) -> set[str]:
    """Names of the fused nodes that read a graph input through nothing but shape operators and fixed scaling."""
    raw: set[ir.Value | None] = set(model.graph.inputs)
    found = set()
    for node in model.graph:
        if is_fused(node):
            inputs = plugin_inputs(node)
            if any(inputs[name] in raw for name in ACTIVATIONS.get(op_of(node), ())):
                found.add(node.name or "")
            continue
        data: list[ir.Value | None] = [value for value in node.inputs if value is not None and not is_constant(value)]
        if node.op_type in _SHAPING and node.op_type != "Concat":
            data = list(node.inputs[:1])  # others say how, as the indices of an embedding do
        if node.domain == "" and node.op_type in _SHAPING | _FIXED and data and all(value in raw for value in data):
            raw.update(node.outputs)
    return found


def last_layers(model: ir.Model) -> set[str]:
    """Names of the fused nodes behind which no other, but for norms, and no matrix product comes."""
    before_heavy: set[ir.Value] = set()
    found = set()
    for node in reversed(list(model.graph)):
        leads = any(value in before_heavy for value in node.outputs)
        if is_fused(node) and not leads:
            found.add(node.name or "")
        layer = op_of(node) in ACTIVATIONS if is_fused(node) else node.domain != "" or node.op_type in _HEAVY
        if leads or layer:
            before_heavy.update(value for value in node.inputs if value is not None)
    return found


def layers_to_quantise(model: ir.Model, kind: str) -> tuple[list[ir.Node], dict[str, str]]:
    """The fused nodes that the rules let be int8 or fp8, in the graph's order, and of every other one the reason.

    Raises:
        UsageError: `kind` is neither.
    """
    first, last = first_layers(model), last_layers(model)
    chosen, reasons = [], {}
    for node in fused_nodes(model):
        name = node.name or ""
        reason = eligible(node, kind)
        if reason is None and name in first:
            reason = FIRST
        if reason is None and name in last:
            reason = LAST
        if reason is None:
            chosen.append(node)
        else:
            reasons[name] = reason
    return chosen, reasons


def values_to_calibrate(model: ir.Model, kind: str) -> list[str]:
    """Names of the activations whose scales `default_plan` needs, in the graph's order."""
    chosen, _ = layers_to_quantise(model, kind)
    names: dict[str, None] = {}
    for node in chosen:
        for value in _activations(node).values():
            names[value.name or ""] = None
    return list(names)


def values_to_shift(model: ir.Model) -> list[str]:
    """Names of those of the values to calibrate whose int8 integers can be shifted by 128 for nothing (`zeros.py`):
    the layers that make them cut them off at 0 and can shift them, nothing else reads what those make, and the layers
    that read it can put it right."""
    chosen, _ = layers_to_quantise(model, "int8")
    readers: dict[ir.Value, list[tuple[ir.Node, ir.Value]]] = {}
    for node in chosen:
        for value in _activations(node).values():
            readers.setdefault(_root(value, "int8"), []).append((node, value))
    made = _made_for(model, chosen)
    names: dict[str, None] = {}
    for root, group in readers.items():
        if all(can_have_zero(node) and made.get(value) == root for node, value in group):
            names.update(dict.fromkeys(value.name or "" for _, value in group))
    return list(names)


def _made_for(model: ir.Model, chosen: Collection[ir.Node]) -> dict[ir.Value, ir.Value]:
    """The values that come out of layers which can shift them, through nothing but operators on integers; and for
    which alone: the root of what quantised layers read of all that those layers make, where it is one."""
    made: dict[ir.Value | None, tuple[str, ir.Value] | None] = {}
    read = _read_as(model, chosen)
    for node in model.graph:
        if is_fused(node):
            root = read.get(node.outputs[0])
            if root is not None and op_of(node) in PRODUCERS and shiftable(node, 0.0):
                # Behind clamps of different ends one scale would not end where each of them does.
                made[node.outputs[0]] = str(plugin_settings(node)["activation"]), root
        elif node.domain == "" and node.op_type in MOVED["int8"]:
            sources = {made.get(value) for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1])}
            if len(sources) == 1:
                made.update(dict.fromkeys(node.outputs, sources.pop()))
    return {value: known[1] for value, known in made.items() if value is not None and known is not None}


def _read_as(model: ir.Model, chosen: Collection[ir.Node]) -> dict[ir.Value, ir.Value]:
    """The values that nothing reads, directly or behind operators on integers, but quantised layers, as values of one
    root, which is given."""
    layers, found = set(chosen), dict[ir.Value, ir.Value]()

    def root_for(node: ir.Node, index: int) -> ir.Value | None:
        value = node.inputs[index]
        assert value is not None
        if node in layers:
            names = {name for name, each in plugin_inputs(node).items() if each is value}
            return _root(value, "int8") if names <= set(ACTIVATIONS[op_of(node)]) else None
        moves = node.domain == "" and node.op_type in MOVED["int8"] and (index == 0 or node.op_type == "Concat")
        return found.get(node.outputs[0]) if moves and len(node.outputs) == 1 else None

    for node in reversed(list(model.graph)):
        for value in node.outputs:
            roots = {root_for(*use) for use in value.uses()}
            root = roots.pop() if len(roots) == 1 and not value.is_graph_output() else None
            if root is not None:
                found[value] = root
    return found


def default_plan(
    model: ir.Model, kind: str, ranges: Mapping[str, float], shifted: Collection[str] = ()
) -> tuple[dict[str, LayerPrecision], dict[str, str]]:
    """The plan by the rules above, and the reason of each fused node that stays at the base precision.

    `ranges` has the scale of every value that `values_to_calibrate` names, as `calibrate` gives them; `shifted` are the
    values whose integers begin at -128, of those that `values_to_shift` names, and whose scales are for `uint8`.

    Raises:
        UsageError: a scale is missing, or not a positive number.
    """
    chosen, reasons = layers_to_quantise(model, kind)
    shared: dict[ir.Value, float] = {}
    for node in chosen:
        for value in _activations(node).values():
            name = value.name or ""
            if name not in ranges:
                raise UsageError(f"node {node.name!r} reads {name!r}, which has no scale: calibrate it")
            root = _root(value, QUANTISED[kind])
            shared[root] = max(shared.get(root, 0.0), ranges[name])
    plan = {}
    for node in chosen:
        given = _activations(node)
        plan[node.name or ""] = LayerPrecision(
            kind,
            {name: shared[_root(value, QUANTISED[kind])] for name, value in given.items()},
            {name: LOWEST for name, value in given.items() if value.name in shifted},
        )
    return plan, reasons


def weight_plan(model: ir.Model, kind: str, device: Device | None) -> tuple[dict[str, LayerPrecision], dict[str, str]]:
    """The plan of a kind whose weights alone are quantised, and the reason of each fused node that has another or stays
    at the base precision: all products of constant weights that `device` has a kernel for, the last ones with 8 bits at
    the least."""
    last = last_layers(model)
    plan, reasons = {}, {}
    for node in fused_nodes(model):
        name = node.name or ""
        own = "w8a16" if name in last else kind
        reason = refused(node, own, device)
        if reason is None:
            plan[name] = LayerPrecision(own)
        if reason is not None or own != kind:
            reasons[name] = reason or LAST
    return plan, reasons


def _activations(node: ir.Node) -> dict[str, ir.Value]:
    inputs = plugin_inputs(node)
    return {name: inputs[name] for name in ACTIVATIONS[op_of(node)]}


def _root(value: ir.Value, dtype: str) -> ir.Value:
    """The value that another is made of by operators with one data input that quantisation commutes with."""
    node = value.producer()
    while node is not None and node.domain == "" and node.op_type in MOVED[dtype] - {"Concat", "Gather"}:
        source = node.inputs[0]
        if source is None or is_constant(source):
            break
        value, node = source, source.producer()
    return value

"""Attention as exporters write it, two products with a softmax between, → one open node `attention`.

Rules find the second product. What comes before it is read back: the softmax (`scores.py`), masks (`masks.py`), and the
chains that split, transpose, scale and repeat queries, keys and values (`layout.py`), so that there is one rule for all
of their orders. The node that is put in takes q, k and v of (batch, heads, sequence, head dim) from as far upstream as
saves moving data.

ONNX's own operator is in `attention_operator.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from tilewright.tuner.model.fuse import einsums
from tilewright.tuner.model.fuse.attention_operator import Operator
from tilewright.tuner.model.fuse.call import OP, Call, Operand, Question, call, finish
from tilewright.tuner.model.fuse.layout import (
    Layout,
    Maker,
    Shape,
    Step,
    expanded,
    plain,
    regrouped,
    steps,
    transposed,
)
from tilewright.tuner.model.fuse.masks import Bands
from tilewright.tuner.model.fuse.norms import only_user
from tilewright.tuner.model.fuse.opening import in_main_graph, is_open, refusal, register_constants
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.fuse.scores import Mask, UnmatchedError, Weights, read_scores, read_weights
from tilewright.tuner.model.graph import constant, dtype_name, static_shape

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """A `MatMul` or `Einsum` of two operands: a label for each axis, as an einsum has them."""

    operands: tuple[ir.Value, ir.Value]
    labels: tuple[Labels, Labels]
    out: Labels
    sizes: Mapping[str, int]

    @property
    def summed(self) -> str:
        """The label that is summed over.

        Raises:
            UnmatchedError: there is none, or several, or it is not in both operands.
        """
        found = (set(self.labels[0]) | set(self.labels[1])) - set(self.out)
        if len(found) != 1 or not found <= set(self.labels[0]) & set(self.labels[1]):
            raise UnmatchedError(f"a product {self.equation} is no matrix product")
        return found.pop()

    @property
    def equation(self) -> str:
        """As an einsum has it."""
        return f"{','.join(''.join(each) for each in self.labels)}->{''.join(self.out)}"

    def shape(self, labels: Labels) -> Shape:
        """The sizes of axes."""
        return tuple(self.sizes[label] for label in labels)

    def view(self, index: int, order: Labels, shape: Shape) -> Operand:
        """An operand with its axes in this order, broadcast along those that it lacks, and reshaped."""
        labels = self.labels[index]

        def view(layout: Layout) -> Layout | None:
            given = dict(zip(labels, layout, strict=True))
            spread = expanded(tuple(given.get(label, ()) for label in order), self.shape(order))
            return None if spread is None else regrouped(spread, shape)

        return Operand(self.operands[index], view)


def product(node: ir.Node) -> Product:
    """A node as a product.

    Raises:
        UnmatchedError: shapes are unknown, or an `Einsum` is not of two operands with every axis named once.
    """
    if len(node.inputs) != 2:
        raise UnmatchedError(f"{node.op_type} {node.name!r} has {len(node.inputs)} operands")
    first, second = node.inputs
    assert first is not None
    assert second is not None
    shapes = [static_shape(value) for value in (first, second)]
    if shapes[0] is None or shapes[1] is None:
        raise UnmatchedError(f"the shapes of the operands of {node.op_type} {node.name!r} are not known")
    ranks = [len(shape) for shape in shapes if shape is not None]
    if node.op_type == "Einsum":
        text = (node.attributes.get_string("equation", "") or "").replace(" ", "")
        found = einsums.labels(text, (ranks[0], ranks[1]))
        if found is None or any(len(set(each)) != len(each) for each in found):
            raise UnmatchedError(f"Einsum {node.name!r}, {text}, does not name every axis of two operands once")
        labels, result = found[:2], found[2]
    else:
        if min(ranks) < 2:
            raise UnmatchedError(f"MatMul {node.name!r} is of a vector")
        leads = tuple(f"l{axis}" for axis in range(max(ranks) - 2, 0, -1))
        named = [leads[len(leads) - rank + 2 :] for rank in ranks]
        labels, result = ((*named[0], "i", "c"), (*named[1], "c", "j")), (*leads, "i", "j")
    sizes: dict[str, int] = {}
    for each, shape in zip(labels, shapes, strict=True):
        for label, size in zip(each, shape or (), strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return Product((first, second), labels, result, sizes)


class Decomposed(RewriteRuleClassBase):
    """Two products and a softmax."""

    def __init__(self, log: Log, operator: str, maker: Maker, bands: Bands) -> None:
        super().__init__(f"{OP} of {operator}")
        self._log, self._operator, self._maker, self._bands = log, operator, maker, bands
        self._ready: tuple[ir.Node, Call, tuple[Step, ...]] | None = None

    def pattern(self, op: Any) -> Any:
        return getattr(op, self._operator)(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> MatchResult:
        node = out.producer()
        assert node is not None
        result = MatchResult()
        if not in_main_graph(context):
            return result.fail("inside a control-flow node")
        try:
            planned = self._planned(node)
        except UnmatchedError as error:
            self._log.miss(OP, node.name or "", str(error))
            return result.fail(str(error))
        if planned is None:
            return result.fail("no product of weights")
        reason = refusal(OP, planned[0].asked(), planned[0].settings)
        if reason is not None:
            self._log.miss(OP, node.name or "", reason)
            return result.fail(reason)
        self._ready = (node, *planned)
        return result

    def rewrite(self, op: Any, out: ir.Value, **_: Any) -> ir.Value:
        node = out.producer()
        assert node is not None
        assert self._ready is not None
        assert self._ready[0] is node
        planned, after = self._ready[1:]
        name = node.name or ""
        self._log.match(OP, name)
        return finish(op, planned.make(op, self._maker, name), after, name, out.dtype)

    def _planned(self, node: ir.Node) -> tuple[Call, tuple[Step, ...]] | None:
        """What a product becomes: an attention, and the steps to the shape of its result; None if no softmax is near.

        Raises:
            UnmatchedError: there is one, but this is no attention that kernels have.
        """
        behind = [None if value is None else read_weights(value) for value in node.inputs]
        index, weights = next(((place, found) for place, found in enumerate(behind) if found), (0, None))
        if weights is None:
            return None
        values = product(node)
        leads, row = _rows(values, index, weights)
        scores = read_scores(weights.softmax)
        first = product(scores.product)
        query, key = first.out[-2:] if len(first.out) > 1 else ("", "")
        own = [set(labels) for labels in first.labels]
        turn = 0 if key in own[1] else 1
        if not (query in own[turn] and key in own[1 - turn]) or query in own[1 - turn] or key in own[turn]:
            raise UnmatchedError(f"its scores, {first.equation}, are not of queries by keys")
        places = weights.places[-1], scores.places[0]
        lead_shape, rows = first.shape(first.out[:-2]), first.sizes[query]
        keys, dim = first.sizes[key], first.sizes[first.summed]
        if values.shape((row, values.summed)) != (rows, keys) or any(place[-1] != keys for place in places):
            raise UnmatchedError(
                f"its weights are {values.shape((*leads, row, values.summed))} and its scores {places[-1]}"
            )
        count = math.prod(lead_shape)
        if math.prod(values.shape(leads)) != count:
            raise UnmatchedError(f"its weights are broadcast from {lead_shape} to {values.shape(leads)}")
        (column,) = set(values.labels[1 - index]) - {*leads, values.summed}
        masks = _guarded(scores.masks, weights)
        depth = values.sizes[column]
        # Any way of taking leading axes apart computes the same: the one that moves the least data is taken.
        best: tuple[Call, tuple[Step, ...]] | None = None
        reasons: list[str] = []
        for batch, heads in _splits(count, lead_shape, (*scores.places, *weights.places), first.operands[turn]):
            q = first.view(turn, (*first.out[:-2], query, first.summed), (batch, heads, rows, dim))
            k = first.view(1 - turn, (*first.out[:-2], key, first.summed), (batch, heads, keys, dim))
            v = values.view(1 - index, (*leads, values.summed, column), (batch, heads, keys, depth))
            asked = Question(
                q, k, v, (batch, heads, rows, keys), scores.scale, scores.softcap, tuple(scores.rows), masks
            )
            result = regrouped(plain((batch, heads, rows, depth)), (*values.shape(leads), rows, depth))
            try:
                made = call(asked, self._bands)
            except UnmatchedError as error:
                reasons.append(str(error))
                continue
            assert result is not None
            order = [(*leads, row, column).index(label) for label in values.out]
            after = steps((batch, heads, rows, depth), transposed(result, order))
            if best is None or made.cost < best[0].cost:
                best = made, after
        if best is None:
            raise UnmatchedError(reasons[0])
        return best


def _rows(values: Product, index: int, weights: Weights) -> tuple[Labels, str]:
    """The labels of batch and heads, and that of queries, of the product of weights and values.

    Raises:
        UnmatchedError: weights are summed over something else than keys, or have their axes in disorder.
    """
    labels, summed = values.labels[index], values.summed
    for row in labels:
        if row == summed or row not in values.out or (row in values.labels[1 - index] and values.sizes[row] != 1):
            continue
        leads = tuple(label for label in labels if label not in (row, summed))
        order = [labels.index(label) for label in (*leads, row, summed)]
        shape = values.shape((*leads, row, summed))
        if transposed(weights.layout, order) == plain(shape) and weights.places[-1][-1] == shape[-1]:
            extra = set(values.labels[1 - index]) - {*leads, summed}
            if len(extra) == 1 and set(values.out) == {*leads, row, *extra}:
                return leads, row
    raise UnmatchedError(
        f"its weights of shape {weights.places[-1]} are not summed over keys, the last axis, with values"
    )


def _guarded(masks: list[Mask], weights: Weights) -> tuple[Mask, ...]:
    """Masks of scores, those at -∞ that guards make 0 of.

    Raises:
        UnmatchedError: a guard hides what no mask of the scores hides.
    """
    found = list(masks)
    for value, when in weights.guards:
        for index, mask in enumerate(found):
            if mask.kind == "hide" and mask.hidden == when and _same(mask.value, value):
                found[index] = replace(mask, fill=-math.inf)
                break
        else:
            raise UnmatchedError(f"its weights are masked by {value.name!r} after the softmax, and its scores are not")
    return tuple(found)


def _same(one: ir.Value, other: ir.Value) -> bool:
    if one is other:
        return True
    first, second = constant(one), constant(other)
    return first is not None and second is not None and np.array_equal(first, second)


def _splits(count: int, leads: Shape, places: tuple[Shape, ...], queries: ir.Value) -> Iterator[tuple[int, int]]:
    """Into how many batches and heads the leading axes of scores may be taken apart."""
    found: dict[tuple[int, int], None] = {}
    if len(leads) == 2:
        found[leads[0], leads[1]] = None
    for place in places:
        if len(place) == 4 and place[0] * place[1] == count:
            found[place[0], place[1]] = None
    for axis in range(1, len(leads)):
        found[math.prod(leads[:axis]), math.prod(leads[axis:])] = None
    node = queries.producer()
    passed = ("Reshape", "Mul", "Div", "Transpose")
    while len(leads) < 2 and node is not None and node.inputs and node.op_type in passed:
        source = node.inputs[0]
        shape = None if source is None else static_shape(source)
        if shape is not None and len(shape) == 4 and shape[0] * shape[1] == count:
            found[shape[0], shape[1]] = None
        node = None if source is None else source.producer()
    found[1, count] = None
    found[count, 1] = None
    yield from found


def _drop_casts(model: ir.Model) -> None:
    """Takes off the cast of an attention's result to fp32 and the model's own back, where nothing else sees what is
    between. (A cast to what holds less rounds, and stays.)"""
    for node in [node for node in model.graph if is_open(node)]:
        value = node.outputs[0]
        there = _only_cast(value) if dtype_name(value) in ("fp16", "bf16") else None
        if there is None or dtype_name(there.outputs[0]) != "fp32":
            continue
        back = _only_cast(there.outputs[0])
        if back is not None and back.outputs[0].dtype == value.dtype:
            ir.convenience.replace_nodes_and_values(model.graph, back, [back], [], back.outputs, [value])


def _only_cast(value: ir.Value) -> ir.Node | None:
    """The `Cast` of the same graph that alone uses a value."""
    user = only_user(value)
    return user if user is not None and user.op_type == "Cast" else None


def apply(model: ir.Model, log: Log) -> None:
    """Opens every attention of the main graph that a plugin takes; what looks like one and is not taken is logged."""
    maker, bands = Maker(), Bands()
    rules = [Decomposed.rule(log, operator, maker, bands) for operator in ("MatMul", "Einsum")]
    rules += [Operator.rule(log, outputs, maker, bands) for outputs in (3, 2, 1)]
    RewriteRuleSet(rules).apply_to_model(model)
    _drop_casts(model)
    passes.RemoveUnusedNodesPass()(model)
    register_constants(model)

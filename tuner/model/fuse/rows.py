"""Products below what moves their rows: act(Reshape(x·W)) is act(x'·W), with x' the x of other rows.

A product of weights treats every row alike. So whatever puts the rows of its result into another shape or order, and
leaves the columns where they are, may come before it. Exporters put it behind, where it parts a product from the
activation or the residual that is added:

- `Reshape (…, K) → (M, K)`, `Gemm`, `Reshape (M, N) → (…, N)`, as of `addmm` in GPT-2. The reshapes undo each other.
- Attention, `Transpose`, `Reshape`, `Gemm`, `Reshape`, `Transpose`, as of `torch.nn.MultiheadAttention`, which computes
  with the sequence first. The two transposes become one, or none.

A reshape moves no data: it comes before a product where that makes no second one. A transpose does, so it comes before
only where there are fewer of them afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.layout import (
    RESHAPES,
    Layout,
    Placer,
    Plan,
    Shape,
    plan,
    regrouped,
    sources,
    transposed,
)
from tilewright.tuner.model.fuse.opening import inputs_of, is_open, refusal, reopened, settings_of
from tilewright.tuner.model.graph import is_constant, static_shape

_ROWS = ("a", "residual")
"""Inputs of a product that have the rows of its result; of its others, `b` and a bias have its columns."""


def move_before(model: ir.Model) -> bool:
    """Puts what moves the rows of open products before them, in place, and says whether there was any.

    A product stays as it is if its result goes elsewhere too, or is an output of the model. The product keeps its name,
    and so does what the moves behind it gave; its own result, in the shape that it had, is gone.
    """
    mover = _Mover(model)
    moved = False
    for node in reversed(list(model.graph)):  # a move that comes before one product may lie behind another now
        while is_open(node) and node.op_type == "gemm" and (product := mover.below(node)) is not None:
            node, moved = product, True
    return moved


class _Mover:
    """Puts moves before products."""

    def __init__(self, model: ir.Model) -> None:
        self._editor = Editor(model)
        self._placer = Placer(self._editor)

    def below(self, product: ir.Node) -> ir.Node | None:
        """A product in the place of itself and of the one move behind it; None if there is none, or it is to stay."""
        move = _move_behind(product)
        plans = None if move is None else _plans(product, move)
        if move is None or plans is None:
            return None
        inputs = inputs_of(product)
        asked = {**inputs, **{which: each.value() for which, each in plans.items()}}
        if refusal(product.op_type, asked, settings_of(product)) is not None:
            return None
        name = product.name or ""
        made = reopened(
            product,
            {
                which: self._placer.follow(plans[which].source, plans[which].steps, f"{name}_{which}")
                if which in plans
                else value
                for which, value in inputs.items()
            },
        )
        self._editor.replace(move, made)
        self._editor.graph.remove(product, safe=True)
        return made


def _move_behind(product: ir.Node) -> ir.Node | None:
    """The one node that reads a product, if it moves the rows of its result and leaves the columns where they are."""
    out = product.outputs[0]
    uses = out.uses()
    if len(uses) != 1 or out.is_graph_output():
        return None
    ((move, _),) = uses
    before, after = static_shape(out), static_shape(move.outputs[0])
    if move.domain != "" or move.graph is not product.graph or before is None or not after or min(after) < 1:
        return None  # a scalar has no columns
    if move.op_type in RESHAPES:
        return move if after[-1] == before[-1] else None
    if move.op_type == "Transpose":
        return move if _order(move, len(before))[-1] == len(before) - 1 else None
    return None


def _order(move: ir.Node, rank: int) -> Shape:
    return tuple(move.attributes.get_ints("perm", []) or range(rank)[::-1])


def _plans(product: ir.Node, move: ir.Node) -> Mapping[str, Plan] | None:
    """How the inputs that have the product's rows are made with the rows that come behind a move; None if that can't
    be, or moves more data than there is to be gained."""
    inputs = inputs_of(product)
    if settings_of(product).get("trans_a", 0) or len(inputs["b"].shape or ()) != 2:
        return None  # rows of a are not its rows, or not all of them meet the same columns
    turns = move.op_type == "Transpose"
    plans: dict[str, Plan] = {}
    before = int(turns)
    for which in _ROWS:
        value = inputs.get(which)
        if value is None:
            continue
        shape = static_shape(value)
        if shape is None or is_constant(value):
            return None
        found = list(sources(value, partial(_rearranged, move, shape[-1]), scaled=False))
        if not found:
            return None
        plans[which] = min((plan(source) for source in found), key=lambda one: one.cost)
        before += found[0].moves
    after = sum(each.cost[0] for each in plans.values())
    if turns:
        return plans if after < before else None
    # A reshape is no gain by itself: it may become one other, and no more.
    return plans if after <= before and sum(len(each.steps) for each in plans.values()) <= 1 else None


def _rearranged(move: ir.Node, columns: int, layout: Layout) -> Layout | None:
    """A layout behind a move, with so many columns where the move's own value may have others."""
    if move.op_type == "Transpose":
        return transposed(layout, _order(move, len(layout)))
    shape = static_shape(move.outputs[0])
    assert shape is not None
    return regrouped(layout, (*shape[:-1], columns))

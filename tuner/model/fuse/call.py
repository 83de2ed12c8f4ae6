"""One attention as it will be put into a graph: where queries, keys and values come from, what is added to scores, the
settings; and the making of it. Both rules end here, that of products and that of ONNX's operator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from tilewright.tuner.model.fuse.layout import (
    Layout,
    Maker,
    Plan,
    Shape,
    Source,
    Step,
    View,
    expanded,
    plan,
    regrouped,
    sources,
    typed,
)
from tilewright.tuner.model.fuse.masks import Bands, Masking, make_bias, masking
from tilewright.tuner.model.fuse.opening import opened
from tilewright.tuner.model.fuse.scores import Mask, Rows, UnmatchedError
from tilewright.tuner.model.graph import dtype_name, elements, static_shape

OP = "attention"
_HEADS = 1


@dataclass(frozen=True, slots=True)
class Operand:
    """Queries, keys or values: a value, and how it is seen as (B, H, S, D)."""

    value: ir.Value
    view: View


@dataclass(frozen=True, slots=True)
class Question:
    """An attention to be planned. Keys and values are seen with the heads of queries, repeated if need be."""

    q: Operand
    k: Operand
    v: Operand
    shape: Shape  # of the scores: (B, H, Sq, Skv)
    scale: float
    softcap: float = 0.0
    rows: tuple[Rows, ...] = ()
    masks: tuple[Mask, ...] = ()
    settings: Mapping[str, Any] | None = None
    repeats: int | None = None  # of a head of keys, where keys and values are asked for as they are; None: find out


@dataclass(frozen=True, slots=True)
class Call:
    """An attention, planned."""

    plans: Mapping[str, Plan]  # of q, k and v
    rows: tuple[tuple[str, Plan], ...]
    masking: Masking
    settings: Mapping[str, Any]

    @property
    def cost(self) -> tuple[int, int, int]:
        """Moves of data, nodes, and elements of the bias."""
        costs = [each.cost for each in (*self.plans.values(), *(planned for _, planned in self.rows))]
        costs.append(self.masking.cost)
        bias = self.masking.asked()
        size = 0 if bias is None else elements(bias) or 0
        return sum(moves for moves, _ in costs), sum(nodes for _, nodes in costs), size

    def asked(self) -> dict[str, ir.Value]:
        """Values as the inputs will be, to ask a plugin with."""
        bias = self.masking.asked()
        return {**{name: each.value() for name, each in self.plans.items()}, **({} if bias is None else {"bias": bias})}

    def operand(self, op: Any, maker: Maker, which: str, name: str) -> ir.Value:
        """q, k or v."""
        planned = self.plans[which]
        value = maker.follow(op, planned.source, planned.steps, f"{name}_{which}")
        for operator, each in self.rows if which == "q" else ():
            by = maker.follow(op, each.source, each.steps, f"{name}_rows")
            value = typed(getattr(op, operator)(value, by), value.type, planned.shape, f"{name}_q_{operator}")
        return value

    def make(self, op: Any, maker: Maker, name: str, **operands: ir.Value) -> ir.Value:
        """The open node; q, k, v and further inputs may be given."""
        inputs = {
            each: operands.pop(each) if each in operands else self.operand(op, maker, each, name) for each in self.plans
        }
        if self.masking.terms:
            inputs["bias"] = make_bias(op, maker, self.masking.terms, name)
        made = opened(op, OP, {**inputs, **operands}, self.settings, name)
        return typed(made, inputs["v"].type, self.out_shape, name)

    @property
    def out_shape(self) -> Shape:
        """(B, H, Sq, Dv)."""
        return (*self.plans["q"].shape[:3], self.plans["v"].shape[3])


def finish(op: Any, out: ir.Value, steps: Sequence[Step], name: str, dtype: ir.DataType | None) -> ir.Value:
    """The result in the shape and data type that the model has it in."""
    made = Maker().follow(op, out, steps, f"{name}_out")
    if dtype in (None, made.dtype):
        return made
    return typed(op.Cast(made, to=int(dtype)), ir.TensorType(dtype), static_shape(made) or (), f"{name}_out_Cast")


def call(asked: Question, bands: Bands) -> Call:
    """The plan of an attention.

    Raises:
        UnmatchedError: queries, keys or values can't be had as (B, H, S, D), or a mask not in the shape of the scores.
    """
    free = asked.repeats is None
    found = {
        "q": _sources(asked.q, scaled=True),
        "k": _sources(asked.k, scaled=free),
        "v": _sources(asked.v, scaled=False, widened=free),
    }
    for name, each in found.items():
        if not each:
            value = getattr(asked, name).value
            raise UnmatchedError(
                f"{value.name!r} of shape {static_shape(value)} can't be had as (batch, heads, sequence, dim)"
            )
    # Casts are passed by only for to have q, k and v in one data type: that of v, or that before its cast to fp32, as
    # torch's older exporter has v of modules in fp16.
    dtype = next(
        (one.value.dtype for one in found["v"] if all(_of_dtype(found[name], one.value.dtype) for name in "qk")),
        asked.v.value.dtype,
    )
    found = {name: _of_dtype(each, dtype) or each[:1] for name, each in found.items()}
    groups = asked.repeats or math.gcd(*(max(_group(source.layout) for source in found[name]) for name in "kv"))
    plans = {
        name: min((plan(one) for one in (_ungrouped(each, groups) if name != "q" else each)), key=lambda one: one.cost)
        for name, each in found.items()
    }
    rows = tuple((each.operator, _rows(each, asked.shape)) for each in asked.rows)
    for _, planned in rows:
        if planned.source.dtype != plans["q"].source.dtype:
            factor, queries = (dtype_name(each.source) for each in (planned, plans["q"]))
            raise UnmatchedError(f"its factor {planned.source.name!r} is {factor}, and its queries {queries}")
    masked = masking(asked.masks, asked.shape, bands)
    settings = {**masked.band.settings(), **(asked.settings or {})}
    scale = asked.scale * plans["q"].factor * plans["k"].factor
    if scale <= 0:
        raise UnmatchedError(f"its scale is {scale:g}: kernels take one above 0")
    if not math.isclose(scale, 1 / math.sqrt(plans["q"].shape[3]), rel_tol=1e-6):
        settings["scale"] = scale
    if asked.softcap:
        settings["softcap"] = asked.softcap
    return Call(plans, rows, masked, settings)


def _sources(operand: Operand, *, scaled: bool, widened: bool = False) -> list[Source]:
    return list(sources(operand.value, operand.view, scaled=scaled, widened=widened))


def _of_dtype(found: Sequence[Source], dtype: ir.DataType | None) -> list[Source]:
    return [source for source in found if source.value.dtype == dtype]


def _group(layout: Layout) -> int:
    """How often each head is repeated in a row."""
    heads = layout[_HEADS]
    return heads[-1][0] if heads and not heads[-1][1] else 1


def _ungrouped(found: Sequence[Source], groups: int) -> list[Source]:
    """Sources with every head once, of those that have each so many times."""
    if groups == 1:
        return list(found)
    kept = []
    for source in found:
        times = _group(source.layout)
        if times % groups == 0:
            *outer, _ = source.layout[_HEADS]
            heads = (*outer, (times // groups, 0)) if times > groups else tuple(outer)
            layout = (*source.layout[:_HEADS], heads, *source.layout[_HEADS + 1 :])
            kept.append(Source(source.value, layout, source.factor, source.moves))
    return kept


def _rows(rows: Rows, shape: Shape) -> Plan:
    def view(layout: Layout) -> Layout | None:
        spread = expanded(layout, (*rows.place[:-1], 1))
        return None if spread is None else regrouped(spread, (*shape[:3], 1))

    found = list(sources(rows.value, view, scaled=False))
    if not found:
        raise UnmatchedError(
            f"its factor {rows.value.name!r} of shape {static_shape(rows.value)} is not one for rows of scores"
        )
    return min((plan(source, (0, 1, 2)) for source in found), key=lambda each: each.cost)

"""ONNX's operator `Attention` (opset 23 and later) → one open node `attention`.

Its three-dimensional form goes through reshapes and transposes, its cache through a `Concat` of past and new keys and
values, which are outputs themselves. A query's place is what differs: without a cache ONNX lets query i see the keys up
to i, so that queries and keys begin together, where kernels let them end together. That is the same where both are
equally many, and a bias where they are not. With past keys, or with counts of keys (`nonpad_kv_seqlen`), both agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from tilewright.tuner.model.fuse.call import OP, Call, Operand, Question, call, finish
from tilewright.tuner.model.fuse.layout import (
    Layout,
    Maker,
    Shape,
    Step,
    plain,
    regrouped,
    repeated,
    steps,
    transposed,
    typed,
)
from tilewright.tuner.model.fuse.masks import Bands
from tilewright.tuner.model.fuse.opening import in_main_graph, new_constant, refusal
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.fuse.scores import Mask, UnmatchedError
from tilewright.tuner.model.graph import constant, dtype_name, static_shape

INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")
_MIDDLE = (0, 2, 1, 3)  # (B, S, H, D) ↔ (B, H, S, D)


@dataclass(frozen=True, slots=True)
class Planned:
    """A node's attention, and what is around it."""

    call: Call
    after: tuple[Step, ...]
    given: Mapping[str, ir.Value]
    past: int  # keys before the new ones


class Operator(RewriteRuleClassBase):
    """`Attention` with so many outputs: 1, or up to 3 with the keys and values that it has seen by now."""

    def __init__(self, log: Log, outputs: int, maker: Maker, bands: Bands) -> None:
        super().__init__(f"{OP} of Attention", remove_nodes=False)
        self._log, self._outputs, self._maker, self._bands = log, outputs, maker, bands
        self._ready: tuple[ir.Node, Planned] | None = None

    def pattern(self, op: Any) -> Any:
        names = ["out", "present_key", "present_value"][: self._outputs]
        return op.Attention(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=names)

    def check(self, context: Any, out: ir.Value, **_: Any) -> MatchResult:
        node = out.producer()
        assert node is not None
        result = MatchResult()
        if not in_main_graph(context):
            return result.fail("inside a control-flow node")
        if self._outputs != min(len(node.outputs), 3):
            return result.fail(f"it has {len(node.outputs)} outputs")
        try:
            planned = _planned(node, self._bands)
            reason = refusal(OP, _asked(planned), planned.call.settings)
        except UnmatchedError as error:
            reason = str(error)
        if reason is not None:
            self._log.miss(OP, node.name or "", reason)
            return result.fail(reason)
        self._ready = (node, planned)
        return result

    def rewrite(self, op: Any, out: ir.Value, **_: Any) -> list[ir.Value]:
        node = out.producer()
        assert node is not None
        assert self._ready is not None
        assert self._ready[0] is node
        planned, name = self._ready[1], node.name or ""
        self._log.match(OP, name)
        operands = {which: planned.call.operand(op, self._maker, which, name) for which in "qkv"}
        for which, past in (("k", "past_key"), ("v", "past_value")):
            if past in planned.given:
                b, heads, new, dim = static_shape(operands[which]) or ()
                joined = op.Concat(planned.given[past], operands[which], axis=2)
                shape = (b, heads, planned.past + new, dim)
                operands[which] = typed(joined, operands[which].type, shape, f"{name}_{which}_Concat")
        present = [
            operands[which] if "past_key" in planned.given and _used(old) else op.Identity(operands[which])
            for which, old in zip("kv", node.outputs[1 : self._outputs], strict=False)
        ]
        if "nonpad_kv_seqlen" in planned.given:
            counts = planned.given["nonpad_kv_seqlen"]
            cast = self._maker.once(counts, lambda: _as_int32(op, counts))
            operands["kv_lens"] = cast
        made = planned.call.make(op, self._maker, name, **operands)
        return [finish(op, made, planned.after, name, out.dtype), *present]


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _as_int32(op: Any, counts: ir.Value) -> ir.Value:
    kind = ir.DataType.INT32
    return typed(op.Cast(counts, to=int(kind)), ir.TensorType(kind), static_shape(counts) or (), f"{counts.name}_int32")


def _asked(planned: Planned) -> dict[str, ir.Value]:
    """Inputs as they will be, to ask a plugin with."""
    asked = planned.call.asked()
    for which in "kv":
        b, heads, new, dim = static_shape(asked[which]) or ()
        asked[which].shape = ir.Shape((b, heads, planned.past + new, dim))
    if "nonpad_kv_seqlen" in planned.given:
        counts = planned.given["nonpad_kv_seqlen"]
        asked["kv_lens"] = ir.Value(name="kv_lens", type=ir.TensorType(ir.DataType.INT32), shape=counts.shape)
    return asked


def _planned(node: ir.Node, bands: Bands) -> Planned:
    """
    Raises:
        UnmatchedError: kernels, or this file, don't have what the node does.
    """
    given = {name: value for name, value in zip(INPUTS, node.inputs, strict=False) if value is not None}
    if len(node.outputs) > 3 and _used(node.outputs[3]):
        raise UnmatchedError(f"its output qk_matmul_output, {node.outputs[3].name!r}, is used: kernels keep no scores")
    if ("past_key" in given) != ("past_value" in given):
        raise UnmatchedError("it has one of past_key and past_value, and not the other")
    shapes = {name: static_shape(value) for name, value in given.items()}
    for name, shape in shapes.items():
        if shape is None:
            raise UnmatchedError(f"the shape of {name} is not known")
    known: dict[str, Shape] = {name: shape for name, shape in shapes.items() if shape is not None}
    b, h, sq, dim = _four(known["Q"], node, "q_num_heads")
    _, kv_heads, new, _ = _four(known["K"], node, "kv_num_heads")
    dim_v = _four(known["V"], node, "kv_num_heads")[3]
    past = known["past_key"][2] if "past_key" in known else 0
    cached = past + new
    if h % kv_heads:
        raise UnmatchedError(f"{h} heads of queries, {kv_heads} of keys: the first must be a multiple of the second")
    operands = {
        which: _operand(given[name], known[name], heads, h)
        for which, name, heads in (("q", "Q", h), ("k", "K", kv_heads), ("v", "V", kv_heads))
    }
    attributes = node.attributes
    settings: dict[str, Any] = {}
    masks = _masks(given, (b, h, sq, cached))
    if attributes.get_int("is_causal", 0):
        if "nonpad_kv_seqlen" in given or sq == new:
            settings["causal"] = 1
        else:
            # The kernel's last query sees all keys. The operator's first sees those of the past and one more.
            hidden = np.arange(cached) > past + np.arange(sq)[:, None]
            value = new_constant(np.where(hidden, np.float32(-np.inf), np.float32(0)), f"causal_{sq}x{cached}")
            masks.append(Mask("add", value, (b, h, sq, cached)))
    scale = attributes.get_float("scale", None)
    asked = Question(
        operands["q"], operands["k"], operands["v"], (b, h, sq, cached),
        1 / math.sqrt(dim) if scale is None else scale,
        attributes.get_float("softcap", 0.0) or 0.0, masks=tuple(masks), settings=settings,
        repeats=h // kv_heads if past or any(map(_used, node.outputs[1:])) else None,
    )  # fmt: skip
    layout: Layout | None = plain((b, h, sq, dim_v))
    if len(known["Q"]) == 3 and layout is not None:
        layout = regrouped(transposed(layout, _MIDDLE), (b, sq, h * dim_v))
    assert layout is not None
    return Planned(call(asked, bands), steps((b, h, sq, dim_v), layout), given, past)


def _four(shape: Shape, node: ir.Node, heads: str) -> Shape:
    """(B, H, S, D) of an input of three or four dimensions."""
    if len(shape) == 4:
        return shape
    count = node.attributes.get_int(heads, 0) or 0
    if len(shape) != 3 or count < 1 or shape[2] % count:
        raise UnmatchedError(f"an input of shape {shape} with {heads}={count} has no (batch, heads, sequence, dim)")
    return shape[0], count, shape[1], shape[2] // count


def _operand(value: ir.Value, shape: Shape, own: int, heads: int) -> Operand:
    """An input as (B, heads, S, D), its own heads repeated."""

    def view(layout: Layout) -> Layout | None:
        if len(shape) == 3:
            apart = regrouped(layout, (*shape[:2], own, shape[2] // own))
            if apart is None:
                return None
            layout = transposed(apart, _MIDDLE)
        return repeated(layout, 1, heads // own, each=True)

    return Operand(value, view)


def _masks(given: Mapping[str, ir.Value], place: Shape) -> list[Mask]:
    """`attn_mask`, which is added, or tells which keys are seen."""
    value = given.get("attn_mask")
    if value is None:
        return []
    shape = static_shape(value) or ()
    boolean = dtype_name(value) == "bool"
    missing = place[-1] - shape[-1] if shape else 0
    if missing and shape[-1] != 1:
        array = constant(value)
        if array is None or missing < 0:
            raise UnmatchedError(f"its mask of shape {shape} is for {shape[-1]} of {place[-1]} keys")
        padding = [*[(0, 0)] * (len(shape) - 1), (0, missing)]
        padded = np.pad(array, padding, constant_values=False if boolean else np.asarray(-np.inf, array.dtype))
        value = new_constant(padded, f"{value.name}_padded")
    return [Mask("hide", value, place) if boolean else Mask("add", value, place)]

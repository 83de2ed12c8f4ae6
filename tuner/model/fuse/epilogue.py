"""What follows a product becomes its end, in the order that `kernels/epilogue.py` has: bias, residual, activation,
or bias, activation, residual; and two products of one input, one the gate of the other, become one product of pairs of
columns.

A chain grows by one step at a time, while the product's result goes nowhere else.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet, Var

from tilewright.tuner.model.fuse.layout import RESHAPES, Maker, row_before, typed
from tilewright.tuner.model.fuse.opening import (
    FLOATS,
    OPEN,
    as_vector,
    inputs_of,
    is_open,
    new_constant,
    opened,
    refusal,
    settings_of,
)
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.fuse.step_weights import Pair
from tilewright.tuner.model.graph import constant, dtype_name, is_constant, static_shape

KINDS = ("gemm", "conv2d")
ACTIVATION = "activation"
NO_HALVES = "the split is not into halves of the columns"

ADDED_TO_ITSELF = "the result is added to itself"

A_RESIDUAL = "what is added has the shape of the result"
"""Why there is no bias, which is not told: the rule for residuals says what else there is."""


class _Step(RewriteRuleClassBase):
    """One step of a chain: what the open node becomes, or why it can't."""

    def __init__(self, log: Log, kind: str, title: str) -> None:
        super().__init__(f"{kind} + {title}")
        self._log, self._kind = log, kind

    def _product(self, op: Any, name: str = "product") -> Any:
        return getattr(op, self._kind)(
            _domain=OPEN, _allow_other_inputs=True, _allow_other_attributes=True, _outputs=[name]
        )

    def _grown(self, product: ir.Node, **bound: ir.Value) -> str | tuple[dict[str, ir.Value], dict[str, Any]]:
        raise NotImplementedError

    def check(self, context: Any, product: ir.Value, **bound: ir.Value) -> MatchResult:
        node = product.producer()
        assert node is not None
        reason = self.refusal(node, context.root, **bound)
        return MatchResult() if reason is None else MatchResult().fail(reason)

    def refusal(self, product: ir.Node, after: ir.Node, **bound: ir.Value) -> str | None:
        """None, or why an open product can't take in `after`, which is logged."""
        grown = self._grown(product, **bound)
        reason = grown if isinstance(grown, str) else refusal(self._kind, *grown)
        if reason is not None and reason != A_RESIDUAL:
            self._log.miss(self.name, product.name or "", reason, after=after)
        return reason

    def rewrite(self, op: Any, product: ir.Value, **bound: ir.Value) -> ir.Value:
        node = product.producer()
        assert node is not None
        grown = self._grown(node, **bound)
        assert not isinstance(grown, str)
        self._log.match(self.name, node.name or "")
        return opened(op, self._kind, *grown, node.name or "")


class Bias(_Step):
    """+ a vector along the columns of a matrix, or the channels of an image; two vectors are added first."""

    def __init__(self, log: Log, kind: str, first: bool) -> None:
        super().__init__(log, kind, "bias")
        self._first = first

    def pattern(self, op: Any, other: Any) -> Any:
        return op.Add(self._product(op), other) if self._first else op.Add(other, self._product(op))

    def _grown(self, product: ir.Node, **bound: ir.Value) -> str | tuple[dict[str, ir.Value], dict[str, Any]]:
        inputs, settings = inputs_of(product), settings_of(product)
        other, shape = bound["other"], static_shape(product.outputs[0])
        if shape is None:
            return "the shape of its result is not known"
        if other is product.outputs[0]:
            return ADDED_TO_ITSELF
        axis = -1 if self._kind == "gemm" else -3
        if static_shape(other) == shape and math.prod(shape) > shape[axis]:
            return A_RESIDUAL
        vector = as_vector(other, shape[axis], axis)
        if vector is None and is_spread(other, shape, axis):
            vector = _like(other, shape[axis])
        if vector is None:
            along = "columns" if self._kind == "gemm" else "channels"
            what = f"{other.name!r} of shape {static_shape(other)}"
            return f"what is added, {what}, is no vector along the {shape[axis]} {along} of {shape}"
        if settings.get(ACTIVATION, "none") != "none" or "gated" in settings:
            return "it is added after the activation or the gate"
        if "bias" in inputs:
            both = [constant(value) for value in (inputs["bias"], vector)]
            if both[0] is not None and both[1] is not None:
                inputs["bias"] = new_constant(both[0] + both[1], f"{inputs['bias'].name}_and_{other.name}")
            else:
                inputs["bias"] = _like(vector, shape[axis])  # `rewrite` adds the two
            return inputs, settings
        return with_bias(inputs, vector), settings

    def rewrite(self, op: Any, product: ir.Value, **bound: ir.Value) -> ir.Value:
        node, other = product.producer(), bound["other"]
        assert node is not None
        grown = self._grown(node, **bound)
        assert not isinstance(grown, str)
        inputs, settings = grown
        if not is_constant(inputs["bias"]) and inputs["bias"] is not other:
            inputs["bias"] = self._computed(op, node, other, static_shape(inputs["bias"]) or ())
        self._log.match(self.name, node.name or "")
        return opened(op, self._kind, inputs, settings, node.name or "")

    def _computed(self, op: Any, product: ir.Node, other: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """What is added as a vector, and what the product adds already with it."""
        name, value = f"{product.name}_bias", other
        if static_shape(value) != shape:
            while (node := value.producer()) is not None and node.op_type in RESHAPES and node.domain == "":
                assert node.inputs[0] is not None
                value = node.inputs[0]
        if static_shape(value) != shape:
            target = new_constant(np.array(shape, np.int64), f"{name}_shape")
            value = typed(op.Reshape(value, target), other.type, shape, f"{name}_Reshape")
        already = inputs_of(product).get("bias")
        return value if already is None else typed(op.Add(value, already), other.type, shape, f"{name}_Add")


class Residual(_Step):
    """+ another tensor of the result's shape, before or behind the activation."""

    def __init__(self, log: Log, kind: str, first: bool) -> None:
        super().__init__(log, kind, "residual")
        self._first = first

    def pattern(self, op: Any, other: Any) -> Any:
        return op.Add(self._product(op), other) if self._first else op.Add(other, self._product(op))

    def _grown(self, product: ir.Node, **bound: ir.Value) -> str | tuple[dict[str, ir.Value], dict[str, Any]]:
        inputs, settings = inputs_of(product), settings_of(product)
        other, shape = bound["other"], static_shape(product.outputs[0])
        if static_shape(other) != shape:
            return f"what is added, {other.name!r}, has the shape {static_shape(other)}, and the result {shape}"
        if other is product.outputs[0]:
            return ADDED_TO_ITSELF
        if "residual" in inputs:
            return "there is a residual already"
        if settings.get(ACTIVATION, "none") != "none" and "gated" not in settings:
            settings["residual_last"] = 1
        return {**inputs, "residual": other}, settings


def takes_sum(log: Log, product: ir.Node, other: ir.Value, after: ir.Node) -> bool:
    """Whether an open product can take in a sum, `after`, of its result and another value, which may be a stand-in; if
    it can't, why is logged."""
    steps = [step(log, product.op_type, True) for step in (Bias, Residual)]
    return any(step.refusal(product, after, other=other) is None for step in steps)


class Activate(_Step):
    """An activation."""

    def __init__(self, log: Log, kind: str) -> None:
        super().__init__(log, kind, "activation")

    def pattern(self, op: Any) -> Any:
        return op.Activation(self._product(op), _domain=OPEN, _allow_other_attributes=True, _outputs=["activated"])

    def _grown(self, product: ir.Node, **bound: ir.Value) -> str | tuple[dict[str, ir.Value], dict[str, Any]]:
        inputs, settings = inputs_of(product), settings_of(product)
        node = bound["activated"].producer()
        assert node is not None
        if settings.get(ACTIVATION, "none") != "none":
            return f"there is an activation already, {settings[ACTIVATION]}"
        return inputs, {**settings, ACTIVATION: node.attributes[ACTIVATION].as_string()}


class Gate(_Step):
    """act(x·Wg + bg) · (x·Wu + bu): one product of [Wg | Wu], "halves"."""

    def __init__(self, log: Log, copies: Maker, first: bool) -> None:
        super().__init__(log, "gemm", "gate")
        self._copies, self._first = copies, first

    def pattern(self, op: Any) -> Any:
        gate, up = self._product(op), self._product(op, "up")
        return op.Mul(gate, up) if self._first else op.Mul(up, gate)

    def _grown(self, product: ir.Node, **bound: ir.Value) -> str | tuple[dict[str, ir.Value], dict[str, Any]]:
        up = bound["up"].producer()
        assert up is not None
        assert is_open(up)
        (inputs, settings), (inputs_up, settings_up) = ((inputs_of(node), settings_of(node)) for node in (product, up))
        activation = settings.pop(ACTIVATION, "none")
        if activation == "none" or settings_up.pop(ACTIVATION, "none") != "none":
            return "one of the two factors has an activation, and this is not it"
        if inputs["a"] is not inputs_up["a"] or settings != settings_up or "gated" in settings:
            return "the two products are not of one input in one form"
        if "residual" in inputs or "residual" in inputs_up:
            return "a residual is added before the gate"
        if len(inputs["b"].shape or ()) != 2 or static_shape(inputs["b"]) != static_shape(inputs_up["b"]):
            return f"weights of shapes {inputs['b'].shape} and {inputs_up['b'].shape}"
        axis = 0 if settings.get("trans_b", 0) else 1
        if is_constant(inputs["b"]) and is_constant(inputs_up["b"]):
            both = inputs["b"], inputs_up["b"]
            weights = self._copies.once(("joined", *both, axis), lambda: _joined(*both, axis))
        else:
            pair = Pair.of(inputs["b"], inputs_up["b"], axis)
            if isinstance(pair, str):
                return pair
            weights = pair.stand_in()  # `rewrite` makes it
        joined = {"a": inputs["a"], "b": weights}
        if "bias" in inputs or "bias" in inputs_up:
            biases = [one.get("bias") for one in (inputs, inputs_up)]
            if not all(bias is None or is_constant(bias) for bias in biases):
                return "a bias that is no constant"
            joined["bias"] = _joined_biases(biases, joined["b"], axis)
        return joined, {**settings, "gated": "halves", ACTIVATION: activation}

    def rewrite(self, op: Any, product: ir.Value, **bound: ir.Value) -> ir.Value:
        node, up = product.producer(), bound["up"].producer()
        assert node is not None
        assert up is not None
        grown = self._grown(node, **bound)
        assert not isinstance(grown, str)
        inputs, settings = grown
        pair = Pair.of(inputs_of(node)["b"], inputs_of(up)["b"], 0 if settings.get("trans_b", 0) else 1)
        if isinstance(pair, Pair):
            inputs["b"] = pair.make(op, self._copies)
        self._log.match(self.name, node.name or "")
        return opened(op, self._kind, inputs, settings, node.name or "")


class SplitGate(_Step):
    """act(g) · u of the two halves of one product's columns; `second`: g is the second, as diffusers' GEGLU and torch's
    `glu` have it. Kernels have g first, so then the columns of the weights change places."""

    def __init__(self, log: Log, copies: Maker, first: bool, plain: bool, second: bool) -> None:
        super().__init__(log, "gemm", "gate")
        self._copies, self._first, self._plain, self._second = copies, first, plain, second

    def pattern(self, op: Any) -> Any:
        names = ["other", "half"] if self._second else ["half", "other"]
        sizes = () if self._plain else (Var("sizes"),)
        parts = op.Split(self._product(op), *sizes, _allow_other_attributes=True, _outputs=names)
        other, half = parts if self._second else parts[::-1]
        gate = op.Activation(half, _domain=OPEN, _allow_other_attributes=True, _outputs=["activated"])
        return op.Mul(gate, other) if self._first else op.Mul(other, gate)

    def _grown(self, product: ir.Node, **bound: ir.Value) -> str | tuple[dict[str, ir.Value], dict[str, Any]]:
        inputs, settings = inputs_of(product), settings_of(product)
        node, split = bound["activated"].producer(), bound["half"].producer()
        assert node is not None
        assert split is not None
        if settings.get(ACTIVATION, "none") != "none" or "residual" in inputs or "gated" in settings:
            return "an activation, a residual or a gate comes before the split"
        shape = static_shape(product.outputs[0]) or ()
        halves = [static_shape(bound[name]) for name in ("half", "other")]
        # A third part may be there that nobody uses.
        if not shape or len(split.outputs) != 2 or halves != [(*shape[:-1], shape[-1] // 2)] * 2:
            return NO_HALVES
        if self._second:
            if not all(is_constant(value) for name, value in inputs.items() if name != "a"):
                return "its second half has the activation, and weights or a bias that are no constants can't be turned"
            axes = {"b": -2 if settings.get("trans_b", 0) else -1, "bias": -1}
            for name, axis in axes.items():
                if (value := inputs.get(name)) is not None:
                    inputs[name] = self._copies.once(("turned", value, axis), lambda v=value, a=axis: _turned(v, a))  # type: ignore[misc]
        return inputs, {**settings, "gated": "halves", ACTIVATION: node.attributes[ACTIVATION].as_string()}


def note_gates(model: ir.Model, log: Log) -> None:
    """Logs why gates of two parts of one `Split` are left, where no rule has said so: rules see but those of a product
    whose result goes nowhere else."""
    for node in model.graph:
        parts = _parts(node)
        if parts is None:
            continue
        split, activated = parts
        source = split.inputs[0]
        assert source is not None
        row = row_before(source)
        product = (source if row is None else row).producer()
        if product is None or not is_open(product) or product.op_type not in KINDS:
            log.miss("gemm + gate", node.name or "", f"what is split, {source.name!r}, is not the result of a product")
            continue
        pattern, name = f"{product.op_type} + gate", product.name or ""
        shared = [repr(value.name) for value in (source, *split.outputs, *activated) if not _used_once(value)]
        if (pattern, name) in log.misses:
            continue
        if product.op_type != "gemm":
            log.miss(pattern, name, "convolutions have no gate")
        elif len(activated) > 1:
            log.miss(pattern, name, "both of the gate's factors have an activation")
        elif shared and len(split.outputs) == 2:
            log.miss(pattern, name, f"what the gate is made of is used elsewhere, too: {', '.join(shared)}")
        else:
            log.miss(pattern, name, NO_HALVES)


def _parts(node: ir.Node) -> tuple[ir.Node, list[ir.Value]] | None:
    """Of a product of two parts of one `Split`: the `Split`, and those factors that are an activation of their part; of
    anything else, or where no factor is, None."""
    if node.domain != "" or node.op_type != "Mul":
        return None
    parts, activated = [], []
    for factor in node.inputs:
        assert factor is not None
        maker, part = factor.producer(), factor
        if maker is not None and maker.domain == OPEN and maker.op_type == "Activation":
            activated.append(factor)
            assert maker.inputs[0] is not None
            part = maker.inputs[0]
        parts.append(part)
    split, other = (part.producer() for part in parts)
    if split is None or split is not other or split.op_type != "Split" or parts[0] is parts[1] or not activated:
        return None
    return split, activated


def _used_once(value: ir.Value) -> bool:
    return len(value.uses()) <= 1 and not value.is_graph_output()


def is_spread(value: ir.Value, shape: Sequence[int], axis: int) -> bool:
    """Whether a computed value is a vector along an axis, counted from the end, of a larger result, seen with other
    axes of 1: as of a time embedding (1, C, 1, 1) in a batch of one. One of the result's own shape is a residual."""
    own = static_shape(value)
    return (
        own is not None
        and dtype_name(value) in FLOATS
        and not is_constant(value)
        and -axis <= len(own) <= len(shape)
        and own != tuple(shape)
        and own[axis] == shape[axis] == math.prod(own)
    )


def _like(value: ir.Value, length: int) -> ir.Value:
    """A vector of a value's type, to ask with."""
    return ir.Value(name=value.name, type=value.type, shape=ir.Shape((length,)))


def with_bias(inputs: dict[str, ir.Value], bias: ir.Value) -> dict[str, ir.Value]:
    """Inputs with a bias, in the order that names of plugins list them."""
    residual = {"residual": inputs["residual"]} if "residual" in inputs else {}
    return {**{name: value for name, value in inputs.items() if name != "residual"}, "bias": bias, **residual}


def _joined(gate: ir.Value, up: ir.Value, axis: int) -> ir.Value:
    arrays = [constant(value) for value in (gate, up)]
    assert arrays[0] is not None
    assert arrays[1] is not None
    return new_constant(np.concatenate([arrays[0], arrays[1]], axis), f"{gate.name}_and_{up.name}")


def _turned(value: ir.Value, axis: int) -> ir.Value:
    """A constant with the halves of an axis in the other order."""
    array = constant(value)
    assert array is not None
    return new_constant(np.roll(array, array.shape[axis] // 2, axis), f"{value.name}_turned")


def _joined_biases(biases: list[ir.Value | None], weights: ir.Value, axis: int) -> ir.Value:
    shape = static_shape(weights)
    assert shape is not None
    arrays = [constant(bias) for bias in biases]
    kind = next(array.dtype for array in arrays if array is not None)
    filled = [np.zeros(shape[axis] // 2, kind) if array is None else array for array in arrays]
    return new_constant(
        np.concatenate(filled), "_and_".join(bias.name or "bias" for bias in biases if bias is not None)
    )


def rules(log: Log, copies: Maker) -> RewriteRuleSet:
    """The steps, in the order in which a chain can take them. What is made of weights that several layers share is made
    once, and kept in `copies`."""
    found = []
    for kind in KINDS:
        found += [Bias.rule(log, kind, first) for first in (True, False)]
    found += [Gate.rule(log, copies, first) for first in (True, False)]
    found += [SplitGate.rule(log, copies, *form) for form in itertools.product((True, False), repeat=3)]
    for kind in KINDS:
        found += [Residual.rule(log, kind, first) for first in (True, False)]
        found.append(Activate.rule(log, kind))
    return RewriteRuleSet(found)

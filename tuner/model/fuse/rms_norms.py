"""RMS norms, as exporters write them out and as ONNX's operator of opset 23 → fused nodes of op `rmsnorm`.

    y = x / √(mean(x²) + ε) · weight, the mean over the last axis

`x` is read from before the cast to fp32 that exporters of half precision write, and the result is given as the cast
behind it has it: the kernel computes in fp32 whatever the tensors are, and rounds once, where the original may round
before it multiplies by the weight as well. What squares in half precision is left: numbers above 256 are infinite
there, and their quotients 0.

What a norm shares with others, as two norms of one value share the root, stays as long as somebody reads it.

A norm of a sum that no product has taken in, as that of the stream and a norm behind a layer, becomes one with a
residual, which gives the sum as well (`take_sums`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from tilewright.tuner.model.fuse.norms import averaging, first_axis, made_by, only_user, squaring
from tilewright.tuner.model.fuse.opening import as_vector, refusal, register_constants
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.graph import (
    dtype_name,
    fused_nodes,
    is_constant,
    is_fused,
    make_fused,
    op_of,
    plugin_inputs,
    plugin_settings,
    scalar,
    static_shape,
)

OP = "rmsnorm"
OPERATOR = "RMSNormalization"
_PATTERN = "rms_norm"
_HALVES = ("fp16", "bf16")


@dataclass(frozen=True, slots=True)
class _Deviation:
    """√(mean(x²) + ε), or its inverse times a weight."""

    x: ir.Value
    mean: ir.Node
    epsilon: float
    weight: ir.Value | None = None


@dataclass(slots=True)
class _Norm:
    """A norm as far as it was read."""

    x: ir.Value
    epsilon: float
    nodes: list[ir.Node]  # the quotient, and what follows of it
    weight: ir.Value | None = None
    settings: dict[str, float | str] = field(default_factory=dict)

    @property
    def last(self) -> ir.Value:
        """What the nodes give."""
        return self.nodes[-1].outputs[0]


class _LeftError(Exception):
    """A lookalike that is no norm of the kernel's; the message says why."""


def apply(model: ir.Model, log: Log) -> None:
    """Writes every RMS norm of the main graph as one fused node, which has the last one's name."""
    for node in list(model.graph):
        if node.graph is not model.graph:
            continue  # it went into a norm
        try:
            found = _read(node)
        except _LeftError as error:
            log.miss(_PATTERN, node.name or "", str(error))
            continue
        if found is not None:
            _write(model, found)
            log.match(_PATTERN, found.nodes[-1].name or "")
    register_constants(model)


def take_sums(model: ir.Model, log: Log) -> None:
    """Lets norms take in the sums that they read, where those are left: products come first, which save more."""
    for node in fused_nodes(model):
        if op_of(node) != OP or "residual" in plugin_inputs(node):
            continue
        inputs = plugin_inputs(node)
        added = made_by(inputs["x"], "Add")
        if added is None or added.graph is not model.graph:
            continue
        if "weight" in inputs and not is_constant(inputs["weight"]):
            continue  # it may be computed from the sum
        first, second = added.inputs
        if first is None or second is None or first is second:
            continue
        like = inputs["x"]
        if any(static_shape(each) != static_shape(like) or each.dtype != like.dtype for each in (first, second)):
            continue
        # The sum that the norm gives has the residual's type, in half precision, too.
        x, residual = sorted((second, first), key=_streams)
        inputs = {**inputs, "x": x, "residual": residual}
        settings = plugin_settings(node)
        if refusal(OP, inputs, settings) is not None:
            continue
        old = [node.outputs[0], added.outputs[0]]
        new = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in old]
        made = make_fused(OP, inputs, settings, name=node.name or "", outputs=new)
        ir.convenience.replace_nodes_and_values(model.graph, added, [added, node], [made], old, new)
        log.match(f"{_PATTERN} + residual", made.name or "")


def _streams(value: ir.Value) -> tuple[bool, int]:
    """How much a value looks like the residual stream: a sum that a norm gives is one, and else what others read."""
    node = value.producer()
    return node is not None and is_fused(node) and value is not node.outputs[0], len(value.uses())


def _read(node: ir.Node) -> _Norm | None:
    """The norm whose quotient a node is, with all that follows of it; None if it looks like none.

    Raises:
        _LeftError: it looks like one and is not one that the plugin takes.
    """
    if node.domain != "":
        return None
    found = _operator(node) if node.op_type == OPERATOR else _quotient(node)
    if found is None:
        return None
    shape = static_shape(found.x) or ()
    while (user := only_user(found.last)) is not None:
        if user.op_type == "Cast" and dtype_name(found.last) == "fp32" and dtype_name(user.outputs[0]) in _HALVES:
            pass
        elif user.op_type == "Mul" and found.weight is None and static_shape(user.outputs[0]) == shape:
            other = user.inputs[1] if user.inputs[0] is found.last else user.inputs[0]
            found.weight = None if other is None else as_vector(other, shape[-1])
            if found.weight is None:
                break
        else:
            break
        found.nodes.append(user)
    kind = dtype_name(found.last)
    found.settings = {"eps": found.epsilon, "out_dtype": "default" if kind == dtype_name(found.x) else kind}
    inputs = {"x": found.x} if found.weight is None else {"x": found.x, "weight": found.weight}
    reason = refusal(OP, inputs, found.settings)
    if reason is not None:
        raise _LeftError(reason)
    return found


def _operator(node: ir.Node) -> _Norm:
    """`RMSNormalization` over the last axis.

    Raises:
        _LeftError: it is over more axes, or its squares aren't fp32.
    """
    x, scale = node.inputs[:2]
    assert x is not None
    assert scale is not None
    shape = static_shape(x)
    if not shape:
        raise _LeftError(f"the shape of {x.name!r} is not known")
    axis, stash = node.attributes.get_int("axis", -1), node.attributes.get_int("stash_type", 1)
    if axis not in (-1, len(shape) - 1):
        raise _LeftError(f"{axis=} of a value of shape {shape}: the kernel's norm is over the last axis alone")
    if stash != ir.DataType.FLOAT:
        raise _LeftError(f"it computes in {ir.DataType(stash).name.lower()}, and the kernel in fp32")
    weight = as_vector(scale, shape[-1])
    if weight is None:
        raise _LeftError(f"its scale of shape {static_shape(scale)} is none for each of {shape[-1]} places")
    return _Norm(x, node.attributes.get_float("epsilon", 1e-5) or 0.0, [node], weight)


def _quotient(node: ir.Node) -> _Norm | None:
    """x / √(mean(x²) + ε), or x · 1 / √(…); None of what divides by no such root.

    Raises:
        _LeftError: it divides something else, or by another mean than the kernel's.
    """
    if node.op_type not in ("Div", "Mul") or len(node.inputs) != 2:
        return None
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        value, by = node.inputs[index], node.inputs[1 - index]
        found = _inverse(by) if node.op_type == "Mul" else _root(by)
        if found is not None:
            break
    if found is None or value is None or is_constant(value):
        return None  # a constant over the root is a factor of what comes next
    if _uncast(value) is not found.x:
        raise _LeftError(f"it divides {value.name!r} by a mean of squares of {found.x.name!r}")
    shape, axis = static_shape(found.x), first_axis(found.mean)
    if shape is None:
        raise _LeftError(f"the shape of {found.x.name!r} is not known")
    if axis is None or axis != len(shape) - 1:
        raise _LeftError(f"its mean of a value of shape {shape} is not over the last axis alone")
    kind = dtype_name(found.mean.outputs[0])
    if kind != "fp32":
        why = ": what overflows there does not here" if kind in _HALVES else ""
        raise _LeftError(f"it squares in {kind}, and the kernel in fp32{why}")
    if found.weight is None:
        return _Norm(found.x, found.epsilon, [node])
    weight = as_vector(found.weight, shape[-1])
    if weight is None:
        raise _LeftError(f"its weight of shape {static_shape(found.weight)} is none for each of {shape[-1]} places")
    return _Norm(found.x, found.epsilon, [node], weight)


def _inverse(value: ir.Value | None) -> _Deviation | None:
    """1 / √(mean(x²) + ε), maybe times a weight."""
    cast = made_by(value, "Cast")
    node = made_by(value if cast is None else cast.inputs[0], "Mul")
    if node is None:
        return _reciprocal(value)
    for index in (0, 1):
        factor, weight = node.inputs[index], node.inputs[1 - index]
        found = _reciprocal(factor) if is_constant(weight) else None
        if found is not None:
            return replace(found, weight=weight)
    return None


def _reciprocal(value: ir.Value | None) -> _Deviation | None:
    """1 / √(mean(x²) + ε)."""
    cast = made_by(value, "Cast")
    if cast is not None:  # to the type of what it multiplies
        value = cast.inputs[0]
    if (node := made_by(value, "Reciprocal")) is not None:
        return _root(node.inputs[0])
    if (node := made_by(value, "Div")) is not None:
        return _root(node.inputs[1]) if scalar(node.inputs[0]) == 1 else None
    if (node := made_by(value, "Pow")) is not None:
        return _mean(node.inputs[0]) if scalar(node.inputs[1]) == -0.5 else None
    return None


def _root(value: ir.Value | None) -> _Deviation | None:
    """√(mean(x²) + ε)."""
    if (node := made_by(value, "Sqrt")) is not None:
        return _mean(node.inputs[0])
    if (node := made_by(value, "Pow")) is not None:
        return _mean(node.inputs[0]) if scalar(node.inputs[1]) == 0.5 else None
    return None


def _mean(value: ir.Value | None) -> _Deviation | None:
    """mean(x²) + ε."""
    added = made_by(value, "Add")
    for index in (0, 1) if added is not None else ():
        assert added is not None
        epsilon, mean = scalar(added.inputs[index]), averaging(added.inputs[1 - index])
        square = None if mean is None else squaring(mean.inputs[0])
        if epsilon is None or mean is None or square is None:
            continue
        x = square.inputs[0]
        assert x is not None
        return _Deviation(_uncast(x), mean, epsilon)
    return None


def _uncast(value: ir.Value) -> ir.Value:
    """A value, or of one that was cast from half precision to fp32 what it was."""
    cast = made_by(value, "Cast")
    source = None if cast is None else cast.inputs[0]
    wide = dtype_name(value) == "fp32" and source is not None and dtype_name(source) in _HALVES
    return source if wide and source is not None else value


def _write(model: ir.Model, found: _Norm) -> None:
    old = found.last
    inputs = {"x": found.x} if found.weight is None else {"x": found.x, "weight": found.weight}
    out = ir.Value(name=old.name, type=old.type, shape=old.shape)
    made = make_fused(OP, inputs, found.settings, name=found.nodes[-1].name or "", outputs=[out])
    ir.convenience.replace_nodes_and_values(model.graph, found.nodes[-1], found.nodes, [made], [old], [out])

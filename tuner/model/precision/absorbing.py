"""Dividing a value by factors inside what makes it, so that they cost nothing.

`absorb` looks for constants before a value that can take positive factors in, and gives the new constants, or the
reason why there are none. It goes back through what is positively homogeneous, f(c·x) = c·f(x) for c > 0: ReLU,
pooling, and operators that only reorder numbers. Factors are an array that broadcasts to the value, so that a shuffle
of channels, in any number of steps, is just a reshaping of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import (
    constant,
    dtype_name,
    is_constant,
    is_fused,
    op_of,
    plugin_inputs,
    plugin_settings,
    static_shape,
)
from tilewright.tuner.model.precision.quantise import channel_axis

Array = np.ndarray[Any, Any]

HOMOGENEOUS = ("none", "relu", "leaky_relu")
"""Activations f with f(c·x) = c·f(x) for c > 0."""

_LAST_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_CHANNEL_NORMS = ("GroupNormalization", "BatchNormalization", "InstanceNormalization")
_FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True, slots=True)
class Change:
    """A node's input that becomes another constant."""

    node: ir.Node
    index: int
    array: Array


Found = list[Change] | str


def absorb(value: ir.Value, factors: Array) -> Found:
    """The constants that divide a value by `factors`, which broadcast to it, or why there are none. What reads the
    value is the caller's concern; what is on the way to the constants must be read by nothing else."""
    node, shape = value.producer(), static_shape(value)
    if node is None:
        return "it is an input of the model"
    if shape is None:
        return "its shape is not known"
    what = f"{node.op_type} {node.name!r}"
    if is_fused(node):
        if value is not node.outputs[0]:
            return f"{what} gives it beside its result"
        return _fused(node, shape, factors)
    if sum(bool(out.uses()) for out in node.outputs) > 1:
        return f"{what} has several results"
    step = _STEPS.get(node.op_type) if node.domain == "" else None
    return f"{what} can't take factors" if step is None else step(node, shape, factors)


def carry_out(edit: Editor, changes: Sequence[Change]) -> None:
    """Gives the nodes their new constants."""
    for change in changes:
        old = change.node.inputs[change.index]
        assert old is not None
        change.node.replace_input_with(change.index, edit.constant(change.array, f"{old.name}_smooth", old.dtype))


def reduced(factors: Array, shape: Sequence[int]) -> Array | None:
    """Factors as an array of a shape with as many or fewer dimensions, aligned at the end, if they are the same all
    along each axis on which that is 1; else None."""
    index: list[Any] = []
    for axis, length in enumerate(factors.shape):
        place = axis - (factors.ndim - len(shape))
        wanted = shape[place] if place >= 0 else 1
        if wanted == 1 and length > 1:
            if not (factors == factors.take([0], axis=axis)).all():
                return None
            index.append(slice(0, 1))
        else:
            index.append(slice(None))
    found = factors[tuple(index)]
    if found.ndim > len(shape):
        found = found.reshape(found.shape[found.ndim - len(shape) :])
    return np.broadcast_to(found, tuple(shape))


def along(factors: Array, shape: Sequence[int], axis: int) -> Array | None:
    """Factors as one for each place along an axis of a value of a shape, or None if they are not."""
    line = [1] * len(shape)
    line[axis] = shape[axis]
    full = factors.reshape((1,) * (len(shape) - factors.ndim) + factors.shape)
    found = reduced(full, line)
    return None if found is None else found.reshape(-1)


def _before(node: ir.Node, source: ir.Value | None, factors: Array) -> Found:
    """On to what a node reads, if it alone does."""
    assert source is not None
    if len(source.uses()) != 1 or source.is_graph_output():
        return f"what {node.op_type} {node.name!r} reads is read by others, too"
    return absorb(source, factors)


def _elementwise(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    return _before(node, node.inputs[0], factors)


def _pool(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    channels = along(factors, shape, 1)
    if channels is None:
        return f"{node.op_type} {node.name!r} puts pixels together that have other factors"
    return _before(node, node.inputs[0], channels.reshape(1, -1, *[1] * (len(shape) - 2)))


def _moved(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    source = node.inputs[0]
    assert source is not None
    before = static_shape(source)
    if before is None:
        return f"the shape of what {node.op_type} {node.name!r} reads is not known"
    full = np.broadcast_to(factors, shape)
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", list(range(len(shape)))[::-1])
        return _before(node, source, full.transpose(np.argsort(order)))
    return _before(node, source, full.reshape(before))


def _concat(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    axis = node.attributes["axis"].as_int() % len(shape)
    full = np.broadcast_to(factors, shape)
    changes: list[Change] = []
    start = 0
    for source in node.inputs:
        assert source is not None
        length = (static_shape(source) or shape)[axis]
        found = _before(node, source, full[(slice(None),) * axis + (slice(start, start + length),)])
        if isinstance(found, str):
            return found
        changes.extend(found)
        start += length
    return changes


def _norm(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    what = f"{node.op_type} {node.name!r}"
    axis = 1 if node.op_type in _CHANNEL_NORMS else len(shape) - 1
    if node.op_type in _LAST_NORMS and node.attributes.get_int("axis", -1) % len(shape) != axis:
        return f"{what} has a scale of more than one dimension"
    channels = along(factors, shape, axis)
    if channels is None:
        return f"{what} has a scale for each channel, and the factors differ within one"
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return f"{what} has no scale"
    changes = []
    for index, given in enumerate(node.inputs[1:3], start=1):
        if given is None:
            continue
        if not is_constant(given) or static_shape(given) != channels.shape:
            return f"the scale or bias of {what} is no constant of one number a channel"
        changes.append(_change(node, index, given, channels))
    return changes


def _affine(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    """A constant that is multiplied by, or added: the end of a decomposed norm."""
    what = f"{node.op_type} {node.name!r}"
    places = [index for index, given in enumerate(node.inputs) if is_constant(given)]
    if len(places) != 1:
        return f"{what} has no constant operand"
    given, other = node.inputs[places[0]], node.inputs[1 - places[0]]
    assert given is not None
    assert other is not None
    array = constant(given)
    if array is None or static_shape(other) != shape:
        return f"{what} broadcasts what it reads"
    if node.op_type == "Add" and array.size == 1:
        array = np.broadcast_to(array, (1,) * (len(shape) - 1) + shape[-1:])
    fitting = reduced(np.broadcast_to(factors, shape), array.shape)
    if fitting is None:
        return f"the constant of {what} is shared by places that have other factors"
    change = Change(node, places[0], (array / fitting).astype(array.dtype))
    if node.op_type == "Mul":
        return [change]
    before = _before(node, other, factors)
    return before if isinstance(before, str) else [change, *before]


def _fused(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    what, op, inputs, settings = repr(node.name), op_of(node), plugin_inputs(node), plugin_settings(node)
    if op == "rmsnorm":
        return _fused_norm(node, shape, factors)
    if op not in ("gemm", "conv2d"):
        return f"{node.op_type} {what} has no weights"
    channels = along(factors, shape, 1 if op == "conv2d" else len(shape) - 1)
    if channels is None:
        return f"{what} has weights for each channel, and the factors differ within one"
    gated = settings.get("gated", "none")
    if gated == "none" and settings["activation"].partition(":")[0] not in HOMOGENEOUS:
        return f"the activation {settings['activation']} of {what} is not homogeneous"
    if "residual" in inputs:
        return f"{what} adds a residual, which has no weights here"
    name = "b" if op == "gemm" else "w"
    if not is_constant(inputs[name]) or dtype_name(inputs[name]) not in _FLOATS or "out_scale" in inputs:
        return f"{what} has no weights in floating point"
    if "bias" in inputs and (not is_constant(inputs["bias"]) or len(inputs["bias"].shape or ()) != 1):
        return f"the bias of {what} is no constant of one number a channel"
    if gated != "none":
        # act(gate) · up: the half that is up takes the factors, whatever the activation is.
        ones = np.ones_like(channels)
        halves = (ones, channels)
        channels = np.concatenate(halves) if gated == "halves" else np.stack(halves, axis=1).reshape(-1)
    places = list(inputs)
    weight = inputs[name]
    line = [1] * len(weight.shape or ())
    line[channel_axis(node)] = -1
    changes = [_change(node, places.index(name), weight, channels.reshape(line))]
    if "bias" in inputs:
        changes.append(_change(node, places.index("bias"), inputs["bias"], channels))
    return changes


def _fused_norm(node: ir.Node, shape: tuple[int, ...], factors: Array) -> Found:
    inputs, offset = plugin_inputs(node), plugin_settings(node)["weight_offset"]
    channels = along(factors, shape, len(shape) - 1)
    if channels is None or "weight" not in inputs or not is_constant(inputs["weight"]):
        return f"{node.op_type} {node.name!r} has no constant weight for each channel"
    array = constant(inputs["weight"])
    assert array is not None
    return [Change(node, list(inputs).index("weight"), ((array + offset) / channels - offset).astype(array.dtype))]


def _change(node: ir.Node, index: int, given: ir.Value, factors: Array) -> Change:
    array = constant(given)
    assert array is not None
    return Change(node, index, (array / factors).astype(array.dtype))


_STEPS: Mapping[str, Callable[[ir.Node, tuple[int, ...], Array], Found]] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "Identity"), _elementwise),
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"), _moved),
    **dict.fromkeys((*_LAST_NORMS, *_CHANNEL_NORMS), _norm),
    **dict.fromkeys(("Mul", "Add"), _affine),
    "Concat": _concat,
}

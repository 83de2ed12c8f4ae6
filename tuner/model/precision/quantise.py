"""From a fused fp32 model to one of mixed precision, as a plan says.

A plan names layers: fused nodes that become int8 or fp8, with the scale of each activation they read, and nodes that
keep a floating-point type of their own. All else becomes `base`, by the rules of `half.py`.

A quantised layer computes `s_x · s_w[n] · Σ q_x · q_w + bias`, with q_x = round(x / s_x) in [-128, 127], per tensor,
and q_w = round(w / s_w[n]) in [-127, 127], per output channel, both symmetric; rounding is to nearest even. An x that
is never negative may have all of [-128, 127] to itself, shifted by 128, with what that adds in the bias (`zeros.py`).
fp8 (e4m3) likewise with |q| ≤ 448. q_x comes from a `QuantizeLinear` in the graph, one for all readers of a value with
one scale, or from the layer that makes x itself (`output_scales.py`). With the function bodies inlined that is ONNX's
QDQ form. (Integer quantisation: Jacob et al., arXiv:1712.05877; e4m3: Micikevicius et al., arXiv:2209.05433.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels import dtypes
from tilewright.kernels.device import Device
from tilewright.kernels.tensorrt.catalogue import OPERATIONS, find_plugin, plugin_name
from tilewright.kernels.tensorrt.operation import Tensor
from tilewright.tuner.model.bodies import attach_bodies
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import (
    DTYPES,
    constant,
    copy_of,
    dtype_name,
    fused_nodes,
    is_constant,
    is_fused,
    make_fused,
    op_of,
    plugin_inputs,
    plugin_settings,
    plugin_tensors,
    scalar,
    static_shape,
)
from tilewright.tuner.model.precision.grouped import (
    SMALLEST,
    WEIGHT_ONLY,
    GroupedWeights,
    constants,
    matrix_of,
    put,
    quantise_matrix,
    refused,
)
from tilewright.tuner.model.precision.half import HALVES, lower
from tilewright.tuner.model.precision.output_scales import MOVED, can_shift, fold_output_scales
from tilewright.tuner.model.precision.steps import (
    Grid,
    drop_fp8_zero_points,
    make_signed,
    quantise_step,
    quantised_constant,
    spell_out_zeros,
)
from tilewright.tuner.model.precision.weight_only import take_integers
from tilewright.tuner.model.precision.zeros import shift_by_bias
from tilewright.tuner.model.reading.convert import OPSET
from tilewright.tuning_db.errors import ModelError, UsageError

Array = np.ndarray[Any, Any]

QUANTISED: Mapping[str, str] = {"int8": "int8", "fp8": "fp8e4m3"}
"""Kinds of precision that need scales, and the data type of each."""

KINDS = ("fp32", *HALVES, *QUANTISED, *WEIGHT_ONLY)
BASES = ("fp32", *HALVES)

LARGEST: Mapping[str, float] = {
    "int8": dtypes.dtype("int8").largest,
    "fp8": dtypes.dtype("fp8e4m3").largest,
}
"""The number that the largest weight of a channel becomes, and that a symmetric scale is a range's part of."""

ACTIVATIONS: Mapping[str, tuple[str, ...]] = {"gemm": ("a",), "conv2d": ("x",), "attention": ("q", "k", "v")}
"""Inputs of each op's plugin that are activations."""

WEIGHTS: Mapping[str, str] = {"gemm": "b", "conv2d": "w"}

DEEPEST = (2**31 - 1) // 128**2
"""Products of int8 that a sum in int32 has room for, whatever they are: of more it may wrap around."""

_CHUNK = 1 << 24
"""Weights converted at a time, so that a large matrix needs no second one in fp32."""


@dataclass(frozen=True, slots=True)
class LayerPrecision:
    """What a layer computes in: `fp32`, `fp16`, `bf16`, `int8`, `fp8`, or the base with weights that alone are
    quantised, `w8a16` or `w4a16` (`grouped.py`). `int8` and `fp8` have the scale of each activation by the plugin's
    name for it: q = round(x / scale) + zero. Zero is 0, or of int8 what the model came with, or -128 for activations
    that are never negative; see `zeros.py`."""

    kind: str
    scales: Mapping[str, float] = field(default_factory=dict)
    zeros: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"precision {self.kind!r} must be one of {', '.join(KINDS)}")
        for name, scale in self.scales.items():
            if not SMALLEST <= scale < math.inf:
                raise UsageError(f"the scale of {name}, {scale}, must be a positive finite number of fp32")
        for name, zero in self.zeros.items():
            if name not in self.scales or not -128 <= zero <= 127 or (zero and self.kind != "int8"):
                raise UsageError(
                    f"zero={zero} of {name} in {self.kind} must be 0, or -128 to 127 of an int8 activation"
                )


@dataclass(frozen=True, slots=True)
class Weights:
    """Quantised weights: w[…, n, …] = scales[n] · values[…, n, …]."""

    values: Array  # int8 or float8_e4m3fn, in the shape of the weights
    scales: Array  # fp32, one for each output channel


def channel_axis(node: ir.Node) -> int:
    """The axis of a layer's weights along which output channels lie."""
    if op_of(node) == "conv2d":
        return 0
    b = plugin_inputs(node)["b"]
    assert b.shape is not None
    return len(b.shape) - (2 if plugin_settings(node)["trans_b"] else 1)


def depth_of(node: ir.Node) -> int:
    """The products in each sum of a layer with weights: K, or C/groups·R·S."""
    shape = static_shape(plugin_inputs(node)[WEIGHTS[op_of(node)]])
    assert shape is not None
    if op_of(node) == "conv2d":
        return math.prod(shape[1:])
    return shape[-1 if plugin_settings(node)["trans_b"] else -2]


def channel_scales(weights: Array, axis: int, kind: str) -> Array:
    """max|w| / 127 (of fp8 / 448) of each channel, fp32; 1 for a channel of zeros."""
    others = tuple(index for index in range(weights.ndim) if index != axis)
    largest = np.maximum(weights.max(axis=others), -weights.min(axis=others)).astype(np.float64)
    scales = np.maximum(largest / LARGEST[kind], SMALLEST)
    return np.where(largest == 0, 1.0, scales).astype(np.float32)


def to_grid(values: Array, kind: str) -> Array:
    """Weights over their scales as int8 in [-127, 127], or as e4m3 in [-448, 448], to nearest even."""
    bound = LARGEST[kind]
    if kind == "int8":
        values = np.rint(values)
    return np.clip(values, -bound, bound).astype(DTYPES[QUANTISED[kind]].numpy())


def quantise_weights(weights: Array, axis: int, kind: str, scales: Array | None = None) -> Weights:
    """Weights rounded to nearest, with a scale for each place along `axis`; `scales` if they are not to be the
    channels' largest magnitudes over 127 (448)."""
    if scales is None:
        scales = channel_scales(weights, axis, kind)
    shape = [1] * weights.ndim
    shape[axis] = -1
    divisor = scales.reshape(shape)
    result = np.empty(weights.shape, DTYPES[QUANTISED[kind]].numpy())
    step = max(1, _CHUNK * weights.shape[0] // max(1, weights.size))
    for start in range(0, weights.shape[0], step):
        part = slice(start, start + step)
        over = divisor[part] if axis == 0 else divisor
        result[part] = to_grid(weights[part].astype(np.float32) / over, kind)
    return Weights(result, scales)


def dequantised(weights: Weights, axis: int) -> Array:
    """scales[n] · values[…, n, …] in fp32."""
    shape = [1] * weights.values.ndim
    shape[axis] = -1
    return np.asarray(weights.values.astype(np.float32) * weights.scales.reshape(shape))


def can_have_zero(node: ir.Node) -> bool:
    """Whether what a zero point of a layer's input adds is a constant of each output channel, and a bias can take it: a
    convolution has no padding, and a product one matrix of weights."""
    op = op_of(node)
    if op not in WEIGHTS or not can_shift(node):
        return False
    if op == "conv2d":
        settings = plugin_settings(node)
        return not any(settings[f"pad_{side}"] for side in ("top", "left", "bottom", "right"))
    shape = static_shape(plugin_inputs(node)[WEIGHTS[op]]) or ()
    return all(length == 1 for length in shape[:-2])


def eligible(node: ir.Node, kind: str) -> str | None:
    """None if a node can compute in int8 or fp8, else the reason why it can't. Which devices have fp8 is not asked.

    Raises:
        UsageError: `kind` is neither.
    """
    if kind not in QUANTISED:
        raise UsageError(f"precision {kind!r} must be {' or '.join(QUANTISED)}")
    if not is_fused(node):
        return f"{node.op_type} is no fused node"
    op = op_of(node)
    if op not in ACTIVATIONS:
        return f"{node.op_type} is a norm: norms are not quantised"
    inputs, settings = plugin_inputs(node), plugin_settings(node)
    reason = _form(inputs, settings, op)
    if reason is not None:
        return reason
    wanted = QUANTISED[kind]
    try:
        tensors = plugin_tensors(node)
        for name in (*ACTIVATIONS[op], *((WEIGHTS[op],) if op in WEIGHTS else ())):
            tensors[name] = replace(tensors[name], dtype=wanted)
        for name in _scale_names(op):
            shape = (tensors[WEIGHTS[op]].shape[channel_axis(node)],) if name[:-6] in WEIGHTS.values() else ()
            tensors[name] = Tensor(name, shape, "fp32")
        ordered = {name: tensors[name] for name in find_plugin(_operator(op, tensors)).inputs}
        attributes = {**settings, "out_dtype": dtype_name(node.outputs[0])}
        if "precision" in attributes:
            attributes["precision"] = "default"
        operation = find_plugin(node.op_type).operation
        operation.check_static(ordered, attributes)
        operation.problem(ordered, attributes)
    except UsageError as error:
        return str(error)
    if kind == "int8" and op in WEIGHTS and depth_of(node) > DEEPEST:
        return f"its sums are of {depth_of(node)} products, and int32 has room for {DEEPEST} of int8"
    return None


def _form(inputs: Mapping[str, ir.Value], settings: Mapping[str, Any], op: str) -> str | None:
    """None, or why a layer with these inputs is not one to quantise, whatever its shapes."""
    for name in ACTIVATIONS[op]:
        if dtype_name(inputs[name]) not in BASES:
            return f"{name} is {dtype_name(inputs[name])} already"
        if is_constant(inputs[name]):
            return f"{name} is a constant, and only weights are quantised as such"
    if "out_scale" in inputs:
        return "its result is quantised already"
    if op not in WEIGHTS:
        return None
    weight = WEIGHTS[op]
    if quantised_constant(inputs[weight]) is not None:
        return f"{weight} alone is quantised: activations stay in half precision"
    if not is_constant(inputs[weight]):
        return "both operands are activations: weights are what int8 and fp8 kernels have a scale per channel for"
    if settings.get("weights", "none") != "none" or settings.get("group_size") or "b_zero" in inputs:
        return "its weights are quantised already"
    if dtype_name(inputs[weight]) not in BASES:
        return f"{weight} is {dtype_name(inputs[weight])} already"
    for name in _scale_names(op):
        if name in inputs and not is_constant(inputs[name]):
            return f"{name} is computed, and the scale of a quantised layer is a constant"
    first = _scale_names(op)[0]
    if first in inputs and scalar(inputs[first]) is None:
        return f"{first} is one for each row, and quantised activations have one for all"
    return None


def _scale_names(op: str) -> tuple[str, ...]:
    names = (*ACTIVATIONS[op], *((WEIGHTS[op],) if op in WEIGHTS else ()))
    return tuple(f"{name}_scale" for name in names)


def _operator(op: str, inputs: Mapping[str, Any]) -> str:
    required = next(operation.required for operation in OPERATIONS if operation.kernel.name == op)
    return plugin_name(op, *(name for name in inputs if name not in required))


class _Quantising:
    """The layers of one plan, one after another."""

    def __init__(self, model: ir.Model, weights: Mapping[str, Weights], shifts: Mapping[str, Array]) -> None:
        self.edit = Editor(model)
        self.opset = model.opset_imports[""]
        self.given, self.shifts = weights, shifts
        self.pinned: set[ir.Value] = set()  # biases that stay fp32
        self._steps: dict[tuple[ir.Value, float, int, str], ir.Value] = {}
        self._weights: dict[tuple[ir.Value, int, str], tuple[ir.Value, Weights]] = {}
        self._made: dict[int, ir.Value] = {}  # by the identity of what is kept above or by the caller

    def layer(self, node: ir.Node, precision: LayerPrecision) -> None:
        op, kind = op_of(node), precision.kind
        inputs, settings = plugin_inputs(node), plugin_settings(node)
        out = node.outputs[0]
        new = dict(inputs)
        for name in ACTIVATIONS[op]:
            scale = precision.scales[name]
            new[name] = self._step(inputs[name], scale, precision.zeros.get(name, 0), kind)
            factor = inputs.get(f"{name}_scale")
            number = 1.0 if factor is None else scalar(factor)
            assert number is not None
            array = np.asarray(np.float32(scale) * np.float32(number), np.float32)
            new[f"{name}_scale"] = self.edit.constant(array, f"{node.name}_{name}_scale")
        if op in WEIGHTS:
            name = WEIGHTS[op]
            value, weights = self._quantised(node, inputs[name], kind)
            new[name] = value
            own = constant(inputs.get(f"{name}_scale"))
            scales = weights.scales if own is None else weights.scales * own.astype(np.float32)
            new[f"{name}_scale"] = self.edit.constant(scales.astype(np.float32), f"{node.name}_{name}_scale")
            if node.name in self.shifts and can_shift(node):
                new["bias"] = self._corrected(node, inputs.get("bias"), weights.scales.size)
            zero = precision.zeros.get(ACTIVATIONS[op][0], 0)
            if zero:
                self._shift(node, new, weights, zero)
        changed = {**settings, "out_dtype": dtype_name(out)}
        if "precision" in changed:
            changed["precision"] = "default"
        fused = make_fused(op, new, changed, name=node.name or "")
        fused.metadata_props.update(node.metadata_props)
        self.edit.replace(node, fused)

    def _corrected(self, node: ir.Node, bias: ir.Value | None, channels: int) -> ir.Value:
        """A layer's bias less the shift of its output."""
        shift = self.shifts[node.name or ""]
        if shift.shape != (channels,):
            raise UsageError(f"node {node.name!r}: shifts of shape {shift.shape} must be one for each of {channels}")
        array = constant(bias)
        base = np.zeros(channels, np.float32) if array is None else array.astype(np.float32)
        dtype = DTYPES["fp32" if bias is None else dtype_name(bias)]
        return self.edit.constant((base - shift).astype(dtype.numpy()), f"{node.name}_bias", dtype)

    def _shift(self, node: ir.Node, new: dict[str, ir.Value], weights: Weights, zero: int) -> None:
        """Puts what a zero point adds to a layer's result into its bias."""
        op, axis = op_of(node), channel_axis(node)
        others = tuple(index for index in range(weights.values.ndim) if index != axis)
        sums = weights.values.sum(axis=others, dtype=np.int64)
        activation = constant(new[f"{ACTIVATIONS[op][0]}_scale"])
        channels = constant(new[f"{WEIGHTS[op]}_scale"])
        assert activation is not None
        assert channels is not None
        scales = np.broadcast_to(activation.reshape(-1) * channels, sums.shape)
        bias = shift_by_bias(constant(new.get("bias")), scales, sums, zero)
        new["bias"] = self.edit.constant(bias, f"{node.name}_bias")
        self.pinned.add(new["bias"])

    def _step(self, value: ir.Value, scale: float, zero: int, kind: str) -> ir.Value:
        """The quantised value: of a step that is there already, or of a new one."""
        key = (value, float(np.float32(scale)), zero, kind)
        if key not in self._steps:
            source = value
            if dtype_name(value) != "fp32":
                cast = self.edit.node(
                    "Cast", [value], value, DTYPES["fp32"], base=f"{value.name}_fp32", attributes={"to": 1}
                )
                self.edit.after(value, cast)
                source = cast.outputs[0]
            step = quantise_step(self.edit, source, Grid(scale, QUANTISED[kind], zero), self.opset)
            self._steps[key] = step.outputs[0]
        return self._steps[key]

    def _quantised(self, node: ir.Node, value: ir.Value, kind: str) -> tuple[ir.Value, Weights]:
        axis = channel_axis(node)
        given = self.given.get(node.name or "")
        key = (value, axis, kind)
        if given is None and key in self._weights:
            return self._weights[key]
        array = constant(value)
        assert array is not None
        if given is not None:
            wanted = (array.shape, (array.shape[axis],), DTYPES[QUANTISED[kind]].numpy())
            if (given.values.shape, given.scales.shape, given.values.dtype) != wanted:
                raise UsageError(
                    f"node {node.name!r}: quantised weights of {given.values.dtype}{given.values.shape} with scales of "
                    f"{given.scales.shape} are not {QUANTISED[kind]} of {array.shape} with one for each of axis {axis}"
                )
        elif not np.isfinite(array).all():
            raise ModelError(f"node {node.name!r}: its weights {value.name!r} have infinite or NaN elements")
        weights = given or quantise_weights(array, axis, kind)
        if id(weights) not in self._made:  # layers may share theirs
            name = f"{value.name}_{QUANTISED[kind]}"
            self._made[id(weights)] = self.edit.constant(weights.values, name, DTYPES[QUANTISED[kind]])
        made = self._made[id(weights)]
        if given is None:
            self._weights[key] = (made, weights)
        return made, weights


def check_plan(model: ir.Model, plan: Mapping[str, LayerPrecision], base: str) -> None:
    """Does nothing if the plan can be carried out.

    Raises:
        UsageError: an unknown base or node, a layer that can't be quantised, a scale that is missing or not asked for.
    """
    if base not in BASES:
        raise UsageError(f"base={base!r} must be one of {', '.join(BASES)}")
    nodes = {node.name: node for node in model.graph}
    for name, precision in plan.items():
        node = nodes.get(name)
        if node is None:
            raise UsageError(f"the plan has a node {name!r}, and the model has none of that name")
        if precision.kind in WEIGHT_ONLY:
            reason = refused(node, precision.kind, None)
            if reason is None and base not in HALVES:
                reason = f"its activations would be {base}"
            if reason is not None:
                raise UsageError(f"node {name!r} can't be {precision.kind}: {reason}")
        if precision.kind not in QUANTISED:
            continue
        reason = eligible(node, precision.kind)
        if reason is not None:
            raise UsageError(f"node {name!r} can't be {precision.kind}: {reason}")
        wanted = ACTIVATIONS[op_of(node)]
        if set(precision.scales) != set(wanted):
            raise UsageError(
                f"node {name!r} has scales of {', '.join(precision.scales) or 'nothing'} and needs those of "
                f"{', '.join(wanted)}"
            )
        if any(precision.zeros.values()) and not can_have_zero(node):
            raise UsageError(
                f"node {name!r} can't have a zero point: it has padding, or no constant bias and matrix of weights"
            )


def apply_precision(
    model: ir.Model,
    plan: Mapping[str, LayerPrecision],
    *,
    base: str,
    weights: Mapping[str, Weights] | None = None,
    grouped: Mapping[str, GroupedWeights] | None = None,
    shifts: Mapping[str, Array] | None = None,
    extremes: Mapping[str, tuple[float, float]] | None = None,
    device: Device | None = None,
    fold: bool = True,
) -> ir.Model:
    """A new model of mixed precision. The one given stays as it is, and shares the constants that did not change.

    `plan` is by node name; `base` (fp32, fp16 or bf16) is the data type of all else. `weights` are quantised weights of
    int8 and fp8 layers, by node name, where they are not to be rounded to nearest (`rounding.py`), `grouped` those of
    layers whose weights alone are, and `shifts` what is taken off the biases of the first (`correction.py`).
    `extremes` are the least and largest numbers of values, by name, that were seen on calibration data: what comes near
    the base's range stays fp32 (`kept.py`). `device` is the one whose kernels must have the data types of steps and
    weights that the model came with; None: any. With `fold`, layers whose result is only wanted quantised give it so
    themselves (`output_scales.py`). Products in half precision read quantised weights as they are (`weight_only.py`).
    Graph inputs and outputs keep their data types.

    Raises:
        UsageError: the plan does not fit the model; see `check_plan`.
        ModelError: weights that are infinite or NaN.
    """
    check_plan(model, plan, base)
    mixed = copy_of(model)
    mixed.functions.clear()  # of fused nodes; they are made anew
    for domain in [domain for domain in mixed.opset_imports if domain.startswith("tilewright")]:
        del mixed.opset_imports[domain]
    if any(dtype_name(value) == QUANTISED["fp8"] for node in mixed.graph for value in node.outputs):
        # From 20, a quantised file's opset, to 21 operators only gain types, and Transpose that of fp8.
        mixed.opset_imports[""] = max(mixed.opset_imports[""], OPSET)
    make_signed(mixed, [node for node in fused_nodes(mixed) if node.name in plan])
    quantising = _Quantising(mixed, weights or {}, shifts or {})
    for node in fused_nodes(mixed):
        precision = plan.get(node.name or "")
        if precision is not None and precision.kind in QUANTISED:
            quantising.layer(node, precision)
    quantising.edit.tidy()
    if fold:
        types = [each for each in MOVED if device is None or device.arch >= dtypes.dtype(each).min_arch]
        quantising.pinned.update(fold_output_scales(mixed, types))
    targets = {name: precision.kind for name, precision in plan.items() if precision.kind in BASES}
    targets |= dict.fromkeys(spell_out_zeros(mixed, constants=False), "fp32")
    drop_fp8_zero_points(mixed)
    lower(mixed, targets, base, pinned=frozenset(quantising.pinned), extremes=extremes or {})
    take_integers(mixed, device)
    _put_weights(mixed, model, plan, grouped or {}, device)
    spell_out_zeros(mixed)  # of weights that no kernel takes so
    Editor(mixed).tidy()
    attach_bodies(mixed)
    return mixed


def _put_weights(
    mixed: ir.Model,
    model: ir.Model,
    plan: Mapping[str, LayerPrecision],
    grouped: Mapping[str, GroupedWeights],
    device: Device | None,
) -> None:
    """Gives the layers of a plan whose weights alone are quantised those of the fused model, in place; a layer that
    stays fp32 for its numbers keeps them."""
    kinds = {name: precision.kind for name, precision in plan.items() if precision.kind in WEIGHT_ONLY}
    originals = {node.name or "": node for node in fused_nodes(model) if node.name in kinds}
    edit = Editor(mixed)
    known: dict[Any, tuple[GroupedWeights, dict[str, ir.Value]]] = {}
    for node in fused_nodes(mixed):
        name = node.name or ""
        if name not in kinds or dtype_name(plugin_inputs(node)["a"]) not in HALVES:
            continue
        bits, original = WEIGHT_ONLY[kinds[name]], originals[name]
        given = grouped.get(name)
        if given is not None and given.bits != bits:
            given = None
        b = plugin_inputs(original)["b"]
        key = id(given) if given is not None else (b, plugin_settings(original)["trans_b"], bits)
        if key not in known:  # products may share them
            weights = given or quantise_matrix(matrix_of(original), bits)
            known[key] = weights, constants(edit, weights, f"{b.name}_{kinds[name]}")
        put(edit, node, *known[key], device)
    edit.tidy()

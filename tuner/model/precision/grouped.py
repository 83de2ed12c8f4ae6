"""Weights of 8 and 4 bits under activations in half precision: `w8a16`, int8 with a scale for each column, and `w4a16`,
4 bits with a scale for each group of rows of a column.

w[k, n] = scales[k // group, n] · (values[k, n] - zeros[k // group, n]). A product of few rows takes as long as its
weights take to be read, so these make it two and four times as fast at the most, and its activations lose nothing. The
kernel unpacks the integers on the way to its registers. What comes quantised in this form is read so
(`weight_only.py`), and what does not is put into it here.

In 4 bits the integers are -8 to 7, without zero points: a scale may be negative, by which -8 is what the number of the
largest magnitude becomes, whatever its sign. Scales are such that the squared error of a group is least, each weight's
counted as its input is large: that magnitude over 8, or less, which cuts off what is beyond. (Groups: Frantar et al.,
arXiv:2210.17323; cutting off, counted by the inputs: Lin et al., arXiv:2306.00978.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels import pack_int4
from tilewright.kernels.device import Device
from tilewright.kernels.ops.gemm.packing import packed_rows
from tilewright.kernels.ops.gemm.problem import GROUP_SIZES
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.opening import refusal
from tilewright.tuner.model.graph import (
    DTYPES,
    constant,
    dtype_name,
    fused_nodes,
    is_constant,
    is_fused,
    make_fused,
    op_of,
    plugin_inputs,
    plugin_settings,
    static_shape,
)
from tilewright.tuner.model.precision.half import HALVES
from tilewright.tuner.model.precision.steps import quantised_constant
from tilewright.tuning_db.errors import ModelError

Array = np.ndarray[Any, Any]

WEIGHT_ONLY: Mapping[str, int] = {"w8a16": 8, "w4a16": 4}
"""Kinds of precision that weights alone are quantised in, and their bits."""

LARGEST_GROUP = max(GROUP_SIZES)

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Parts of a group's largest magnitude that become the largest integer, to choose from."""

ENDS = {8: (-127, 127), 4: (-8, 7)}
"""The least and the largest integer."""

_SMALLEST_HALF = 2.0**-13
"""From here on a scale in fp16 has all its digits, and so has one half as large."""

SMALLEST = float(np.finfo(np.float32).tiny)
"""The least scale."""

_CHUNK = 1 << 22
"""Weights that are looked at at a time."""


@dataclass(frozen=True, slots=True)
class GroupedWeights:
    """Quantised weights of a product, K rows of N columns: scales · (values - zeros)."""

    values: Array  # (K, N), int8; as a kernel has 4 bits, 0 to 15
    bits: int
    group: int  # rows that share a scale; 0: all
    scales: Array  # (⌈K/group⌉, N), (N,) or ()
    zeros: Array | None = None  # as scales; None: 0, or 8 of 4 bits


def refused(node: ir.Node, kind: str, device: Device | None) -> str | None:
    """None if a node can have weights of a kind of `WEIGHT_ONLY`, else the reason why it can't; `device` is the one
    that it must have a kernel for, None any."""
    if not is_fused(node) or op_of(node) != "gemm":
        return "only matrix products have weights that alone are quantised"
    inputs = plugin_inputs(node)
    b = inputs["b"]
    if quantised_constant(b) is not None or {"a_scale", "b_scale", "b_zero"} & set(inputs):
        return "its weights are quantised already"
    if not is_constant(b):
        return "both operands are activations"
    if is_constant(inputs["a"]):
        return "a is a constant, and b alone would be quantised"
    floats = ("fp32", *HALVES)
    if dtype_name(b) not in floats or dtype_name(inputs["a"]) not in floats:
        return f"it is a product of {dtype_name(inputs['a'])} and {dtype_name(b)}"
    shape = static_shape(b) or ()
    if len(shape) != 2:
        return f"its weights, of shape {[*shape]}, are no one matrix"
    bits, turned = WEIGHT_ONLY[kind], bool(plugin_settings(node)["trans_b"])
    columns, depth = shape if turned else shape[::-1]
    group = group_of(depth, bits)
    asked = {name: _halved(value) for name, value in inputs.items()}
    asked["b"] = _value((columns, packed_rows(depth) if bits == 4 else depth), "int8")
    asked["b_scale"] = _value((-(-depth // group), columns) if group else (columns,), "fp32")
    return refusal("gemm", asked, _settings(node, bits, group, "fp16"), device)


def group_of(depth: int, bits: int) -> int:
    """How many rows share a scale; 0: all."""
    return LARGEST_GROUP if bits == 4 and depth > LARGEST_GROUP else 0


def matrix_of(node: ir.Node) -> Array:
    """The weights of a product that can have them quantised alone, (N, K) in fp32.

    Raises:
        ModelError: some are infinite or NaN.
    """
    b = plugin_inputs(node)["b"]
    array = constant(b)
    assert array is not None
    if not np.isfinite(array).all():
        raise ModelError(f"node {node.name!r}: its weights {b.name!r} have infinite or NaN elements")
    return np.asarray(array if plugin_settings(node)["trans_b"] else array.T, np.float32)


def scales_of(matrix: Array, bits: int, importance: Array | None = None) -> Array:
    """The scales of a matrix (N, K): (⌈K/group⌉, N) in fp16 if that has room for them, else fp32; of one for a column
    (N,) in fp32. `importance` (K,) is how much a squared error counts."""
    columns, depth = matrix.shape
    group, (low, high) = group_of(depth, bits) or depth, ENDS[bits]
    count = -(-depth // group)
    weights = np.ones(depth, np.float32) if importance is None else importance.astype(np.float32)
    weights = np.pad(weights, (0, count * group - depth)).reshape(count, group)
    found = np.empty((columns, count), np.float32)
    step = max(1, _CHUNK // (count * group))
    for start in range(0, columns, step):
        part = matrix[start : start + step]
        blocks = np.pad(part, ((0, 0), (0, count * group - depth))).reshape(len(part), count, group)
        largest = _largest(blocks)
        whole = (largest if bits == 4 else -np.abs(largest)) / np.float32(low)
        whole = np.where(np.abs(whole) < SMALLEST, np.copysign(np.float32(SMALLEST), whole), whole)
        best, least = whole, np.full(whole.shape, np.inf, np.float32)
        for ratio in RATIOS if bits == 4 else ():
            scales = whole * np.float32(ratio)
            integers = np.clip(np.rint(blocks / scales[:, :, None]), low, high)
            # In steps of the largest scale: squares of small weights would have no room in fp32.
            errors = (blocks / whole[:, :, None] - integers * np.float32(ratio)) ** 2
            errors = np.einsum("ncg,cg->nc", errors, weights)
            best, least = np.where(errors < least, scales, best), np.minimum(errors, least)
        found[start : start + step] = np.where(np.abs(whole) == SMALLEST, 1.0, best)
    if not group_of(depth, bits):
        return found[:, 0]
    sizes = np.abs(found)
    fits = sizes.min() >= _SMALLEST_HALF and sizes.max() <= np.finfo(np.float16).max
    return np.ascontiguousarray(found.T.astype(np.float16 if fits else np.float32))


def _largest(blocks: Array) -> Array:
    """Of each group along the last axis the element of the largest magnitude."""
    places = np.abs(blocks).argmax(axis=-1)
    return np.asarray(np.take_along_axis(blocks, places[..., None], -1)[..., 0])


def to_integers(over: Array, bits: int) -> Array:
    """Weights over their scales, to nearest even, in int8."""
    return np.clip(np.rint(over), *ENDS[bits]).astype(np.int8)


def quantise_matrix(matrix: Array, bits: int) -> GroupedWeights:
    """A matrix (N, K), each weight rounded to nearest."""
    scales = scales_of(matrix, bits)
    group = group_of(matrix.shape[1], bits)
    values = np.empty(matrix.shape, np.int8)
    step = max(1, _CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):
        part = slice(start, start + step)
        each = np.repeat(scales[:, part], group, axis=0)[: matrix.shape[1]].T if group else scales[part, None]
        values[part] = to_integers(matrix[part] / each.astype(np.float32), bits)
    return stored(values, bits, scales)


def stored(integers: Array, bits: int, scales: Array) -> GroupedWeights:
    """Integers (N, K) around 0 as a kernel has them."""
    values = (integers + np.int8(8)).view(np.uint8) if bits == 4 else integers
    return GroupedWeights(values.T, bits, group_of(integers.shape[1], bits), scales)


def blank(model: ir.Model, kinds: Mapping[str, str]) -> dict[str, GroupedWeights]:
    """Weights that are all 0 for those products that `kinds`, by node name, has in a kind of `WEIGHT_ONLY`; products of
    one form share theirs. How long a model takes depends on no more of them."""
    made: dict[tuple[int, int, int], GroupedWeights] = {}
    found = {}
    for node in fused_nodes(model):
        name = node.name or ""
        bits = WEIGHT_ONLY.get(kinds.get(name, ""))
        if bits is None:
            continue
        shape = static_shape(plugin_inputs(node)["b"])
        assert shape is not None
        columns, depth = shape if plugin_settings(node)["trans_b"] else shape[::-1]
        form = columns, depth, bits
        if form not in made:
            group = group_of(depth, bits)
            scales = np.ones((-(-depth // group), columns), np.float16) if group else np.ones(columns, np.float32)
            made[form] = stored(np.zeros((columns, depth), np.int8), bits, scales)
        found[name] = made[form]
    return found


def constants(edit: Editor, weights: GroupedWeights, base: str) -> dict[str, ir.Value]:
    """What the plugin reads, by its names for it."""
    columns = pack_int4(weights.values).T if weights.bits == 4 else weights.values.T
    # TensorRT has packed weights as int8 as well.
    given = {"b": columns.view(np.int8), "b_scale": weights.scales}
    if weights.zeros is not None:
        given["b_zero"] = weights.zeros.astype(np.int8)
    return {name: edit.constant(np.ascontiguousarray(array), base) for name, array in given.items()}


def put(
    edit: Editor, node: ir.Node, weights: GroupedWeights, made: Mapping[str, ir.Value], device: Device | None
) -> None:
    """Puts a product of integers, `made` by `constants`, in the place of one in half precision, if there is a kernel
    for it."""
    settings = _settings(node, weights.bits, weights.group, dtype_name(node.outputs[0]))
    known = plugin_inputs(node)
    inputs = {"a": known["a"], **made, **{name: value for name, value in known.items() if name not in ("a", "b")}}
    if refusal("gemm", inputs, settings, device) is not None:
        return
    fused = make_fused("gemm", inputs, settings, name=node.name or "")
    fused.metadata_props.update(node.metadata_props)
    edit.replace(node, fused)


def _settings(node: ir.Node, bits: int, group: int, result: str) -> dict[str, Any]:
    """The plugin's attributes of a product, as it is with such weights."""
    settings = {**plugin_settings(node), "trans_b": 1, "group_size": group}
    if bits == 4:
        settings["weights"] = "int4"
    if "precision" in settings:
        settings["precision"] = "default"
    if settings["out_dtype"] == "default":
        settings["out_dtype"] = result
    return settings


def _halved(value: ir.Value) -> ir.Value:
    """A value like another, of fp16 if that is fp32."""
    kind = dtype_name(value)
    return _value(static_shape(value), "fp16" if kind == "fp32" else kind)


def _value(shape: tuple[int, ...] | None, kind: str) -> ir.Value:
    return ir.Value(name="asked", type=ir.TensorType(DTYPES[kind]), shape=None if shape is None else ir.Shape(shape))

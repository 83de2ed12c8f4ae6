"""Products whose weights alone are quantised: the kernel reads the integers, and activations stay in half precision.

`DequantizeLinear` of constants in front of a product, as tools write weights of 4 and 8 bits, would be computed anew
for every input, to numbers of twice or four times the bytes, which is what such weights are there to avoid. The plugin
has them as they are: B stands for b_scale · (b - b_zero), with a scale for each column or for each group of rows of a
column, and 4-bit integers packed two in a byte (`tilewright.kernels.pack_int4`). Nothing is rounded that was not
before, and the numbers are not rounded to half precision any more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels.device import Device
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import (
    constant,
    dtype_name,
    fused_nodes,
    op_of,
    plugin_inputs,
    plugin_settings,
    static_shape,
)
from tilewright.tuner.model.precision.grouped import LARGEST_GROUP, GroupedWeights, constants, put
from tilewright.tuner.model.precision.half import HALVES
from tilewright.tuner.model.precision.steps import quantised_constant

Array = np.ndarray[Any, Any]

_STORED = {
    ir.DataType.INT8: (8, 0),
    ir.DataType.UINT8: (8, -128),
    ir.DataType.INT4: (4, 8),
    ir.DataType.UINT4: (4, 0),
}
"""Bits of a weight, and what is added to it: int8 and 0 to 15 is what kernels have."""


def take_integers(model: ir.Model, device: Device | None) -> None:
    """Lets products in half precision read the integers of their weights, in place, where a kernel does; `device` is
    the one that it must have a kernel for, None any."""
    edit = Editor(model)
    known: dict[tuple[ir.Node, bool], tuple[GroupedWeights, dict[str, ir.Value]] | None] = {}
    for node in fused_nodes(model):
        inputs = plugin_inputs(node)
        if op_of(node) != "gemm" or dtype_name(inputs["a"]) not in HALVES or {"a_scale", "b_scale"} & set(inputs):
            continue
        origin = quantised_constant(inputs["b"])
        if origin is None:
            continue
        step, turned = origin
        key = step, turned ^ bool(plugin_settings(node)["trans_b"])
        if key not in known:  # products may share them
            weights, base = _weights_of(*key), f"{step.outputs[0].name}_weights"
            known[key] = None if weights is None else (weights, constants(edit, weights, base))
        found = known[key]
        if found is not None:
            put(edit, node, *found, device)
    edit.tidy()


def _weights_of(node: ir.Node, turned: bool) -> GroupedWeights | None:
    """The integers that a step dequantises to a product's B, as (N, K) if it is `turned`; None if no kernel has them in
    that way."""
    integers, scale, zero = [*node.inputs, None][:3]
    if integers is None or scale is None or integers.dtype not in _STORED or len(static_shape(integers) or ()) != 2:
        return None
    arrays = constant(integers), constant(scale), None if zero is None else constant(zero)
    if arrays[0] is None or arrays[1] is None or (zero is not None and arrays[2] is None):
        return None
    depth = 1 if turned else 0  # the axis of K
    axis, block = node.attributes.get_int("axis", 1) % 2, node.attributes.get_int("block_size", 0)
    if (block and axis != depth) or (not block and arrays[1].size > 1 and axis == depth):
        return None
    bits, more = _STORED[integers.dtype]
    # (N, K) in memory: columns are packed one by one.
    columns = np.empty(arrays[0].shape if turned else arrays[0].shape[::-1], np.uint8 if bits == 4 else np.int8)
    np.add(_rows(arrays[0].astype(np.int16), not turned), more, out=columns, casting="unsafe")
    values = columns.T
    scales = _rows(arrays[1], turned) if block else arrays[1].reshape(-1 if arrays[1].size > 1 else ())
    if not block or dtype_name(scale) not in ("fp32", *HALVES):
        scales = scales.astype(np.float32)
    neutral = 8 if bits == 4 else 0
    zeros = np.full(scales.shape, more, np.int16)
    if arrays[2] is not None:
        given = arrays[2].astype(np.int16)
        zeros = (_rows(given, turned) if block else given.reshape(scales.shape)) + more
    if block >= len(values):
        block, scales, zeros = 0, scales[0].astype(np.float32), zeros[0]
    elif block > LARGEST_GROUP and block % LARGEST_GROUP == 0:
        groups, times = -(-len(values) // LARGEST_GROUP), block // LARGEST_GROUP
        scales, zeros = (np.repeat(each, times, axis=0)[:groups] for each in (scales, zeros))
        block = LARGEST_GROUP
    if not block:  # of groups as of columns, there is one for each
        zeros = np.broadcast_to(zeros.reshape(-1), columns.shape[:1])
    plain = bool((zeros == neutral).all())
    return GroupedWeights(values, bits, block, scales, None if plain else zeros)


def _rows(array: Array, turned: bool) -> Array:
    return array.T if turned else array

"""The problem that a node is, fused or not: what `estimate` predicts the time of.

A node that no rule has fused is seen as the plugin that would take its place, with what ONNX gives the node itself: a
bias or a residual of `Gemm`, a bias of `Conv`, the mask and the past of `Attention`, the scale of `RMSNormalization`.
Only times are predicted of these problems, so values don't matter: `alpha` and `beta` are left out, and so is which
keys a causal mask hides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir

from tilewright.kernels.problem import Problem
from tilewright.kernels.tensorrt.catalogue import find_plugin, plugin_attributes, plugin_name
from tilewright.kernels.tensorrt.operation import Tensor
from tilewright.tuner.model import workloads
from tilewright.tuner.model.graph import dtype_name, is_fused, static_shape
from tilewright.tuning_db.errors import UsageError

Shape = tuple[int, ...]
Operands = tuple[str, dict[str, tuple[Shape, str]], dict[str, Any]]
"""An op, its inputs' shapes and data types by the plugin's names, and settings of the plugin."""


def problem_of(node: ir.Node) -> Problem | None:
    """The problem of a node, or None if it is not of an op of ours, or not one that its kernel takes.

    Raises:
        ModelError: the node is fused and the shape of an input is unknown.
        UsageError: the node is fused and its plugin doesn't take it.
    """
    if is_fused(node):
        return workloads.problem_of(node)
    read = _READERS.get(node.op_type) if node.domain == "" else None
    inputs = [None if value is None else (static_shape(value), dtype_name(value)) for value in node.inputs]
    if read is None or any(given is not None and given[0] is None for given in inputs):
        return None
    operands = read(node, [None if given is None else (given[0] or (), given[1]) for given in inputs])
    if operands is None:
        return None
    try:
        return _problem(*operands)
    except UsageError:
        return None


def _problem(op: str, arrays: Mapping[str, tuple[Shape, str]], settings: Mapping[str, Any]) -> Problem:
    """As `workloads.problem_of` makes it of a fused node: in NHWC memory where the channels allow it."""
    operation = find_plugin(plugin_name(op)).operation
    plugin = plugin_name(op, *(name for name in arrays if name not in operation.required))
    attributes = plugin_attributes(plugin, **settings)
    tensors = {name: Tensor(name, *arrays[name]) for name in find_plugin(plugin).inputs}
    outputs = operation.outputs(tensors, attributes)
    formats = operation.formats(tensors, outputs, attributes)[-1]
    placed = {
        name: replace(tensor, format=form) for (name, tensor), form in zip(tensors.items(), formats, strict=False)
    }
    return operation.problem(placed, attributes)


Inputs = list[tuple[Shape, str] | None]


def _at(inputs: Inputs, index: int) -> tuple[Shape, str] | None:
    return inputs[index] if index < len(inputs) else None


def _matmul(node: ir.Node, inputs: Inputs) -> Operands | None:
    a, b = inputs[0], inputs[1]
    return None if a is None or b is None else ("gemm", {"a": a, "b": b}, {})


def _gemm(node: ir.Node, inputs: Inputs) -> Operands | None:
    a, b, c = inputs[0], inputs[1], _at(inputs, 2)
    if a is None or b is None:
        return None
    arrays = {"a": a, "b": b}
    settings = {
        name.lower().replace("trans", "trans_"): node.attributes.get_int(name, 0) for name in ("transA", "transB")
    }
    out = static_shape(node.outputs[0])
    if c is not None and out is not None:
        if math.prod(c[0]) == out[1] and c[0][-1:] == out[1:]:
            arrays["bias"] = ((out[1],), c[1])
        elif c[0] == out:
            arrays["residual"] = c
    return "gemm", arrays, settings


def _conv(node: ir.Node, inputs: Inputs) -> Operands | None:
    x, w, bias = inputs[0], inputs[1], _at(inputs, 2)
    out = static_shape(node.outputs[0])
    if x is None or w is None or out is None or len(x[0]) != 4:
        return None
    strides, dilations = (tuple(node.attributes.get_ints(name, [1, 1])) for name in ("strides", "dilations"))
    top, left, bottom, right = node.attributes.get_ints("pads", [0, 0, 0, 0])
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        # As much as the result's size asks for; on which side makes no difference to the time.
        (top, bottom), (left, right) = (
            (total // 2, total - total // 2)
            for total in (
                max(0, (out[axis] - 1) * strides[axis - 2] + dilations[axis - 2] * (w[0][axis] - 1) + 1 - x[0][axis])
                for axis in (2, 3)
            )
        )
    settings = {
        **{"stride_h": strides[0], "stride_w": strides[1], "dilation_h": dilations[0], "dilation_w": dilations[1]},
        **{"pad_top": top, "pad_left": left, "pad_bottom": bottom, "pad_right": right},
        "groups": node.attributes.get_int("group", 1),
    }
    return "conv2d", {"x": x, "w": w, **({"bias": bias} if bias is not None else {})}, settings


def _attention(node: ir.Node, inputs: Inputs) -> Operands | None:
    names = ("q_num_heads", "kv_num_heads", "kv_num_heads")
    heads = [node.attributes.get_int(name, 0) for name in names]
    given = [inputs[index] for index in range(3)]
    arrays: dict[str, tuple[Shape, str]] = {}
    for name, array, count in zip("qkv", given, heads, strict=True):
        if array is None:
            return None
        shape, kind = array
        if len(shape) == 3:  # (B, S, H·D)
            if not count or shape[2] % count:
                return None
            shape = (shape[0], count, shape[1], shape[2] // count)
        if len(shape) != 4:
            return None
        arrays[name] = shape, kind
    for name, past in (("k", _at(inputs, 4)), ("v", _at(inputs, 5))):
        if past is not None:
            (b, h, s, d), kind = arrays[name]
            arrays[name] = (b, h, s + past[0][2], d), kind
    mask = _at(inputs, 3)
    if mask is not None:  # of bools the kernel would be given numbers of q's type
        kind = arrays["q"][1] if mask[1] == "bool" else mask[1]
        arrays["bias"] = (1,) * (4 - len(mask[0])) + mask[0], kind
    settings = {"causal": node.attributes.get_int("is_causal", 0), "softcap": node.attributes.get_float("softcap", 0.0)}
    return "attention", arrays, settings


def _norm(node: ir.Node, inputs: Inputs) -> Operands | None:
    x, scale = inputs[0], _at(inputs, 1)
    if x is None or scale is None or not x[0] or scale[0] != x[0][-1:]:
        return None
    if node.attributes.get_int("axis", -1) not in (-1, len(x[0]) - 1):
        return None
    return "rmsnorm", {"x": x, "weight": scale}, {"out_dtype": dtype_name(node.outputs[0])}


_READERS = {"MatMul": _matmul, "Gemm": _gemm, "Conv": _conv, "Attention": _attention, "RMSNormalization": _norm}

"""Quantise and dequantise steps: ONNX's `QuantizeLinear` and `DequantizeLinear` with one scale for a whole tensor.

q = saturate(round(x / scale) + zero) and x ≈ scale · (q - zero), rounding to nearest even. Steps of our own and those
that a model came with are the same. While layers are rewritten they may have any zero point. TensorRT takes none but 0,
so at the end a step that still has another becomes a subtraction and a step without: round(x / s) + z =
round((x + z·s) / s), the same integers but for ties, and s·(q - z) = s·q - s·z.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import DTYPES, TYPED_FROM, constant, dtype_name, is_constant, scalar

QUANTISE, DEQUANTISE = "QuantizeLinear", "DequantizeLinear"

_PROPAGATED = frozenset(
    ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Gather", "Expand")
)
"""Operators across which ONNX Runtime moves steps."""

_SIGNED = 128
"""What uint8 is more than int8."""


class Grid(NamedTuple):
    """What a value is quantised to."""

    scale: float
    dtype: str
    zero: int = 0  # the integer that 0 becomes


def grid_of(node: ir.Node) -> Grid | None:
    """The grid of a step of either kind that has one scale, and one zero point or none; None of any other node, of a
    step that quantises to an output of the model, and of one to fp8 that makes NaN of what is beyond the range."""
    if node.op_type not in (QUANTISE, DEQUANTISE) or node.domain != "" or None in node.inputs[:2]:
        return None
    if not node.attributes.get_int("saturate", 1):
        return None
    integers = node.outputs[0] if node.op_type == QUANTISE else node.inputs[0]
    assert integers is not None
    scale = scalar(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = 0.0 if given is None else scalar(given)
    if (
        scale is None
        or zero is None
        or not math.isfinite(zero)
        or (node.op_type == QUANTISE and integers.is_graph_output())
    ):
        return None
    return Grid(scale, dtype_name(integers), int(zero))


def dequantised(value: ir.Value) -> tuple[ir.Value, Grid] | None:
    """The integers behind a value that a dequantise step gives, and their grid; None of any other value."""
    node = value.producer()
    grid = grid_of(node) if node is not None and node.op_type == DEQUANTISE else None
    if node is None or grid is None:
        return None
    integers = node.inputs[0]
    assert integers is not None
    return integers, grid


def quantised_constant(value: ir.Value | None) -> tuple[ir.Node, bool] | None:
    """The dequantise step of constants that a value comes from, through casts and transposes, and whether those turn
    it, a matrix, around; None if it comes from none."""
    node, turned = None if value is None else value.producer(), False
    while node is not None and node.domain == "" and node.op_type in ("Cast", "Transpose", "Identity"):
        if node.op_type == "Transpose":
            turned ^= list(node.attributes.get_ints("perm", [1, 0])) != [0, 1]
        source = node.inputs[0]
        node = None if source is None else source.producer()
    found = node is not None and node.domain == "" and node.op_type == DEQUANTISE and is_constant(node.inputs[0])
    return (node, turned) if node is not None and found else None


def quantise_step(edit: Editor, value: ir.Value, grid: Grid, opset: int) -> ir.Node:
    """A new step that quantises an fp32 value, behind what makes it."""
    dtype = DTYPES[grid.dtype]
    inputs = [value, edit.constant(np.asarray(grid.scale, np.float32), f"{value.name}_scale")]
    if grid.zero or opset < TYPED_FROM:
        zero = np.asarray(grid.zero, np.float32).astype(dtype.numpy())
        inputs.append(edit.constant(zero, f"{value.name}_zero", dtype))
    typed = {"output_dtype": int(dtype)} if opset >= TYPED_FROM else {}
    step = edit.node(QUANTISE, inputs, value, dtype, base=f"{value.name}_{grid.dtype}", attributes=typed)
    edit.after(value, step)
    return step


def make_signed(model: ir.Model, layers: Collection[ir.Node] = ()) -> None:
    """Turns steps to uint8 into steps to int8, in place, where nothing but dequantise steps reads the integers: each of
    these, and the zero point, is 128 less. Kernels have int8 alone. `layers` are those that will read integers.

    ONNX Runtime's optimisations break steps of int8 with a zero point, and none of uint8, in front of operators that
    move numbers, in models of opset 21 and up (1.32): there such steps stay.
    """
    edit, opset = Editor(model), model.opset_imports[""]
    for node in list(model.graph):
        grid = grid_of(node) if node.op_type == QUANTISE else None
        if grid is None or grid.dtype != "uint8":
            continue
        value = node.inputs[0]
        if grid.zero != _SIGNED and (value is None or dtype_name(value) != "fp32"):
            continue  # its zero point would not be spelled out
        readers = [user for user, _ in node.outputs[0].uses()]
        if any(user.op_type != DEQUANTISE or user.graph is not model.graph for user in readers):
            continue
        if any(grid_of(user) != grid for user in readers):
            continue  # one that is read on another grid than it was written on
        behind = {user for step in readers for user, _ in step.outputs[0].uses()}
        if opset >= TYPED_FROM and any(user.op_type in _PROPAGATED for user in behind - set(layers)):
            continue
        zero = edit.constant(np.array(grid.zero - _SIGNED, np.int8), f"{node.outputs[0].name}_zero")
        for step in (node, *readers):
            step.resize_inputs(3)
            step.replace_input_with(2, zero)
        node.attributes.pop("output_dtype", None)
        node.outputs[0].type = ir.TensorType(DTYPES["int8"])
    edit.tidy()


def drop_fp8_zero_points(model: ir.Model) -> None:
    """Takes the zero points of steps of fp8, which are 0, from them, in place, where an attribute can say the type: see
    `make_signed`."""
    if model.opset_imports[""] < TYPED_FROM:
        return
    for node in model.graph:
        if node.op_type not in (QUANTISE, DEQUANTISE) or node.domain != "" or len(node.inputs) < 3:
            continue
        zero = node.inputs[2]
        array = constant(zero)
        if zero is None or zero.dtype is None or array is None or not dtype_name(zero).startswith("fp8"):
            continue
        if np.any(array.astype(np.float32) != 0):
            continue
        if node.op_type == QUANTISE:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", int(zero.dtype))
        node.resize_inputs(2)


def drop_pairs(model: ir.Model) -> None:
    """Removes steps that quantise what was just dequantised from the same grid, in place: they give the integers that
    these were."""
    for node in list(model.graph):
        grid = grid_of(node) if node.op_type == QUANTISE else None
        if grid is None:
            continue
        value = node.inputs[0]
        known = None if value is None else dequantised(value)
        if known is not None and known[1] == grid:
            node.outputs[0].replace_all_uses_with(known[0])
            model.graph.remove(node, safe=True)
    Editor(model).tidy()


def spell_out_zeros(model: ir.Model, *, constants: bool = True) -> list[str]:
    """Turns steps of int8 with a zero point into a subtraction and a step without, in place; those of constants only
    with `constants`.

    Gives the names of the subtractions: they must be computed in fp32.
    """
    edit = Editor(model)
    names = []
    for node in list(model.graph):
        grid = grid_of(node)
        if grid is None or grid.dtype != "int8" or grid.zero == 0:
            continue
        quantises = node.op_type == QUANTISE
        if not constants and is_constant(node.inputs[0]):
            continue
        value = node.inputs[0] if quantises else node.outputs[0]
        if value is None or dtype_name(value) != "fp32":
            continue
        shift = np.float32(-grid.zero if quantises else grid.zero) * np.float32(grid.scale)
        amount = edit.constant(np.asarray(shift, np.float32), f"{value.name}_shift")
        subtraction = edit.node("Sub", [value, amount], value, ir.DataType.FLOAT, base=f"{value.name}_shifted")
        shifted = subtraction.outputs[0]
        edit.after(value, subtraction)
        if quantises:
            node.replace_input_with(0, shifted)
        else:
            value.replace_all_uses_with(shifted, replace_graph_outputs=True)
            subtraction.replace_input_with(0, value)
            value.name, shifted.name = shifted.name, value.name
        if not quantises or "output_dtype" in node.attributes:
            node.resize_inputs(2)
        else:  # the zero point says the type
            node.replace_input_with(2, edit.constant(np.array(0, np.int8), f"{value.name}_zero"))
        names.append(subtraction.name or "")
    edit.tidy()
    return names

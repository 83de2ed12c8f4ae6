"""Layer norms of constants become constants, as of DeBERTa's relative positions: onnxscript's folding leaves operators
that may have several outputs."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.folding.constants import Budget, nbytes
from tilewright.tuner.model.graph import constant, is_constant

_KINDS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_PIECE = 1 << 20  # elements that are calculated with at a time


def fold_norms(model: ir.Model, budget: Budget) -> bool:
    """Makes initializers of `LayerNormalization`s of constants whose statistics nobody uses, in place; whether there
    were any. Their values are calculated in fp64."""
    edit: Editor | None = None
    for node in list(model.graph):
        given = [value for value in node.inputs if value is not None]
        if node.op_type != "LayerNormalization" or node.domain != "" or not all(map(is_constant, given)):
            continue
        out, *statistics = node.outputs
        if out.is_graph_output() or any(value.uses() or value.is_graph_output() for value in statistics):
            continue
        x, kind = constant(given[0]), given[0].dtype
        if x is None or kind not in _KINDS or not budget.allows(x.nbytes, nbytes(given[0]) or 0):
            continue
        with np.errstate(all="ignore"):  # an epsilon of 0, and infinities, are the model's own
            array = _normal(node, x)
        if array is None:
            continue
        edit = edit or Editor(model)
        made = edit.constant(array, f"{out.name}_folded", dtype=kind)
        ir.convenience.replace_all_uses_with(out, made)
        model.graph.remove(node, safe=True)
    return edit is not None


def _normal(node: ir.Node, x: np.ndarray) -> np.ndarray | None:
    """The norm of an array, piece by piece: in fp64 all of it would be many times its size. None where shapes don't go
    together, which is not for folding to say."""
    axis = node.attributes.get_int("axis", -1)
    if not -x.ndim <= axis < x.ndim or not x.size:
        return None
    leading, own = x.shape[: axis % x.ndim], x.shape[axis % x.ndim :]
    wide = x.reshape(-1, math.prod(own))
    count, columns = wide.shape
    try:
        scale, bias = (
            None if value is None else _rows(constant(value), leading, own) for value in [*node.inputs, None][1:3]
        )
    except ValueError:
        return None
    assert scale is not None
    made = np.empty(wide.shape, x.dtype)
    height, width = max(1, _PIECE // columns), min(columns, _PIECE)
    for top in range(0, count, height):
        pieces = [(slice(top, top + height), slice(left, left + width)) for left in range(0, columns, width)]
        mean = sum(_wide(wide[each]).sum(1, keepdims=True) for each in pieces) / columns
        squares = sum(np.square(_wide(wide[each]) - mean).sum(1, keepdims=True) for each in pieces)
        spread = np.sqrt(squares / columns + node.attributes.get_float("epsilon", 1e-5))
        for each in pieces:
            part = (_wide(wide[each]) - mean) / spread * _wide(scale[each])
            made[each] = part if bias is None else part + _wide(bias[each])
    return made.reshape(x.shape)


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float64)


def _rows(array: np.ndarray | None, leading: tuple[int, ...], own: tuple[int, ...]) -> np.ndarray:
    """A scale or bias as a matrix of a row for each place on the leading axes; of one that is the same for all of them,
    as it is in every model, one row is all that there is in memory.

    Raises:
        ValueError: its shape doesn't go with these.
    """
    assert array is not None
    rows = math.prod(leading), math.prod(own)
    if array.ndim <= len(own):
        return np.broadcast_to(np.broadcast_to(array, own).reshape(-1), rows)
    return np.broadcast_to(array, (*leading, *own)).reshape(rows)

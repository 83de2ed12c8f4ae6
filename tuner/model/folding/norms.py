"""Layer norms of constants become constants, as of DeBERTa's relative positions: onnxscript's folding leaves operators
that may have several outputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.folding.constants import Budget, nbytes
from tilewright.tuner.model.graph import constant, is_constant

_KINDS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


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
        array = _normal(node)
        if array is None or not budget.allows(array.nbytes, nbytes(given[0]) or 0):
            continue
        edit = edit or Editor(model)
        made = edit.constant(array, f"{out.name}_folded", dtype=given[0].dtype)
        ir.convenience.replace_all_uses_with(out, made)
        model.graph.remove(node, safe=True)
    return edit is not None


def _normal(node: ir.Node) -> np.ndarray | None:
    x, scale, bias = (None if value is None else constant(value) for value in [*node.inputs, None][:3])
    kind = None if node.inputs[0] is None else node.inputs[0].dtype
    axis = node.attributes.get_int("axis", -1)
    if x is None or scale is None or kind not in _KINDS or not -x.ndim <= axis < x.ndim:
        return None
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = x.astype(np.float64)
    apart = wide - wide.mean(axes, keepdims=True)
    spread = np.sqrt(np.square(apart).mean(axes, keepdims=True) + node.attributes.get_float("epsilon", 1e-5))
    try:
        made = apart / spread * scale.astype(np.float64)
        made = made if bias is None else made + bias.astype(np.float64)
    except ValueError:  # shapes that don't go together, which is not for folding to say
        return None
    return made.astype(x.dtype) if made.shape == x.shape else None

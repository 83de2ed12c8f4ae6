"""`Einsum` of two operands as the matrix product that it is, with what moves axes around it.

Axes of both operands are batch dimensions where the result has them, and are summed over where it has not; those of one
operand are rows or columns, several of which are put together by a `Reshape`. Constants are moved here, once. The
operands trade places where one is a constant, which products have second, or where the result is the other way around.
An attention's two are found as they are (`attention.py`), before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.fuse.layout import Maker
from tilewright.tuner.model.fuse.opening import FLOATS
from tilewright.tuner.model.graph import DTYPES, constant, dtype_name, is_constant, static_shape

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Product:
    """A sum of products: the labels of both operands' axes and of the result's, and how long each is."""

    operands: tuple[Labels, Labels]
    out: Labels
    sizes: dict[str, int]

    @property
    def batch(self) -> Labels:
        return tuple(label for label in self.out if label in self.operands[0] and label in self.operands[1])

    @property
    def summed(self) -> Labels:
        return tuple(label for label in self.operands[0] if label not in self.out)

    def own(self, index: int) -> Labels:
        """The axes that only one operand has, in the order of the result."""
        return tuple(label for label in self.out if label not in self.operands[1 - index])

    def shape(self, labels: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.sizes[label] for label in labels)

    def size(self, labels: Sequence[str]) -> int:
        return math.prod(self.shape(labels))

    def swapped(self) -> _Product:
        return _Product(self.operands[::-1], self.out, self.sizes)


def to_products(model: ir.Model) -> None:
    """Puts a `MatMul` in the place of each `Einsum` of the main graph that is a matrix product of two floats of known
    shapes; what the model computes stays the same, up to rounding."""
    edit, copies = Editor(model), Maker()
    for node in [node for node in model.graph if node.op_type == "Einsum" and node.domain == ""]:
        found = _product(node)
        if found is not None:
            _replace(edit, copies, node, found)
    edit.tidy()


def _product(node: ir.Node) -> _Product | None:
    """A node as a matrix product, None if it is none."""
    if len(node.inputs) != 2:
        return None
    shapes = [None if value is None else static_shape(value) for value in node.inputs]
    if shapes[0] is None or shapes[1] is None or static_shape(node.outputs[0]) is None:
        return None
    if any(value is None or dtype_name(value) not in FLOATS for value in node.inputs):
        return None
    named = labels(node.attributes.get_string("equation", "") or "", (len(shapes[0]), len(shapes[1])))
    if named is None:
        return None
    first, second, out = named
    sizes: dict[str, int] = {}
    for axes, shape in ((first, shapes[0]), (second, shapes[1])):
        for label, size in zip(axes, shape, strict=True):
            if sizes.setdefault(label, size) != size:
                return None  # an axis of one place that is broadcast
    found = _Product((first, second), out, sizes)
    if any(len(set(axes)) != len(axes) for axes in named) or not found.summed or 0 in sizes.values():
        return None
    if set(out) - set(first) - set(second) or (set(first) ^ set(second)) - set(out):
        return None  # one operand alone is summed over
    if not found.own(0) and not found.own(1):
        return None  # each result is a product of two vectors: there are no matrices
    return found


def labels(equation: str, ranks: tuple[int, int]) -> tuple[Labels, Labels, Labels] | None:
    """Of an equation the labels of both operands' axes and of the result's; an ellipsis stands for one each, the same
    from the last on. None of one that has no such form."""
    terms, arrow, out = "".join(equation.split()).partition("->")
    operands = terms.split(",")
    if len(operands) != 2:
        return None
    if not arrow:  # then it is what comes once, in the order of the alphabet, behind what the ellipses stand for
        letters = sorted(letter for letter in set(terms) - set(",.") if terms.count(letter) == 1)
        out = ("..." if "..." in terms else "") + "".join(letters)
    spread = [rank - len(term.replace("...", "")) for term, rank in zip(operands, ranks, strict=True)]
    most = max((count for term, count in zip(operands, spread, strict=True) if "..." in term), default=0)
    made = []
    for place, (term, count) in enumerate(((operands[0], spread[0]), (operands[1], spread[1]), (out, most))):
        before, dots, after = term.partition("...")
        if "." in before + after or count < 0 or (not dots and count and place < 2):
            return None
        many = tuple(f".{axis}" for axis in range(count, 0, -1)) if dots else ()
        made.append((*before, *many, *after))
    return made[0], made[1], made[2]


def _replace(edit: Editor, copies: Maker, node: ir.Node, product: _Product) -> None:
    operands = [value for value in node.inputs if value is not None]
    ahead = product.out[len(product.batch) : len(product.batch) + 1]
    columns_first = product.own(0) != () and ahead == product.own(1)[:1]
    fixed = [is_constant(value) for value in operands]
    if (fixed[0] and not fixed[1]) or (fixed[0] == fixed[1] and columns_first):
        product, operands = product.swapped(), operands[::-1]
    batch, summed, rows, columns = product.batch, product.summed, product.own(0), product.own(1)
    nodes: list[ir.Node] = []

    def add(operator: str, inputs: Sequence[ir.Value], shape: Sequence[int], **attributes: Sequence[int]) -> ir.Value:
        like = inputs[0] if operator != "MatMul" else node.outputs[0]
        made = edit.node(operator, inputs, like, DTYPES[dtype_name(like)], base=f"{like.name}", attributes=attributes)
        made.outputs[0].shape = ir.Shape(shape)
        nodes.append(made)
        return made.outputs[0]

    def reshaped(value: ir.Value, before: Sequence[int], shape: Sequence[int]) -> ir.Value:
        if tuple(before) == tuple(shape):
            return value
        return add("Reshape", [value, edit.constant(np.array(shape, np.int64), f"{value.name}_shape")], shape)

    def transposed(value: ir.Value, axes: Labels, order: Labels) -> ir.Value:
        if axes == order:
            return value
        return add("Transpose", [value], product.shape(order), perm=[axes.index(label) for label in order])

    def matrix(index: int, first: Labels, second: Labels) -> ir.Value:
        """An operand with two axes behind those of the batch."""
        value, axes, order = operands[index], product.operands[index], (*batch, *first, *second)
        shape = (*product.shape(batch), product.size(first), product.size(second))
        array = constant(value)
        if array is None:
            return reshaped(transposed(value, axes, order), product.shape(order), shape)
        if axes == order and array.shape == shape:
            return value
        turn = tuple(axes.index(label) for label in order)

        def moved() -> ir.Value:
            matrix = np.ascontiguousarray(array.transpose(turn)).reshape(shape)
            return edit.constant(matrix, f"{value.name}_matrix", DTYPES[dtype_name(value)])

        return copies.once((value, turn, shape), moved)  # layers may share it

    given = [matrix(0, rows, summed), matrix(1, summed, columns)]
    shape = (*product.shape(batch), product.size(rows), product.size(columns))
    result = add("MatMul", given, shape)
    nodes[-1].name = node.name
    order = (*batch, *rows, *columns)
    transposed(reshaped(result, shape, product.shape(order)), order, product.out)
    for each in nodes[:-1]:
        edit.graph.insert_before(node, each)
    edit.replace(node, nodes[-1])

"""Constant folding within bounds: onnxscript's pass, told what it may make.

A file of a few bytes can ask for terabytes (`ConstantOfShape`, `Expand`, `Range`, `Tile`) or for hours (`Loop`, a
convolution of constants). So a node is folded only if its operator's work is in proportion to what it reads and
writes, its output's size is known beforehand, and that is within `LARGEST_FOLDED`, or not more than its inputs'. All
that a model grows by is within `MOST_FOLDED`. Products of constants are bounded in multiply-adds, each and all
together: that is a bound on work, from which time follows on the processor at hand.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from onnxscript import optimizer

from tilewright.tuner.model.folding.quantised import constant_steps
from tilewright.tuner.model.graph import constant, is_constant, static_shape
from tilewright.tuner.model.messages import fault, quiet
from tilewright.tuning_db.errors import ModelError

LARGEST_FOLDED = 1 << 29
"""Bytes of one tensor, 512 MiB: VGG-19's largest weight, a `ConstantOfShape` in onnx's light models, has 411 MB."""

MOST_FOLDED = 1 << 31
"""Bytes that a model grows by, 2 GiB."""

_MOST_WORK = 1 << 30  # multiply-adds of one constant matrix product: a fraction of a second, on a processor of today
_MOST_WORK_IN_ALL = 1 << 33
_SLOWER = 32  # what one counts as of other types than fp32 and fp64, without a library, and of subnormal numbers
_PIECE = 1 << 20  # elements that are looked at at a time
_MOST_LOOPED = 1 << 16  # elements of what onnx's reference implementation goes through one by one

# Work in proportion to inputs and output, in NumPy, whatever the attributes and values. GatherElements isn't: an index
# out of range makes NumPy's `choose` go through all up to it.
_STREAMING = frozenset(
    """
    Abs Add And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Concat
    ConstantOfShape Cos CumSum Div Equal Exp Expand EyeLike Flatten Floor Gather Greater GreaterOrEqual HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mod Mul Neg NonZero Not OneHot Or Pow
    PRelu Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
    ReduceSum ReduceSumSquare Relu Reshape Round Shape Sigmoid Sign Sin Size Slice Softmax Softplus Softsign Sqrt
    Squeeze Sub Sum Tan Tanh Tile Transpose Trilu Unsqueeze Where Xor
    """.split()  # noqa: SIM905 - one name a line would fill two screens
)
_LOOPED = frozenset({"Erf", "GatherND", "Pad", "ScatterND"})


class Budget:
    """What one model's folding may still add, in bytes, and do, in multiply-adds. What is allowed is taken from it."""

    def __init__(self, largest: int | None = None, most: int | None = None) -> None:
        self.largest = LARGEST_FOLDED if largest is None else largest
        self.left = MOST_FOLDED if most is None else most
        self.work_left = _MOST_WORK_IN_ALL

    def allows(self, size: int, inputs: int) -> bool:
        """Whether a tensor of `size` bytes may be made of ones of `inputs` bytes."""
        growth = max(0, size - inputs)
        if (size > self.largest and growth) or growth > self.left:
            return False
        self.left -= growth
        return True

    def allows_work(self, work: int) -> bool:
        """Whether so many multiply-adds may be done for one tensor."""
        if work > min(_MOST_WORK, self.work_left):
            return False
        self.work_left -= work
        return True


def fold_constants(model: ir.Model, budget: Budget) -> bool:
    """Makes initializers of nodes whose inputs are constant, in place; whether there were any.

    Shapes that become known on the way are set. `Identity`, inference's `Dropout`, an `If` of a constant condition and
    the like go too: whatever onnxscript's folding replaces without making a tensor.

    Raises:
        ModelError: a node can't be what it says, as with an axis out of range.
    """

    steps = constant_steps(model)

    def should_fold(node: ir.Node) -> bool:
        return _is_bounded(node, budget, also=node in steps)

    with quiet():
        try:
            result = optimizer.fold_constants(
                model,
                onnx_shape_inference=True,
                # The limits are the budget's, in bytes: this one of the library's would be on top, in elements.
                output_size_limit=2**62,
                should_fold=should_fold,
            )
        except Exception as error:  # noqa: BLE001 - whatever a malformed node makes the library raise
            cause = f": {fault(error.__cause__)}" if error.__cause__ is not None else ""
            raise ModelError(f"the model's constants can't be folded: {fault(error)}{cause}") from None
    for node in model.graph:
        # Notes of the library on what was folded into what: as long as the model in the worst case, and of no use here.
        for value in node.outputs:
            value.metadata_props.pop(_NOTE, None)
    for value in model.graph.initializers.values():
        value.metadata_props.pop(_NOTE, None)
    return bool(result.modified)


_NOTE = "pkg.onnxscript.optimizer.folded_from"


def nbytes(value: ir.Value | None) -> int | None:
    """The bytes of a value, or None where its shape or type is unknown."""
    shape = static_shape(value) if value is not None else None
    if (
        value is None
        or shape is None
        or value.dtype is None
        or value.dtype == ir.DataType.STRING
        or min(shape, default=0) < 0
    ):
        return None
    return math.prod(shape) * value.dtype.bitwidth // 8


def _is_bounded(node: ir.Node, budget: Budget, *, also: bool) -> bool:
    """Whether a node is folded: `also` says that its work is known to be in proportion."""
    if node.domain != "" or len(node.outputs) != 1:
        return False
    inputs = [nbytes(value) for value in node.inputs if value is not None]
    if any(size is None for size in inputs):
        return False
    read = sum(size or 0 for size in inputs)
    size = nbytes(node.outputs[0])
    if node.op_type == "NonZero" and size is None:
        # Of the input's values alone; at most an index of 8 bytes for each dimension of each element.
        shape = static_shape(node.inputs[0]) if node.inputs[0] is not None else None
        size = None if shape is None else 8 * len(shape) * math.prod(shape)
    if size is None or not (also or _is_cheap(node, read, size, budget)):
        return False
    return budget.allows(size, read)


def _is_cheap(node: ir.Node, read: int, written: int, budget: Budget) -> bool:
    if node.op_type in _STREAMING:
        return True
    if node.op_type in _LOOPED:
        return max(read, written) <= _MOST_LOOPED
    if node.op_type == "MatMul" and node.inputs[0] is not None:
        inner, outer = static_shape(node.inputs[0]), static_shape(node.outputs[0])
        if not inner or outer is None:
            return False
        fast = node.inputs[0].dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) and not _is_subnormal(node)
        return budget.allows_work(math.prod(outer) * inner[-1] * (1 if fast else _SLOWER))
    return False


def _is_subnormal(node: ir.Node) -> bool:
    """Whether a product of two constants has, or may make, numbers below the normal range, for which processors take
    tens of times as long. Weights of other products are not looked at."""
    if not all(map(is_constant, node.inputs)):
        return False
    arrays = [array for array in map(constant, node.inputs) if array is not None]
    smallest = [_smallest(array) for array in arrays]
    return any(min(*smallest, math.prod(smallest)) < np.finfo(array.dtype).tiny for array in arrays)


def _smallest(array: np.ndarray) -> float:
    """The smallest magnitude but 0; infinity of zeros."""
    flat, least = array.reshape(-1), math.inf
    for start in range(0, flat.size, _PIECE):
        piece = np.abs(flat[start : start + _PIECE])
        least = min(least, float(piece.min(where=piece > 0, initial=np.inf)))
    return least

"""BatchNorm and other arithmetic by channel, folded into the weights in front of it, or made one `Mul` and one `Add`.

At inference a `BatchNormalization` is y = scale · x + offset with scale = gamma / √(var + epsilon) and offset =
beta - mean · scale, for every channel. So is a `Mul`, `Add`, `Sub` or `Div` with a constant that has one element, or
one for each channel. A chain of such nodes is one scale and one offset, in fp64:

- behind a `Conv`, `ConvTranspose` or `Gemm` with constant weights they become part of its weights and bias:
  scale · (W·x + b) + offset = (scale · W)·x + (scale · b + offset);
- behind a `MatMul` with constant weights the scale does, and the offset is left as an `Add`;
- anywhere else (as in DenseNet, where it follows a `Concat` or a pooling) a BatchNorm becomes a `Mul` and an `Add` with
  the chain's scale and offset: no more work than BatchNorm, with two constants in place of four, and elementwise, so
  that what fuses elementwise nodes takes it in and precision can be lowered through it; other chains do if that is
  fewer nodes.

onnxscript has rules for BatchNorm behind `Conv`, `ConvTranspose` and `Gemm`. They aren't used, because they stop at
weights that two nodes share, take a BatchNorm in training mode for one at inference, fail at an input left out by an
empty name, and give a new bias the name of the weight and `_bias` even where that is taken. Nor does its
`conv_affine_fusion_rule` know anything but scalars. The tests compare with them where they do hold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.folding.constants import Budget
from tilewright.tuner.model.graph import Array, constant, is_constant, static_shape
from tilewright.tuner.model.messages import quoted
from tilewright.tuning_db.errors import ModelError

_ARITHMETIC = ("Mul", "Add", "Sub", "Div")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, slots=True)
class _Step:
    """One node as y = scale · x + offset; both in fp64, of one element or one for each channel."""

    node: ir.Node
    x: ir.Value
    scale: Array
    offset: Array


@dataclass(slots=True)
class _Chain:
    """Steps, each the only use of the one before."""

    steps: list[_Step]
    axis: int

    @property
    def x(self) -> ir.Value:
        return self.steps[0].x

    @property
    def out(self) -> ir.Value:
        return self.steps[-1].node.outputs[0]

    @property
    def scale(self) -> Array:
        scale = np.ones(1)
        for step in self.steps:
            scale = scale * step.scale
        return scale

    @property
    def offset(self) -> Array:
        offset = np.zeros(1)
        for step in self.steps:
            offset = offset * step.scale + step.offset
        return offset

    def count(self, operator: str) -> int:
        return sum(step.node.op_type == operator for step in self.steps)


def fold_affine(model: ir.Model, budget: Budget) -> Counter[str]:
    """Folds all such chains of the main graph, in place.

    Returns:
        How many nodes went, by what became of them: `batch_norm` and `affine` into the weights before them;
        `batch_norm_lowered` and `affine_merged` into a `Mul` and an `Add`, or into nothing where they change nothing.

    Raises:
        ModelError: a BatchNorm's variance is negative.
    """
    editor = Editor(model)
    found: Counter[str] = Counter()
    gone: set[ir.Node] = set()
    for node in list(model.graph):
        if node in gone:
            continue
        chain = _chain(node)
        if chain is None:
            continue
        norms, count = chain.count("BatchNormalization"), len(chain.steps)
        if _absorb(chain, editor, budget):
            found.update(batch_norm=norms, affine=count - norms)
        elif _shorten(chain, editor):
            found.update(batch_norm_lowered=norms, affine_merged=count - norms)
        else:
            continue
        gone.update(step.node for step in chain.steps)
    return +found


def _chain(node: ir.Node) -> _Chain | None:
    """The longest chain that begins at a node, or None where it is no step."""
    x = _operand(node)
    shape = static_shape(x) if x is not None else None
    if x is None or shape is None or len(shape) < 2:
        return None
    producer = x.producer()
    # A MatMul's columns are its last axis, all else has channels in the second.
    last = producer is not None and producer.op_type == "MatMul" and producer.domain == ""
    axes = (len(shape) - 1, 1) if last and node.op_type != "BatchNormalization" else (1,)
    for axis in axes:
        steps: list[_Step] = []
        at: ir.Node | None = node
        while at is not None and at.graph is node.graph and (step := _step(at, axis)) is not None:
            steps.append(step)
            at = _only_use(at.outputs[0])
        if steps:
            return _Chain(steps, axis)
    return None


def _operand(node: ir.Node) -> ir.Value | None:
    """What a node scales or moves: the input that isn't constant; None if that isn't what it does."""
    if node.domain != "" or len(node.outputs) != 1:
        return None
    if node.op_type == "BatchNormalization":
        return node.inputs[0] if node.inputs else None
    if node.op_type not in _ARITHMETIC or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    if is_constant(second) and not is_constant(first):
        return first
    if node.op_type in ("Mul", "Add") and is_constant(first) and not is_constant(second):
        return second
    return None


def _step(node: ir.Node, axis: int) -> _Step | None:
    x = _operand(node)
    if x is None or x.dtype not in _FLOATS or static_shape(x) is None:
        return None
    if node.op_type == "BatchNormalization":
        return _batch_norm(node, x) if axis == 1 else None
    if static_shape(x) != static_shape(node.outputs[0]):
        return None  # the constant makes the result larger
    # Its size is looked at before its data: that may be large.
    operand = node.inputs[1] if node.inputs[0] is x else node.inputs[0]
    other = _by_channel(operand, x, axis)
    if other is None:
        return None
    one, zero = np.ones(1), np.zeros(1)
    match node.op_type:
        case "Mul":
            return _Step(node, x, other, zero)
        case "Div":
            # By zero stays as it is: x / 0 is not x · inf where x is 0.
            return _Step(node, x, 1 / other, zero) if other.all() else None
        case "Add":
            return _Step(node, x, one, other)
        case _:
            return _Step(node, x, one, -other)


def _by_channel(operand: ir.Value | None, x: ir.Value, axis: int) -> Array | None:
    """A constant as one element, or one for each channel of `x` along `axis`; None if it is neither, or not finite."""
    shape, whole = (static_shape(operand) if operand is not None else None), static_shape(x)
    if shape is None or whole is None or len(shape) > len(whole):
        return None
    padded = (1,) * (len(whole) - len(shape)) + shape
    if any(size != 1 for place, size in enumerate(padded) if place != axis) or padded[axis] not in (1, whole[axis]):
        return None
    array = constant(operand)
    if array is None:
        return None
    flat = array.astype(np.float64).reshape(-1)
    return flat if np.isfinite(flat).all() else None


def _batch_norm(node: ir.Node, x: ir.Value) -> _Step | None:
    shape = static_shape(x)
    if node.attributes.get_int("training_mode", 0) or len(node.inputs) != 5 or shape is None or len(shape) < 2:
        return None
    arrays = [constant(value) for value in node.inputs[1:]]
    if any(array is None or array.shape != (shape[1],) for array in arrays):
        return None
    gamma, beta, mean, variance = (array.astype(np.float64) for array in arrays if array is not None)
    deviation = variance + node.attributes.get_float("epsilon", 1e-5)
    if not (deviation > 0).all():
        raise ModelError(
            f"BatchNormalization {quoted(node.name or '')}: variance and epsilon add up to {deviation.min():.6g}: they "
            f"must be positive"
        )
    scale = gamma / np.sqrt(deviation)
    return _Step(node, x, scale, beta - mean * scale)


def _only_use(value: ir.Value) -> ir.Node | None:
    """The one node that uses a value, once, or None."""
    nodes = [use.node for use in value.uses()]
    return nodes[0] if len(nodes) == 1 and not value.is_graph_output() else None


def _absorb(chain: _Chain, editor: Editor, budget: Budget) -> bool:
    """Makes a chain part of the weights before it, and says whether it did."""
    node = chain.x.producer()
    if node is None or node.domain != "" or _only_use(chain.x) is None or node.graph is not editor.graph:
        return False
    scale, offset = chain.scale, chain.offset
    shape = static_shape(chain.x)
    if node.op_type == "MatMul" and (shape is None or chain.axis != len(shape) - 1):
        return False  # channels of another axis than the columns of the weights
    if node.op_type in ("MatMul", "Gemm") and scale.size == offset.size == 1:
        return False  # attention's 1/√d, say, which is looked for where exporters put it
    if len(node.inputs) < 2 or not is_constant(node.inputs[1]):
        return False
    weight = node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if weight is None or (bias is not None and not is_constant(bias)):
        return False
    channels, placed = _weight_scale(node, weight, scale)
    if placed is None or any(array.size not in (1, channels) for array in (scale, offset)):
        return False
    changes = (scale != 1).any()
    if node.op_type == "MatMul":
        return bool(changes) and _absorb_scale(chain, node, weight, placed, editor, budget)
    old = np.zeros(1)
    if bias is not None:
        held = constant(bias)
        shape = static_shape(bias)
        if held is None or shape is None or (len(shape) > 1 and any(size != 1 for size in shape[:-1])):
            return False
        old = held.astype(np.float64).reshape(-1)
    if node.op_type == "Gemm":
        old = old * node.attributes.get_float("beta", 1.0)
    kind = weight.dtype
    new_bias = _rounded(np.broadcast_to(old * scale + offset, (channels,)), kind)
    new_weight = _scaled(weight, placed) if changes else None
    if new_bias is None or (changes and (new_weight is None or not _affordable(weight, budget))):
        return False
    if new_weight is not None:
        _set_input(node, 1, new_weight, f"{node.name}_weight", editor)
    _set_input(node, 2, new_bias, f"{node.name}_bias", editor)
    if node.op_type == "Gemm":
        node.attributes.pop("beta", None)
    _replace(chain, node.outputs[0], editor)
    return True


def _absorb_scale(
    chain: _Chain, node: ir.Node, weight: ir.Value, placed: Array, editor: Editor, budget: Budget
) -> bool:
    scaled = _scaled(weight, placed)
    offset = _rounded(chain.offset, chain.x.dtype)
    if scaled is None or offset is None or not _affordable(weight, budget):
        return False
    _set_input(node, 1, scaled, f"{node.name}_weight", editor)
    result = chain.x
    if offset.any():
        # Under its old name this value would not be what it was.
        result.name = editor.name(f"{result.name}_scaled")
        result = _emit("Add", result, offset, chain, editor)
    _replace(chain, result, editor)
    return True


def _weight_scale(node: ir.Node, weight: ir.Value, scale: Array) -> tuple[int, Array | None]:
    """The number of channels, and the scale in the shape in which it multiplies the weights; None: it can't."""
    shape = static_shape(weight)
    out = static_shape(node.outputs[0])
    if shape is None or out is None or weight.dtype not in _FLOATS or weight.dtype != node.outputs[0].dtype:
        return 0, None
    match node.op_type:
        case "Conv" if len(shape) > 2:
            channels, placed = shape[0], scale.reshape(-1, *[1] * (len(shape) - 1))
        case "ConvTranspose" if len(shape) > 2:
            # (C, K/group, …), in which a group's input channels are beside each other, as are its output channels.
            group = node.attributes.get_int("group", 1)
            channels = shape[1] * group
            if group < 1 or shape[0] % group or scale.size not in (1, channels):
                return 0, None
            rows = np.broadcast_to(scale, (channels,)).reshape(group, shape[1])
            placed = np.repeat(rows, shape[0] // group, axis=0).reshape(shape[0], shape[1], *[1] * (len(shape) - 2))
        case "Gemm" if len(shape) == 2:
            rows_first = bool(node.attributes.get_int("transB", 0))
            channels, placed = (shape[0], scale.reshape(-1, 1)) if rows_first else (shape[1], scale.reshape(1, -1))
        case "MatMul" if len(shape) == 2:
            channels, placed = shape[1], scale.reshape(1, -1)
        case _:
            return 0, None
    return channels, placed


def _scaled(weight: ir.Value, scale: Array) -> Array | None:
    """The weights times the scale, or None where that overflows their type."""
    array = constant(weight)
    if array is None:
        return None
    kind = np.dtype(np.float64) if array.dtype == np.float64 else np.dtype(np.float32)
    with np.errstate(over="ignore"):
        result = (array.astype(kind, copy=False) * scale.astype(kind)).astype(array.dtype, copy=False)
    return result if np.isfinite(result).all() else None


def _rounded(array: Array, dtype: ir.DataType | None) -> Array | None:
    """As an array of an ONNX type, or None where that overflows."""
    if dtype is None:
        return None
    with np.errstate(over="ignore"):
        result = array.astype(dtype.numpy())
    return result if np.isfinite(result).all() else None


def _affordable(weight: ir.Value, budget: Budget) -> bool:
    """Whether there may be scaled weights: as many bytes again, where other nodes go on using these."""
    shared = len(weight.uses()) > 1 or weight.is_graph_output()
    tensor = weight.const_value
    size = tensor.nbytes if tensor is not None else 0
    return budget.allows(size, 0 if shared else size)


def _set_input(node: ir.Node, place: int, array: Array, base: str, editor: Editor) -> None:
    """Gives a node a constant in place of an input. An initializer that nothing else uses is changed in place."""
    old = node.inputs[place] if place < len(node.inputs) else None
    if old is not None and old.is_initializer() and len(old.uses()) == 1 and not old.is_graph_output():
        old.const_value = ir.tensor(array, name=old.name)
        old.shape = ir.Shape(array.shape)
        old.type = ir.TensorType(old.const_value.dtype)
        return
    if place >= len(node.inputs):
        node.resize_inputs(place + 1)
    node.replace_input_with(place, editor.constant(np.ascontiguousarray(array), base))


def _shorten(chain: _Chain, editor: Editor) -> bool:
    """Makes a `Mul` and an `Add` of a chain, as far as they change anything, and says whether it did."""
    scale, offset = _rounded(chain.scale, chain.x.dtype), _rounded(chain.offset, chain.x.dtype)
    if scale is None or offset is None:
        return False
    needed = [
        (name, array) for name, array, nothing in (("Mul", scale, 1), ("Add", offset, 0)) if (array != nothing).any()
    ]
    if len(needed) >= len(chain.steps) and not chain.count("BatchNormalization"):
        return False
    result = chain.x
    for operator, array in needed:
        result = _emit(operator, result, array, chain, editor)
    if not needed:
        # What is left of the node: eliminated where that is possible, between an input and an output it isn't.
        first = chain.steps[0].node
        identity = ir.node("Identity", [chain.x], name=editor.name(f"{first.name}_identity"))
        result = _placed(identity, chain, editor)
    _replace(chain, result, editor)
    return True


def _emit(operator: str, x: ir.Value, array: Array, chain: _Chain, editor: Editor) -> ir.Value:
    """`x` scaled or moved by channel, as a new node ahead of the chain's last."""
    first = chain.steps[0].node
    rank = len(static_shape(chain.x) or ())
    shape = array.shape if array.size > 1 else ()
    shaped = array.reshape(*shape, *[1] * (rank - 1 - chain.axis)) if shape else array.reshape(())
    base = f"{first.name}_{'scale' if operator == 'Mul' else 'offset'}"
    node = ir.node(operator, [x, editor.constant(shaped, base)], name=editor.name(f"{first.name}_{operator}"))
    return _placed(node, chain, editor)


def _placed(node: ir.Node, chain: _Chain, editor: Editor) -> ir.Value:
    out = node.outputs[0]
    out.name = editor.name(f"{node.name}_out")
    out.type, out.shape = chain.x.type, chain.x.shape
    editor.graph.insert_before(chain.steps[-1].node, node)
    return out


def _replace(chain: _Chain, result: ir.Value, editor: Editor) -> None:
    """Puts `result` in the place of the chain's, under the same name, and takes the chain out."""
    out = chain.out
    name = out.name
    ir.convenience.replace_all_uses_with(out, result, replace_graph_outputs=True)
    used = [value for step in chain.steps for value in step.node.inputs if value is not None and value is not chain.x]
    editor.graph.remove([step.node for step in chain.steps], safe=True)
    result.name = name
    for value in used:
        if value.is_initializer() and not value.uses() and not value.is_graph_output():
            editor.graph.initializers.pop(str(value.name), None)

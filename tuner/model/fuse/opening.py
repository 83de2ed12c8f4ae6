"""Open nodes: matrix products, convolutions and attentions on the way to being fused nodes.

While rules are at work a product is one node of the domain `tilewright.open`, whose operator is the op's name and whose
attribute `takes` names its inputs, by the plugin's names for them, in order; its other attributes are the plugin's, as
far as they were set. So one rule serves every set of inputs. `close` turns open nodes into fused ones.

A node is opened, and a chain is grown, only as far as the plugin takes what comes out: `accepted` asks it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase

from tilewright.kernels.device import Device
from tilewright.kernels.tensorrt.catalogue import find_plugin
from tilewright.tuner.model import graph
from tilewright.tuner.model.fuse.outcome import Log
from tilewright.tuner.model.graph import constant, dtype_name, is_constant, make_fused, static_shape
from tilewright.tuning_db.errors import ModelError, UnsupportedError, UsageError

OPEN = "tilewright.open"
_TAKES = "takes"
FLOATS = ("fp32", "fp16", "bf16")


def is_open(node: ir.Node | None) -> bool:
    """Whether a node is an open one."""
    return node is not None and node.domain == OPEN


def inputs_of(node: ir.Node) -> dict[str, ir.Value]:
    """The inputs of an open node by the plugin's names."""
    return dict(zip(node.attributes[_TAKES].as_strings(), node.inputs, strict=True))  # type: ignore[arg-type]


def settings_of(node: ir.Node) -> dict[str, Any]:
    """The plugin's attributes that an open node has set."""
    return {name: attribute.value for name, attribute in node.attributes.items() if name != _TAKES}


def opened(op: Any, kind: str, inputs: Mapping[str, ir.Value], settings: Mapping[str, Any], name: str) -> ir.Value:
    """An open node made by a rule's `op`: `kind` is `gemm`, `conv2d` or `attention`."""
    value: ir.Value = getattr(op, kind)(*inputs.values(), **settings, takes=list(inputs), _domain=OPEN)
    node = value.producer()
    assert node is not None
    node.name = name
    return value


def reopened(node: ir.Node, inputs: Mapping[str, ir.Value]) -> ir.Node:
    """A node like an open one, of other values in the same places; in no graph yet."""
    values = [inputs[name] for name in node.attributes[_TAKES].as_strings()]
    return ir.node(node.op_type, values, dict(node.attributes), domain=OPEN, name=node.name)


def refusal(
    kind: str, inputs: Mapping[str, ir.Value], settings: Mapping[str, Any], device: Device | None = None
) -> str | None:
    """None, or why no plugin takes these, or no kernel on a device if one is named."""
    for name, value in inputs.items():
        if static_shape(value) is None:
            return f"the shape of {name} is not known"
    try:
        node = make_fused(kind, inputs, settings, name="asked")
    except UsageError as error:
        return str(error)
    try:
        tensors, attributes = graph.plugin_tensors(node), graph.plugin_settings(node)
        operation = find_plugin(node.op_type).operation
        operation.check_static(tensors, attributes)
        problem = operation.problem(tensors, attributes)
        return None if device is None else operation.kernel.supported(problem, device)
    except (ModelError, UnsupportedError, UsageError) as error:
        return str(error)
    finally:
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)  # a value remembers who uses it


def in_main_graph(context: Any) -> bool:
    """Whether a match is in the model's own graph: the rewriter goes into those of control-flow nodes as well."""
    return bool(context.graph_or_function is context.model.graph)


def register_constants(model: ir.Model) -> None:
    """Makes initializers of the constants that rules have given to nodes."""
    known = model.graph.initializers
    for node in model.graph:
        for value in node.inputs:
            if value is None or value.const_value is None or value.producer() is not None or value.is_initializer():
                continue
            base, count = value.name or "constant", 1
            while value.name in known or value.name is None:
                count += 1
                value.name = f"{base}_{count}"
            known.add(value)


def close(model: ir.Model) -> None:
    """Turns every open node into the fused node that it has grown to."""
    for node in list(model.graph):
        if not is_open(node):
            continue
        fused = make_fused(
            node.op_type, inputs_of(node), settings_of(node), name=node.name or "", outputs=[_copy(node.outputs[0])]
        )
        fused.metadata_props.update(node.metadata_props)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [fused], node.outputs, fused.outputs)
    model.opset_imports.pop(OPEN, None)


def _copy(value: ir.Value) -> ir.Value:
    return ir.Value(name=value.name, type=value.type, shape=value.shape)


class _Opening(RewriteRuleClassBase):
    """A rule that opens one kind of node; what it can't open is logged with the reason."""

    title = ""

    def __init__(self, log: Log) -> None:
        super().__init__(f"open {self.title}")
        self._log = log

    def check(self, context: Any, out: ir.Value, **_: Any) -> MatchResult:
        node = out.producer()
        assert node is not None
        reason = self._reason(node) if in_main_graph(context) else "it is inside a control-flow node"
        if reason is not None:
            self._log.miss(self.title, node.name or "", reason)
            return MatchResult().fail(reason)
        return MatchResult()

    def _reason(self, node: ir.Node) -> str | None:
        if any(value is not None and dtype_name(value) not in FLOATS for value in node.inputs):
            kinds = ", ".join(sorted({dtype_name(value) for value in node.inputs if value is not None}))
            return f"its inputs are {kinds}; kernels take {', '.join(FLOATS)}"
        spec = self._spec(node)
        return spec if isinstance(spec, str) else refusal(*spec)

    def _spec(self, node: ir.Node) -> str | tuple[str, dict[str, ir.Value], dict[str, Any]]:
        """What the node becomes, or why it can't."""
        raise NotImplementedError

    def rewrite(self, op: Any, out: ir.Value, **_: Any) -> ir.Value:
        node = out.producer()
        assert node is not None
        spec = self._spec(node)
        assert not isinstance(spec, str)
        kind, inputs, settings = spec
        return opened(op, kind, inputs, settings, node.name or "")


class OpenMatMul(_Opening):
    """`MatMul` → gemm."""

    title = "MatMul"

    def pattern(self, op: Any) -> Any:
        return op.MatMul(_allow_other_inputs=True, _outputs=["out"])

    def _spec(self, node: ir.Node) -> str | tuple[str, dict[str, ir.Value], dict[str, Any]]:
        a, b = node.inputs
        assert a is not None
        assert b is not None
        if min(len(value.shape or ()) for value in (a, b)) < 2:
            return f"operands of shapes {static_shape(a)} and {static_shape(b)}: a vector is no matrix"
        return "gemm", {"a": a, "b": b}, {}


class OpenGemm(_Opening):
    """`Gemm` → gemm, with C as bias or residual; alpha and beta go into constants."""

    title = "Gemm"

    def __init__(self, log: Log) -> None:
        super().__init__(log)
        self._scaled: dict[tuple[ir.Value, float], ir.Value] = {}  # layers may share it, and each is asked about twice

    def pattern(self, op: Any) -> Any:
        return op.Gemm(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"])

    def _spec(self, node: ir.Node) -> str | tuple[str, dict[str, ir.Value], dict[str, Any]]:
        a, b = node.inputs[:2]
        c = node.inputs[2] if len(node.inputs) > 2 else None
        assert a is not None
        assert b is not None
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        settings = {
            "trans_a": node.attributes.get_int("transA", 0),
            "trans_b": node.attributes.get_int("transB", 0),
        }
        if alpha != 1 and not is_constant(b):
            return f"{alpha=} of a B that is no constant"
        inputs = {"a": a, "b": self._times(b, alpha)}
        if c is None or beta == 0:
            return "gemm", inputs, settings
        if beta != 1 and not is_constant(c):
            return f"{beta=} of a C that is no constant"
        c = self._times(c, beta)
        shape_a, shape_b = static_shape(a), static_shape(b)
        if shape_a is None or shape_b is None:
            return "the shapes of its operands are not known"
        rows, columns = shape_a[1 if settings["trans_a"] else 0], shape_b[0 if settings["trans_b"] else 1]
        bias = as_vector(c, columns)
        if bias is not None:
            return "gemm", {**inputs, "bias": bias}, settings
        if static_shape(c) == (rows, columns):
            return "gemm", {**inputs, "residual": c}, settings
        return f"C of shape {static_shape(c)} is neither a bias of {columns} nor a residual of {(rows, columns)}"

    def _times(self, value: ir.Value, factor: float) -> ir.Value:
        """A value itself times 1, or a constant times another factor."""
        if factor == 1:
            return value
        if (value, factor) not in self._scaled:
            self._scaled[value, factor] = scaled(value, factor)
        return self._scaled[value, factor]


class OpenConv(_Opening):
    """`Conv` in two dimensions → conv2d. Those in one have become such of one row before, where a plugin takes them
    (`one_row.py`); of the others this says why not."""

    title = "Conv"

    def pattern(self, op: Any) -> Any:
        return op.Conv(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"])

    def takes(self, node: ir.Node) -> bool:
        """Whether a convolution in one or two dimensions, of the model's own graph, can be opened."""
        return self._reason(node) is None

    def _spec(self, node: ir.Node) -> str | tuple[str, dict[str, ir.Value], dict[str, Any]]:
        x, w = node.inputs[:2]
        assert x is not None
        assert w is not None
        x_shape, w_shape = static_shape(x), static_shape(w)
        if x_shape is None or w_shape is None or len(x_shape) != len(w_shape):
            return f"its operands have the shapes {x_shape} and {w_shape}"
        spatial = len(x_shape) - 2
        if spatial not in (1, 2):
            return f"{spatial} spatial dimensions; the plugin takes 1 and 2"
        if spatial == 1:
            if static_shape(node.outputs[0]) is None:
                return "the shape of its result is not known"
            x_shape, w_shape = with_row(x_shape), with_row(w_shape)
            x, w = (
                ir.Value(name=value.name, type=value.type, shape=ir.Shape(shape))  # to ask with
                for value, shape in ((x, x_shape), (w, w_shape))
            )
        missing = [1] * (2 - spatial)
        strides = [*missing, *node.attributes.get_ints("strides", [1] * spatial)]
        dilations = [*missing, *node.attributes.get_ints("dilations", [1] * spatial)]
        pads = self._pads(node, x_shape, w_shape, strides, dilations)
        settings = {
            "stride_h": strides[0],
            "stride_w": strides[1],
            "dilation_h": dilations[0],
            "dilation_w": dilations[1],
            "groups": node.attributes.get_int("group", 1),
            **{f"pad_{side}": size for side, size in zip(("top", "left", "bottom", "right"), pads, strict=True)},
        }
        inputs = {"x": x, "w": w}
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            inputs["bias"] = node.inputs[2]
        return "conv2d", inputs, settings

    def _pads(
        self,
        node: ir.Node,
        x: tuple[int, ...],
        w: tuple[int, ...],
        strides: Any,
        dilations: Any,
    ) -> list[int]:
        """Top, left, bottom, right: as given, or as ONNX's `auto_pad` has it for these sizes."""
        auto = node.attributes.get_string("auto_pad", "NOTSET")
        if auto == "VALID":
            return [0, 0, 0, 0]
        if auto == "NOTSET":
            given = node.attributes.get_ints("pads", [])
            return [0, given[0], 0, given[1]] if len(given) == 2 else list(given or [0, 0, 0, 0])
        begins, ends = [], []
        for axis in (0, 1):
            size, stride = x[2 + axis], strides[axis]
            reach = dilations[axis] * (w[2 + axis] - 1) + 1
            total = max(0, (math.ceil(size / stride) - 1) * stride + reach - size)
            less, more = total // 2, total - total // 2
            begins.append(less if auto == "SAME_UPPER" else more)
            ends.append(more if auto == "SAME_UPPER" else less)
        return begins + ends


def with_row(shape: Sequence[int]) -> tuple[int, ...]:
    """(…, L) as (…, 1, L)."""
    return (*shape[:-1], 1, *shape[-1:])


def scaled(value: ir.Value, factor: float) -> ir.Value:
    """A new constant: another times a factor."""
    array = constant(value)
    assert array is not None
    return new_constant((array * np.asarray(factor, array.dtype)).astype(array.dtype), f"{value.name}_times_{factor:g}")


def as_vector(value: ir.Value, length: int, axis: int = -1) -> ir.Value | None:
    """A value as a vector of a length, if it broadcasts as one along an axis (counted from the end) and along no other:
    the value itself, or of a constant a new one; else None."""
    shape = static_shape(value)
    if shape is None or dtype_name(value) not in FLOATS:
        return None
    if shape == (length,) and axis == -1:
        return value
    if not is_constant(value):
        return None
    if math.prod(shape) == 1:
        array = constant(value)
        assert array is not None
        return new_constant(np.full(length, array.reshape(-1)[0]), f"{value.name}_filled")
    if len(shape) < -axis or shape[axis] != length or math.prod(shape) != length:
        return None
    array = constant(value)
    assert array is not None
    return new_constant(array.reshape(length), f"{value.name}_as_vector")


def new_constant(array: np.ndarray[Any, Any], name: str) -> ir.Value:
    """A constant that rules may give to a new node: it becomes an initializer when the rule is applied."""
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)

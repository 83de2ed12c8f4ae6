"""What fused nodes stand for: a model-local function of standard ONNX operators for each, so that a file with fused
nodes passes ONNX's checker and runs wherever functions are known.

A body computes in fp32 whatever the tensors are, as the kernels do, in the order that `kernels/epilogue.py` states:
8-bit inputs are dequantised by their scales, half-precision ones cast, and the result is cast or quantised at the end.

Functions are found by domain and name, and a fused node's name is its plugin's. So nodes of one plugin with different
attributes, data types or ranks have different domains, `tilewright.` and a hash of the body. (Functions may have an
overload as well, which came late: fewer readers know it.)

TensorRT's parser finds plugins first, and where they are not registered functions: by the name alone, of which it takes
the first in the file (`importLocalFunctions` in onnx-tensorrt's ModelImporter.cpp, TensorRT 11). So that it fails there
and doesn't compute by another node's body, the first function of a name that several have is one that it can't build.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.kernels.activations import activation_name
from tilewright.kernels.ops.gemm.packing import RUN
from tilewright.kernels.tensorrt.catalogue import NAMESPACE
from tilewright.tuner.model.graph import (
    DTYPES,
    dtype_name,
    fused_nodes,
    infer_outputs,
    op_of,
    plugin_inputs,
    plugin_settings,
    static_shape,
)
from tilewright.tuning_db.errors import UnsupportedError

QUANTISED = ("int8", "uint8", "fp8e4m3")


class Writer:
    """Writes nodes one after another, and constants as nodes: the inside of a function."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def __call__(self, operator: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> Any:
        """One node; gives its output, or all of several."""
        node = ir.node(operator, list(inputs), attributes, num_outputs=outputs)
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def array(self, values: Any, dtype: str = "fp32") -> ir.Value:
        """A constant."""
        array = np.asarray(values, DTYPES[dtype].numpy())
        return self("Constant", value=ir.tensor(array, dtype=DTYPES[dtype]))  # type: ignore[no-any-return]

    def cast(self, value: ir.Value, source: str, target: str) -> ir.Value:
        """A value in another data type."""
        return value if source == target else self("Cast", value, to=int(DTYPES[target]))


def activate(op: Writer, x: ir.Value, name: str, dtype: str = "fp32") -> ir.Value:
    """An activation of `kernels.activations`, by its canonical name, of a value of a data type."""
    word, *parameters = name.split(":")
    values = [float(text) for text in parameters]
    plain = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "softplus": "Softplus", "hardswish": "HardSwish"}
    if word == "none":
        return x
    if word in plain:
        return op(plain[word], x)  # type: ignore[no-any-return]
    forms: Mapping[str, Callable[[], Any]] = {
        "relu2": lambda: _square(op, op("Relu", x)),
        "clamp": lambda: op("Clip", x, op.array(values[0], dtype), op.array(values[1], dtype)),
        "leaky_relu": lambda: op("LeakyRelu", x, alpha=values[0]),
        "gelu_erf": lambda: op("Gelu", x),
        "gelu_tanh": lambda: op("Gelu", x, approximate="tanh"),
        "silu": lambda: op("Mul", x, op("Sigmoid", x)),
        "quick_gelu": lambda: op("Mul", x, op("Sigmoid", op("Mul", x, op.array(1.702, dtype)))),
    }
    if word not in forms:
        raise UnsupportedError(f"there is no ONNX body of activation {name!r}")
    return forms[word]()  # type: ignore[no-any-return]


def _square(op: Writer, x: ir.Value) -> ir.Value:
    return op("Mul", x, x)  # type: ignore[no-any-return]


class _Body:
    """A body in the making: the node it is of, and its inputs inside the function."""

    def __init__(self, node: ir.Node, opset: int) -> None:
        self.op, self._opset = Writer(), opset
        self.given = plugin_inputs(node)
        self.settings = plugin_settings(node)
        self.kinds = {name: dtype_name(value) for name, value in self.given.items()}
        self.inputs = {name: ir.Value(name=name) for name in self.given}
        self.more: dict[str, ir.Value] = {}  # results behind the first, by the plugin's names

    def rank(self, name: str) -> int:
        shape = self.given[name].shape
        assert shape is not None, name
        return len(shape)

    def refuse(self, *names: str) -> None:
        for name in names:
            if name in self.given:
                raise UnsupportedError(f"there is no ONNX body of a fused node with {name}")

    def operand(self, name: str, axis: int | None) -> ir.Value:
        """An operand in fp32; `axis` is the one along which it may have a scale for each place."""
        value, scale = self.inputs[name], self.inputs.get(f"{name}_scale")
        if scale is None:
            return self.op.cast(value, self.kinds[name], "fp32")
        shape = static_shape(self.given[f"{name}_scale"])
        if shape not in ((), (1,)) and (axis is None or len(shape or ()) != 1):
            raise UnsupportedError(f"there is no ONNX body of {name}_scale of shape {shape}")
        if self.kinds[name] not in QUANTISED:
            if shape not in ((), (1,)):
                assert axis is not None
                places = [-1 if each == axis else 1 for each in range(self.rank(name))]
                scale = self.op("Reshape", scale, self.op.array(places, "int64"))
            return self.op("Mul", self.op.cast(value, self.kinds[name], "fp32"), scale)  # type: ignore[no-any-return]
        if shape == (1,):
            scale = self.op("Squeeze", scale, self.op.array([0], "int64"))
        along: dict[str, Any] = {} if shape in ((), (1,)) else {"axis": axis}
        return self.op("DequantizeLinear", value, scale, **along)  # type: ignore[no-any-return]

    def extra(self, name: str) -> ir.Value:
        """A bias, residual or weight in fp32."""
        return self.op.cast(self.inputs[name], self.kinds[name], "fp32")

    def finish(self, y: ir.Value, kind: str) -> ir.Value:
        """The result, quantised or cast."""
        if "out_scale" not in self.inputs:
            return self.op.cast(y, "fp32", kind)
        scale = self.inputs["out_scale"]
        if static_shape(self.given["out_scale"]) == (1,):
            scale = self.op("Squeeze", scale, self.op.array([0], "int64"))
        if self._opset < 21:  # which brought `output_dtype`: before, a zero point says the type
            return self.op("QuantizeLinear", y, scale, self.op.array(0, kind))  # type: ignore[no-any-return]
        return self.op("QuantizeLinear", y, scale, output_dtype=int(DTYPES[kind]))  # type: ignore[no-any-return]


def _weights(body: _Body) -> ir.Value:
    """Integer weights under an A of half precision, dequantised: fp32 (N, K)."""
    op, settings = body.op, body.settings
    given = static_shape(body.given["b"]) or ()
    if len(given) != 2:
        raise UnsupportedError(f"there is no ONNX body of quantised weights of shape {given}")
    a = static_shape(body.given["a"]) or ()
    depth, size = a[-2 if settings["trans_a"] else -1], settings["group_size"]
    columns = body.inputs["b"]
    if not settings["trans_b"]:
        columns, given = op("Transpose", columns, perm=[1, 0]), given[::-1]
    values = op("Cast", columns, to=int(DTYPES["int32"]))
    packed = settings["weights"] == "int4"
    if packed:  # `kernels.ops.gemm.packing` says how
        runs = op("Reshape", values, op.array([given[0], -1, 1, RUN // 2], "int64"))
        unsigned, sixteen = op("Mod", runs, op.array(256, "int32")), op.array(16, "int32")
        nibbles = op("Concat", op("Mod", unsigned, sixteen), op("Div", unsigned, sixteen), axis=2)
        values = op("Reshape", nibbles, op.array([given[0], -1], "int64"))
        values = op("Slice", values, *(op.array([number], "int64") for number in (0, depth, 1)))

    def along(name: str) -> ir.Value:
        """Scales or zero points, one for each weight, or for each column."""
        value, shape = body.inputs[name], static_shape(body.given[name]) or ()
        if len(shape) < 2:
            return op("Reshape", value, op.array([-1, 1], "int64"))  # type: ignore[no-any-return]
        repeated = op("Expand", op("Unsqueeze", value, op.array([1], "int64")), op.array([1, size, 1], "int64"))
        rows = op("Reshape", repeated, op.array([-1, given[0]], "int64"))
        cut = op("Slice", rows, *(op.array([number], "int64") for number in (0, depth, 0)))
        return op("Transpose", cut, perm=[1, 0])  # type: ignore[no-any-return]

    if "b_zero" in body.given:
        values = op("Sub", values, op("Cast", along("b_zero"), to=int(DTYPES["int32"])))
    elif packed:
        values = op("Sub", values, op.array(8, "int32"))
    values = op.cast(values, "int32", "fp32")
    if "b_scale" not in body.given:
        return values
    return op("Mul", values, op.cast(along("b_scale"), body.kinds["b_scale"], "fp32"))  # type: ignore[no-any-return]


def _gemm(body: _Body, kind: str) -> ir.Value:
    op, settings = body.op, body.settings
    turned = {name: bool(settings[f"trans_{name}"]) for name in ("a", "b")}
    # Not by `DequantizeLinear`, for which ONNX Runtime's optimisations would round A to 8 bits as well (1.32).
    whole = body.kinds["b"] == "int8" and body.kinds["a"] in ("fp16", "bf16") and body.rank("b") == 2
    weights = whole or settings["group_size"] or settings["weights"] != "none" or "b_zero" in body.given
    operands = {
        "a": body.operand("a", None),
        "b": _weights(body) if weights else body.operand("b", body.rank("b") - (2 if turned["b"] else 1)),
    }
    turned["b"] |= bool(weights)
    if body.rank("a") == body.rank("b") == 2 and any(turned.values()):
        y = op("Gemm", operands["a"], operands["b"], transA=int(turned["a"]), transB=int(turned["b"]))
    else:
        for name, value in operands.items():
            if turned[name]:
                order = list(range(body.rank(name)))
                order[-2:] = order[:-3:-1]
                operands[name] = op("Transpose", value, perm=order)
        y = op("MatMul", operands["a"], operands["b"])
    if "bias" in body.given:
        y = op("Add", y, body.extra("bias"))
    activation = activation_name(settings["activation"])
    if settings["gated"] == "none":
        return _end(body, y, kind)
    if settings["gated"] == "halves":
        gate, up = op("Split", y, outputs=2, axis=-1, num_outputs=2)
    else:
        gate, up = (
            op("Slice", y, *(op.array([number], "int64") for number in (first, 2**62, -1, 2))) for first in (0, 1)
        )
    y = op("Mul", activate(op, gate, activation), up)
    if "residual" in body.given:
        y = op("Add", y, body.extra("residual"))
    return body.finish(y, kind)


def _conv2d(body: _Body, kind: str) -> ir.Value:
    op, settings = body.op, body.settings
    x, w = body.operand("x", None), body.operand("w", 0)
    bias = [body.extra("bias")] if "bias" in body.given else []
    y = op(
        "Conv",
        x,
        w,
        *bias,
        strides=[settings["stride_h"], settings["stride_w"]],
        pads=[settings[f"pad_{side}"] for side in ("top", "left", "bottom", "right")],
        dilations=[settings["dilation_h"], settings["dilation_w"]],
        group=settings["groups"],
    )
    return _end(body, y, kind)


def _end(body: _Body, y: ir.Value, kind: str) -> ir.Value:
    """What comes behind the sums and the bias, where there is no gate."""
    op, activation, last = body.op, activation_name(body.settings["activation"]), body.settings["residual_last"]
    if "residual" in body.given and not last:
        y = op("Add", y, body.extra("residual"))
    y = activate(op, y, activation)
    if "residual" in body.given and last:
        y = op("Add", y, body.extra("residual"))
    return body.finish(y, kind)


def _attention(body: _Body, kind: str) -> ir.Value:
    body.refuse("alibi_slopes", "sinks")
    op, settings = body.op, body.settings
    q, k, v = (body.operand(name, None) for name in ("q", "k", "v"))
    (_, heads, queries, dim), (_, kv_heads, keys, _) = (static_shape(body.given[name]) or () for name in ("q", "k"))
    if heads != kv_heads:
        k, v = (_repeated(op, value, heads // kv_heads) for value in (k, v))
    scale = settings["scale"] or 1 / np.sqrt(dim)
    scores = op("MatMul", op("Mul", q, op.array(scale)), op("Transpose", k, perm=[0, 1, 3, 2]))
    if settings["softcap"]:
        cap = op.array(settings["softcap"])
        scores = op("Mul", op("Tanh", op("Div", scores, cap)), cap)
    if "bias" in body.given:
        scores = op("Add", scores, body.extra("bias"))
    hidden = _hidden_keys(op, body, queries, keys)
    unseen = None
    for mask in hidden:
        unseen = mask if unseen is None else op("Or", unseen, mask)
    if unseen is not None:
        scores = op("Where", unseen, op.array(-np.inf), scores)
    weights = op("Softmax", scores, axis=-1)
    if unseen is not None or "bias" in body.given:
        # A row that sees no key, for the masks or for a bias of -∞, is 0/0 to Softmax, and 0 to the kernel.
        largest = op("ReduceMax", scores, op.array([-1], "int64"))
        weights = op("Where", op("Equal", largest, op.array(-np.inf)), op.array(0), weights)
    if "kv_lens" in body.given:
        # What lies behind a sequence's end may be anything, and 0 times NaN is NaN.
        v = op("Where", op("Transpose", hidden[0], perm=[0, 1, 3, 2]), op.array(0), v)
    return body.finish(op("MatMul", weights, v), kind)


def _repeated(op: Writer, value: ir.Value, times: int) -> ir.Value:
    """Every head so many times in a row: (B, H, S, D) → (B, H·times, S, D)."""
    apart = op("Unsqueeze", value, op.array([2], "int64"))
    copies = op("Concat", *[apart] * times, axis=2)
    shape = op("Concat", op.array([0, -1], "int64"), op("Shape", value, start=2), axis=0)
    return op("Reshape", copies, shape)  # type: ignore[no-any-return]


def _hidden_keys(op: Writer, body: _Body, queries: int, keys: int) -> list[ir.Value]:
    """Masks, true where a query does not see a key. The last query stands at the last key."""
    settings, masks = body.settings, []

    def number(value: int) -> ir.Value:
        return op.array(value, "int64")

    def numbers(first: int, end: int, *places: int) -> ir.Value:
        return op("Reshape", op("Range", number(first), number(end), number(1)), op.array(places, "int64"))  # type: ignore[no-any-return]

    columns = numbers(0, keys, 1, 1, 1, keys)
    length = number(keys)
    if "kv_lens" in body.given:
        lengths = op("Reshape", body.inputs["kv_lens"], op.array([-1, 1, 1, 1], "int64"))
        length = op("Cast", lengths, to=int(DTYPES["int64"]))
        masks.append(op("GreaterOrEqual", columns, length))
    right = 0 if settings["causal"] else settings["window_right"]
    if right >= 0 or settings["window_left"] >= 0:
        places = op("Add", numbers(-queries, 0, 1, 1, queries, 1), length)
        if right >= 0:
            masks.append(op("Greater", columns, op("Add", places, number(right))))
        if settings["window_left"] >= 0:
            masks.append(op("Less", columns, op("Sub", places, number(settings["window_left"]))))
    return masks


def _rmsnorm(body: _Body, kind: str) -> ir.Value:
    op, settings = body.op, body.settings
    h = body.extra("x")
    if "residual" in body.given:
        h = op("Add", h, body.extra("residual"))
        body.more["residual_out"] = op.cast(h, "fp32", body.kinds["residual"])
    # In this form ONNX Runtime makes one kernel of it; of h times h it would not.
    mean = op("ReduceMean", op("Pow", h, op.array(2)), op.array([-1], "int64"))
    y = op("Div", h, op("Sqrt", op("Add", mean, op.array(settings["eps"]))))
    if "weight" in body.given:
        weight = body.extra("weight")
        if settings["weight_offset"]:
            weight = op("Add", weight, op.array(settings["weight_offset"]))
        y = op("Mul", y, weight)
    return body.finish(y, kind)


_OPS: Mapping[str, Callable[[_Body, str], ir.Value]] = {
    "gemm": _gemm,
    "conv2d": _conv2d,
    "attention": _attention,
    "rmsnorm": _rmsnorm,
}


def body(node: ir.Node, opset: int) -> ir.Function:
    """The function that a fused node stands for, in the domain of this very body.

    Raises:
        UnsupportedError: ONNX's operators can't say it, or none here do.
    """
    op = op_of(node)
    if op not in _OPS:
        raise UnsupportedError(f"there is no ONNX body of {node.op_type}")
    made = _Body(node, opset)
    result = _OPS[op](made, dtype_name(node.outputs[0]))
    results = {"out": result, **made.more}
    nodes = made.op.nodes
    used = {value for each in nodes for value in each.inputs} | set(results.values())
    nodes = [each for each in nodes if any(value in used for value in each.outputs)]
    if result in made.inputs.values():
        raise UnsupportedError(f"{node.op_type} {node.name!r} does nothing")
    names = {id(value): f"t{index}" for index, each in enumerate(nodes) for value in each.outputs}
    for each in nodes:
        each.name = None
        for index, value in enumerate(each.outputs):
            value.name = names[id(value)] + (f"_{index}" if len(each.outputs) > 1 else "")
    for name, value in results.items():
        value.name = name
    graph = ir.Graph(
        list(made.inputs.values()), list(results.values()), nodes=nodes, opset_imports={"": opset}, name="body"
    )
    # The node's attributes are the plugin's to read: the body has them written into it.
    attributes = [ir.Attr(attribute.name, attribute.type, None) for attribute in node.attributes.values()]
    function = ir.Function(NAMESPACE, node.op_type, graph=graph, attributes=attributes)
    text = ir.serde.serialize_function(function).SerializeToString(deterministic=True)
    function.domain = f"{NAMESPACE}.{hashlib.sha256(text).hexdigest()[:8]}"
    return function


def _guard(body: ir.Function) -> ir.Function:
    """What readers that go by names alone take for every body of this name. No node has its domain, and none could: it
    is of an operator on texts, which TensorRT has no type for."""
    op = Writer()
    inputs = [ir.Value(name=value.name) for value in body.inputs]
    outputs = [op("StringNormalizer", inputs[0]) for _ in body.outputs]
    for node, output, value in zip(op.nodes, outputs, body.outputs, strict=True):
        node.name = "register_the_plugins_of_tilewright_or_inline_functions"  # which the parser's error names
        output.name = value.name
    graph = ir.Graph(inputs, outputs, nodes=op.nodes, opset_imports=dict(body.opset_imports), name="guard")
    attributes = [ir.Attr(attribute.name, attribute.type, None) for attribute in body.attributes.values()]
    return ir.Function(NAMESPACE, body.name, graph=graph, attributes=attributes)


def attach_bodies(model: ir.Model) -> None:
    """Gives every fused node of the main graph the domain of its body, and the model these functions and no others of
    ours, but for the guards of names that several of them have. Data types and shapes of the nodes' outputs are set on
    the way.

    Raises:
        ModelError: the shape of a fused node's input is unknown.
        UnsupportedError: a fused node has no body in ONNX's operators.
    """
    for key in [key for key in model.functions if key[0].partition(".")[0] == NAMESPACE]:
        del model.functions[key]
    for domain in [domain for domain in model.opset_imports if domain.partition(".")[0] == NAMESPACE]:
        del model.opset_imports[domain]
    opset = model.opset_imports[""]
    bodies: dict[Any, ir.Function] = {}
    for node in fused_nodes(model):
        infer_outputs(node)
        function = body(node, opset)
        node.domain = function.domain
        bodies.setdefault(function.identifier(), function)
    shared = Counter(function.name for function in bodies.values())
    named = {function.name: function for function in bodies.values()}
    guards = [_guard(named[name]) for name, count in shared.items() if count > 1]
    for function in (*guards, *bodies.values()):
        model.functions[function.identifier()] = function
        model.opset_imports[function.domain] = 1
    if fused_nodes(model):
        # Model-local functions came with version 8.
        model.ir_version = max(model.ir_version, 10)

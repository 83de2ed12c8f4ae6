"""Half precision: a model's floating-point values in fp16 or bf16, and what has to stay fp32, with the reason.

Every node computes in one of the two: `decide` says in which, by the table `STAYS` and the rules below it. Between the
two there are `Cast` nodes, one for each value however many need it; constants are converted instead. Graph inputs and
outputs keep their data types, with the cast inside.

Rules, in this order:

1. A fused node takes the lower type: its kernel adds up in fp32. Its scales stay fp32; and so does a result that only
   nodes which stay fp32, residuals and fused norms read: the residual stream of a transformer between its norms, where
   roundings of all layers would add up. A graph output leaves the kernel in its own type.
2. Operators of `STAYS`, those with subgraphs, and those of unknown domains stay fp32, each for the reason given.
3. A node with a one-element constant that the type can only hold as 0 or a denormal number (the 1e-6 of a norm) stays;
   and so does one whose constants pass the range, or vanish where it multiplies or divides by them (`kept.py`).
4. What comes near the range's end on calibration data stays, and what comes no further than its denormal numbers: what
   makes such a value, and what reads it. A fused node only gives it in fp32.
5. What computes with integers stays, from a cast of wider ones on, and up to a cast to some.
6. An arithmetic node next to one that stays, fed by it, stays as well: the pieces of a decomposed norm are one island,
   with casts around it and none inside.
7. What ONNX's schema does not allow in the type stays. bf16 has kernels in ONNX Runtime only where data is moved:
   other nodes stay fp32 then, between casts.

Finite constants beyond the type's range become finite ones where they may: the range's end where they are a bound
(`Clip`, `Min`, `Max`, comparisons), half of it in a mask, so that -1e9 added to a score, or to another mask, is no
infinity, from which softmax would make NaN. Infinite ones stay infinite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.graph import (
    DTYPES,
    constant,
    dtype_name,
    is_constant,
    is_fused,
    op_of,
    plugin_inputs,
    scalar,
)
from tilewright.tuner.model.precision.kept import (
    ARITHMETIC,
    BOUNDS,
    EXACT_SOURCES,
    FUSED_FP32,
    MOVING,
    NORM,
    STREAMS,
    Kept,
    kept,
    limits,
)

Array = np.ndarray[Any, Any]

HALVES = ("fp16", "bf16")

_EXP = "it exponentiates: e^12 passes fp16's range, and an error of the exponent becomes a relative one of the result"
_SUM = "it adds up a whole axis: fp16 sums overflow from 65504 on, and lose what is added to them long before"
_NORM = "it divides by a mean of squares, which overflow where the values pass 256 and vanish below 2^-12"
_STEP = "steps add up to places that fp16 holds exactly only up to 2048"
_SCALE = "scales decide which integer comes out, and zero points go with them"
_OWN = "its data type is an attribute, or that of a sequence"

STAYS: Mapping[str, str] = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Exp", "Log", "Softplus", "ReduceLogSumExp", "ReduceLogSum"), _EXP),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceProd", "ReduceL1", "CumSum", "Einsum"), _SUM),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), _NORM),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "MeanVarianceNormalization"), _NORM),
    **dict.fromkeys(("BatchNormalization", "LpNormalization", "LRN", "ReduceL2", "ReduceSumSquare"), _NORM),
    "Pow": "squares pass fp16's range from 256 on, and other powers sooner",
    "Erf": "near its ends 1 - erf(x) is what counts, and fp16 has 3 digits of it",
    **dict.fromkeys(("Sin", "Cos", "Tan"), "an error of a large angle is an error of the whole result"),
    **dict.fromkeys(("Range",), _STEP),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv"), _SCALE),
    **dict.fromkeys(("EyeLike", "OneHot", "Multinomial", "Bernoulli", "RandomNormal", "RandomNormalLike"), _OWN),
    **dict.fromkeys(("RandomUniform", "RandomUniformLike", "HannWindow", "HammingWindow", "BlackmanWindow"), _OWN),
    **dict.fromkeys(("SequenceConstruct", "SequenceAt", "SequenceEmpty", "SequenceInsert", "Optional"), _OWN),
    **dict.fromkeys(("SplitToSequence", "ConcatFromSequence", "OptionalGetElement", "OptionalHasElement"), _OWN),
    **dict.fromkeys(("DFT", "STFT", "MelWeightMatrix", "Det"), _SUM),
    "NonMaxSuppression": "boxes are pixels, of which fp16 has whole numbers only up to 2048",
    "TopK": "equal scores are ties: fp16 makes them of scores that differ",
    **dict.fromkeys(("ArgMax", "ArgMin"), "equal scores are ties: fp16 makes them of scores that differ"),
}
"""Operators that stay fp32, each with the reason."""

_ANY = frozenset(("Cast", "Shape", "Size"))
"""Operators that take a value in whatever type it is."""

_FP32_SLOTS: Mapping[str, tuple[int, ...]] = {"Resize": (1, 2)}
"""Inputs that stay fp32 where the node does not: `roi` and `scales` say which pixels are read."""


def converted(array: Array, dtype: str, *, bound: bool = False) -> Array:
    """A constant in another floating-point type, rounded to nearest even. Finite numbers beyond its range become the
    range's end with `bound`, else half of that; infinite ones and NaN stay."""
    if dtype not in HALVES:
        return array.astype(DTYPES[dtype].numpy())
    largest, _ = limits(dtype)
    beyond = np.isfinite(array) & (np.abs(array) > largest)
    if beyond.any():
        array = np.where(beyond, np.sign(array) * (largest if bound else largest / 2), array)
    return array.astype(DTYPES[dtype].numpy())


def decide(node: ir.Node, target: str, opset: int, *, beside: bool = False) -> tuple[str, str]:
    """The data type that a node computes in, where its fp32 values shall be `target`, and why if it is not that.

    `beside` says that a node which stays fp32 feeds this one.
    """
    if target not in HALVES:
        return target, ""
    reason = _loses(node, target, beside) or _lacks(node, target, opset)
    return ("fp32", reason) if reason else (target, "")


def _loses(node: ir.Node, target: str, beside: bool) -> str:
    """Why a node's results would be too far off in a type, or "": rules 2, 3 and 6, but for what `kept` says."""
    if is_fused(node):
        return ""
    if any(True for _ in _subgraphs(node)):
        return "what is in its subgraphs stays as it is"
    if node.domain not in ("", "ai.onnx"):
        return f"what {node.domain} allows is not known"
    if node.op_type in STAYS:
        return STAYS[node.op_type]
    if node.op_type == "Cast":
        source = node.inputs[0]
        assert source is not None
        exact = dtype_name(source) in (*EXACT_SOURCES, *HALVES, "fp32", "fp8e4m3", "fp8e5m2")
        return "" if exact else f"not every {dtype_name(source)} is a number of {target}"
    for value in node.inputs:
        if value is None or dtype_name(value) != "fp32":
            continue
        number = scalar(value)
        if number is not None and 0 < abs(number) < limits(target)[1]:
            return f"{number:g} is 0 or a denormal number in {target}"
    return "it is next to one that stays fp32" if beside and node.op_type in ARITHMETIC else ""


def _lacks(node: ir.Node, target: str, opset: int) -> str:
    """Why a node can't have a type, or "": rule 7."""
    if is_fused(node):
        return ""
    if not any(_allows(kinds, target) for kinds in (*_slots(node, opset), *_outputs(node, opset))):
        return f"ONNX has no {node.op_type} of {target}"
    # It has a `Pad` of bf16 from opset 21 on (1.32).
    if target == "bf16" and (node.op_type not in (*MOVING, "Cast") or (node.op_type == "Pad" and opset < 21)):
        return f"ONNX Runtime has no {node.op_type} of bf16: in fp32 between casts"
    return ""


class _Lowering:
    """One conversion: which data type every fp32 value of the original has now, and its casts to others."""

    def __init__(
        self,
        model: ir.Model,
        targets: Mapping[str, str],
        base: str,
        pinned: frozenset[ir.Value],
        extremes: Mapping[str, tuple[float, float]],
    ) -> None:
        self.model, self.graph, self.edit = model, model.graph, Editor(model)
        self.opset = model.opset_imports[""]
        self.targets, self.base, self.pinned = targets, base, pinned
        self.reasons: dict[str, str] = {}
        halves = [half for half in HALVES if half in (base, *targets.values())]
        self._kept = {half: kept(model, half, extremes, pinned) for half in halves}
        self._kinds: dict[ir.Node, str] = {}
        self._exact: set[ir.Node] = set()  # nodes that need fp32, and are not only without the lower type
        self._wide: set[ir.Value] = set()
        self._stream: set[ir.Value] = set()  # what residuals and norms take in fp32
        self._absorbing: set[ir.Value] = set()  # what attentions take in fp32
        self._versions: dict[tuple[ir.Value, str, bool], ir.Value] = {}
        self._home: dict[ir.Value, str] = {value: "fp32" for value in self.graph.inputs if dtype_name(value) == "fp32"}

    def run(self) -> None:
        stays: set[ir.Value] = set()  # values that nodes which stay fp32 give
        nodes = [node for node in self.graph if node.op_type != "Constant" or node.domain != ""]
        for node in nodes:
            target = self.targets.get(node.name or "", self.base)
            beside = any(value in stays for value in node.inputs if value is not None)
            numbers = self._kept.get(target, Kept()).reasons.get(node, "")
            kind, reason = ("fp32", numbers) if numbers else decide(node, target, self.opset, beside=beside)
            if reason and any(dtype_name(value) == "fp32" for value in node.outputs):
                self.reasons[node.name or node.op_type] = reason
                stays.update(node.outputs)
            self._kinds[node] = kind
            if kind == "fp32" and (target == "fp32" or numbers or _loses(node, target, beside)):
                self._exact.add(node)
        given = [value for node in nodes if is_fused(node) for value in node.outputs]
        self._wide = {value for value in given if self._stays_wide(value)}
        self._wide |= {value for found in self._kept.values() for value in found.wide}
        self._stream = stays | self._wide
        self._absorbing = {value for found in self._kept.values() for value in found.absorbing}
        for node in nodes:
            self._convert(node, "fp32" if self._is_before_steps(node) else self._kinds[node])
        self._outputs()

    def _is_before_steps(self, node: ir.Node) -> bool:
        """Whether a node does nothing but move what is fp32 to steps that quantise it: casts there and back would round
        it, and cost more than they save."""
        out, source = node.outputs[0], node.inputs[0] if node.inputs else None
        if node.domain != "" or node.op_type not in MOVING or source is None or out.is_graph_output():
            return False
        users = [user for user, _ in out.uses()]
        steps = [
            user for user in users if user.op_type == "QuantizeLinear" or self.targets.get(user.name or "") == "fp32"
        ]
        moved = node.inputs if node.op_type == "Concat" else [source]
        return (
            len(node.outputs) == 1
            and 0 < len(users) == len(steps)
            and all(value is not None and self._home.get(value) == "fp32" for value in moved)
        )

    def _stays_wide(self, value: ir.Value) -> bool:
        """Whether a layer's result is read by nodes that stay fp32, or is a sum that norms read, or part of one; and by
        none that take the lower type, but for residuals and norms."""
        maker, users = value.producer(), [(node, index) for node, index in value.uses()]
        assert maker is not None
        stays = [node for node, index in users if not self._takes_stream(node, index)]
        if value is not maker.outputs[0]:  # the sum that a norm has made
            return (bool(users) or value.is_graph_output()) and all(node in self._exact for node in stays)
        if value.is_graph_output():
            return not users
        if any(is_fused(node) and op_of(node) == NORM for node, _ in users):
            added = [node for node, _ in users if is_fused(node) and plugin_inputs(node).get("residual") is value]
            if added or "residual" in plugin_inputs(maker):
                return all(node in self._exact for node in stays)
        # A step that quantises takes the lower type through a cast, which costs nothing inside it.
        steps = [node for node in stays if node.op_type == "QuantizeLinear"]
        return len(stays) > len(steps) and all(node in self._exact for node in stays)

    def _takes_stream(self, node: ir.Node, index: int) -> bool:
        """Whether a node takes an input in fp32 for nothing but its bytes, and gives the lower type all the same."""
        return is_fused(node) and _plugin_names(node)[index] in STREAMS.get(op_of(node), ())

    def _convert(self, node: ir.Node, kind: str) -> None:
        wanted = list(self._wanted(node, kind))
        for index, want in wanted:
            value = node.inputs[index]
            assert value is not None
            if value not in self.pinned:
                node.replace_input_with(index, self._version(value, want, node))
        for graph in _subgraphs(node):
            self._subgraph(graph, node)
        if is_fused(node):
            self._fused(node, kind)
            return
        kinds = _outputs(node, self.opset)
        for index, value in enumerate(node.outputs):
            if dtype_name(value) != "fp32":
                continue
            allowed = kinds[min(index, len(kinds) - 1)] if kinds else frozenset()
            self._set(value, kind if kind == "fp32" or _allows(allowed, kind) else "fp32")
        out = node.outputs[0]
        if node.op_type == "Cast" and out in self._home:
            node.attributes["to"] = ir.AttrInt64("to", int(DTYPES[self._home[out]]))
        if node.op_type == "ConstantOfShape" and self._home.get(out, "fp32") != "fp32":
            given = node.attributes.get("value")
            array = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
            tensor = ir.tensor(converted(array, self._home[out]), dtype=DTYPES[self._home[out]])
            node.attributes["value"] = ir.AttrTensor("value", tensor)

    def _wanted(self, node: ir.Node, kind: str) -> Iterator[tuple[int, str]]:
        """The inputs that were fp32, and the data type in which the node takes each."""
        if is_fused(node):
            names = [name for name, value in zip(_plugin_names(node), node.inputs, strict=True) if value is not None]
            for index, name in enumerate(names):
                value = node.inputs[index]
                if self._is_ours(value):
                    wide = value in self._stream and self._takes_stream(node, index)
                    wide |= name == "bias" and value in self._absorbing
                    # A norm's sum has the residual's type.
                    wide |= name == "residual" and any(each in self._wide for each in node.outputs[1:])
                    yield index, "fp32" if name in FUSED_FP32 or wide else kind
            return
        slots = _slots(node, self.opset)
        for index, value in enumerate(node.inputs):
            if not self._is_ours(value):
                continue
            if node.op_type in _ANY:
                yield index, self._home.get(value, "fp32") if value is not None else "fp32"
                continue
            allowed = slots[min(index, len(slots) - 1)] if slots else frozenset()
            low = kind != "fp32" and _allows(allowed, kind) and index not in _FP32_SLOTS.get(node.op_type, ())
            yield index, kind if low else "fp32"

    def _is_ours(self, value: ir.Value | None) -> bool:
        return value is not None and (value in self._home or (is_constant(value) and dtype_name(value) == "fp32"))

    def _set(self, value: ir.Value, kind: str) -> None:
        self._home[value] = kind
        value.type = ir.TensorType(DTYPES[kind])  # a new one: values may share theirs

    def _fused(self, node: ir.Node, kind: str) -> None:
        """Writes the attributes that go with the new types."""
        out, *more = node.outputs
        inputs = plugin_inputs(node)
        operand = dtype_name(next(iter(inputs.values())))
        for value in more:
            if dtype_name(value) == "fp32":
                self._set(value, dtype_name(inputs["residual"]))
        if "precision" in node.attributes and operand != "fp32":
            node.attributes["precision"] = ir.AttrString("precision", "default")
        if dtype_name(out) != "fp32":
            return
        given = "fp32" if out in self._wide else kind
        node.attributes["out_dtype"] = ir.AttrString("out_dtype", "default" if given == operand else given)
        self._set(out, given)

    def _version(self, value: ir.Value, want: str, user: ir.Node) -> ir.Value:
        """A value in a data type: itself, a constant or a cast that is there already, or a new one."""
        if is_constant(value):
            if want == "fp32":
                return value
            bound = user.op_type in BOUNDS
            key = (value, want, bound)
            if key not in self._versions:
                array = constant(value)
                assert array is not None
                name = f"{value.name}_{want}"
                self._versions[key] = self.edit.constant(converted(array, want, bound=bound), name, DTYPES[want])
            return self._versions[key]
        if self._home[value] == want:
            return value
        key = (value, want, False)
        if key not in self._versions:
            cast = self.edit.node(
                "Cast", [value], value, DTYPES[want], base=f"{value.name}_{want}", attributes={"to": int(DTYPES[want])}
            )
            self.edit.after(value, cast)
            self._versions[key] = cast.outputs[0]
        return self._versions[key]

    def _subgraph(self, graph: ir.Graph, owner: ir.Node) -> None:
        """Gives a subgraph what it takes from outside in fp32."""
        for inner in graph.all_nodes():
            for index, value in enumerate(inner.inputs):
                if value is not None and value in self._home:
                    inner.replace_input_with(index, self._version(value, "fp32", owner))
        for index, value in enumerate(graph.outputs):
            if value in self._home:
                graph.outputs[index] = self._version(value, "fp32", owner)

    def _outputs(self) -> None:
        """Casts what the graph gives, so that it has the data type it had."""
        for index, value in enumerate(self.graph.outputs):
            if self._home.get(value, "fp32") == "fp32":
                continue
            name, inner = value.name, self.edit.name(f"{value.name}_{self._home[value]}")
            value.name = inner
            cast = self.edit.node("Cast", [value], value, DTYPES["fp32"], base=inner, attributes={"to": 1})
            cast.outputs[0].name = name
            self.graph.append(cast)
            self.graph.outputs[index] = cast.outputs[0]


def lower(
    model: ir.Model,
    targets: Mapping[str, str],
    base: str,
    *,
    pinned: frozenset[ir.Value] = frozenset(),
    extremes: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> dict[str, str]:
    """Converts the fp32 values of a model in place; see the module's docstring.

    `targets` has the data type of single nodes by name, `base` is that of all others; `pinned` are values that stay as
    they are wherever they go, `extremes` the least and largest numbers that were seen of values, by name. Gives the
    reason of every node that stays fp32, by name.
    """
    lowering = _Lowering(model, targets, base, pinned, extremes)
    lowering.run()
    return lowering.reasons


def _plugin_names(node: ir.Node) -> tuple[str, ...]:
    return tuple(plugin_inputs(node))


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


_TYPE = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)", "fp32": "tensor(float)"}


def _allows(kinds: frozenset[str], dtype: str) -> bool:
    return _TYPE[dtype] in kinds


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _slots(node: ir.Node, opset: int) -> list[frozenset[str]]:
    """The types that each input may have, by ONNX's schema; the last one's hold for all that follow."""
    schema = _schema(node, opset)
    return [] if schema is None else [frozenset(each.types) for each in schema.inputs]


def _outputs(node: ir.Node, opset: int) -> list[frozenset[str]]:
    schema = _schema(node, opset)
    return [] if schema is None else [frozenset(each.types) for each in schema.outputs]

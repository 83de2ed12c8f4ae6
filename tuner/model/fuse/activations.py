"""Activations as exporters write them → one node, `Activation` of the domain `tilewright.open`, that a chain may take
in. `spell_out` writes those that none took as standard operators again.

Constants stand second in a product or sum here; `constants_last` sees to that, so that each form is written once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import MatchResult, RewriteRuleClassBase, RewriteRuleSet, Var

from tilewright.kernels.activations import activation_name
from tilewright.tuner.model import bodies
from tilewright.tuner.model.fuse.opening import OPEN, in_main_graph
from tilewright.tuner.model.graph import dtype_name, is_constant, scalar
from tilewright.tuning_db.errors import UsageError

CLOSE = 2e-5
"""How far, relatively, a constant may be from what the formula has: exporters write √2 with 5 digits and more."""


def constants_last(model: ir.Model) -> None:
    """Swaps the operands of a sum, product, maximum or minimum whose first alone is constant."""
    for node in model.graph:
        if node.domain == "" and node.op_type in ("Add", "Max", "Min", "Mul") and len(node.inputs) == 2:
            first, second = node.inputs
            if is_constant(first) and not is_constant(second):
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)


class _Form(RewriteRuleClassBase):
    """One way in which an activation is written, with the values that its constants have."""

    def __init__(self, name: str, form: Callable[..., Any], constants: dict[str, float]) -> None:
        super().__init__(name)
        self._form, self._constants = form, constants

    def pattern(self, op: Any, x: Any) -> Any:
        return self._form(op, x, *(Var(name) for name in self._constants))

    def check(self, context: Any, x: ir.Value, **bound: Any) -> MatchResult:
        if not in_main_graph(context):
            return MatchResult().fail("inside a control-flow node")
        if dtype_name(x) not in ("fp32", "fp16", "bf16"):
            return MatchResult().fail(f"x is {dtype_name(x)}")
        for name, wanted in self._constants.items():
            value = scalar(bound[name])
            # Half precision has 3 digits.
            close = CLOSE if dtype_name(x) == "fp32" else 5e-3
            if value is None or not math.isclose(value, wanted, rel_tol=close):
                return MatchResult().fail(f"{name} is {value} and not {wanted}")
        return MatchResult()

    def rewrite(self, op: Any, x: ir.Value, **bound: Any) -> ir.Value:
        return op.Activation(x, activation=activation_name(self.name), _domain=OPEN)  # type: ignore[no-any-return]


def _gelu_forms(gate: Callable[..., Any], count: int) -> Iterator[Callable[..., Any]]:
    """0.5 · x · (1 + gate), in the orders of exporters; `gate` takes x and so many constants."""

    def parts(op: Any, x: Any, constants: tuple[Any, ...]) -> tuple[Any, Any]:
        *inner, one, half = constants
        assert len(inner) == count
        return op.Add(gate(op, x, *inner), one), half

    def x_first(op: Any, x: Any, *constants: Any) -> Any:
        outer, half = parts(op, x, constants)
        return op.Mul(op.Mul(x, outer), half)

    def x_second(op: Any, x: Any, *constants: Any) -> Any:
        outer, half = parts(op, x, constants)
        return op.Mul(op.Mul(outer, x), half)

    def halved_x(op: Any, x: Any, *constants: Any) -> Any:
        outer, half = parts(op, x, constants)
        return op.Mul(op.Mul(x, half), outer)

    def halved_x_second(op: Any, x: Any, *constants: Any) -> Any:
        outer, half = parts(op, x, constants)
        return op.Mul(outer, op.Mul(x, half))

    def halved_gate(op: Any, x: Any, *constants: Any) -> Any:
        outer, half = parts(op, x, constants)
        return op.Mul(x, op.Mul(outer, half))

    def halved_gate_first(op: Any, x: Any, *constants: Any) -> Any:
        outer, half = parts(op, x, constants)
        return op.Mul(op.Mul(outer, half), x)

    yield from (x_first, x_second, halved_x, halved_x_second, halved_gate, halved_gate_first)


def _cubes() -> Iterator[tuple[Callable[..., Any], dict[str, float]]]:
    """x³."""
    yield lambda op, x, three: op.Pow(x, three), {"three": 3.0}
    yield lambda op, x: op.Mul(op.Mul(x, x), x), {}
    yield lambda op, x: op.Mul(x, op.Mul(x, x)), {}


def _tanh_gates() -> Iterator[tuple[Callable[..., Any], dict[str, float]]]:
    """tanh(√(2/π) · (x + 0.044715 · x³))."""
    for cube, exponent in _cubes():

        def x_first(op: Any, x: Any, *constants: Any, cube: Any = cube) -> Any:
            *inner, factor, root = constants
            return op.Tanh(op.Mul(op.Add(x, op.Mul(cube(op, x, *inner), factor)), root))

        def cube_first(op: Any, x: Any, *constants: Any, cube: Any = cube) -> Any:
            *inner, factor, root = constants
            return op.Tanh(op.Mul(op.Add(op.Mul(cube(op, x, *inner), factor), x), root))

        values = {**exponent, "factor": 0.044715, "root": math.sqrt(2 / math.pi)}
        yield x_first, values
        yield cube_first, values


def _fast_gates() -> Iterator[tuple[Callable[..., Any], dict[str, float]]]:
    """The same with x taken out, tanh(√(2/π) · x · (1 + 0.044715 · x · x)), as Megatron, BLOOM and FastGELU have it."""
    squares: tuple[Callable[..., Any], ...] = (
        lambda op, x, factor: op.Mul(op.Mul(x, factor), x),
        lambda op, x, factor: op.Mul(x, op.Mul(x, factor)),
        lambda op, x, factor: op.Mul(op.Mul(x, x), factor),
    )
    for square in squares:

        def gate(op: Any, x: Any, root: Any, factor: Any, unit: Any, square: Any = square) -> Any:
            return op.Tanh(op.Mul(op.Mul(x, root), op.Add(square(op, x, factor), unit)))

        yield gate, {"root": math.sqrt(2 / math.pi), "factor": 0.044715, "unit": 1.0}


def _forms() -> Iterator[tuple[str, Callable[..., Any], dict[str, float]]]:
    root = {"root": math.sqrt(2)}
    for gate, constants in (
        (lambda op, x, root: op.Erf(op.Div(x, root)), root),
        (lambda op, x, root: op.Erf(op.Mul(x, root)), {"root": 1 / math.sqrt(2)}),
    ):
        for form in _gelu_forms(gate, 1):
            yield "gelu_erf", form, {**constants, "one": 1.0, "half": 0.5}
    for gate, constants in (*_tanh_gates(), *_fast_gates()):
        for form in _gelu_forms(gate, len(constants)):
            yield "gelu_tanh", form, {**constants, "one": 1.0, "half": 0.5}
    for name, inner, constants in (
        ("silu", lambda op, x: op.Sigmoid(x), {}),
        ("quick_gelu", lambda op, x, by: op.Sigmoid(op.Mul(x, by)), {"by": 1.702}),
    ):
        yield name, lambda op, x, *c, inner=inner: op.Mul(x, inner(op, x, *c)), constants
        yield name, lambda op, x, *c, inner=inner: op.Mul(inner(op, x, *c), x), constants
    yield from _hardswish_forms()
    yield "relu2", lambda op, x, two: op.Pow(op.Relu(x), two), {"two": 2.0}
    yield "relu2", _squared_relu, {}


def _squared_relu(op: Any, x: Any) -> Any:
    positive = op.Relu(x)
    return op.Mul(positive, positive)


def _hardswish_forms() -> Iterator[tuple[str, Callable[..., Any], dict[str, float]]]:
    """x · clip(x + 3, 0, 6) / 6, of Howard et al. 2019, arXiv:1905.02244."""
    clipped = {"three": 3.0, "low": 0.0, "high": 6.0}

    def clip(op: Any, x: Any, three: Any, low: Any, high: Any) -> Any:
        return op.Clip(op.Add(x, three), low, high)

    def times(op: Any, x: Any, gate: Any, swap: bool) -> Any:
        return op.Mul(gate, x) if swap else op.Mul(x, gate)

    for last, constants in (("Div", {**clipped, "six": 6.0}), ("Mul", {**clipped, "sixth": 1 / 6})):
        for swap in (False, True):

            def product_first(op: Any, x: Any, *c: Any, last: str = last, swap: bool = swap) -> Any:
                return getattr(op, last)(times(op, x, clip(op, x, *c[:3]), swap), c[3])

            def gate_first(op: Any, x: Any, *c: Any, last: str = last, swap: bool = swap) -> Any:
                return times(op, x, getattr(op, last)(clip(op, x, *c[:3]), c[3]), swap)

            yield "hardswish", product_first, constants
            yield "hardswish", gate_first, constants


class _OneOperator(RewriteRuleClassBase):
    """An activation that is one operator with parameters."""

    def __init__(self, operator: str, name_of: Callable[[ir.Node], str | None]) -> None:
        super().__init__(operator)
        self._operator, self._name_of = operator, name_of

    def pattern(self, op: Any) -> Any:
        return getattr(op, self._operator)(_allow_other_inputs=True, _allow_other_attributes=True, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> MatchResult:
        node = out.producer()
        assert node is not None
        assert node.inputs[0] is not None
        result = MatchResult()
        if not in_main_graph(context):
            return result.fail("inside a control-flow node")
        if dtype_name(node.inputs[0]) not in ("fp32", "fp16", "bf16"):
            return result.fail("not of floats")
        name = self._name_of(node)
        try:
            return result if name is not None and activation_name(name) else result.fail("no activation of the kernels")
        except UsageError as error:
            return result.fail(str(error))

    def rewrite(self, op: Any, out: ir.Value, **_: Any) -> ir.Value:
        node = out.producer()
        assert node is not None
        name = activation_name(self._name_of(node))
        made: ir.Value = op.Activation(node.inputs[0], activation=name, _domain=OPEN)
        maker = made.producer()
        assert maker is not None
        maker.name = node.name  # it may stay a node of its own
        return made


def _clip(node: ir.Node) -> str | None:
    low, high = ([*node.inputs[1:], None, None])[:2]
    bounds = [scalar(value) for value in (low, high)]
    if low is not None and bounds[0] == 0 and high is None:
        return "relu"
    return _clamp(*bounds)


def _shortest(number: float) -> str:
    """The shortest text of a number of fp32: 0.1 of what is next to 0.1 there."""
    return str(np.float32(number))


def _max(node: ir.Node) -> str | None:
    return "relu" if len(node.inputs) == 2 and scalar(node.inputs[1]) == 0 else None


def _gelu(node: ir.Node) -> str:
    return {"tanh": "gelu_tanh"}.get(node.attributes.get_string("approximate", "none") or "", "gelu_erf")


def _leaky(node: ir.Node) -> str:
    return f"leaky_relu:{_shortest(float(node.attributes.get_float('alpha', 0.01)))}"


def _swish(node: ir.Node) -> str | None:
    return {1.0: "silu", 1.702: "quick_gelu"}.get(round(float(node.attributes.get_float("alpha", 1.0)), 6))


_OPERATORS: dict[str, Callable[[ir.Node], str | None]] = {
    "Clip": _clip,
    "Gelu": _gelu,
    "LeakyRelu": _leaky,
    "Max": _max,
    "Swish": _swish,
    "Relu": lambda node: "relu",
    "Sigmoid": lambda node: "sigmoid",
    "Tanh": lambda node: "tanh",
    "Softplus": lambda node: "softplus",
    "HardSwish": lambda node: "hardswish",
}


class _Bounded(RewriteRuleClassBase):
    """A clamp of two operators: the least of a number and of x, or of `Relu`, that is kept above another."""

    FORMS: tuple[Callable[..., Any], ...] = (
        lambda op, x, low, high: op.Min(op.Max(x, low), high),
        lambda op, x, low, high: op.Max(op.Min(x, high), low),
        lambda op, x, low, high: op.Min(op.Relu(x), high),
    )

    def __init__(self, form: Callable[..., Any]) -> None:
        super().__init__("clamp")
        self._form = form

    def pattern(self, op: Any, x: Any, low: Any, high: Any) -> Any:
        return self._form(op, x, low, high)

    def check(self, context: Any, x: ir.Value, low: ir.Value | None, high: ir.Value, **_: Any) -> MatchResult:
        if not in_main_graph(context) or dtype_name(x) not in ("fp32", "fp16", "bf16"):
            return MatchResult().fail("not of floats in the main graph")
        name = _clamp(None if low is None else scalar(low), scalar(high), relu=low is None)
        try:
            return MatchResult() if name and activation_name(name) else MatchResult().fail("bounds are no constants")
        except UsageError as error:
            return MatchResult().fail(str(error))

    def rewrite(self, op: Any, x: ir.Value, low: ir.Value | None, high: ir.Value, **_: Any) -> ir.Value:
        name = _clamp(None if low is None else scalar(low), scalar(high), relu=low is None)
        return op.Activation(x, activation=activation_name(name), _domain=OPEN)  # type: ignore[no-any-return]


def _clamp(low: float | None, high: float | None, *, relu: bool = False) -> str | None:
    low = 0.0 if relu else low
    return None if low is None or high is None else f"clamp:{_shortest(low)}:{_shortest(high)}"


def _hard_sigmoid_times(op: Any, x: Any) -> Any:
    return op.HardSigmoid(x, _allow_other_attributes=True, _outputs=["gate"])


class _HardSwishOfSigmoid(RewriteRuleClassBase):
    """x · HardSigmoid(x) with alpha 1/6 and beta 1/2."""

    def __init__(self, x_first: bool) -> None:
        super().__init__("hardswish")
        self._x_first = x_first

    def pattern(self, op: Any, x: Any) -> Any:
        gate = _hard_sigmoid_times(op, x)
        return op.Mul(x, gate) if self._x_first else op.Mul(gate, x)

    def check(self, context: Any, x: ir.Value, gate: ir.Value, **_: Any) -> MatchResult:
        node = gate.producer()
        assert node is not None
        alpha, beta = node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5)
        right = (
            in_main_graph(context)
            and math.isclose(alpha, 1 / 6, rel_tol=CLOSE)
            and math.isclose(beta, 0.5, rel_tol=CLOSE)
        )
        return MatchResult() if right else MatchResult().fail(f"{alpha=}, {beta=}")

    def rewrite(self, op: Any, x: ir.Value, gate: ir.Value, **_: Any) -> ir.Value:
        return op.Activation(x, activation="hardswish", _domain=OPEN)  # type: ignore[no-any-return]


@functools.cache
def rules() -> tuple[RewriteRuleSet, ...]:
    """The rules, to be applied one set after the other: forms of several operators before those that are one, for what
    begins a form may be an activation by itself."""
    written = [_Form.rule(name, form, constants) for name, form, constants in _forms()]
    written += [_Bounded.rule(form) for form in _Bounded.FORMS]
    written += [_HardSwishOfSigmoid.rule(first) for first in (True, False)]
    single = [_OneOperator.rule(operator, name_of) for operator, name_of in _OPERATORS.items()]
    return RewriteRuleSet(written), RewriteRuleSet(single)


def spell_out(model: ir.Model) -> None:
    """Writes activations that no chain took in as standard operators, in the data type that they are of."""
    for node in list(model.graph):
        if node.domain != OPEN or node.op_type != "Activation":
            continue
        source = node.inputs[0]
        assert source is not None
        op = bodies.Writer()
        kind = dtype_name(source)
        value = bodies.activate(op, source, node.attributes["activation"].as_string(), kind)
        for index, each in enumerate(op.nodes):
            alone = len(op.nodes) == 1
            each.name = node.name if alone or not node.name else f"{node.name}_{each.op_type}_{index}"
            for made in each.outputs:
                made.name = f"{node.outputs[0].name}_{each.op_type}_{index}"
                made.type = made.type or source.type
                made.shape = ir.Shape([]) if each.op_type == "Constant" else source.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], op.nodes, node.outputs, [value])

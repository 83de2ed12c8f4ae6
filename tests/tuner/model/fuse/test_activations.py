"""Activations are recognised in every way of writing them, and written out again where no chain takes them."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from tests.tuner.model.fuse.forms import Graph, fused, operators
from tests.tuner.model.graphs import relative_error, results
from tilewright.kernels.activations import ACTIVATIONS, activation, activation_name
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.fuse.activations import _OPERATORS
from tilewright.tuner.model.graph import fused_nodes, plugin_settings

KINDS = {"fp32": np.float32, "fp16": np.float16}
TANH = math.sqrt(2 / math.pi)


class Form:
    """One form: writes an activation of `x`; `c` makes a constant, `mul` and `add` put constants on either side."""

    def __init__(self, kind: str, constants_first: bool) -> None:
        self.g = Graph()
        self._kind, self._first = KINDS[kind], constants_first

    def c(self, value: float) -> str:
        return self.g.array(value, self._kind)

    def _with(self, operator: str, x: str, number: float) -> str:
        return self.g(operator, *((self.c(number), x) if self._first else (x, self.c(number))))

    def mul(self, x: str, number: float) -> str:
        return self._with("Mul", x, number)

    def add(self, x: str, number: float) -> str:
        return self._with("Add", x, number)


def erf_by_division(f: Form, x: str) -> str:
    return f.add(f.g("Erf", f.g("Div", x, f.c(math.sqrt(2)))), 1)


def erf_by_factor(f: Form, x: str) -> str:
    return f.add(f.g("Erf", f.mul(x, 0.70710678)), 1)


def tanh_of_power(f: Form, x: str) -> str:
    cube = f.g("Pow", x, f.c(3))
    return f.add(f.g("Tanh", f.mul(f.g("Add", x, f.mul(cube, 0.044715)), TANH)), 1)


def tanh_of_products(f: Form, x: str) -> str:
    cube = f.g("Mul", f.g("Mul", x, x), x)
    return f.add(f.g("Tanh", f.mul(f.g("Add", f.mul(cube, 0.044715), x), TANH)), 1)


def tanh_of_square_first(f: Form, x: str) -> str:
    cube = f.g("Mul", x, f.g("Mul", x, x))
    return f.add(f.g("Tanh", f.mul(f.g("Add", x, f.mul(cube, 0.044715)), 0.7978845608)), 1)


def fast_tanh(f: Form, x: str) -> str:
    """Megatron's, and Hugging Face's FastGELU and BLOOM: x · √(2/π) · (1 + 0.044715 · x · x)."""
    inner = f.add(f.g("Mul", f.mul(x, 0.044715), x), 1)
    return f.add(f.g("Tanh", f.g("Mul", f.mul(x, 0.7978845608), inner)), 1)


def fast_tanh_of_square(f: Form, x: str) -> str:
    inner = f.add(f.mul(f.g("Mul", x, x), 0.044715), 1)
    return f.add(f.g("Tanh", f.g("Mul", f.mul(x, 0.79788456), inner)), 1)


GELUS = {
    "x times gate, halved": lambda f, x, gate: f.mul(f.g("Mul", x, gate), 0.5),
    "gate times x, halved": lambda f, x, gate: f.mul(f.g("Mul", gate, x), 0.5),
    "half x times gate": lambda f, x, gate: f.g("Mul", f.mul(x, 0.5), gate),
    "gate times half x": lambda f, x, gate: f.g("Mul", gate, f.mul(x, 0.5)),
    "x times half the gate": lambda f, x, gate: f.g("Mul", x, f.mul(gate, 0.5)),
    "half the gate times x": lambda f, x, gate: f.g("Mul", f.mul(gate, 0.5), x),
}
GATES = {
    erf_by_division: "gelu_erf",
    erf_by_factor: "gelu_erf",
    tanh_of_power: "gelu_tanh",
    tanh_of_products: "gelu_tanh",
    tanh_of_square_first: "gelu_tanh",
    fast_tanh: "gelu_tanh",
    fast_tanh_of_square: "gelu_tanh",
}


def clipped(f: Form, x: str) -> str:
    return f.g("Clip", f.add(x, 3), f.c(0), f.c(6))


OTHERS = {
    "relu": lambda f, x: f.g("Relu", x),
    "relu: clip": lambda f, x: f.g("Clip", x, f.c(0)),
    "relu: max": lambda f, x: f._with("Max", x, 0),
    "sigmoid": lambda f, x: f.g("Sigmoid", x),
    "tanh": lambda f, x: f.g("Tanh", x),
    "softplus": lambda f, x: f.g("Softplus", x),
    "leaky_relu:0.2": lambda f, x: f.g("LeakyRelu", x, alpha=0.2),
    "clamp:0:6": lambda f, x: f.g("Clip", x, f.c(0), f.c(6)),
    "clamp:0:6 of relu": lambda f, x: f.g("Min", f.g("Relu", x), f.c(6)),
    "clamp:0.125:0.75 of max and min": lambda f, x: f._with("Min", f._with("Max", x, 0.125), 0.75),
    "clamp:-1.5:2 of min and max": lambda f, x: f._with("Max", f._with("Min", x, 2), -1.5),
    "clamp:-1:2": lambda f, x: f.g("Clip", x, f.c(-1), f.c(2)),
    "gelu_erf": lambda f, x: f.g("Gelu", x),
    "gelu_tanh": lambda f, x: f.g("Gelu", x, approximate="tanh"),
    "silu": lambda f, x: f.g("Mul", x, f.g("Sigmoid", x)),
    "silu: sigmoid first": lambda f, x: f.g("Mul", f.g("Sigmoid", x), x),
    "quick_gelu": lambda f, x: f.g("Mul", x, f.g("Sigmoid", f.mul(x, 1.702))),
    "quick_gelu: sigmoid first": lambda f, x: f.g("Mul", f.g("Sigmoid", f.mul(x, 1.702)), x),
    "relu2": lambda f, x: f.g("Pow", f.g("Relu", x), f.c(2)),
    "relu2: product": lambda f, x: f.g("Mul", r := f.g("Relu", x), r),
    "hardswish": lambda f, x: f.g("HardSwish", x),
    "hardswish: divided last": lambda f, x: f.g("Div", f.g("Mul", x, clipped(f, x)), f.c(6)),
    "hardswish: gate first": lambda f, x: f.g("Div", f.g("Mul", clipped(f, x), x), f.c(6)),
    "hardswish: gate divided": lambda f, x: f.g("Mul", x, f.g("Div", clipped(f, x), f.c(6))),
    "hardswish: gate times a sixth": lambda f, x: f.g("Mul", x, f.mul(clipped(f, x), 1 / 6)),
    "hardswish: times a sixth last": lambda f, x: f.mul(f.g("Mul", x, clipped(f, x)), 1 / 6),
    "hardswish: hard sigmoid": lambda f, x: f.g("Mul", x, f.g("HardSigmoid", x, alpha=1 / 6, beta=0.5)),
    "hardswish: hard sigmoid first": lambda f, x: f.g("Mul", f.g("HardSigmoid", x, alpha=1 / 6, beta=0.5), x),
}
"""By the canonical name, and what is special."""

CASES = [
    *((f"{gate.__name__}, {form}", name, gate, form) for (gate, name), form in itertools.product(GATES.items(), GELUS)),
    *((title, title.partition(": ")[0].partition(" of ")[0], None, title) for title in OTHERS),
]


def written(case, f: Form, x: str) -> str:
    _, _, gate, form = case
    return OTHERS[form](f, x) if gate is None else GELUS[form](f, x, gate(f, x))


def after_a_product(case, kind: str, constants_first: bool) -> tuple[Graph, str]:
    """An activation of x·W + b; b has the constant second."""
    f = Form(kind, constants_first)
    x = f.g.input("x", 8, 16, dtype=kind)
    weights = np.random.default_rng(1).standard_normal((16, 24)).astype(KINDS[kind]) / 4
    product = f.g(
        "Add", f.g("MatMul", x, f.g.array(weights, KINDS[kind])), f.g.array(np.linspace(-1, 1, 24), KINDS[kind])
    )
    return f.g, written(case, f, product)


@pytest.mark.parametrize(("kind", "constants_first"), [("fp32", False), ("fp32", True), ("fp16", False)])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_form_becomes_the_end_of_a_product(case, kind, constants_first):
    g, out = after_a_product(case, kind, constants_first)
    # A model in fp16 rounds after every operator; the fused node does once.
    model, _ = fused(g, out, within=1e-5 if kind == "fp32" else 1e-2)
    (node,) = fused_nodes(model)
    assert node.op_type == "FusedGemmBias"
    assert plugin_settings(node)["activation"] == activation_name(case[1])
    assert operators(model) == ["FusedGemmBias"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case[2] is None or case[3] == "half x times gate"], ids=lambda case: case[0]
)
def test_what_no_product_takes_in_is_written_out(case, kind):
    f = Form(kind, False)
    out = written(case, f, f.g.input("x", 4, 33, dtype=kind))
    model, report = fused(f.g, out, within=1e-6 if kind == "fp32" else 1e-2)
    assert not fused_nodes(model)
    assert not report.matches
    assert all(node.domain == "" for node in model.graph)
    x = f.g.feeds()["x"]
    wanted = activation(activation_name(case[1]))(x.astype(np.float64))
    assert relative_error(results(model, {"x": x})[0], wanted) <= (1e-6 if kind == "fp32" else 4e-3)


@pytest.mark.parametrize(
    "form",
    [
        lambda f, x: f.g("Mul", x, f.g("Sigmoid", f.mul(x, 1.5))),
        lambda f, x: GELUS["half x times gate"](f, x, f.add(f.g("Erf", f.mul(x, 0.8)), 1)),
        lambda f, x: GELUS["half x times gate"](f, x, f.add(f.g("Erf", f.mul(x, 0.70710678)), 2)),
        lambda f, x: f.g("Mul", x, f.g("HardSigmoid", x, alpha=0.2, beta=0.5)),
        lambda f, x: f.g("Mul", x, f.g("Div", f.g("Clip", f.add(x, 3), f.c(0), f.c(5)), f.c(6))),
    ],
    ids=lambda form: inspect.getsource(form).strip()[:60],
)
def test_other_constants_are_other_functions(form):
    f = Form("fp32", False)
    product = f.g("MatMul", f.g.input("x", 8, 16), f.g.array(np.random.default_rng(1).standard_normal((16, 24))))
    model, _ = fused(f.g, form(f, product))
    (node,) = fused_nodes(model)
    assert plugin_settings(node)["activation"] == "none"


def named_between(start: str, end: str) -> list[str]:
    """What docs/models.md has in backticks from one text to another."""
    page = (Path(__file__).parents[4] / "docs/models.md").read_text()
    return re.findall("`(.+?)`", page.partition(start)[2].partition(end)[0])


def test_every_activation_of_the_kernels_is_recognised_in_some_form():
    assert {case[1].partition(":")[0] for case in CASES} == set(ACTIVATIONS) - {"none"}


def test_the_page_names_the_operators_that_are_activations():
    assert named_between("As one operator:", "Written out:") == sorted(_OPERATORS)


@pytest.mark.parametrize("operator", named_between("Others end a chain:", "\n\n"))
def test_the_page_names_operators_that_are_none(operator):
    g = Graph(22)
    product = g("MatMul", g.input("x", 8, 16), g.array(np.random.default_rng(1).standard_normal((16, 24))))
    model, _ = fused(g, g(operator, product, *([g.array(0.5)] if operator == "PRelu" else [])))
    assert operators(model) == sorted(["FusedGemm", operator])


def test_a_constant_of_several_elements_is_no_constant_of_a_formula():
    g = Graph()
    x = g.input("x", 8, 24)
    by = np.full(24, 1.702)
    by[3] = 1
    product = g("MatMul", x, g.array(np.random.default_rng(1).standard_normal((24, 24))))
    model, _ = fused(g, g("Mul", product, g("Sigmoid", g("Mul", product, g.array(by)))))
    assert plugin_settings(fused_nodes(model)[0])["activation"] == "none"


def test_two_of_one_kind_keep_their_names_apart():
    g = Graph()
    x = g.input("x", 4, 8)
    for _ in range(2):
        x = g("Clip", x, g.array(-1.0), g.array(0.5))
    model = g.model(x)
    fuse(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert np.array_equal(results(model, g.feeds())[0], np.clip(g.feeds()["x"], -1, 0.5))

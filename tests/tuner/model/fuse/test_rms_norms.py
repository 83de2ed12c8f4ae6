"""RMS norms that are written out, and ONNX's operator, become one fused node, and only they."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fuse.forms import Graph, fused, only_fused
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.kernels.tensorrt.catalogue import plugin_attributes
from tilewright.tuner.model.fuse import FusionReport, fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs, plugin_settings
from tilewright.tuner.model.workloads import problem_of

WIDTH = 16
SHAPE = (2, 4, WIDTH)
WEIGHT = 1 + normal(1, WIDTH) / 4
KINDS = {"fp32": np.float32, "fp16": np.float16}
PLAIN, WEIGHTED = "FusedRmsNorm", "FusedRmsNormWeight"


class Norm:
    """Writes a norm of `x` in a data type."""

    def __init__(self, dtype: str = "fp32", *, opset: int = 21) -> None:
        self.g, self.dtype = Graph(opset), dtype
        self.epsilon, self.axes = 1e-5, (-1,)

    def c(self, values: object, dtype: str = "fp32") -> str:
        return self.g.array(values, KINDS[dtype])

    def mean(self, square: str) -> str:
        return str(self.g("ReduceMean", square, self.g.shape(*self.axes)))

    def root(self, x: str) -> str:
        mean = self.mean(self.g("Pow", x, self.c(2)))
        return str(self.g("Sqrt", self.g("Add", mean, self.c(self.epsilon))))

    def normed(self, x: str) -> str:
        return str(self.g("Mul", x, self.g("Reciprocal", self.root(x))))

    def wide(self, x: str) -> str:
        return x if self.dtype == "fp32" else str(self.g("Cast", x, to=1))

    def back(self, y: str) -> str:
        return y if self.dtype == "fp32" else str(self.g("Cast", y, to=10))


def llama(n: Norm, x: str) -> str:
    """As Hugging Face's Llama: cast back, then the weight."""
    return str(n.g("Mul", n.c(WEIGHT, n.dtype), n.back(n.normed(n.wide(x)))))


def gemma(n: Norm, x: str) -> str:
    """As Gemma: weight, then cast back."""
    return n.back(n.g("Mul", n.normed(n.wide(x)), n.c(1 + WEIGHT)))


def one_over_the_root(n: Norm, x: str) -> str:
    x = n.wide(x)
    return n.back(n.g("Mul", n.g("Mul", x, n.g("Div", n.c(1), n.root(x))), n.c(WEIGHT)))


def quotient(n: Norm, x: str) -> str:
    x = n.wide(x)
    return n.back(n.g("Mul", n.g("Div", x, n.root(x)), n.c(WEIGHT.reshape(1, 1, WIDTH))))


def power(n: Norm, x: str) -> str:
    x = n.wide(x)
    added = n.g("Add", n.c([n.epsilon]), n.mean(n.g("Mul", x, x)))
    return n.back(n.g("Mul", n.g("Mul", n.g("Pow", added, n.c(-0.5)), x), n.c(WEIGHT)))


def root_as_power(n: Norm, x: str) -> str:
    x = n.wide(x)
    added = n.g("Add", n.mean(n.g("Mul", x, x)), n.c(n.epsilon))
    return n.back(n.g("Mul", n.g("Div", x, n.g("Pow", added, n.c(0.5))), n.c(WEIGHT)))


def weighted_inverse(n: Norm, x: str) -> str:
    """As Flax: the weight goes to the inverse root."""
    x = n.wide(x)
    return n.back(n.g("Mul", x, n.g("Mul", n.g("Reciprocal", n.root(x)), n.c(WEIGHT))))


def cast_twice(n: Norm, x: str) -> str:
    """As T5: the squares are of one cast, the product of another."""
    return n.back(n.g("Mul", n.g("Mul", n.wide(x), n.g("Reciprocal", n.root(n.wide(x)))), n.c(WEIGHT)))


def inverse_in_the_type_of_x(n: Norm, x: str) -> str:
    y = n.g("Mul", x, n.back(n.g("Reciprocal", n.root(n.wide(x)))))
    return str(n.g("Mul", y, n.c(WEIGHT, n.dtype)))


FORMS = (
    llama,
    gemma,
    one_over_the_root,
    quotient,
    power,
    root_as_power,
    weighted_inverse,
    cast_twice,
    inverse_in_the_type_of_x,
)


def made(norm: Norm, form: Callable[[Norm, str], str]) -> tuple[ir.Model, ir.Model, FusionReport]:
    """A model before and after fusing."""
    y = form(norm, norm.g.input("x", *SHAPE, dtype=norm.dtype))
    before, after = norm.g.model(y), norm.g.model(y)
    return before, after, fuse(after)


def same(before: ir.Model, after: ir.Model, dtype: str = "fp32") -> None:
    """Both compute the same, whatever the size of the numbers is."""
    for size in (1, 1e-3, 300):
        feeds = {"x": (size * normal(5, *SHAPE)).astype(KINDS[dtype])}
        (wanted,), (got,) = results(before, feeds), results(after, feeds)
        assert got.dtype == wanted.dtype
        assert relative_error(got, wanted) < (1e-6 if dtype == "fp32" else 2e-3)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_norm_is_one_node(form: Callable[[Norm, str], str], dtype: str) -> None:
    before, after, report = made(Norm(dtype), form)
    (node,) = after.graph
    assert only_fused(after, WEIGHTED) is node
    assert node.inputs[0] is after.graph.inputs[0]
    out = before.graph.outputs[0]
    assert node.outputs[0].name == out.name
    assert node.name == next(each.name for each in before.graph if each.outputs[0] is out)
    assert set(node.attributes) == {*plugin_attributes(WEIGHTED), "plugin_namespace", "plugin_version"}
    settings = plugin_settings(node)
    assert settings["eps"] == float(np.float32(1e-5))
    assert settings["out_dtype"] == "default"
    assert report.counts() == {"rms_norm": 1}
    assert report.misses == ()
    assert report.ends == {node.name: "its result is an output of the model"}
    problem = problem_of(node).to_dict()
    assert (problem["M"], problem["N"], problem["dtype"]) == (8, WIDTH, dtype)
    same(before, after, dtype)


def without_weight(n: Norm, x: str) -> str:
    return n.back(n.normed(n.wide(x)))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_norm_without_a_weight(dtype: str) -> None:
    before, after, _ = made(Norm(dtype), without_weight)
    assert [node.op_type for node in after.graph] == [PLAIN]
    same(before, after, dtype)


def never_cast_back(n: Norm, x: str) -> str:
    return str(n.g("Mul", n.normed(n.wide(x)), n.c(WEIGHT)))


def test_the_result_has_the_type_that_the_model_gives_it() -> None:
    before, after, _ = made(Norm("fp16"), never_cast_back)
    assert plugin_settings(only_fused(after, WEIGHTED))["out_dtype"] == "fp32"
    same(before, after, "fp16")


def test_a_cast_that_others_read_stays() -> None:
    n = Norm("fp16")
    x = n.wide(n.g.input("x", *SHAPE, dtype="fp16"))
    y = n.g("Add", x, n.g("Mul", n.normed(x), n.c(WEIGHT)))
    model, _ = fused(n.g, y)
    node = only_fused(model, WEIGHTED)
    assert node.inputs[0] is model.graph.inputs[0]
    assert [each.op_type for each in model.graph] == ["Cast", WEIGHTED, "Add"]


def test_two_norms_may_share_a_root() -> None:
    n = Norm()
    x = n.g.input("x", *SHAPE)
    y = n.normed(x)
    model, _ = fused(n.g, *(str(n.g("Mul", y, n.c(weight))) for weight in (WEIGHT, 2 - WEIGHT)))
    # The quotient has two readers: the norm ends there.
    assert [node.op_type for node in model.graph] == [PLAIN, "Mul", "Mul"]
    n = Norm()
    x = n.g.input("x", *SHAPE)
    inverse = n.g("Reciprocal", n.root(x))
    weighted = [str(n.g("Mul", n.g("Mul", x, inverse), n.c(weight))) for weight in (WEIGHT, 2 - WEIGHT)]
    model, _ = fused(n.g, *weighted)
    assert [node.op_type for node in model.graph] == [WEIGHTED, WEIGHTED]


def test_a_weight_that_is_computed() -> None:
    n = Norm()
    x = n.g.input("x", *SHAPE)
    weight = n.g("Add", n.g.input("w", WIDTH), n.c(1))
    model, _ = fused(n.g, str(n.g("Mul", n.normed(x), weight)))
    assert plugin_inputs(only_fused(model, WEIGHTED))["weight"].producer().op_type == "Add"  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(4, 1), (2, 1, 1), (4, WIDTH), (3, 2, 4, WIDTH)])
def test_factors_that_are_no_weight_come_after_it(shape: tuple[int, ...]) -> None:
    n = Norm()
    y = n.g("Mul", n.normed(n.g.input("x", *SHAPE)), n.c(1 + normal(6, *shape)))
    model, _ = fused(n.g, y)
    assert [node.op_type for node in model.graph] == [PLAIN, "Mul"]


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_operator(dtype: str) -> None:
    n = Norm(dtype, opset=23)
    n.g.input("x", *SHAPE, dtype=dtype)
    y = n.g("RMSNormalization", "x", n.c(WEIGHT, dtype), axis=2, epsilon=1e-3)
    before, after = n.g.model(y), n.g.model(y)
    fuse(after)
    assert plugin_settings(only_fused(after, WEIGHTED))["eps"] == float(np.float32(1e-3))
    same(before, after, dtype)


def test_the_operator_has_a_default_epsilon() -> None:
    n = Norm(opset=23)
    y = n.g("RMSNormalization", n.g.input("x", *SHAPE), n.c(WEIGHT))
    model, _ = fused(n.g, y, feeds={"x": normal(3, *SHAPE) / 500})
    assert plugin_settings(only_fused(model, WEIGHTED))["eps"] == pytest.approx(1e-5)


def over_two_axes(n: Norm, x: str) -> str:
    return str(n.g("RMSNormalization", x, n.c(1 + normal(3, 4, WIDTH) / 4), axis=1))


def computed_in_half(n: Norm, x: str) -> str:
    return str(n.g("RMSNormalization", x, n.c(WEIGHT), stash_type=10))


def a_scale_for_each_row(n: Norm, x: str) -> str:
    return str(n.g("RMSNormalization", x, n.c(1 + normal(3, 4, 1) / 4)))


def other_axis(n: Norm, x: str) -> str:
    n.axes = (1,)
    return n.normed(x)


def all_axes(n: Norm, x: str) -> str:
    n.axes = (1, 2)
    return n.normed(x)


def of_another(n: Norm, x: str) -> str:
    return str(n.g("Div", x, n.root(n.g("Neg", x))))


def lessened(n: Norm, x: str) -> str:
    n.epsilon = -1e-3
    return n.normed(x)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (over_two_axes, "axis=1"),
        (computed_in_half, "it computes in float16"),
        (a_scale_for_each_row, r"its scale of shape \(4, 1\)"),
        (other_axis, "not over the last axis alone"),
        (all_axes, "not over the last axis alone"),
        (of_another, "it divides 'x' by a mean of squares of"),
        (lessened, "eps"),
    ],
)
def test_lookalikes_are_left_and_told_why(form: Callable[[Norm, str], str], reason: str) -> None:
    n = Norm(opset=23)
    y = form(n, n.g.input("x", *SHAPE))
    model = n.g.model(y)
    before = [node.name for node in model.graph]
    report = fuse(model)
    assert [node.name for node in model.graph] == before
    (miss,) = report.misses
    assert miss.pattern == "rms_norm"
    assert re.search(reason, miss.reason)


def test_squares_of_half_precision_are_left() -> None:
    """300² is infinite in fp16, and 300 / ∞ is 0."""
    n = Norm("fp16")
    x = n.g.input("x", *SHAPE, dtype="fp16")
    mean = n.mean(n.g("Mul", x, x))
    model = n.g.model(n.g("Div", x, n.g("Sqrt", n.g("Add", mean, n.c(1e-3, "fp16")))))
    report = fuse(model)
    assert fused_nodes(model) == []
    assert [miss.reason for miss in report.misses] == [
        "it squares in fp16, and the kernel in fp32: what overflows there does not here"
    ]


def cubed(n: Norm, x: str) -> str:
    mean = n.mean(n.g("Pow", x, n.c(3)))
    return str(n.g("Div", x, n.g("Sqrt", n.g("Add", mean, n.c(1)))))


def turned(n: Norm, x: str) -> str:
    return str(n.g("Div", n.root(x), x))


def a_number_over_the_root(n: Norm, x: str) -> str:
    return str(n.g("Div", n.c(2), n.root(x)))


@pytest.mark.parametrize("form", [cubed, turned, a_number_over_the_root])
def test_what_is_no_norm_is_left_without_a_word(form: Callable[[Norm, str], str]) -> None:
    _, after, report = made(Norm(), form)
    assert fused_nodes(after) == []
    assert report.misses == ()


SUMMED = "FusedRmsNormResidualWeight"


def weighted(n: Norm, x: str) -> str:
    return str(n.g("Mul", n.normed(x), n.c(WEIGHT)))


def test_a_norm_takes_in_the_sum_it_reads_and_gives_it() -> None:
    """As Gemma's, which has norms behind its layers as well."""
    n = Norm()
    stream = n.g.input("x", *SHAPE)
    after = weighted(n, str(n.g("Sigmoid", stream)))
    stream = n.g("Add", stream, after)
    after = weighted(n, str(n.g("Tanh", weighted(n, stream))))
    stream = n.g("Add", after, stream)
    model, report = fused(n.g, weighted(n, stream), stream)
    assert [node.op_type for node in model.graph] == ["Sigmoid", WEIGHTED, SUMMED, "Tanh", WEIGHTED, SUMMED]
    assert report.counts() == {"rms_norm": 4, "rms_norm + residual": 2}
    first, last = (node for node in model.graph if node.op_type == SUMMED)
    assert plugin_inputs(first)["residual"] is model.graph.inputs[0]
    assert plugin_inputs(last)["residual"] is first.outputs[1]
    assert [value.name for value in model.graph.outputs] == [value.name for value in last.outputs]
    assert problem_of(first).to_dict()["residual_out"] is True
    assert report.ends[first.name or ""].startswith("its result goes to Tanh")


def test_one_norm_of_several_takes_the_sum() -> None:
    n = Norm()
    stream = n.g("Add", n.g.input("x", *SHAPE), n.g.input("y", *SHAPE))
    model, _ = fused(n.g, weighted(n, stream), n.normed(stream))
    assert sorted(node.op_type for node in model.graph) == [PLAIN, SUMMED]


def a_bias(n: Norm) -> str:
    return str(n.g("Add", n.g.input("x", *SHAPE), n.g.input("b", WIDTH)))


def twice_the_same(n: Norm) -> str:
    x = n.g.input("x", *SHAPE)
    return str(n.g("Add", x, x))


def in_another_type(n: Norm) -> str:
    return n.wide(str(n.g("Add", n.g.input("x", *SHAPE, dtype="fp16"), n.g.input("y", *SHAPE, dtype="fp16"))))


@pytest.mark.parametrize("form", [a_bias, twice_the_same])
def test_sums_that_are_none_with_a_residual_stay(form: Callable[[Norm], str]) -> None:
    n = Norm()
    model, _ = fused(n.g, weighted(n, form(n)))
    assert [node.op_type for node in model.graph] == ["Add", WEIGHTED]


def test_a_sum_stays_where_the_weight_may_be_computed_from_it() -> None:
    n = Norm()
    stream = n.g("Add", n.g.input("x", *SHAPE), n.g.input("y", *SHAPE))
    weight = n.g("ReduceMax", stream, n.g.shape(0, 1), keepdims=0)
    model, _ = fused(n.g, str(n.g("Mul", n.normed(stream), weight)))
    assert [node.op_type for node in model.graph] == ["Add", "ReduceMax", WEIGHTED]


def test_a_norm_of_a_sum_in_half_precision() -> None:
    n = Norm("fp16")
    y = n.back(weighted(n, in_another_type(n)))
    model, _ = fused(n.g, y, within=2e-3)
    assert [node.op_type for node in model.graph] == [SUMMED]


def test_a_norm_between_products() -> None:
    """The product before takes what is added to it, as it did; the norm reads the sum."""
    n = Norm()
    x = n.g.input("x", *SHAPE)
    h = n.g("Add", x, n.g("MatMul", x, n.c(normal(7, WIDTH, WIDTH))))
    y = n.g("MatMul", n.g("Mul", n.normed(h), n.c(WEIGHT)), n.c(normal(8, WIDTH, WIDTH)))
    model, report = fused(n.g, str(n.g("Add", h, y)))
    assert [node.op_type for node in model.graph] == ["FusedGemmResidual", WEIGHTED, "FusedGemmResidual"]
    norm = fused_nodes(model)[1]
    assert report.ends[norm.name or ""].startswith("its result goes to")

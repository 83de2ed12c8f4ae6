"""An `Einsum` that is a matrix product becomes one, whatever the order of its axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fuse.forms import Graph, fused, operators
from tests.tuner.model.graphs import relative_error, results
from tilewright.tuner.model.fuse.einsums import to_products
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "e": 6, "f": 7}


def shapes(equation: str) -> list[list[int]]:
    terms = equation.replace(" ", "").partition("->")[0].replace("...", "ab").split(",")
    return [[SIZES[letter] for letter in term] for term in terms]


def rewritten(g: Graph, output: str, *, exact: bool = False) -> list[str]:
    """The operators of a graph whose sums became products: it must compute what it did before."""
    model, feeds = g.model(output), g.feeds()
    (before,) = results(model, feeds)
    to_products(model)
    (got,) = results(model, feeds)
    assert [value.name for value in model.graph.outputs] == [output]
    assert relative_error(got, before) <= (0 if exact else 1e-6)
    for node in model.graph:
        assert node.outputs[0].shape is not None
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize(
    ("equation", "moves"),
    [
        ("bc,cd->bd", []),
        ("bc,cd", []),
        ("abc, acd -> abd", []),
        ("...c,...cd->...d", ["Reshape", "Reshape"]),
        ("...ec,...cd->...ed", []),
        ("bc,dc->bd", ["Transpose"]),
        ("cb,cd->bd", ["Transpose"]),
        ("bc,cd->db", ["Transpose", "Transpose"]),
        ("abc,acd->bad", ["Transpose"]),
        ("abcd,cde->abe", ["Reshape", "Reshape", "Reshape"]),
        ("abcd,ecd->aeb", ["Reshape", "Transpose", "Reshape", "Reshape", "Transpose"]),
        ("abcd,bed->abce", ["Transpose", "Reshape", "Transpose", "Reshape", "Transpose"]),
        ("abcd,cef->abdef", ["Transpose", "Reshape", "Reshape", "Reshape"]),
        ("abcd,cef->dabef", ["Transpose", "Reshape", "Reshape", "Reshape"]),
        ("c,cd->d", ["Reshape", "Reshape"]),
    ],
)
def test_sums_of_products(equation: str, moves: list[str]) -> None:
    g = Graph()
    values = [g.input(f"x{place}", *shape) for place, shape in enumerate(shapes(equation))]
    found = rewritten(g, g("Einsum", *values, equation=equation))
    assert "Einsum" not in found
    assert found.count("MatMul") == 1
    assert sorted(each for each in found if each != "MatMul") == sorted(moves)


@pytest.mark.parametrize(
    ("equation", "moves"),
    [
        ("dec,abc->abde", ["Reshape", "Reshape"]),
        ("adc,abc->abd", []),
        ("cd,bc->bd", []),
        ("dec,abc->deab", ["Reshape", "Reshape", "Transpose"]),
    ],
)
def test_weights_are_second_and_moved_here(equation: str, moves: list[str]) -> None:
    g = Graph()
    first, second = shapes(equation)
    weights = g.array(np.random.default_rng(0).normal(size=first).astype(np.float32))
    found = rewritten(g, g("Einsum", weights, g.input("x", *second), equation=equation))
    assert sorted(found) == sorted(["MatMul", *moves])


@pytest.mark.parametrize(
    "equation",
    [
        "ab,cd->abcd",
        "ab,ab->ab",
        "abc,abc->ab",
        "c,c->",
        "aab,bc->ac",
        "ab,cd->ad",
        "ab,bc->a",
        "ab->ba",
        "ab,bc,cd->ad",
        "aa,ab->b",
    ],
)
def test_what_is_no_product_of_matrices_stays(equation: str) -> None:
    g = Graph()
    sizes = shapes(equation)
    if equation.startswith("aa"):
        sizes[0] = [2, 2, 3][: len(sizes[0])]
    values = [g.input(f"x{place}", *shape) for place, shape in enumerate(sizes)]
    assert rewritten(g, g("Einsum", *values, equation=equation), exact=True) == ["Einsum"]


def test_an_axis_that_is_broadcast_stays() -> None:
    g = Graph()
    output = g("Einsum", g.input("x", 1, 3, 4), g.input("y", 2, 4, 5), equation="abc,acd->abd")
    assert rewritten(g, output, exact=True) == ["Einsum"]


def test_it_is_fused_with_what_follows() -> None:
    """A projection to heads as some frameworks write it."""
    g = Graph()
    rng = np.random.default_rng(0)
    weights = g.array(rng.normal(size=(32, 4, 16)).astype(np.float32))
    projected = g("Einsum", g.input("x", 2, 6, 32), weights, equation="bsd,dhk->bshk")
    joined = g("Einsum", g("Relu", projected), g.array(rng.normal(size=(4, 16, 32)) / 8), equation="bshk,hkd->bsd")
    model, _ = fused(g, g("Gelu", g("Add", joined, g.array(rng.normal(size=32)))))
    nodes = fused_nodes(model)
    assert [node.op_type for node in nodes] == ["FusedGemm", "FusedGemmBias"]
    assert "Transpose" not in operators(model)
    assert [ir.Shape(plugin_inputs(node)["b"].shape or ()) for node in nodes] == [[32, 64], [64, 32]]


def test_weights_that_layers_share_are_moved_once() -> None:
    """And again where they are read another way."""
    g = Graph()
    weights = g.array(np.random.default_rng(0).normal(size=(16, 16)) / 4)
    value = g.input("x", 2, 3, 16)
    for equation in ("abc,dc->abd", "...c,dc->...d", "abc,cd->abd", "abd,cd->abc"):
        value = g("Tanh", g("Einsum", value, weights, equation=equation))
    model, _ = fused(g, value)
    first, second, third, fourth = (plugin_inputs(node)["b"] for node in fused_nodes(model))
    assert first is second is fourth
    assert first is not third
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) == 2 * 4 * 16 * 16

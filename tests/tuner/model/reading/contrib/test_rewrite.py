"""Which operators are put in others' place, and what is around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.contrib import assert_same, read, standard, written
from tests.tuner.model.graphs import normal, results
from tilewright.tuner.model.reading.contrib.rewrite import FORMS
from tilewright.tuner.model.reading.names import _runtime_operators
from tilewright.tuner.model.reading.read import LEFT
from tilewright.tuning_db.errors import ModelError


def test_every_operator_with_a_form_is_one_of_onnx_runtime() -> None:
    """A name with a mistake in it would never be met."""
    known = {name for _, name in _runtime_operators()}
    # Kernels of GPUs, whose operators a build for the CPU doesn't list.
    assert set(FORMS) - known <= {"BiasAdd", "BiasSplitGelu", "GroupNorm", "NhwcConv", "SkipGroupNorm"}


def test_a_result_goes_on_under_its_name(tmp_path: Path) -> None:
    """To other nodes, to an output, and into a subgraph."""
    text = """(float[2, 3] x, bool c) => (float[2, 3] y, float[2, 3] g)
    { g = com.microsoft.Gelu(x)
      y = If(c) <then_branch = t () => (float[2, 3] a) { a = Neg(g) }, else_branch = e () => (float[2, 3] b)
        { b = Exp(g) }> }"""
    assert_same(written(text), {"x": normal(0, 2, 3), "c": np.array(True)}, tmp_path)


def test_what_is_inside_of_control_flow_stays(tmp_path: Path) -> None:
    text = """(float[2, 3] x, bool c) => (float[2, 3] y)
    { y = If(c) <then_branch = t () => (float[2, 3] a) { a = com.microsoft.Gelu(x) },
        else_branch = e () => (float[2, 3] b) { b = Exp(x) }> }"""
    made = read(written(text), tmp_path)
    assert [node.op_type for node in made.graph.all_nodes() if node.domain] == ["Gelu"]
    assert made.meta[LEFT] == {}


def test_weights_that_others_read_as_well_stay(tmp_path: Path) -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(16, 1, 16).repeat(20, axis=0)
    text = """(float[2, 32] x) => (float[2, 320] y, uint8[320, 1, 16] again)
    { y = com.microsoft.MatMulNBits<K: int = 32, N: int = 320, block_size: int = 32>(x, B, s)  again = Identity(B) }"""
    model = written(text, B=packed, s=np.full(320, 0.1, np.float32))
    made = assert_same(model, {"x": normal(0, 2, 32)}, tmp_path)
    assert "B" in made.graph.initializers
    assert "s" not in made.graph.initializers


def test_names_that_are_taken_are_not_given_again(tmp_path: Path) -> None:
    """Those of values and of nodes, of which some have none."""
    text = """(float[2, 3] x) => (float[2, 3] y)
    { taken = Exp(x)  y = com.microsoft.SkipSimplifiedLayerNormalization(x, taken, g) }"""
    model = written(text, g=normal(1, 3))
    for node in model.graph.node:
        node.name = ""
        for field in (node.input, node.output):
            for place, name in enumerate(field):
                field[place] = "y/Add" if name == "taken" else name
    assert_same(model, {"x": normal(0, 2, 3)}, tmp_path)


def test_a_value_that_is_two_outputs_is_copied(tmp_path: Path) -> None:
    text = """(int32[2, 5] words) => (float[2, 5, 4] y, float[2, 5, 4] s)
    { y, , s = com.microsoft.EmbedLayerNormalization(words, , table, lines, , g, b) }"""
    tables = {"table": normal(0, 9, 4), "lines": normal(1, 5, 4), "g": normal(2, 4), "b": normal(3, 4)}
    assert_same(written(text, **tables), {"words": np.arange(9, dtype=np.int32)[:5].repeat(2).reshape(2, 5)}, tmp_path)


@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
def test_numbers_have_the_type_of_what_they_go_with(dtype: str, tmp_path: Path) -> None:
    """Without a `CastLike` that folding couldn't take for a constant."""
    text = f"({dtype}[2, 3] x) => ({dtype}[2, 3] y) {{ n = Neg(x)  y = com.microsoft.QuickGelu(n) }}"
    made = standard(written(text), tmp_path)
    assert "CastLike" not in [node.op_type for node in made.graph]
    kind = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
    x = -normal(0, 2, 3).astype(kind)
    (got,) = results(made, {"x": -x})
    assert got.dtype == kind
    assert np.abs(got - x / (1 + np.exp(-1.702 * x.astype(np.float64)))).max() < 3e-3
    assert all(value.dtype != ir.DataType.UNDEFINED for node in made.graph for value in node.outputs)


def test_ranks_may_follow_from_the_arithmetic_of_shapes(tmp_path: Path) -> None:
    """Which inference doesn't do: a product whose operand is known when another product is written out."""
    text = """(float[2, 3, 4] x) => (float[N, M, K] y)
    { s = Shape(x)  one = Slice(s, zero, two)  shape = Concat<axis = 0>(one, minus)  r = Reshape(x, shape)
      p = com.microsoft.FusedMatMul<transB: int = 1>(r, r)  s2 = Shape(p)  r2 = Reshape(p, s2)
      y = com.microsoft.FusedMatMul<transA: int = 1>(r2, r2) }"""
    numbers = {"zero": np.array([0]), "two": np.array([2]), "minus": np.array([-1])}
    assert_same(written(text, **numbers), {"x": normal(0, 2, 3, 4)}, tmp_path)


def test_shapes_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    text = "(float[2, 3] x, float[4] z) => (float[2, 3] y) { a = Add(x, z)  y = com.microsoft.Gelu(a) }"
    with pytest.raises(ModelError, match="the model's shapes don't go together"):
        read(written(text), tmp_path)

"""Which operators are put in others' place, and what is around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from tests.tuner.model.contrib import assert_same, read, reason, runtime, standard, written
from tests.tuner.model.graphs import normal, results
from tilewright.tuner.model.reading.contrib import rewrite as rewriting
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
    assert made.meta[LEFT] == {"Gelu": "it is inside a control-flow node"}


def test_nodes_inside_of_control_flow_get_names_of_their_own(tmp_path: Path) -> None:
    """Why they stay is told by their names, which may not be those of others."""
    text = """(float[2, 3] x, bool c) => (float[2, 3] y, float[2, 3] z)
    { y = If(c) <then_branch = t () => (float[2, 3] a) { a = com.microsoft.Gelu(x) },
        else_branch = e () => (float[2, 3] b) { b = com.microsoft.FastGelu(x) }>
      z = Exp(x) }"""
    model = written(text)
    branches = [attribute.g.node[0] for attribute in model.graph.node[0].attribute]
    branches[0].name = branches[1].name = model.graph.node[1].name = "same"
    made = read(model, tmp_path)
    assert made.graph[1].name == "same"
    assert list(made.meta[LEFT]) == ["same_2", "same_3"]


@pytest.mark.parametrize(
    ("operator", "opset"),
    [("SimplifiedLayerNormalization", 13), ("SimplifiedLayerNormalization", 21), ("LayerNormalization", 13)],
)
@pytest.mark.parametrize("form", ["Neg", "com.microsoft.QuickGelu"])
def test_what_onnx_does_not_know_may_be_inside_of_control_flow(
    form: str, operator: str, opset: int, tmp_path: Path
) -> None:
    """Where another operator gets its form, and where none does."""
    text = f"""(float[2, 3] x, bool c) => (float[2, 3] y)
    {{ h = {form}(x)  y = If(c) <then_branch = t () => (float[2, 3] a) {{ a = {operator}(h, g) }},
        else_branch = e () => (float[2, 3] b) {{ b = Exp(h) }}> }}"""
    model = written(text, opset, g=normal(1, 3))
    made = read(model, tmp_path)
    inner = [node for node in made.graph.all_nodes() if node.op_type == operator]
    assert [node.domain for node in inner] == [""]
    assert list(made.meta[LEFT]) == ([operator] if operator.startswith("Simplified") else [])
    feeds = {"x": normal(0, 2, 3), "c": np.array(True)}
    for got, wanted in zip(runtime(ir.to_proto(made), feeds), runtime(model, feeds), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)


def test_shapes_behind_control_flow_with_quantised_operators_are_known(tmp_path: Path) -> None:
    text = """(uint8[2, 3] x, bool c, float[2, 5] w) => (float[3, 5] z)
    { y = If(c) <then_branch = t () => (uint8[] a) { a = QLinearMatMul(x, s, o, m, s, o, s, o) },
        else_branch = e () => (uint8[] b) { b = QLinearMatMul(x, s, o, m, s, o, s, o) }>
      f = Cast<to = 1>(y)  z = com.microsoft.FusedMatMul<transA: int = 1>(f, w) }"""
    scale, zero = np.array(0.1, np.float32), np.array(3, np.uint8)
    made = read(written(text, m=np.ones((3, 3), np.uint8), s=scale, o=zero), tmp_path)
    assert made.graph[-1].op_type == "MatMul"
    assert list(made.meta[LEFT]) == ["QLinearMatMul", "QLinearMatMul_2"]


def test_a_branch_that_is_taken_is_read(tmp_path: Path) -> None:
    """Where it becomes part of the main graph, because an operator waits for what follows from constants."""
    text = """(float[2, 3] x, float[2, 32] v) => (float[2, 3] y, float[2, 4] z)
    { y = If(c) <then_branch = t () => (float[2, 3] a) { a = SimplifiedLayerNormalization(x, g) },
        else_branch = e () => (float[2, 3] b) { b = Exp(x) }>
      t = Abs(s)  z = com.microsoft.MatMulNBits<K: int = 32, N: int = 4, block_size: int = 32>(v, B, t) }"""
    constants = {"c": np.array(True), "g": normal(1, 3), "B": np.ones((4, 1, 16), np.uint8)}
    model = written(text, **constants, s=np.full(4, 0.1, np.float32))
    made = assert_same(model, {"x": normal(0, 2, 3), "v": normal(2, 2, 32)}, tmp_path)
    assert not [node for node in made.graph if node.op_type in ("If", "SimplifiedLayerNormalization")]


def test_weights_of_a_form_that_waits_are_made_when_it_is_written(tmp_path: Path) -> None:
    """The part of the bias came first, and then the mask's shape wasn't known."""
    text = """(float[2, 5, 8] q, int32[10] mask) => (float[2, 5, 8] y)
    { s = Shape(q)  b = Slice(s, zero, one)  t = Concat<axis = 0>(b, minus)  m = Reshape(mask, t)
      y = com.microsoft.MultiHeadAttention<num_heads: int = 2>(q, q, q, bias, m) }"""
    numbers = {"zero": np.array([0]), "one": np.array([1]), "minus": np.array([-1]), "bias": normal(1, 24)}
    mask = np.array([1, 1, 1, 0, 0, 1, 1, 1, 1, 0], np.int32)
    assert_same(written(text, **numbers), {"q": normal(0, 2, 5, 8), "mask": mask}, tmp_path)


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The nodes of the model each time that all of it is inferred."""
    sizes = []
    surroundings = rewriting._surroundings

    def counted(model: onnx.ModelProto, *arguments: Any) -> Any:
        sizes.append(len(model.graph.node))
        return surroundings(model, *arguments)

    monkeypatch.setattr(rewriting, "_surroundings", counted)
    return sizes


def test_operators_that_wait_for_each_other_are_read_in_one_round(rounds: list[int], tmp_path: Path) -> None:
    """With what is between them, arithmetic of shapes too."""
    steps = """s{0} = Shape(p{0})  f{0} = Slice(s{0}, zero, two)  c{0} = Concat<axis = 0>(f{0}, minus)
    r{0} = Reshape(p{0}, c{0})  t{0} = com.microsoft.RotaryEmbedding(r{0}, zero, angles, angles)
    p{1} = com.microsoft.FusedMatMul<transB: int = 1>(t{0}, t{0})"""
    chain = "".join(steps.format(place, place + 1) for place in range(4))
    text = f"(float[2, 4, 4] x) => (float[A, B, C] y) {{ p0 = com.microsoft.QuickGelu(x) {chain} y = Tanh(p4) }}"
    numbers = {"zero": np.array([0]), "two": np.array([2]), "minus": np.array([-1]), "angles": normal(1, 4, 2) / 2}
    assert_same(written(text, **numbers), {"x": normal(0, 2, 4, 4) / 4}, tmp_path)
    assert rounds == [26]


def test_reasons_after_the_last_round_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rewriting, "LARGEST_GRAPH", 0)
    monkeypatch.setattr(rewriting, "_LEAST_ROUNDS", 1)
    text = """(float[2, 32] x) => (float[2, 4] y)
    { t = Abs(s)  y = com.microsoft.MatMulNBits<K: int = 32, N: int = 4, block_size: int = 32>(x, B, t) }"""
    model = written(text, B=np.ones((4, 1, 16), np.uint8), s=np.full(4, 0.1, np.float32))
    message = "'t' is not a constant, after 1 rounds of inference, the most for a model of its size"
    assert reason(model, tmp_path) == message


def test_a_model_of_a_constant_alone(tmp_path: Path) -> None:
    """Which is no node once it is read."""
    model = written("() => (float[64, 64] y) { y = Constant() }")
    model.graph.node[0].attribute.append(
        onnx.helper.make_attribute("value", numpy_helper.from_array(normal(0, 64, 64)))
    )
    assert_same(model, {}, tmp_path)


def test_an_older_name_of_a_product(tmp_path: Path) -> None:
    text = (
        "(float[2, 3] x) => (float[2, 2] y) { y = com.microsoft.TransposeMatMul<transB: int = 1, alpha = 0.5>(x, x) }"
    )
    assert_same(written(text), {"x": normal(0, 2, 3)}, tmp_path)


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

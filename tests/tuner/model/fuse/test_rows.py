"""Products come below what moves their rows, where that costs nothing, and then take in what follows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.fuse.forms import Graph, fused, only_fused, operators
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.fuse import fuse, rows
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs, plugin_settings, static_shape

B, S, K, N = 2, 6, 16, 24


def gemm(g: Graph, value: str, rows: int = K, columns: int = N, *, turned: bool = False, **attributes: float) -> str:
    """(M, K) → (M, N), as `addmm` and `linear` of a matrix are exported."""
    w = normal(rows + columns, rows, columns) / 4
    return g(
        "Gemm", value, g.array(w.T if turned else w), g.array(normal(1, columns)), transB=int(turned), **attributes
    )


def matrix(g: Graph, value: str, columns: int = K) -> str:
    return g.reshape(value, -1, columns)


@pytest.mark.parametrize("turned", [False, True])
def test_reshapes_around_products_go(turned):
    """The MLP of GPT-2."""
    g = Graph()
    x = g.input("x", B, S, K)
    hidden = g("Gelu", g.reshape(gemm(g, matrix(g, x), turned=turned), B, S, N), approximate="tanh")
    out = gemm(g, matrix(g, hidden, N), N, K, turned=turned, alpha=0.5, beta=2.0)
    model, report = fused(g, g("Add", x, g.reshape(out, B, S, K)))
    assert operators(model) == ["FusedGemmBias", "FusedGemmBiasResidual"]
    first, second = fused_nodes(model)
    assert plugin_settings(first)["activation"] == "gelu_tanh"
    assert plugin_inputs(second)["residual"].name == "x"
    assert report.counts() == {"gemm + activation": 1, "gemm + residual": 1}
    assert report.ends["n1"] == "its result goes to gemm 'n5'"
    # What is left has the names that it had.
    assert [node.name for node in (first, second)] == ["n1", "n5"]
    assert [node.outputs[0].name for node in (first, second)] == [hidden, "v7"]


@pytest.mark.parametrize(
    ("operator", "attributes"), [("Squeeze", {}), ("ReduceMean", {"keepdims": 0}), ("ReduceSum", {"keepdims": 0})]
)
def test_a_scalar_is_made_of_a_product(operator, attributes):
    """The score of a regressor."""
    g = Graph()
    product = gemm(g, g.input("x", 1 if operator == "Squeeze" else B, K), columns=1)
    model, _ = fused(g, g(operator, product, **attributes))
    assert operators(model) == ["FusedGemmBias", operator]
    assert static_shape(model.graph.outputs[0]) == ()


def test_a_reshape_further_up_is_undone():
    """The rows are reshaped where they are read: the reshape in front stays, for what else reads it."""
    g = Graph()
    x = g.input("x", B, S, K)
    normed = g("Sin", matrix(g, x))
    model, _ = fused(g, g("Add", g.reshape(gemm(g, normed, K, K), B, S, K), x))
    assert operators(model) == ["FusedGemmBiasResidual", "Reshape", "Reshape", "Sin"]


@pytest.mark.parametrize(
    "move",
    [
        lambda g, value: g("Unsqueeze", value, g.shape(0)),
        lambda g, value: g("Squeeze", g.reshape(value, B, 1, S, N), g.shape(1)),
        lambda g, value: g("Flatten", g.reshape(value, B, S, N), axis=-1),
        lambda g, value: g("Transpose", g("Transpose", value, perm=[0, 1]), perm=[0, 1]),
    ],
    ids=["unsqueeze", "squeeze", "flatten", "as it was"],
)
def test_other_operators_move_rows(move):
    g = Graph()
    model, _ = fused(g, g("Relu", move(g, gemm(g, matrix(g, g.input("x", B, S, K))))))
    assert plugin_settings(*fused_nodes(model))["activation"] == "relu"


def test_the_way_out_of_an_attention_with_the_sequence_first():
    """The `out_proj` of `torch.nn.MultiheadAttention(batch_first=True)`."""
    g = Graph()
    heads = g.transpose(g("Sin", g.input("x", B, 4, S, K // 4)), 2, 0, 1, 3)
    out = g.transpose(g.reshape(gemm(g, matrix(g, heads), turned=True), S, B, N), 1, 0, 2)
    model, _ = fused(g, g("Add", g.input("r", B, S, N), out))
    assert operators(model) == ["FusedGemmBiasResidual", "Reshape", "Sin", "Transpose"]
    (move,) = (node for node in model.graph if node.op_type == "Transpose")
    assert tuple(move.attributes["perm"].as_ints()) == (0, 2, 1, 3)


def test_transposes_on_both_sides_undo_each_other():
    g = Graph()
    x = g.input("x", B, S, K)
    w = g.array(normal(0, K, K))
    model, _ = fused(g, g("Add", g.transpose(g("MatMul", g.transpose(x, 1, 0, 2), w), 1, 0, 2), x))
    node = only_fused(model, "FusedGemmResidual")
    assert operators(model) == ["FusedGemmResidual"]
    assert static_shape(node.outputs[0]) == (B, S, K)


def test_a_residual_of_the_product_is_moved_too():
    g = Graph()
    x, r = g.input("x", B, S, K), g.input("r", B, S, N)
    added = g("Add", gemm(g, matrix(g, x)), matrix(g, r, N))
    model, _ = fused(g, g("Relu", g.reshape(added, B, S, N)))
    node = only_fused(model, "FusedGemmBiasResidual")
    assert operators(model) == ["FusedGemmBiasResidual"]
    assert plugin_inputs(node)["residual"].name == "r"
    assert plugin_settings(node)["activation"] == "relu"


def test_a_long_chain_is_done_in_one_walk():
    g = Graph()
    x = g.input("x", 2, 6, 8)
    for _ in range(8):
        x = g.reshape(g("Gemm", g.reshape(x, 12, 8), g.array(np.eye(8) + 0.01), g.array(np.ones(8))), 2, 6, 8)
    model = g.model(g("Relu", x))
    walks = []

    def counted(model, original=rows.move_before):
        walks.append(original(model))
        return walks[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "move_before", counted)
        fuse(model)
    assert walks == [True, False]
    assert operators(model).count("Reshape") == 0


def test_one_reshape_does_not_become_two():
    g = Graph()
    added = g("Add", gemm(g, g.input("x", B * S, K)), g.input("r", B * S, N))
    leaves(g, g("Relu", g.reshape(added, B, S, N)), left=["FusedGemmBiasResidual", "Reshape"])


def test_halves_of_a_reshaped_product_are_a_gate():
    g = Graph()
    gate, up = g(
        "Split", g.reshape(gemm(g, matrix(g, g.input("x", B, S, K))), B, S, N), outputs=2, axis=-1, num_outputs=2
    )
    model, _ = fused(g, g("Mul", g("Gelu", gate), up))
    assert plugin_settings(only_fused(model, "FusedGemmBias"))["gated"] == "halves"


def test_two_products_of_a_reshaped_input_are_a_gate():
    g = Graph()
    x = g.input("x", B * S, K)
    gate, up = (g.reshape(g("MatMul", x, g.array(normal(seed, K, N) / 4)), B, S, N) for seed in (0, 1))
    model, _ = fused(g, g("Mul", g("Gelu", gate), up))
    assert operators(model) == ["FusedGemm", "Reshape"]


def test_products_of_one_input_have_one_reshape():
    g = Graph()
    x = g.input("x", B * S, K)
    outputs = [g("Relu", g.reshape(gemm(g, x, columns=columns), B, S, columns)) for columns in (8, 16, 24)]
    model, _ = fused(g, *outputs)
    assert operators(model) == [*["FusedGemmBias"] * 3, "Reshape"]
    assert [value.name for value in model.graph.outputs] == outputs


def leaves(g: Graph, *outputs: str, left: list[str]) -> ir.Model:
    model, _ = fused(g, *outputs)
    assert operators(model) == left
    return model


def test_columns_that_are_taken_apart_stay_apart():
    g = Graph()
    value = g.reshape(gemm(g, g.input("x", B * S, K)), B, S, 4, N // 4)
    leaves(g, g("Relu", value), left=["FusedGemmBias", "Reshape"])


def test_columns_that_become_rows_stay_behind():
    """A square, of which the wrong axis would fit."""
    g = Graph()
    value = g.transpose(g("MatMul", g.transpose(g.input("x", K, K), 1, 0), g.array(normal(0, K, K))), 1, 0)
    leaves(g, g("Relu", value), left=["FusedGemm", "Transpose", "Transpose"])


def test_a_reshape_to_a_vector_leaves():
    g = Graph()
    model, _ = fused(g, g("Relu", g.reshape(gemm(g, g.input("x", 1, K)), N)))
    assert operators(model) == ["FusedGemmBias", "Reshape"]


def test_a_transpose_is_not_moved_from_behind_a_product_to_before_it():
    g = Graph()
    value = g.transpose(g("MatMul", g.input("x", B, S, K), g.array(normal(0, K, N))), 1, 0, 2)
    leaves(g, g("Relu", value), left=["FusedGemm", "Transpose"])


@pytest.mark.parametrize("first", [False, True])
def test_the_transpose_of_a_residual_counts(first):
    """Before: that of x, if there is one, and the one behind. Afterwards: that of r, and of x if it had none."""
    g = Graph()
    x, r = g.input("x", *((B, S, K) if first else (S, B, K))), g.input("r", S, B, N)
    added = g("Add", g("MatMul", g.transpose(x, 1, 0, 2) if first else x, g.array(normal(0, K, N))), r)
    model = leaves(g, g("Relu", g.transpose(added, 1, 0, 2)), left=["FusedGemmResidual", "Transpose"])
    assert model.graph[-1].op_type == ("FusedGemmResidual" if first else "Transpose")


def test_what_is_used_elsewhere_or_is_an_output_stays():
    g = Graph()
    product = gemm(g, matrix(g, g.input("x", B, S, K)))
    outputs = g("Relu", g.reshape(product, B, S, N)), g("Sin", product)
    leaves(g, *outputs, left=["FusedGemmBias", "Relu", "Reshape", "Reshape", "Sin"])
    g = Graph()
    product = gemm(g, matrix(g, g.input("x", B, S, K)))
    model = leaves(
        g, product, g("Relu", g.reshape(product, B, S, N)), left=["FusedGemmBias", "Relu", "Reshape", "Reshape"]
    )
    assert [value.name for value in model.graph.outputs] == [product, "v3"]


def test_a_reshape_that_is_an_output_is_one_still():
    g = Graph()
    reshaped = g.reshape(gemm(g, matrix(g, g.input("x", B, S, K))), B, S, N)
    model, report = fused(g, reshaped, g("Relu", reshaped))
    assert operators(model) == ["FusedGemmBias", "Relu"]
    assert [value.name for value in model.graph.outputs] == [reshaped, "v3"]
    assert report.ends == {"n1": "its result is an output of the model"}


def test_products_of_a_matrix_each_stay():
    """As many rows as matrices: transposed, each row would meet the columns of another."""
    g = Graph()
    value = g("MatMul", g.transpose(g.input("x", 4, 4, K), 1, 0, 2), g.array(normal(0, 4, K, N)))
    leaves(g, g("Relu", g.transpose(value, 1, 0, 2)), left=["FusedGemm", "Transpose", "Transpose"])


def test_rows_that_lie_in_columns_stay():
    g = Graph()
    value = g("Gemm", g.input("x", K, B * S), g.array(normal(0, K, N)), transA=1)
    leaves(g, g("Relu", g.reshape(value, B, S, N)), left=["FusedGemm", "Reshape"])


def test_a_reshape_inside_a_branch_stays_there():
    make = helper.make_node
    branches = [
        helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("inner", 1, [B, S, N])])
        for node in (make("Reshape", ["p", "s"], ["inner"]), make("Identity", ["z"], ["inner"]))
    ]
    nodes = [
        make("MatMul", ["x", "w"], ["p"], name="product"),
        make("If", ["yes"], ["y"], then_branch=branches[0], else_branch=branches[1]),
    ]
    constants = {"w": normal(0, K, N), "s": np.array([B, S, N]), "yes": np.array(True), "z": normal(2, B, S, N)}
    model = model_of(nodes, {"x": (B * S, K)}, ["y"], constants)
    feeds = {"x": normal(1, B * S, K)}
    (wanted,) = results(model, feeds)
    fuse(model)
    assert operators(model) == ["FusedGemm", "If"]
    assert relative_error(results(model, feeds)[0], wanted) <= 1e-5

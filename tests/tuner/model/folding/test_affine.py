from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from onnx import helper
from onnxscript.rewriter import rewrite
from onnxscript.rewriter.rules.common import (
    fuse_batchnorm_into_conv_rule,
    fuse_batchnorm_into_conv_transpose_rule,
    fuse_batchnorm_into_gemm_rule,
)

from tests.tuner.model.folds import batch_norm, folded, node, norm
from tests.tuner.model.graphs import model_of, normal
from tilewright.tuner.model.folding import constants
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.graph import static_shape
from tilewright.tuning_db.errors import ModelError


def test_batch_norm_into_conv() -> None:
    nodes = [node("Conv", "x w", "c", pads=[1] * 4), batch_norm("c", "y", "n", epsilon=1e-3)]
    left, report, model = folded(nodes, (2, 4, 6, 6), {"w": normal(0, 8, 4, 3, 3), **norm("n", 8)})
    assert left == ["Conv"]
    assert report.folded == {"batch_norm": 1}
    assert model.graph[0].name == "Conv_c"
    assert len(model.graph.initializers) == 2


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_into_grouped_convolutions(groups: int, bias: bool) -> None:
    arrays = {"w": normal(0, 8, 4 // groups, 3, 3), "b": normal(1, 8), **norm("n", 8)}
    used = "x w b" if bias else "x w -"
    left, _, _ = folded([node("Conv", used, "c", group=groups), batch_norm("c", "y", "n")], (2, 4, 6, 6), arrays)
    assert left == ["Conv"]
    arrays["w"] = normal(0, 4, 8 // groups, 3, 3)
    nodes = [node("ConvTranspose", used, "c", group=groups, strides=[2, 2]), batch_norm("c", "y", "n")]
    left, _, _ = folded(nodes, (2, 4, 6, 6), arrays)
    assert left == ["ConvTranspose"]


@pytest.mark.parametrize("shape", [(8,), (1, 8), (), (1,), (1, 1), None])
@pytest.mark.parametrize("transposed", [0, 1])
def test_batch_norm_into_gemm(shape: tuple[int, ...] | None, transposed: int) -> None:
    arrays = {"w": normal(0, 8, 5) if transposed else normal(0, 5, 8), **norm("n", 8)}
    if shape is not None:
        arrays["b"] = np.asarray(normal(1, *shape))
    used = "x w" if shape is None else "x w b"
    nodes = [node("Gemm", used, "g", transB=transposed, alpha=0.5, beta=3.0), batch_norm("g", "y", "n")]
    left, report, _ = folded(nodes, (3, 5), arrays)
    assert left == ["Gemm"]
    assert report.folded == {"batch_norm": 1}


@pytest.mark.parametrize("operator", ["Mul", "Div"])
def test_rows_of_a_product_are_not_its_columns(operator: str) -> None:
    """Their sizes agree; the weights have columns alone."""
    nodes = [node("MatMul", "x w", "m"), node(operator, "m c", "y")]
    left, _, _ = folded(nodes, (1, 4, 8), {"w": normal(0, 8, 4), "c": 1 + np.abs(normal(1, 4, 1))})
    assert left == ["MatMul", operator]


def test_channels_of_a_product_of_four_dimensions_are_not_its_columns() -> None:
    nodes = [node("MatMul", "x w", "m"), batch_norm("m", "y", "n")]
    left, _, _ = folded(nodes, (2, 4, 3, 8), {"w": normal(0, 8, 4), **norm("n", 4)})
    assert left[0] == "MatMul"
    assert len(left) > 1


@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose", "Gemm"])
def test_weights_are_those_of_onnxscripts_rules(operator: str) -> None:
    if operator == "Gemm":
        shape: tuple[int, ...] = (3, 5)
        nodes = [node("Gemm", "x w b", "g", beta=2.0), batch_norm("g", "y", "n")]
        arrays = {"w": normal(0, 5, 8)}
    else:
        shape = (1, 4, 6, 6)
        nodes = [node(operator, "x w b", "g"), batch_norm("g", "y", "n")]
        arrays = {"w": normal(0, 8, 4, 3, 3) if operator == "Conv" else normal(0, 4, 8, 3, 3)}
    arrays |= {"b": normal(1, 8), **norm("n", 8)}
    mine, theirs = (model_of(nodes, {"x": shape}, ["y"], arrays) for _ in range(2))
    fold(mine)
    rules = [fuse_batchnorm_into_conv_rule, fuse_batchnorm_into_conv_transpose_rule, fuse_batchnorm_into_gemm_rule]
    rewrite(theirs, rules)
    assert [node.op_type for node in theirs.graph] == [operator]
    for place in (1, 2):
        got, wanted = (model.graph[0].inputs[place].const_value.numpy() for model in (mine, theirs))  # type: ignore[union-attr]
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_the_form_of_densenet_and_inception() -> None:
    """BatchNorm of trivial scale, then a scale and a bias by way of `Unsqueeze`, all behind a convolution."""
    arrays = {
        "w": normal(0, 8, 4, 1, 1),
        **norm("n", 8),
        "s": normal(1, 8),
        "o": normal(2, 8),
        "axes": np.int64([1, 2]),
    }
    nodes = [
        node("Conv", "x w", "c"),
        batch_norm("c", "n", "n"),
        node("Unsqueeze", "s axes", "s3"),
        node("Unsqueeze", "o axes", "o3"),
        node("Mul", "n s3", "m"),
        node("Add", "m o3", "y"),
    ]
    left, report, _ = folded(nodes, (2, 4, 5, 5), arrays)
    assert left == ["Conv"]
    assert report.folded == {"affine": 2, "batch_norm": 1, "constant": 2}


def test_behind_a_concat_batch_norm_becomes_mul_and_add() -> None:
    arrays = {**norm("n", 8), "s": normal(1, 8, 1, 1), "o": normal(2, 1, 8, 1, 1)}
    nodes = [
        node("Concat", "x x", "c", axis=1),
        batch_norm("c", "n", "n"),
        node("Mul", "s n", "m"),
        node("Add", "m o", "y"),
    ]
    left, report, model = folded(nodes, (2, 4, 5, 5), arrays)
    assert left == ["Concat", "Mul", "Add"]
    assert report.folded == {"affine_merged": 2, "batch_norm_lowered": 1}
    assert [static_shape(value) for value in model.graph.initializers.values()] == [(8, 1, 1)] * 2


def test_a_result_that_others_use_stays() -> None:
    nodes = [node("Conv", "x w", "c"), batch_norm("c", "y", "n"), node("Relu", "c", "z")]
    left, _, _ = folded(nodes, (1, 4, 5, 5), {"w": normal(0, 8, 4, 3, 3), **norm("n", 8)}, outputs=("y", "z"))
    assert sorted(left) == ["Add", "Conv", "Mul", "Relu"]
    left, _, _ = folded(nodes[:2], (1, 4, 5, 5), {"w": normal(0, 8, 4, 3, 3), **norm("n", 8)}, outputs=("y", "c"))
    assert sorted(left) == ["Add", "Conv", "Mul"]


def test_shared_weights_are_not_changed_for_others() -> None:
    """One weight and bias, four convolutions: two BatchNorms of their own, one that they share, none."""
    arrays = {"w": normal(0, 4, 4, 3, 3), "b": normal(1, 4), **norm("n", 4), **norm("p", 4, seed=8)}
    arrays["c0_bias"] = arrays["Conv_c0_bias"] = normal(2, 4, 1, 1)  # names that a new bias might get
    nodes = [node("Conv", "x w b", f"c{place}", pads=[1] * 4) for place in range(4)]
    nodes += [batch_norm("c0", "n0", "n"), batch_norm("c1", "n1", "p"), batch_norm("c2", "n2", "n")]
    nodes += [node("Add", "c3 c0_bias", "c4"), node("Sum", "n0 n1 n2 c4 Conv_c0_bias", "y")]
    left, report, _ = folded(nodes, (1, 4, 5, 5), arrays, outputs=("y", "n0", "n1", "n2", "c4"))
    # The first and third are the same convolution, then, for two outputs.
    assert Counter(left) == {"Conv": 3, "Identity": 1, "Sum": 1}
    assert report.folded["batch_norm"] == 3


def test_batch_norm_in_training_mode_stays() -> None:
    nodes = [node("Conv", "x w", "c"), batch_norm("c", "y", "n", training_mode=1)]
    nodes[1].output.extend(["running_mean", "running_var"])
    left, _, _ = folded(nodes, (2, 4, 5, 5), {"w": normal(0, 8, 4, 3, 3), **norm("n", 8)})
    assert left == ["Conv", "BatchNormalization"]


def test_a_negative_variance_is_refused() -> None:
    arrays = {"w": normal(0, 8, 4, 3, 3), **norm("n", 8)}
    arrays["n_var"][3] = -1
    model = model_of([node("Conv", "x w", "c"), batch_norm("c", "y", "n")], {"x": (1, 4, 5, 5)}, ["y"], arrays)
    with pytest.raises(ModelError, match=r"'BatchNormalization_y': variance and epsilon add up to -0\.99999"):
        fold(model)


def test_a_scale_that_overflows_fp16_is_left_in_place() -> None:
    arrays = {"w": np.full((2, 2, 1, 1), 300, np.float16), "s": np.full((2, 1, 1), 300, np.float16)}
    model = model_of(
        [node("Conv", "x w", "c"), node("Mul", "c s", "y")], {"x": (1, 2, 3, 3)}, ["y"], arrays, dtype="fp16"
    )
    fold(model)
    assert [node.op_type for node in model.graph] == ["Conv", "Mul"]


@pytest.mark.parametrize(
    ("operator", "used", "shape", "left"),
    [
        ("Mul", "c k", (8, 1, 1), ["Conv"]),
        ("Mul", "k c", (1, 8, 1, 1), ["Conv"]),
        ("Mul", "c k", (), ["Conv"]),
        ("Add", "k c", (8, 1, 1), ["Conv"]),
        ("Sub", "c k", (8, 1, 1), ["Conv"]),
        ("Div", "c k", (8, 1, 1), ["Conv"]),
        ("Sub", "k c", (8, 1, 1), ["Conv", "Sub"]),  # what it is taken from
        ("Div", "k c", (8, 1, 1), ["Conv", "Div"]),
        ("Mul", "c k", (8, 5, 1), ["Conv", "Mul"]),  # by row
        ("Mul", "c k", (5,), ["Conv", "Mul"]),  # by column
        ("Mul", "c k", (2, 1, 1, 1), ["Conv", "Mul"]),  # by sample
        ("Mul", "c k", (1, 1, 1, 1, 1), ["Conv", "Mul"]),  # a dimension more
    ],
)
def test_arithmetic_behind_a_convolution(operator: str, used: str, shape: tuple[int, ...], left: list[str]) -> None:
    nodes = [node("Conv", "x w", "c", pads=[1] * 4), node(operator, used, "y")]
    arrays = {"w": normal(0, 8, 4, 3, 3), "k": np.asarray(normal(1, *shape))}
    got, _, _ = folded(nodes, (2, 4, 5, 5), arrays)
    assert got == left


def test_a_division_by_zero_stays() -> None:
    model = model_of(
        [node("Conv", "x w", "c"), node("Div", "c k", "y")],
        {"x": (1, 2, 3, 3)},
        ["y"],
        {"w": normal(0, 2, 2, 1, 1), "k": np.float32([0, 1]).reshape(2, 1, 1)},
    )
    fold(model)
    assert [node.op_type for node in model.graph] == ["Conv", "Div"]


def test_a_single_channel_that_a_constant_widens_stays() -> None:
    nodes = [node("Conv", "x w", "c"), node("Mul", "c k", "y")]
    left, _, _ = folded(nodes, (1, 2, 3, 3), {"w": normal(0, 1, 2, 1, 1), "k": normal(1, 4, 1, 1)})
    assert left == ["Conv", "Mul"]


def test_columns_of_a_matrix_product() -> None:
    arrays = {"w": normal(0, 6, 8), "s": normal(1, 8), "o": normal(2, 8), "half": np.float32(0.5)}
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m s", "t"), node("Add", "t o", "y")]
    left, _, model = folded(nodes, (2, 3, 6), arrays)
    assert left == ["MatMul", "Add"]
    # What isn't the same value any more has another name.
    assert "m" not in {value.name for node in model.graph for value in node.outputs}
    nodes = [node("MatMul", "x w", "m"), node("Add", "m o", "y")]
    assert folded(nodes, (2, 3, 6), arrays)[0] == ["MatMul", "Add"]
    # A scalar is attention's, which is looked for where it is.
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m half", "y")]
    assert folded(nodes, (2, 3, 6), arrays)[0] == ["MatMul", "Mul"]


def test_what_changes_nothing_goes() -> None:
    arrays = {"one": np.ones((4, 1, 1), np.float32), "zero": np.zeros((), np.float32)}
    nodes = [
        node("Mul", "x one", "a"),
        node("Relu", "a", "b"),
        node("Add", "b zero", "c"),
        node("Div", "c one", "d"),
        node("Neg", "d", "e"),
        node("Sub", "e zero", "y"),
    ]
    left, report, _ = folded(nodes, (2, 4, 3, 3), arrays)
    assert left == ["Relu", "Neg"]
    assert report.folded == {"affine_merged": 4}
    # Between an input and an output something must be.
    assert folded([node("Mul", "x one", "y")], (2, 4, 3, 3), arrays)[0] == ["Identity"]


def test_values_used_inside_a_subgraph_keep_their_meaning() -> None:
    inner = helper.make_graph([node("Mul", "c k", "s")], "g", [], [helper.make_tensor_value_info("s", 1, (1, 8, 3, 3))])
    nodes = [
        node("Conv", "x w", "c"),
        node("Greater", "total zero", "yes"),
        node("If", "yes", "y", then_branch=inner, else_branch=inner),
    ]
    nodes.insert(1, node("ReduceSum", "x", "total", keepdims=0))
    arrays = {"w": normal(0, 8, 4, 3, 3), "k": normal(1, 8, 1, 1), "zero": np.float32(0)}
    assert folded(nodes, (1, 4, 5, 5), arrays)[0] == ["Conv", "ReduceSum", "Greater", "If"]


def test_one_weight_for_many_is_not_copied_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MOST_FOLDED", 3 * 4 * 4 * 9 * 4)
    arrays = {"w": normal(0, 4, 4, 3, 3)}
    nodes = []
    for place in range(8):
        arrays |= norm(f"n{place}", 4, seed=place)
        nodes += [node("Conv", "x w", f"c{place}", pads=[1] * 4), batch_norm(f"c{place}", f"b{place}", f"n{place}")]
    nodes.append(node("Sum", " ".join(f"b{place}" for place in range(8)), "y"))
    left, _, _ = folded(nodes, (1, 4, 5, 5), arrays)
    # Three copies; the convolutions without one are the same.
    assert Counter(left) == {"Conv": 4, "Mul": 5, "Add": 5, "Sum": 1}

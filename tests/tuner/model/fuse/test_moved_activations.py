"""Activations behind moves of a product's result."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_settings

make = helper.make_node
FILTERS, W = normal(0, 16, 1, 3, 3), normal(1, 16, 16) / 4
SHAPES = {"flat": np.int64([2, 16, 25]), "heads": np.int64([2, 5, 4, 4])}


def assert_fused(nodes, shape, activations, left) -> ir.Model:
    """Fails unless a model computes what it did, with these activations in its fused nodes and the rest left."""
    model = model_of(nodes, {"x": shape}, ["y"], {"f": FILTERS, "w": W, **SHAPES})
    feeds = {"x": normal(2, *shape)}
    (wanted,) = results(model, feeds)
    fuse(model)
    (got,) = results(model, feeds)
    assert relative_error(got, wanted) < 1e-5
    assert [plugin_settings(node)["activation"] for node in fused_nodes(model)] == activations
    assert [node.op_type for node in model.graph if not node.op_type.startswith("Fused")] == left
    return model


CONV = make("Conv", ["x", "f"], ["c"], group=16, pads=[1, 1, 1, 1], name="conv")
SEQUENCE = [make("Reshape", ["c", "flat"], ["r"]), make("Transpose", ["r"], ["t"], perm=[0, 2, 1])]


def test_a_convolution_takes_it_in_before_pixels_become_a_sequence() -> None:
    """As in SegFormer. What the activation gave keeps its name."""
    nodes = [CONV, *SEQUENCE, make("Gelu", ["t"], ["g"], name="act"), make("MatMul", ["g", "w"], ["y"], name="m")]
    model = assert_fused(nodes, (2, 16, 5, 5), ["gelu_erf", "none"], ["Reshape", "Transpose"])
    assert "g" in [value.name for node in model.graph for value in node.outputs]
    assert not {"r", "t"} & {value.name for node in model.graph for value in node.outputs}


def test_an_output_is_given_by_the_last_move() -> None:
    assert_fused([CONV, *SEQUENCE, make("Relu", ["t"], ["y"])], (2, 16, 5, 5), ["relu"], ["Reshape", "Transpose"])


def test_columns_may_be_parted() -> None:
    """Which rows that move can't be: heads, of a product."""
    nodes = [
        make("MatMul", ["x", "w"], ["p"], name="product"),
        make("Reshape", ["p", "heads"], ["r"]),
        make("Transpose", ["r"], ["t"], perm=[0, 2, 1, 3]),
        make("Sigmoid", ["t"], ["y"]),
    ]
    assert_fused(nodes, (2, 5, 16), ["sigmoid"], ["Reshape", "Transpose"])


@pytest.mark.parametrize(
    ("nodes", "activations", "left"),
    [
        (
            [CONV, *SEQUENCE, make("Relu", ["t"], ["a"]), make("Sub", ["a", "t"], ["y"])],
            ["none"],
            ["Reshape", "Transpose", "Relu", "Sub"],
        ),
        (
            [CONV, make("Relu", ["c"], ["c2"]), make("Reshape", ["c2", "flat"], ["r"]), make("Tanh", ["r"], ["y"])],
            ["relu"],
            ["Reshape", "Tanh"],
        ),
        (
            [make("MaxPool", ["x"], ["c"], kernel_shape=[1, 1]), *SEQUENCE, make("Relu", ["t"], ["y"])],
            [],
            ["MaxPool", "Reshape", "Transpose", "Relu"],
        ),
    ],
    ids=["used elsewhere", "an activation already", "no product"],
)
def test_others_stay_where_they_are(nodes, activations, left) -> None:
    assert_fused(nodes, (2, 16, 5, 5), activations, left)

"""What the rules share: what a plugin takes, constants as vectors, and nodes on the way."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, relative_error, results, value
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.fuse.opening import (
    OPEN,
    as_vector,
    close,
    inputs_of,
    is_open,
    new_constant,
    refusal,
    register_constants,
    scaled,
    settings_of,
)
from tilewright.tuner.model.graph import constant, fused_nodes, plugin_inputs, plugin_settings


def given(*shape: int, seed: int = 0) -> ir.Value:
    return new_constant(normal(seed, *shape), "given")


@pytest.mark.parametrize(
    ("shape", "length", "axis", "taken"),
    [
        ((8,), 8, -1, True),
        ((1, 8), 8, -1, True),
        ((1, 1, 8), 8, -1, True),
        ((1, 8, 1, 1), 8, -3, True),
        ((8, 1, 1), 8, -3, True),
        ((8,), 8, -3, False),  # along the last axis, which is not the channels'
        ((2, 8), 8, -1, False),
        ((4,), 8, -1, False),
    ],
)
def test_what_is_a_vector(shape, length, axis, taken):
    array = given(*shape)
    found = as_vector(array, length, axis)
    assert (found is not None) == taken
    if found is not None:
        assert np.array_equal(constant(found), constant(array).reshape(length))


def test_one_number_is_a_vector_of_it():
    found = as_vector(new_constant(np.float32([[0.5]]), "half"), 3)
    assert constant(found).tolist() == [0.5, 0.5, 0.5]


def test_what_is_no_constant_is_a_vector_only_as_it_is():
    vector = value("v", (8,))
    assert as_vector(vector, 8) is vector
    assert as_vector(value("v", (1, 8)), 8) is None
    assert as_vector(value("v", (8,), "int32"), 8) is None
    assert as_vector(value("v", ("n",)), 8) is None


def test_scaled_is_a_new_constant():
    array = given(2, 3)
    before = constant(array).copy()
    assert np.array_equal(constant(scaled(array, 0.5)), before * np.float32(0.5))
    assert np.array_equal(constant(array), before)


def test_constants_that_layers_share_are_scaled_once():
    """And once more for another factor."""
    nodes, factors = [], (0.5, 0.5, 0.25, 1.0)
    for index, alpha in enumerate(factors):
        nodes.append(helper.make_node("Gemm", [f"h{index}", "w", "c"], [f"m{index}"], alpha=alpha, beta=0.5))
        nodes.append(helper.make_node("Tanh", [f"m{index}"], [f"h{index + 1}"]))
    constants = {"w": normal(0, 8, 8), "c": normal(1, 4, 8)}
    model, feeds = model_of(nodes, {"h0": (4, 8)}, ["h4"], constants), {"h0": normal(2, 4, 8)}
    (wanted,) = results(model, feeds)
    fuse(model)
    assert relative_error(results(model, feeds)[0], wanted) < 1e-6
    given = [plugin_inputs(node) for node in fused_nodes(model)]
    assert len({each["residual"] for each in given}) == 1
    assert given[0]["b"] is given[1]["b"]
    assert len({each["b"] for each in given}) == 3


def test_a_plugin_is_asked_whether_it_takes_a_node():
    a, b = value("a", (4, 8)), value("b", (8, 6))
    assert refusal("gemm", {"a": a, "b": b}, {}) is None
    assert refusal("gemm", {"a": a, "b": value("b", (7, 6))}, {}) is not None
    assert refusal("gemm", {"a": a, "b": value("b", ("n", 6))}, {}) == "the shape of b is not known"
    assert "no plugin of gemm" in refusal("gemm", {"a": a, "b": b, "sinks": a}, {})
    # Asking leaves no trace: the values have no users but the model's.
    assert not a.uses()
    assert not b.uses()


def test_constants_of_rules_become_initializers_of_their_own_names():
    model = model_of([helper.make_node("Add", ["x", "w"], ["y"])], {"x": (3,)}, ["y"], {"w": normal(0, 3)})
    node = next(iter(model.graph))
    node.replace_input_with(0, new_constant(normal(1, 3), "w"))
    register_constants(model)
    assert set(model.graph.initializers) == {"w", "w_2"}
    register_constants(model)
    assert set(model.graph.initializers) == {"w", "w_2"}


def test_open_nodes_are_closed_into_plugins():
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (4, 8)}, ["y"], {})
    old = next(iter(model.graph))
    weights = new_constant(normal(0, 8, 8), "w")
    node = ir.node(
        "gemm", [old.inputs[0], weights], {"activation": "relu", "takes": ["a", "b"]}, domain=OPEN, name="layer"
    )
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [node], old.outputs, node.outputs)
    register_constants(model)
    assert is_open(node)
    assert not is_open(None)
    assert list(inputs_of(node)) == ["a", "b"]
    assert settings_of(node) == {"activation": "relu"}
    close(model)
    (closed,) = fused_nodes(model)
    assert (closed.name, closed.op_type, closed.outputs[0].name) == ("layer", "FusedGemm", "y")
    assert plugin_settings(closed)["activation"] == "relu"

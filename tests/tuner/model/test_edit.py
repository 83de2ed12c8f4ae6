"""The editor: names that are free, nodes where their inputs are known, nothing left over."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, results
from tilewright.tuner.model.edit import Editor

make = helper.make_node


@pytest.fixture
def model() -> ir.Model:
    nodes = [make("Relu", ["x"], ["p"], name="first"), make("Add", ["p", "w"], ["y"], name="second")]
    return model_of(nodes, {"x": (3,)}, ["y"], {"w": normal(0, 3)})


def test_a_name_is_given_once(model):
    edit = Editor(model)
    assert [edit.name("new"), edit.name("new"), edit.name("p"), edit.name("second"), edit.name("w")] == [
        "new", "new_2", "p_2", "second_2", "w_2",
    ]  # fmt: skip


@pytest.mark.parametrize("of", ["x", "p"])
def test_a_node_stands_where_its_input_is_known(model, of):
    edit = Editor(model)
    second = list(model.graph)[1]
    source = second.inputs[0] if of == "p" else model.graph.inputs[0]
    node = edit.node("Neg", [source], source, ir.DataType.FLOAT, base="turned")
    edit.after(source, node)
    second.replace_input_with(0, node.outputs[0])
    edit.tidy()
    x = normal(1, 3)
    taken = -np.maximum(x, 0) if of == "p" else -x
    assert np.allclose(results(model, {"x": x})[0], taken + normal(0, 3))
    assert len(model.graph) == (3 if of == "p" else 2)  # what nothing needs is gone


def test_a_replaced_node_leaves_its_names_types_and_shapes(model):
    edit = Editor(model)
    first = next(iter(model.graph))
    amount = edit.constant(np.float32([2, 2, 2]), "w")
    assert amount.name == "w_2"
    edit.replace(first, ir.node("Mul", [first.inputs[0], amount]))
    edit.tidy()
    value = next(iter(model.graph)).outputs[0]
    assert (value.name, value.dtype, list(value.shape)) == ("p", ir.DataType.FLOAT, [3])
    x = normal(1, 3)
    assert np.allclose(results(model, {"x": x})[0], 2 * x + normal(0, 3))


def test_initializers_that_nothing_needs_go(model):
    edit = Editor(model)
    edit.constant(np.float32([1]), "idle")
    edit.tidy()
    assert set(model.graph.initializers) == {"w"}

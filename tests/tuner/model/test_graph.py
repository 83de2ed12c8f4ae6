from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, value
from tilewright.tuner.model import graph
from tilewright.tuning_db.errors import ModelError, UsageError

make = helper.make_node


def test_what_is_constant_and_what_is_not():
    nodes = [
        make("Constant", [], ["c"], value_float=2.0),
        make("Mul", ["x", "c"], ["p"]),
        make("Mul", ["p", "w"], ["y"]),
    ]
    model = model_of(nodes, {"x": (3,)}, ["y"], {"w": np.array([1, 2, 3], np.float32)})
    (x, c), (p, w) = (node.inputs for node in list(model.graph)[1:])
    assert [graph.is_constant(each) for each in (x, c, p, w, None)] == [False, True, False, True, False]
    assert [graph.scalar(each) for each in (x, c, w, None)] == [None, 2.0, None, None]
    assert graph.constant(w).tolist() == [1, 2, 3]
    assert graph.constant(x) is None
    # An initializer that is an input as well is a default, which a caller may replace.
    model.graph.inputs.append(w)
    assert graph.constant(w) is None
    assert not graph.is_constant(w)


def test_shapes_and_data_types():
    assert graph.static_shape(value("x", (2, 3))) == (2, 3)
    assert graph.static_shape(value("x", ("batch", 3))) is None
    assert graph.static_shape(ir.Value(name="x")) is None
    assert graph.elements(value("x", ())) == 1
    assert graph.elements(value("x", (2, 0))) == 0
    assert graph.dtype_name(value("x", (), "bf16")) == "bf16"
    assert graph.dtype_name(ir.Value(name="x")) == "?"
    assert graph.dtype_name(ir.Value(name="x", type=ir.TensorType(ir.DataType.STRING))) == "string"


def test_a_fused_node_is_its_plugin():
    inputs = {name: value(name, shape) for name, shape in {"a": (4, 8), "bias": (2,), "b": (8, 2)}.items()}
    node = graph.make_fused("gemm", inputs, {"activation": "relu"}, name="layer")
    assert node.op_type == "FusedGemmBias"
    assert [each.name for each in node.inputs] == ["a", "b", "bias"]
    assert graph.plugin_inputs(node) == inputs
    assert graph.plugin_settings(node)["activation"] == "relu"
    assert node.attributes["plugin_namespace"].value == "tilewright"
    assert graph.is_fused(node)
    assert graph.op_of(node) == "gemm"
    graph.infer_outputs(node)
    assert graph.static_shape(node.outputs[0]) == (4, 2)
    assert graph.dtype_name(node.outputs[0]) == "fp32"


@pytest.mark.parametrize(
    ("domain", "operator"), [("tilewright", "Gemm"), ("other", "FusedGemm"), ("tilewrights", "FusedGemm")]
)
def test_other_nodes_are_not_fused_ones(domain, operator):
    assert not graph.is_fused(ir.node(operator, [value("a", (1,))], domain=domain))


def test_wrong_inputs_and_unknown_shapes_are_told():
    with pytest.raises(UsageError, match="no plugin of gemm takes nonsense"):
        graph.make_fused(
            "gemm", {"a": value("a", (1, 1)), "b": value("b", (1, 1)), "nonsense": value("c", ())}, {}, name="n"
        )
    node = graph.make_fused("gemm", {"a": value("a", ("n", 8)), "b": value("b", (8, 2))}, {}, name="layer")
    with pytest.raises(ModelError, match="node 'layer': the shape of its input 'a'"):
        graph.infer_outputs(node)


def test_every_node_gets_a_name_of_its_own():
    nodes = [
        make("Relu", ["x"], ["p"], name="same"),
        make("Relu", ["p"], ["q"], name="same"),
        make("Relu", ["q"], ["y"]),
    ]
    model = model_of(nodes, {"x": (2,)}, ["y"], {})
    graph.unique_names(model)
    assert [node.name for node in model.graph] == ["same", "same_2", "Relu_y"]
    assert normal(0, 2).shape == (2,)


def test_nodes_without_outputs_get_names_too():
    node = ir.Node("com.microsoft", "Gelu", [], num_outputs=0)
    model = ir.Model(ir.Graph([], [], nodes=[node], opset_imports={"": 21}), ir_version=10)
    node.name = None
    graph.unique_names(model)
    assert node.name == "Gelu"


def test_a_name_that_many_ask_for_is_not_counted_from_the_start_each_time():
    class Counted(set[str]):
        asked = 0

        def __contains__(self, name: object) -> bool:
            self.asked += 1
            return super().__contains__(name)

    names = graph.Names(Counted({"a_3"}))
    assert [names.free("a") for _ in range(4)] == ["a", "a_2", "a_4", "a_5"]
    for _ in range(100):
        names.free("a")
    assert names.taken.asked < 400
    names.taken.discard("a")
    assert (names.free("a"), names.free("b")) == ("a", "b")

"""Weights and peak activations: small graphs by hand, and random ones against a simulation that is told nothing of
liveness."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.tuner.model.graphs import model_of, normal, value
from tilewright.tuner.model.graph import DTYPES
from tilewright.tuner.model.report.memory import memory_of, value_bytes, weights_of
from tilewright.tuning_db.errors import ModelError


def chain(*nodes: Any, size: int = 10, outputs: tuple[str, ...] = ("y",), **constants: np.ndarray) -> ir.Model:
    return model_of(
        [helper.make_node(op, list(reads), list(makes), name) for op, reads, makes, name in nodes],
        {"x": (size,)},
        outputs,
        constants,
    )


def test_a_chain_holds_what_a_node_reads_and_makes() -> None:
    model = chain(("Relu", ["x"], ["a"], "first"), ("Neg", ["a"], ["b"], "second"), ("Abs", ["b"], ["y"], "third"))
    found = memory_of(model)
    # x and y all the time, a and b while `second` runs.
    assert (found.peak_bytes, found.peak_node, found.interface_bytes) == (4 * 40, "second", 2 * 40)
    assert found.weights == {}


def test_a_residual_lives_until_it_is_added() -> None:
    model = chain(
        ("Relu", ["x"], ["a"], "n0"),
        ("Neg", ["a"], ["b"], "n1"),
        ("Abs", ["b"], ["c"], "n2"),
        ("Add", ["c", "a"], ["y"], "n3"),
    )
    found = memory_of(model)
    assert (found.peak_bytes, found.peak_node) == (5 * 40, "n2")  # x, y; a, b, c


def test_views_take_nothing_and_keep_what_they_are_of_alive() -> None:
    nodes = [
        ("Relu", ["x"], ["a"], "n0"),
        ("Reshape", ["a", "shape"], ["v"], "n1"),
        ("Relu", ["x"], ["b"], "n2"),
        ("Relu", ["b"], ["c"], "n3"),
        ("Flatten", ["v"], ["w"], "n4"),
        ("MatMul", ["w", "c"], ["y"], "n5"),
    ]
    model = chain(*nodes, shape=np.array([1, 10]))
    found = memory_of(model)
    assert found.peak_bytes == 40 + 4 + 3 * 40  # x, y (one element); a through its views, b, c while n3 runs
    assert found.peak_node == "n3"


def test_an_output_that_is_a_view_of_the_input_is_one_piece_of_memory() -> None:
    model = chain(("Reshape", ["x", "shape"], ["y"], "n0"), shape=np.array([2, 5]))
    found = memory_of(model)
    assert (found.peak_bytes, found.interface_bytes) == (40, 40)


def test_what_nobody_reads_is_there_while_it_is_made() -> None:
    nodes = [helper.make_node("Split", ["x"], ["y", "unused"], "split", num_outputs=2)]
    found = memory_of(model_of(nodes, {"x": (10,)}, ["y"], {}))
    assert found.peak_bytes == 40 + 20 + 20


def test_weights_by_data_type() -> None:
    nodes = [
        helper.make_node(
            "Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.FLOAT, [3, 1], [1.0, 2.0, 3.0])
        ),
        helper.make_node("Add", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "k"], ["b"]),
        helper.make_node("Reshape", ["b", "shape"], ["y"]),
    ]
    model = model_of(nodes, {"x": (10,)}, ["y"], {"w": normal(0, 10), "shape": np.array([5, 6])})
    assert weights_of(model) == {"fp32": 40 + 12, "int64": 16}
    assert memory_of(model).weight_bytes == 68


@pytest.mark.parametrize(
    ("kind", "shape", "size"),
    [
        (ir.DataType.FLOAT, (3, 5), 60),
        (ir.DataType.BFLOAT16, (3, 5), 30),
        (ir.DataType.FLOAT8E4M3FN, (3, 5), 15),
        (ir.DataType.INT4, (3, 5), 8),  # two in a byte, the last alone
        (ir.DataType.BOOL, (7,), 7),
        (ir.DataType.INT64, (), 8),
        (ir.DataType.FLOAT, (3, 0), 0),
    ],
)
def test_bytes_of_a_value(kind: ir.DataType, shape: tuple[int, ...], size: int) -> None:
    assert value_bytes(ir.Value(name="v", type=ir.TensorType(kind), shape=ir.Shape(shape))) == size


def test_what_has_no_size_gets_one_line() -> None:
    with pytest.raises(ModelError, match="value 'v' has no static shape: its memory can't be told"):
        value_bytes(value("v", ("batch", 3)))
    with pytest.raises(ModelError, match="value 'v' has the type STRING"):
        value_bytes(ir.Value(name="v", type=ir.TensorType(ir.DataType.STRING), shape=ir.Shape((1,))))
    with pytest.raises(ModelError, match="value 'v' has the type unknown"):
        value_bytes(ir.Value(name="v", shape=ir.Shape((1,))))


def test_results_of_unknown_size_are_counted_apart() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], "n0"),
        helper.make_node("NonZero", ["a"], ["i"], "n1"),
        helper.make_node("Identity", ["i"], ["j"], "n2"),
        helper.make_node("Cast", ["j"], ["y"], "n3", to=TensorProto.FLOAT),
    ]
    found = memory_of(model_of(nodes, {"x": (10,)}, ["y"], {}))
    # x and a; the places are not known, of which j is a view, nor is what they are cast to.
    assert (found.peak_bytes, found.interface_bytes, found.unknown_values) == (80, 40, 2)
    assert memory_of(chain(("Relu", ["x"], ["y"], "n0"))).unknown_values == 0


def test_external_weights_are_not_read(tmp_path: Any) -> None:
    model = chain(("Add", ["x", "w"], ["y"], "n0"), w=normal(0, 10))
    ir.save(model, tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=0)
    lazy = ir.load(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    assert memory_of(lazy).weights == {"fp32": 40}


def test_subgraphs_count_where_they_run() -> None:
    def branch(name: str, length: int) -> Any:
        nodes = [helper.make_node("Neg", ["x"], [f"{name}0"])]
        nodes += [helper.make_node("Neg", [f"{name}{i}"], [f"{name}{i + 1}"]) for i in range(length)]
        made = helper.make_tensor_value_info(f"{name}{length}", TensorProto.FLOAT, [10])
        info = [helper.make_tensor_value_info(f"{name}{i}", TensorProto.FLOAT, [10]) for i in range(length)]
        return helper.make_graph(nodes, name, [], [made], value_info=info)

    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", TensorProto.BOOL, [], [True])),
        helper.make_node("If", ["c"], ["y"], "if", then_branch=branch("t", 3), else_branch=branch("e", 0)),
    ]
    found = memory_of(model_of(nodes, {"x": (10,)}, ["y"], {}))
    # x and y, and of the longer branch its result all the time, and what a node of it reads and makes.
    assert (found.peak_bytes, found.peak_node) == (80 + 120, "if")


def test_a_graph_without_nodes() -> None:
    x = value("x", (10,))
    found = memory_of(ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 21}), ir_version=10))
    assert (found.peak_bytes, found.peak_node) == (40, None)


def simulate(model: ir.Model) -> tuple[int, int]:
    """The most bytes at once, and during which node: runs the graph with counted references, freeing what no later
    node and no caller asks for, and knows of liveness nothing else."""
    outputs = {each.name for each in model.graph.outputs}
    buffers = {each.name: each.name for each in model.graph.inputs}  # of each value, the one it lies in
    sizes = {each.name: 4 * math.prod(each.shape) for each in model.graph.inputs}
    nodes = list(model.graph)
    for node in nodes:  # which buffer each value lies in, from what operators do
        for out in node.outputs:
            same = node.op_type in ("Reshape", "Identity", "Flatten")
            buffers[out.name] = buffers[node.inputs[0].name] if same else out.name
            sizes.setdefault(buffers[out.name], 4 * math.prod(out.shape))
    callers = {buffers[each.name] for each in (*model.graph.inputs, *model.graph.outputs)}
    assert outputs <= set(buffers)
    held: set[str] = set(callers)
    best = (-1, -1)
    for index, node in enumerate(nodes):
        held |= {buffers[out.name] for out in node.outputs}
        now = sum(sizes[name] for name in held)
        if now > best[0]:
            best = (now, index)
        asked = {buffers[each.name] for later in nodes[index + 1 :] for each in later.inputs if each.name in buffers}
        held &= asked | callers
    return best


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    """Elementwise, reducing and view nodes in any order, each reading any value before it; any of them outputs."""
    values = [value("x0", (draw(st.integers(1, 9)), draw(st.integers(1, 9))))]
    inputs = list(values)
    shape_of = ir.Value(name="shape", const_value=ir.tensor(np.array([-1]), name="shape"))
    nodes = []
    for index in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["Relu", "Concat", "Reshape", "Identity", "Flatten", "ReduceMax"]))
        source = draw(st.sampled_from(values))
        elements = math.prod(int(dim) for dim in source.shape or ())
        reads = [source]
        if kind == "Concat":
            reads.append(draw(st.sampled_from(values)))
            elements += math.prod(int(dim) for dim in reads[1].shape or ())
        elif kind == "ReduceMax":
            elements = 1
        elif kind == "Reshape":
            reads.append(shape_of)
        out = ir.Value(name=f"v{index}", type=ir.TensorType(DTYPES["fp32"]), shape=ir.Shape((elements,)))
        nodes.append(ir.Node("", kind, reads, outputs=[out], name=f"n{index}"))
        values.append(out)
    outputs = draw(st.lists(st.sampled_from(values[1:]), min_size=1, max_size=3, unique=True))
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=[shape_of], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


@settings(max_examples=300, deadline=None)
@given(graphs())
def test_the_peak_is_that_of_a_simulation(model: ir.Model) -> None:
    found = memory_of(model)
    peak, index = simulate(model)
    assert found.peak_bytes == peak
    assert found.peak_node == f"n{index}"

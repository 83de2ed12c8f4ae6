from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.tuner.model.files import proto, saved, tensor, value
from tests.tuner.model.folds import folded, node
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.reading.read import read_model

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def test_constants_dropout_and_identity_go() -> None:
    nodes = [
        node("Exp", "k", "e"),
        node("Shape", "x", "s"),
        node("Expand", "e s", "w"),
        node("Identity", "x", "i"),
        node("Dropout", "i", "d"),
        node("Cast", "d", "f", to=1),
        node("Add", "f w", "y"),
        node("Neg", "x", "unused"),
    ]
    left, report, _ = folded(nodes, (2, 3), {"k": normal(0, 3)})
    assert left == ["Add"]
    assert report.folded == {"constant": 6, "unused": 1}


def test_transposes_and_casts_that_cancel_go() -> None:
    nodes = [
        node("Transpose", "x", "a", perm=[1, 2, 0]),
        node("Transpose", "a", "b", perm=[2, 0, 1]),
        node("Relu", "b", "y"),
    ]
    assert folded(nodes, (2, 3, 4), {})[0] == ["Relu"]


def test_sum_of_two_is_add() -> None:
    arrays = {"k": normal(0, 2, 3)}
    assert folded([node("Sum", "x k", "y")], (2, 3), arrays)[0] == ["Add"]
    assert folded([node("Sum", "x k x", "y")], (2, 3), arrays)[0] == ["Sum"]
    assert folded([node("Sum", "x", "s"), node("Relu", "s", "y")], (2, 3), arrays)[0] == ["Relu"]


def test_pad_goes_into_the_convolution() -> None:
    arrays = {"w": normal(0, 8, 4, 3, 3), "p": np.int64([0, 0, 1, 2, 0, 0, 3, 0])}
    nodes = [node("Pad", "x p", "p1"), node("Conv", "p1 w", "y", pads=[0, 1, 0, 0])]
    left, report, model = folded(nodes, (2, 4, 5, 5), arrays)
    assert left == ["Conv"]
    assert report.folded == {"no_op": 1}
    assert list(model.graph[0].attributes.get_ints("pads", [])) == [1, 3, 3, 0]
    reflected = [node("Pad", "x p", "p1", mode="reflect"), nodes[1]]
    assert folded(reflected, (2, 4, 5, 5), arrays)[0] == ["Pad", "Conv"]


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [8, 9])
def test_automatic_pads_become_explicit(mode: str, stride: int, size: int) -> None:
    nodes = [node("Conv", "x w", "y", auto_pad=mode, strides=[stride] * 2)]
    left, report, model = folded(nodes, (1, 2, size, size), {"w": normal(0, 3, 2, 3, 2)})
    assert left == ["Conv"]
    assert report.folded == {"auto_pad": 1}
    assert "auto_pad" not in model.graph[0].attributes


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("stride", [1, 2])
def test_automatic_pads_of_dilated_kernels(mode: str, stride: int) -> None:
    """ONNX Runtime has none. Such a kernel is one with zeros in it."""
    kernel, spread = normal(0, 3, 2, 3, 2), np.zeros((3, 2, 7, 3), np.float32)
    spread[:, :, ::3, ::2] = kernel
    x = normal(1, 1, 2, 9, 8)
    got, wanted = (
        model_of(
            [node("Conv", "x w", "y", auto_pad=mode, strides=[stride] * 2, **more)], {"x": x.shape}, ["y"], {"w": w}
        )
        for w, more in ((kernel, {"dilations": [3, 2]}), (spread, {}))
    )
    fold(got)
    np.testing.assert_allclose(results(got, {"x": x})[0], results(wanted, {"x": x})[0], rtol=1e-5, atol=1e-5)


def test_what_computes_the_same_is_done_once() -> None:
    arrays = {"k": normal(0, 3), "l": normal(0, 3), "m": normal(1, 3)}
    nodes = [node("Add", "x k", "a"), node("Add", "x l", "b"), node("Add", "x m", "c"), node("Sum", "a b c", "y")]
    left, report, _ = folded(nodes, (2, 3), arrays)
    assert left == ["Add", "Add", "Sum"]
    assert report.folded == {"common": 1}


NO_CHANGE = [
    node("Identity", "a", "b"),
    node("Dropout", "a", "b"),
    node("Reshape", "a shape", "b"),
    node("Transpose", "a", "b", perm=[0, 1]),
    node("Cast", "a", "b", to=1),
]


@pytest.mark.parametrize("last", NO_CHANGE, ids=lambda last: last.op_type)
def test_outputs_that_come_to_one_value_keep_their_names(last: onnx.NodeProto) -> None:
    nodes = [node("Relu", "x", "a"), last, node("Identity", "b", "c")]
    left, _, _ = folded(nodes, (2, 3), {"shape": np.int64([2, 3])}, outputs=("b", "a", "c"))
    assert left.count("Relu") == 1


def test_an_output_that_is_listed_twice_or_an_input_or_a_weight_is_left(tmp_path: Path) -> None:
    outputs = [value("y", (2, 3)), value("x", (2, 3)), value("k", (3,)), value("y", (2, 3))]
    made = proto([node("Add", "x k", "y")], outputs=outputs, tensors=[tensor("k", normal(0, 3))])
    model = read_model(saved(made, tmp_path / "m.onnx"))
    report = fold(model)
    assert [output.name for output in model.graph.outputs] == ["y", "x", "k", "y"]
    assert report.nodes_after == 1


def branch(*nodes: onnx.NodeProto, output: str = "o") -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "branch", [], [helper.make_tensor_value_info(output, 1, None)])


def chosen(then: onnx.GraphProto, other: onnx.GraphProto, out: str = "q") -> onnx.NodeProto:
    return node("If", "yes", out, then_branch=then, else_branch=other)


THROUGH = {
    "Identity": [node("Identity", "g", "o")],
    "Dropout": [node("Dropout", "g", "o")],
    "Cast": [node("Cast", "g", "o", to=1)],
    "Transpose": [node("Transpose", "g", "o", perm=[0, 1])],
    "two": [node("Transpose", "g", "a", perm=[1, 0]), node("Transpose", "a", "o", perm=[1, 0])],
    "chain": [node("Identity", "g", "a"), node("Cast", "a", "b", to=1), node("Identity", "b", "o")],
}


@pytest.mark.parametrize("other", ["Sigmoid", "Identity"])
@pytest.mark.parametrize("then", THROUGH)
def test_a_branch_that_passes_an_outer_value_through_gives_it_by_an_identity(then: str, other: str) -> None:
    """It may not give the value itself, which is an output of the model as well, and keeps its name."""
    branches = branch(*THROUGH[then]), branch(node(other, "g", "o"))
    nodes = [
        node("Relu", "x", "g"),
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "yes"),
        chosen(*branches),
        node("Add", "q g", "y"),
    ]
    left, _, model = folded(nodes, (2, 3), {"zero": np.float32(0)}, outputs=("y", "g"))
    assert left == ["Relu", "ReduceSum", "Greater", "If", "Add"]
    found = [[each.op_type for each in graph] for graph in model.graph.subgraphs()]
    assert sorted(found) == sorted([["Identity"], [other]])
    assert {value.name for graph in model.graph.subgraphs() for each in graph for value in each.inputs} == {"g"}


def test_a_value_of_the_branch_around_is_an_outer_one() -> None:
    inner = chosen(branch(node("Identity", "b", "p"), output="p"), branch(node("Identity", "g", "p"), output="p"), "k")
    around = branch(node("Sigmoid", "g", "b"), inner, node("Add", "k b", "o"))
    nodes = [
        node("Relu", "x", "g"),
        node("ReduceSum", "x", "sum", keepdims=0),
        node("Greater", "sum zero", "yes"),
        chosen(around, branch(node("Identity", "g", "o"))),
        node("Exp", "q", "y"),
    ]
    folded(nodes, (2, 3), {"zero": np.float32(0)})


def test_what_a_loop_alone_passes_through_is_still_made() -> None:
    bodies = helper.make_graph(
        [node("Identity", "go", "on"), node("Identity", "g", "v"), node("Identity", "last", "next")],
        "body",
        [helper.make_tensor_value_info(*each) for each in (("i", 7, []), ("go", 9, []), ("last", 1, [2, 3]))],
        [helper.make_tensor_value_info(*each) for each in (("on", 9, []), ("next", 1, [2, 3]), ("v", 1, [2, 3]))],
    )
    nodes = [node("Exp", "x", "g"), node("Loop", "count go_on x", "kept y", body=bodies)]
    left, _, _ = folded(nodes, (2, 3), {"count": np.int64(3), "go_on": np.bool_(True)})
    assert left == ["Exp", "Loop"]


def test_quantisation_is_kept() -> None:
    arrays = {"w": np.int8([[1, 2], [3, 4]]), "s": np.float32(0.1)}
    nodes = [node("DequantizeLinear", "w s", "d"), node("MatMul", "x d", "y")]
    assert folded(nodes, (2, 2), arrays)[0] == ["DequantizeLinear", "MatMul"]


def seeded(name: str, path: Path) -> Path:
    """A light model with random weights in place of its constant ones."""
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    rng = np.random.default_rng(0)
    shapes = {tensor.name: tuple(numpy_helper.to_array(tensor).tolist()) for tensor in model.graph.initializer}
    uses = {name: (node.op_type, place) for node in model.graph.node for place, name in enumerate(node.input)}
    kept = []
    for made in model.graph.node:
        if made.op_type != "ConstantOfShape":
            kept.append(made)
            continue
        shape, use = shapes[made.input[0]], uses[made.output[0]]
        if use in (("BatchNormalization", 1), ("BatchNormalization", 4), ("Unsqueeze", 0)):
            array = rng.uniform(0.5, 1.5, shape)
        elif use in (("Conv", 1), ("Gemm", 1)):
            array = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            array = rng.standard_normal(shape) * 0.1
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), made.output[0]))
        model.graph.input.append(helper.make_tensor_value_info(made.output[0], 1, shape))
    model.graph.ClearField("node")
    model.graph.node.extend(kept)
    # The logits, not what Softmax makes of them: of seeded weights it makes a one and zeros.
    if kept[-1].op_type == "Softmax":
        logits = kept[-1].input[0]
        model.graph.ClearField("output")
        model.graph.output.append(helper.make_tensor_value_info(logits, 1, None))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(("name", "left"), [("squeezenet", 66), ("shufflenet", 153), ("inception_v2", 163)])
def test_light_models(name: str, left: int, tmp_path: Path) -> None:
    import onnxruntime

    path = seeded(name, tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = read_model(path)
    (source,) = (value.name for value in model.graph.inputs)
    x = normal(5, 1, 3, 224, 224)
    (wanted,) = session.run(None, {source: x})
    assert wanted.std() > 0.1 * np.abs(wanted).max()
    report = fold(model)
    (got,) = results(model, {source: x})  # type: ignore[dict-item]
    assert relative_error(got, wanted) <= 1e-5
    assert report.nodes_after <= left
    assert not {"BatchNormalization", "Unsqueeze", "Sum", "Dropout", "Constant"} & {
        node.op_type for node in model.graph
    }

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.files import (
    LIGHT,
    RELU,
    assert_refused,
    function,
    node,
    own,
    proto,
    refusal,
    saved,
    tensor,
    value,
)
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.graph import static_shape
from tilewright.tuner.model.reading.read import read_model
from tilewright.tuning_db.errors import ModelError


def test_an_old_model_is_converted_and_every_shape_known() -> None:
    model = read_model(LIGHT / "light_squeezenet.onnx")
    assert model.opset_imports[""] == 21
    assert [value.name for value in model.graph.inputs] == ["data_0"]  # its IR 3 lists initializers there too
    values = [out for node in model.graph for out in node.outputs]
    assert all(static_shape(value) is not None and value.dtype is not None for value in values)
    assert static_shape(model.graph.outputs[0]) == (1, 1000, 1, 1)
    names = [node.name for node in model.graph]
    assert all(names)
    assert len(set(names)) == len(names)


def test_it_computes_what_the_file_computes(tmp_path: Path) -> None:
    # Semantics that changed on the way from 9 to 21: axes as inputs, Softmax over all trailing axes, Dropout, Upsample.
    nodes = [
        node("Upsample", "x scales", "up", mode="nearest"),
        node("Softmax", "up", "soft", axis=1),
        node("Dropout", "soft", "kept", ratio=0.5),
        node("ReduceSum", "kept", "sum", axes=[3], keepdims=0),
        node("Unsqueeze", "sum", "wide", axes=[0]),
        node("Clip", "wide", "y", min=0.01, max=0.2),
    ]
    model = proto(
        nodes,
        inputs=[value("x", (2, 3, 4, 4)), value("scales", (4,))],
        tensors=[tensor("scales", np.float32([1, 1, 2, 2]))],
        opset=9,
        ir_version=3,
    )
    x = normal(0, 2, 3, 4, 4)
    wanted = results(ir.from_proto(onnx.shape_inference.infer_shapes(model)), {"x": x})[0]
    (got,) = results(read_model(saved(model, tmp_path / "m.onnx")), {"x": x})
    assert got.shape == wanted.shape == (1, 2, 3, 8)
    assert relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize("opset", [21, 23, 24])
def test_newer_opsets_are_kept(opset: int, tmp_path: Path) -> None:
    inputs = [value(name, (1, 2, 8, 4)) for name in "qkv"]
    attention = node("Attention", "q k v", "y") if opset > 22 else node("Mul", "q k", "y")
    model = read_model(saved(proto([attention], inputs=inputs, opset=opset), tmp_path / "m.onnx"))
    assert model.opset_imports[""] == opset
    assert static_shape(model.graph.outputs[0]) == (1, 2, 8, 4)


def test_subgraphs_are_converted_too_or_refused(tmp_path: Path) -> None:
    inner = helper.make_graph([node("Squeeze", "x", "s", axes=[0])], "then", [], [value("s", (3,))])
    other = helper.make_graph([node("ReduceSum", "x", "r", axes=[0], keepdims=0)], "else", [], [value("r", (3,))])
    nodes = [node("If", "c", "y", then_branch=inner, else_branch=other)]
    inputs = [value("x", (1, 3)), value("c", (), TensorProto.BOOL)]
    path = saved(proto(nodes, inputs=inputs, opset=11, ir_version=6), tmp_path / "m.onnx")
    model = read_model(path)
    feeds = {"x": normal(1, 1, 3), "c": np.array(True)}
    np.testing.assert_array_equal(results(model, feeds)[0], feeds["x"][0])


def test_functions_are_inlined(tmp_path: Path) -> None:
    inner = function("inner", [helper.make_node("Exp", ["a"], ["e"]), helper.make_node("Neg", ["e"], ["b"])])
    outer = function("outer", [own("inner", "a", "t"), own("inner", "t", "b")])
    model = read_model(
        saved(proto([own("outer", "x", "y")], domains=["own"], functions=[inner, outer]), tmp_path / "m.onnx")
    )
    assert [node.op_type for node in model.graph] == ["Exp", "Neg", "Exp", "Neg"]
    assert not model.functions
    x = normal(2, 2, 3)
    np.testing.assert_allclose(results(model, {"x": x})[0], -np.exp(-np.exp(x)), rtol=1e-6)


def test_functions_of_another_opset_are_converted(tmp_path: Path) -> None:
    old = function("old", [helper.make_node("ReduceMax", ["a"], ["b"], axes=[1])], opset=13)
    model = read_model(saved(proto([own("old", "x", "y")], domains=["own"], functions=[old]), tmp_path / "m.onnx"))
    x = normal(3, 2, 3)
    np.testing.assert_array_equal(results(model, {"x": x})[0], x.max(1, keepdims=True))


def test_shapes_by_arithmetic_on_shapes_become_known(tmp_path: Path) -> None:
    # Floor, which onnx's data propagation doesn't follow: folding does.
    nodes = [
        node("Shape", "x", "s"),
        node("Cast", "s", "f", to=TensorProto.FLOAT),
        node("Mul", "f half", "h"),
        node("Floor", "h", "w"),
        node("Cast", "w", "i", to=TensorProto.INT64),
        node("ConstantOfShape", "i", "c", value=tensor("", np.float32([2]))),
        node("Relu", "c", "y"),
    ]
    model = proto(nodes, inputs=[value("x", ("n", 6))], tensors=[tensor("half", np.float32([0.5, 1]))])
    result = read_model(saved(model, tmp_path / "m.onnx"), dims={"n": 5})
    assert static_shape(result.graph.outputs[0]) == (2, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n", "not an ONNX file, or is truncated"),
        (b"ir_version: 8\ngraph { }\n" * 50, "not an ONNX file"),
        (pickle.dumps({"weights": [1.0] * 100}), "not an ONNX file"),
        (np.random.default_rng(0).bytes(10_000), "not an ONNX file"),
        (b"\x08\x0a", "it has no graph"),
        (b"PK\x03\x04" + bytes(500), "not an ONNX file"),
    ],
)
def test_no_onnx_file(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert message in refusal(path)
    assert refusal(path).startswith(f"{path} ")


def test_no_regular_file(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(f"{tmp_path} is a folder")
    assert "No such file" in refusal(tmp_path / "absent.onnx")
    os.mkfifo(tmp_path / "pipe.onnx")
    assert "not a regular file" in refusal(tmp_path / "pipe.onnx")
    large = tmp_path / "large.onnx"
    large.touch()
    os.truncate(large, 2**31)
    assert "has 2147483648 bytes" in refusal(large)


def test_a_null_character_in_the_path() -> None:
    assert "is no path" in refusal(Path("a\0b.onnx"))


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = (LIGHT / "light_squeezenet.onnx").read_bytes()
    path = tmp_path / "m.onnx"
    for length in np.linspace(1, len(whole) - 1, 60).astype(int):
        path.write_bytes(whole[:length])
        refusal(path)


def test_damaged_anywhere(tmp_path: Path) -> None:
    """Flipped bytes: read, or refused in a line; never another error."""
    whole = bytearray(
        saved(
            proto([node("MatMul", "x w", "m"), node("Relu", "m", "y")], tensors=[tensor("w", normal(0, 3, 4))]),
            tmp_path / "m.onnx",
        ).read_bytes()
    )
    rng = np.random.default_rng(0)
    lines: list[str] = []
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 2):
            damaged[place] = rng.integers(256)
        (tmp_path / "m.onnx").write_bytes(damaged)
        try:
            read_model(tmp_path / "m.onnx")
        except ModelError as error:
            lines.append(str(error))
    assert 100 < len(lines) < 300
    assert all(line.isprintable() for line in lines)


WRONG: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "unknown operator": (lambda: proto([node("Relux", "x", "y")]), r"not valid.*Relux"),
    "ir too new": (lambda: proto([RELU], ir_version=99), r"IR version 99"),
    "opset too old": (lambda: proto([RELU], opset=8), r"imports 8 of the standard operators: it must be one from 9"),
    "output of texts": (
        lambda: proto([node("Cast", "x", "y", to=TensorProto.STRING)], outputs=[value("y", None, TensorProto.STRING)]),
        r"output 'y' is string: only tensors of truth values, integers and floats",
    ),
    "output of 4 bits": (
        lambda: proto([node("Cast", "x", "y", to=TensorProto.INT4)], outputs=[value("y", None, TensorProto.INT4)]),
        r"output 'y' is int4",
    ),
    "output of a float that no array has": (
        lambda: proto(
            [node("Cast", "x", "y", to=TensorProto.FLOAT8E4M3FNUZ)],
            outputs=[value("y", None, TensorProto.FLOAT8E4M3FNUZ)],
        ),
        r"output 'y' is float8e4m3fnuz",
    ),
    "sequence": (
        lambda: proto(
            [node("SplitToSequence", "x", "y")],
            outputs=[
                helper.make_value_info("y", helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, None)))
            ],
        ),
        r"output 'y' is of the kind sequence: only tensors",
    ),
    "optional": (
        lambda: proto(
            [node("Optional", "x", "y")],
            outputs=[
                helper.make_value_info("y", helper.make_optional_type_proto(helper.make_tensor_type_proto(1, None)))
            ],
        ),
        r"output 'y' is of the kind optional",
    ),
    "opset too new": (lambda: proto([RELU], opset=999), r"imports 999"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    assert_refused(make(), message, tmp_path)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("written", ["initializer", "Constant"])
def test_dropout_of_training(written: str, training: bool, tmp_path: Path) -> None:
    mode = tensor("mode", training)
    ratio = tensor("ratio", np.float32(0.5))
    nodes = [node("Dropout", "x ratio mode", "y")]
    initializers = [ratio, mode]
    if written == "Constant":
        nodes.insert(0, helper.make_node("Constant", [], ["mode"], value=initializers.pop()))
    path = saved(proto(nodes, tensors=initializers), tmp_path / "m.onnx")
    if training:
        assert "'Dropout_y', a Dropout, has training_mode=true" in refusal(path)
    else:
        assert len(read_model(path).graph) == len(nodes)


def loop(depth: int) -> onnx.NodeProto:
    """`If` in `If` in `If`."""
    inner = node("Identity", "x", f"out{depth}")
    for level in range(depth - 1, -1, -1):
        made = inner.output[0]
        graph = helper.make_graph([inner], "g", [], [value(made, (2, 3))])
        inner = helper.make_node(
            "If", ["c"], ["y" if level == 0 else f"out{level}"], then_branch=graph, else_branch=graph
        )
        if inner.ByteSize() > 2**22:
            break
    return inner


def varint(number: int) -> bytes:
    digits = bytearray()
    while number > 127:
        digits.append(number & 127 | 128)
        number >>= 7
    return bytes([*digits, number])


def test_deep_nesting(tmp_path: Path) -> None:
    inputs = [value("x", (2, 3)), value("c", (), TensorProto.BOOL)]
    assert len(read_model(saved(proto([loop(4)], inputs=inputs), tmp_path / "m.onnx")).graph) == 1
    # Protobuf's own limit, a hundred messages: written by hand, for its Python classes wouldn't make them.
    graph = b""
    for _ in range(10_000):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # AttributeProto.g, NodeProto.attribute, GraphProto.node
            graph = tag + varint(len(graph)) + graph
    (tmp_path / "m.onnx").write_bytes(b"\x08\x0a\x3a" + varint(len(graph)) + graph)
    assert "not an ONNX file" in refusal(tmp_path / "m.onnx")


def test_an_endless_loop_is_not_run(tmp_path: Path) -> None:
    body = helper.make_graph(
        [node("Identity", "go", "on"), node("Add", "v v", "w")],
        "body",
        [value("i", (), TensorProto.INT64), value("go", (), TensorProto.BOOL), value("v", (1,))],
        [value("on", (), TensorProto.BOOL), value("w", (1,))],
    )
    tensors = [tensor("n", np.int64(2**62)), tensor("c", np.array(True)), tensor("v0", np.float32([1]))]
    nodes = [node("Loop", "n c v0", "l", body=body), node("Unique", "x", "u"), node("Add", "x l", "y")]
    model = read_model(saved(proto(nodes, tensors=tensors), tmp_path / "m.onnx"))
    assert "Loop" in [node.op_type for node in model.graph]

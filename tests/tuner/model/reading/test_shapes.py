from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.files import RELU, assert_refused, node, proto, refusal, saved, tensor, value
from tilewright.tuner.model.graph import static_shape
from tilewright.tuner.model.reading import read
from tilewright.tuner.model.reading.read import read_model


def dynamic(tmp_path: Path) -> Path:
    inputs = [value("x", ("batch", 3, None)), value("z", ("batch", 1, 1))]
    return saved(proto([node("Add", "x z", "y")], inputs=inputs), tmp_path / "dynamic.onnx")


def test_dimensions_are_bound_by_name_and_by_input(tmp_path: Path) -> None:
    model = read_model(dynamic(tmp_path), {"x": (4, 3, 5)})
    assert [static_shape(value) for value in model.graph.inputs] == [(4, 3, 5), (4, 1, 1)]
    assert static_shape(model.graph.outputs[0]) == (4, 3, 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"dimension 'batch' of input 'x', \[batch, 3, \?\], has no size.*--shape batch=8 or --shape x:8x3x8"),
        ({"dims": {"batch": 4}}, r"dimension 2 of input 'x', .*--shape x:4x3x8"),
        ({"dims": {"bach": 4}}, r"dimension 'bach': those of the model are 'batch'"),
        ({"shapes": {"w": (1,)}}, r"--shape names 'w': the model's inputs are 'x', 'z'"),
        ({"shapes": {"x": (4, 3)}}, r"input 'x' 2 dimensions, 4x3: it has 3"),
        ({"shapes": {"x": (4, 2, 5)}}, r"dimension 1 of input 'x' the size 2: the model fixes it at 3"),
        ({"shapes": {"x": (4, 3, 5), "z": (2, 1, 1)}}, r"dimension 'batch' would be 4, and 2 in input 'z'"),
        ({"shapes": {"x": (4, 3, 5)}, "dims": {"batch": 3}}, r"dimension 'batch' would be 3, and 4 in input 'x'"),
        ({"shapes": {"x": (4, 3, 2**31)}}, r"2147483648: it may be up to 2147483647"),
        ({"shapes": {"x": (2**20, 3, 2**20)}}, r"value 'x' would be 1048576x3x1048576"),
    ],
)
def test_dimensions_that_are_missing_or_contradict(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert re.search(message, refusal(dynamic(tmp_path), **given))


def test_an_input_without_a_rank_needs_a_shape(tmp_path: Path) -> None:
    path = saved(proto([RELU], inputs=[value("x", None)]), tmp_path / "m.onnx")
    assert "input 'x' has no shape: give it one with --shape x:1x3x224x224" in refusal(path)
    assert static_shape(read_model(path, {"x": (2, 3)}).graph.outputs[0]) == (2, 3)


def test_what_the_file_says_of_other_shapes_may_be_of_another_batch(tmp_path: Path) -> None:
    gelu = helper.make_node("Gelu", ["r"], ["g"], domain="com.microsoft")
    nodes = [node("Relu", "x", "r"), gelu, node("Neg", "g", "y")]
    model = proto(nodes, inputs=[value("x", ("n", 3))], outputs=[value("y", (1, 3))], domains=["com.microsoft"])
    model.graph.value_info.extend([value("r", (1, 3)), value("g", ("n", 3))])
    result = read_model(saved(model, tmp_path / "m.onnx"), dims={"n": 4})
    shapes = {str(out.name): out.shape for node in result.graph for out in node.outputs}
    assert shapes["r"] == (4, 3)
    assert shapes["g"] is not None  # onnx doesn't know the operator: of what the file says, the size without a name
    assert shapes["g"][1] == 3


def test_an_output_may_be_an_input_or_a_weight(tmp_path: Path) -> None:
    outputs = [value("y", None), value("x", ("n", 3)), value("w", (3, 32)), value("small", (3,))]
    made = proto(
        [node("MatMul", "x w", "m"), node("Relu", "m", "y")],
        inputs=[value("x", ("n", 3))],
        outputs=outputs,
        tensors=[tensor("w", np.ones((3, 32), np.float32)), tensor("small", np.ones(3, np.float32))],
    )
    model = read_model(saved(made, tmp_path / "m.onnx"), dims={"n": 2})
    assert {each.name: static_shape(each) for each in (*model.graph.inputs, *model.graph.outputs)} == {
        "x": (2, 3), "y": (2, 32), "w": (3, 32), "small": (3,),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "wanted"),
    [
        ([], ({}, {})),
        (["input:1x3x224x224", "batch=8"], ({"input": (1, 3, 224, 224)}, {"batch": 8})),
        (["input:0:5", "a=b=7", "x:2X3"], ({"input:0": (5,), "x": (2, 3)}, {"a=b": 7})),
        (["a:3=4"], ({}, {"a:3": 4})),
    ],
)
def test_parse_shapes(texts: list[str], wanted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert read.parse_shapes(texts) == wanted


@pytest.mark.parametrize(
    "texts",
    [
        *(["224"], ["x:"], ["x:1x"], ["x:0x3"], ["x:-1"], ["=8"], ["n="], ["n=8.0"], ["n=0"], ["n=9999999999"], [""]),
        *([":3"], ["x:1", "x:2"], ["n=1", "n=2"], ["n=٣"], ["x:1\n2"]),
    ],
)
def test_parse_shapes_refuses_in_one_line(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="--shape") as caught:
        read.parse_shapes(texts)
    assert str(caught.value).isprintable()


WRONG: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "wrong shapes": (lambda: proto([node("MatMul", "x x", "y")]), r"shapes don't go together.*MatMul"),
    "string input": (
        lambda: proto([node("Identity", "x", "y")], inputs=[value("x", (1,), TensorProto.STRING)]),
        r"input 'x' is of strings",
    ),
    "a huge result": (
        lambda: proto(
            [node("Expand", "x shape", "y")],
            inputs=[value("x", (1, 1))],
            tensors=[tensor("shape", np.int64([2**31, 2**31]))],
        ),
        r"value 'y' would be 2147483648x2147483648",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_models(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    assert_refused(make(), message, tmp_path)


def test_a_model_without_outputs(tmp_path: Path) -> None:
    line = refusal(saved(proto([node("Relu", "x", "y")], outputs=[]), tmp_path / "m.onnx"))
    assert line == "the model has no outputs: it computes nothing, name some when it is exported"

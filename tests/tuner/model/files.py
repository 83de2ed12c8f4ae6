"""ONNX files for the tests of reading, and how they are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tilewright.tuner.model.reading.read import read_model
from tilewright.tuning_db.errors import ModelError

LIGHT = Path(onnx.__file__).parent / "backend/test/data/light"


def proto(
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[onnx.ValueInfoProto] | None = None,
    outputs: Sequence[onnx.ValueInfoProto] | None = None,
    tensors: Sequence[TensorProto] = (),
    opset: int = 21,
    domains: Sequence[str] = (),
    ir_version: int = 10,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model x -> y of these nodes."""
    graph = helper.make_graph(
        list(nodes),
        "model",
        list(inputs) if inputs is not None else [value("x", (2, 3))],
        list(outputs) if outputs is not None else [value("y", None)],
        list(tensors),
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))


def value(name: str, shape: Sequence[int | str | None] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def tensor(name: str, array: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def node(operator: str, used: str, made: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, used.split(), made.split(), name=f"{operator}_{made.split()[0]}", **attributes)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def function(name: str, nodes: Sequence[onnx.NodeProto], opset: int = 21) -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["a"], ["b"], list(nodes), opsets)


def own(name: str, used: str, made: str) -> onnx.NodeProto:
    return helper.make_node(name, [used], [made], domain="own")


def refusal(path: Path, **arguments: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(ModelError) as caught:
        read_model(path, **arguments)
    line = str(caught.value)
    assert line
    assert line.isprintable()
    assert len(line) < 1000
    return line


def assert_refused(model: onnx.ModelProto, message: str, folder: Path) -> None:
    """Fails unless the model, in a file of the folder, is refused with a line in which the pattern is found."""
    line = refusal(saved(model, folder / "m.onnx"))
    assert re.search(message, line), line


RELU = node("Relu", "x", "y")

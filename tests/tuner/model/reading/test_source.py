"""What a model was when it was read: its file, and the weights that lie elsewhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tilewright.tuner.model.reading.read import read_model
from tilewright.tuner.model.reading.source import Source
from tilewright.tuning_db.errors import ModelError


def saved(path: Path, weight: float, data: str) -> Path:
    """A product whose weights, 4096 times a number, are in a file of their own."""
    values = [helper.make_tensor_value_info(name, 1, (2, 64)) for name in ("x", "y")]
    w = numpy_helper.from_array(np.full((64, 64), weight, np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")], "g", values[:1], values[1:], [w]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (path.parent / data).unlink(missing_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=data)
    return path


def test_the_digest_is_of_file_and_weights(tmp_path: Path) -> None:
    found = []
    for weight in (1.0, 1.0, 2.0):
        path = saved(tmp_path / "m.onnx", weight, "m.data")
        found.append(Source.of(path, read_model(path)))
        assert found[-1].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found[-1].bytes == path.stat().st_size
    assert found[0] == found[1]
    assert found[2].sha256 == found[0].sha256
    assert found[2].digest != found[0].digest


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.onnx", 1.0, "m.data")
    model = read_model(path)
    path.unlink()
    with pytest.raises(ModelError, match=r"m.onnx can't be read: No such file or directory$"):
        Source.of(path, model)

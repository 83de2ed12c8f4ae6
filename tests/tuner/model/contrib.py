"""Models of ONNX Runtime's own operators, as it runs them and as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper, parser

from tests.tuner.model.files import saved
from tests.tuner.model.graphs import results
from tilewright.tuner.model.reading.contrib.rewrite import FORMS
from tilewright.tuner.model.reading.read import LEFT, read_model

DOMAIN = "com.microsoft"


def written(graph: str, opset: int = 21, **constants: Any) -> onnx.ModelProto:
    """A model in onnx's text form, without its head."""
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "{DOMAIN}" : 1]> g {graph}')
    for name, array in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return model


def read(model: onnx.ModelProto, folder: Path, **arguments: Any) -> ir.Model:
    return read_model(saved(model, folder / "m.onnx"), **arguments)


def standard(model: onnx.ModelProto, folder: Path) -> ir.Model:
    """A model as it is read, of which nothing may be ONNX Runtime's own."""
    made = read(model, folder)
    assert not [node.op_type for node in made.graph.all_nodes() if node.domain], made.meta[LEFT]
    return made


def runtime(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """What ONNX Runtime makes of the operators themselves."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(each) for each in session.run(None, dict(feeds))]


def assert_same(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], folder: Path, error: float = 2e-6) -> ir.Model:
    """Fails unless a model computes once it is read what it did, with standard operators alone, which are returned."""
    made = standard(model, folder)
    for got, wanted in zip(results(made, feeds), runtime(model, feeds), strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        wide = wanted.astype(np.float64)
        np.testing.assert_allclose(got.astype(np.float64), wide, rtol=0, atol=error * max(np.abs(wide).max(), 1e-30))
    return made


def reason(model: onnx.ModelProto, folder: Path) -> str:
    """Why the one operator of a model that has a form stays as it is."""
    made = read(model, folder)
    (why,) = made.meta[LEFT].values()
    assert [node for node in made.graph if node.op_type in FORMS]
    return str(why)

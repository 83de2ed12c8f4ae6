"""The examples, as far as they go without a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest

from tilewright.kernels import gemm
from tilewright.kernels.tensorrt import plugin_attributes, plugins
from tilewright.tuning_db.env import compiling_environment

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["tensorrt_onnx", "tensorrt_network"])
def test_without_tensorrt_there_is_one_clear_line(name, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise ImportError('none here')")
    environment = compiling_environment()
    paths = [str(tmp_path), *filter(None, [environment.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        env=environment | {"PYTHONPATH": ":".join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == ("MissingDependencyError: TensorRT is not installed here (none here): pip install 'tensorrt>=10.16'")


def test_a_decoder_layer_is_that_of_numpy_and_says_what_it_called():
    command = [sys.executable, "-W", "error", str(EXAMPLES / "decoder_layer.py")]
    done = subprocess.run(command, env=compiling_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    first, *calls = done.stdout.splitlines()
    assert float(first.removeprefix("largest difference from NumPy: ").split()[0]) < 1e-5
    assert [call.split()[0] for call in calls] == ["rmsnorm", "gemm", "attention", "gemm", "gemm", "gemm"]


def test_the_onnx_file_runs_in_onnx_runtime_as_the_plugin_does(tmp_path):
    example = load("tensorrt_onnx")
    path = tmp_path / "model.onnx"
    onnx.save(example.model(), path)
    made = onnx.load(path)
    (node,) = made.graph.node
    assert plugins()[node.op_type].inputs == ("a", "b", "bias")
    given = {attribute.name for attribute in node.attribute}
    assert given == {*plugin_attributes(node.op_type), "plugin_namespace", "plugin_version"}
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(1).standard_normal((5, example.K)).astype(np.float16)
    (theirs,) = session.run(None, {"x": x})
    w, b = (onnx.numpy_helper.to_array(array) for array in made.graph.initializer)
    ours = gemm(x, w, bias=b, activation="gelu_tanh")
    wanted = example.reference(x, made)
    assert np.abs(theirs - wanted).max() < 2e-2  # ONNX Runtime rounds every step to fp16
    assert np.abs(ours - wanted).max() < 4e-3
    assert np.abs(wanted).max() > 1

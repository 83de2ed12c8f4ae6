"""An ONNX file with a plugin node: written, built into a TensorRT engine, run, timed.

    python examples/tensorrt_onnx.py --write model.onnx     # needs onnx alone
    python examples/tensorrt_onnx.py                        # needs TensorRT, CuPy and a GPU

The node has a body, so that the same file runs in ONNX Runtime, and passes ONNX's checker.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tilewright.kernels import tensorrt as plugins
from tilewright.tuning_db.errors import TilewrightError

K, N = 512, 768
ROWS = (1, 128, 1024)  # least, best and largest


def model() -> onnx.ModelProto:
    """y = gelu(x · w + b), x of (rows, K): one `tilewright::FusedGemmBias`."""
    random = np.random.default_rng(0)
    name = plugins.plugin_name("gemm", "bias")
    attributes = plugins.plugin_attributes(name, activation="gelu_tanh")
    attributes |= {"plugin_namespace": plugins.NAMESPACE, "plugin_version": plugins.VERSION}
    node = helper.make_node(name, ["x", "w", "b"], ["y"], domain=plugins.NAMESPACE, **attributes)
    weights = (random.standard_normal((K, N)) / np.sqrt(K)).astype(np.float16)
    bias = random.standard_normal(N).astype(np.float16)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["rows", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["rows", N])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )
    opsets = [helper.make_opsetid("", 20)]
    # What the node stands for, to who has no such plugin.
    body = helper.make_function(
        plugins.NAMESPACE,
        name,
        ["x", "w", "b"],
        ["y"],
        [
            helper.make_node("MatMul", ["x", "w"], ["product"]),
            helper.make_node("Add", ["product", "b"], ["sum"]),
            helper.make_node("Gelu", ["sum"], ["y"], approximate="tanh"),
        ],
        opsets,
        list(attributes),
    )
    made = helper.make_model(
        graph, functions=[body], opset_imports=[*opsets, helper.make_opsetid(plugins.NAMESPACE, 1)], ir_version=10
    )
    onnx.checker.check_model(made, full_check=True)
    return made


def reference(x: np.ndarray, made: onnx.ModelProto) -> np.ndarray:
    """The layer in float64."""
    w, b = (numpy_helper.to_array(array).astype(np.float64) for array in made.graph.initializer)
    y = x.astype(np.float64) @ w + b
    return np.asarray(0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))


def main() -> None:
    """Does what the module says."""
    parser = argparse.ArgumentParser(description="an ONNX file with a plugin node, as a TensorRT engine")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the ONNX file and end")
    parser.add_argument("--implementation", choices=("aot", "jit"), default="aot")
    asked = parser.parse_args()
    made = model()
    if asked.write is not None:
        onnx.save(made, asked.write)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.onnx"
        onnx.save(made, source)
        profiles = {"x": tuple((rows, K) for rows in ROWS)}
        engine = plugins.build_engine(
            source, source.with_suffix(".engine"), profiles=profiles, implementation=asked.implementation
        )
        for case in engine.provenance["tactics"]:
            print(f"{case['plugin']} {case['inputs']}: {len(case['tactics'])} tactics")
        runner = plugins.Runner(engine.path)
        for rows in ROWS:
            x = np.random.default_rng(rows).standard_normal((rows, K)).astype(np.float16)
            error = np.abs(runner({"x": x})["y"].get().astype(np.float64) - reference(x, made)).max()
            print(f"{rows} rows: largest error {error:.1e}, {runner.latency({'x': x})}")


if __name__ == "__main__":
    try:
        main()
    except TilewrightError as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""The layer of `tensorrt_onnx.py` through TensorRT's network API, without a file.

python examples/tensorrt_network.py                     # needs TensorRT, CuPy and a GPU
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tilewright.kernels import tensorrt as plugins
from tilewright.tuning_db.errors import MissingDependencyError, RunError, TilewrightError

K, N = 512, 768
ROWS = (1, 128, 1024)


def build(weights: np.ndarray, bias: np.ndarray) -> bytes:
    """The engine of y = gelu(x · w + b)."""
    plugins.register()  # before TensorRT is asked for its plugins; it says where TensorRT is missing
    import tensorrt as trt
    import tensorrt.plugin

    try:
        builder = trt.Builder(trt.Logger(trt.Logger.WARNING))
    except TypeError as error:
        raise MissingDependencyError(f"this TensorRT has no builder ({error})") from None
    flags = trt.NetworkDefinitionCreationFlag
    network = builder.create_network(1 << int(flags.STRONGLY_TYPED) | 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS))
    x = network.add_input("x", trt.float16, (-1, K))
    w = network.add_constant(weights.shape, weights).get_output(0)
    b = network.add_constant(bias.shape, bias).get_output(0)
    gemm = getattr(tensorrt.plugin.op.tilewright, plugins.plugin_name("gemm", "bias"))
    attributes = plugins.plugin_attributes("FusedGemmBias", activation="gelu_tanh")
    layer = network.add_plugin(gemm(x, w, b, **attributes))
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *((rows, K) for rows in ROWS))
    config.add_optimization_profile(profile)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise RunError("TensorRT could not build the network: its log says why")
    return bytes(serialized)


def main() -> None:
    """Does what the module says."""
    random = np.random.default_rng(0)
    weights = (random.standard_normal((K, N)) / np.sqrt(K)).astype(np.float16)
    bias = random.standard_normal(N).astype(np.float16)
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder) / "layer.engine"
        engine.write_bytes(build(weights, bias))
        runner = plugins.Runner(engine)
        for rows in ROWS:
            x = random.standard_normal((rows, K)).astype(np.float16)
            print(f"{rows} rows: {runner({'x': x})['y'].shape}, {runner.latency({'x': x})}")


if __name__ == "__main__":
    try:
        main()
    except TilewrightError as error:
        sys.exit(f"{type(error).__name__}: {error}")

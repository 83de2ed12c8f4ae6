"""TensorRT plugins of the fused kernels, in the namespace `tilewright`.

    import tilewright.kernels.tensorrt as plugins
    plugins.register(device="sm_86")

From then on TensorRT builds engines with `tilewright::FusedGemm` and its kin in them, of ONNX nodes or through its
network API. Importing this imports no TensorRT.
"""

from __future__ import annotations

from tilewright.kernels.tensorrt.catalogue import NAMESPACE, VERSION, plugin_attributes, plugin_name, plugins
from tilewright.kernels.tensorrt.engine import Engine, build_engine
from tilewright.kernels.tensorrt.registration import register
from tilewright.kernels.tensorrt.runner import Latency, Runner

__all__ = [
    "register",
    "plugins",
    "plugin_name",
    "plugin_attributes",
    "build_engine",
    "Engine",
    "Runner",
    "Latency",
    "NAMESPACE",
    "VERSION",
]

"""A small network as an ONNX file, and inputs for it: what docs/models.md walks through.

    python examples/model.py [FOLDER]

writes `network.onnx` and `images.npz`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES = 12, 6


def network(batch: int | str = 2) -> onnx.ModelProto:
    """A convolution, a residual block, pooling, two linear layers with a GELU between, as exporters write it, and a
    softmax. Weights are He-initialised (He et al. 2015, arXiv:1502.01852)."""
    make, random = helper.make_node, np.random.default_rng(0)
    nodes = [
        make("Conv", ["image", "w1", "b1"], ["c1"], name="stem", pads=[1, 1, 1, 1], strides=[2, 2]),
        make("Relu", ["c1"], ["r1"]),
        make("Conv", ["r1", "w2", "b2"], ["c2"], name="block", pads=[1, 1, 1, 1]),
        make("Add", ["c2", "r1"], ["s2"]),
        make("Relu", ["s2"], ["r2"]),
        make("GlobalAveragePool", ["r2"], ["p"]),
        make("Flatten", ["p"], ["f"]),
        make("Gemm", ["f", "w3", "b3"], ["h"], name="hidden", transB=1),
        make("Div", ["h", "root"], ["e1"]),
        make("Erf", ["e1"], ["e2"]),
        make("Add", ["e2", "one"], ["e3"]),
        make("Mul", ["h", "e3"], ["e4"]),
        make("Mul", ["e4", "half"], ["r3"]),
        make("Gemm", ["r3", "w4", "b4"], ["logits"], name="head", transB=1),
        make("Softmax", ["logits"], ["classes"]),
    ]
    constants = {"root": np.float32(2**0.5), "one": np.float32(1), "half": np.float32(0.5)}
    shapes = {"1": (16, 3, 3, 3), "2": (16, 16, 3, 3), "3": (32, 16), "4": (CLASSES, 32)}
    for key, shape in shapes.items():
        constants[f"w{key}"] = random.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape).astype(np.float32)
        constants[f"b{key}"] = random.normal(0, 0.125, shape[0]).astype(np.float32)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("classes", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def images(count: int, seed: int = 0) -> np.ndarray:
    """Gratings of random direction, wavelength and colour: (count, 3, 12, 12)."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    made = []
    for _ in range(count):
        angle, wave = random.uniform(0, np.pi), random.uniform(2, SIZE)
        grating = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / wave + random.uniform(0, 2 * np.pi))
        made.append(random.uniform(-2, 2, (3, 1, 1)) * grating + random.uniform(-1, 1, (3, 1, 1)))
    return np.stack(made).astype(np.float32)


def main() -> None:
    """Writes both files."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    onnx.save(network(), folder / "network.onnx")
    np.savez(folder / "images.npz", image=images(24))


if __name__ == "__main__":
    main()

"""Products and convolutions of ONNX Runtime's optimiser, and standard operators for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tuner.model.contrib import assert_same, reason, standard, written
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.fuse import fuse


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ("", "2, 4, 4"),
        ("<transB: int = 1>", "2, 4, 4"),
        ("<transA: int = 1, alpha: float = 0.25>", "2, 4, 4"),
        ("<transA: int = 1, transB: int = 1>", "4, 4"),
    ],
)
def test_fused_matmul(settings: str, shape: str, tmp_path: Path) -> None:
    """Of a value whose rank is known only once the product before is written out."""
    text = f"""(float[{shape}] x, float[{shape}] z) => (float[{shape}] y)
    {{ p = com.microsoft.FusedMatMul{settings}(x, z)  y = com.microsoft.FusedMatMul{settings}(p, x) }}"""
    sizes = [int(size) for size in shape.split(",")]
    assert_same(written(text), {"x": normal(0, *sizes), "z": normal(1, *sizes)}, tmp_path)


def test_batch_dimensions_that_are_transposed_stay(tmp_path: Path) -> None:
    text = """(float[2, 4, 4] x) => (float[2, 4, 4] y)
    { y = com.microsoft.FusedMatMul<transBatchA: int = 1>(x, x) }"""
    assert reason(written(text), tmp_path) == "it transposes batch dimensions"


def test_vectors_that_are_transposed_stay(tmp_path: Path) -> None:
    text = """(float[2, 5, 3] x, float[5] z) => (float[N, M] y)
    { y = com.microsoft.FusedMatMul<transA: int = 1>(x, z) }"""
    assert reason(written(text), tmp_path).startswith("it transposes, and one of its operands is a vector")


ACTIVATIONS = [
    ("Relu", []),
    ("Tanh", []),
    ("Sigmoid", []),
    ("LeakyRelu", [0.1]),
    ("HardSigmoid", [0.2, 0.4]),
]


@pytest.mark.parametrize(("activation", "parameters"), ACTIVATIONS)
def test_fused_gemm(activation: str, parameters: list[float], tmp_path: Path) -> None:
    names = ("alpha", "beta")
    more = "".join(f", activation_{name}: float = {value}" for name, value in zip(names, parameters, strict=False))
    text = f"""(float[4, 8] x) => (float[4, 8] y)
    {{ y = com.microsoft.FusedGemm<transB: int = 1, alpha: float = 0.5, activation: string = "{activation}"{more}>
      (x, w, b) }}"""
    assert_same(written(text, w=normal(1, 8, 8), b=normal(2, 8)), {"x": normal(0, 4, 8)}, tmp_path)


@pytest.mark.parametrize(("activation", "parameters"), [*ACTIVATIONS, ("Clip", [0.0, 6.0]), ("", [])])
@pytest.mark.parametrize("residual", ["", ", z"])
def test_fused_conv(activation: str, parameters: list[float], residual: str, tmp_path: Path) -> None:
    settings = [f'activation: string = "{activation}"'] if activation else []
    if parameters:
        settings.append(f"activation_params: floats = {parameters}")
    text = f"""(float[1, 4, 6, 6] x, float[1, 8, 3, 3] z) => (float[1, 8, 3, 3] y)
    {{ y = com.microsoft.FusedConv<strides: ints = [2, 2], pads: ints = [1, 1, 1, 1], {", ".join(settings)}>
      (x, w, b{residual}) }}""".replace(", >", ">")
    feeds = {"x": normal(0, 1, 4, 6, 6), "z": normal(3, 1, 8, 3, 3)}
    made = assert_same(written(text, w=normal(1, 8, 4, 3, 3), b=normal(2, 8)), feeds, tmp_path)
    fuse(made)
    assert made.graph[0].op_type.startswith("FusedConv2d")


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ('activation: string = "Mish"', "its activation is 'Mish'"),
        (
            'activation: string = "Clip", activation_params: floats = [1.0]',
            "its activation Clip has the parameters [1.0], not 2 numbers",
        ),
    ],
)
def test_what_is_no_activation_stays(activation: str, message: str, tmp_path: Path) -> None:
    text = f"(float[1, 4, 6, 6] x) => (float[1, 8, 4, 4] y) {{ y = com.microsoft.FusedConv<{activation}>(x, w) }}"
    assert reason(written(text, w=normal(1, 8, 4, 3, 3)), tmp_path) == message


def test_a_convolution_whose_channels_come_last(tmp_path: Path) -> None:
    """ONNX Runtime has a kernel for GPUs alone."""
    text = """(float[1, 6, 6, 4] x) => (float[1, 6, 6, 8] y)
    { y = com.microsoft.NhwcConv<pads: ints = [1, 1, 1, 1]>(x, w, b) }"""
    x, w, b = normal(0, 1, 6, 6, 4), normal(1, 8, 3, 3, 4), normal(2, 8)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)]).astype(np.float64)
    taps = [padded[:, i : i + 6, j : j + 6] @ w[:, i, j].T for i in range(3) for j in range(3)]
    (got,) = results(standard(written(text, w=w, b=b), tmp_path), {"x": x})
    assert relative_error(got, sum(taps) + b) < 1e-6

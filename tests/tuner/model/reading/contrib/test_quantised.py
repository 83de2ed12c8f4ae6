"""Operators on quantised tensors, and the steps that they become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.model.contrib import assert_same, reason, written
from tests.tuner.model.graphs import normal

RNG = np.random.default_rng(0)


def steps(kind: str) -> dict[str, Any]:
    """Scales and zero points of inputs (x) and results (y)."""
    zeros = {"int8": (3, -20), "uint8": (128, 120)}[kind]
    return {
        "xs": np.float32(0.03),
        "ys": np.float32(0.04),
        "xz": np.array(zeros[0], kind),
        "yz": np.array(zeros[1], kind),
    }


def integers(*shape: int) -> np.ndarray:
    return RNG.integers(-127, 128, shape).astype(np.int8)


def assert_steps(call: str, x: tuple[int, ...], y: tuple[int, ...], kind: str, folder: Path, **constants: Any) -> None:
    """Fails unless a call of q, the quantised x, gives the same integers, or the next ones."""
    text = f"""(float[{str(list(x))[1:-1]}] x) => ({kind}[{str(list(y))[1:-1]}] y)
    {{ q = QuantizeLinear(x, xs, xz)  y = {call} }}"""
    given = steps(kind) | constants
    # 1 of 255: two integers that are next to each other
    assert_same(written(text, 14, **given), {"x": normal(0, *x)}, folder, 1.01 / 127)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("channels", [True, False])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_convolutions(kind: str, channels: bool, bias: str, tmp_path: Path) -> None:
    call = f"QLinearConv<pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]>(q, xs, xz, w, ws, wz, ys, yz{bias})"
    scales = np.linspace(0.004, 0.009, 6).astype(np.float32) if channels else np.float32(0.006)
    more = {"w": integers(6, 4, 3, 3), "ws": scales, "wz": np.zeros_like(scales, np.int8)}
    more["b"] = RNG.integers(-500, 500, 6).astype(np.int32)
    assert_steps(call, (1, 4, 8, 8), (1, 6, 4, 4), kind, tmp_path, **more)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("columns", [True, False])
def test_products(kind: str, columns: bool, tmp_path: Path) -> None:
    scales = np.linspace(0.002, 0.004, 8).astype(np.float32) if columns else np.float32(0.003)
    more = {"w": integers(16, 8), "ws": scales, "wz": np.zeros_like(scales, np.int8)}
    call = "QLinearMatMul(q, xs, xz, w, ws, wz, ys, yz)"
    assert_steps(call, (5, 16), (5, 8), kind, tmp_path, **more)
    more |= {"w": more["w"].T.copy(), "c": RNG.integers(-5000, 5000, 8).astype(np.int32)}
    call = "com.microsoft.QGemm<transB: int = 1>(q, xs, xz, w, ws, wz, c, ys, yz)"
    assert_steps(call, (5, 16), (5, 8), kind, tmp_path, **more)


@pytest.mark.parametrize("shape", [(1,), (5, 1), (1, 8), (5, 8)])
def test_one_number_of_a_bias_for_several_columns(shape: tuple[int, ...], tmp_path: Path) -> None:
    scales = np.linspace(0.002, 0.004, 8).astype(np.float32)
    more = {"w": integers(16, 8), "ws": scales, "wz": np.zeros(8, np.int8)}
    more["c"] = RNG.integers(-500, 500, shape).astype(np.int32)
    assert_steps("com.microsoft.QGemm(q, xs, xz, w, ws, wz, c, ys, yz)", (5, 16), (5, 8), "uint8", tmp_path, **more)


def test_a_product_of_integers_that_gives_floats(tmp_path: Path) -> None:
    text = """(float[5, 16] x) => (float[5, 8] y)
    { q = QuantizeLinear(x, xs, xz)  y = com.microsoft.QGemm<alpha: float = 0.5>(q, xs, xz, w, ws, wz) }"""
    more = {"w": integers(16, 8), "ws": np.float32(0.003), "wz": np.int8(0)}
    assert_same(written(text, 14, **steps("uint8"), **more), {"x": normal(0, 5, 16)}, tmp_path)


@pytest.mark.parametrize("scales", [(), (1,), (6,)])
@pytest.mark.parametrize("zeros", [(), (1,), (6,)])
def test_a_scale_and_a_zero_point_of_different_shapes(
    scales: tuple[int, ...], zeros: tuple[int, ...], tmp_path: Path
) -> None:
    more = {"w": integers(6, 4, 3, 3), "ws": np.full(scales, 0.003, np.float32), "wz": np.full(zeros, 2, np.int8)}
    more["b"] = np.arange(6, dtype=np.int32) * 100
    assert_steps("QLinearConv(q, xs, xz, w, ws, wz, ys, yz, b)", (1, 4, 8, 8), (1, 6, 6, 6), "uint8", tmp_path, **more)


def test_a_result_whose_zero_point_is_left_out_is_of_the_input_s_kind(tmp_path: Path) -> None:
    text = """(float[1, 4, 6] x) => (int8[1, 4, 6] y)
    { q = QuantizeLinear(x, xs, xz)  y = com.microsoft.QLinearSigmoid(q, xs, xz, ys) }"""
    model = written(text, 14, **steps("int8"))
    model.graph.node[-1].input.append("")  # ONNX Runtime crashes without
    assert_same(model, {"x": normal(0, 1, 4, 6)}, tmp_path, 1.01 / 127)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize(
    "call",
    [
        "QLinearAdd(q, xs, xz, q, xs, xz, ys, yz)",
        "QLinearMul(q, xs, xz, q, xs, xz, ys, yz)",
        "QLinearSigmoid(q, xs, xz, ys, yz)",
        "QLinearLeakyRelu<alpha: float = 0.1>(q, xs, xz, ys, yz)",
        "QLinearSoftmax<axis: int = -1, opset: int = 13>(q, xs, xz, ys, yz)",
        "QLinearSoftmax<axis: int = 3, opset: int = 11>(q, xs, xz, ys, yz)",
    ],
)
def test_elementwise(call: str, kind: str, tmp_path: Path) -> None:
    assert_steps(f"com.microsoft.{call}", (1, 2, 4, 6), (1, 2, 4, 6), kind, tmp_path)


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        ("QLinearAveragePool<kernel_shape: ints = [2, 2], strides: ints = [2, 2]>(q, xs, xz, ys, yz)", (1, 2, 2, 3)),
        ("QLinearGlobalAveragePool<channels_last: int = 0>(q, xs, xz, ys, yz)", (1, 2, 1, 1)),
        ("QLinearConcat<axis: int = 1>(ys, yz, q, xs, xz, q, xs, xz)", (1, 4, 4, 6)),
    ],
)
def test_pools_and_concatenation(call: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    assert_steps(f"com.microsoft.{call}", (1, 2, 4, 6), shape, "uint8", tmp_path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("QLinearGlobalAveragePool<channels_last: int = 1>(q, xs, xz, ys, yz)", "its channels come last"),
        ("QLinearSoftmax<axis: int = 1, opset: int = 11>(q, xs, xz, ys, yz)", "it is over all axes from 1 on"),
        ("QGemm<alpha: float = 2.0>(q, xs, xz, w, ws, wz, c, ys, yz)", "its alpha is 2"),
        ("QLinearConcat<axis: int = 1>(ys, yz, q, xs)", "it has 4 inputs"),
        (
            "QLinearAveragePool<kernel_shape: ints = [2, 2], ceil_mode: int = 1, count_include_pad: int = 1>"
            "(q, xs, xz, ys, yz)",
            "it counts what lies beyond its padding (ceil_mode with count_include_pad)",
        ),
        ("QLinearAdd(q, two, xz, q, xs, xz, ys, yz)", "its scale 'two' has the shape [2]"),
        ("QLinearAdd(q, two, two_zeros, q, xs, xz, ys, yz)", "its scale 'two' has the shape [2]"),
        ("QLinearAdd(q, xs, xz, q, xs, xz, two, three)", "its scale and its zero point have the shapes [2] and [3]"),
        ("QLinearAdd(q, xs)", "its input 3 is missing"),
        ("QGemm(q, xs, xz, w, ws, wz, c, ys)", "its result has a scale or a zero point, and not both"),
        ("QGemm(q, huge, xz, w, huge, wz, c)", "the scale of its bias, that of x times that of w, is past fp32"),
        ("QGemm(q, huge, xz, w, none, wz, c)", "its scales are empty"),
    ],
)
def test_what_has_no_form_stays(call: str, message: str, tmp_path: Path) -> None:
    text = f"""(float[1, 2, 4, 6] x) => (uint8[N] y)
    {{ q = QuantizeLinear(x, xs, xz)  y = com.microsoft.{call} }}"""
    more = {"w": integers(16, 8), "ws": np.float32(0.003), "wz": np.int8(0), "c": np.zeros(8, np.int32)}
    more |= {"two": np.ones(2, np.float32), "two_zeros": np.ones(2, np.uint8), "three": np.ones(3, np.uint8)}
    more |= {"huge": np.float32(1e30), "none": np.ones(0, np.float32)}
    assert reason(written(text, 14, **steps("uint8"), **more), tmp_path) == message


def test_a_standard_operator_that_stays_is_one_again(tmp_path: Path) -> None:
    """`QLinearConv` and `QLinearMatMul` are ONNX's."""
    text = """(float[1, 4, 8, 8] x) => (uint8[1, 6, 6, 6] y)
    { q = QuantizeLinear(x, xs, xz)  y = QLinearConv(q, xs, xz, w, ws, wz, ys, yz, b) }"""
    model = written(text, 14, **steps("uint8"), w=integers(6, 4, 3, 3), ws=np.float32(0.003), wz=np.int8(0))
    model.graph.input.append(written("(int32[6] b) => (float y) { y = Abs(y) }").graph.input[0])
    # the scales as an input too: the bias would need their product
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "ws")
    model.graph.initializer.remove(scale)
    model.graph.input.append(written("(float ws) => (float y) { y = Abs(y) }").graph.input[0])
    assert reason(model, tmp_path) == "'ws' is not a constant"

"""The fused convolution against an oracle that is not ours: ONNX Runtime's Conv, ConvInteger and QLinearConv."""

from __future__ import annotations

import math

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from tilewright.kernels.ops.conv2d.api import conv1d, conv2d


def onnx_runs(op, arrays, **attributes):
    """The one output of one ONNX operator on CPU, its inputs by name in the operator's order."""
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8}
    types |= {np.dtype(np.int8): TensorProto.INT8, np.dtype(np.int32): TensorProto.INT32}
    values = [helper.make_tensor_value_info(name, types[array.dtype], array.shape) for name, array in arrays.items()]
    result = {"Conv": TensorProto.FLOAT, "ConvInteger": TensorProto.INT32, "QLinearConv": TensorProto.UINT8}[op]
    node = helper.make_node(op, list(arrays), ["y"], **attributes)
    graph = helper.make_graph([node], "one", values, [helper.make_tensor_value_info("y", result, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


CASES = {
    "3x3": {},
    "5x2 stride 2x3": {"kernel": (5, 2), "stride": (2, 3), "pads": (2, 0, 1, 1)},
    "dilated": {"dilation": (2, 3), "pads": (2, 3, 2, 3)},
    "padded past its reach": {"pads": (3, 4, 5, 3)},
    "stride past the kernel": {"kernel": (2, 2), "stride": (3, 4), "pads": (0, 0, 0, 0)},
    "two groups": {"groups": 2},
    "depthwise": {"groups": 12, "filters": 12},
    "depthwise, twice the filters": {"groups": 12, "filters": 24, "stride": (2, 2)},
    "one tap": {"kernel": (1, 1), "pads": (0, 0, 0, 0)},
    "one tap, stride 2": {"kernel": (1, 1), "pads": (0, 0, 0, 0), "stride": (2, 2)},
}


def case_of(name):
    """Shapes of x and w in NCHW, ONNX's attributes and ours."""
    case = {"kernel": (3, 3), "stride": (1, 1), "pads": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "filters": 10}
    case |= CASES[name]
    theirs = {"strides": case["stride"], "pads": case["pads"], "dilations": case["dilation"], "group": case["groups"]}
    ours = {"stride": case["stride"], "padding": case["pads"], "dilation": case["dilation"], "groups": case["groups"]}
    return (2, 12, 9, 8), (case["filters"], 12 // case["groups"], *case["kernel"]), theirs, ours


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("name", CASES)
def test_conv(name, layout):
    x_shape, w_shape, theirs, ours = case_of(name)
    random = np.random.default_rng(0)
    x, w, bias = (random.standard_normal(shape, np.float32) for shape in (x_shape, w_shape, w_shape[:1]))
    expected = onnx_runs("Conv", {"x": x, "w": w, "b": bias}, **theirs)
    if layout == "nhwc":
        x, w, expected = (np.ascontiguousarray(array.transpose(0, 2, 3, 1)) for array in (x, w, expected))
    result = conv2d(x, w, bias=bias, layout=layout, **ours)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("groups", [1, 12])
def test_conv_of_one_dimension(groups):
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(shape, np.float32) for shape in ((2, 12, 17), (12, 12 // groups, 3)))
    expected = onnx_runs("Conv", {"x": x, "w": w}, strides=(2,), pads=(1, 3), dilations=(2,), group=groups)
    result = conv1d(x, w, stride=2, padding=(1, 3), dilation=2, groups=groups, layout="ncl")
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_conv_integer(name):
    x_shape, w_shape, theirs, ours = case_of(name)
    random = np.random.default_rng(1)
    # ONNX pads with the zero point, and its CPU kernel wants x unsigned: 128 is our 0.
    x = random.integers(0, 256, x_shape).astype(np.uint8)
    w = random.integers(-128, 128, w_shape).astype(np.int8)
    expected = onnx_runs("ConvInteger", {"x": x, "w": w, "x_zero": np.full((), 128, np.uint8)}, **theirs)
    result = conv2d((x.astype(np.int16) - 128).astype(np.int8), w, layout="nchw", **ours)
    assert result.dtype == expected.dtype == np.int32
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", ["3x3", "dilated", "depthwise", "one tap"])
def test_qlinear_conv(name):
    x_shape, w_shape, theirs, ours = case_of(name)
    random = np.random.default_rng(2)
    x = random.integers(0, 256, x_shape).astype(np.uint8)
    # Weights of 7 bits: on processors without VNNI ONNX Runtime adds pairs of u8 × s8 products in 16 bits, saturating.
    w = random.integers(-63, 64, w_shape).astype(np.int8)
    # Results spread over 60 steps either way, so that one in thirty saturates.
    x_scale, y_scale = np.float32(1 / 32), np.float32(math.sqrt(math.prod(w_shape[1:])) / 384)
    w_scale = random.uniform(2**-10, 2**-8, w_shape[0]).astype(np.float32)
    bias = random.integers(-9999, 9999, w_shape[0]).astype(np.int32)
    zero, zeros = np.full((), 128, np.uint8), np.zeros(w_shape[0], np.int8)
    expected = onnx_runs(
        "QLinearConv",
        {"x": x, "xs": np.array(x_scale), "xz": zero, "w": w, "ws": w_scale, "wz": zeros}
        | {"ys": np.array(y_scale), "yz": zero, "b": bias},
        **theirs,
    )
    result = conv2d(
        (x.astype(np.int16) - 128).astype(np.int8), w, x_scale=float(x_scale), w_scale=w_scale,
        bias=bias.astype(np.float32) * x_scale * w_scale, out_scale=float(y_scale), out_dtype="int8", layout="nchw",
        **ours,
    )  # fmt: skip
    difference = np.abs(result.astype(int) - (expected.astype(int) - 128))
    # They multiply by one rounded factor where we multiply and divide: a tie may fall the other way.
    assert difference.max() <= 1
    assert np.mean(difference > 0) < 1e-3
    assert 0.001 < np.mean((result == 127) | (result == -128)) < 0.5

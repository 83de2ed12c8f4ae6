"""Rows of a layer's input, times its weights as a matrix, are what the layer computes."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.tuner.model.fused_nets import output, single
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.precision.layer_data import LayerData, rounded

RANDOM = np.random.default_rng(0)

CONVOLUTIONS: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((2, 6, 7, 9), (4, 6, 3, 3), {"pad_top": 1, "pad_left": 2, "pad_right": 1}),
    ((1, 6, 9, 8), (6, 2, 3, 2), {"groups": 3, "stride_h": 2, "stride_w": 3, "pad_bottom": 2}),
    ((1, 5, 9, 9), (10, 1, 3, 3), {"groups": 5, "dilation_h": 2, "dilation_w": 3}),
    ((2, 4, 5, 5), (3, 4, 1, 1), {"stride_h": 2}),
]


@pytest.mark.parametrize(("x_shape", "w_shape", "settings"), CONVOLUTIONS)
def test_patches_times_filters_are_the_convolution(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    x, w = normal(0, *x_shape), normal(1, *w_shape)
    model = single("conv2d", {"x": x, "w": w}, ("x",), **settings)
    data = LayerData(fused_nodes(model)[0])
    rows = data.rows(x, 10**6, RANDOM)
    assert rows.shape[::2] == (data.groups, data.depth)
    y = rows @ data.matrix().swapaxes(1, 2)  # (groups, pixels, filters of a group)
    wanted = output(model, {"x": x})
    images, filters, height, width = wanted.shape
    pixels = y.transpose(1, 0, 2).reshape(images, height, width, filters)
    np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(data.mean_row(x), rows.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(data.weights(data.matrix()), w)
    few = data.rows(x, 5, np.random.default_rng(1))
    known = {row.tobytes() for row in rows.transpose(1, 0, 2)}
    assert few.shape[1] == 5
    assert all(row.tobytes() in known for row in few.transpose(1, 0, 2))


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_rows_times_weights_are_the_product(trans_a: int, trans_b: int) -> None:
    a, b = normal(0, 3, 5, 7), normal(1, 7, 4)
    given = {"a": a.swapaxes(1, 2).copy() if trans_a else a, "b": b.T.copy() if trans_b else b}
    model = single("gemm", given, ("a",), trans_a=trans_a, trans_b=trans_b)
    data = LayerData(fused_nodes(model)[0])
    rows = data.rows(given["a"], 100, RANDOM)
    np.testing.assert_allclose((rows @ data.matrix().swapaxes(1, 2))[0], (a @ b).reshape(15, 4), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data.mean_row(given["a"]), rows.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(data.weights(data.matrix()), given["b"])
    assert (data.depth, data.channels, data.is_matrix) == (7, 4, True)


def test_a_batch_of_matrices_is_no_matrix() -> None:
    model = single("gemm", {"a": normal(0, 3, 5, 7), "b": normal(1, 3, 7, 4)}, ("a",))
    assert not LayerData(fused_nodes(model)[0]).is_matrix


def test_values_are_rounded_as_kernels_do() -> None:
    x = np.array([0.5, 1.5, -300.0, 200.0, 0.01], np.float32)
    np.testing.assert_array_equal(rounded(x, 1.0, "int8"), np.array([0, 2, -128, 127, 0], np.float32))
    wide = np.array([0.3, 1000.0], np.float32)
    wanted = np.array([0.3, 448.0], np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(rounded(2 * wide, 2.0, "fp8"), 2 * wanted)

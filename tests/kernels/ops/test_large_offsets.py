"""Arrays that reach past 2^31 elements: offsets that wrap in 32 bits would read and write somewhere else.

The arrays are mostly holes: pages of zeros that nobody touches take no memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tilewright.kernels import attention, conv2d, gemm, rmsnorm

FAR = 2**31 + 64
"""Elements from one row to the next: the second row begins where 32 bits end."""


def rows_apart(rows: np.ndarray) -> np.ndarray:
    """Two rows, FAR elements apart."""
    assert len(rows) == 2
    memory = np.zeros(FAR + rows.shape[1], rows.dtype)
    view = np.lib.stride_tricks.as_strided(memory, rows.shape, (FAR * rows.itemsize, rows.itemsize))
    view[...] = rows
    return view


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float16)


def check(call: Callable[..., np.ndarray], near: list[np.ndarray]) -> None:
    """The call on arrays whose rows are far apart, into one like them, gives what it gives on small ones."""
    wanted = call(*near)
    far = [rows_apart(array) for array in near]
    out = rows_apart(np.full_like(wanted.reshape(2, -1), 7))
    result = call(*far, out=out)
    assert np.shares_memory(result, out)
    np.testing.assert_array_equal(result.reshape(wanted.shape), wanted)


def test_gemm() -> None:
    b = normal(32, 48)
    check(lambda a, residual, out=None: gemm(a, b, residual=residual, out=out), [normal(2, 32), normal(2, 48)])


def test_gemm_of_columns_far_apart() -> None:
    a, weights = normal(17, 32), normal(2, 32)
    np.testing.assert_array_equal(gemm(a, rows_apart(weights).T), gemm(a, weights.T))


def test_rmsnorm() -> None:
    check(lambda x, out=None: rmsnorm(x, out=out), [normal(2, 64)])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention(axis: int) -> None:
    """Sequences, heads or tokens are far apart."""
    shape = [1, 1, 1, 32]
    shape[axis] = 2

    def call(q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        placed = [spread(each, axis) for each in (q, k, v)]
        return attention(*placed, out=None if out is None else spread(out, axis))

    check(call, [normal(2, 32), normal(2, 32) + 1, normal(2, 32) - 1])


def spread(rows: np.ndarray, axis: int) -> np.ndarray:
    """(2, D) as (B, H, S, D) of which one is 2, wherever the rows are."""
    return np.expand_dims(rows, tuple(other for other in range(3) if other != axis))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_conv2d(layout: str) -> None:
    """An image of two rows so long that the second is past 2^31 elements; only its first column is looked at."""
    channels, width = 16, FAR // 16
    image = np.zeros((1, 2, width, channels) if layout == "nhwc" else (1, channels, 1, FAR // 8), np.float16)
    pixels = normal(2, channels)
    if layout == "nhwc":
        image[0, :, 0] = pixels
        weights = normal(16, 1, 1, channels)
        result = conv2d(image, weights, stride=(1, width))[0, :, 0]
    else:
        image[0, :, 0, 0] = pixels[0]
        image[0, :, 0, FAR // 16] = pixels[1]
        weights = normal(16, channels, 1, 1)
        result = conv2d(image, weights, stride=(1, FAR // 16), layout="nchw")[0, :, 0].T
    wanted = pixels.astype(np.float64) @ weights.reshape(16, channels).T.astype(np.float64)
    np.testing.assert_allclose(result, wanted, rtol=2e-3, atol=1e-2)

"""Random inputs: their spread, that they repeat as promised, and that a stray read would show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tilewright.kernels import samples
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.samples import normal, placed

KINDS = [name for name, kind in DTYPES.items() if kind.numpy is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_values_of_the_dtype(kind):
    one, other = (normal(np.random.default_rng(3), (5, 7), kind) for _ in range(2))
    assert one.dtype == np.dtype(DTYPES[kind].numpy)
    assert one.tobytes() == other.tobytes()
    assert one.tobytes() != normal(np.random.default_rng(4), (5, 7), kind).tobytes()


def test_floats_have_the_scale_that_is_asked_for_and_integers_their_spread():
    floats = normal(np.random.default_rng(0), (200, 200), "fp32", scale=0.25)
    assert np.std(floats) == pytest.approx(0.25, rel=0.02)
    integers = normal(np.random.default_rng(0), (200, 200), "int8", scale=0.25).astype(float)
    assert np.std(integers) == pytest.approx(32, rel=0.02)
    assert (integers == np.rint(integers)).all()


def test_large_arrays_repeat_along_memory(monkeypatch):
    monkeypatch.setattr(samples, "PERIOD", 11)
    flat = normal(np.random.default_rng(0), (5, 9), "fp32").reshape(-1)
    assert len(set(flat[:11].tolist())) == 11
    np.testing.assert_array_equal(flat[11:], flat[:-11])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pitch", [None, 7, 32])
@pytest.mark.parametrize("aligned", [True, False])
def test_placed_rows_are_apart_aligned_or_not_and_surrounded(kind, pitch, aligned):
    values = normal(np.random.default_rng(0), (2, 3, 7), kind)
    array = placed(values, pitch=pitch, aligned=aligned)
    assert array.astype(np.float64).tobytes() == values.astype(np.float64).tobytes()
    size = values.itemsize
    assert array.strides == tuple(size * step for step in (3 * (pitch or 7), pitch or 7, 1))
    assert (array.ctypes.data % 16 == 0) is aligned
    if pitch == 32:
        whole = np.ndarray((6, 32), values.dtype, array.base, array.ctypes.data - array.base.ctypes.data)
        strays = whole[:, 7:].astype(np.float64)
        assert np.isnan(strays).all() if values.dtype.kind not in "iu" else (strays == np.iinfo(values.dtype).min).all()


def test_integers_never_wrap():
    values = normal(np.random.default_rng(0), (10**6,), "int8")
    assert values.min() >= -128
    assert math.isclose(values.astype(float).mean(), 0, abs_tol=0.2)

"""Counts against NumPy's own histogram, to the last one."""

from __future__ import annotations

import numpy as np
import pytest

from tilewright.tuner.model.calibration.histogram import CHUNK, Extent, Histogram

RANDOM = np.random.default_rng(4)
ARRAYS = {
    "normal": RANDOM.standard_normal(3 * CHUNK // 2),
    "relu": np.maximum(RANDOM.standard_normal((3, 5, 7)), 0),
    "negative": -RANDOM.random(1000) - 1,
    "offset": RANDOM.uniform(5, 5.1, 10_000),
    "levels": RANDOM.integers(-16, 17, 10_000) / 4,  # on the edges of its bins
    "saturated": np.clip(RANDOM.standard_normal(10_000) * 10, 0, 6),
    "heavy": np.exp(3 * RANDOM.standard_normal(10_000)),
    "tiny": RANDOM.standard_normal(1000) * 1e-30,
    "one": np.array(2.5),
}


@pytest.mark.parametrize("bins", [128, 700, 2048])
@pytest.mark.parametrize("name", ARRAYS)
def test_counts_are_those_of_numpy(name: str, bins: int) -> None:
    array = ARRAYS[name].astype(np.float32)
    parts = np.array_split(array.reshape(-1), 3)
    extent = Extent()
    for part in parts:
        extent.add(part)
    signed, magnitudes = Histogram.signed(extent, bins), Histogram.magnitudes(extent, bins)
    for part in parts:
        signed.add(part)
        magnitudes.add(part)
    limit = np.abs(array).max()
    wanted, edges = np.histogram(array, bins, (-limit, limit))
    np.testing.assert_array_equal(signed.edges, edges)
    np.testing.assert_array_equal(signed.counts, wanted)
    wanted, edges = np.histogram(np.abs(array), bins)
    np.testing.assert_array_equal(magnitudes.edges, edges)
    np.testing.assert_array_equal(magnitudes.counts, wanted)


@pytest.mark.parametrize("name", ARRAYS)
def test_extent(name: str) -> None:
    array = ARRAYS[name].astype(np.float32)
    extent = Extent()
    for part in np.array_split(array.reshape(-1), 4):
        assert extent.add(part)
    magnitudes = np.abs(array)
    assert (extent.count, extent.zeros) == (array.size, int((array == 0).sum()))
    assert (extent.lowest, extent.highest) == (array.min(), array.max())
    assert (extent.least, extent.limit) == (magnitudes.min(), magnitudes.max())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_taken_in(bad: float) -> None:
    extent = Extent()
    assert extent.add(np.array([1, 2], np.float32))
    assert not extent.add(np.array([5, bad], np.float32))
    assert (extent.count, extent.highest) == (2, 2)


def test_what_lies_outside_is_counted_at_the_ends() -> None:
    extent = Extent()
    extent.add(np.array([-1, 1], np.float32))
    histogram = Histogram.signed(extent, 8)
    histogram.add(np.array([-3, 9, 9, 0], np.float32))
    assert histogram.counts.tolist() == [1, 0, 0, 0, 1, 0, 0, 2]

"""How a value of a model is distributed, gathered feed by feed in little memory.

`Extent` finds the smallest and largest number in a first pass, and `Histogram` counts in a second one. With the extent
known beforehand, the counts are those of `numpy.histogram` over all data at once, whatever its order and its division
into feeds: to the last one, for where a percentile falls between two values they decide between a range and another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

CHUNK = 1 << 16
"""Elements at a time: their copies stay in the processor's cache, which makes counting three times as fast."""


@dataclass(slots=True)
class Extent:
    """What is to be known of all numbers before they are counted; everything is 0 before there was one."""

    count: int = 0
    zeros: int = 0
    lowest: float = 0.0
    highest: float = 0.0
    least: float = 0.0  # magnitude

    def add(self, array: Array) -> bool:
        """Takes in an fp32 array; False, and nothing is taken in, if it has a NaN or an infinity."""
        if array.size == 0:
            return True
        lowest, highest = float(array.min()), float(array.max())
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            return False
        zeros = array.size - int(np.count_nonzero(array))
        if lowest > 0 or highest < 0:
            least = min(abs(lowest), abs(highest))
        else:
            least = 0.0 if zeros else _least_magnitude(array.reshape(-1))
        if self.count:
            lowest, highest, least = min(lowest, self.lowest), max(highest, self.highest), min(least, self.least)
        self.lowest, self.highest, self.least = lowest, highest, least
        self.count += array.size
        self.zeros += zeros
        return True

    @property
    def limit(self) -> float:
        """The largest magnitude."""
        return max(abs(self.lowest), abs(self.highest))


@dataclass(slots=True)
class Histogram:
    """Counts in equal bins. Each holds its lower edge; the last one both."""

    edges: Array  # fp32, one more than there are bins
    absolute: bool  # of |x|
    counts: Array = field(init=False)  # int64

    def __post_init__(self) -> None:
        self.counts = np.zeros(self.edges.size - 1, np.int64)

    @classmethod
    def signed(cls, extent: Extent, bins: int) -> Histogram:
        """Of x, from minus the largest magnitude to the largest magnitude."""
        ends = np.array([-extent.limit, extent.limit], np.float32)
        return cls(np.histogram_bin_edges(ends, bins), absolute=False)

    @classmethod
    def magnitudes(cls, extent: Extent, bins: int) -> Histogram:
        """Of |x|, from the least magnitude to the largest."""
        return cls(np.histogram_bin_edges(np.array([extent.least, extent.limit], np.float32), bins), absolute=True)

    def add(self, array: Array) -> None:
        """Counts an fp32 array. What lies outside, if anything, is counted in the outermost bins."""
        flat = array.reshape(-1)
        first, last, bins = float(self.edges[0]), float(self.edges[-1]), self.counts.size
        factor = bins / (last - first)
        # How far an edge may be to the side, in bins: NumPy computes it in fp32, with three roundings.
        blur = 2.0**-21 * max(abs(first), abs(last)) * factor
        for start in range(0, flat.size, CHUNK):
            numbers = flat[start : start + CHUNK]
            if self.absolute:
                numbers = np.abs(numbers)
            if blur > 0.25:
                self.counts += np.bincount(self._find(numbers), minlength=bins)
                continue
            places = numbers.astype(np.float64)
            places -= first
            places *= factor
            np.clip(places, 0, bins, out=places)
            found = np.minimum(places.astype(np.intp), bins - 1)
            # Beside an edge the edges themselves decide; for 0, half of all activations, once for all of them.
            beside = np.abs(places - np.rint(places)) <= blur
            beside &= (places > 0.5) & (places < bins - 0.5) & (numbers != 0)
            where = np.flatnonzero(beside)
            found[where] = self._find(numbers[where])
            self.counts += np.bincount(found, minlength=bins)
            zeros = numbers.size - int(np.count_nonzero(numbers))
            self.counts[min(max(int(-first * factor), 0), bins - 1)] -= zeros
            self.counts[self._find(np.zeros(1, np.float32))] += zeros

    def _find(self, numbers: Array) -> Array:
        """The bin of each number, by comparing it with the edges: slow."""
        return np.clip(np.searchsorted(self.edges, numbers, side="right") - 1, 0, self.counts.size - 1)


def _least_magnitude(flat: Array) -> float:
    return min(float(np.abs(flat[start : start + CHUNK]).min()) for start in range(0, flat.size, CHUNK))

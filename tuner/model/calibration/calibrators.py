"""From the distribution of a value to the range that its integers or fp8 numbers cover.

Every calibrator gives a range r > 0: the value is quantised as q = round(x / s), s = r / 127 for int8 (levels -127 to
127) and r / 448 for fp8 e4m3, and what is beyond ±r saturates. They differ in what they do about numbers that are rare
and large:

- min-max cuts nothing off;
- percentile cuts off a fixed share of them;
- entropy keeps what the quantised distribution tells of the original one;
- MSE takes the range of the least mean squared error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.kernels.dtypes import dtype
from tilewright.tuner.model.calibration.histogram import Extent, Histogram
from tilewright.tuning_db.errors import UsageError

Array = np.ndarray[Any, Any]

TARGETS: Mapping[str, float] = {name: dtype(name).largest for name in ("int8", "uint8", "fp8e4m3")}
"""The largest number of each type: what a value at the end of the range becomes. uint8 is for values that are never
negative, whose integers int8 kernels have shifted by 128."""

EMPTY_SCALE = 1.0
"""The scale of a value that is always 0, or so small that fp32 has no normal number for its scale: all of it becomes 0.
ONNX Runtime takes the same."""

BINS = 2048
"""Of magnitudes, for percentile and MSE; as many as in ONNX Runtime's `PercentileCalibrater`."""

MOST_BINS = 8192
"""The time of entropy grows with the square of its bins: 0.05 s a value at 2048, 1 s at 8192."""

SMALLEST, GREATEST = 2.0**-112, 2.0**126
"""Of a value whose largest magnitude is less or more, all is kept: fp32 has no bins for it."""

CANDIDATES, REFINED = 256, 8
NARROWEST = 256.0
"""MSE looks at ranges from the largest magnitude T down to a 256th of it. A single one of n < 10^10 numbers that is cut
off costs more than narrower steps gain the others: T²/n > (T/256)² / (12·127²)."""

SMOOTHING = 1e-4


class Method(StrEnum):
    """How a range is chosen."""

    MINMAX = "minmax"
    ENTROPY = "entropy"
    PERCENTILE = "percentile"
    MSE = "mse"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the calibrators can be told.

    `entropy_bins` and `entropy_levels` are 2048 and 128 as in Migacz's talk, and `num_bins` and `num_quantized_bins` of
    ONNX Runtime. With its default of 128 bins there is a single candidate, which is min-max.

    Raises:
        UsageError: a number out of its bounds.
    """

    percentile: float = 99.999
    entropy_bins: int = 2048
    entropy_levels: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile={self.percentile} must be above 0 and at most 100")
        if not 2 <= self.entropy_bins <= MOST_BINS:
            raise UsageError(f"entropy_bins={self.entropy_bins} must be from 2 to {MOST_BINS}")
        if not 2 <= self.entropy_levels <= self.entropy_bins:
            raise UsageError(f"entropy_levels={self.entropy_levels} must be from 2 to {self.entropy_bins=}")


@dataclass(slots=True)
class Observer:
    """What some methods need to know of a value, for which it is gone through once more after its extent was found."""

    extent: Extent
    methods: Collection[Method]
    settings: Settings = field(default_factory=Settings)
    magnitudes: Histogram | None = field(init=False, default=None)
    signed: Histogram | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        limit = self.extent.limit
        if not SMALLEST <= limit <= GREATEST:
            return
        # Magnitudes that are as good as equal can't be cut between, nor be told apart in so many bins.
        alike = limit - self.extent.least <= BINS * 2.0**-22 * limit
        if not alike and (Method.PERCENTILE in self.methods or Method.MSE in self.methods):
            self.magnitudes = Histogram.magnitudes(self.extent, BINS)
        if Method.ENTROPY in self.methods:
            self.signed = Histogram.signed(self.extent, self.settings.entropy_bins)

    def add(self, array: Array) -> None:
        """Counts an fp32 array; all of them together are what the extent is of."""
        for histogram in (self.magnitudes, self.signed):
            if histogram is not None:
                histogram.add(array)

    def range(self, method: Method, target: str) -> float:
        """The range by one of the methods; that of min-max where there is nothing to choose between, and so 0 for a
        value that is always 0.

        Raises:
            UsageError: no such target.
        """
        _largest(target)
        if method is Method.ENTROPY and self.signed is not None:
            return entropy_range(self.signed, self.extent, self.settings.entropy_levels)
        if method is Method.PERCENTILE and self.magnitudes is not None:
            return percentile_range(self.magnitudes, self.settings.percentile)
        if method is Method.MSE and self.magnitudes is not None:
            return mse_range(self.magnitudes, self.extent.zeros, target)
        return self.extent.limit

    def scale(self, method: Method, target: str) -> float:
        """The scale of that range.

        Raises:
            UsageError: no such target.
        """
        return find_scale(self.range(method, target), target)


def find_scale(covered: float, target: str) -> float:
    """The scale s of a range: its end becomes 127 (int8), 255 (uint8) or 448 (fp8e4m3).

    Raises:
        UsageError: no such target.
    """
    scale = covered / _largest(target)
    return scale if scale >= float(np.finfo(np.float32).tiny) else EMPTY_SCALE


def percentile_range(magnitudes: Histogram, percentile: float = 99.999) -> float:
    """The lower edge of the bin of |x| in which the given share of all numbers, in percent, is reached; the upper edge,
    where the lower one is 0.

    As ONNX Runtime's `PercentileCalibrater` does with symmetric=True, whose default is 99.999. Of fewer than 100 000
    numbers that cuts off no more than a bin.
    """
    counts, edges = magnitudes.counts, magnitudes.edges
    shares = np.cumsum(counts / counts.sum())
    at = int(np.searchsorted(shares, percentile / 100))
    return float(edges[at] if edges[at] > 0 else edges[at + 1])


def entropy_range(signed: Histogram, extent: Extent, levels: int) -> float:
    """The range whose quantised distribution Q has the least Kullback-Leibler divergence from the original P.

    Candidates are all ranges of whole bins around 0 that have at least `levels` bins. P is the distribution inside,
    with what is outside added to its outermost bins; Q is what is inside in `levels` equal groups of bins, each
    group's mass spread evenly over its bins. Σ P log(P / Q) is smallest where both alike lose little.

    Source: Szymon Migacz, 8-bit Inference with TensorRT, GTC 2017. The details follow ONNX Runtime
    (`onnxruntime.quantization.calibrate.HistogramCollector.get_entropy_threshold`), so that scales agree with it:
    a histogram of both signs; Q's counts cut off to integers and without the bins that are left over when groups are
    equal; empty bins of either given 1e-4, taken off the others; the range within the smallest and largest value.
    """
    counts, edges, bins = signed.counts, signed.edges, signed.counts.size
    middle = bins // 2
    starts = middle - np.arange(levels // 2, middle + 1)
    ends = np.minimum(2 * middle - starts + 1, bins)
    divergences = np.empty(starts.size)
    widths = (ends - starts) // levels
    for width in np.unique(widths):
        alike = widths == width
        divergences[alike] = _divergences(counts, starts[alike], ends[alike], levels, int(width))
    best = int(np.argmin(divergences))
    if np.isinf(divergences[best]):  # all there is lies in bins that are left over
        return extent.limit
    low, high = edges[starts[best]], edges[ends[best]]
    return float(max(abs(max(low, extent.lowest)), abs(min(high, extent.highest))))


def _divergences(counts: Array, starts: Array, ends: Array, levels: int, width: int) -> Array:
    """The divergence of candidates, bins `starts` to `ends`, whose groups have `width` bins; infinite where nothing is
    inside. A row each, of the longest one's length."""
    before = np.concatenate([[0], np.cumsum(counts)])
    sizes = ends - starts
    columns, rows = np.arange(sizes.max()), np.arange(sizes.size)
    inside = columns < sizes[:, None]
    original = np.where(inside, counts[np.minimum(starts[:, None] + columns, counts.size - 1)], 0)
    original[:, 0] += before[starts]
    original[rows, sizes - 1] += before[-1] - before[ends]

    grouped = width * levels
    sums = np.diff(before[starts[:, None] + width * np.arange(levels + 1)], axis=1)
    sums[:, -1] += before[ends] - before[starts + grouped]
    filled = np.count_nonzero(original[:, :grouped].reshape(rows.size, levels, width), axis=2)
    quantised = np.zeros_like(original)
    spread = np.where(filled > 0, sums / np.maximum(filled, 1), 0).astype(np.int64)
    quantised[:, :grouped] = np.repeat(spread, width, axis=1)

    p, q = (_smoothed(each, inside, sizes) for each in (original, quantised))
    terms = p * np.log(p / q)
    divergences = [float(np.sum(row[:size])) for row, size in zip(terms, sizes, strict=True)]
    return np.where(original.any(axis=1) & quantised.any(axis=1), divergences, np.inf)


def _smoothed(counts: Array, inside: Array, sizes: Array) -> Array:
    """Counts as distributions in fp32: the empty bins are given `SMOOTHING`, which is taken off the others. Every sum
    is of the bins inside alone, so that it is rounded as in ONNX Runtime."""
    empty = counts == 0
    missing = np.count_nonzero(empty & inside, axis=1)
    taken = (SMOOTHING * missing / np.maximum(sizes - missing, 1)).astype(np.float32)
    smoothed = np.where(empty, np.float32(SMOOTHING), counts.astype(np.float32) - taken[:, None])
    smoothed /= np.array([np.sum(row[:size]) for row, size in zip(smoothed, sizes, strict=True)])[:, None]
    return smoothed


def mse_range(magnitudes: Histogram, zeros: int, target: str) -> float:
    """The range of the least mean squared error, r = argmin E[(x - s Q(x / s))²], Q rounding to the target's numbers
    and saturating at the largest.

    A grid search: `CANDIDATES` ranges in equal ratios, then around each of the best `REFINED` of them ranges an eighth
    as far apart. (The error has many local minima, from where the largest numbers lie between two of the type's.)
    Within a bin of |x| numbers are taken to be spread evenly, and the error is integrated over it in closed form; those
    that are exactly 0, `zeros` of them, have no error.

    Source: Nagel et al., A White Paper on Neural Network Quantization, arXiv:2106.08295, section 3.1.

    Raises:
        UsageError: no such target.
    """
    _largest(target)
    counts, edges = magnitudes.counts.astype(np.float64), magnitudes.edges.astype(np.float64)
    counts[0] -= zeros
    limit = edges[-1]
    step = NARROWEST ** (1 / (CANDIDATES - 1))
    candidates = limit * step ** -np.arange(CANDIDATES, dtype=np.float64)
    best = candidates[np.argsort(_squared_errors(counts, edges, candidates, target))[:REFINED]]
    candidates = np.minimum(np.outer(best, step ** (np.arange(-7, 8) / 8)).reshape(-1), limit)
    return float(candidates[np.argmin(_squared_errors(counts, edges, candidates, target))])


def _squared_errors(counts: Array, edges: Array, candidates: Array, target: str) -> Array:
    """The summed squared error of each candidate range, over the width of a bin, which is the same for all."""
    borders, numbers, offsets = _cells(target)
    scaled = edges / candidates[:, None]
    cell = np.searchsorted(borders, scaled, side="right") - 1
    scaled -= numbers[cell]
    integral = offsets[cell] + scaled * scaled * scaled / 3
    errors: Array = candidates**3 * (np.diff(integral, axis=1) @ counts)
    return errors


@cache
def _cells(target: str) -> tuple[Array, Array, Array]:
    """The cells of rounding, with the type's largest number as unit: from where each reaches, the number in it, and an
    offset. The integral of the squared error from 0 to u is (u - number)³ / 3 + offset of the cell that u is in."""
    if target in ("int8", "uint8"):
        numbers = np.arange(_largest(target) + 1) / _largest(target)
    else:
        bits = np.arange(128, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        numbers = bits[np.isfinite(bits)] / _largest(target)
    borders = np.concatenate([[0.0], (numbers[1:] + numbers[:-1]) / 2])
    begins, ends = (borders - numbers) ** 3 / 3, (borders[1:] - numbers[:-1]) ** 3 / 3
    before = np.concatenate([[0.0], np.cumsum(ends - begins[:-1])])
    return borders, numbers, before - begins


def _largest(target: str) -> float:
    if target not in TARGETS:
        raise UsageError(f"{target=} must be one of {', '.join(TARGETS)}")
    return TARGETS[target]

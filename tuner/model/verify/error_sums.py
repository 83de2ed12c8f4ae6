"""Sums that errors of values over many inputs are made of, and the errors themselves, which `compare.py` defines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class OutputError:
    """The errors of one graph output, or of the logits behind one. None is what can't be said: nothing to divide by.
    What is left out, as padding is, counts nowhere."""

    output: str  # name of the graph output
    value: str  # name of what was compared, in the original: the output itself, or its logits
    logits: bool  # whether it is the logits behind the output
    exact: bool  # every element is equal
    relative: float | None  # None, as all but agreement, of integers and booleans: a class 700 is not far from class 3
    centred_relative: float | None  # None for one input, too, and where sizes depend on the input
    max_abs: float
    cosine: float | None
    sqnr_db: float | None  # None for one input, without any error, and where sizes depend on the input
    top1: float | None  # share of rows, of integers and booleans of elements; None of what has no classes: vectors
    bad_original: int  # NaN and infinities; they are left out of the errors
    bad_changed: int  # those that the original has not, or others, at their place, and infinities that became numbers
    rows: int = 0  # that top-1 agreement is a share of
    judged: bool = True  # whether a bound on top-1 agreement is one on this
    discrete: bool = False  # integers or booleans
    constant: bool = False  # the same for every input: there is nothing to centre, and what is centred isn't

    @property
    def untold(self) -> bool:
        """Whether there are elements, and not one to compare."""
        told = self.exact or self.max_abs > 0.0 or self.relative is not None
        return not told and not (self.discrete and self.top1 is not None)

    @property
    def error(self) -> float:
        """The error as one number, as models are ranked by it: the relative one, or the share of integers that differ;
        beside an original of zeros the largest number in their place, and 0 where there is nothing to compare."""
        if self.discrete:
            return 0.0 if self.top1 is None else 1.0 - self.top1
        return _told(self.relative, self.max_abs)


@dataclass(frozen=True, slots=True)
class LayerError:
    """The errors of one fused node's output."""

    value: str  # name in the changed model
    original: str  # name in the original
    exact: bool
    relative: float | None
    sqnr_db: float | None  # not centred
    bad_original: int
    bad_changed: int
    max_abs: float = 0.0

    @property
    def error(self) -> float:
        """As of an output."""
        return _told(self.relative, self.max_abs)


class LayerSums:
    """What is summed of a pair of values, feed by feed."""

    def __init__(self) -> None:
        self.largest = self.largest_error = 0.0
        self.squares = self.changed_squares = self.products = self.error_squares = 0.0
        self.bad_original = self.bad_changed = 0
        self.exact = True
        self.untold = False  # there were elements, and not one to compare
        self._finite = self._elements = 0

    def add(self, a: Array, b: Array, left_out: Array | None = None) -> tuple[Array, Array]:
        """Adds a pair of one shape; both as fp64, with zeros where either is not finite, and where `left_out`, which
        goes together with that shape, is true."""
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        if left_out is not None:
            a, b = np.where(left_out, 0.0, a), np.where(left_out, 0.0, b)
        self.exact &= bool(np.array_equal(a, b, equal_nan=True))
        fine_a, fine_b = np.isfinite(a), np.isfinite(b)
        self.bad_original += int(a.size - np.count_nonzero(fine_a))
        told = fine_a & fine_b if left_out is None else fine_a & fine_b & ~left_out
        self._finite += int(np.count_nonzero(told))
        self._elements += a.size
        self.untold = bool(self._elements) and not self._finite
        if not (fine_a.all() and fine_b.all()):
            same = (a == b) | (np.isnan(a) & np.isnan(b))  # as masked logits, which are -∞ in both
            # A NaN that became a number is no fault; an infinity that did is no longer a mask.
            self.bad_changed += int(np.count_nonzero((~fine_b | np.isinf(a)) & ~same))
            both = fine_a & fine_b
            a, b = np.where(both, a, 0.0), np.where(both, b, 0.0)
        if a.size:
            error = b - a
            self.largest = max(self.largest, float(np.abs(a).max()))
            self.largest_error = max(self.largest_error, float(np.abs(error).max()))
            self.squares += _dot(a, a)
            self.changed_squares += _dot(b, b)
            self.products += _dot(a, b)
            self.error_squares += _dot(error, error)
        return a, b

    def row(self, name: str, original: str) -> LayerError:
        return LayerError(
            value=name,
            original=original,
            exact=self.exact and not self.untold,
            relative=None if self.untold else _ratio(self.largest_error, self.largest),
            sqnr_db=_decibel(self.squares, self.error_squares),
            bad_original=self.bad_original,
            bad_changed=self.bad_changed,
            max_abs=self.largest_error,
        )


class OutputSums:
    """`LayerSums`, and element by element what the mean over inputs is taken from."""

    def __init__(self, axis: int) -> None:
        self.sums = LayerSums()
        self.axis = axis
        self.count = 0  # inputs
        self.rows = self.agreed = 0  # of classes; of integers, elements
        self.discrete = False
        # Element by element over the inputs, of a - first: near the mean, so that squares don't cancel.
        self.first: Array | None = None
        self.total = self.least = self.most = np.zeros(0)
        self.squares = 0.0
        self.counts: Array = np.zeros((), np.int64)  # inputs in which an element counts
        self.varied = False  # in size, from input to input: then there is no mean of elements

    def add(self, a: Array, b: Array, batched: bool, left_out: Array | None = None) -> None:
        """Adds a pair of one shape, as `LayerSums.add`; `batched`: their first dimension counts inputs."""
        counted: Array = np.ones((), bool) if left_out is None else np.broadcast_to(~left_out, a.shape)
        if a.dtype.kind in "biu":  # compared as they are: fp64 has no room for all of int64
            self.discrete = True
            counted = np.broadcast_to(counted, a.shape)
            self.rows += int(np.count_nonzero(counted))
            self.agreed += int(np.count_nonzero((a == b) & counted))
        elif a.dtype.kind in "fV":
            self._agree(np.asarray(a, np.float64), np.asarray(b, np.float64), counted)
        a, b = self.sums.add(a, b, left_out)
        samples = a if batched else a[None]
        if self.first is None:
            self.first = samples[0].copy()
            self.total = np.zeros_like(self.first)
            self.least, self.most = np.full_like(self.first, math.inf), np.full_like(self.first, -math.inf)
        self.count += len(samples)
        self.varied |= samples.shape[1:] != self.first.shape
        if self.varied:
            return
        shifted = samples - self.first
        if left_out is None:
            self.counts = self.counts + len(samples)
            least, most = shifted.min(axis=0), shifted.max(axis=0)
        else:
            counted = counted if batched else counted[None]
            self.counts = self.counts + counted.sum(axis=0)
            least = shifted.min(axis=0, where=counted, initial=math.inf)
            most = shifted.max(axis=0, where=counted, initial=-math.inf)
            shifted = np.where(counted, shifted, 0.0)
        self.total += shifted.sum(axis=0)
        self.squares += _dot(shifted, shifted)
        self.least, self.most = np.minimum(self.least, least), np.maximum(self.most, most)

    def _agree(self, a: Array, b: Array, counted: Array) -> None:
        if self.axis == -1:  # (N, classes, 1, 1) has its classes in the second dimension
            while a.ndim > 2 and a.shape[-1] == 1:
                a, b = a[..., 0], b[..., 0]
                counted = counted[..., 0] if counted.ndim else counted
        if a.ndim < 2 or a.shape[self.axis] < 2:
            return
        # A row of the original with NaN in it has no largest element, nor has one of nothing but -∞.
        told = np.broadcast_to(counted, a.shape).all(axis=self.axis) & (a.max(axis=self.axis) > -math.inf)
        same = a.argmax(axis=self.axis) == np.where(np.isnan(b), -math.inf, b).argmax(axis=self.axis)
        self.rows += int(np.count_nonzero(told))
        self.agreed += int(np.count_nonzero(same & told))

    def row(self, output: str, value: str, logits: bool) -> OutputError:
        sums = self.sums
        top1 = self.agreed / self.rows if self.rows else None
        if self.discrete:
            counts = (sums.bad_original, sums.bad_changed, self.rows)
            exact = self.agreed == self.rows and not sums.untold
            return OutputError(
                *(output, value, logits, exact, None, None, sums.largest_error, None, None, top1, *counts),
                discrete=True,
            )
        centred_largest, centred_squares, constant = 0.0, 0.0, False
        if self.count > 1 and self.total.size and not self.varied:
            mean = self.total / np.maximum(self.counts, 1)
            centred_largest = float(np.maximum(self.most - mean, mean - self.least).max())
            centred_squares = max(0.0, self.squares - float(np.sum(self.counts * mean * mean)))
            constant = centred_largest <= 0.0
        if constant:
            centred_largest, centred_squares = sums.largest, sums.squares
        centred = centred_largest > 0.0
        lengths = math.sqrt(sums.squares) * math.sqrt(sums.changed_squares)
        return OutputError(
            output=output,
            value=value,
            logits=logits,
            exact=sums.exact and not sums.untold,
            relative=None if sums.untold else _ratio(sums.largest_error, sums.largest),
            centred_relative=_ratio(sums.largest_error, centred_largest) if centred else None,
            max_abs=sums.largest_error,
            cosine=max(-1.0, min(1.0, sums.products / lengths)) if lengths else None,
            sqnr_db=_decibel(centred_squares, sums.error_squares),
            top1=top1,
            bad_original=sums.bad_original,
            bad_changed=sums.bad_changed,
            rows=self.rows,
            constant=constant,
        )


def _dot(a: Array, b: Array) -> float:
    """Σ a·b, pairwise: BLAS's is quicker, less exact, and depends on how many threads it takes."""
    return float(np.sum(a * b))


def _told(relative: float | None, max_abs: float) -> float:
    """A relative error as a number: where there is nothing to divide by, the largest number in the place of zeros."""
    return max_abs if relative is None else relative


def _ratio(error: float, largest: float) -> float | None:
    if error == 0.0:
        return 0.0
    return error / largest if largest else None


def _decibel(signal: float, noise: float) -> float | None:
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise > 0.0 else None

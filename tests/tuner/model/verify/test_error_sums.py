"""The errors of values summed feed by feed, against the formulas on all of them at once."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tilewright.tuner.model.verify.error_sums import LayerSums, OutputError, OutputSums

Array = np.ndarray[Any, Any]


def errors(a: list[Array], b: list[Array], *, batched: bool = False, axis: int = -1) -> OutputError:
    sums = OutputSums(axis)
    for ours, other in zip(a, b, strict=True):
        sums.add(ours, other, batched)
    return sums.row("out", "out", False)


def samples(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[list[Array], list[Array]]:
    random = np.random.default_rng(seed)
    # A large constant part, as logits of careless weights have: what centring is for.
    constant = 100 * random.standard_normal(shape)
    a = [(constant + random.standard_normal(shape)).astype(np.float32) for _ in range(count)]
    return a, [each + (0.01 * random.standard_normal(shape)).astype(np.float32) for each in a]


@pytest.mark.parametrize("batched", [False, True])
def test_the_formulas(batched: bool) -> None:
    a, b = samples((4, 7), 5)
    row = errors(a, b, batched=batched)
    wide = np.concatenate if batched else np.stack
    one, other = wide(a).astype(np.float64), wide(b).astype(np.float64)
    centred, noise = one - one.mean(axis=0), other - one
    assert row.relative == pytest.approx(np.abs(noise).max() / np.abs(one).max(), rel=1e-12)
    assert row.centred_relative == pytest.approx(np.abs(noise).max() / np.abs(centred).max(), rel=1e-9)
    assert row.max_abs == np.abs(noise).max()
    assert row.cosine == pytest.approx(np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-12)
    assert row.sqnr_db == pytest.approx(10 * np.log10((centred**2).sum() / (noise**2).sum()), rel=1e-9)
    assert row.top1 == (one.argmax(-1) == other.argmax(-1)).mean()
    assert not row.exact


@pytest.mark.parametrize("batched", [False, True])
def test_what_is_left_out_counts_nowhere(batched: bool) -> None:
    """The errors are those of what is left, in which an element's mean is over the inputs that have it."""
    a, b = samples((4, 7), 5)
    random = np.random.default_rng(1)
    left_out = [random.random((4, 1)) < 0.3 for _ in a]
    left_out[0][:2] = True  # of what comes first, too
    for each in left_out:
        each[0] = True  # in every input
    sums = OutputSums(-1)
    for ours, other, without in zip(a, b, left_out, strict=True):
        spoiled = np.where(without, random.choice([1e6, math.nan]), other)
        sums.add(np.where(without, 1e5, ours), spoiled, batched, without)
    row = sums.row("out", "out", False)
    counted = np.stack([np.broadcast_to(~without, (4, 7)) for without in left_out])
    one, other = np.stack(a).astype(np.float64), np.stack(b).astype(np.float64)
    axes: tuple[int, ...] = (0, 1) if batched else (0,)
    mean = np.ma.MaskedArray(one, ~counted).mean(axis=axes, keepdims=True)
    centred, noise = (one - mean)[counted].compressed(), (other - one)[counted]
    one, other = one[counted], other[counted]
    assert row.relative == pytest.approx(np.abs(noise).max() / np.abs(one).max(), rel=1e-12)
    assert row.centred_relative == pytest.approx(np.abs(noise).max() / np.abs(centred).max(), rel=1e-9)
    assert row.cosine == pytest.approx(np.vdot(one, other) / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-12)
    assert row.sqnr_db == pytest.approx(10 * np.log10((centred**2).sum() / (noise**2).sum()), rel=1e-9)
    agreed = np.concatenate(
        [(x.argmax(-1) == y.argmax(-1))[~out[:, 0]] for x, y, out in zip(a, b, left_out, strict=True)]
    )
    assert row.top1 == agreed.mean()
    assert row.bad_changed == row.bad_original == 0


def test_centring_sees_what_cosine_does_not() -> None:
    """Another input's output in place of the right one: a cosine of nearly 1, an SQNR of nothing."""
    a, _ = samples((1, 100), 16)
    row = errors(a, a[1:] + a[:1])
    assert row.cosine is not None
    assert row.cosine > 0.9998
    assert row.sqnr_db is not None
    assert row.sqnr_db < 0
    assert row.centred_relative is not None
    assert row.centred_relative > 0.5


def test_an_error_that_is_the_same_for_all_inputs_counts() -> None:
    a, _ = samples((1, 100), 16)
    row = errors(a, [each + 3 for each in a])
    assert row.centred_relative is not None
    assert row.centred_relative > 0.5


def test_equal_values_are_exact() -> None:
    a, _ = samples((2, 3), 2)
    row = errors(a, a)
    assert (row.exact, row.relative, row.max_abs, row.centred_relative, row.sqnr_db) == (True, 0.0, 0.0, 0.0, None)
    assert row.cosine == pytest.approx(1.0)
    assert row.top1 == 1.0


def test_of_one_input_nothing_is_centred() -> None:
    a, b = samples((2, 3), 1)
    row = errors(a, b)
    assert row.centred_relative is None
    assert row.sqnr_db is None
    assert row.relative is not None


def test_an_original_of_zeros_has_no_relative_error() -> None:
    zeros = [np.zeros((2, 3), np.float32)] * 2
    row = errors(zeros, [each + 1 for each in zeros])
    assert row.relative is None
    assert row.cosine is None
    assert row.max_abs == 1.0
    assert row.error == 1.0
    layer = LayerSums()
    layer.add(zeros[0], zeros[0] + 1)
    assert layer.row("y", "y").error == 1.0


def test_one_number_stands_for_the_error() -> None:
    a, b = samples((2, 3), 2)
    assert errors(a, b).error == errors(a, b).relative
    nothing = [np.full((2, 3), np.nan)]
    assert errors(nothing, nothing).error == 0.0
    ids = [np.arange(10)]
    assert errors(ids, [np.where(ids[0] < 3, 99, ids[0])]).error == pytest.approx(0.3)


def test_integers_are_compared_as_they_are() -> None:
    """fp64 has no room for 2⁶⁰ + 1."""
    ids = np.full((2, 3), 2**60)
    row = errors([ids], [ids + np.array([0, 0, 1])])
    assert (row.top1, row.rows, row.exact, row.discrete) == (2 / 3, 6, False, True)
    assert (row.relative, row.centred_relative, row.cosine, row.sqnr_db) == (None, None, None, None)
    assert errors([ids], [ids]).exact
    assert errors([np.array([True, False])], [np.array([True, True])]).top1 == 0.5
    sums = OutputSums(-1)
    sums.add(ids, ids + np.array([[0], [1]]), False, np.array([[False], [True]]))
    assert sums.row("y", "y", False).exact


def test_numbers_that_are_none_are_counted_and_left_out() -> None:
    a = [np.array([[1.0, np.nan, 3.0, 4.0]]), np.array([[1.0, 2.0, 3.0, 4.0]])]
    b = [np.array([[1.0, 2.0, np.inf, 4.5]]), np.array([[1.0, 2.0, 3.0, -np.inf]])]
    row = errors(a, b)
    assert (row.bad_original, row.bad_changed) == (1, 2)
    assert row.max_abs == 0.5
    assert not row.exact


def test_agreement_is_of_what_is_not_masked() -> None:
    """-∞ where a class is masked: a zero in its place would be the largest of negative logits, in both models."""
    a = np.array([[-1.0, -2.0, -np.inf], [-3.0, -2.0, -np.inf], [-5.0, -np.inf, -4.0]])
    b = np.array([[-2.0, -1.0, -np.inf], [-3.0, -2.0, -np.inf], [np.nan, -np.inf, -4.0]])
    assert errors([a], [b]).top1 == 2 / 3
    # Of a row with NaN, or of nothing but -∞, there is no largest: no class is told.
    a[0], a[1, 0] = -np.inf, np.nan
    assert errors([a], [b]).top1 == 1.0
    assert errors([a[:2]], [b[:2]]).top1 is None


@pytest.mark.parametrize(("bad", "number", "count"), [(-np.inf, -65504.0, 1), (np.inf, 1.0, 1), (np.nan, 0.0, 0)])
def test_an_infinity_that_becomes_a_number_is_counted(bad: float, number: float, count: int) -> None:
    """A mask that masks nothing any more; NaN, as of rows that see nothing, may become a number."""
    a = [np.array([[1.0, bad, 3.0]]), np.array([[1.0, 2.0, 3.0]])]
    b = [np.array([[1.0, number, 3.0]]), a[1]]
    row = errors(a, b)
    assert (row.bad_original, row.bad_changed) == (1, count)


@pytest.mark.parametrize(
    ("array", "axis", "wanted"),
    [
        (np.zeros((3, 5), np.float32), -1, 1.0),
        (np.zeros((3, 5), ml_dtypes.bfloat16), -1, 1.0),
        (np.zeros((3, 5, 1, 1), np.float32), -1, 1.0),  # classes before two dimensions of 1
        (np.zeros((3, 5, 4, 4), np.float32), 1, 1.0),
        (np.zeros((3, 1), np.float32), -1, None),
        (np.zeros(5, np.float32), -1, None),
        (np.zeros((3, 5), np.int64), -1, 1.0),
        (np.zeros(5, np.bool_), -1, 1.0),
    ],
)
def test_what_has_classes(array: Array, axis: int, wanted: float | None) -> None:
    assert errors([array], [array], axis=axis).top1 == wanted


def test_agreement_is_along_the_axis_of_the_classes() -> None:
    a = np.zeros((1, 2, 2, 1), np.float32)
    b = a.copy()
    a[0, 1, 0, 0] = 1  # class 1 at the first place only
    b[0, 1, :, 0] = 1
    assert errors([a], [b], axis=1).top1 == 0.5


def test_a_layer_is_not_centred() -> None:
    a, b = samples((4, 7), 3)
    sums = LayerSums()
    for ours, other in zip(a, b, strict=True):
        sums.add(ours, other)
    row = sums.row("there", "here")
    one, noise = np.stack(a).astype(np.float64), np.stack(b).astype(np.float64) - np.stack(a)
    assert row.sqnr_db == pytest.approx(10 * np.log10((one**2).sum() / (noise**2).sum()), rel=1e-9)
    assert row.relative == pytest.approx(np.abs(noise).max() / np.abs(one).max(), rel=1e-12)
    assert (row.value, row.original) == ("there", "here")


def test_of_sizes_that_depend_on_the_input_nothing_is_centred() -> None:
    # (2, 1) would go with (2, 4) by broadcasting.
    a = [np.ones((2, 4)), np.full((2, 1), 3.0), np.zeros((2, 0))]
    found = errors(a, [a[0] + 0.5, *a[1:]])
    assert (found.relative, found.max_abs, found.exact) == (0.5 / 3, 0.5, False)
    assert (found.centred_relative, found.sqnr_db) == (None, None)

"""Post-training quantisation from end to end: all that `apply_precision` needs for int8 or fp8, from calibration data.

In this order, each step on the model that the one before left:

1. Ranges move from activations into weights (`smoothing.py`).
2. Activations are calibrated by every method (`calibration`), and the method is taken whose model, weights rounded to
   nearest, comes nearest to the original on calibration data. int8 activations that are never negative use all 256
   integers where that costs nothing (`zeros.py`).
3. Weights are rounded with regard to their inputs (`rounding.py`).
4. What is left of each layer's shift is taken off its bias (`correction.py`), if that brings the results nearer.

How near is the signal-to-quantisation-noise ratio, 10·log10(Σ c² / Σ (ŷ - y)²) in dB, over what the model's last
layers give: before a softmax, which hides errors of everything but the largest. c is y less its mean over the inputs:
what all inputs have in common is no signal. What of y is not finite, as of a mask, is left out; a model that gives NaN
or infinity elsewhere has -∞ dB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from tilewright.tuner.model.calibration.calibrate import Method, observe
from tilewright.tuner.model.calibration.feeds import Feed
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.precision.correction import measure_shifts
from tilewright.tuner.model.precision.quantise import QUANTISED, LayerPrecision, Weights, apply_precision
from tilewright.tuner.model.precision.rounding import round_weights
from tilewright.tuner.model.precision.rules import default_plan, last_layers, values_to_calibrate, values_to_shift
from tilewright.tuner.model.precision.smoothing import SmoothingReport, smooth
from tilewright.tuner.model.session import run

Array = np.ndarray[Any, Any]

METHODS = (Method.MINMAX, Method.ENTROPY, Method.PERCENTILE, Method.MSE)
SCORED = 16
"""Calibration inputs on which methods are compared, spread over all of them."""

STEPS = 16
"""Activations smoothed, runs of the model and layers rounded from one line of progress to the next."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """What was found for one kind of precision. `apply_precision(model, plan, base=…, weights=…, shifts=…)` makes the
    model; layers that a plan leaves out take nothing from it."""

    kind: str
    plan: Mapping[str, LayerPrecision]
    reasons: Mapping[str, str]  # of each fused node that stays at the base precision
    method: Method | None  # of calibration; None where there is nothing to calibrate
    scores: Mapping[Method, float]  # dB of each method, weights rounded to nearest, shifts left out
    weights: Mapping[str, Weights]
    shifts: Mapping[str, Array]
    smoothing: SmoothingReport


def quantise(
    model: ir.Model,
    feeds: Sequence[Feed],
    kind: str,
    *,
    methods: Sequence[Method] = METHODS,
    smoothing: bool = True,
    rounding: bool = True,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Quantisation:
    """Finds all that a model needs to be int8 or fp8 where the rules let it be.

    Args:
        model: fused, in floating point. Smoothing changes its weights in place; what it computes stays the same.
        feeds: calibration data.
        kind: `int8` or `fp8`.
        methods: of calibration, to choose from.
        smoothing, rounding: whether to take steps 1 and 3.
        seed: of the rows that are looked at.
        tell: called with a line of progress.

    Raises:
        UsageError: no such kind.
        ModelError, RunError: see `observe` and `session.run`.
    """

    def progress(words: str) -> Callable[[int, int], None]:
        def told(done: int, most: int) -> None:
            if done % STEPS == 0:
                tell(f"{kind}: {done} of {most} {words}")

        return told

    report = SmoothingReport()
    if smoothing:
        report = smooth(model, feeds, kind=kind, seed=seed, progress=progress("activations looked at for smoothing"))
    values = values_to_calibrate(model, kind)
    if not values:
        plan, reasons = default_plan(model, kind, {})
        return Quantisation(kind, plan, reasons, None, {}, {}, {}, report)
    tell(f"{kind}: {len(report.smoothed)} activations smoothed")
    shifted = set(values_to_shift(model)) if kind == "int8" else set()
    targets = {name: "uint8" if name in shifted else QUANTISED[kind] for name in values}
    observers = observe(model, feeds, values, methods=methods, progress=progress("runs for scales"))
    scored = Score(model, [feeds[index] for index in _spread(len(feeds), SCORED)])
    plans, scores = {}, {}
    for method in methods:
        scales = {name: observer.scale(method, targets[name]) for name, observer in observers.items()}
        plans[method] = default_plan(model, kind, scales, shifted)
        # Shifts are what step 4 takes off.
        scores[method] = scored.of(apply_precision(model, plans[method][0], base="fp32"), shifts=False)
    best = max(scores, key=lambda method: scores[method])
    plan, reasons = plans[best]
    tell(f"{kind}: scales by {best}, {scores[best]:.1f} dB on calibration data, shifts of means left out")
    weights = round_weights(model, plan, feeds, seed=seed, progress=progress("layers rounded")) if rounding else {}
    shifts = measure_shifts(model, plan, feeds, weights=weights)
    plain, corrected = (
        scored.of(apply_precision(model, plan, base="fp32", weights=weights, shifts=each)) for each in ({}, shifts)
    )
    if corrected <= plain:
        shifts = {}
    means = "corrected" if shifts else "as they were"
    tell(
        f"{kind}: {max(plain, corrected):.1f} dB, shifts of means counted, with weights rounded by their inputs and "
        f"biases {means}"
    )
    return Quantisation(kind, plan, reasons, best, scores, weights, shifts, report)


class Score:
    """How near models come to one, in dB, on some feeds."""

    def __init__(self, model: ir.Model, feeds: Sequence[Feed]) -> None:
        last = last_layers(model)
        self._feeds = feeds
        self._names = [node.outputs[0].name or "" for node in fused_nodes(model) if node.name in last]
        self._names = self._names or [value.name or "" for value in model.graph.outputs]
        self._wanted = list(run(model, feeds, self._names))
        first, *others = self._wanted
        # Of one input, or some that are the same, all there is would be the mean.
        self._alike = all(
            np.array_equal(first[name], other[name], equal_nan=True) for other in others for name in self._names
        )
        zeros = dict.fromkeys(self._names, 0.0)
        self._signal = self._squares((wanted, zeros) for wanted in self._wanted)

    def of(self, model: ir.Model, *, shifts: bool = True) -> float:
        """The signal-to-quantisation-noise ratio of a model that has the same values; without `shifts` a part of the
        noise that is the same for all feeds counts for nothing."""
        noise = self._squares(zip(run(model, self._feeds, self._names), self._wanted, strict=True), shifts=shifts)
        if not np.isfinite(noise):
            return -math.inf
        return 10 * float(np.log10(max(self._signal, 1e-300) / max(noise, 1e-300)))

    def _squares(self, pairs: Iterable[tuple[Mapping[str, Any], Mapping[str, Any]]], *, shifts: bool = False) -> float:
        """Σ (a - b)², each difference less its mean over the feeds unless `shifts` count or all feeds give the same."""
        sums: dict[str, Array] = {}
        counts: dict[str, Array] = {}
        squares = 0.0
        for (a, b), wanted in zip(pairs, self._wanted, strict=True):
            for name in self._names:
                told = np.isfinite(wanted[name])
                difference = np.subtract(a[name].astype(np.float64), b[name], out=np.zeros(told.shape), where=told)
                if not np.isfinite(difference).all():
                    return math.inf
                squares += float(np.square(difference).sum())
                sums[name] = sums.get(name, 0.0) + difference
                counts[name] = counts.get(name, 0) + told
        if shifts or self._alike:
            return squares
        return squares - sum(float((np.square(sums[name]) / np.maximum(counts[name], 1)).sum()) for name in self._names)


def _spread(total: int, count: int) -> list[int]:
    return sorted({index * total // count for index in range(count)}) if total > count else list(range(total))

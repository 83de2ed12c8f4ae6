"""What a search believes of every configuration of a list, after a few of them were tried.

A Gaussian process over the logarithm of the time, with a Matérn-5/2 kernel and a length scale for each feature,
evaluated for the whole list after every trial. Two things make that cheap: length scales are fitted only now and then,
and in between a trial adds one row to the factorised covariance (Rasmussen and Williams, Gaussian Processes for Machine
Learning, 2006, A.3 and algorithm 2.1).

SciPy gives the factorisations and the optimiser. Of the processes that exist ready-made, scikit-learn's fits and
predicts from scratch each time (seconds at 20,000 configurations), and Optuna's needs PyTorch.
"""

from __future__ import annotations

import functools
import itertools
import numbers
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from threadpoolctl import ThreadpoolController

Array = NDArray[np.floating[Any]]

MOST_PAIRED_AXES = 12
"""Axes up to which products of each two are features: 66 of them."""

SPREAD_ELSEWHERE = 0.5
"""Of the length scales of what is to be carried over: from a hundred trials of one board, scales that fit them exactly
are learned of that board alone. With 1, such trials brought a search of the shipped convolutions for GPUs of another
maker to 0.922 of the optimum after 30 trials, and with 0.5 to 0.948 (100 seeds each)."""

_SQRT5 = float(np.sqrt(5.0))
_JITTER = 1e-6


def encode(axes: Mapping[str, Sequence[Any]], configs: Sequence[Mapping[str, Any]]) -> Array:
    """Features of configurations, each from 0 to 1: array of (configurations, features), fp64.

    An axis of positive numbers gives its logarithm, and where its values aren't all powers of two, the power of two in
    each as well (alignment and even division go by it); each two such axes give the logarithm of their product, for
    tiles, threads and bytes are products. Any other axis of numbers gives its value. What is no number gives a feature
    for each of its values. Axes with one value give none.
    """
    features: list[Array] = []
    logarithms: list[Array] = []
    for name, values in axes.items():
        chosen = [config[name] for config in configs]
        distinct = list(dict.fromkeys((*values, *chosen)))
        if len(distinct) < 2:
            continue
        if not all(isinstance(value, numbers.Real) for value in distinct):  # bool is one, and NumPy's are
            columns = distinct[:1] if len(distinct) == 2 else distinct
            features += [np.array([value == each for value in chosen], dtype=float) for each in columns]
            continue
        column = np.array(chosen, dtype=float)
        if min(distinct) <= 0 or len(distinct) == 2:
            features.append(column)
            continue
        features.append(np.log2(column))
        logarithms.append(features[-1])
        if all(value == int(value) for value in distinct):
            powers = np.log2([float(int(value) & -int(value)) for value in chosen])
            if not np.array_equal(powers, logarithms[-1]):
                features.append(powers)
    if len(logarithms) <= MOST_PAIRED_AXES:
        features += [one + other for one, other in itertools.combinations(logarithms, 2)]
    spans = [(feature, float(np.ptp(feature))) for feature in features]
    scaled = [(feature - feature.min()) / span for feature, span in spans if span > 0]
    return np.stack(scaled, axis=1) if scaled else np.zeros((len(configs), 1))


def one_thread() -> AbstractContextManager[Any]:
    """A context in which BLAS works in the calling thread alone. Its threads wait busily: beside compilers on every
    core, matrices of this size take five times as long with them."""
    context: AbstractContextManager[Any] = _threads().limit(limits=1, user_api="blas")
    return context


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


class GaussianProcess:
    """Hyperparameters of the process: a length scale for each feature, the variance and the noise's variance.

    Maximum a posteriori: length scales are log-normal around half the diagonal of the unit cube of the features, so
    that of few trials none is believed to matter alone (Hvarfner et al., Vanilla Bayesian Optimization Performs Great
    in High Dimensions, 2024); variance around 1, for values are standardised; noise around 1 %.

    Args:
        features: how many there are.
        spread: of the length scales, the standard deviation of their logarithm.
    """

    def __init__(self, features: int, spread: float = 1.0) -> None:
        self._features = features
        self._middle = np.concatenate([np.full(features, np.log(0.5 * np.sqrt(features))), [0.0, np.log(1e-2)]])
        self._width = np.concatenate([np.full(features, spread), [1.0, 2.0]])
        self._log = self._middle.copy()

    @property
    def scales(self) -> Array:
        """Length scales, of (features)."""
        scales: Array = np.exp(self._log[: self._features])
        return scales

    @property
    def variance(self) -> float:
        """Variance of the process, before any trial."""
        return float(np.exp(self._log[self._features]))

    @property
    def noise(self) -> float:
        """Variance of one observation about the process."""
        return float(np.exp(self._log[self._features + 1]))

    def fit(self, features: Array, values: Array, iterations: int = 30) -> None:
        """Fits the hyperparameters to values of (trials), standardised, at features of (trials, features).

        Starts where the last fit ended.
        """
        count = len(values)
        squares = np.ascontiguousarray(
            ((features[:, None, :] - features[None, :, :]) ** 2).reshape(count * count, -1).T
        )
        bounds = [(-4.0, 4.0)] * self._features + [(-3.0, 3.0), (-12.0, 0.0)]
        found = minimize(
            self._loss,
            self._log,
            args=(squares, values),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": iterations},
        )
        if np.all(np.isfinite(found.x)):
            self._log = found.x

    def _loss(self, log: Array, squares: Array, values: Array) -> tuple[float, Array]:
        """Negative log posterior of the hyperparameters, and its gradient (Rasmussen and Williams, 5.9)."""
        count = len(values)
        inverse_squares = np.exp(-2 * log[: self._features])
        variance, noise = np.exp(log[self._features]), np.exp(log[self._features + 1])
        scaled = _SQRT5 * np.sqrt(inverse_squares @ squares).reshape(count, count)
        decay = np.exp(-scaled)
        shape = (1 + scaled + scaled * scaled / 3) * decay
        covariance = variance * shape
        covariance.flat[:: count + 1] += noise + _JITTER
        away = (log - self._middle) / self._width
        try:
            lower = cholesky(covariance, lower=True, check_finite=False)
        except LinAlgError:
            return 1e10, np.zeros_like(log)
        inverse = cho_solve((lower, True), np.eye(count), check_finite=False)
        weights = inverse @ values
        slope = inverse - np.outer(weights, weights)
        loss = 0.5 * values @ weights + np.log(np.diag(lower)).sum() + 0.5 * (away @ away)
        by_scale = 0.5 * (squares @ (slope * (variance * 5 / 3) * (1 + scaled) * decay).ravel()) * inverse_squares
        by_variance = 0.5 * variance * np.sum(slope * shape)
        by_noise = 0.5 * noise * np.trace(slope)
        return float(loss), np.concatenate([by_scale, [by_variance, by_noise]]) + away / self._width


def _matern(squares: Array) -> Array:
    """The Matérn-5/2 correlation at squared distances in length scales, which it overwrites."""
    scaled = np.sqrt(squares, out=squares)
    scaled *= squares.dtype.type(_SQRT5)
    decay = np.exp(-scaled)
    scaled += 1 + scaled * scaled / 3
    scaled *= decay
    return scaled


class Posterior:
    """What the process says of a list of candidates, given the trials added so far.

    Held for all candidates at once, in fp32, which halves the time: of (trials, candidates) the rows of L⁻¹ K, where L
    is the Cholesky factor of the trials' covariance and K theirs with the candidates. A trial adds a row.
    """

    def __init__(self, process: GaussianProcess, candidates: Array) -> None:
        self._process = process
        self._exact = candidates / process.scales
        self._scaled = self._exact.astype(np.float32)
        self._norms = np.einsum("ij,ij->i", self._scaled, self._scaled)
        self._rows = np.empty((16, len(candidates)), np.float32)
        self._lower = np.zeros((16, 16))
        self._variance = np.full(len(candidates), process.variance, np.float32)
        self.trials: list[int] = []
        """Candidates added, by index; one may be there twice."""

    def correlation(self, rows: Sequence[int]) -> Array:
        """Prior correlation of candidates with all: array of (rows, candidates), 0 to 1."""
        squares = self._scaled[rows] @ self._scaled.T
        squares *= -2
        squares += self._norms[rows, None]
        squares += self._norms
        return _matern(np.maximum(squares, 0, out=squares))

    def add(self, rows: Sequence[int]) -> None:
        """Takes in trials of these candidates. Their values are told to `mean`."""
        if not len(rows):
            return
        start, count = len(self.trials), len(rows)
        self._reserve(start + count)
        variance = self._process.variance
        # Among trials in fp64: the factorisation would not stand the errors of fp32.
        trials = self._exact[[*self.trials, *rows]]
        own = variance * _matern(((trials[start:, None] - trials[None]) ** 2).sum(axis=2))
        before = solve_triangular(self._lower[:start, :start], own[:, :start].T, lower=True, check_finite=False)
        covariance = own[:, start:] - before.T @ before
        covariance.flat[:: count + 1] += self._process.noise + _JITTER
        lower = cholesky(covariance, lower=True, check_finite=False)
        known = self.correlation(rows)
        known *= np.float32(variance)
        known -= before.T.astype(np.float32) @ self._rows[:start]
        new = solve_triangular(lower.astype(np.float32), known, lower=True, check_finite=False)
        self._lower[start : start + count, :start] = before.T
        self._lower[start : start + count, start : start + count] = lower
        self._rows[start : start + count] = new
        self._variance -= np.einsum("ij,ij->j", new, new)
        self.trials += [int(row) for row in rows]

    def drop(self, count: int) -> None:
        """Takes the last `count` trials back."""
        if count:
            kept = len(self.trials) - count
            gone = self._rows[kept : len(self.trials)]
            self._variance += np.einsum("ij,ij->j", gone, gone)
            del self.trials[kept:]

    def mean(self, values: Array) -> Array:
        """Expected value of each candidate, for values of the first so many trials."""
        count = len(values)
        weights = solve_triangular(self._lower[:count, :count], values, lower=True, check_finite=False)
        return np.asarray(weights.astype(np.float32) @ self._rows[:count])

    def deviation(self) -> Array:
        """Standard deviation of each candidate's value, given all trials."""
        return np.sqrt(np.maximum(self._variance, 1e-7 * self._process.variance))

    def _reserve(self, count: int) -> None:
        if count > len(self._rows):
            size = max(count, 2 * len(self._rows))
            rows, lower = np.empty((size, self._rows.shape[1]), np.float32), np.zeros((size, size))
            held = len(self.trials)
            rows[:held] = self._rows[:held]
            lower[:held, :held] = self._lower[:held, :held]
            self._rows, self._lower = rows, lower

from __future__ import annotations

import numpy as np
import pytest

from tilewright.tuner.surrogate import GaussianProcess, Posterior, encode

pytestmark = pytest.mark.smoke


def columns(axes: dict, *configs: tuple) -> list[list[float]]:
    return encode(axes, [dict(zip(axes, config, strict=True)) for config in configs]).T.round(3).tolist()


def test_positive_numbers_are_their_logarithm() -> None:
    assert columns({"m": (16, 32, 64)}, (16,), (32,), (64,)) == [[0.0, 0.5, 1.0]]


def test_values_that_are_no_powers_of_two_give_the_power_in_them_too() -> None:
    logarithm, power = columns({"m": (32, 48, 64)}, (32,), (48,), (64,))
    assert logarithm[1] == pytest.approx(0.585, abs=1e-3)
    assert power == [0.5, 0.0, 1.0]  # 2⁵, 2⁴, 2⁶


def test_two_axes_of_positive_numbers_give_their_product() -> None:
    product = columns({"m": (1, 2, 4), "n": (1, 2, 4)}, (1, 1), (4, 1), (2, 2), (4, 4))[-1]
    assert product == [0.0, 0.5, 0.5, 1.0]


def test_other_numbers_are_taken_as_they_are_and_other_values_one_by_one() -> None:
    assert columns({"method": (0, 1, 3)}, (0,), (1,), (3,)) == [[0.0, 0.333, 1.0]]
    assert columns({"flag": (False, True)}, (False,), (True,)) == [[0.0, 1.0]]
    assert columns({"layout": ("row", "col")}, ("row",), ("col",)) == [[1.0, 0.0]]
    assert columns({"order": ("a", "b", "c")}, ("a",), ("b",), ("c",)) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_an_axis_with_one_value_tells_nothing() -> None:
    assert columns({"m": (16, 32), "n": (8,)}, (16, 8), (32, 8)) == [[0.0, 1.0]]
    assert columns({"n": (8,)}, (8,)) == [[0.0]]


def drawn(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    features = draw.random((count, 3))
    return features, np.sin(6 * features[:, 0]) + 0.2 * features[:, 1]


def test_the_gradient_of_the_loss_is_that_of_its_value() -> None:
    features, values = drawn(12)
    process = GaussianProcess(3)
    squares = ((features[:, None] - features[None]) ** 2).reshape(144, -1).T.copy()
    at = process._log + np.array([0.3, -0.2, 0.1, 0.2, -0.5])
    gradient = process._loss(at, squares, values)[1]
    for place in range(5):
        step = np.zeros(5)
        step[place] = 1e-5
        change = process._loss(at + step, squares, values)[0] - process._loss(at - step, squares, values)[0]
        assert gradient[place] == pytest.approx(change / 2e-5, rel=1e-4, abs=1e-6)


def test_a_feature_that_does_not_matter_gets_the_longest_scale() -> None:
    features, values = drawn(40)
    process = GaussianProcess(3)
    process.fit(features, values)
    assert process.scales.argmax() == 2
    assert process.scales.argmin() == 0


def test_rows_added_one_by_one_give_what_the_textbook_formula_gives() -> None:
    features, values = drawn(30)
    process = GaussianProcess(3)
    process.fit(features[:20], values[:20])
    posterior = Posterior(process, features)
    posterior.add([0, 1, 2])
    for row in range(3, 20):
        posterior.add([row])
    every = Posterior(process, features)
    every.add(range(20))
    away = np.sqrt((((features[:, None] - features[None]) / process.scales) ** 2).sum(axis=2) * 5)
    covariance = process.variance * (1 + away + away**2 / 3) * np.exp(-away)
    known = covariance[:20, :20] + (process.noise + 1e-6) * np.eye(20)
    mean = covariance[:, :20] @ np.linalg.solve(known, values[:20])
    variance = process.variance - np.einsum("ij,ij->i", covariance[:, :20] @ np.linalg.inv(known), covariance[:, :20])
    for one in (posterior, every):
        np.testing.assert_allclose(one.mean(values[:20]), mean, atol=2e-3)
        np.testing.assert_allclose(one.deviation() ** 2, variance, atol=2e-3)


def test_trials_can_be_taken_back() -> None:
    features, values = drawn(30)
    process = GaussianProcess(3)
    posterior = Posterior(process, features)
    posterior.add(range(10))
    before = posterior.deviation()
    posterior.add([20, 21])
    assert posterior.deviation()[20] < 0.5 * before[20]
    posterior.drop(2)
    np.testing.assert_allclose(posterior.deviation(), before, atol=1e-3)
    assert posterior.trials == list(range(10))
    assert posterior.mean(values[:10]).shape == (30,)

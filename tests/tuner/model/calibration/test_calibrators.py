"""Ranges from distributions: MSE against every range in reach, and the corners of the others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from tilewright.tuner.model.calibration.calibrators import (
    EMPTY_SCALE,
    TARGETS,
    Method,
    Observer,
    Settings,
    find_scale,
)
from tilewright.tuner.model.calibration.histogram import Extent
from tilewright.tuning_db.errors import UsageError

Array = np.ndarray

COUNT = 20_000


def numbers(kind: str) -> Array:
    random = np.random.default_rng(3)
    match kind:
        case "normal":
            drawn = random.standard_normal(COUNT)
        case "relu":
            drawn = np.maximum(random.standard_normal(COUNT), 0)
        case "laplace":
            drawn = random.laplace(size=COUNT)
        case "student":
            drawn = random.standard_t(2, COUNT)
        case "lognormal":
            drawn = np.exp(1.5 * random.standard_normal(COUNT))
        case "uniform":
            drawn = random.uniform(-1, 1, COUNT)
        case "outlier":
            drawn = np.append(random.standard_normal(COUNT), 1000)
        case _:  # tiny
            drawn = 1e-30 * random.standard_normal(COUNT)
    return drawn.astype(np.float32)


def observed(*arrays: Array, settings: Settings | None = None) -> Observer:
    extent = Extent()
    for array in arrays:
        assert extent.add(array)
    observer = Observer(extent, list(Method), settings or Settings())
    for array in arrays:
        observer.add(array)
    return observer


def squared_error(array: Array, covered: float, target: str) -> float:
    """The mean squared error of quantising, in fp64."""
    scale = covered / TARGETS[target]
    wide = array.astype(np.float64) / scale
    if target in ("int8", "uint8"):  # the latter shifted, of magnitudes
        rounded = np.clip(np.rint(wide), -TARGETS[target], TARGETS[target])
    else:
        rounded = np.clip(wide, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return float(np.mean((wide - rounded) ** 2)) * scale**2


KINDS = ["normal", "relu", "laplace", "student", "lognormal", "uniform", "outlier", "tiny"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_as_good_as_the_best_of_all_ranges(kind: str, target: str) -> None:
    array = numbers(kind)
    observer = observed(array)
    covered = observer.range(Method.MSE, target)
    limit = observer.extent.limit
    assert 0 < covered <= limit
    # Ranges half a percent apart, down to a 500th of the largest number.
    best = min(squared_error(array, limit * 1.005**-step, target) for step in range(1250))
    assert squared_error(array, covered, target) <= 1.005 * best


def test_mse_cuts_off_where_that_pays() -> None:
    gains = {}
    for kind in ("laplace", "uniform"):
        array = numbers(kind)
        observer = observed(array)
        limit, covered = observer.extent.limit, observer.range(Method.MSE, "int8")
        gains[kind] = squared_error(array, limit, "int8") / squared_error(array, covered, "int8")
    assert gains["laplace"] > 1.05
    assert gains["uniform"] < 1.02


@pytest.mark.parametrize("target", TARGETS)
def test_numbers_that_are_exactly_zero_have_no_error(target: str) -> None:
    """They don't move the range: they have none whatever it is."""
    array = numbers("lognormal")
    padded = np.append(array, np.zeros(100 * COUNT, np.float32))
    alone, among_zeros = (observed(each).range(Method.MSE, target) for each in (array, padded))
    assert squared_error(array, among_zeros, target) == pytest.approx(squared_error(array, alone, target), rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_is_within_a_bin_of_the_exact_one(kind: str) -> None:
    array = numbers(kind)
    for percentile in (50, 99, 99.9):
        observer = observed(array, settings=Settings(percentile=percentile))
        exact = np.quantile(np.abs(array), percentile / 100, method="inverted_cdf")
        assert abs(observer.range(Method.PERCENTILE, "int8") - exact) <= 1.001 * observer.extent.limit / 2048


def test_percentile_keeps_something_of_a_value_that_is_zero_almost_everywhere() -> None:
    array = np.zeros(10**6, np.float32)
    array[5] = 7
    assert observed(array).range(Method.PERCENTILE, "int8") == pytest.approx(7 / 2048)


def test_entropy_keeps_what_no_candidate_has_inside() -> None:
    """Of 700 bins in 255 groups 190 are left over, and here all numbers are in those."""
    array = np.linspace(4.9, 5.1, 1000, dtype=np.float32)
    settings = Settings(entropy_bins=700, entropy_levels=255)
    assert observed(array, settings=settings).range(Method.ENTROPY, "int8") == pytest.approx(5.1)


@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("target", TARGETS)
def test_scales_of_values_with_nothing_to_cut_between(method: Method, target: str) -> None:
    def scale(*given: float) -> float:
        return find_scale(observed(np.array(given, np.float32)).range(method, target), target)

    largest = TARGETS[target]
    assert scale(0, 0, -0.0) == EMPTY_SCALE
    assert scale() == EMPTY_SCALE
    assert scale(1e-40, 0) == EMPTY_SCALE
    assert scale(-3.5) == pytest.approx(3.5 / largest)
    assert scale(1e-20, 1e-20) == pytest.approx(1e-20 / largest)
    assert scale(2, -2, 2) == pytest.approx(2 / largest)
    assert scale(5, np.nextafter(np.float32(5), np.float32(6))) == pytest.approx(5 / largest, rel=1e-6)
    assert scale(2.0**-113, 2.0**-118, 0) == pytest.approx(2.0**-113 / largest)
    assert scale(3e38, -1e38) <= 3e38 / largest * (1 + 1e-6)


def test_settings_out_of_bounds() -> None:
    with pytest.raises(UsageError, match="percentile=0 must be above 0 and at most 100"):
        Settings(percentile=0)
    with pytest.raises(UsageError, match="entropy_bins=1 must be from 2 to 8192"):
        Settings(entropy_bins=1)
    with pytest.raises(UsageError, match=r"entropy_levels=64 must be from 2 to .*32"):
        Settings(entropy_bins=32, entropy_levels=64)


def test_unknown_targets() -> None:
    with pytest.raises(UsageError, match="target='int4' must be one of int8, uint8, fp8e4m3"):
        observed(numbers("normal")).range(Method.MINMAX, "int4")
    with pytest.raises(UsageError, match="target='int4'"):
        find_scale(1.0, "int4")

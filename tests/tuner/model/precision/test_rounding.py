"""Weights rounded by what they are multiplied by give smaller errors than weights rounded to nearest."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from tests.tuner.model.fused_nets import convolutions, decibels, every_layer, fused, node, output, perceptron, single
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs
from tilewright.tuner.model.precision import rounding
from tilewright.tuner.model.precision.correction import measure_shifts
from tilewright.tuner.model.precision.grouped import matrix_of, quantise_matrix
from tilewright.tuner.model.precision.quantise import (
    LayerPrecision,
    Weights,
    apply_precision,
    channel_scales,
    dequantised,
    quantise_weights,
    to_grid,
)
from tilewright.tuner.model.precision.rounding import (
    FLOOR,
    Moments,
    pieces_of,
    round_groups,
    round_layer,
    round_weights,
    shrink,
)

INT8 = partial(to_grid, kind="int8")


def correlated(seed: int, count: int, depth: int) -> np.ndarray:
    """Rows that are mostly the same few patterns."""
    return normal(seed, count, 6) @ normal(seed + 1, 6, depth) + np.float32(0.1) * normal(seed + 2, count, depth)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("groups", [1, 3])
def test_errors_that_inputs_see_are_smaller(kind: str, groups: int) -> None:
    depth = 40
    w = normal(0, groups, 24, depth)
    train, other = (
        np.stack([correlated(10 * group + start, 500, depth) for group in range(groups)]) for start in (1, 5)
    )
    other = np.stack([normal(9 + group, 500, 6) @ normal(10 * group + 2, 6, depth) for group in range(groups)])
    centred = train - train.mean(axis=1, keepdims=True)
    covariance = centred.swapaxes(1, 2).astype(np.float64) @ centred / train.shape[1]
    scales = channel_scales(w.reshape(-1, depth), 0, kind).reshape(groups, -1)
    found = round_layer(w, scales, covariance, partial(to_grid, kind=kind), train.shape[1])
    assert found.shape == w.shape
    nearest = quantise_weights(w.reshape(-1, depth), 0, kind).values.reshape(w.shape)
    exact = other @ w.swapaxes(1, 2)
    errors = [
        float(np.square(other @ (each.astype(np.float32) * scales[..., None]).swapaxes(1, 2) - exact).sum())
        for each in (found, nearest)
    ]
    assert errors[0] < 0.5 * errors[1]
    if kind == "int8":
        assert found.dtype == np.int8
        assert found.min() >= -127


def test_pieces_have_a_covariance_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "LARGEST_DEPTH", 16)
    assert pieces_of(40) == (slice(0, 13), slice(13, 26), slice(26, 40))
    b = normal(0, 40, 24)
    model = single("gemm", {"a": normal(1, 5, 40), "b": b}, ("a",))
    feeds = [{"a": correlated(index, 5, 40)} for index in range(40)]
    plan = {"layer": LayerPrecision("int8", {"a": 0.1})}
    found = round_weights(model, plan, feeds)["layer"]
    assert found.values.shape == b.shape
    assert np.abs(dequantised(found, 1) - b).max() < 20 * found.scales.max()
    monkeypatch.setattr(rounding, "LARGEST_DEPTH", 4096)
    assert not np.array_equal(round_weights(model, plan, feeds)["layer"].values, found.values)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w, rows = normal(0, 1, 8, 40), correlated(1, 500, 40)
    covariance = np.cov(rows.T)[None]
    scales = channel_scales(w[0], 0, "int8")[None]
    whole = round_layer(w, scales, covariance, INT8, 500)
    monkeypatch.setattr(rounding, "BLOCK", 7)
    assert (round_layer(w, scales, covariance, INT8, 500) == whole).mean() > 0.99  # sums in another order


def test_inputs_that_never_vary_leave_weights_at_the_nearest() -> None:
    w = normal(0, 1, 8, 10)
    scales = channel_scales(w[0], 0, "int8")[None]
    found = round_layer(w, scales, np.zeros((1, 10, 10)), INT8, 50)
    np.testing.assert_array_equal(found[0], quantise_weights(w[0], 0, "int8").values)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("varying", [0, 1e-6, 1e-3])
def test_inputs_that_hardly_vary(varying: float, groups: int) -> None:
    """Their covariance is next to nothing beside their squares, which fp32 rounds."""
    depth = 20
    constant = 100 * normal(0, groups, 1, depth)
    moments = Moments(pieces_of(depth))
    rows = [constant + np.float32(varying) * normal(index, groups, 500, depth) for index in range(8)]
    for each in rows:
        moments.add(each)
    found = moments.covariance(0)
    assert np.linalg.eigvalsh(found).min() > 0
    floor = FLOOR * np.square(constant.astype(np.float64)).mean(axis=(1, 2))
    exact = np.stack([np.cov(np.concatenate([each[group] for each in rows]).T, ddof=0) for group in range(groups)])
    np.testing.assert_allclose(found - floor[:, None, None] * np.eye(depth), exact, atol=1e-4 * floor.max())
    w = normal(1, groups, 8, depth)
    scales = channel_scales(w.reshape(-1, depth), 0, "int8").reshape(groups, -1)
    nearest = quantise_weights(w.reshape(-1, depth), 0, "int8").values.reshape(w.shape)
    assert (round_layer(w, scales, found, INT8, moments.count) == nearest).mean() > 0.99


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_no_covariance_leaves_weights_at_the_nearest(groups: int) -> None:
    w = normal(0, groups, 8, 4)
    scales = channel_scales(w.reshape(-1, 4), 0, "int8").reshape(groups, -1)
    indefinite = np.tile(np.diag([1, 1, 1, -1e9]) + 1e6, (groups, 1, 1))
    found = round_layer(w, scales, indefinite, INT8, 50)
    np.testing.assert_array_equal(found.reshape(-1, 4), quantise_weights(w.reshape(-1, 4), 0, "int8").values)


@pytest.mark.parametrize("factor", [1e30, 1e-36, 0])
def test_any_size_of_inputs(factor: float) -> None:
    feeds = [{"a": np.float32(factor) * correlated(index, 50, 24)} for index in range(4)]
    model = single("gemm", {"a": feeds[0]["a"], "b": normal(1, 24, 8)}, ("a",))
    found = round_weights(model, {"layer": LayerPrecision("int8", {"a": 0.1 * (factor or 1)})}, feeds)["layer"]
    alike = round_weights(
        single("gemm", {"a": feeds[0]["a"], "b": normal(1, 24, 8)}, ("a",)),
        {"layer": LayerPrecision("int8", {"a": 0.1})},
        [{"a": correlated(index, 50, 24) * np.float32(factor > 0)} for index in range(4)],
    )["layer"]
    assert (found.values == alike.values).mean() > 0.95


def test_layers_come_nearer() -> None:
    # Smooth images of whole numbers: what is off is off by the weights alone.
    feeds = [
        {"x": np.clip(np.rint(4 * np.cumsum(normal(index, 2, 8, 12, 12), axis=3)), -127, 127)} for index in range(40)
    ]
    model = single("conv2d", {"x": feeds[0]["x"], "w": normal(1, 16, 4, 3, 3)}, ("x",), groups=2, pad_top=1)
    plan = {"layer": LayerPrecision("int8", {"x": 1.0})}

    def quality(given: dict[str, Weights]) -> float:
        shifts = measure_shifts(model, plan, feeds[:24], weights=given)
        mixed = apply_precision(model, plan, base="fp32", weights=given, shifts=shifts)
        return decibels(*(np.concatenate([output(each, feed) for feed in feeds[24:]]) for each in (model, mixed)))

    assert quality(round_weights(model, plan, feeds[:24])) > quality({}) + 3


def test_layers_are_done_in_groups_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions()
    feeds = [{"x": normal(index, 2, 3, 16, 16)} for index in range(4)]
    plan = every_layer(model, feeds)
    done: list[tuple[int, int]] = []
    weights = round_weights(model, plan, feeds, progress=lambda *counts: done.append(counts))
    assert list(weights) == list(plan)
    assert done == [(count, len(plan)) for count in range(1, len(plan) + 1)]
    monkeypatch.setattr(rounding, "GROUP_BYTES", 1)  # one layer at a time
    alone = round_weights(model, plan, feeds)
    assert alone.keys() == weights.keys()


def test_results_follow_from_the_seed() -> None:
    model = perceptron(64)
    feeds = [{"x": normal(index, 8, 64)} for index in range(4)]
    plan = every_layer(model, feeds)
    first, second = (round_weights(model, plan, feeds, seed=3) for _ in range(2))
    for name in plan:
        np.testing.assert_array_equal(first[name].values, second[name].values)


def test_only_quantised_matrices_are_rounded() -> None:
    model = single("gemm", {"a": normal(0, 3, 5, 7), "b": normal(1, 3, 7, 4)}, ("a",))
    feeds = [{"a": normal(0, 3, 5, 7)}]
    assert round_weights(model, {"layer": LayerPrecision("int8", {"a": 0.1})}, feeds) == {}
    other = single("gemm", {"a": normal(0, 5, 7), "b": normal(1, 7, 4)}, ("a",))
    assert round_weights(other, {"layer": LayerPrecision("fp16")}, [{"a": normal(0, 5, 7)}]) == {}


@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
@pytest.mark.parametrize("pieces", [4096, 150])
def test_weights_alone_are_rounded_by_their_inputs_too(kind: str, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "LARGEST_DEPTH", pieces)  # groups of 128 go on over the edge of a piece
    b, shift = normal(0, 300, 24), 3 * normal(5, 300)
    feeds = [{"a": correlated(index, 50, 300) + shift} for index in range(10)]
    model = single("gemm", {"a": feeds[0]["a"], "b": b}, ("a",))
    plan = {"layer": LayerPrecision(kind)}
    weights = round_groups(model, plan, feeds)
    assert weights["layer"].values.shape == (300, 24)
    assert weights["layer"].bits == {"w8a16": 8, "w4a16": 4}[kind]
    other = normal(0, 50, 6) @ normal(1, 6, 300) + shift
    errors = [
        np.square(output(apply_precision(model, plan, base="fp16", grouped=given), {"a": other}) - other @ b).sum()
        for given in (weights, {})
    ]
    assert errors[0] < 0.3 * errors[1]


@pytest.mark.parametrize("spoilt", [[0], [2], [0, 1, 2, 3]])
@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_inputs_that_are_not_finite_say_nothing(kind: str, spoilt: list[int]) -> None:
    model = single("gemm", {"a": normal(0, 50, 160), "b": normal(1, 160, 8)}, ("a",))
    feeds = [{"a": correlated(index, 50, 160)} for index in range(4)]
    feeds[0]["a"][:] = 0  # by whose size rows are not to be measured either
    for index in spoilt:
        feeds[index]["a"][7, 5] = -np.inf
        if len(spoilt) == 4:
            feeds[index]["a"][:, 3] = np.nan
    plan = {"layer": LayerPrecision(kind)}
    found = round_groups(model, plan, feeds)["layer"]
    nearest = quantise_matrix(matrix_of(next(iter(fused_nodes(model)))), found.bits)
    if len(spoilt) == 4:
        np.testing.assert_array_equal(found.values, nearest.values)
    else:
        assert 0.3 < (found.values == nearest.values).mean() < 1
        assert np.abs(found.values.astype(int) - nearest.values).max() < 20


def test_inputs_of_any_size_are_seen() -> None:
    """The first ones may be next to nothing beside those that come after."""
    model = single("gemm", {"a": normal(0, 50, 160), "b": normal(1, 160, 8)}, ("a",))
    feeds = [{"a": correlated(index, 50, 160)} for index in range(4)]
    plan = {"layer": LayerPrecision("w4a16")}
    found = round_groups(model, plan, feeds)["layer"]
    for first in (0.0, 1e-18):
        small = round_groups(model, plan, [{"a": np.float32(first) * feeds[0]["a"]}, *feeds])["layer"]
        assert (small.values == found.values).mean() > 0.8
    moments, alike = Moments(pieces_of(24)), Moments(pieces_of(24))
    rows = [correlated(index, 50, 24)[None] for index in range(2)]
    moments.add(rows[0])
    moments.rescale(np.float32(0.25))
    moments.add(rows[1] / 4)
    for each in rows:
        alike.add(each / 4)
    np.testing.assert_allclose(moments.second(0), alike.second(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("count", [4, 40, 128, 2000])
def test_independent_inputs_do_no_harm(count: int, sparse: bool) -> None:
    """What few rows say of their correlation is chance, and so is which places they leave empty."""
    b = normal(0, 256, 32)
    model = single("gemm", {"a": normal(0, count, 256), "b": b}, ("a",))
    plan = {"layer": LayerPrecision("w4a16")}
    kept = [np.random.default_rng(seed).random((count, 256)) < (0.05 if sparse else 1) for seed in (1, 9)]
    found = round_groups(model, plan, [{"a": normal(1, count, 256) * kept[0]}])
    other = normal(9, count, 256) * kept[1]
    errors = [
        np.square(output(apply_precision(model, plan, base="fp16", grouped=given), {"a": other}) - other @ b).sum()
        for given in (found, {})
    ]
    assert errors[0] < (1.05 if count == 2000 else 1.25) * errors[1]


def shrunk(moments: np.ndarray, count: int) -> np.ndarray:
    found = moments.copy()
    shrink(found, count)
    return found


def test_the_more_rows_the_less_is_shrunk() -> None:
    parts = []
    for count in (20, 200, 2000):
        rows = correlated(3, count, 24)
        second = (rows.T @ rows / count).astype(np.float64)[None]
        less = shrunk(second, count)
        own = np.diagonal(second[0])
        unseen = (8 / (count / 2 + 8)) ** 2
        np.testing.assert_allclose(np.diagonal(less[0]), (1 - unseen) * own + unseen * own.mean())
        beside = ~np.eye(24, dtype=bool)
        ratios = less[0][beside] / second[0][beside]
        np.testing.assert_allclose(ratios, ratios[0])
        parts.append(ratios[0])
    assert 0 < parts[0] < parts[1] < parts[2] < 1
    assert parts[2] > 0.98
    np.testing.assert_array_equal(shrunk(np.full((2, 1, 1), 3.0), 5), np.full((2, 1, 1), 3.0))
    np.testing.assert_array_equal(shrunk(np.eye(4)[None], 5), np.eye(4)[None])


def test_products_of_one_matrix_have_one_set_of_integers() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="one"),
        node("Relu", ["m"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["y"], name="two"),
    ]
    model = fused(nodes, {"x": (50, 160)}, ["y"], {"w": normal(0, 160, 160) / 12})
    plan = dict.fromkeys(("one", "two"), LayerPrecision("w4a16"))
    found = round_groups(model, plan, [{"x": correlated(index, 50, 160)} for index in range(4)])
    assert found["one"] is found["two"]
    mixed = apply_precision(model, plan, base="fp16", grouped=found)
    assert len({id(plugin_inputs(each)["b"]) for each in fused_nodes(mixed)}) == 1


def test_layers_of_no_such_plan_are_left_out() -> None:
    model = perceptron()
    assert round_groups(model, {"middle": LayerPrecision("fp32")}, [{"x": normal(0, 8, 32)}]) == {}

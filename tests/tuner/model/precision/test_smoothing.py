"""Smoothed models compute what they did, and lose less when they are quantised."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import (
    FEEDS,
    OUTLIERS,
    block,
    convolutions,
    decibels,
    fused,
    node,
    operators,
    output,
    plan_of,
)
from tests.tuner.model.graphs import normal, relative_error
from tilewright.tuner.model.graph import constant, fused_nodes, plugin_inputs
from tilewright.tuner.model.precision import smoothing
from tilewright.tuner.model.precision.quantise import apply_precision
from tilewright.tuner.model.precision.smoothing import factors_of, smooth


def quality(model: ir.Model, exact: ir.Model) -> float:
    """dB of int8 on inputs that nothing was measured on."""
    mixed = apply_precision(model, plan_of(model, FEEDS[:16]), base="fp32")
    return decibels(*(np.concatenate([output(each, feed) for feed in FEEDS[16:]]) for each in (exact, mixed)))


def test_fp32_stays_and_int8_gains() -> None:
    model, before = block(), block()
    report = smooth(model, FEEDS[:16])
    assert relative_error(output(model, FEEDS[19]), output(before, FEEDS[19])) < 1e-5
    of_norm = next(each for each in report.smoothed if each.value == "h")
    assert set(of_norm.layers) == {"query", "key"}
    assert of_norm.into == "norm"
    assert of_norm.gain_db > 6
    assert quality(model, before) > quality(before, before) + 3


def test_layers_that_share_an_input_share_the_factors() -> None:
    model, before = block(), block()
    smooth(model, FEEDS[:16])
    ratios = []
    for name in ("query", "key"):
        new, old = (
            constant(plugin_inputs(next(each for each in fused_nodes(given) if each.name == name))["b"])
            for given in (model, before)
        )
        assert new is not None
        assert old is not None
        ratios.append(new / old)
    np.testing.assert_allclose(ratios[0], ratios[1], rtol=1e-4)
    np.testing.assert_allclose(ratios[0], ratios[0][:, :1] * np.ones((1, 32)), rtol=1e-4)
    assert ratios[0].max() / ratios[0].min() > 5


def test_a_layer_behind_relu_takes_the_factors_of_the_next() -> None:
    model = block()
    constants = model.graph.initializers
    # Columns of the layer before that are much larger than others.
    large = next(each for each in fused_nodes(model) if each.name == "up")
    for name in ("b", "bias"):
        value = plugin_inputs(large)[name]
        value.const_value = ir.tensor(constant(value) * OUTLIERS, name=value.name)  # type: ignore[operator]
    assert constants
    before = model.clone()
    report = smooth(model, FEEDS[:16])
    assert {each.value: each.into for each in report.smoothed}["a"] == "up"
    assert relative_error(output(model, FEEDS[19]), output(before, FEEDS[19])) < 1e-5


def test_what_a_residual_reads_is_divided_by_a_mul() -> None:
    model, before = block(residual=True), block(residual=True)
    report = smooth(model, FEEDS[:16])
    of_norm = next(each for each in report.smoothed if each.value == "h")
    assert of_norm.into == "h_smooth_Mul"
    assert operators(model).count("Mul") == operators(before).count("Mul") + 1
    assert relative_error(output(model, FEEDS[19]), output(before, FEEDS[19])) < 1e-5
    assert quality(model, before) > quality(before, before) + 3


def test_what_a_layer_multiplies_and_adds_is_divided_in_the_product_alone() -> None:
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"], name="first"),
        node("Relu", ["m0"], ["h"], name="act"),
        node("MatMul", ["h", "w1"], ["m1"], name="both"),
        node("Add", ["m1", "h"], ["s"], name="residual"),
        node("MatMul", ["s", "w2"], ["y"], name="last"),
    ]
    constants = {f"w{index}": normal(index, 32, 32) for index in range(3)}
    constants["w0"] *= OUTLIERS
    model, before = (fused(nodes, {"x": (8, 32)}, ["y"], constants) for _ in range(2))
    layer = next(each for each in fused_nodes(before) if each.name == "both")
    assert plugin_inputs(layer)["residual"] is plugin_inputs(layer)["a"]
    feeds = [{"x": normal(10 + index, 8, 32)} for index in range(8)]
    report = smooth(model, feeds)
    assert {each.value: each.into for each in report.smoothed} == {"h": "h_smooth_Mul"}
    assert relative_error(output(model, feeds[0]), output(before, feeds[0])) < 1e-5


def test_a_small_gain_is_not_worth_a_mul(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "MUL_GAIN_DB", 100.0)
    model = block(residual=True)
    report = smooth(model, FEEDS[:16])
    assert "it is read by 'down', and a Mul would gain" in report.left["h"]


def test_activations_that_are_even_stay() -> None:
    model = block(activation="Gelu")
    report = smooth(model, FEEDS[:16])
    assert "less than" in report.left["a"]


def test_convolutions_are_equalised_through_pooling_and_concatenation() -> None:
    model = convolutions()
    stem = next(each for each in fused_nodes(model) if each.name == "stem")
    for name, shape in (("w", (16, 1, 1, 1)), ("bias", (16,))):
        value = plugin_inputs(stem)[name]
        value.const_value = ir.tensor(constant(value) * OUTLIERS[:16].reshape(shape), name=value.name)  # type: ignore[operator]
    before = model.clone()
    feeds = [{"x": normal(index, 2, 3, 16, 16)} for index in range(8)]
    report = smooth(model, feeds[:4])
    into = {each.value: each.into for each in report.smoothed}
    assert into["p0"] == "stem"
    assert relative_error(output(model, feeds[5]), output(before, feeds[5])) < 1e-5
    plans = [plan_of(each, feeds[:4]) for each in (model, before)]
    got, plain = (
        np.concatenate([output(apply_precision(each, plan, base="fp32"), feed) for feed in feeds[4:]])
        for each, plan in zip((model, before), plans, strict=True)
    )
    exact = np.concatenate([output(before, feed) for feed in feeds[4:]])
    assert decibels(exact, got) > decibels(exact, plain) + 1


def test_factors_follow_the_formula() -> None:
    found = factors_of(np.array([4.0, 1.0, 0.0]), np.array([1.0, 4.0, 5.0]), 0.5)
    np.testing.assert_allclose(found, [2.0, 0.5, 1.0])
    np.testing.assert_allclose(factors_of(np.array([9.0, 1.0]), np.array([1.0, 1.0]), 1.0), [3.0, 1 / 3])


def test_fp8_is_smoothed_for_its_own_numbers() -> None:
    model, before = block(), block()
    smooth(model, FEEDS[:16], kind="fp8")
    assert relative_error(output(model, FEEDS[19]), output(before, FEEDS[19])) < 1e-5

"""The mean that quantisation adds to a layer's result is taken off again."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tuner.model.fused_nets import convolutions, decibels, every_layer, output, perceptron, plan_of, single
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs
from tilewright.tuner.model.precision.correction import measure_shifts
from tilewright.tuner.model.precision.quantise import LayerPrecision, apply_precision, quantise_weights


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gemm_has_the_mean_it_had(kind: str, bias: bool) -> None:
    arrays = {"a": 2 + normal(0, 64, 48), "b": normal(1, 48, 24), "a_scale": np.full(1, 0.5, np.float32)}
    arrays |= {"bias": normal(2, 24)} if bias else {}
    model = single("gemm", arrays, ("a",))
    feeds = [{"a": arrays["a"][rows]} for rows in (slice(0, 32), slice(32, 64))]
    model = single("gemm", {**arrays, "a": arrays["a"][:32]}, ("a",))
    # Clipping: the mean shifts by more than rounding alone would.
    plan = {"layer": LayerPrecision(kind, {"a": 3.0 / (127 if kind == "int8" else 448)})}
    shifts = measure_shifts(model, plan, feeds)
    plain, corrected = (
        np.concatenate([output(apply_precision(model, plan, base="fp32", shifts=each), feed) for feed in feeds])
        for each in ({}, shifts)
    )
    exact = np.concatenate([output(model, feed) for feed in feeds])
    before, after = (np.abs((got - exact).mean(axis=0)) for got in (plain, corrected))
    assert before.max() > 0.1
    assert after.max() < 1e-4
    made = fused_nodes(apply_precision(model, plan, base="fp32", shifts=shifts))[0]
    assert "bias" in plugin_inputs(made)


def test_a_padded_convolution_has_the_mean_it_had() -> None:
    x, w = 1 + normal(0, 2, 6, 7, 7), normal(1, 4, 3, 3, 3)
    model = single("conv2d", {"x": x, "w": w}, ("x",), groups=2, pad_top=1, pad_left=2, stride_h=2)
    plan = {"layer": LayerPrecision("int8", {"x": 2.0 / 127})}
    shifts = measure_shifts(model, plan, [{"x": x}])
    exact, got = output(model, {"x": x}), output(apply_precision(model, plan, base="fp32", shifts=shifts), {"x": x})
    assert np.abs((got - exact).mean(axis=(0, 2, 3))).max() < 1e-4
    assert np.abs(shifts["layer"]).max() > 0.05


def test_given_weights_are_what_the_shift_is_of() -> None:
    a, b = 1 + normal(0, 64, 48), normal(1, 48, 24)
    model = single("gemm", {"a": a, "b": b}, ("a",))
    plan = {"layer": LayerPrecision("int8", {"a": float(np.abs(a).max()) / 127})}
    weights = {"layer": quantise_weights(b + np.float32(0.5), 1, "int8")}
    shifts = measure_shifts(model, plan, [{"a": a}], weights=weights)
    np.testing.assert_allclose(shifts["layer"], 0.5 * a.mean(axis=0).sum(), rtol=0.2)


def test_results_on_other_inputs_are_no_worse_on_average() -> None:
    gains = []
    for seed in range(6):
        model = perceptron(48, seed=10 * seed)
        feeds = [{"x": normal(100 * seed + index, 8, 48)} for index in range(24)]
        # Scales that clip, as calibrators choose them.
        plan = {
            name: LayerPrecision("int8", {key: scale * 0.5 for key, scale in each.scales.items()})
            for name, each in plan_of(model, feeds[:12]).items()
        }
        exact = np.concatenate([output(model, feed) for feed in feeds[12:]])
        plain, corrected = (
            decibels(
                exact,
                np.concatenate(
                    [output(apply_precision(model, plan, base="fp32", shifts=each), feed) for feed in feeds[12:]]
                ),
            )
            for each in ({}, measure_shifts(model, plan, feeds[:12]))
        )
        gains.append(corrected - plain)
    assert np.mean(gains) > 0.1
    assert min(gains) > -0.2


def test_layers_that_can_have_no_bias_for_each_channel_are_left() -> None:
    arrays = {"a": normal(0, 8, 16), "b": normal(1, 16, 24), "bias": normal(2, 8, 1)}
    model = single("gemm", arrays, ("a",))
    assert measure_shifts(model, {"layer": LayerPrecision("int8", {"a": 0.1})}, [{"a": arrays["a"]}]) == {}
    many = single("gemm", {"a": normal(0, 3, 8, 16), "b": normal(1, 3, 16, 24)}, ("a",))
    plan = {"layer": LayerPrecision("int8", {"a": 0.1})}
    assert measure_shifts(many, plan, [{"a": normal(0, 3, 8, 16)}]) == {}
    assert measure_shifts(model, {"layer": LayerPrecision("fp16")}, [{"a": arrays["a"]}]) == {}


def test_shifts_of_layers_that_are_not_quantised_do_nothing() -> None:
    model = convolutions()
    feed = {"x": normal(9, 2, 3, 16, 16)}
    shifts = measure_shifts(model, every_layer(model, [feed]), [feed])
    assert shifts.keys() == {"stem", "left", "right", "grouped", "classifier"}
    np.testing.assert_array_equal(
        output(apply_precision(model, {}, base="fp32", shifts=shifts), feed), output(model, feed)
    )

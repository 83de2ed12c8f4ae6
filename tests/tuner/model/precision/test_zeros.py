"""Activations that are never negative: shifted integers compute what a zero point would."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import decibels, dtypes, fused, node, operators, output, perceptron, single
from tests.tuner.model.graphs import model_of, normal
from tilewright.tuner.model.calibration.calibrate import Method
from tilewright.tuner.model.graph import dtype_name, fused_nodes, plugin_inputs, plugin_settings
from tilewright.tuner.model.precision.correction import measure_shifts
from tilewright.tuner.model.precision.layer_data import rounded
from tilewright.tuner.model.precision.post_training import quantise
from tilewright.tuner.model.precision.quantise import LayerPrecision, apply_precision, quantise_weights
from tilewright.tuner.model.precision.rounding import round_weights
from tilewright.tuner.model.precision.rules import default_plan, values_to_calibrate, values_to_shift
from tilewright.tuner.model.precision.zeros import LOWEST
from tilewright.tuner.model.session import run
from tilewright.tuning_db.errors import UsageError


def shifted(kind: str, scale: float, name: str) -> dict[str, LayerPrecision]:
    return {kind: LayerPrecision("int8", {name: scale}, {name: LOWEST})}


@pytest.mark.parametrize("base", ["fp32", "fp16"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gemm_takes_values_that_are_never_negative(bias: bool, base: str) -> None:
    arrays = {"a": np.abs(normal(0, 8, 48)), "b": normal(1, 48, 24)} | ({"bias": normal(2, 24)} if bias else {})
    model = single("gemm", arrays, ("a",), activation="relu")
    scale = float(arrays["a"].max()) / 255
    mixed = apply_precision(model, shifted("layer", scale, "a"), base=base)
    columns = np.abs(arrays["b"]).max(axis=0) / np.float32(127)
    integers = np.clip(np.rint(arrays["a"] / np.float32(scale)), 0, 255)
    wanted = scale * columns * (integers @ np.rint(arrays["b"] / columns)) + arrays.get("bias", 0)
    got = output(mixed, {"a": arrays["a"]})
    np.testing.assert_allclose(got, np.maximum(wanted, 0), rtol=1e-4, atol=1e-3 if base == "fp32" else 2e-2)
    assert dtype_name(plugin_inputs(fused_nodes(mixed)[0])["bias"]) == "fp32"
    # TensorRT takes no zero point.
    assert all(len(each.inputs) == 2 for each in mixed.graph if each.op_type == "QuantizeLinear")
    assert operators(mixed).count("Sub") == 1
    assert {dtypes(mixed)[each.outputs[0].name or ""] for each in mixed.graph if each.op_type == "Sub"} == {"fp32"}


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_takes_them(groups: int) -> None:
    x, w = np.abs(normal(0, 2, 8, 6, 7)), normal(1, 16, 8 // groups, 3, 3)
    settings = {"groups": groups, "stride_w": 2}
    model = single("conv2d", {"x": x, "w": w, "bias": normal(2, 16)}, ("x",), **settings)
    scale = float(x.max()) / 255
    mixed = apply_precision(model, shifted("layer", scale, "x"), base="fp32")
    exact = quantise_weights(w, 0, "int8")
    by_hand = single(
        "conv2d",
        {"x": x, "w": exact.values * exact.scales[:, None, None, None], "bias": normal(2, 16)},
        ("x",),
        **settings,
    )
    wanted = output(by_hand, {"x": rounded(x, scale, "int8", LOWEST)})
    np.testing.assert_allclose(output(mixed, {"x": x}), wanted, rtol=1e-4, atol=1e-4)


def test_steps_are_half_as_long() -> None:
    arrays = {"a": np.abs(normal(0, 64, 48)), "b": np.rint(normal(1, 48, 24) * 40).clip(-127, 127)}
    arrays["b"][0] = 127  # weights are integers: what is off is off by the activations
    model = single("gemm", arrays, ("a",))
    largest = float(arrays["a"].max())
    exact = output(model, {"a": arrays["a"]})
    plain = apply_precision(model, {"layer": LayerPrecision("int8", {"a": largest / 127})}, base="fp32")
    full = apply_precision(model, shifted("layer", largest / 255, "a"), base="fp32")
    gain = decibels(exact, output(full, {"a": arrays["a"]})) - decibels(exact, output(plain, {"a": arrays["a"]}))
    assert 5 < gain < 7


def chain(activation: str = "Relu", *, pool: bool = True) -> ir.Model:
    """Two convolutions with an activation, and a pooling perhaps, between: x (2, 4, 8, 8) → y."""
    between = node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2], name="pool")
    nodes = [
        node("Conv", ["x", "w0", "b0"], ["c"], pads=[1, 1, 1, 1], name="before"),
        node(activation, ["c", *(["low", "high"] if activation == "Clip" else [])], ["r"], name="act"),
        *([between] if pool else []),
        node("Conv", ["p" if pool else "r", "w1"], ["y"], name="behind"),
    ]
    constants = {"w0": normal(0, 16, 4, 3, 3) / 4, "b0": normal(1, 16), "w1": normal(2, 12, 16, 1, 1)}
    if activation == "Clip":
        constants |= {"low": np.array(0, np.float32), "high": np.array(2, np.float32)}
    return fused(nodes, {"x": (2, 4, 8, 8)}, ["y"], constants)


@pytest.mark.parametrize("pool", [True, False])
def test_a_layer_with_relu_gives_them_itself(pool: bool) -> None:
    model, feed = chain(pool=pool), {"x": normal(9, 2, 4, 8, 8)}
    plan = shifted("behind", 0.02, "x")
    folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
    before = next(each for each in fused_nodes(folded) if each.name == "before")
    assert before.op_type == "FusedConv2dBiasOutScale"
    assert plugin_settings(before)["activation"] == "none"  # saturation is the ReLU
    assert not {"Sub", "QuantizeLinear"} & set(operators(folded))
    name = "p" if pool else "r"
    (integers,) = next(run(folded, [feed], [name])).values()
    (values,) = next(run(apart, [feed], [f"{name}_int8"])).values()
    assert integers.dtype == np.int8
    # A tie may fall to the other side, where the shift was added before the division.
    assert np.abs(integers.astype(int) - values).max() <= 1
    assert (integers == values).mean() > 0.999
    np.testing.assert_allclose(output(folded, feed), output(apart, feed), atol=0.1)


def test_other_activations_leave_the_step_to_the_graph() -> None:
    feed = {"x": normal(9, 2, 4, 8, 8)}
    for activation, folds in (("Relu", True), ("Sigmoid", False), ("Clip", True)):
        model = chain(activation, pool=False)
        scale = 2.0 / 255 if activation == "Clip" else 0.02
        mixed = apply_precision(model, shifted("behind", scale, "x"), base="fp32")
        assert ("Sub" not in operators(mixed)) == folds, activation
        plain = apply_precision(model, shifted("behind", scale, "x"), base="fp32", fold=False)
        np.testing.assert_allclose(output(mixed, feed), output(plain, feed), atol=0.1)
    # Integers that reach further than the clamp would let through what it cuts off.
    model = chain("Clip", pool=False)
    mixed = apply_precision(model, shifted("behind", 3.0 / 255, "x"), base="fp32")
    assert "Sub" in operators(mixed)
    plain = apply_precision(model, shifted("behind", 3.0 / 255, "x"), base="fp32", fold=False)
    np.testing.assert_array_equal(output(mixed, feed), output(plain, feed))


def test_what_is_added_behind_relu_is_not_cut_off_by_saturation() -> None:
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"], name="first"),
        node("Relu", ["m0"], ["r"], name="act"),
        node("Add", ["r", "x"], ["s"], name="skip"),
        node("MatMul", ["s", "w1"], ["y"], name="second"),
    ]
    model = fused(nodes, {"x": (4, 32)}, ["y"], {f"w{index}": normal(index, 32, 32) for index in range(2)})
    assert plugin_settings(fused_nodes(model)[0])["residual_last"] == 1
    assert values_to_shift(model) == []
    feed = {"x": normal(9, 4, 32)}
    for plan in (shifted("second", 0.1, "a"), {"second": LayerPrecision("int8", {"a": 0.2})}):
        folded, apart = (apply_precision(model, plan, base="fp32", fold=fold) for fold in (True, False))
        np.testing.assert_allclose(output(folded, feed), output(apart, feed), atol=0.3)


def test_means_and_roundings_know_of_the_shift() -> None:
    arrays = {"a": np.abs(normal(0, 64, 48)), "b": normal(1, 48, 24)}
    model = single("gemm", arrays, ("a",))
    plan = shifted("layer", 1.5 / 255, "a")  # it clips: the mean shifts
    shifts = measure_shifts(model, plan, [{"a": arrays["a"]}])
    exact, got = (
        output(each, {"a": arrays["a"]}) for each in (model, apply_precision(model, plan, base="fp32", shifts=shifts))
    )
    assert np.abs((got - exact).mean(axis=0)).max() < 1e-3
    np.testing.assert_array_equal(
        rounded(np.array([0.2, 250.0, 300.0, -3.0], np.float32), 1.0, "int8", LOWEST), [0, 250, 255, 0]
    )


def residual(*, output: str = "y") -> ir.Model:
    """Four layers, of which the middle two are quantised: `h0` is read by the second, and added behind the third."""
    nodes = [
        node("MatMul", ["x", "w0"], ["m0"], name="first"),
        node("Relu", ["m0"], ["h0"], name="act0"),
        node("MatMul", ["h0", "w1"], ["m1"], name="second"),
        node("Relu", ["m1"], ["h1"], name="act1"),
        node("MatMul", ["h1", "w2"], ["m2"], name="third"),
        node("Add", ["m2", "h0"], ["s"], name="add"),
        node("Relu", ["s"], ["h2"], name="act2"),
        node("MatMul", ["h2", "w3"], ["y"], name="last"),
    ]
    return fused(nodes, {"x": (4, 32)}, [output], {f"w{index}": normal(index, 32, 32) for index in range(4)})


def test_which_values_are_shifted() -> None:
    for pads, names in (([0, 0, 0, 0], ["joined"]), ([1, 1, 1, 1], [])):
        nodes = [
            node("Conv", ["x", "w0"], ["c0"], name="stem"),
            node("Relu", ["c0"], ["r0"], name="relu0"),
            node("MaxPool", ["r0"], ["p0"], kernel_shape=[2, 2], name="pool"),
            node("Concat", ["p0", "p0"], ["joined"], axis=1, name="join"),
            node("Conv", ["joined", "w1"], ["c1"], pads=pads, name="middle"),
            node("Conv", ["c1", "w2"], ["y"], name="last"),
        ]
        constants = {"w0": normal(0, 16, 3, 1, 1), "w1": normal(1, 16, 32, 3, 3), "w2": normal(2, 16, 16, 1, 1)}
        model = fused(nodes, {"x": (1, 3, 8, 8)}, ["y"], constants)
        assert values_to_shift(model) == names
        plan, _ = default_plan(model, "int8", {"joined": 0.02}, names)
        assert plan["middle"].zeros == dict.fromkeys(["x"] if names else [], LOWEST)
        assert "Sub" not in operators(apply_precision(model, plan, base="fp16"))


def test_a_value_that_is_read_in_floating_point_too_is_not() -> None:
    assert values_to_shift(residual()) == ["h1"]
    # A result of the graph is read in floating point as well.
    assert values_to_shift(residual(output="h1")) == []


def test_what_would_leave_a_step_is_not_shifted() -> None:
    def net(middle: list[object], outputs: tuple[str, ...] = ("y",)) -> ir.Model:
        nodes = [
            node("MatMul", ["x", "w0"], ["m0"], name="first"),
            node("Relu", ["m0"], ["h0"], name="act0"),
            node("MatMul", ["x", "w1"], ["m1"], name="beside"),
            node("Clip", ["m1", "low", "high"], ["h1"], name="act1"),
            *middle,
            node("MatMul", ["h2", "w3"], ["y"], name="last"),
        ]
        constants = {f"w{index}": normal(index, 32, 32) for index in range(4)}
        constants |= {"low": np.array(0, np.float32), "high": np.array(1, np.float32), "w4": normal(4, 64, 32)}
        used = {name for each in nodes for name in each.input}  # type: ignore[attr-defined]
        return fused(nodes, {"x": (4, 32)}, list(outputs), {key: constants[key] for key in constants.keys() & used})

    product = node("MatMul", ["h0", "w2"], ["h2"], name="second")
    assert values_to_shift(net([product])) == ["h0"]
    # Two layers with one scale for both, but each cut off at an end of its own.
    joined = [node("Concat", ["h0", "h1"], ["j"], axis=1, name="join"), node("MatMul", ["j", "w4"], ["h2"], name="two")]
    assert values_to_shift(net(joined)) == []
    # Two scales for what one layer makes.
    both = [
        node("MatMul", ["h0", "w2"], ["m2"], name="second"),
        node("Concat", ["h0", "m2"], ["j"], axis=1, name="join"),
        node("MatMul", ["j", "w4"], ["h2"], name="third"),
    ]
    assert values_to_shift(net(both)) == []
    # Read in floating point before the operator that moves it.
    moved = [
        node("Transpose", ["h0"], ["t"], perm=[1, 0], name="turn"),
        node("MatMul", ["t", "w5"], ["m2"], name="second"),
        node("Add", ["m2", "h0"], ["h2"], name="add"),
    ]
    nodes = [node("MatMul", ["x", "w0"], ["m0"], name="first"), node("Relu", ["m0"], ["h0"], name="act0"), *moved]
    nodes.append(node("MatMul", ["h2", "w3"], ["y"], name="last"))
    model = fused(nodes, {"x": (32, 32)}, ["y"], {f"w{index}": normal(index, 32, 32) for index in (0, 3, 5)})
    assert len(values_to_calibrate(model, "int8")) == 1
    assert values_to_shift(model) == []


def test_a_whole_model_is_shifted() -> None:
    model = perceptron()
    feeds = [{"x": normal(index, 8, 32)} for index in range(4)]
    found = quantise(model, feeds, "int8", methods=(Method.MINMAX,), smoothing=False)
    layer = found.plan["middle"]
    assert layer.zeros == {"a": LOWEST}
    largest = max(float(values["h0"].max()) for values in run(model, feeds, ["h0"]))
    assert layer.scales["a"] == pytest.approx(largest / 255)
    mixed = apply_precision(model, found.plan, base="fp16", weights=found.weights, shifts=found.shifts)
    first = next(each for each in fused_nodes(mixed) if each.name == "first")
    assert plugin_settings(first)["out_dtype"] == "int8"
    # Half precision has too few digits for the sum of a bias and 128 steps.
    assert dtype_name(plugin_inputs(first)["bias"]) == "fp32"
    assert decibels(output(model, feeds[0]), output(mixed, feeds[0])) > 30


def test_weights_are_rounded_for_what_the_layer_reads() -> None:
    # Integers of -128 to 127 would cut off what is above 127 steps: the inputs would not be those of this layer.
    model = single("gemm", {"a": np.abs(normal(0, 64, 48)), "b": normal(1, 48, 24)}, ("a",))
    feeds = [{"a": np.abs(normal(2 + index, 64, 48))} for index in range(8)]
    full, cut = (
        round_weights(model, {"layer": LayerPrecision("int8", {"a": 4 / 255}, zeros)}, feeds)["layer"].values
        for zeros in ({"a": LOWEST}, {})
    )
    by_hand = [{"a": rounded(feed["a"], 4 / 255, "int8", LOWEST)} for feed in feeds]
    wanted = round_weights(model, {"layer": LayerPrecision("int8", {"a": 1e-6 + 4 / 127})}, by_hand)["layer"].values
    assert (full == wanted).mean() > (cut == wanted).mean()


def test_chains_of_any_length_are_gone_through() -> None:
    nodes = [node("MatMul", ["x", "w"], ["v0"], name="first"), node("Relu", ["v0"], ["r0"], name="act")]
    nodes += [
        node("Transpose", [f"r{index}"], [f"r{index + 1}"], perm=[1, 0], name=f"t{index}") for index in range(1200)
    ]
    nodes += [node("MatMul", ["r1200", "w"], ["m"], name="second"), node("MatMul", ["m", "w"], ["y"], name="last")]
    model = fused(nodes, {"x": (8, 8)}, ["y"], {"w": normal(0, 8, 8)})
    assert values_to_shift(model) == ["r1200"]
    plan, _ = default_plan(model, "int8", {"r1200": 0.05}, ["r1200"])
    assert operators(apply_precision(model, plan, base="fp16")).count("Transpose") == 1200


def test_no_graph_takes_long() -> None:
    nodes = [node("Relu", ["x"], ["v0"], name="start")]
    for index in range(200):  # 2^200 ways from the end to the start
        kind = ("Add", "Concat", "Slice")[index % 3]
        inputs = [f"v{index}", *(["starts", "ends", "axes"] if kind == "Slice" else [f"v{index}"])]
        attributes = {"axis": 1} if kind == "Concat" else {}
        nodes.append(node(kind, inputs, [f"v{index + 1}"], name=f"n{index}", **attributes))
    constants = {name: np.array([number], np.int64) for name, number in (("starts", 0), ("ends", 8), ("axes", 1))}
    model = model_of(nodes, {"x": (4, 8)}, ["v200"], constants)
    assert values_to_shift(model) == []


@pytest.mark.parametrize(("kind", "zeros"), [("int8", {"a": 128}), ("fp8", {"a": LOWEST}), ("int8", {"b": LOWEST})])
def test_zeros_that_can_not_be_are_refused(kind: str, zeros: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be 0, or -128 to 127"):
        LayerPrecision(kind, {"a": 1.0}, zeros)


def test_layers_whose_bias_can_not_take_it_are_refused() -> None:
    many = single("gemm", {"a": normal(0, 3, 8, 16), "b": normal(1, 3, 16, 24)}, ("a",))
    around = single("conv2d", {"x": normal(0, 1, 8, 6, 6), "w": normal(1, 8, 8, 3, 3)}, ("x",), pad_left=1)
    for model, name in ((many, "a"), (around, "x")):
        with pytest.raises(UsageError, match="'layer' can't have a zero point"):
            apply_precision(model, shifted("layer", 0.1, name), base="fp32")

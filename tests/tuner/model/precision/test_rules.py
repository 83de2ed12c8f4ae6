"""The rules for which layers are quantised."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import convolutions, fused, node, perceptron
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.precision.rules import (
    FIRST,
    LAST,
    default_plan,
    first_layers,
    last_layers,
    layers_to_quantise,
    values_to_calibrate,
    weight_plan,
)
from tilewright.tuning_db.errors import UsageError


def test_first_and_last_layers_stay_and_the_others_do_not() -> None:
    model = convolutions()
    plan, reasons = default_plan(model, "int8", {"p0": 0.1, "joined": 0.2})
    assert reasons == {"stem": FIRST, "classifier": LAST}
    assert {name: each.scales for name, each in plan.items()} == {
        "left": {"x": 0.1},
        "right": {"x": 0.1},
        "grouped": {"x": 0.2},
    }
    assert values_to_calibrate(model, "int8") == ["p0", "joined"]


def test_an_input_may_be_normalised_and_reshaped_before_the_first_layer() -> None:
    nodes = [
        node("Sub", ["x", "mean"], ["centred"], name="centre"),
        node("Transpose", ["centred"], ["t"], perm=[1, 0], name="turn"),
        node("MatMul", ["t", "w"], ["m"], name="first"),
        node("Relu", ["m"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["n"], name="second"),
        node("Softmax", ["n"], ["y"], name="softmax"),
    ]
    model = fused(nodes, {"x": (16, 4)}, ["y"], {"mean": normal(0, 1), "w": normal(1, 16, 16)})
    assert first_layers(model) == {"first"}
    assert last_layers(model) == {"second"}


def test_a_result_that_is_an_output_and_goes_on_is_not_last() -> None:
    # As the keys and values of a decoder that gives its cache back.
    nodes = [
        node("MatMul", ["x", "w"], ["k"], name="key"),
        node("Relu", ["k"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["y"], name="out"),
    ]
    model = fused(nodes, {"x": (4, 16)}, ["y", "k"], {"w": normal(1, 16, 16)})
    assert last_layers(model) == {"out"}


def test_a_norm_averages_no_error_away() -> None:
    # As the last norm of an encoder.
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="first"),
        node("Relu", ["h"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["m"], name="second"),
        node("RMSNormalization", ["m", "gain"], ["y"], name="norm"),
    ]
    model = fused(nodes, {"x": (4, 16)}, ["y"], {"w": normal(1, 16, 16), "gain": normal(2, 16)}, opset=23)
    assert last_layers(model) == {"second", "norm"}
    reasons = layers_to_quantise(model, "int8")[1]
    assert reasons["second"] == LAST
    assert "norms are not quantised" in reasons["norm"]


def test_embeddings_are_no_input_of_a_first_layer() -> None:
    nodes = [
        node("Gather", ["table", "ids"], ["e"], name="embed"),
        node("MatMul", ["e", "w"], ["m"], name="first"),
        node("Relu", ["m"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["s"], name="second"),
        node("Cast", ["s"], ["y"], to=7, name="cast"),
    ]
    constants = {"table": normal(0, 50, 16), "w": normal(1, 16, 16)}
    model = fused(nodes, {"ids": (4,)}, ["y"], constants, dtype="int64")
    assert first_layers(model) == set()
    assert [each.name for each in layers_to_quantise(model, "int8")[0]] == ["first"]


def test_attention_is_quantised_by_fp8_alone() -> None:
    names = ("q", "k", "v")
    shapes = {"x": (1, 64, 128), "split": (4,)}
    nodes: list[object] = [node("MatMul", ["x", "w"], ["h"], name="in"), node("Relu", ["h"], ["r"], name="relu")]
    for name in names:
        nodes += [
            node("MatMul", ["r", f"w{name}"], [f"m{name}"], name=f"project_{name}"),
            node("Reshape", [f"m{name}", "heads"], [f"s{name}"], name=f"split_{name}"),
            node(
                "Transpose", [f"s{name}"], [name], perm=[0, 2, 3, 1] if name == "k" else [0, 2, 1, 3], name=f"t_{name}"
            ),
        ]
    nodes += [
        node("MatMul", ["q", "k"], ["scores"], name="scores"),
        node("Mul", ["scores", "scale"], ["scaled"], name="scale"),
        node("Softmax", ["scaled"], ["p"], axis=-1, name="softmax"),
        node("MatMul", ["p", "v"], ["mixed"], name="attend"),
        node("Transpose", ["mixed"], ["turned"], perm=[0, 2, 1, 3], name="back"),
        node("Reshape", ["turned", "flat"], ["joined"], name="join"),
        node("MatMul", ["joined", "w"], ["y"], name="out"),
    ]
    constants = {
        "w": normal(0, 128, 128),
        "heads": np.array([1, 64, 4, 32]),
        "flat": np.array([1, 64, 128]),
        "scale": np.array(32**-0.5, np.float32),
        **{f"w{name}": normal(index, 128, 128) for index, name in enumerate(names, start=1)},
    }
    model = fused(nodes, {"x": shapes["x"]}, ["y"], constants)
    chosen, reasons = layers_to_quantise(model, "int8")
    assert [each.name for each in chosen] == ["project_q", "project_k", "project_v"]
    (attention,) = (name for name in reasons if name not in ("in", "out"))
    assert "attention takes" in reasons[attention]
    fp8 = [each.op_type for each in layers_to_quantise(model, "fp8")[0]]
    assert fp8.count("FusedAttention") == 1


def test_joined_activations_have_one_scale() -> None:
    nodes = [
        node("Conv", ["x", "w0"], ["c"], name="first"),
        node("Relu", ["c"], ["r"], name="relu"),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2], name="pool"),
        node("Conv", ["p", "w"], ["small"], name="on_pooled"),
        node("Conv", ["r", "w"], ["large"], strides=[2, 2], name="on_all"),
        node("Add", ["small", "large"], ["s"], name="sum"),
        node("Conv", ["s", "w"], ["y"], name="last"),
    ]
    model = fused(nodes, {"x": (1, 8, 8, 8)}, ["y"], {"w0": normal(0, 8, 8, 1, 1), "w": normal(1, 8, 8, 1, 1)})
    plan, _ = default_plan(model, "int8", {"r": 0.25, "p": 0.5})
    assert plan["on_pooled"].scales == plan["on_all"].scales == {"x": 0.5}


def test_scales_must_be_there() -> None:
    model = perceptron()
    with pytest.raises(UsageError, match="node 'middle' reads 'h0', which has no scale"):
        default_plan(model, "int8", {})
    assert default_plan(model, "int8", {"h0": 1.0})[0].keys() == {"middle"}


@pytest.mark.parametrize(("kind", "last"), [("w4a16", "w8a16"), ("w8a16", "w8a16")])
def test_weights_alone_are_those_of_all_products_and_of_the_last_in_8_bits(kind: str, last: str) -> None:
    plan, reasons = weight_plan(perceptron(), kind, None)
    assert {name: each.kind for name, each in plan.items()} == {"first": kind, "middle": kind, "last": last}
    assert reasons == ({"last": LAST} if kind == "w4a16" else {})
    plan, reasons = weight_plan(convolutions(), kind, None)
    assert {name: each.kind for name, each in plan.items()} == {"classifier": last}
    assert reasons.pop("classifier", LAST) == LAST
    assert set(reasons.values()) == {"only matrix products have weights that alone are quantised"}


def test_a_model_without_layers_has_an_empty_plan() -> None:
    model = fused([node("Relu", ["x"], ["y"], name="relu")], {"x": (2,)}, ["y"], {})
    assert isinstance(model, ir.Model)
    assert default_plan(model, "int8", {}) == ({}, {})

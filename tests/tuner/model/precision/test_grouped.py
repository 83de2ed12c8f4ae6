"""Weights of 8 and 4 bits under activations in half precision: what can have them, and how near they come."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import convolutions, fused, node, operators, output, perceptron, single
from tests.tuner.model.graphs import normal, relative_error
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs, plugin_settings, plugin_tensors
from tilewright.tuner.model.precision.grouped import (
    GroupedWeights,
    blank,
    matrix_of,
    quantise_matrix,
    refused,
    scales_of,
    to_integers,
)
from tilewright.tuner.model.precision.quantise import LayerPrecision, apply_precision
from tilewright.tuner.model.workloads import workloads
from tilewright.tuning_db.errors import ModelError, UsageError


def numbers(weights: GroupedWeights) -> np.ndarray:
    """What quantised weights stand for, (K, N)."""
    integers = weights.values.astype(np.float64) - (8 if weights.bits == 4 else 0)
    scales = weights.scales.astype(np.float64)
    return integers * (np.repeat(scales, weights.group, axis=0)[: len(integers)] if weights.group else scales)


def layer(model: ir.Model, name: str = "layer") -> ir.Node:
    return next(each for each in fused_nodes(model) if each.name == name)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("depth", [96, 300])
@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_the_kernel_reads_integers_and_nothing_else_is_rounded(kind: str, depth: int, turned: bool) -> None:
    b = normal(0, depth, 48)
    a, bias = np.float16(normal(1, 5, depth)).astype(np.float32), normal(2, 48)
    settings: dict[str, Any] = {"trans_b": 1} if turned else {}
    given = np.ascontiguousarray(b.T) if turned else b
    model = single("gemm", {"a": a, "b": given, "bias": bias}, ("a",), activation="relu", **settings)
    mixed = apply_precision(model, {"layer": LayerPrecision(kind)}, base="fp16")
    bits = {"w8a16": 8, "w4a16": 4}[kind]
    tensors, attributes = plugin_tensors(layer(mixed)), plugin_settings(layer(mixed))
    group = 128 if bits == 4 and depth > 128 else 0
    assert (attributes["weights"], attributes["group_size"]) == ("int4" if bits == 4 else "none", group)
    assert tensors["b"].dtype == "int8"
    assert tensors["b_scale"].dims == ((3, 48) if group else (48,))
    assert tensors["b_scale"].dtype == ("fp16" if group else "fp32")
    assert "b_zero" not in tensors
    wanted = np.maximum(a @ numbers(quantise_matrix(b.T, bits)) + np.float16(bias), 0)
    assert relative_error(output(mixed, {"a": a}), wanted) < 1e-3
    assert relative_error(output(mixed, {"a": a}), np.maximum(a @ b + bias, 0)) < {8: 1e-2, 4: 0.15}[bits]


def test_gated_pairs_and_what_follows_stay_fused() -> None:
    nodes = [
        node("MatMul", ["x", "w0"], ["g"], name="gate"),
        node("MatMul", ["x", "w1"], ["u"], name="up"),
        node("Sigmoid", ["g"], ["s"], name="sigmoid"),
        node("Mul", ["g", "s"], ["a"], name="silu"),
        node("Mul", ["a", "u"], ["h"], name="gated"),
        node("MatMul", ["h", "w2"], ["d"], name="down"),
        node("Add", ["d", "x"], ["y"], name="residual"),
    ]
    weights = {"w0": normal(0, 160, 256) / 12, "w1": normal(1, 160, 256) / 12, "w2": normal(2, 256, 160) / 16}
    model = fused(nodes, {"x": (3, 160)}, ["y"], weights)
    names = [each.name or "" for each in fused_nodes(model)]
    assert len(names) == 2
    mixed = apply_precision(model, dict.fromkeys(names, LayerPrecision("w4a16")), base="fp16")
    assert operators(mixed).count("Cast") == operators(apply_precision(model, {}, base="fp16")).count("Cast")
    assert all(plugin_settings(each)["weights"] == "int4" for each in fused_nodes(mixed))
    feed = {"x": normal(3, 3, 160)}
    assert relative_error(output(mixed, feed), output(model, feed)) < 0.15


def test_products_share_weights() -> None:
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="one"),
        node("Relu", ["m"], ["r"], name="relu"),
        node("MatMul", ["r", "w"], ["y"], name="two"),
    ]
    model = fused(nodes, {"x": (4, 160)}, ["y"], {"w": normal(0, 160, 160)})
    plan = dict.fromkeys(("one", "two"), LayerPrecision("w4a16"))
    mixed = apply_precision(model, plan, base="fp16")
    assert plugin_inputs(layer(mixed, "one"))["b"] is plugin_inputs(layer(mixed, "two"))["b"]
    assert set(mixed.graph.initializers) == {value.name for each in fused_nodes(mixed) for value in each.inputs[1:]}


def test_weights_that_are_given_are_used_for_their_own_bits() -> None:
    a, b = normal(0, 4, 160), normal(1, 160, 32)
    model = single("gemm", {"a": a, "b": b}, ("a",))
    given = {"layer": quantise_matrix(2 * b.T, 4)}
    four, eight = (
        output(apply_precision(model, {"layer": LayerPrecision(kind)}, base="fp16", grouped=given), {"a": a})
        for kind in ("w4a16", "w8a16")
    )
    assert relative_error(four, 2 * (a @ b)) < 0.2
    assert relative_error(eight, a @ b) < 0.02


def test_a_layer_that_stays_fp32_keeps_its_weights() -> None:
    model = single("gemm", {"a": normal(0, 4, 160), "b": normal(1, 160, 32)}, ("a",))
    seen = {"a": (-1e5, 1e5)}
    mixed = apply_precision(model, {"layer": LayerPrecision("w4a16")}, base="fp16", extremes=seen)
    assert plugin_tensors(layer(mixed))["b"].dtype == "fp32"


@pytest.mark.parametrize("importance", [None, "inputs"])
def test_cutting_off_brings_groups_nearer(importance: str | None) -> None:
    matrix = np.random.default_rng(0).standard_t(5, (16, 300)).astype(np.float32)
    counts = None if importance is None else np.square(normal(1, 300)) + 0.01
    scales = scales_of(matrix, 4, counts)
    assert scales.shape == (3, 16)
    errors = []
    whole = np.stack([np.abs(part).max(axis=1) / 7 for part in np.split(matrix, (128, 256), axis=1)])
    for each in (scales.astype(np.float32), whole):
        steps = np.repeat(each, 128, axis=0)[:300].T
        error = np.square(to_integers(matrix / steps, 4) * steps - matrix)
        errors.append(float((error * (1 if counts is None else counts)).sum()))
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-5, 1e4, 1e30])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_size_of_weights(bits: int, factor: float) -> None:
    matrix = np.float32(factor) * normal(0, 8, 160)
    matrix[3] = 0
    weights = quantise_matrix(matrix, bits)
    assert np.isfinite(weights.scales).all()
    assert weights.scales.dtype == (np.float16 if bits == 4 and factor in (0.0, 1e4) else np.float32)
    error = np.abs(numbers(weights).T - matrix).max()
    assert error <= {4: 0.2, 8: 0.01}[bits] * np.abs(matrix).max()
    assert not numbers(weights)[:, 3].any()


def test_large_matrices_are_looked_at_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = normal(0, 40, 300)
    whole = quantise_matrix(matrix, 4)
    monkeypatch.setattr("tilewright.tuner.model.precision.grouped._CHUNK", 1000)
    pieces = quantise_matrix(matrix, 4)
    np.testing.assert_array_equal(whole.values, pieces.values)
    np.testing.assert_array_equal(whole.scales, pieces.scales)


A, B = normal(0, 4, 64), normal(1, 64, 32)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (single("gemm", {"a": A, "b": B}, ("a", "b")), "both operands are activations"),
        (single("gemm", {"a": A, "b": B}, ("b",)), "both operands are activations"),
        (single("gemm", {"a": normal(0, 3, 4, 64), "b": normal(1, 3, 64, 32)}, ("a",)), "are no one matrix"),
        (
            single("gemm", {"a": A, "b": B, "b_scale": np.ones(32, np.float32)}, ("a",)),
            "its weights are quantised already",
        ),
        (convolutions(), "only matrix products"),
    ],
)
def test_what_can_not_have_them_has_a_reason(model: ir.Model, reason: str) -> None:
    found = refused(next(iter(fused_nodes(model))), "w4a16", None)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("device", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_devices_have_kernels_for_them(kind: str, device: str) -> None:
    for each in fused_nodes(perceptron(512)):
        assert refused(each, kind, resolve_device(device)) is None


def test_a_plan_needs_activations_in_half_precision_and_a_product() -> None:
    plan = {"middle": LayerPrecision("w4a16")}
    with pytest.raises(UsageError, match="node 'middle' can't be w4a16: its activations would be fp32"):
        apply_precision(perceptron(), plan, base="fp32")
    with pytest.raises(UsageError, match="node 'left' can't be w4a16: only matrix products"):
        apply_precision(convolutions(), {"left": LayerPrecision("w4a16")}, base="fp16")


def test_infinite_weights_are_refused() -> None:
    b = B.copy()
    b[3, 5] = np.inf
    model = single("gemm", {"a": A, "b": b}, ("a",))
    with pytest.raises(ModelError, match="node 'layer': its weights 'b' have infinite or NaN elements"):
        matrix_of(layer(model))


@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_a_model_of_blank_weights_has_the_problems_of_one_of_real_ones(kind: str) -> None:
    """So that its time is predicted without rounding any."""
    model = perceptron(160)
    kinds = dict.fromkeys(("first", "middle", "last"), kind)
    plan = {name: LayerPrecision(kind) for name in kinds}
    empty = blank(model, kinds)
    assert empty["first"] is empty["middle"] is not empty["last"]
    timed, real = (apply_precision(model, plan, base="fp16", grouped=grouped) for grouped in (empty, {}))
    assert [each.problem for each in workloads(timed).layers] == [each.problem for each in workloads(real).layers]
    assert not output(timed, {"x": normal(0, 8, 160)}).any()
    assert blank(model, {"first": "int8", "middle": "fp32"}) == {}

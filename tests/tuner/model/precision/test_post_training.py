"""Post-training quantisation as a whole."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import FEEDS, block, convolutions, decibels, fused, node, output, plan_of
from tests.tuner.model.graphs import normal, relative_error
from tilewright.tuner.model.calibration.calibrate import Method
from tilewright.tuner.model.precision import post_training
from tilewright.tuner.model.precision.post_training import Score, quantise
from tilewright.tuner.model.precision.quantise import apply_precision
from tilewright.tuner.model.precision.smoothing import SmoothingReport
from tilewright.tuning_db.errors import UsageError


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_is_nearer_than_rounding_to_nearest(kind: str) -> None:
    model, before = block(), block()
    lines: list[str] = []
    found = quantise(model, FEEDS[:16], kind, tell=lines.append)
    mixed = apply_precision(model, found.plan, base="fp32", weights=found.weights, shifts=found.shifts)
    plain = apply_precision(before, plan_of(before, FEEDS[:16], kind), base="fp32")
    exact, ours, theirs = (
        np.concatenate([output(each, feed) for feed in FEEDS[16:]]) for each in (before, mixed, plain)
    )
    assert decibels(exact, ours) > decibels(exact, theirs) + (3 if kind == "int8" else 0.3)
    assert found.plan.keys() == found.weights.keys() == {"query", "key", "up", "down"}
    assert found.method in found.scores
    assert found.scores[found.method] == max(found.scores.values())  # type: ignore[index]
    assert found.reasons.keys() == {"embed", "head"}
    assert [line.partition(": ")[2] for line in lines[1:3]] == ["16 of 32 runs for scales", "32 of 32 runs for scales"]
    assert "shifts of means left out" in lines[3]  # the two are not one measure
    assert "shifts of means counted, with weights rounded by their inputs and biases" in lines[4]
    assert len(lines) == 5


def test_long_steps_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post_training, "STEPS", 2)
    lines: list[str] = []
    quantise(block(), FEEDS[:2], "int8", methods=(Method.MINMAX,), tell=lines.append)
    told = [line for line in lines if re.match(r"int8: \d+ of \d+ ", line)]
    assert told == [
        "int8: 2 of 3 activations looked at for smoothing",
        "int8: 2 of 2 runs for scales",
        "int8: 2 of 4 layers rounded",
        "int8: 4 of 4 layers rounded",
    ]


def test_steps_can_be_left_out() -> None:
    model = convolutions()
    feeds = [{"x": normal(index, 2, 3, 16, 16)} for index in range(3)]
    found = quantise(model, feeds, "int8", methods=(Method.MINMAX,), smoothing=False, rounding=False)
    assert found.smoothing == SmoothingReport()
    assert found.weights == {}
    assert list(found.scores) == [Method.MINMAX]


def test_a_model_with_nothing_to_quantise_is_left() -> None:
    model = fused([node("MatMul", ["x", "w"], ["y"], name="only")], {"x": (4, 16)}, ["y"], {"w": normal(0, 16, 16)})
    found = quantise(model, [{"x": normal(1, 4, 16)}], "int8")
    assert found.plan == {}
    assert found.method is None
    assert "first layer" in found.reasons["only"]


def test_scores_are_decibels_before_the_softmax() -> None:
    nodes = [node("MatMul", ["x", "w"], ["l"], name="mm"), node("Softmax", ["l"], ["y"], name="softmax")]
    model = fused(nodes, {"x": (4, 16)}, ["y"], {"w": normal(0, 16, 16)})
    louder = fused(nodes, {"x": (4, 16)}, ["y"], {"w": normal(0, 16, 16) * np.float32(1.1)})
    score = Score(model, [{"x": normal(1, 4, 16)}])
    assert score.of(louder) == pytest.approx(20, abs=1e-3)
    assert score.of(model) > 200


def test_what_all_inputs_have_in_common_is_no_signal() -> None:
    nodes = [node("MatMul", ["x", "w"], ["m"], name="mm"), node("Add", ["m", "b"], ["y"], name="add")]
    weights, bias = normal(0, 16, 16), normal(1, 16)
    plain, moved, louder = (
        fused(nodes, {"x": (4, 16)}, ["y"], {"w": weights * np.float32(factor), "b": bias + np.float32(offset)})
        for factor, offset in ((1, 0), (1, 1e4), (1.1, 1e4))
    )
    feeds = [{"x": normal(2 + index, 4, 16)} for index in range(8)]
    for score in (Score(plain, feeds), Score(moved, feeds)):
        assert score.of(louder, shifts=False) == pytest.approx(20, abs=1e-3)
    assert Score(plain, feeds).of(moved, shifts=False) > 60
    assert Score(plain, feeds).of(moved) < -50


def test_what_is_not_finite_in_the_original_is_left_out() -> None:
    """As a mask on the logits; some of it in every feed, some in one."""
    weights = normal(0, 16, 16)
    nodes = [
        node("MatMul", ["x", "w"], ["m"], name="mm"),
        node("Add", ["m", "mask"], ["masked"], name="add"),
        node("Identity", ["masked"], ["y"], name="same"),
    ]
    mask = np.zeros((4, 16), np.float32)
    mask[:, 3], mask[0, 0] = -np.inf, np.nan

    def net(factor: float, mask: np.ndarray) -> ir.Model:
        constants = {"w": weights * np.float32(factor), "mask": mask}
        return fused(nodes, {"x": (4, 16)}, ["y"], constants)

    feeds = [{"x": normal(1 + index, 4, 16)} for index in range(3)]
    feeds[0]["x"][2, 0] = np.inf  # this row is not finite in one feed
    score = Score(net(1, mask), feeds)
    assert score.of(net(1.1, mask), shifts=False) == pytest.approx(20, abs=1e-3)
    assert score.of(net(1, mask)) > 200
    worse = mask.copy()
    worse[1, 1] = -np.inf
    assert score.of(net(1, worse)) == -np.inf


@pytest.mark.parametrize("fill", [-np.inf, np.nan])
def test_methods_and_shifts_are_chosen_beside_a_mask(fill: float) -> None:
    def net(mask: np.ndarray) -> ir.Model:
        nodes = [
            node("MatMul", ["x", "w0"], ["a"], name="first"),
            node("Relu", ["a"], ["b"], name="relu"),
            node("MatMul", ["b", "w1"], ["c"], name="middle"),
            node("Add", ["c", "bias"], ["d"], name="bias"),
            node("Relu", ["d"], ["e"], name="relu2"),
            node("MatMul", ["e", "w2"], ["f"], name="last"),
            node("Add", ["f", "mask"], ["y"], name="masked"),
        ]
        constants = {f"w{index}": normal(index, 32, 32) for index in range(3)}
        return fused(nodes, {"x": (8, 32)}, ["y"], {**constants, "bias": normal(4, 32), "mask": mask})

    mask = np.zeros(32, np.float32)
    feeds = [{"x": normal(index, 8, 32)} for index in range(8)]
    plain = quantise(net(mask), feeds, "int8", smoothing=False)
    mask[5] = fill
    lines: list[str] = []
    masked = quantise(net(mask), feeds, "int8", smoothing=False, tell=lines.append)
    assert np.isfinite(list(masked.scores.values())).all()
    assert masked.scores[masked.method] == max(masked.scores.values())  # type: ignore[index]
    assert masked.method == plain.method
    assert not any("nan" in line for line in lines)


def test_inputs_that_are_all_the_same_are_told_apart_from_nothing() -> None:
    model, other = (fused([node("MatMul", ["x", "w"], ["y"], name="mm")], {"x": (4, 16)}, ["y"],
                    {"w": normal(0, 16, 16) * np.float32(factor)}) for factor in (1, 1.1))  # fmt: skip
    score = Score(model, [{"x": normal(1, 4, 16)}] * 3)
    assert score.of(other, shifts=False) == pytest.approx(20, abs=1e-3)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(UsageError, match="'int4' must be int8 or fp8"):
        quantise(convolutions(), [{"x": normal(0, 2, 3, 16, 16)}], "int4")


def test_results_follow_from_the_seed() -> None:
    first, second = (block() for _ in range(2))
    found = [quantise(model, FEEDS[:4], "int8", seed=5) for model in (first, second)]
    assert found[0].plan == found[1].plan
    mixed = [
        apply_precision(model, each.plan, base="fp16", weights=each.weights, shifts=each.shifts)
        for model, each in zip((first, second), found, strict=True)
    ]
    assert relative_error(output(mixed[0], FEEDS[7]), output(mixed[1], FEEDS[7])) == 0

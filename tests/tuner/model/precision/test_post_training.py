"""Post-training quantisation as a whole."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tuner.model.fused_nets import FEEDS, block, convolutions, decibels, fused, node, output, plan_of
from tests.tuner.model.graphs import normal, relative_error
from tilewright.tuner.model.calibration.calibrate import Method
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
    assert len(lines) == 3


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

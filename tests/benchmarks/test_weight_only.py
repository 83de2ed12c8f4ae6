"""The comparison of 4-bit weights, on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import weight_only
from benchmarks.weight_only import main, measure, numbers, with_weights
from tests.tuner.model.fused_nets import output, perceptron
from tests.tuner.model.graphs import normal, relative_error
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.precision.grouped import matrix_of, quantise_matrix
from tilewright.tuner.model.precision.quantise import LayerPrecision, apply_precision


def test_a_small_network_is_measured() -> None:
    figures = measure("gpt_opset17", 4, 4, small=True)
    assert (figures["products"], figures["of"]) == (12, 13)
    assert 15 < figures["nearest"]["db"] < 30
    assert abs(figures["nearest"]["db"] - figures["symmetric"]["db"]) < 2  # the same grid, but for what is cut off
    assert figures["ours"]["db"] > figures["nearest"]["db"] - 1
    assert all(0.5 < figures[form]["top1"] <= 1 for form in weight_only.FORMS)


def test_numbers_of_weights_are_what_the_kernel_has() -> None:
    model = perceptron(160)
    weights = {node.name or "": quantise_matrix(matrix_of(node), 4) for node in fused_nodes(model)}
    node = next(node for node in fused_nodes(model) if node.name == "middle")
    assert np.abs(numbers(weights["middle"]).T - matrix_of(node)).max() < 0.3 * np.abs(matrix_of(node)).max()
    feed = {"x": normal(0, 8, 160)}
    mixed = apply_precision(model, dict.fromkeys(weights, LayerPrecision("w4a16")), base="fp16", grouped=weights)
    assert relative_error(output(with_weights(model, weights), feed), output(mixed, feed)) < 2e-3


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measured(name: str, *_: object, **__: object) -> dict[str, object]:
        asked.append(name)
        return {"products": 12, **{form: {"db": 20.0, "top1": 0.9} for form in weight_only.FORMS}}

    monkeypatch.setattr(weight_only, "measure", measured)
    monkeypatch.setenv("COLUMNS", "200")
    for _ in range(2):
        result = CliRunner().invoke(main, ["--model", "gpt_opset17", "--json", str(tmp_path / "found.json")])
        assert result.exit_code == 0, result.output
    assert asked == ["gpt_opset17"]
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["64 samples, 32 for calibration"]["gpt_opset17"]["products"] == 12
    assert "20.0, 90.0%" in result.output

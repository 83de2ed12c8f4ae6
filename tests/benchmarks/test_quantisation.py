"""The comparison of int8 models, on small ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from benchmarks import quantisation
from benchmarks.quantisation import Logits, best, main, measure


def linear(weights: np.ndarray) -> ir.Model:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "linear",
        [helper.make_tensor_value_info("x", 1, [1, 4])],
        [helper.make_tensor_value_info("y", 1, [1, 4])],
        [numpy_helper.from_array(weights, "w")],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_decibels_are_of_what_differs_between_inputs() -> None:
    feeds = [{"x": np.eye(4, dtype=np.float32)[index : index + 1]} for index in range(4)]
    logits = Logits(linear(np.eye(4, dtype=np.float32)), "y", feeds)
    assert logits.decibels(logits.exact * 1.1) == pytest.approx(20)
    assert logits.decibels(logits.exact * 1.1 + 5) == pytest.approx(20)  # of the same for all: nothing
    assert logits.agreement(logits.exact[:, [1, 0, 2, 3]], 4) == 0.5
    assert logits.relative(logits.exact + 0.25) == (0.25, pytest.approx(0, abs=1e-12))
    assert logits.decibels(logits.exact) == np.inf
    spoilt = logits.exact.copy()
    spoilt[1, 2] = np.nan
    assert np.isnan([logits.decibels(spoilt), *logits.relative(spoilt)]).all()


def test_a_small_network_is_measured() -> None:
    figures = measure("squeezenet", 6, 4, lambda line: None, small=True)
    assert figures["ours"]["db"] > figures["ours"]["db_nearest"] > 5
    assert 0 < figures["ours"]["share"] < 1
    assert figures["ours"]["layers"] == [24, 26]
    assert len(figures["onnxruntime"]) == 6
    method, theirs = best(figures, "asymmetric")
    of_form = [figures["onnxruntime"][f"{each} asymmetric all"] for each in quantisation.METHODS]
    assert theirs["screened_db"] >= max(each["screened_db"] for each in of_form) - quantisation.SCREENED_DB
    assert theirs["db"] == max(each["db"] for each in of_form if "db" in each)
    assert method in quantisation.METHODS
    assert figures["ours"]["fp16_relative"] < 5e-3
    assert figures["varying"] > 0.1


def test_the_page_has_the_figures_on_record() -> None:
    root = Path(__file__).parents[2]
    recorded = json.loads((root / "benchmarks/results/quantisation.json").read_text())
    results = recorded["256 samples, 64 for calibration"]
    assert quantisation.markdown(results) in (root / "docs/models.md").read_text()
    for name, figures in results.items():
        theirs = [each["db"] for each in figures["onnxruntime"].values() if "db" in each]
        assert figures["ours"]["db"] > max(theirs), name


def test_results_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    form = {"db": 20.0, "top1": 0.9, "seconds": 1.0}
    ours = {"db": 30.0, "db_nearest": 25.0, "top1": 1.0, "share": 0.9, "fp16_relative": 1e-3, "fp16_centred": 2e-3}
    theirs = {f"{method} {kind} all": form for method in quantisation.METHODS for kind in quantisation.FORMS}
    theirs |= {"MinMax asymmetric products": {"error": "too many bins"}}

    def fake(name: str, *_: Any, **__: Any) -> dict[str, Any]:
        calls.append(name)
        return {"ours": ours, "onnxruntime": theirs}

    monkeypatch.setattr(quantisation, "measure", fake)
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "results.json"
    arguments = ["--model", "squeezenet", "--samples", "4", "--json", str(file)]
    first = CliRunner().invoke(main, arguments)
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(main, [*arguments, "--model", "vgg19"])
    assert second.exit_code == 0, second.output
    assert calls == ["squeezenet", "vgg19"]
    assert "+10.0" in second.output
    assert json.loads(file.read_text())["4 samples, 64 for calibration"].keys() == {"squeezenet", "vgg19"}

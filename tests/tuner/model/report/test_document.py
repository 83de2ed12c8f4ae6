"""`report.json`: its fields, that equal reports are equal bytes, and times before beside times after."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.model.reports import sample
from tilewright.tuner.model.report.document import (
    VERSION,
    EstimatePart,
    ModelReport,
    layer_times,
    to_json,
    weakest_provenance,
    write_report,
)
from tilewright.tuner.model.report.estimate import Estimate, NodeTime, Roofs
from tilewright.tuning_db.errors import UsageError


def wrong(value: Any, kind: Any, where: str = "report") -> list[str]:
    """Where a value of JSON isn't what a type of the report is written as."""
    if is_dataclass(kind):
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        hints = typing.get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        found = [] if list(value) == names else [f"{where} has {list(value)}, not {names}"]
        return found + [
            line for name in names if name in value for line in wrong(value[name], hints[name], f"{where}.{name}")
        ]
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        options = [wrong(value, option, where) for option in inner]
        return [] if [] in options else options[0]
    if origin is tuple:
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [line for index, each in enumerate(value) for line in wrong(each, inner[0], f"{where}[{index}]")]
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{where} is no object"]
        found = [] if list(value) == sorted(value) else [f"{where} is in another order"]
        return found + [line for name, each in value.items() for line in wrong(each, inner[1], f"{where}.{name}")]
    if kind is type(None):
        return [] if value is None else [f"{where} is {value!r}"]
    right = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    return [] if right else [f"{where} is {value!r}, not {kind.__name__}"]


def names_of(kind: Any, found: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The fields of every dataclass that one is made of."""
    for inner in typing.get_args(kind):
        names_of(inner, found)
    if is_dataclass(kind) and isinstance(kind, type) and kind.__name__ not in found:
        found[kind.__name__] = tuple(field.name for field in fields(kind))
        for hint in typing.get_type_hints(kind).values():
            names_of(hint, found)
    return found


@pytest.mark.parametrize("plain", [False, True])
def test_the_document_is_of_its_types(plain: bool) -> None:
    document = json.loads(to_json(sample(plain=plain)))
    assert document.pop("version") == VERSION
    assert wrong(document, ModelReport) == []
    assert (document["precision"] is None) == plain


def test_the_checker_finds_what_is_wrong() -> None:
    """That the test above can fail."""
    document = json.loads(to_json(sample()))
    del document["version"]
    for change, words in (
        (lambda d: d["model"].pop("sha256"), "report.model has"),
        (lambda d: d["memory"]["after"].update(peak_bytes=1.5), "report.memory.after.peak_bytes is 1.5"),
        (lambda d: d["estimate"]["before"]["nodes"][0].update(time_us="long"), "nodes[0].time_us is 'long'"),
        (lambda d: d["device"].update(present=1), "report.device.present is 1"),
        (lambda d: d["fusion"].update(patterns={"b": 1, "a": 2}), "report.fusion.patterns is in another order"),
        (lambda d: d["precision"].update(layers=None), "report.precision.layers is no list"),
    ):
        broken = json.loads(json.dumps(document))
        change(broken)
        (line,) = wrong(broken, ModelReport)
        assert words in line


def test_fields_of_version_4() -> None:
    """Programs read these. A change here is one of `VERSION`."""
    assert VERSION == 4
    assert names_of(ModelReport, {}) == {
        "ModelReport": (
            *("tilewright", "model", "device", "fusion", "workloads", "tuning", "precision", "errors"),
            *("memory", "estimate", "artefacts", "warnings"),
        ),
        "ModelPart": ("name", "sha256", "bytes", "opset", "read_opset", "nodes", "inputs", "outputs", "folded"),
        "TensorPart": ("name", "dtype", "shape"),
        "DevicePart": ("key", "name", "arch", "bandwidth_gbs", "present"),
        "FusionPart": ("nodes_before", "nodes_after", "patterns", "layers", "left"),
        "FusedLayer": ("node", "plugin", "stands_for", "end"),
        "LeftNode": ("node", "pattern", "reason"),
        "WorkloadPart": ("rows", "unsupported", "flops", "coverage"),
        "WorkloadRow": ("first", "op", "problem", "count", "flops", "flops_share", "bytes", "bytes_share"),
        "UnsupportedRow": ("node", "operator", "reason", "flops"),
        "TuningRow": (
            *("op", "problem", "config", "time_us", "provenance", "tflops", "roofline_fraction", "status"),
            *("message", "trials"),
        ),
        "PrecisionPart": ("requested", "base", "layers", "calibration", "measure", "pareto"),
        "LayerPlan": ("node", "kind", "reason"),
        "CalibrationPart": ("origin", "samples", "methods"),
        "ParetoPoint": ("time_us", "provenance", "error", "higher", "chosen"),
        "ErrorPart": ("model", "data", "budget", "breaches", "comparison"),
        "Comparison": ("inputs", "outputs", "layers"),
        "OutputError": (
            *("output", "value", "logits", "exact", "relative", "centred_relative", "max_abs", "cosine"),
            *("sqnr_db", "top1", "bad_original", "bad_changed", "rows", "judged", "discrete", "constant"),
        ),
        "LayerError": ("value", "original", "exact", "relative", "sqnr_db", "bad_original", "bad_changed", "max_abs"),
        "MemoryPart": ("before", "after"),
        "Memory": ("weights", "peak_bytes", "peak_node", "interface_bytes", "unknown_values"),
        "EstimatePart": ("before", "after", "roofs", "stands_for"),
        "Estimate": ("device", "time_us", "provenance", "nodes"),
        "NodeTime": ("node", "op", "kernel", "time_us", "provenance", "flops", "bytes", "unit", "share"),
        "Roofs": ("bandwidth_gbs", "tflops"),
        "Artefact": ("file", "kind", "bytes", "sha256", "what"),
    }


def test_equal_runs_give_equal_bytes() -> None:
    assert to_json(sample()) == to_json(sample())
    report = sample()
    turned = replace(report, fusion=replace(report.fusion, patterns=dict(reversed(report.fusion.patterns.items()))))
    assert to_json(turned) == to_json(report)


def test_names_are_kept_and_the_text_is_ascii(tmp_path: Path) -> None:
    prefix = "\u202e</script>\x00\ud800 \"'&"
    report = sample(plain=True)
    row = replace(report.estimate.before.nodes[0], node=prefix)
    report = replace(report, estimate=replace(report.estimate, before=replace(report.estimate.before, nodes=(row,))))
    write_report(report, tmp_path / "report.json")
    content = (tmp_path / "report.json").read_bytes()
    assert content.isascii()
    assert content.endswith(b"}\n")
    assert json.loads(content)["estimate"]["before"]["nodes"][0]["node"] == prefix


def test_numbers_that_are_none_are_no_json() -> None:
    report = sample(plain=True)
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json(replace(report, workloads=replace(report.workloads, coverage=float("nan"))))


def test_a_folder_that_isn_t_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be written"):
        write_report(sample(plain=True), tmp_path / "missing" / "report.json")
    assert list(tmp_path.iterdir()) == []


def node(name: str, time_us: float, provenance: str = "roofline") -> NodeTime:
    return NodeTime(name, "Op", "", time_us, provenance, 0, 0, "", 0.0)


def times(before: list[NodeTime], after: list[NodeTime], pairs: dict[str, tuple[str, ...]]) -> EstimatePart:
    made = [Estimate("d", sum(row.time_us for row in rows), "predicted", tuple(rows)) for rows in (before, after)]
    return EstimatePart(made[0], made[1], Roofs(1.0, {}), pairs)


def test_times_before_stand_beside_the_layer_that_replaced_them() -> None:
    part = times(
        [node("conv", 5.0, "predicted"), node("relu", 2.0), node("view", 0.0, "free"), node("gone", 1.5)],
        [node("layer", 4.0, "measured"), node("cast", 0.5), node("reshape", 0.0, "free")],
        {"layer": ("conv", "relu"), "reshape": ("view",), "cast": ()},
    )
    rows = [dataclasses.astuple(row) for row in layer_times(part)]
    assert rows == [
        ("layer", "Op", 7.0, "roofline", 4.0, "measured"),
        ("cast", "Op", None, "", 0.5, "roofline"),
        ("gone", "Op", 1.5, "roofline", None, ""),
    ]


def test_both_sides_add_up_to_their_whole() -> None:
    part = sample().estimate
    rows = layer_times(part)
    assert sum(row.before_us or 0.0 for row in rows) == pytest.approx(part.before.time_us)
    assert sum(row.after_us or 0.0 for row in rows) == pytest.approx(part.after.time_us)


def test_a_node_is_counted_for_one_layer_only() -> None:
    part = times([node("a", 3.0)], [node("x", 1.0), node("y", 1.0)], {"x": ("a",), "y": ("a",)})
    assert [row.before_us for row in layer_times(part)] == [3.0, None]


def test_a_sum_is_as_good_as_the_weakest_of_it() -> None:
    assert weakest_provenance("measured", "predicted", "transferred") == "predicted"
    assert weakest_provenance("free", "measured") == "measured"
    assert weakest_provenance("roofline", "predicted") == "roofline"
    assert weakest_provenance() == ""

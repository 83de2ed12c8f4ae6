"""From a request to the precision of every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.fused_nets import dtypes
from tests.tuner.model.graphs import model_of, normal
from tests.tuner.model.networks import written
from tests.tuner.model.qdq import quantised
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.calibration.data import load_data
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import copy_of, fused_nodes, plugin_inputs, plugin_settings
from tilewright.tuner.model.precision import lower as module
from tilewright.tuner.model.precision.lower import GIVEN, SLOWER, Lowered, error_of, kinds_for, lower
from tilewright.tuner.model.precision.rules import LAST
from tilewright.tuner.model.reading.read import read_model
from tilewright.tuner.model.verify.compare import Reference
from tilewright.tuner.model.verify.error_budget import Budget

DEVICE = resolve_device("sm_86")


class Case:
    """The network of the example, or another, fused, with data for calibration and for errors."""

    def __init__(
        self,
        folder: Path,
        dtype: str | None = None,
        files: Callable[[Path], tuple[Path, Path]] = written,
    ) -> None:
        model, data = files(folder)
        if dtype is not None:
            made = onnx.load(model)
            onnx.save(quantised(made, {"image": np.load(data)["image"][:2]}, dtype=dtype), model)
        self.original = read_model(model)
        self.fused = copy_of(self.original)
        fold(self.fused)
        fuse(self.fused)
        self.calibration, self.evaluation = load_data(str(data), self.original, count=12).split(4)
        self.resume = folder
        self.lines: list[str] = []

    def lower(self, kind: str, budget: str | None = None, device: str = "sm_86") -> tuple[Lowered, float]:
        with Reference(self.original, self.evaluation.feeds) as reference:
            found = lower(
                self.fused,
                resolve_device(device),
                kind=kind,
                calibration=self.calibration,
                reference=reference,
                budget=None if budget is None else Budget.parse(budget),
                key=f"{kind} {budget} {device}",
                resume=self.resume,
                tell=self.lines.append,
            )
            return found, error_of(reference.compare(found.model))


@pytest.fixture
def case(tmp_path) -> Case:
    return Case(tmp_path)


def kinds(found: Lowered) -> dict[str, str]:
    assert found.part is not None
    return {layer.node: layer.kind for layer in found.part.layers}


def test_fp32_without_a_budget_is_the_model_itself(case):
    found, error = case.lower("fp32")
    assert found.model is case.fused
    assert found.part is None
    assert error <= 1e-6


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_float_types_are_for_all_layers(case, kind):
    found, error = case.lower(kind)
    assert set(kinds(found).values()) == {kind}
    assert 1e-5 < error < {"fp16": 5e-3, "bf16": 5e-2}[kind]


def test_int8_is_for_the_layers_that_the_rules_let(case):
    found, error = case.lower("int8")
    assert kinds(found) == {"stem": "fp16", "block": "int8", "hidden": "int8", "head": "fp16"}
    assert found.part.calibration.samples == len(case.calibration)
    reasons = {layer.node: layer.reason for layer in found.part.layers}
    assert reasons["stem"].startswith("first layer")
    assert reasons["head"].startswith("last layer")
    block = next(node for node in fused_nodes(found.model) if node.name == "block")
    assert set(plugin_inputs(block)) >= {"x_scale", "w_scale"}
    assert error < 0.1


def test_a_bound_between_two_plans_keeps_the_layer_that_costs_most(case):
    everything, error = case.lower("int8")
    bound = error * 0.7
    found, reached = case.lower("int8", str(bound))
    assert reached <= bound
    assert list(kinds(found).values()).count("int8") < 2
    assert found.outcome is not None
    assert found.outcome.met
    points = found.part.pareto
    assert sum(point.chosen for point in points) <= 1
    assert [point.time_us for point in points] == sorted(point.time_us for point in points)
    assert everything.outcome is None


def test_a_bound_below_half_precision_takes_more_bits_everywhere(case):
    found, error = case.lower("fp16", "1e-5")
    assert set(kinds(found).values()) == {"fp32"}
    assert error <= 1e-5
    found, error = case.lower("auto", "1e-5")
    assert set(kinds(found).values()) == {"fp32"}
    assert any("fp16 alone is outside" in line for line in case.lines)


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_a_loose_bound_is_met_with_nothing_in_more_bits(case, kind):
    """What is no layer as well: a bound that the whole model meets makes the same of it as none."""
    found, error = case.lower(kind, "0.5")
    free, _ = case.lower(kind)
    assert error <= 0.5
    assert found.part.base == kind
    assert dtypes(found.model) == dtypes(free.model)


def test_where_nothing_is_inside_the_bound_no_layer_is_said_to_be(case):
    found, _ = case.lower("int8", "1e-12")
    assert not found.outcome.met
    reasons = {layer.node: layer.reason for layer in found.part.layers}
    assert reasons["block"] == reasons["hidden"] == "nothing tried is inside max=1e-12: this is nearest"


def test_auto_takes_the_fastest_inside_the_bound(case):
    found, error = case.lower("auto", "0.5")
    assert list(kinds(found).values()).count("int8") == 2
    assert error <= 0.5
    assert len(found.outcome.tried) == 1


def test_on_a_device_with_fp8_one_of_the_two_kinds_is_taken(case):
    found, _ = case.lower("auto", "0.5", "sm_89")
    assert len(set(kinds(found).values()) & {"int8", "fp8"}) == 1
    assert any(line.startswith("fp8: ") for line in case.lines)
    assert any(line.startswith("int8: ") for line in case.lines)


def test_ranges_that_were_moved_wrongly_are_left_out(case, monkeypatch):
    """A defect of the step that moves ranges must not reach the model."""
    true = module.quantise

    def doubled(model, feeds, kind, *, smoothing=True, **options):
        if smoothing:
            node = next(node for node in fused_nodes(model) if node.name == "block")
            weights = plugin_inputs(node)["w"]
            weights.const_value = ir.tensor(2 * weights.const_value.numpy(), name=weights.name)
        return true(model, feeds, kind, smoothing=False, **options)

    monkeypatch.setattr(module, "quantise", doubled)
    _, error = case.lower("int8")
    assert error < 0.1
    assert any("moved ranges changed results" in line for line in case.lines)


def test_kinds_of_devices():
    assert kinds_for("auto", DEVICE) == ("int8", "w4a16", "w8a16", "fp16", "fp32")
    assert kinds_for("auto", resolve_device("sm_90")) == ("int8", "fp8", "w4a16", "w8a16", "fp16", "fp32")
    assert kinds_for("auto", resolve_device("sm_75")) == ("fp16", "fp32")
    assert kinds_for("w4a16", DEVICE) == ("w4a16", "w8a16", "fp16", "fp32")
    assert kinds_for("bf16", DEVICE) == ("bf16", "fp32")


@pytest.mark.parametrize(("kind", "budget"), [("fp16", None), ("fp16", "0.01"), ("int8", None), ("int8", "0.1")])
def test_layers_near_the_end_of_the_range_stay_fp32(case, kind, budget):
    """The same network, with 20000 times as large numbers from its first layer on."""
    for layer in fused_nodes(case.fused):
        if layer.name != "stem":
            continue
        for name in ("w", "bias"):
            given = plugin_inputs(layer)[name]
            given.const_value = ir.tensor(given.const_value.numpy() * 20000, name=given.name)
    case.original = copy_of(case.fused)
    found, error = case.lower(kind, budget)
    assert error < (1e-2 if kind == "fp16" else 0.1)
    assert found.part is not None
    reasons = {layer.node: layer.reason for layer in found.part.layers}
    assert kinds(found)["stem"] == "fp16"
    assert kinds(found)["block"] == ("fp32" if kind == "fp16" else "int8")
    if kind == "fp16":
        assert "and fp16 ends at 6.55e+04" in reasons["block"]


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8", "auto"])
def test_layers_that_are_in_8_bits_stay_so(tmp_path: Path, kind: str) -> None:
    case = Case(tmp_path, "int8")
    found, error = case.lower(kind, "0.1" if kind == "auto" else None)
    assert kinds(found) == dict.fromkeys(("stem", "block", "hidden", "head"), "int8")
    assert {layer.reason for layer in found.part.layers} == {GIVEN}
    assert found.part.calibration is None
    assert error < 0.05
    for node in fused_nodes(found.model):
        assert {"x_scale", "w_scale"} <= set(plugin_inputs(node)) or {"a_scale", "b_scale"} <= set(plugin_inputs(node))
    assert case.lines[0] == "the model came quantised: 4 of 4 layers are in 8 bits, and no other gets them"


def test_fp32_is_fp32_of_a_model_in_8_bits_too(tmp_path: Path) -> None:
    case = Case(tmp_path, "int8")
    found, error = case.lower("fp32")
    assert found.model is case.fused
    assert error <= 1e-6


def test_steps_of_a_type_that_the_device_has_not_stay(tmp_path: Path) -> None:
    case = Case(tmp_path, "fp8e4m3")
    found, _ = case.lower("fp16")
    assert set(kinds(found).values()) == {"fp16"}
    assert {layer.reason for layer in found.part.layers} == {"the model has it in fp8e4m3, which needs sm_89"}
    assert not any(name.endswith("out_scale") for node in fused_nodes(found.model) for name in plugin_inputs(node))
    found, _ = case.lower("int8")  # which would quantise what is quantised
    assert set(kinds(found).values()) == {"fp16"}
    found, _ = case.lower("fp16", device="sm_89")
    assert set(kinds(found).values()) == {"fp8"}


def products(folder: Path, width: int = 512) -> tuple[Path, Path]:
    """Four layers of products of few rows, whose inputs are much alike, as files."""
    nodes = []
    for index, name in enumerate(("first", "second", "third", "head")):
        nodes.append(helper.make_node("MatMul", [f"h{index}", f"w{index}"], [f"m{index}"], name=name))
        if name != "head":
            nodes.append(helper.make_node("Relu", [f"m{index}"], [f"h{index + 1}"], name=f"relu{index}"))
    weights = {f"w{index}": normal(index, width, width) / np.float32(np.sqrt(width)) for index in range(3)}
    weights["w3"] = normal(3, width, 64) / np.float32(np.sqrt(width))
    patterns = normal(4, 24, 2, 8) @ normal(5, 8, width) / np.float32(np.sqrt(8))
    ir.save(model_of(nodes, {"h0": (2, width)}, ["m3"], weights), folder / "products.onnx")
    np.savez(folder / "rows.npz", h0=patterns.reshape(48, width))
    return folder / "products.onnx", folder / "rows.npz"


@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_weights_alone_are_quantised_in_all_products(tmp_path: Path, kind: str) -> None:
    case = Case(tmp_path, files=products)
    found, error = case.lower(kind)
    assert kinds(found) == {"first": kind, "second": kind, "third": kind, "head": "w8a16"}
    assert found.part.base == "fp16"
    assert found.part.calibration.methods == ("rounding",)
    assert f"{kind}: 4 of 4 layers" in case.lines
    assert {plugin_settings(node)["weights"] for node in fused_nodes(found.model) if node.name != "head"} == {
        "int4" if kind == "w4a16" else "none"
    }
    assert 1e-4 < error < {"w8a16": 0.01, "w4a16": 0.1}[kind]
    again = Case(tmp_path, files=products)
    _, repeated = again.lower(kind)
    assert repeated == error


def test_weights_are_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, files=products)
    _, error = case.lower("w4a16")

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "round_groups", forbidden)
    _, again = case.lower("w4a16")
    assert again == error


def test_a_bound_between_4_and_8_bits_raises_the_weights_that_cost_most(tmp_path: Path) -> None:
    case = Case(tmp_path, files=products)
    (_, four), (_, eight) = case.lower("w4a16"), case.lower("w8a16")
    assert eight < four / 4
    found, error = case.lower("w4a16", str(four * 0.8), "l4")  # of little bandwidth
    assert error <= four * 0.8
    assert set(kinds(found).values()) == {"w4a16", "w8a16"}
    found, error = case.lower("w4a16", str(eight * 0.7), "l4")
    assert error <= eight * 0.7
    assert "fp16" in kinds(found).values()


def test_no_weights_are_unpacked_to_fp32(tmp_path: Path) -> None:
    case = Case(tmp_path, files=products)
    found, error = case.lower("w8a16", "1e-5")
    assert set(kinds(found).values()) == {"fp32"}
    assert error <= 1e-5


def many_rows(folder: Path, rows: int = 512, width: int = 64) -> tuple[Path, Path]:
    """Two products of many rows, the second of which weights of fewer bits make no faster, nor the first of a width of
    64, as files."""
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["m"], name="first"),
        helper.make_node("Relu", ["m"], ["h"], name="relu"),
        helper.make_node("MatMul", ["h", "w1"], ["y"], name="head"),
    ]
    weights = {"w0": normal(1, 256, width) / 16, "w1": normal(2, width, 48) / np.float32(np.sqrt(width))}
    ir.save(model_of(nodes, {"x": (rows, 256)}, ["y"], weights), folder / "rows.onnx")
    np.savez(folder / "rows.npz", x=normal(3, 12 * rows, 256))
    return folder / "rows.onnx", folder / "rows.npz"


def test_a_rule_is_no_reason_for_a_kind_that_it_does_not_give(tmp_path: Path) -> None:
    """It would give the last layer 8 bits."""
    found, _ = Case(tmp_path, files=many_rows).lower("w4a16", "0.5")
    assert kinds(found) == {"first": "fp16", "head": "fp16"}
    assert {layer.reason for layer in found.part.layers} == {SLOWER}
    found, _ = Case(tmp_path, files=many_rows).lower("w4a16")
    assert [(layer.kind, layer.reason) for layer in found.part.layers][-1] == ("w8a16", LAST)


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The kinds of the layers that were rounded, for each time that any are."""
    true, plans = module.round_groups, []

    def noted(model, plan, *rest, **options):
        plans.append({layer: precision.kind for layer, precision in plan.items()})
        return true(model, plan, *rest, **options)

    monkeypatch.setattr(module, "round_groups", noted)
    return plans


def test_layers_that_it_makes_no_faster_are_not_rounded(tmp_path: Path, rounded: list[dict[str, str]]) -> None:
    found, _ = Case(tmp_path, files=many_rows).lower("w4a16", "0.5")
    assert set(kinds(found).values()) == {"fp16"}
    assert not any(rounded)
    assert found.part.calibration is None


def test_8_bits_are_rounded_of_the_layers_that_may_have_them_instead_of_4(
    tmp_path: Path, rounded: list[dict[str, str]]
) -> None:
    case = Case(tmp_path, files=partial(many_rows, rows=2048, width=256))
    found, _ = case.lower("w4a16", "0.05")
    assert kinds(found) == {"first": "w8a16", "head": "fp16"}
    assert rounded == [{"first": "w4a16"}, {"first": "w8a16"}]
    assert found.part.calibration.methods == ("rounding",)


def test_what_was_rounded_for_other_layers_is_made_anew(tmp_path: Path, rounded: list[dict[str, str]]) -> None:
    case = Case(tmp_path, files=many_rows)
    case.lower("w8a16")
    next(iter(fused_nodes(case.fused))).name = "another"
    found, _ = case.lower("w8a16")
    assert [list(plan) for plan in rounded] == [["first", "head"], ["another", "head"]]
    assert kinds(found) == {"another": "w8a16", "head": "w8a16"}


def test_auto_takes_weights_alone_where_that_is_faster(tmp_path: Path) -> None:
    found, _ = Case(tmp_path, files=products).lower("auto", "0.5", "l4")
    assert list(kinds(found).values()).count("w4a16") == 3


def test_auto_rounds_no_weights_alone_where_that_is_slower(case: Case) -> None:
    found, _ = case.lower("auto", "0.5")
    assert "w4a16" not in kinds(found).values()
    assert not any(line.startswith("w4a16") for line in case.lines)


def test_what_comes_near_the_range_keeps_its_weights(tmp_path: Path) -> None:
    case = Case(tmp_path, files=products)
    second = next(node for node in fused_nodes(case.fused) if node.name == "second")
    weights = plugin_inputs(second)["b"]
    weights.const_value = ir.tensor(weights.const_value.numpy() * 1e5, name=weights.name)
    case.original = copy_of(case.fused)
    found, error = case.lower("w4a16")
    reasons = {layer.node: layer.reason for layer in found.part.layers}
    assert kinds(found) == {"first": "w4a16", "second": "w4a16", "third": "fp32", "head": "fp32"}
    assert "fp16 ends at 6.55e+04" in reasons["third"]
    assert error < 0.1

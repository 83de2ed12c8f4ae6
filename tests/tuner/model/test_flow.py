"""The whole way, on a small network: what is written, what is said, and what is left behind when it can't go on."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from examples.model import images
from tests.tuner.model.files import node, proto, saved, tensor, value
from tests.tuner.model.fuse.forms import LEAST, B, Graph, S, attend, scores, triangle
from tests.tuner.model.graphs import normal
from tests.tuner.model.networks import written
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model import flow
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.flow import optimise, plan
from tilewright.tuner.model.fuse import norms, rms_norms
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs
from tilewright.tuner.model.output_folder import RESUME
from tilewright.tuner.model.precision import lower as precision
from tilewright.tuner.model.prepare import Prepared, prepare
from tilewright.tuner.model.request import Request
from tilewright.tuner.model.verify.compare import Comparison
from tilewright.tuner.model.verify.error_sums import OutputError
from tilewright.tuner.tune import TuningOptions
from tilewright.tuning_db.errors import MissingDependencyError, ModelError, RunError, UsageError

LAYERS = {"stem", "block", "hidden", "head"}


class Listener:
    """What a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.events = 0

    def tell(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def progress(self, event: object) -> None:
        self.events += 1


@pytest.fixture(autouse=True)
def databases(monkeypatch, model_db):
    monkeypatch.setenv("TILEWRIGHT_DB_DIR", str(model_db))


def request(model: Path, output: Path | None, device: str = "sm_86", **options: object) -> Request:
    return Request.parse(model, output, resolve_device(device), tuning=TuningOptions(trials=1, jobs=2), **options)


def run(asked: Request) -> tuple[flow.Made, Listener]:
    listener = Listener()
    return optimise(asked, listener.tell, listener.warn, listener.progress), listener


def outputs(file: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": x})[0])


def test_the_whole_way(tmp_path):
    model, data = written(tmp_path)
    folder = tmp_path / "build"
    made, listener = run(request(model, folder, calibration=str(data), precision="int8", max_error="top1=0.9,max=0.2"))
    assert made.met
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "model.fused.onnx", "model.int8.onnx", "report.json", "report.html", "README.md", ".resume",
    }  # fmt: skip
    x = images(2, seed=5)
    original = outputs(model, x)
    assert np.abs(outputs(folder / "model.fused.onnx", x) - original).max() <= 1e-5 * original.max()
    assert np.abs(outputs(folder / "model.int8.onnx", x) - original).max() <= 0.2 * original.max()
    for name in ("model.fused.onnx", "model.int8.onnx"):
        onnx.checker.check_model(folder / name, full_check=True)
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(made.document)
    assert {layer["node"] for layer in report["fusion"]["layers"]} == LAYERS
    assert report["workloads"]["coverage"] == 1
    assert {layer["node"]: layer["kind"] for layer in report["precision"]["layers"]}["stem"] == "fp16"
    assert "int8" in {layer["kind"] for layer in report["precision"]["layers"]}
    assert {row["provenance"] for row in report["tuning"]} == {"predicted"}
    assert report["estimate"]["after"]["provenance"] == "predicted"
    assert [part["model"] for part in report["errors"]] == ["model.fused.onnx", "model.int8.onnx"]
    assert {row["value"] for row in report["errors"][0]["comparison"]["layers"]} == {"r1", "r2", "r3", "logits"}
    assert not listener.warnings
    assert listener.events
    assert "predicted" in made.lines[0]
    # Once more: scales, plans and configurations are known, and the files come out the same.
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    again, _ = run(request(model, folder, calibration=str(data), precision="int8", max_error="top1=0.9,max=0.2"))
    assert again.met
    assert before == {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_what_a_killed_run_has_measured_is_kept(tmp_path, monkeypatch):
    model, data = written(tmp_path)
    asked = request(model, tmp_path / "build", calibration=str(data), precision="auto", max_error="0.05")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(flow, "tune", killed)
        with pytest.raises(KeyboardInterrupt):
            run(asked)
    assert {path.name for path in (tmp_path / "build").iterdir()} == {".resume"}
    with monkeypatch.context() as patch:
        patch.setattr(precision, "quantise", killed)
        made, listener = run(asked)
    assert made.met
    assert not [line for line in listener.lines if "plans tried" in line]


def test_random_data_is_warned_of(tmp_path):
    model, _ = written(tmp_path)
    made, listener = run(request(model, tmp_path / "build", precision="fp32"))
    assert "random" in listener.warnings[0]
    assert {path.name for path in (tmp_path / "build").iterdir()} >= {"model.fused.onnx", "report.json"}
    assert not (tmp_path / "build" / "model.fp32.onnx").exists()
    assert made.report.precision is None
    assert len(made.report.errors) == 1


def test_a_budget_that_is_missed_is_said_to_be(tmp_path):
    model, data = written(tmp_path)
    made, _ = run(request(model, tmp_path / "build", calibration=str(data), precision="fp16", max_error="sqnr=300"))
    assert not made.met
    assert any("outside the error budget" in line and "sqnr" in line for line in made.lines)
    assert made.report.errors[-1].breaches


def product(
    path: Path,
    *more: onnx.NodeProto,
    outputs: dict[str, int],
    factor: float = 1.0,
    made: str = "m",
    **arrays: object,
) -> Path:
    """m = x·w of (2, 3) and (3, 32), or what it is called, and what is made of it."""
    tensors = [tensor("w", factor * normal(0, 3, 32)), *(tensor(name, array) for name, array in arrays.items())]
    kinds = [value(name, None, kind) for name, kind in outputs.items()]
    return saved(proto([node("MatMul", "x w", made), *more], outputs=kinds, tensors=tensors), path / "m.onnx")


def test_a_model_that_can_not_be_run_leaves_nothing(tmp_path):
    model = product(tmp_path, node("CumSum", "m axis", "y"), outputs={"y": 1}, axis=np.int64(7))
    with pytest.raises(RunError, match="ONNX Runtime failed"):
        run(request(model, tmp_path / "build"))
    assert not (tmp_path / "build").exists()


def spoiling(factor: float) -> object:
    """`prepare`, but for the first fused node's weights."""

    def spoiled(asked: Request, tell: object) -> Prepared:
        found = prepare(asked, tell)
        weights = plugin_inputs(fused_nodes(found.fused)[0])["b"]
        weights.const_value = ir.tensor(np.float32(factor) * weights.const_value.numpy(), name=weights.name)
        return found

    return spoiled


def test_a_fused_model_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    """And what a run before has left stays as it is."""
    model = product(tmp_path, node("Relu", "m", "y"), outputs={"y": 1})
    run(request(model, tmp_path / "build", precision="fp32"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "build").iterdir() if path.is_file()}
    monkeypatch.setattr(flow, "prepare", spoiling(-1))
    said = r"its fused form computes something else, .*: 'y' differs by \d\.\de.* nothing was written$"
    with pytest.raises(RunError, match=said):
        run(request(model, tmp_path / "build", precision="fp32"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "build").iterdir() if path.is_file()}


NORM = (
    node("ReduceMean", "m last", "mean"),
    node("Sub", "m mean", "d"),
    node("Pow", "d two", "square"),
    node("ReduceMean", "square last", "variance"),
    node("Add", "variance epsilon", "sum"),
    node("Sqrt", "sum", "root"),
    node("Div", "d root", "y"),
)
"""A norm of what `product` gives, as exporters write it out up to opset 16."""


@pytest.mark.parametrize("wrong", [False, True])
def test_a_norm_that_is_written_as_one_node_is_held_against_the_original(tmp_path, monkeypatch, wrong):
    model = product(tmp_path, *NORM, outputs={"y": 1}, epsilon=np.float32(1e-5), last=np.int64([-1]), two=np.float32(2))
    asked = request(model, tmp_path / "build", precision="fp32")
    if not wrong:
        made, _ = run(asked)
        assert made.report.fusion.patterns["layer_norm"] == 1
        assert [row.value for row in made.report.errors[0].comparison.layers] == ["m", "y"]
        return
    monkeypatch.setattr(norms, "_of_shape", twice(norms._of_shape))
    with pytest.raises(RunError, match=r"its fused form computes something else, .*: 'y' differs"):
        run(asked)


def twice(made):
    """Of what makes a constant, one that makes it twice as large."""

    def larger(edit: Editor, value: ir.Value | None, *rest: object) -> ir.Value:
        found = made(edit, value, *rest)
        return edit.constant(2 * found.const_value.numpy(), f"{found.name}_twice")

    return larger


def test_a_model_that_default_options_refuse_is_not_written(tmp_path, monkeypatch):
    """ONNX Runtime fuses a norm that is written out, and fails where a cast is before it (1.32)."""
    for rules in (norms, rms_norms):
        monkeypatch.setattr(rules, "apply", lambda *_: None)
    nodes = [*NORM[:-1], node("Div", "d root", "q"), node("Mul", "q scale", "s"), node("Add", "s bias", "y")]
    slice_ = node("Slice", "w_x zero one zero", "m")
    arrays = {
        "epsilon": np.float32(1e-5),
        "last": np.int64([-1]),
        "two": np.float32(2),
        "zero": np.int64([0]),
        "one": np.int64([1]),
    }
    arrays |= {"scale": normal(1, 32), "bias": normal(2, 32)}
    model = product(tmp_path, slice_, *nodes, outputs={"y": 1}, made="w_x", **arrays)
    said = (
        r"^model\.fp16\.onnx: ONNX Runtime can't load it: .* with which it runs m\.onnx; no model was written; --prec"
    )
    with pytest.raises(RunError, match=said):
        run(request(model, tmp_path / "build"))
    assert [path.name for path in (tmp_path / "build").iterdir()] == [".resume"]


def test_a_model_that_default_options_refuse_as_it_is_is_warned_of(tmp_path):
    """Quantisation of int8 before a `MaxPool`, at opset 21 (ONNX Runtime 1.32)."""
    nodes = [
        node("Reshape", "m square", "r"),
        node("QuantizeLinear", "r s z", "q"),
        node("DequantizeLinear", "q s z", "d"),
        node("MaxPool", "d", "p", kernel_shape=[2, 2]),
        node("Conv", "p v", "y"),
    ]
    arrays = {"square": np.int64([1, 1, 8, 8]), "s": np.float32(0.05), "z": np.int8(0), "v": normal(1, 1, 1, 1, 1)}
    model = product(tmp_path, *nodes, outputs={"y": 1}, **arrays)
    made, listener = run(request(model, tmp_path / "build", precision="fp32"))
    (line,) = [line for line in listener.warnings if "optimisations on" in line]
    assert line.startswith(
        "with its optimisations on ONNX Runtime doesn't run m.onnx, and so not model.fused.onnx: ONNX"
    )
    assert line in made.report.warnings


def test_a_model_that_amplifies_rounding_is_warned_of(tmp_path, monkeypatch):
    """Its second layer gets other inputs than the original's, and is right."""
    nodes = [node("Mul", "m large", "b"), node("Sin", "b", "s"), node("MatMul", "s v", "y")]
    arrays = {"large": np.float32(1e6), "v": normal(1, 32, 4)}
    model = product(tmp_path, *nodes, outputs={"y": 1}, **arrays)
    monkeypatch.setattr(flow, "prepare", spoiling(1 + 1e-4))
    made, listener = run(request(model, tmp_path / "build", precision="fp32"))
    assert made.met
    assert any(line.startswith("'y': differs by more than 1%") for line in listener.warnings)
    assert json.loads(made.document)["warnings"] == listener.warnings


@pytest.mark.parametrize("version", [3, 10])
def test_an_input_with_a_default_becomes_a_constant_and_is_warned_of(tmp_path, version):
    """Before IR version 4 every weight was one."""
    inputs = [value("x", (2, 3)), value("w", (3, 32)), value("s", (1,))]
    tensors = [tensor("w", normal(0, 3, 32)), tensor("s", np.ones(1, np.float32))]
    nodes = [node("MatMul", "x w", "m"), node("Mul", "m s", "y")]
    model = saved(proto(nodes, inputs=inputs, tensors=tensors, ir_version=version), tmp_path / "m.onnx")
    made, listener = run(request(model, tmp_path / "build", precision="fp32"))
    said = [line for line in listener.warnings if "becomes a constant" in line]
    assert len(said) == (version >= 4)
    assert all(line.startswith("'w', 's': input with a value in m.onnx, which becomes a constant") for line in said)
    assert json.loads(made.document)["warnings"] == listener.warnings
    for name in ("README.md", "report.html"):
        assert ("becomes a constant" in (tmp_path / "build" / name).read_text()) == (version >= 4)
    planned = plan(request(model, None, precision="fp32")).lines()
    assert [line for line in planned if "becomes a constant" in line] == said
    session = onnxruntime.InferenceSession(tmp_path / "build" / "model.fused.onnx", providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_inputs()] == ["x"]


@pytest.mark.parametrize("budget", [None, "0.1"])
@pytest.mark.parametrize("step", ["fuse", "smooth", "lower"])
def test_a_model_made_on_the_way_that_can_not_be_compared_fails_the_run(tmp_path, monkeypatch, step, budget):
    """Neither the model nor its data are at fault, and what a run before has left stays."""
    model = product(tmp_path, node("Relu", "m", "y"), outputs={"y": 1})
    asked = request(model, tmp_path / "build", precision="int8", max_error=budget)
    run(asked)
    before = {path.name: path.read_bytes() for path in (tmp_path / "build").iterdir() if path.is_file()}
    for name in ("int8.npz", "precision.sqlite"):  # what the next run would go on from
        (tmp_path / "build" / ".resume" / name).unlink(missing_ok=True)

    def renamed(made: ir.Model) -> ir.Model:
        made.graph.outputs[0].name = "other"
        return made

    if step == "fuse":
        monkeypatch.setattr(
            flow, "prepare", lambda *given: replace(found := prepare(*given), fused=renamed(found.fused))
        )
    elif step == "smooth":
        quantise = precision.quantise
        monkeypatch.setattr(
            precision, "quantise", lambda made, *given, **named: quantise(renamed(made), *given, **named)
        )
    else:
        lowered = precision.apply_precision
        monkeypatch.setattr(precision, "apply_precision", lambda *given, **named: renamed(lowered(*given, **named)))
    with pytest.raises(
        RunError, match=r"a defect of Tilewright: the changed model has no output 'y': .*; no model was w"
    ):
        run(asked)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "build").iterdir() if path.is_file()}


def test_a_large_error_without_a_budget_is_warned_of(tmp_path):
    model, data = written(tmp_path)
    asked = request(model, tmp_path / "build", calibration=str(data), precision="int8")
    made, listener = run(asked)
    assert made.met
    assert not listener.warnings
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "LARGE_ERROR", 1e-6)
        made, listener = run(asked)
    assert json.loads(made.document)["warnings"] == listener.warnings
    assert "is off by more than 0% of its largest value: --max-error bounds that" in listener.warnings[-1]


def test_what_a_budget_does_not_bound_is_warned_of(tmp_path):
    """top1 says nothing of boxes beside logits, nor max of class ids."""

    def row(name: str, error: float, **fields: object) -> OutputError:
        return replace(OutputError(name, name, False, False, error, None, error, 1.0, 9.0, None, 0, 0), **fields)

    ids = row("ids", 0.0, relative=None, top1=0.5, discrete=True)
    found = Comparison(8, (row("logits", 0.2, top1=1.0, rows=8), row("boxes", 0.3, judged=False), ids), ())

    def warned(budget: str | None, comparison: Comparison = found) -> list[str]:
        return flow._error_warnings(request(tmp_path / "m.onnx", None, max_error=budget), "m", comparison)

    sized = "of m is off by more than 10% of its largest value"
    assert warned("top1=0.5") == [f"'boxes' {sized}: top1=0.5 bounds nothing of that"]
    assert warned("max=0.4") == ["'ids' of m differs in more than 10% of its integers: max=0.4 bounds nothing of that"]
    assert warned("max=0.4,top1=0.5") == []
    assert [line.split(" of m ")[0] for line in warned(None)] == ["'logits', 'boxes'", "'ids'"]
    # Beside zeros it is the number itself.
    zeros = Comparison(8, (row("y", 0.2, relative=None),), ())
    assert warned(None, zeros) == [f"'y' {sized}: --max-error bounds that"]
    assert precision.error_of(zeros) == 0.2


def test_errors_are_measured_on_a_quarter_of_many_inputs(tmp_path):
    """And where that is too few for a share of rows, it is said once."""

    def kept(count: int, budget: str | None = None) -> int:
        return flow._evaluation(request(tmp_path / "m.onnx", None, max_error=budget), range(count))  # type: ignore[arg-type]

    assert [kept(count) for count in (2, 32, 33, 36, 400, 10_000)] == [8, 8, 8, 9, 100, 128]
    assert [kept(count, "top1=0.999") for count in (400, 4000, 10_000)] == [100, 1000, 1000]
    row = OutputError("y", "y", False, False, 0.0, None, 0.0, 1.0, None, 1.0, 0, 0, rows=8)

    def said(budget: str | None, rows: int) -> str | None:
        found = Comparison(rows, (replace(row, rows=rows),), ())
        return flow._few_rows(request(tmp_path / "m.onnx", None, max_error=budget), found)

    assert said("top1=0.99", 8) == (
        "top1=0.99 is judged on 8 rows of 'y', none of which may differ: it takes 100 to tell it, so give more inputs, "
        "with --samples"
    )
    assert said("top1=0.9", 9)
    assert [said("top1=0.99", 100), said("top1=0.9", 10), said("top1=1", 8), said("max=0.1", 8), said(None, 8)] == [
        None
    ] * 5


@pytest.mark.parametrize("failing", ["write_model", "write_readme", "write_page"])
@pytest.mark.parametrize("error", [UsageError("the disk is full"), OSError(5, "Input/output error")])
def test_a_run_that_fails_while_it_writes_leaves_what_was_there(tmp_path, monkeypatch, failing, error):
    """Which is a failure of the run, and nothing that its arguments could mend."""
    model = product(tmp_path, node("Relu", "m", "y"), outputs={"y": 1})
    build = tmp_path / "build"
    run(request(model, build, precision="fp32"))
    before = {path.name: path.read_bytes() for path in build.iterdir() if path.is_file()}

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(flow, failing, full)
    with pytest.raises(
        RunError, match=r"(disk is full|build can't be written \(Input.*\)); what was in .* is there still"
    ):
        run(request(model, build, precision="fp32"))
    assert before == {path.name: path.read_bytes() for path in build.iterdir() if path.is_file()}
    assert not (build / RESUME / "new").exists()


def test_the_end_lists_what_was_written(tmp_path):
    """And nothing else that lies there, as the model itself."""
    build = tmp_path / "build"
    build.mkdir()
    model = product(build, node("Relu", "m", "y"), outputs={"y": 1})
    made, _ = run(request(model, build, precision="fp32"))
    assert made.lines[-1] == f"written to {build}: README.md, model.fused.onnx, report.html, report.json"


@pytest.mark.parametrize("opset", [17, 21])
def test_reports_have_the_opset_of_the_file(tmp_path, opset):
    model = saved(proto([node("Relu", "x", "y")], opset=opset), tmp_path / "m.onnx")
    made, _ = run(request(model, tmp_path / "build", precision="fp32"))
    assert (made.report.model.opset, made.report.model.read_opset) == (opset, 21)
    page = (tmp_path / "build" / "report.html").read_text()
    assert f"Opset {opset}{' (read as 21)' if opset == 17 else ''}, 1 nodes" in page


def test_what_the_time_before_is_of_is_said_wherever_it_is(tmp_path):
    model = product(tmp_path, node("Relu", "m", "y"), outputs={"y": 1})
    made, _ = run(request(model, tmp_path / "build", precision="fp32"))
    said = "every node by itself, in its own type, nothing fused"
    assert said in made.lines[0]
    for name in ("README.md", "report.html"):
        assert said in (tmp_path / "build" / name).read_text()


def test_an_infinite_error_is_null_in_the_report(tmp_path, monkeypatch):
    """Of a plan that gives NaN or infinities: JSON has neither."""
    model = product(tmp_path, node("Relu", "m", "y"), outputs={"y": 1})
    monkeypatch.setattr(precision, "error_of", lambda _: np.inf)
    made, _ = run(request(model, tmp_path / "build", precision="fp16", max_error="0.1"))
    points = json.loads(made.document)["precision"]["pareto"]
    assert points
    assert all(point["error"] is None for point in points)


def test_masked_logits_are_inside_a_budget(tmp_path):
    """-∞ where the original has it; the report says so in JSON."""
    mask = np.where(np.arange(32) == 3, -np.inf, 0).astype(np.float32)
    model = product(tmp_path, node("Add", "m mask", "y"), outputs={"y": 1}, mask=mask)
    made, _ = run(request(model, tmp_path / "build", precision="fp32", max_error="0.01"))
    assert made.met
    (row,) = json.loads(made.document)["errors"][-1]["comparison"]["outputs"]
    assert row["bad_original"] > 0
    assert row["bad_changed"] == 0


def test_results_of_unknown_size_go_the_whole_way(tmp_path):
    nodes = [node("Relu", "m", "r"), node("NonZero", "r", "y")]
    made, _ = run(request(product(tmp_path, *nodes, outputs={"y": 7, "m": 1}), tmp_path / "build", precision="fp32"))
    assert made.met
    assert made.report.memory.after.unknown_values == 1


@pytest.mark.parametrize("budget", [None, "0.1"])
def test_an_output_whose_size_rounding_changes_is_no_defect(tmp_path, budget):
    nodes = [node("Mul", "m large", "a"), node("Sin", "a", "s"), node("Relu", "s", "r"), node("NonZero", "r", "y")]
    model = product(tmp_path, *nodes, outputs={"y": 7}, large=np.float32(1e3))
    said = r"^'y' is \(2, \d+\) in the original and \(2, \d+\) in the changed model, as rounding changes its size: use"
    with pytest.raises(RunError, match=said):
        run(request(model, tmp_path / "build", precision="fp16", max_error=budget))
    assert {path.name for path in (tmp_path / "build").iterdir()} == {".resume"}


def test_outputs_of_one_value_go_the_whole_way(tmp_path):
    nodes = [node("Identity", "m", "a"), node("Dropout", "m", "b")]
    outputs = {"b": 1, "m": 1, "a": 1, "x": 1, "w": 1}
    run(request(product(tmp_path, *nodes, outputs=outputs), tmp_path / "build"))
    for name in ("model.fused.onnx", "model.fp16.onnx"):
        session = onnxruntime.InferenceSession(tmp_path / "build" / name, providers=["CPUExecutionProvider"])
        assert [output.name for output in session.get_outputs()] == list(outputs)


def test_what_passes_the_range_on_calibration_data_stays_fp32(tmp_path):
    model = product(tmp_path, node("MatMul", "m v", "y"), outputs={"y": 1}, factor=2e4, v=normal(1, 32, 4))
    made, _ = run(request(model, tmp_path / "build"))
    assert made.met
    assert {layer.kind for layer in made.report.precision.layers} == {"fp16", "fp32"}


def test_new_infinities_fail_a_run_without_a_budget(tmp_path):
    model = product(tmp_path, node("MatMul", "m v", "y"), outputs={"y": 1}, factor=2e4, v=normal(1, 32, 4))
    # Scales and ranges are those of the first input, errors those of the second.
    np.savez(tmp_path / "data.npz", x=np.stack([1e-3 * normal(2, 2, 3), normal(3, 2, 3)]))
    made, listener = run(request(model, tmp_path / "build", calibration=str(tmp_path / "data.npz")))
    assert not made.met
    assert listener.warnings[-1] == (
        "'y' of model.fp16.onnx has other NaN or infinities than the original: --precision bf16 or fp32 has the range"
    )
    made, _ = run(request(model, tmp_path / "bf16", precision="bf16"))
    assert made.met


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "auto"])
def test_a_model_without_layers_is_judged(tmp_path, precision):
    model = saved(proto([node("Exp", "x", "y")]), tmp_path / "m.onnx")
    made, _ = run(request(model, tmp_path / "build", precision=precision, max_error="0.01"))
    assert made.met
    assert made.report.errors[-1].budget == "max=0.01"
    made, _ = run(request(model, tmp_path / "build", precision=precision, max_error="sqnr=400"))
    assert made.met  # in fp32, which is exact


def test_a_dry_run_checks_the_data_as_the_run_does(tmp_path):
    model, _ = written(tmp_path)
    np.savez(tmp_path / "one.npz", image=images(2, seed=5))
    asked = request(model, tmp_path / "build", calibration=str(tmp_path / "one.npz"))
    for do in (plan, optimise):
        with pytest.raises(ModelError, match="at least 2 are needed"):
            do(asked)


def test_names_that_are_commands_to_a_terminal_are_escaped(tmp_path):
    product = node("MatMul", "x w", "y\x1b[31m")
    product.name = "blk[/0]/mm\n" * 30
    tensors = [tensor("w", normal(0, 3, 32))]
    model = saved(proto([product], outputs=[value("y\x1b[31m", None)], tensors=tensors), tmp_path / "m.onnx")
    made, _ = run(request(model, tmp_path / "build", max_error="0"))
    assert any("error of 'y\\x1b[31m'" in line for line in made.lines)
    assert all(line.isprintable() for line in made.lines)


def test_a_dry_run_writes_nothing(tmp_path):
    model, data = written(tmp_path, batch="batch")
    before = sorted(tmp_path.rglob("*"))
    listener = Listener()
    planned = plan(request(model, None, shapes=["batch=2"], calibration=str(data), precision="int8"), listener.tell)
    assert sorted(tmp_path.rglob("*")) == before
    assert {row["first"] for row in planned.workloads.rows()} == LAYERS
    assert planned.to_dict()["coverage"] == 1
    assert any("4 distinct workloads" in line for line in planned.lines())
    assert any("model.int8.onnx" in line for line in planned.lines())
    assert {row.operator for row in planned.rest} == {"GlobalAveragePool", "Softmax"}
    (line,) = [line for line in planned.lines() if line.startswith("what is not fused")]
    whole = sum(row.share for row in planned.rest)
    assert line.startswith(f"what is not fused takes {whole:.1%} of the predicted time: GlobalAveragePool ")
    assert line.endswith("% (1) (before layers are lowered)")


def test_a_dry_run_of_fused_nodes_alone_says_so(tmp_path):
    graph = proto([node("MatMul", "x w", "y")], inputs=[value("x", (2, 3))], tensors=[tensor("w", normal(0, 3, 16))])
    planned = plan(request(saved(graph, tmp_path / "m.onnx"), None))
    assert "what is not fused takes no time of its own" in planned.lines()
    assert planned.to_dict()["rest"] == []


@pytest.mark.parametrize(("precision", "before"), [("fp32", False), ("fp16", True), ("int8", True)])
def test_a_dry_run_says_that_its_workloads_are_not_lowered_yet(tmp_path, precision, before):
    """Which of them are is for calibration to say; and what becomes a constant is there for programs too."""
    model, _ = written(tmp_path)
    planned = plan(request(model, None, precision=precision))
    (line,) = [line for line in planned.lines() if line.startswith("to tune for")]
    assert line.endswith(f", listed before they are lowered to {precision}") is before
    found = planned.to_dict()
    assert found["before_lowering"] is before
    assert {row["problem"]["dtype"] for row in found["workloads"]} == {"fp32"}
    assert found["defaults"] == []


def test_a_dry_run_names_inputs_that_become_constants(tmp_path):
    graph = proto(
        [node("MatMul", "x w", "y")],
        inputs=[value("x", (2, 3)), value("w", (3, 4))],
        tensors=[tensor("w", normal(0, 3, 4))],
    )
    assert plan(request(saved(graph, tmp_path / "m.onnx"), None)).to_dict()["defaults"] == ["w"]


def test_new_weights_in_an_old_place_are_a_new_model(tmp_path):
    """The model's own file is the same: its external data is another."""
    model, data = written(tmp_path)
    held = onnx.load(model)
    asked = request(tmp_path / "apart.onnx", tmp_path / "build", calibration=str(data), precision="int8")
    places = {"save_as_external_data": True, "location": "apart.data", "size_threshold": 64}
    found = []
    for factor in (1, -1):
        changed = onnx.ModelProto()
        changed.CopyFrom(held)
        for weight in changed.graph.initializer:
            if len(weight.dims) == 4:
                array = onnx.numpy_helper.to_array(weight)
                weight.CopyFrom(onnx.numpy_helper.from_array((factor * array).astype(array.dtype), weight.name))
        (tmp_path / "apart.data").unlink(missing_ok=True)
        onnx.save(changed, tmp_path / "apart.onnx", **places)
        made, _ = run(asked)
        found.append((tmp_path / "apart.onnx").read_bytes())
        assert made.report.errors[-1].comparison.outputs[0].relative < 0.1
    assert found[0] == found[1]


def test_fp8_on_a_device_that_has_it(tmp_path):
    model, data = written(tmp_path)
    made, _ = run(request(model, tmp_path / "build", "sm_89", calibration=str(data), precision="fp8"))
    kinds = {layer.node: layer.kind for layer in made.report.precision.layers}
    assert kinds["block"] == "fp8"
    assert made.report.errors[-1].comparison.outputs[0].relative < 0.2


@pytest.mark.parametrize(
    "error", [MissingDependencyError("no builder here"), RunError("no tactic for layer 1"), UsageError("no such node")]
)
def test_an_engine_that_can_not_be_built_takes_nothing_from_the_model(tmp_path, monkeypatch, error):
    asked = []

    def build(model, path, *, device, timing_cache, db):
        asked.append((model.name, path.name, str(timing_cache.relative_to(tmp_path)), device, db))
        raise error

    monkeypatch.setattr("tilewright.kernels.tensorrt.build_engine", build)
    present = replace(resolve_device("sm_86"), live="cuda:0")
    request = Request.parse(tmp_path / "m.onnx", tmp_path, present, tuning=TuningOptions(db="records"))
    lines: list[str] = []
    assert flow._engine(request, tmp_path / "model.fp16.onnx", tmp_path / RESUME, lines.append) == []
    assert asked == [("model.fp16.onnx", "model.fp16.engine", ".resume/timing.cache", "cuda:0", "records")]
    assert lines == [f"no engine was built: {error}"]
    absent = Request.parse(tmp_path / "m.onnx", tmp_path, resolve_device("sm_86"))
    assert flow._engine(absent, tmp_path / "model.fp16.onnx", tmp_path / RESUME, lines.append) == []
    assert len(lines) == len(asked) == 1


@pytest.mark.parametrize("pooled", [False, True])
def test_rows_that_see_no_key_are_told_of(tmp_path, monkeypatch, pooled):
    """Padding in front of a causal sequence; and an output that reads it, which is then another."""
    g = Graph()
    both = g("And", g.array(triangle(1) == 0, bool), g.input("mask", B, 1, 1, S, dtype="bool"))
    out = attend(g, g("Add", scores(g), g("Where", both, g.array(0.0), g.array(LEAST))))
    ir.save(g.model(g("ReduceMean", out, g.shape(2), keepdims=0) if pooled else out), tmp_path / "causal.onnx")
    feed = g.feeds()
    feed["mask"] = np.ones((B, 1, 1, S), bool)
    feed["mask"][1, ..., :2] = False
    np.savez(tmp_path / "data.npz", **{name: np.concatenate([array] * 2) for name, array in feed.items()})
    monkeypatch.setattr(flow, "_optimised", lambda *_: None)
    listener = Listener()
    asked = request(tmp_path / "causal.onnx", tmp_path / "out", calibration=tmp_path / "data.npz", precision="fp32")
    optimise(asked, warn=listener.warn)
    rows = "2 rows of the inputs that errors are measured on see no key, .*: they are left out of the errors"
    reading = ".*differs by more than 1% .*, or an output makes something of those rows"
    for line, wanted in zip(listener.warnings, [rows, *([reading] if pooled else [])], strict=True):
        assert re.fullmatch(wanted, line)

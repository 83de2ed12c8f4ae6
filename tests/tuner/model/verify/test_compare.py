"""One model against another: what is compared, what a budget says to it, and that a broken layer is seen."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal
from tilewright.tuner.model.bodies import attach_bodies
from tilewright.tuner.model.graph import fused_nodes, make_fused, plugin_inputs
from tilewright.tuner.model.verify import compare as verify
from tilewright.tuner.model.verify.compare import Comparison, Reference, compare, logits_of
from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuner.model.verify.error_sums import OutputError
from tilewright.tuning_db.errors import ModelError, RunError

Array = np.ndarray[Any, Any]
BAR = 1e-5
"""Relative error that fused fp32 models keep to."""

WIDTHS = (16, 32, 32, 10)
LAYERS = len(WIDTHS) - 1


def weights() -> dict[str, Array]:
    """He-initialised, with biases: layers that all matter to the result."""
    found = {}
    for index, (rows, columns) in enumerate(pairwise(WIDTHS)):
        found[f"w{index}"] = normal(index, rows, columns) * np.float32(np.sqrt(2 / rows))
        found[f"b{index}"] = normal(100 + index, columns) * np.float32(0.1)
    return found


def plain(*, softmax: bool = False) -> ir.Model:
    """A perceptron of MatMul, Add and Relu, with a softmax behind it if asked for."""
    nodes, last = [], "x"
    for index in range(LAYERS):
        nodes.append(helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"], f"matmul{index}"))
        nodes.append(helper.make_node("Add", [f"m{index}", f"b{index}"], [f"a{index}"], f"add{index}"))
        last = f"a{index}"
        if index < LAYERS - 1:
            nodes.append(helper.make_node("Relu", [last], [f"r{index}"], f"relu{index}"))
            last = f"r{index}"
    if softmax:
        nodes.append(helper.make_node("Softmax", [last], ["p"], "softmax"))
        last = "p"
    return model_of(nodes, {"x": (1, WIDTHS[0])}, [last], weights())


def fused(*, softmax: bool = False, zeroed: int | None = None) -> ir.Model:
    """The same with a fused node for every layer; the weights of one may be zeros."""
    model = plain(softmax=softmax)
    values = {value.name: value for node in model.graph for value in node.outputs} | {"x": model.graph.inputs[0]}
    ends = [f"r{index}" for index in range(LAYERS - 1)] + [f"a{LAYERS - 1}"]
    for index, (start, end) in enumerate(zip(["x", *ends], ends, strict=False)):
        chain = [node for node in model.graph if node.name in (f"matmul{index}", f"add{index}", f"relu{index}")]
        given = model.graph.initializers
        inputs = {"a": values[start], "b": given[f"w{index}"], "bias": given[f"b{index}"]}
        activation = "relu" if index < LAYERS - 1 else "none"
        node = make_fused("gemm", inputs, {"activation": activation}, name=f"layer{index}")
        old = values[end]
        new = node.outputs[0]
        new.name, new.shape, new.type = end, old.shape, old.type
        model.graph.insert_before(chain[0], node)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(list(reversed(chain)), safe=True)
        values[end] = new
        if index == zeroed:
            given[f"w{index}"].const_value = ir.tensor(np.zeros_like(weights()[f"w{index}"]), name=f"w{index}")
    attach_bodies(model)
    return model


def feeds(count: int = 12) -> list[dict[str, Array]]:
    return [{"x": normal(1000 + index, 1, WIDTHS[0])} for index in range(count)]


LAYER_NAMES = {"r0": "r0", "r1": "r1", "a2": "a2"}


def test_a_fused_model_keeps_to_the_bar() -> None:
    found = compare(plain(), fused(), feeds(), layers=LAYER_NAMES)
    (row,) = found.outputs
    assert (found.inputs, row.output, row.value, row.logits) == (12, "a2", "a2", False)
    assert row.relative is not None
    assert row.relative <= BAR
    assert row.centred_relative is not None
    assert row.centred_relative <= BAR
    assert row.top1 == 1.0
    assert found.finite
    assert [layer.value for layer in found.layers] == ["r0", "r1", "a2"]
    assert all(layer.relative is not None and layer.relative <= BAR for layer in found.layers)
    assert found.within(Budget(max=BAR, centred=BAR, cosine=0.999999, top1=1.0, sqnr=90.0))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_zeroing_any_layer_breaks_the_bar_ten_times(layer: int) -> None:
    """The negative control: errors that no bar could let pass, of each fused node in turn."""
    broken = fused(zeroed=layer)
    zeros = [node.name for node in fused_nodes(broken) if not plugin_inputs(node)["b"].const_value.numpy().any()]  # type: ignore[union-attr]
    assert zeros == [f"layer{layer}"]
    found = compare(plain(), broken, feeds(), layers=LAYER_NAMES)
    (row,) = found.outputs
    for error in (row.relative, row.centred_relative):
        assert error is not None
        assert error >= 10 * BAR
    assert not found.within(Budget(max=BAR))
    assert not found.within(Budget(sqnr=30.0))
    # It shows first where it is.
    first_off = next(each.value for each in found.layers if each.relative is not None and each.relative > BAR)
    assert first_off == list(LAYER_NAMES)[layer]


def test_logits_are_compared_behind_a_softmax() -> None:
    original, changed = plain(softmax=True), fused(softmax=True)
    assert {name: logits.value for name, logits in logits_of(original).items()} == {"p": "a2"}
    found = compare(original, changed, feeds(4))
    assert [(row.output, row.value, row.logits) for row in found.outputs] == [("p", "p", False), ("p", "a2", True)]


def test_logits_are_found_through_casts_and_changes_of_shape() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("LogSoftmax", ["m"], ["s"], axis=0),
        helper.make_node("Cast", ["s"], ["c"], to=1),
        helper.make_node("Unsqueeze", ["c", "axes"], ["y"]),
        helper.make_node("Relu", ["m"], ["z"]),
        helper.make_node("Softmax", ["x"], ["of_input"]),
    ]
    model = model_of(nodes, {"x": (2, 3)}, ["y", "z", "of_input"], {"w": normal(0, 3, 4), "axes": np.array([2])})
    assert logits_of(model) == {"y": verify.Logits("m", 0)}


def stub(values: Mapping[int, Sequence[Mapping[str, Array]]], calls: list[tuple[int, list[str]]]) -> verify.Runner:
    """A runner that gives what it is told to, by the identity of the model, and notes what it was asked."""

    def run(model: Any, feeds: Any, outputs: Sequence[str]) -> Iterator[dict[str, Array]]:
        calls.append((id(model), list(outputs)))
        for each in values[id(model)]:
            yield {name: each[name] for name in outputs}

    return run


class FullDisk(io.RawIOBase):
    """A file that has room for some bytes, and loses none of them."""

    def __init__(self, room: int) -> None:
        self.room, self.taken = room, 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, place: int, whence: int = 0) -> int:
        return place

    def write(self, content: Any) -> int:
        self.taken += len(content)
        if self.taken > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(content)


@pytest.mark.parametrize("room", [0, 200], ids=["from the start", "at the last bytes, which wait in a buffer"])
def test_a_full_folder_for_temporary_files_is_named(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = plain()
    monkeypatch.setattr(verify, "KEPT_BYTES", 1)
    monkeypatch.setattr(verify.tempfile, "TemporaryFile", lambda **_: io.BufferedRandom(FullDisk(room)))
    monkeypatch.setattr(verify.tempfile, "tempdir", "/scratch")
    values = {id(original): [{"a2": normal(index, 1, 10), "r2": normal(index, 1, 10)} for index in range(2)]}
    with (
        Reference(original, feeds(2), run=stub(values, [])) as reference,
        pytest.raises(
            RunError, match=r"^/scratch: No space left on device: make room, or name another folder in TMPDIR$"
        ),
    ):
        list(reference._originals())


def test_the_original_runs_once_for_many_changed_models() -> None:
    original, first, second = plain(), plain(), plain()
    made = {
        id(model): [{"a2": normal(seed + index, 1, 10)} for index in range(3)]
        for seed, model in ((0, original), (0, first), (50, second))
    }
    calls: list[tuple[int, list[str]]] = []
    with Reference(original, feeds(3), run=stub(made, calls)) as reference:
        assert reference.compare(first).outputs[0].exact
        found = reference.compare(second).outputs[0]
    assert found.relative is not None
    assert found.relative > 0.1
    assert [identity for identity, _ in calls] == [id(original), id(first), id(second)]


def test_entries_of_a_batch_are_inputs() -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (4, 5)}, ["y"], {})
    other = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (4, 5)}, ["y"], {})
    batch = normal(0, 4, 5)
    made = {id(model): [{"y": batch}], id(other): [{"y": batch + np.float32(0.5)}]}
    found = compare(model, other, [{"x": batch}], run=stub(made, []))
    assert found.inputs == 4
    centred = np.abs(batch - batch.mean(axis=0)).max()
    assert found.outputs[0].centred_relative == pytest.approx(0.5 / centred, rel=1e-5)


def test_layers_are_asked_for_in_groups_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LAYER_BYTES", 4 * 40)
    original, changed = plain(), plain()
    values = [{"r0": normal(0, 1, 32), "r1": normal(1, 1, 32), "m2": normal(2, 1, 10), "a2": normal(3, 1, 10)}]
    calls: list[tuple[int, list[str]]] = []
    layers = {"r0": "r0", "r1": "r1", "m2": "m2", "a2": "a2"}
    made = {id(original): values, id(changed): values}
    found = compare(original, changed, feeds(1), layers=layers, run=stub(made, calls))
    assert [each.value for each in found.layers] == list(layers)
    assert all(each.exact for each in found.layers)
    # 32 + 32 values are more than 40: r0 alone, then r1, then the two of 10.
    assert [names for identity, names in calls if identity == id(changed)][1:] == [["r0"], ["r1"], ["m2", "a2"]]


def test_files_are_compared_as_well_as_models(tmp_path: Path) -> None:
    for name, model in (("original.onnx", plain()), ("changed.onnx", fused())):
        ir.save(model, tmp_path / name)
    found = compare(tmp_path / "original.onnx", tmp_path / "changed.onnx", feeds(3), layers=LAYER_NAMES)
    assert found == compare(plain(), fused(), feeds(3), layers=LAYER_NAMES)


def test_a_comparison_is_json_and_always_the_same() -> None:
    texts = [json.dumps(compare(plain(), fused(), feeds(3)).to_dict(), allow_nan=False) for _ in range(2)]
    assert texts[0] == texts[1]
    assert list(json.loads(texts[0])) == ["inputs", "outputs", "layers"]


def outcome(changes: Mapping[str, float], *, names: Sequence[str] = ("y",)) -> Comparison:
    """Of two outputs of ten rows: the changed one with a value added here and there."""
    nodes = [helper.make_node("Relu", ["x"], [name]) for name in names]
    models = [model_of(nodes, {"x": (1, 5)}, list(names), {}) for _ in range(2)]
    base = [{name: normal(index, 1, 5) for name in names} for index in range(10)]
    other = [{name: array + np.float32(changes.get(name, 0.0)) for name, array in row.items()} for row in base]
    return compare(*models, feeds(10), run=stub({id(models[0]): base, id(models[1]): other}, []))


def test_a_breach_has_the_output_the_value_and_the_limit() -> None:
    found = outcome({"z": 0.5}, names=("y", "z"))
    row = found.outputs[1]
    assert found.breaches(Budget(max=0.01, cosine=0.5)) == (f"z: max={row.relative:.6g}, wanted at most 0.01",)
    (line,) = found.breaches(Budget(sqnr=60.0))
    assert line.startswith("z: sqnr=")
    assert line.endswith("wanted at least 60")


def test_nothing_that_can_be_told_is_no_excuse() -> None:
    models = [model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 5)}, ["y"], {}) for _ in range(2)]
    made = {id(models[0]): [{"y": normal(0, 1, 5)}], id(models[1]): [{"y": normal(1, 1, 5)}]}
    found = compare(*models, feeds(1), run=stub(made, []))
    assert found.breaches(Budget(centred=10.0)) == ("y: centred can't be told (1 input(s)), wanted 10",)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_break_any_budget(bad: float) -> None:
    found = outcome({"y": bad})
    assert not found.finite
    assert found.breaches(Budget())[0].startswith("y: NaN or infinite: 50 elements that are not so in both")
    assert not found.within(Budget(max=1e9))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_in_both_is_no_difference(bad: float) -> None:
    """Masked logits: -∞ at the same places. Elsewhere, or of the other sign, it is one."""
    models = [model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 5)}, ["y"], {}) for _ in range(2)]
    row = normal(0, 1, 5)
    row[0, 1] = bad
    elsewhere, opposite = np.roll(row, 1, axis=1), np.where(np.isfinite(row), row, -row)
    # Infinities count where they were as well as where they are now; NaN that became a number doesn't.
    for changed, count in ((row, 0), (elsewhere, 1 if np.isnan(bad) else 2), (opposite, 0 if np.isnan(bad) else 1)):
        found = compare(*models, feeds(1), run=stub({id(models[0]): [{"y": row}], id(models[1]): [{"y": changed}]}, []))
        (error,) = found.outputs
        assert (error.bad_original, error.bad_changed) == (1, count)
        assert found.finite == (not count)
        assert error.exact == (not count)
        assert found.within(Budget(max=1e9)) == (not count)


def test_where_there_is_nothing_but_nan_no_budget_is_met() -> None:
    models = [model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 5)}, ["y"], {}) for _ in range(2)]
    row = [{"y": np.full((1, 5), np.nan, np.float32)}]
    found = compare(*models, feeds(1), run=stub({id(models[0]): row, id(models[1]): row}, []))
    (error,) = found.outputs
    assert (error.relative, error.exact) == (None, False)
    assert found.breaches(Budget(top1=0.5))[0] == "y: NaN or infinite all over in both: there is nothing to compare"


def test_a_breach_by_a_hair_is_told_with_all_digits() -> None:
    models = [model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 5)}, ["y"], {}) for _ in range(2)]
    row = normal(0, 1, 5)
    made = {id(models[0]): [{"y": row}], id(models[1]): [{"y": row * (1 + normal(1, 1, 5) * 1e-5)}]}
    (line,) = compare(*models, feeds(1), run=stub(made, [])).breaches(Budget(cosine=1.0))
    assert line.startswith("y: cosine=0.99999")


@pytest.mark.parametrize(
    ("measures", "budget", "line"),
    [
        ({"cosine": 0.99999985}, Budget(cosine=0.9999999), "cosine=0.99999985, wanted at least 0.9999999"),
        ({"relative": 0.01000000012}, Budget(max=0.0100000001), "max=0.01000000012, wanted at most 0.0100000001"),
        ({"top1": 0.99999994}, Budget(top1=1.0), "top1=0.99999994, wanted at least 1"),
        ({"cosine": 0.5}, Budget(cosine=0.99), "cosine=0.5, wanted at least 0.99"),
        ({"relative": 0.123456789}, Budget(max=0.01), "max=0.123457, wanted at most 0.01"),
        ({"cosine": None}, Budget(cosine=0.9999999), "cosine can't be told (4 input(s)), wanted 0.9999999"),
    ],
)
def test_a_missed_limit_never_looks_as_if_it_were_met(
    measures: dict[str, float | None], budget: Budget, line: str
) -> None:
    row = OutputError("y", "y", False, False, 0.001, 0.0, 0.1, 1.0, 40.0, 1.0, 0, 0)
    assert Comparison(4, (replace(row, **measures),), ()).breaches(budget) == (f"y: {line}",)


def test_agreement_is_asked_of_logits_where_there_are_some() -> None:
    """The first output has classes too, by its shape, and they differ; the softmax tells which output's count."""
    nodes = [
        helper.make_node("Relu", ["x"], ["hidden"]),
        helper.make_node("Neg", ["x"], ["l"]),
        helper.make_node("Softmax", ["l"], ["p"]),
    ]
    models = [model_of(nodes, {"x": (1, 5)}, ["hidden", "p"], {}) for _ in range(2)]
    rows = [{"hidden": normal(index, 1, 5), "l": normal(index, 1, 5), "p": normal(index, 1, 5)} for index in range(4)]
    other = [{**row, "hidden": -row["hidden"]} for row in rows]
    found = compare(*models, feeds(4), run=stub({id(models[0]): rows, id(models[1]): other}, []))
    assert found.outputs[0].top1 is not None
    assert found.outputs[0].top1 < 1.0
    assert found.within(Budget(top1=1.0))


def several(outputs: Mapping[str, tuple[Array, Array]], nodes: Sequence[Any] = ()) -> Comparison:
    """Of what two models gave, with the inputs of a run in front."""
    made = nodes or [helper.make_node("Relu", [f"x_{name}"], [name]) for name in outputs]
    inputs = dict.fromkeys(("x",), (1, 1)) if nodes else {f"x_{name}": a.shape[1:] for name, (a, _) in outputs.items()}
    models = [model_of(made, inputs, list(outputs), {}) for _ in range(2)]
    count = len(next(iter(outputs.values()))[0])
    here, there = (
        [{name: pair[side][row] for name, pair in outputs.items()} for row in range(count)] for side in (0, 1)
    )
    return compare(*models, [{}] * count, run=stub({id(models[0]): here, id(models[1]): there}, []))


def test_heads_of_one_shape_are_judged_alike() -> None:
    """The start and the end of an answer; a vector of another size is no row of classes because the first has some."""
    a = normal(0, 8, 1, 5)
    wide = normal(1, 8, 1, 7)
    found = several({"start": (a, a), "end": (a, -a), "hidden": (wide, -wide)})
    assert [row.judged for row in found.outputs] == [True, True, False]
    (line,) = found.breaches(Budget(top1=0.9))
    assert line.startswith("end: top1=0")
    assert [row.output for row in found.unbounded(Budget(top1=0.9))] == ["hidden"]
    assert found.unbounded(Budget(cosine=0.9)) == ()
    assert found.unbounded(None) == found.outputs


def test_logits_that_are_an_output_themselves_are_told_by_the_softmax() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["hidden"]),
        helper.make_node("Neg", ["x"], ["l"]),
        helper.make_node("Softmax", ["l"], ["p"]),
    ]
    models = [model_of(nodes, {"x": (1, 5)}, ["hidden", "l", "p"], {}) for _ in range(2)]
    rows = [{name: normal(index, 1, 5) for name in ("hidden", "l", "p")} for index in range(4)]
    other = [{**row, "hidden": -row["hidden"]} for row in rows]
    found = compare(*models, feeds(4), run=stub({id(models[0]): rows, id(models[1]): other}, []))
    assert [row.value for row in found.classes] == ["l", "p"]
    assert found.within(Budget(top1=1.0))


def test_integers_are_bound_by_agreement_alone() -> None:
    """A class 700 in place of class 3 is one answer that differs, and no error of 697."""
    ids = np.arange(32).reshape(8, 1, 4)
    other = ids.copy()
    other[0, 0, 3] += 700
    logits = normal(0, 8, 1, 5)
    found = several({"ids": (ids, other), "logits": (logits, logits)})
    assert found.within(Budget(max=0.0, centred=0.0, cosine=1.0, sqnr=200.0, top1=0.96))
    assert found.breaches(Budget(top1=0.97)) == ("ids: top1=0.96875, wanted at least 0.97",)
    assert [row.output for row in found.unbounded(Budget(max=0.1))] == ["ids"]
    assert several({"ids": (ids, ids)}).within(Budget(top1=1.0, max=0.0))
    # Where there is nothing else, a limit that bounds nothing is not met.
    alone = several({"ids": (ids, other)})
    assert alone.within(Budget(top1=0.9))
    assert alone.breaches(Budget(max=9.0)) == ("all outputs are integers: max=9 can't be told; give top1",)


def test_an_output_that_is_the_same_for_every_input_is_judged_without_centring() -> None:
    a = np.repeat(normal(0, 1, 1, 5), 8, axis=0)
    found = several({"y": (a, a * np.float32(1.001))})
    assert found.within(Budget(sqnr=59.0, centred=0.002))
    (line,) = found.breaches(Budget(sqnr=61.0))
    assert re.fullmatch(r"y: sqnr=\S+, wanted at least 61; not centred, as it doesn't depend on the input", line)
    zeros = np.zeros_like(a)
    assert several({"y": (zeros, a)}).breaches(Budget(sqnr=1.0, max=9.0)) == (
        "y: max can't be told (zeros in the original), wanted 9",
        "y: sqnr can't be told (zeros in the original), wanted 1",
    )


def test_what_has_no_error_meets_every_limit() -> None:
    """NaN that became a number makes it no exact copy."""
    a = normal(0, 1, 1, 5)
    a[0, 0, 0] = np.nan
    found = several({"y": (a, np.nan_to_num(a))})
    assert not found.outputs[0].exact
    assert found.within(Budget(sqnr=20.0, cosine=1.0, centred=0.0))


def test_agreement_of_what_has_no_classes_is_a_breach() -> None:
    models = [model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (5,)}, ["y"], {}) for _ in range(2)]
    row = [{"y": normal(0, 5)}]
    found = compare(*models, feeds(1), run=stub({id(models[0]): row, id(models[1]): row}, []))
    assert found.breaches(Budget(top1=0.5)) == ("no output has classes: top1=0.5 can't be told; leave it out",)


def test_what_can_t_be_compared_gets_one_line() -> None:
    other = model_of([helper.make_node("Relu", ["x"], ["y"])], {"x": (1, 16)}, ["y"], {})
    with pytest.raises(ModelError, match=r"the changed model has no output 'a2': its outputs are 'y'"):
        compare(plain(), other, feeds(1))
    with pytest.raises(ModelError, match="there are no inputs to compare the models on"):
        compare(plain(), plain(), [])
    models = [plain(), plain()]
    made = {id(models[0]): [{"a2": normal(0, 1, 10)}], id(models[1]): [{"a2": normal(0, 1, 9)}]}
    with pytest.raises(ModelError, match=r"'a2' is \(1, 10\) in the original and \(1, 9\) in the changed model"):
        compare(*models, feeds(1), run=stub(made, []))

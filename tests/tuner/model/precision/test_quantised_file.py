"""What 8-bit layers need survives being written and read, and counts under its own key alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from examples.model import images, network
from tests.tuner.model.fused_nets import fused, node, perceptron
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.precision.post_training import quantise
from tilewright.tuner.model.precision.quantise import apply_precision
from tilewright.tuner.model.precision.quantised_file import Quantised
from tilewright.tuner.model.precision.rounding import round_groups
from tilewright.tuner.model.precision.rules import weight_plan
from tilewright.tuner.model.precision.zeros import LOWEST
from tilewright.tuner.model.reading.read import read_model


@pytest.fixture(scope="module", params=["int8", "fp8"])
def found(request, tmp_path_factory) -> Quantised:
    folder = tmp_path_factory.mktemp("network")
    ir.save(ir.from_proto(network()), folder / "network.onnx")
    model = read_model(folder / "network.onnx")
    fuse(model)
    feeds = [{"image": pair} for pair in images(8).reshape(4, 2, 3, 12, 12)]
    return Quantised.of(quantise(model, feeds, request.param), model)


def lowered(found: Quantised) -> ir.Model:
    return apply_precision(found.model, found.plan, base="fp16", weights=found.weights, shifts=found.shifts)


def test_it_comes_back_as_it_was(found, tmp_path):
    file = tmp_path / "kept.npz"
    found.save(file, "key")
    back = Quantised.load(file, "key")
    assert back is not None
    for name in ("kind", "method", "decibel"):
        assert getattr(back, name) == getattr(found, name)
    assert dict(back.plan) == dict(found.plan)
    assert dict(back.reasons) == dict(found.reasons)
    assert back.weights.keys() == found.weights.keys()
    for name, weights in found.weights.items():
        assert np.array_equal(back.weights[name].values.view(np.uint8), weights.values.view(np.uint8))
        assert np.array_equal(back.weights[name].scales, weights.scales)
    assert back.shifts.keys() == found.shifts.keys()
    feeds = {"image": images(2, seed=9)}
    if found.kind == "int8":
        assert relative_error(results(lowered(back), feeds)[0], results(lowered(found), feeds)[0]) == 0
    # Written again it is the same, but for the time in the archive.
    assert {path.name for path in tmp_path.iterdir()} == {"kept.npz", "kept.onnx"}


def test_zero_points_come_back(tmp_path):
    model = perceptron()
    found = Quantised.of(quantise(model, [{"x": normal(0, 8, 32)}], "int8"), model)
    assert found.plan["middle"].zeros == {"a": LOWEST}
    found.save(tmp_path / "kept.npz", "key")
    back = Quantised.load(tmp_path / "kept.npz", "key")
    assert back is not None
    assert dict(back.plan) == dict(found.plan)


def spoil(file: Path, how: str) -> None:
    if how == "absent":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "model":
        file.with_suffix(".onnx").unlink()
    elif how == "other":
        np.savez(file, about=np.frombuffer(b"{}", np.uint8))


@pytest.mark.parametrize("how", ["absent", "cut", "empty", "model", "other"])
def test_what_can_not_be_read_is_made_anew(found, tmp_path, how):
    file = tmp_path / "kept.npz"
    found.save(file, "key")
    spoil(file, how)
    assert Quantised.load(file, "key") is None


def test_a_model_that_a_killed_run_left_is_not_taken(found, tmp_path):
    """It is written first, so a run that is killed then leaves its own beside what belongs to another."""
    file = tmp_path / "kept.npz"
    found.save(file, "key")
    model = perceptron()
    Quantised.of(quantise(model, [{"x": normal(0, 8, 32)}], "int8"), model).save(tmp_path / "other.npz", "other")
    (tmp_path / "other.onnx").replace(tmp_path / "kept.onnx")
    assert Quantised.load(file, "key") is None


@pytest.mark.parametrize("name", ["kept.npz", "kept.onnx"])
@pytest.mark.parametrize("content", [b"", b"PK", b"\x0a\xff\xff"])
def test_damaged_files_are_none(found, tmp_path, name, content):
    found.save(tmp_path / "kept.npz", "key")
    (tmp_path / name).write_bytes(content)
    assert Quantised.load(tmp_path / "kept.npz", "key") is None


def test_an_archive_that_has_lost_a_layer_is_none(tmp_path):
    """Nothing but the directory of an archive says which arrays it has."""
    file, model = tmp_path / "kept.npz", perceptron(160)
    plan, reasons = weight_plan(model, "w4a16", None)
    grouped = round_groups(model, plan, [{"x": normal(0, 8, 160)}])
    Quantised("w4a16", model, plan, reasons, "rounding", 0.0, {}, {}, grouped).save(file, "key")
    with np.load(file) as arrays:
        left = {name: arrays[name] for name in arrays.files if not name.endswith(".1")}
    np.savez(file, **left)
    assert Quantised.load(file, "key", model) is None


def test_an_archive_of_an_unknown_kind_is_none(found, tmp_path):
    file = tmp_path / "kept.npz"
    found.save(file, "key")
    content = bytearray(file.read_bytes())
    entry = content.rindex(b"PK\x01\x02")
    content[entry + 10] = 77  # its way of compression
    file.write_bytes(content)
    assert Quantised.load(file, "key") is None


def test_another_key_is_another_thing(found, tmp_path):
    found.save(tmp_path / "kept.npz", "key")
    assert Quantised.load(tmp_path / "kept.npz", "another") is None


@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_weights_alone_come_back_without_a_second_model(tmp_path, kind):
    model = perceptron(160)
    plan, reasons = weight_plan(model, kind, None)
    grouped = round_groups(model, plan, [{"x": normal(0, 8, 160)}])
    found = Quantised(kind, model, plan, reasons, "rounding", 0.0, {}, {}, grouped)
    found.save(tmp_path / "kept.npz", "key")
    assert {path.name for path in tmp_path.iterdir()} == {"kept.npz"}
    back = Quantised.load(tmp_path / "kept.npz", "key", model)
    assert back is not None
    assert back.model is model
    assert (back.kind, dict(back.plan), back.grouped.keys()) == (kind, plan, grouped.keys())
    for name, weights in grouped.items():
        assert (back.grouped[name].bits, back.grouped[name].group) == (weights.bits, weights.group)
        for one, two in zip(
            (weights.values, weights.scales), (back.grouped[name].values, back.grouped[name].scales), strict=True
        ):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
    assert Quantised.load(tmp_path / "kept.npz", "key") is None


@pytest.mark.parametrize("kind", ["w8a16", "w4a16"])
def test_weights_that_layers_share_are_shared_when_they_come_back(tmp_path, kind):
    """As a model has them that uses a layer again and again: it would be larger by a copy for each."""
    nodes = []
    for index in range(3):
        nodes.append(node("MatMul", [f"h{index}", "w"], [f"m{index}"], name=f"layer{index}"))
        nodes.append(node("Tanh", [f"m{index}"], [f"h{index + 1}"]))
    model = fused(nodes, {"h0": (4, 160)}, ["h3"], {"w": normal(0, 160, 160) / 12})
    plan, reasons = weight_plan(model, kind, None)
    feeds = [{"h0": normal(1, 4, 160)}]
    found = Quantised(kind, model, plan, reasons, "rounding", 0.0, {}, {}, round_groups(model, plan, feeds))
    found.save(tmp_path / "kept.npz", "key")
    back = Quantised.load(tmp_path / "kept.npz", "key", model)
    assert back is not None
    assert back.grouped.keys() == found.grouped.keys() == {"layer0", "layer1", "layer2"}
    made = [
        apply_precision(model, plan, base="fp16", grouped=each.grouped).graph.initializers for each in (found, back)
    ]
    sizes = [sorted(value.const_value.nbytes for value in each.values()) for each in made]
    assert sizes[0] == sizes[1]
    assert len({id(weights) for weights in back.grouped.values()}) == len(set(map(id, found.grouped.values())))

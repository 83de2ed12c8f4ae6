from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tuner.model.files import proto, saved, tensor
from tests.tuner.model.folds import node
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.folding import constants
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.reading.read import read_model


def test_nothing_large_is_made_of_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "LARGEST_FOLDED", 1000)
    shapes = {"large": np.int64([251]), "small": np.int64([250])}
    for name, left in (("large", ["ConstantOfShape", "Mul"]), ("small", ["Mul"])):
        model = model_of(
            [node("ConstantOfShape", name, "c"), node("Mul", "x c", "y")],
            {"x": (2, int(shapes[name][0]))},
            ["y"],
            shapes,
        )
        fold(model)
        assert [node.op_type for node in model.graph] == left
    # What was as large before may be.
    model = model_of([node("Neg", "k", "n"), node("Add", "x n", "y")], {"x": (2, 600)}, ["y"], {"k": normal(0, 600)})
    fold(model)
    assert [node.op_type for node in model.graph] == ["Add"]


def test_an_index_far_out_of_range_costs_no_time() -> None:
    nodes = [node("GatherElements", "k i", "g"), node("Add", "x g", "y")]
    arrays = {"k": normal(0, 3, 3), "i": np.int64([[2**40, 1, 1]])}
    model = model_of(nodes, {"x": (1, 3)}, ["y"], arrays)
    fold(model)
    assert [node.op_type for node in model.graph] == ["GatherElements", "Add"]


def test_all_that_is_made_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "MOST_FOLDED", 10_000)
    nodes = [node("ConstantOfShape", "s", f"c{place}") for place in range(30)]
    nodes += [node("Sum", "x " + " ".join(f"c{place}" for place in range(30)), "y")]
    model = model_of(nodes, {"x": (250,)}, ["y"], {"s": np.int64([250])})
    fold(model)
    # Ten of 1000 bytes; the others are one node.
    assert Counter(node.op_type for node in model.graph) == {"Sum": 1, "ConstantOfShape": 1}


def positions() -> ir.Model:
    """As DeBERTa projects its relative positions, anew for each layer: of nothing but weights."""
    nodes = [node("LayerNormalization", "table g b", "normal", axis=-1)]
    nodes += [node("MatMul", f"normal w{layer}", f"p{layer}") for layer in range(3)]
    nodes += [node("Sum", "x p0 p1 p2", "y")]
    arrays = {"table": normal(0, 4, 8), "g": normal(1, 8), "b": normal(2, 8)}
    arrays |= {f"w{layer}": normal(3 + layer, 8, 6) for layer in range(3)}
    return model_of(nodes, {"x": (4, 6)}, ["y"], arrays)


def test_norms_and_products_of_weights_are_weights() -> None:
    original, model = positions(), positions()
    fold(model)
    assert Counter(node.op_type for node in model.graph) == {"Sum": 1}
    feeds = {"x": normal(9, 4, 6)}
    assert relative_error(results(model, feeds)[0], results(original, feeds)[0]) < 1e-6


@pytest.mark.parametrize(("name", "most", "left"), [("_MOST_WORK", 191, 3), ("_MOST_WORK_IN_ALL", 2 * 192, 1)])
def test_products_of_weights_are_bounded(name: str, most: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each, of 4 · 8 · 6 multiply-adds, and all together."""
    monkeypatch.setattr(constants, name, most)
    model = positions()
    fold(model)
    assert Counter(node.op_type for node in model.graph) == {"Sum": 1, "MatMul": left}


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        (1e-30, 1e-5, []),
        (1e-39, 0.5, ["MatMul"]),
        (0.5, 1e-39, ["MatMul"]),
        (1e-20, 1e-20, ["MatMul"]),
        (0.0, 1e-30, []),
    ],
    ids=["small", "subnormal", "the second", "their product", "zeros"],
)
def test_products_of_subnormal_numbers_count_for_more(
    first: float, second: float, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processors take tens of times as long for them."""
    monkeypatch.setattr(constants, "_MOST_WORK", 31 * 8 * 8 * 8)
    monkeypatch.setattr(constants, "_PIECE", 7)
    arrays = {"a": np.ones((8, 8), np.float32), "b": np.ones((8, 8), np.float32)}
    arrays["a"][3, 3], arrays["b"][5, 0] = first, second
    model = model_of([node("MatMul", "a b", "c"), node("Add", "x c", "y")], {"x": (1,)}, ["y"], arrays)
    fold(model)
    assert [each.op_type for each in model.graph] == [*left, "Add"]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("ConstantOfShape", "shape", "big"), node("Slice", "big one two", "part"), node("Add", "x part", "y")],
        [node("Expand", "number shape", "big"), node("Slice", "big one two", "part"), node("Add", "x part", "y")],
        [node("Tile", "flat shape", "big"), node("Slice", "big one two", "part"), node("Add", "x part", "y")],
    ],
    ids=["ConstantOfShape", "Expand", "Tile"],
)
def test_gigabytes_are_not_made_of_bytes(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    """8 GB, of which the model uses 12 bytes; and nothing has a known shape after `Unique`, so constants are folded."""
    tensors = [
        tensor("shape", np.int64([2**31 - 1])),
        tensor("number", np.float32([1])),
        tensor("flat", np.float32([1])),
        tensor("one", np.int64([0])),
        tensor("two", np.int64([3])),
    ]
    path = saved(proto([*nodes, node("Unique", "x", "u")], tensors=tensors), tmp_path / "m.onnx")
    tracemalloc.start()
    try:
        read_model(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()

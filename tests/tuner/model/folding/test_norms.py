"""Norms of constants."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.tuner.model.folds import node
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.folding import norms
from tilewright.tuner.model.folding.constants import Budget
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.folding.norms import fold_norms

ROWS = normal(4, 4, 1, 1)
ARRAYS = {"t": normal(0, 4, 3, 8), "g": normal(1, 8), "b": normal(2, 8), "g2": normal(3, 3, 8), "g3": ROWS}


@pytest.mark.parametrize(
    ("inputs", "settings"),
    [
        ("t g b", {}),
        ("t g", {"axis": -1, "epsilon": 0.5}),
        ("t g2", {"axis": 1}),
        ("t g2", {"axis": -2}),
        ("t g3", {"axis": -2}),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("piece", [1 << 20, 16, 5], ids=["at once", "by rows", "by parts of rows"])
def test_a_norm_of_constants_is_one(
    inputs: str, settings: dict[str, Any], dtype: type, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "_PIECE", piece)
    arrays = {name: ARRAYS[name].astype(dtype) for name in inputs.split()}
    nodes = [node("LayerNormalization", inputs, "n", **settings), node("Add", "x n", "y")]
    kind = "fp32" if dtype == np.float32 else "fp16"
    original, model = (model_of(nodes, {"x": (4, 3, 8)}, ["y"], arrays, dtype=kind) for _ in range(2))
    fold(model)
    assert [each.op_type for each in model.graph] == ["Add"]
    feeds = {"x": np.zeros((4, 3, 8), dtype)}
    error = 1e-6 if dtype == np.float32 else 1e-3
    assert relative_error(results(model, feeds)[0], results(original, feeds)[0]) < error


@pytest.mark.parametrize(
    "nodes",
    [
        [node("LayerNormalization", "x g b", "n"), node("Add", "x n", "y")],
        [node("LayerNormalization", "t g b", "n m"), node("Add", "m n", "z"), node("Add", "x z", "y")],
        [node("LayerNormalization", "t g b", "y")],
    ],
    ids=["of an input", "with a mean", "an output"],
)
def test_others_stay(nodes: list[Any]) -> None:
    model = model_of(nodes, {"x": (4, 3, 8)}, ["y"], ARRAYS)
    assert not fold_norms(model, Budget())
    assert model.graph[0].op_type == "LayerNormalization"


def test_what_it_adds_is_bounded() -> None:
    nodes = [node("LayerNormalization", "t g b", "n"), node("Add", "x n", "y")]
    model = model_of(nodes, {"x": (4, 3, 8)}, ["y"], ARRAYS)
    budget = Budget()
    fold_norms(model, budget)
    assert budget.left == Budget().left  # as large as what it is made of


def test_a_norm_of_equal_numbers_warns_of_nothing() -> None:
    nodes = [node("LayerNormalization", "t g", "n", epsilon=0.0), node("Add", "x n", "y")]
    model = model_of(nodes, {"x": (2, 8)}, ["y"], {"t": np.ones((2, 8), np.float32), "g": ARRAYS["g"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fold(model)
    assert [each.op_type for each in model.graph] == ["Add"]


def test_a_norm_takes_little_more_memory_than_its_result() -> None:
    nodes = [node("LayerNormalization", "t g b", "n"), node("Add", "x n", "y")]
    table = np.ones((1 << 17, 32), np.float16)
    arrays = {"t": table, "g": np.ones(32, np.float16), "b": np.ones(32, np.float16)}
    model = model_of(nodes, {"x": (1,)}, ["y"], arrays, dtype="fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_PIECE", 1 << 16)
        tracemalloc.start()
        assert fold_norms(model, Budget())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 3 * table.nbytes  # the constant read, the result, and a piece in fp64


def test_what_is_larger_than_may_be_is_not_calculated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget is asked first."""
    monkeypatch.setattr(norms, "_normal", None)
    monkeypatch.setattr(Budget, "allows", lambda *_: False)
    nodes = [node("LayerNormalization", "t g b", "n"), node("Add", "x n", "y")]
    assert not fold_norms(model_of(nodes, {"x": (4, 3, 8)}, ["y"], ARRAYS), Budget())


@pytest.mark.parametrize("scale", [(7,), (2, 4, 3, 8)])
def test_shapes_that_do_not_go_together_are_left(scale: tuple[int, ...]) -> None:
    model = model_of(
        [node("LayerNormalization", "t g b", "n"), node("Add", "x n", "y")], {"x": (4, 3, 8)}, ["y"], ARRAYS
    )
    given = model.graph.initializers["g"]
    given.const_value, given.shape = ir.tensor(np.ones(scale, np.float32)), ir.Shape(scale)
    assert not fold_norms(model, Budget())

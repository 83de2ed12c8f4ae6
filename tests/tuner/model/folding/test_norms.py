"""Norms of constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tuner.model.folds import node
from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.folding.constants import Budget
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.folding.norms import fold_norms

ARRAYS = {"t": normal(0, 4, 3, 8), "g": normal(1, 8), "b": normal(2, 8), "g2": normal(3, 3, 8)}


@pytest.mark.parametrize(
    ("inputs", "settings"),
    [("t g b", {}), ("t g", {"axis": -1, "epsilon": 0.5}), ("t g2", {"axis": 1}), ("t g2", {"axis": -2})],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_norm_of_constants_is_one(inputs: str, settings: dict[str, Any], dtype: type) -> None:
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

"""Rotary embedding, as ONNX Runtime has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuner.model.graphs import normal, results
from tests.tuner.model.reading.contrib.operators import Operator, compare, left

ROWS, BATCH, LENGTH, HEADS, DIM = 12, 2, 3, 2, 8


def rotary(
    positions: np.ndarray,
    *,
    rank: int = 3,
    width: int = DIM,
    dtype: Any = np.float32,
    constant: bool = False,
    **more: Any,
) -> Operator:
    """Of HEADS heads of DIM numbers, the first `width` turned."""
    shape = (BATCH, HEADS, LENGTH, DIM) if rank == 4 else (BATCH, LENGTH, HEADS * DIM)
    angle = np.arange(ROWS)[:, None] / 3 ** np.arange(width // 2)
    given = {
        "x": normal(0, *shape).astype(dtype),
        "positions": positions,
        "cos": np.cos(angle).astype(dtype),
        "sin": np.sin(angle).astype(dtype),
    }
    constants = ["cos", "sin", *(["positions"] if constant else [])]
    return Operator("RotaryEmbedding", given, constants=constants, **more)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("positions", [np.array([4]), np.array([[0, 1, 2], [11, 5, 7]])], ids=["from one on", "each"])
def test_the_form_computes_what_the_operator_does(
    positions: np.ndarray, constant: bool, interleaved: int, rank: int, tmp_path: Path
) -> None:
    operator = rotary(positions, rank=rank, constant=constant, interleaved=interleaved)
    compare(results(operator.read(tmp_path), operator.feeds), operator.wanted(), 1e-6)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("interleaved", [0, 1])
def test_a_part_of_each_head(interleaved: int, rank: int, tmp_path: Path) -> None:
    settings = {"num_heads": HEADS, "rotary_embedding_dim": 4, "interleaved": interleaved}
    operator = rotary(np.array([[0, 1, 2], [3, 5, 7]]), rank=rank, width=4, **settings)
    compare(results(operator.read(tmp_path), operator.feeds), operator.wanted(), 1e-6)


def test_half_precision(tmp_path: Path) -> None:
    operator = rotary(np.array([[0, 1, 2], [3, 5, 7]]), dtype=np.float16)
    compare(results(operator.read(tmp_path), operator.feeds), operator.wanted(), 2e-3)


def test_positions_that_are_known_are_constants(tmp_path: Path) -> None:
    """So nothing is gathered when the model runs."""
    model = rotary(np.array([[0, 1, 2], [3, 5, 7]]), constant=True).read(tmp_path)
    assert "Gather" not in [node.op_type for node in model.graph]


def test_tables_that_would_be_large_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tilewright.tuner.model.reading.contrib.rotary.LARGEST_TABLE", 40)
    operator = rotary(np.array([[0, 1, 2], [3, 5, 7]]), constant=True)
    model = operator.read(tmp_path)
    assert "Gather" in [node.op_type for node in model.graph]
    compare(results(model, operator.feeds), operator.wanted(), 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_packed_batching": 1}, "its sequences are packed (is_packed_batching)"),
        (
            {"positions": np.array([[0, 1, 12], [0, 1, 2]])},
            "its positions, up to 12, are not all in",
        ),
        ({"positions": np.array([[0.0, 1, 2], [3, 5, 7]])}, "its positions are of type DOUBLE"),
        ({"positions": np.array([0, 1])}, "its positions have the shape (2,), neither (1) nor (2, 3)"),
        ({"num_heads": 0, "rotary_embedding_dim": 4, "width": 4}, "has no 0 heads (num_heads)"),
        ({"num_heads": 2, "rotary_embedding_dim": 4}, "don't go together"),
    ],
)
def test_what_has_no_form_stays(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    positions = changes.pop("positions", np.array([[0, 1, 2], [3, 5, 7]]))
    assert message in left(rotary(positions, constant=True, **changes), tmp_path)

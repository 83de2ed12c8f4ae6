from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tuner.model.folds import folded, node
from tests.tuner.model.graphs import normal
from tilewright.tuner.model.graph import constant

STEPS = [node("QuantizeLinear", "x sx zx", "q"), node("DequantizeLinear", "q sx zx", "d")]
ARRAYS = {"sx": np.float32(1 / 16), "zx": np.int8(0)}
SCALES = np.float32([0.1, 0.2, 0.3, 0.4])
INTEGERS = np.random.default_rng(0).integers(-127, 128, (4, 4), np.int8)


def operators(nodes: list[Any], arrays: dict[str, Any]) -> list[str]:
    return folded([*STEPS, *nodes], (3, 4), {**ARRAYS, **arrays}, close=1e-5)[0]


def test_weights_of_quantised_activations_become_constants() -> None:
    nodes = [
        node("DequantizeLinear", "w s", "v", axis=0),
        node("Transpose", "v", "t", perm=[1, 0]),
        node("MatMul", "d t", "y"),
    ]
    left, _, model = folded([*STEPS, *nodes], (3, 4), {**ARRAYS, "w": INTEGERS, "s": SCALES}, close=1e-5)
    assert left == ["QuantizeLinear", "DequantizeLinear", "MatMul"]
    np.testing.assert_allclose(constant(model.graph[-1].inputs[1]), (INTEGERS * SCALES[:, None]).T, rtol=1e-6)


def test_so_do_those_that_the_file_has_as_numbers() -> None:
    nodes = [
        node("QuantizeLinear", "w s z", "u", axis=1),
        node("DequantizeLinear", "u s z", "v", axis=1),
        node("Gemm", "d v", "y"),
    ]
    arrays = {"w": normal(0, 4, 4), "s": SCALES, "z": np.zeros(4, np.int8)}
    assert operators(nodes, arrays) == ["QuantizeLinear", "DequantizeLinear", "Gemm"]


def test_biases_become_constants() -> None:
    nodes = [
        node("DequantizeLinear", "w s", "v", axis=1),
        node("DequantizeLinear", "b s", "c"),
        node("Gemm", "d v c", "y"),
    ]
    arrays = {"w": INTEGERS, "b": np.int32([1000, -2000, 5, 0]), "s": SCALES}
    left = folded([*STEPS, *nodes], (3, 4), {**ARRAYS, **arrays, "s": np.float32(0.1)}, close=1e-5)[0]
    assert left == ["QuantizeLinear", "DequantizeLinear", "Gemm"]


@pytest.mark.parametrize("read", ["x", "r"])
def test_weights_alone_stay_integers(read: str) -> None:
    nodes = [node("Relu", "d", "r"), node("DequantizeLinear", "w s", "v", axis=1), node("MatMul", f"{read} v", "m")]
    nodes.append(node("Add", "m r", "y"))
    assert "DequantizeLinear" in operators(nodes, {"w": INTEGERS, "s": SCALES})[2:]


def test_scales_of_blocks_and_16_bits_stay() -> None:
    blocks = [node("DequantizeLinear", "w s", "v", axis=0, block_size=2), node("MatMul", "d v", "y")]
    wide = [node("DequantizeLinear", "w s", "v", axis=1), node("MatMul", "d v", "y")]
    for nodes, arrays in (
        (blocks, {"w": INTEGERS, "s": np.full((2, 4), 0.1, np.float32)}),
        (wide, {"w": INTEGERS.astype(np.int16), "s": SCALES}),
    ):
        assert operators(nodes, arrays).count("DequantizeLinear") == 2


def test_long_vectors_are_weights_that_lie_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [node("DequantizeLinear", "b sx", "c"), node("Add", "x c", "y")]
    arrays = {"sx": np.float32(0.5), "b": np.int8([1, 2, 3, 4])}
    assert folded(nodes, (3, 4), arrays)[0] == ["Add"]
    monkeypatch.setattr("tilewright.tuner.model.folding.quantised._VECTOR", 3)
    assert folded(nodes, (3, 4), arrays)[0] == ["DequantizeLinear", "Add"]

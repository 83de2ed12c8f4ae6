"""Activations of ONNX Runtime, and standard operators for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import erf

from tests.tuner.model.contrib import assert_same, standard, written
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse


@pytest.mark.parametrize(
    "call",
    [
        "Gelu(x)",
        "BiasGelu(x, b)",
        "FastGelu(x, b)",
        "FastGelu(x)",
        "QuickGelu(x)",
        "QuickGelu<alpha: float = 1.0>(x)",
    ],
)
def test_the_form_computes_what_the_operator_does(call: str, tmp_path: Path) -> None:
    model = written(f"(float[2, 3, 8] x) => (float[2, 3, 8] y) {{ y = com.microsoft.{call} }}", b=normal(1, 8))
    assert_same(model, {"x": 3 * normal(0, 2, 3, 8)}, tmp_path)


@pytest.mark.parametrize("call", ["Gelu(p)", "BiasGelu(p, b)", "FastGelu(p, b)", "QuickGelu(p)"])
def test_a_product_takes_it_in(call: str, tmp_path: Path) -> None:
    text = f"(float[4, 8] x) => (float[4, 8] y) {{ p = MatMul(x, w)  y = com.microsoft.{call} }}"
    made = standard(written(text, w=normal(1, 8, 8), b=normal(2, 8)), tmp_path)
    fold(made)
    fuse(made)
    assert [node.op_type.startswith("FusedGemm") for node in made.graph] == [True]


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * 0.5 * (1 + erf(x / np.sqrt(2))))


def test_what_only_gpus_run_is_as_documented(tmp_path: Path) -> None:
    """ONNX Runtime has no kernels for them on the CPU."""
    x, bias, skip = normal(0, 2, 5, 8), normal(1, 8), normal(2, 2, 5, 8)
    text = """(float[2, 5, 8] x, float[2, 5, 8] skip) => (float[2, 5, 8] y, float[2, 5, 4] z)
    { y = com.microsoft.BiasAdd(x, bias, skip)  z = com.microsoft.BiasSplitGelu(x, bias) }"""
    y, z = results(standard(written(text, bias=bias), tmp_path), {"x": x, "skip": skip})
    assert relative_error(y, x + bias + skip) < 1e-6
    assert relative_error(z, (x + bias)[..., :4] * gelu((x + bias)[..., 4:])) < 1e-6

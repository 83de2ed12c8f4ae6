"""Weights of 4 and 8 bits with a scale for each block, as `MatMulNBits` has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tuner.model.contrib import assert_same, read, reason, written
from tests.tuner.model.graphs import normal
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import plugin_settings
from tilewright.tuner.model.precision.quantise import apply_precision


def weights(k: int, n: int, bits: int, block: int, zeros: str) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    blocks = math.ceil(k / block)
    made: dict[str, Any] = {
        "B": rng.integers(0, 256, (n, blocks, block * bits // 8), np.uint8),
        "s": rng.uniform(0.01, 0.1, n * blocks).astype(np.float32),
    }
    if zeros == "packed":
        made["z"] = rng.integers(0, 256, n * math.ceil(blocks * bits / 8), np.uint8)
    if zeros == "numbers":
        made["z"] = rng.integers(0, 1 << bits, n * blocks).astype(np.float32)
    return made


def model(k: int, n: int, bits: int, block: int, given: dict[str, Any], more: str = "") -> onnx.ModelProto:
    zero = "z" if "z" in given else ""
    text = f"""(float[2, 3, {k}] x) => (float[2, 3, {n}] y)
    {{ y = com.microsoft.MatMulNBits<K: int = {k}, N: int = {n}, bits: int = {bits}, block_size: int = {block}>
      (x, B, s, {zero}{more}) }}"""
    return written(text, **given)


@pytest.mark.parametrize(
    ("k", "n", "bits", "block", "zeros"),
    [
        (64, 8, 4, 32, ""),
        (96, 24, 4, 32, "packed"),  # an odd number of blocks
        (80, 6, 4, 16, "numbers"),
        (70, 5, 4, 32, "packed"),  # the last block isn't full
        (67, 5, 4, 32, ""),  # an odd number of rows
        (128, 16, 8, 64, "packed"),
        (100, 7, 8, 32, ""),
    ],
)
def test_the_form_computes_what_the_operator_does(
    k: int, n: int, bits: int, block: int, zeros: str, tmp_path: Path
) -> None:
    given = weights(k, n, bits, block, zeros)
    made = assert_same(model(k, n, bits, block, given), {"x": normal(1, 2, 3, k)}, tmp_path)
    assert [node.op_type for node in made.graph] == ["DequantizeLinear", "Transpose", "MatMul"]


def test_a_bias_and_an_order_of_rows_that_is_none(tmp_path: Path) -> None:
    given = weights(64, 8, 4, 32, "")
    given |= {"order": np.arange(64, dtype=np.int32) // 32, "b": normal(2, 8)}
    assert_same(model(64, 8, 4, 32, given, ", order, b"), {"x": normal(1, 2, 3, 64)}, tmp_path)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_kernel_reads_the_integers(bits: int, tmp_path: Path) -> None:
    """And what was packed for ONNX Runtime is let go."""
    given = weights(64, 32, bits, 32, "packed")
    made = assert_same(model(64, 32, bits, 32, given), {"x": normal(1, 2, 3, 64)}, tmp_path)
    assert not set(given) & set(made.graph.initializers)
    fuse(made)
    made = apply_precision(made, {}, base="fp16", device=resolve_device("sm_86"))
    (product,) = [node for node in made.graph if node.op_type.startswith("FusedGemm")]
    settings = plugin_settings(product)
    assert settings["group_size"] == 32
    assert {value.dtype for value in product.inputs if value is not None} >= {ir.DataType.INT8}
    assert (settings["weights"] == "int4") == (bits == 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 2}, "its weights have 2 bits: 4 and 8 are known"),
        ({"K": 0}, "its attributes are K=0, N=8, bits=4, block_size=32"),
        ({"N": 9}, "its scales has 16 elements: 18 belong to its attributes"),
        ({"z": np.full(16, 7.5, np.float32)}, "its zero points are no integers"),
        ({"z": np.ones(16, np.complex64)}, "its zero_points are of complex64"),
        ({"B": np.zeros((8, 2, 16), np.int32)}, "its B is of int32: it must be of uint8"),
        ({"z": np.zeros(3, np.uint8)}, "its zero_points has 3 elements: 8 belong to its attributes"),
        ({"order": np.arange(64, dtype=np.int32) % 2}, "its rows are in an order of their own (g_idx)"),
        ({"opset": 20}, "the model has opset 20: blocks are from 21 on"),
    ],
)
def test_what_has_no_form_stays(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = weights(64, 8, 4, 32, "")
    given |= {name: array for name, array in change.items() if isinstance(array, np.ndarray)}
    made = model(64, 8, 4, 32, given, ", order" if "order" in given else "")
    for attribute in made.graph.node[0].attribute:
        attribute.i = change.get(attribute.name, attribute.i)
    if "opset" in change:
        # What is quantised isn't converted to the opset with blocks.
        steps = written("(float[2] a, float c) => (uint8[2] d) { d = QuantizeLinear(a, c) }", 20).graph
        made.graph.node.extend(steps.node)
        made.graph.input.extend(steps.input)
        made.graph.output.extend(steps.output)
        made.opset_import[0].version = 20
    assert reason(made, tmp_path) == message


@pytest.mark.parametrize("computed", [True, False])
def test_weights_that_are_computed_stay(computed: bool, tmp_path: Path) -> None:
    """Those of constants are constants."""
    given = weights(64, 8, 4, 32, "")
    made = model(64, 8, 4, 32, given)
    made.graph.node[0].input[2] = "t"
    made.graph.node.insert(0, onnx.helper.make_node("Abs", ["s"], ["t"]))
    if not computed:
        assert_same(made, {"x": normal(1, 2, 3, 64)}, tmp_path)
        return
    scale = next(each for each in made.graph.initializer if each.name == "s")
    made.graph.input.append(onnx.helper.make_tensor_value_info("s", scale.data_type, scale.dims))
    made.graph.initializer.remove(scale)
    assert reason(made, tmp_path) == "'t' is not a constant"


def test_of_what_stays_nothing_is_added(tmp_path: Path) -> None:
    """Though another operator gets its form in the same round."""
    made = model(64, 8, 4, 32, weights(64, 8, 4, 32, "") | {"z": np.full(16, 7.5, np.float32)})
    made.graph.node.append(onnx.helper.make_node("QuickGelu", ["y"], ["g"], domain="com.microsoft"))
    made.graph.output[0].name = "g"
    assert sorted(read(made, tmp_path).graph.initializers) == ["B", "s", "z"]

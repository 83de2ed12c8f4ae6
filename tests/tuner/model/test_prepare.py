"""What was read of a file, held against the file itself, and what of the original is still there once it is fused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tuner.model.contrib import written as written_text
from tests.tuner.model.files import node, proto, saved, tensor
from tests.tuner.model.fuse.forms import LEAST, B, Graph, S, attend, scores, triangle
from tests.tuner.model.networks import written
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.flow import optimise
from tilewright.tuner.model.graph import copy_of, fused_nodes, plugin_inputs
from tilewright.tuner.model.prepare import (
    COARSE_READING_ERROR,
    READING_ERROR,
    Prepared,
    _known_before,
    check_fusing,
    prepare,
)
from tilewright.tuner.model.request import Request
from tilewright.tuner.model.verify.judge import Judge
from tilewright.tuning_db.errors import ModelError, RunError


def test_results_of_fused_nodes_keep_their_names(tmp_path):
    model, _ = written(tmp_path)
    lines: list[str] = []
    prepared = prepare(Request.parse(model, None, resolve_device("sm_86")), lines.append)
    assert prepared.shared_names == {name: name for name in ("r1", "r2", "r3", "logits")}
    assert [line.split()[0] for line in lines] == ["read", "fused:"]


def moving(folder: Path) -> Prepared:
    """A convolution in one dimension, and a product with a transpose before its activation."""
    rng = np.random.default_rng(0)
    nodes = [
        node("Conv", "x f", "c", pads=[1, 1]),
        node("Relu", "c", "a"),
        node("Transpose", "a", "t", perm=[0, 2, 1]),
        node("MatMul", "t w", "p"),
        node("Transpose", "p", "u", perm=[0, 2, 1]),
        node("Sigmoid", "u", "y"),
    ]
    weights = {"f": rng.normal(size=(8, 4, 3)), "w": rng.normal(size=(8, 8))}
    tensors = [tensor(name, array.astype(np.float32)) for name, array in weights.items()]
    x, y = (onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", (2, 4, 9)), ("y", (2, 8, 9))))
    saved(proto(nodes, inputs=[x], outputs=[y], tensors=tensors), folder / "moving.onnx")
    return prepare(Request.parse(folder / "moving.onnx", None, resolve_device("sm_86")), lambda _: None)


def test_layers_are_compared_by_what_moves_behind_them_give(tmp_path: Path) -> None:
    prepared = moving(tmp_path)
    assert prepared.shared_names == {"a": "a", "y": "y"}
    assert [node.op_type for node in prepared.known_results.values()] == ["FusedConv2d", "FusedGemm"]
    lowered = copy_of(prepared.fused)
    (value,) = [each for node in lowered.graph for each in node.outputs if each.name == "a"]
    value.dtype = ir.DataType.INT8  # the layer gives integers, which are no numbers to compare
    assert prepared.shared_numbers(lowered) == {"y": "y"}
    feed = {"x": np.random.default_rng(1).normal(size=(2, 4, 9)).astype(np.float32)}
    with Judge(prepared.original, [feed], fused=prepared.fused) as judge:
        request = Request.parse(tmp_path / "moving.onnx", None, resolve_device("sm_86"))
        assert [row.value for row in check_fusing(request, prepared, judge).layers] == ["a", "y"]
        layer = fused_nodes(prepared.fused)[0]
        weight = plugin_inputs(layer)["w"]
        weight.const_value = ir.tensor(-weight.const_value.numpy(), name=weight.name)
        with pytest.raises(RunError, match="'a' differs by"):
            check_fusing(request, prepared, judge)


def test_values_before_a_fused_node_are_the_nearest_that_the_original_has(tmp_path):
    model, _ = written(tmp_path)
    prepared = prepare(Request.parse(model, None, resolve_device("sm_86")), lambda _: None)
    nodes = {node.name: node for node in fused_nodes(prepared.fused)}
    assert [list(_known_before(nodes[name], prepared)) for name in ("stem", "block", "hidden")] == [[], ["r1"], ["f"]]
    nodes["hidden"].inputs[0].name = "of the fused model alone"
    assert _known_before(nodes["hidden"], prepared) == {"p": "p"}


def test_what_reading_changed_is_no_result(tmp_path):
    """onnx's converter takes the corners of `Resize` in opset 10 for what opset 11 has by default."""
    make = onnx.helper
    rng = np.random.default_rng(0)
    nodes = [
        make.make_node("Conv", ["x", "w"], ["c"]),
        make.make_node("Resize", ["c", "s"], ["r"], mode="linear"),
        make.make_node("Conv", ["r", "v"], ["y"]),
    ]
    arrays = {"w": rng.normal(size=(4, 3, 3, 3)), "s": np.array([1, 1, 2, 2]), "v": rng.normal(size=(4, 4, 3, 3))}
    tensors = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    values = [
        make.make_tensor_value_info(name, 1, shape) for name, shape in (("x", (1, 3, 8, 8)), ("y", (1, 4, 10, 10)))
    ]
    graph = make.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 10)], ir_version=5), tmp_path / "old.onnx")
    with pytest.raises(
        ModelError, match=r"computes something else once it is read, .* output 'y' differs by .*opset 21"
    ):
        optimise(Request.parse(tmp_path / "old.onnx", tmp_path / "build", resolve_device("sm_86"), precision="fp32"))
    assert not (tmp_path / "build").exists()


def left_padded(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A causal attention with a mask of padding, and a feed whose second entry has padding in front."""
    g = Graph()
    both = g("And", g.array(triangle(1) == 0, bool), g.input("mask", B, 1, 1, S, dtype="bool"))
    out = attend(g, g("Add", scores(g), g("Where", both, g.array(0.0), g.array(LEAST))))
    ir.save(g.model(out), folder / "causal.onnx")
    feed = g.feeds()
    feed["mask"] = np.ones((B, 1, 1, S), bool)
    feed["mask"][1, ..., :2] = False
    return folder / "causal.onnx", feed


def test_rows_that_see_no_key_are_left_out(tmp_path: Path) -> None:
    """They are the mean of other values there, and nothing to refuse data for; what differs beside them is."""
    model, feed = left_padded(tmp_path)
    request = Request.parse(model, None, resolve_device("sm_86"))
    prepared = prepare(request, lambda _: None)
    with Judge(prepared.original, [feed], fused=prepared.fused) as judge:
        (row,) = check_fusing(request, prepared, judge).outputs
        assert row.relative is not None
        assert row.relative < 1e-5
        assert [rows.count for rows in judge.masked()] == [2]
    with (
        Judge(prepared.original, [feed]) as judge,
        pytest.raises(RunError, match="its fused form computes something else, which is a defect of Tilewright"),
    ):
        check_fusing(request, prepared, judge)


def test_what_is_made_of_zeros_is_an_error(tmp_path: Path) -> None:
    """There is nothing to divide by: any error beside an original of zeros is one."""
    weights = [tensor("w", np.zeros((3, 4), np.float32))]
    saved(proto([node("MatMul", "x w", "y")], tensors=weights), tmp_path / "zeros.onnx")
    request = Request.parse(tmp_path / "zeros.onnx", None, resolve_device("sm_86"))
    prepared = prepare(request, lambda _: None)
    (layer,) = fused_nodes(prepared.fused)
    weight = plugin_inputs(layer)["b"]
    weight.const_value = ir.tensor(np.ones((3, 4), np.float32), name=weight.name)
    feed = {"x": np.ones((2, 3), np.float32)}
    with (
        Judge(prepared.original, [feed]) as judge,
        pytest.raises(RunError, match=r"Tilewright: 'y' has values up to 3\.0e\+00 where all were zeros; nothing was"),
    ):
        check_fusing(request, prepared, judge)


@pytest.mark.parametrize(("level", "coarse"), [(4, True), (0, False)])
def test_rounding_inside_of_the_files_operators_is_no_change(level: int, coarse: bool, tmp_path: Path) -> None:
    """ONNX Runtime may take the inputs of `MatMulNBits` in 8 bits."""
    rng = np.random.default_rng(0)
    settings = f"K: int = 64, N: int = 32, bits: int = 4, block_size: int = 32, accuracy_level: int = {level}"
    weights = {
        "B": rng.integers(0, 256, (32, 2, 16), np.uint8),
        "s": rng.uniform(0.01, 0.1, 64).astype(np.float32),
    }
    text = f"(float[8, 64] x) => (float[8, 32] y) {{ y = com.microsoft.MatMulNBits<{settings}>(x, B, s) }}"
    path = saved(written_text(text, **weights), tmp_path / "m.onnx")
    prepared = prepare(Request.parse(path, None, resolve_device("sm_86")), lambda _: None)
    assert prepared.reading_error == (COARSE_READING_ERROR if coarse else READING_ERROR)


def test_operators_that_stay_are_reported_with_the_reason(tmp_path: Path) -> None:
    text = """(float[2, 4, 4] x) => (float[2, 4, 4] y)
    { y = com.microsoft.FusedMatMul<transBatchA: int = 1>(x, x) }"""
    path = saved(written_text(text), tmp_path / "m.onnx")
    prepared = prepare(Request.parse(path, None, resolve_device("sm_86")), lambda _: None)
    (left,) = prepared.workloads.unsupported
    assert (left.operator, left.reason, left.flops) == ("FusedMatMul", "it transposes batch dimensions", None)
    assert prepared.reasons[left.node] == left.reason

"""Gated pairs of products whose weights are integers with steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.tuner.model.fused_nets import operators, output
from tests.tuner.model.graphs import normal, relative_error, results
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_settings
from tilewright.tuner.model.precision.quantise import apply_precision

K, N = 64, 32
KINDS = {"int8": (TensorProto.INT8, -128, 127), "uint8": (TensorProto.UINT8, 0, 255), "int4": (TensorProto.INT4, -8, 7)}
KINDS["uint4"] = (TensorProto.UINT4, 0, 15)


def step(name: str, kind: str, block: int, zero: bool, turned: bool, seed: int, one: bool = False) -> dict[str, Any]:
    """A dequantise step's constants and settings; `turned`: its weights are (N, K)."""
    rng = np.random.default_rng(seed)
    number, low, high = KINDS[kind]
    scales = 0.02 + rng.random((K // block, N) if block else () if one else (N,)) / 50
    integers, zeros = rng.integers(low, high + 1, (K, N)), rng.integers(low // 2, high // 2 + 1, scales.shape)

    def laid(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.T) if turned and array.ndim == 2 else array

    def stored(array: np.ndarray, what: str) -> TensorProto:
        return helper.make_tensor(f"{name}_{what}", number, laid(array).shape, laid(array).reshape(-1).tolist())

    tensors = [stored(integers, "w"), numpy_helper.from_array(laid(np.float32(scales)), f"{name}_s")]
    if zero:
        tensors.append(stored(zeros, "z"))
    settings = {"axis": 1 if turned else 0, "block_size": block} if block else {"axis": 0 if turned else 1}
    node = helper.make_node(
        "DequantizeLinear", [each.name for each in tensors], [f"{name}_d"], **({} if one else settings)
    )
    return {"tensors": tensors, "node": node}


def pair(steps: list[dict[str, Any]], form: str, *, kind: int = TensorProto.FLOAT, opset: int = 21) -> ir.Model:
    """silu(x · Wg) · (x · Wu), with weights by rows, or turned by a transpose or by `Gemm`."""
    nodes = [each["node"] for each in steps]
    for name in ("g", "u"):
        weights = f"{name}_d"
        if form == "transposed":
            nodes.append(helper.make_node("Transpose", [weights], [f"{name}_t"], perm=[1, 0]))
            weights = f"{name}_t"
        operator, more = ("Gemm", {"transB": 1}) if form == "gemm" else ("MatMul", {})
        nodes.append(helper.make_node(operator, ["x", weights], [name], name=f"{name}_product", **more))
    nodes += [
        helper.make_node("Sigmoid", ["g"], ["s"]),
        helper.make_node("Mul", ["g", "s"], ["a"]),
        helper.make_node("Mul", ["a", "u"], ["y"]),
    ]
    shape = (8, K)
    values = [helper.make_tensor_value_info(name, kind, each) for name, each in (("x", shape), ("y", None))]
    graph = helper.make_graph(nodes, "m", values[:1], values[1:], [each for one in steps for each in one["tensors"]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True))


FEED = {"x": np.float32(np.float16(normal(0, 8, K)))}


def fused(model: ir.Model) -> ir.Model:
    fold(model)
    fuse(model)
    return model


@pytest.mark.parametrize("form", ["rows", "transposed", "gemm"])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_two_products_become_one_that_reads_the_integers(kind: str, block: int, form: str) -> None:
    steps = [step(name, kind, block, True, form != "rows", seed) for seed, name in enumerate("gu")]
    wanted = results(pair(steps, form), FEED)[0]
    model = fused(pair(steps, form))
    (node,) = fused_nodes(model)
    assert plugin_settings(node)["gated"] == "halves"
    assert operators(model).count("DequantizeLinear") == 1
    assert relative_error(output(model, FEED), wanted) < 1e-6
    half = apply_precision(model, {}, base="fp16", device=resolve_device("sm_86"))
    assert "DequantizeLinear" not in operators(half)
    (node,) = fused_nodes(half)
    assert plugin_settings(node)["weights"] == ("int4" if kind.endswith("4") else "none")
    assert plugin_settings(node)["group_size"] == block
    assert relative_error(output(half, FEED), wanted) < 1e-3


@pytest.mark.parametrize("zeros", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("ones", [(True, False), (True, True), (False, True)])
def test_one_scale_for_all_or_no_zero_points(zeros: tuple[bool, bool], ones: tuple[bool, bool]) -> None:
    """Of one of the two, or of both."""
    given = zip("gu", zeros, ones, strict=True)
    steps = [step(name, "int8", 0, zero, False, seed, one) for seed, (name, zero, one) in enumerate(given)]
    wanted = results(pair(steps, "rows"), FEED)[0]
    model = fused(pair(steps, "rows"))
    assert len(fused_nodes(model)) == 1
    assert relative_error(output(model, FEED), wanted) < 1e-6


@pytest.mark.parametrize(
    ("first", "second"),
    [(("int8", 0), ("int4", 0)), (("int4", 32), ("int4", 16)), (("uint4", 0), ("uint4", 32))],
    ids=["types", "blocks", "one with blocks"],
)
def test_weights_of_two_forms_stay_two_products(first: tuple[str, int], second: tuple[str, int]) -> None:
    steps = [
        step(name, kind, block, False, False, seed)
        for seed, (name, (kind, block)) in enumerate(zip("gu", (first, second), strict=True))
    ]
    wanted = results(pair(steps, "rows"), FEED)[0]
    model = pair(steps, "rows")
    fold(model)
    reasons = [miss.reason for miss in fuse(model).misses]
    assert len(fused_nodes(model)) == 2
    assert relative_error(output(model, FEED), wanted) < 1e-6
    assert any(reason.startswith("weights of two forms: ") for reason in reasons)


@pytest.mark.parametrize("block", [0, 32])
def test_the_type_that_steps_give_is_kept(block: int) -> None:
    """As an attribute says it, from opset 23 on."""
    steps = [step(name, "int8", block, False, False, seed) for seed, name in enumerate("gu")]
    for each in steps:
        each["node"].attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT16))
    feed = {"x": FEED["x"].astype(np.float16)}
    wanted = results(pair(steps, "rows", kind=TensorProto.FLOAT16, opset=23), feed)[0]
    model = fused(pair(steps, "rows", kind=TensorProto.FLOAT16, opset=23))
    assert operators(model) == ["DequantizeLinear", "FusedGemm"]
    assert relative_error(results(model, feed)[0], wanted) < 2e-3


def test_integers_of_a_pair_that_layers_share_lie_side_by_side_once() -> None:
    steps = [step(name, "int8", 0, False, False, seed) for seed, name in enumerate("gu")]
    nodes = [each["node"] for each in steps]
    for x, y in (("x", "a"), ("z", "b")):
        nodes += [
            helper.make_node("MatMul", [x, "g_d"], [f"g{y}"]),
            helper.make_node("MatMul", [x, "u_d"], [f"u{y}"]),
            helper.make_node("Relu", [f"g{y}"], [f"r{y}"]),
            helper.make_node("Mul", [f"r{y}", f"u{y}"], [y]),
        ]
    values = [
        helper.make_tensor_value_info(name, 1, (8, size)) for name, size in zip("xzab", (K, K, N, N), strict=True)
    ]
    graph = helper.make_graph(nodes, "m", values[:2], values[2:], [each for one in steps for each in one["tensors"]])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = fused(ir.from_proto(onnx.shape_inference.infer_shapes(made)))
    assert [plugin_settings(node)["gated"] for node in fused_nodes(model)] == ["halves", "halves"]
    assert [value.shape for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8] == [
        (K, 2 * N)
    ]


def test_weights_of_4_bits_stay_packed() -> None:
    steps = [step(name, "uint4", 32, False, True, seed) for seed, name in enumerate("gu")]
    model = fused(pair(steps, "transposed"))
    (value,) = [each for each in model.graph.initializers.values() if each.dtype == ir.DataType.UINT4]
    assert isinstance(value.const_value, ir.PackedTensor)
    assert value.const_value.nbytes == 2 * N * K // 2

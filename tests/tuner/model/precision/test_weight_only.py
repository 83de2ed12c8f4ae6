"""Products read the integers of weights that alone are quantised."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from tests.tuner.model.fused_nets import node, operators, output
from tests.tuner.model.graphs import normal, relative_error
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import dtype_name, fused_nodes, plugin_inputs, plugin_settings, plugin_tensors
from tilewright.tuner.model.precision.quantise import apply_precision

K, N = 96, 48
FEED = {"x": normal(0, 3, 5, K)}
KINDS = {
    "int8": (TensorProto.INT8, -128, 127),
    "uint8": (TensorProto.UINT8, 0, 255),
    "int4": (TensorProto.INT4, -8, 7),
    "uint4": (TensorProto.UINT4, 0, 15),
}


def tensor(name: str, kind: str, array: np.ndarray) -> onnx.TensorProto:
    return helper.make_tensor(name, KINDS[kind][0], array.shape, array.reshape(-1).tolist())


def linear(
    kind: str,
    *,
    group: int = 0,
    zero: bool = False,
    form: str = "rows",
    behind: tuple[Any, ...] = (),
    last: str = "m",
    k: int = K,
    scale: np.ndarray | None = None,
) -> tuple[ir.Model, ir.Model]:
    """x · (K, N) weights of a kind with steps, as it is and fused. `form`: rows (K, N), or columns (N, K), which a
    transpose or `Gemm` turns."""
    _, low, high = KINDS[kind]
    rng = np.random.default_rng(1)
    turned = form != "rows"
    depth = 1 if turned else 0

    def laid(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.T) if turned else array

    shape = (-(-k // group), N) if group else (N,)
    scales = (0.02 + rng.random(shape) / 50).astype(np.float32) if scale is None else scale
    integers = rng.integers(low, high + 1, (k, N))
    zeros = rng.integers(low // 2, high // 2 + 1, scales.shape)
    blocked = {"axis": depth, "block_size": group} if group else {"axis": 1 - depth}
    given = ["w", "s", "z"] if zero else ["w", "s"]
    nodes = [node("DequantizeLinear", given, ["d"], name="dequantise", **(blocked if scales.ndim else {}))]
    if form == "transposed":
        nodes += [
            node("Transpose", ["d"], ["t"], perm=[1, 0], name="turn"),
            node("MatMul", ["x", "t"], ["m"], name="layer"),
        ]
    elif form == "gemm":
        nodes += [node("Gemm", ["x", "d"], ["m"], transB=1, name="layer")]
    else:
        nodes += [node("MatMul", ["x", "d"], ["m"], name="layer")]
    nodes += behind
    rows = (15, k) if form == "gemm" else (3, 5, k)
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", 1, rows)],
        [helper.make_tensor_value_info(last, 1, None)],
        [
            tensor("w", kind, laid(integers)),
            onnx.numpy_helper.from_array(laid(scales) if group else scales, "s"),
            *([tensor("z", kind, laid(zeros) if group else zeros)] if zero else []),
        ],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    shaped = onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)
    original, model = ir.from_proto(shaped), ir.from_proto(shaped)
    fold(model)
    fuse(model)
    return original, model


def feed_of(model: ir.Model) -> dict[str, np.ndarray]:
    shape = tuple(int(each) for each in model.graph.inputs[0].shape)
    return {"x": np.float16(normal(0, *shape)).astype(np.float32)}


def layer_of(model: ir.Model) -> ir.Node:
    return next(each for each in fused_nodes(model) if each.name == "layer")


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_are_read_as_they_are(kind: str, group: int, zero: bool, base: str) -> None:
    original, model = linear(kind, group=group, zero=zero)
    mixed = apply_precision(model, {}, base=base)
    assert "DequantizeLinear" not in operators(mixed)
    layer = layer_of(mixed)
    given, settings = plugin_tensors(layer), plugin_settings(layer)
    bits = 4 if kind.endswith("4") else 8
    assert settings["weights"] == ("int4" if bits == 4 else "none")
    assert settings["group_size"] == group
    assert (given["b"].dtype, given["b"].dims) == ("int8", (N, K * bits // 8))
    assert given["b_scale"].dims == ((K // group, N) if group else (N,))
    assert ("b_zero" in given) == (zero or kind.startswith("u"))
    feed = feed_of(model)
    # Nothing but the result is rounded.
    assert relative_error(output(mixed, feed), output(original, feed)) < {"fp16": 1e-3, "bf16": 6e-3}[base]


@pytest.mark.parametrize("form", ["rows", "transposed", "gemm"])
@pytest.mark.parametrize("kind", ["int8", "uint4"])
@pytest.mark.parametrize("group", [0, 32])
def test_however_weights_lie(form: str, kind: str, group: int) -> None:
    original, model = linear(kind, group=group, zero=True, form=form)
    mixed = apply_precision(model, {}, base="fp16")
    assert "DequantizeLinear" not in operators(mixed)
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_one_scale_for_all() -> None:
    original, model = linear("int4", scale=np.array(0.03, np.float32))
    mixed = apply_precision(model, {}, base="fp16")
    assert plugin_tensors(layer_of(mixed))["b_scale"].dims == (1,)
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_one_zero_point_for_all() -> None:
    """Of int8, which TensorRT has no zero points of: here it is the kernel's."""
    original, model = linear("int8", scale=np.array(0.03, np.float32), zero=True)
    mixed = apply_precision(model, {}, base="fp16")
    assert operators(mixed) == ["Cast", "FusedGemmBScaleBZero"]
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3
    spelled = apply_precision(model, {}, base="fp32")
    assert operators(spelled) == ["DequantizeLinear", "Sub", "FusedGemm"]
    assert relative_error(output(spelled, feed), output(original, feed)) < 1e-5


@pytest.mark.parametrize(("group", "k", "made"), [(256, 400, 128), (160, 96, 0), (96, 96, 0)])
def test_larger_blocks_are_said_in_those_that_kernels_have(group: int, k: int, made: int) -> None:
    original, model = linear("uint4", group=group, zero=True, k=k)
    mixed = apply_precision(model, {}, base="fp16")
    assert plugin_settings(layer_of(mixed))["group_size"] == made
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_a_transpose_that_turns_nothing() -> None:
    original, model = linear("int4", group=32)
    layer = layer_of(model)
    turn = ir.node("Transpose", [layer.inputs[1]], {"perm": [0, 1]}, name="turn")
    turn.outputs[0].name, turn.outputs[0].type, turn.outputs[0].shape = "t", layer.inputs[1].type, layer.inputs[1].shape
    model.graph.insert_before(layer, turn)
    layer.replace_input_with(1, turn.outputs[0])
    mixed = apply_precision(model, {}, base="fp16")
    assert "DequantizeLinear" not in operators(mixed)
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_products_share_their_weights() -> None:
    behind = node("Relu", ["m"], ["r"], name="act"), node("MatMul", ["r", "d"], ["y"], name="again")
    integers = np.random.default_rng(1).integers(-8, 8, (K, K))
    graph = helper.make_graph(
        [
            node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32, name="dequantise"),
            node("MatMul", ["x", "d"], ["m"], name="layer"),
            *behind,
        ],
        "model",
        [helper.make_tensor_value_info("x", 1, (4, K))],
        [helper.make_tensor_value_info("y", 1, None)],
        [tensor("w", "int4", integers), onnx.numpy_helper.from_array(np.full((3, K), 0.02, np.float32), "s")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(made, strict_mode=True))
    fuse(model)
    first, second = fused_nodes(apply_precision(model, {}, base="fp16"))
    for name in ("b", "b_scale"):
        assert plugin_inputs(first)[name] is plugin_inputs(second)[name]


def test_a_depth_that_fills_no_run_and_no_group() -> None:
    original, model = linear("uint4", group=32, zero=True, k=80)
    mixed = apply_precision(model, {}, base="fp16")
    assert plugin_tensors(layer_of(mixed))["b"].dims == (N, 48)
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_what_follows_is_in_the_layer() -> None:
    behind = (node("Sigmoid", ["m"], ["g"], name="gate"), node("Mul", ["m", "g"], ["y"], name="silu"))
    original, model = linear("int4", group=32, behind=behind, last="y")
    mixed = apply_precision(model, {}, base="fp16")
    assert operators(mixed) == ["Cast", "FusedGemmBScale"]
    assert plugin_settings(layer_of(mixed))["activation"] == "silu"
    feed = feed_of(model)
    assert relative_error(output(mixed, feed), output(original, feed)) < 1e-3


def test_scales_of_half_precision_stay_so() -> None:
    nodes = [
        node("DequantizeLinear", ["w", "s"], ["d"], axis=0, block_size=32, name="dequantise"),
        node("MatMul", ["x", "d"], ["y"], name="layer"),
    ]
    rng = np.random.default_rng(3)
    integers = rng.integers(-8, 8, (K, N))
    graph = helper.make_graph(
        nodes,
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, (4, K))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [tensor("w", "int4", integers), onnx.numpy_helper.from_array(rng.random((3, N)).astype(np.float16), "s")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    shaped = onnx.shape_inference.infer_shapes(made, strict_mode=True)
    model = ir.from_proto(shaped)
    fuse(model)
    mixed = apply_precision(model, {}, base="fp16")
    assert dtype_name(plugin_inputs(layer_of(mixed))["b_scale"]) == "fp16"
    feed = {"x": normal(4, 4, K, dtype=np.float16)}
    assert relative_error(output(mixed, feed), output(ir.from_proto(shaped), feed)) < 2e-3


def test_fp32_leaves_the_step() -> None:
    original, model = linear("int4", group=32)
    mixed = apply_precision(model, {}, base="fp32")
    assert operators(mixed) == ["DequantizeLinear", "FusedGemm"]
    assert relative_error(output(mixed, FEED), output(original, FEED)) < 1e-6


def test_what_no_kernel_has_leaves_the_step() -> None:
    for _, model in (
        linear("int4", group=10, k=100),  # a group that is no multiple of 16
        linear("int4", group=32),
    ):
        mixed = apply_precision(model, {}, base="fp16", device=resolve_device("sm_75"))
        refused = "DequantizeLinear" in operators(mixed)
        assert refused == (plugin_settings(layer_of(mixed))["weights"] == "none")
        feed = feed_of(model)
        assert relative_error(output(mixed, feed), output(model, feed)) < 2e-3
    _, model = linear("int4", group=10, k=100)
    assert "DequantizeLinear" in operators(apply_precision(model, {}, base="fp16"))


def test_scales_along_the_depth_leave_the_step() -> None:
    _, model = linear("int8", scale=np.full(K, 0.1, np.float32), form="rows")
    step = next(each for each in model.graph if each.op_type == "DequantizeLinear")
    step.attributes["axis"] = ir.AttrInt64("axis", 0)
    mixed = apply_precision(model, {}, base="fp16")
    assert "DequantizeLinear" in operators(mixed)

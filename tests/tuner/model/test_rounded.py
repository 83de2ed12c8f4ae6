"""What fp16 values are in ONNX Runtime: rounded, and infinite beyond the range, wherever a model says fp16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.tuner.model.graphs import model_of, normal
from tilewright.tuner.model import session
from tilewright.tuner.model.rounded import has_fp16, round_fp16
from tilewright.tuner.model.session import run

FP16 = TensorProto.FLOAT16
ONE = numpy_helper.from_array(np.float16(1))
X = np.array([300, 20, 127.992], np.float32)


def node(operator: str, used: str, made: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, used.split(), made.split(), **attributes)


def to_fp16(used: str, made: str) -> onnx.NodeProto:
    return node("Cast", used, made, to=FP16)


def to_fp32(used: str, made: str) -> onnx.NodeProto:
    return node("Cast", used, made, to=TensorProto.FLOAT)


def chains(**constants: np.ndarray) -> ir.Model:
    """Nodes that ONNX Runtime has no fp16 kernels of on the CPU, one behind the other."""
    nodes = [
        to_fp16("x", "h"),
        node("Mul", "h h", "square"),
        node("Mul", "square small", "scaled"),
        to_fp32("scaled", "y"),
        node("Exp", "h", "power"),
        node("Log", "power", "log"),
        to_fp32("log", "z"),
        node("Floor", "h", "whole"),
        to_fp32("whole", "w"),
    ]
    return model_of(nodes, {"x": (3,)}, ["y", "z", "w"], {"small": np.float16(1e-3), **constants})


def check(results: Mapping[str, np.ndarray]) -> None:
    np.testing.assert_array_equal(np.isinf(results["y"]), [True, False, False])
    np.testing.assert_array_equal(np.isinf(results["z"]), [True, True, True])
    np.testing.assert_array_equal(results["w"], [300, 20, 128])
    half = X.astype(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(results["y"], half * half * np.float16(1e-3))


def test_what_passes_the_range_is_infinite_and_the_rest_rounded() -> None:
    (results,) = run(chains(), [{"x": X}])
    check(results)
    (inner,) = run(chains(), [{"x": X}], ["square", "scaled"])
    assert inner["square"].dtype == np.float16
    np.testing.assert_array_equal(np.isinf(inner["scaled"]), [True, False, False])


@pytest.mark.parametrize("own_bytes", [0, session.OWN_BYTES])
def test_a_file_that_does_not_say_the_types_of_its_values(
    own_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "OWN_BYTES", own_bytes)
    proto = ir.to_proto(chains())
    proto.graph.ClearField("value_info")
    onnx.save(proto, tmp_path / "model.onnx")
    (results,) = run(tmp_path / "model.onnx", [{"x": X}])
    check(results)


def test_subgraphs_round_as_well() -> None:
    nodes = [node("Mul", "h h", "inner"), node("Mul", "inner small", "chosen")]
    then = helper.make_graph(nodes, "then", [], [helper.make_tensor_value_info("chosen", FP16, [3])])
    other = helper.make_graph(
        [node("Identity", "h", "same")], "else", [], [helper.make_tensor_value_info("same", FP16, [3])]
    )
    outer = [to_fp16("x", "h"), node("If", "flag", "r", then_branch=then, else_branch=other), to_fp32("r", "y")]
    model = model_of(outer, {"x": (3,)}, ["y"], {"small": np.float16(1e-3), "flag": np.array(True)})
    (results,) = run(model, [{"x": X}])
    np.testing.assert_array_equal(np.isinf(results["y"]), [True, False, False])


def test_bf16_is_rounded() -> None:
    nodes = [
        node("Mul", "x x", "wide"),
        node("Cast", "wide", "narrow", to=TensorProto.BFLOAT16),
        to_fp32("narrow", "again"),
        node("Add", "again again", "y"),
    ]
    (results,) = run(model_of(nodes, {"x": (3,)}, ["y"], {}), [{"x": X}])
    bits = (X * X).view(np.uint32)
    np.testing.assert_array_equal(results["y"].view(np.uint32) & 0xFFFF, 0)
    assert np.any(bits & 0xFFFF)


def test_a_model_without_fp16_is_left_as_it_is() -> None:
    proto = ir.to_proto(model_of([node("Relu", "x", "y")], {"x": (3,)}, ["y"], {}))
    assert not has_fp16(proto)
    before = proto.SerializeToString()
    assert round_fp16(proto) is proto
    assert proto.SerializeToString() == before


@pytest.mark.parametrize(
    "nodes",
    [
        [to_fp16("x", "h"), to_fp32("h", "y")],
        [node("Constant", "", "c", value=ONE), to_fp32("c", "d"), node("Add", "x d", "y")],
        [node("RandomNormal", "", "c", dtype=FP16, shape=[3]), to_fp32("c", "d"), node("Add", "x d", "y")],
    ],
)
def test_fp16_is_found_where_only_a_node_says_it(nodes: list[onnx.NodeProto]) -> None:
    proto = ir.to_proto(model_of(nodes, {"x": (3,)}, ["y"], {}))
    proto.graph.ClearField("value_info")
    assert has_fp16(proto)


def test_nothing_stands_behind_what_only_moves_numbers() -> None:
    nodes = [to_fp16("x", "h"), node("Neg", "h", "n"), node("Mul", "n n", "m"), to_fp32("m", "y")]
    made = round_fp16(ir.to_proto(model_of(nodes, {"x": (3,)}, ["y"], {})))
    assert [each.op_type for each in made.graph.node] == [
        *("Cast", "Identity", "Identity"),
        "Neg",
        *("Mul", "Identity", "Identity"),
        "Cast",
    ]


def test_a_chain_of_layers_rounds_between_them() -> None:
    nodes = [to_fp16("x", "h0")]
    nodes += [node("Mul", f"h{index} c", f"h{index + 1}") for index in range(20)]
    model = model_of([*nodes, to_fp32("h20", "y")], {"x": (64,)}, ["y"], {"c": np.float16(1.1)})
    x = np.abs(normal(0, 64)) + 1
    (results,) = run(model, [{"x": x}])
    wanted = x.astype(np.float16)
    for _ in range(20):
        wanted = wanted * np.float16(1.1)
    np.testing.assert_array_equal(results["y"], wanted)


def test_names_that_are_there_are_not_given_again() -> None:
    nodes = [to_fp16("x", "h"), node("Mul", "h h", "h/rounded"), to_fp32("h/rounded", "y")]
    (results,) = run(model_of(nodes, {"x": (3,)}, ["y"], {}), [{"x": X}])
    half = X.astype(np.float16)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(results["y"], half * half)

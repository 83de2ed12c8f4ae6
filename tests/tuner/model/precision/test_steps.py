"""Quantise and dequantise steps say and do the same in every form."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.tuner.model.fused_nets import dtypes, node, operators, output
from tests.tuner.model.graphs import model_of, normal, relative_error
from tilewright.tuner.model.edit import Editor
from tilewright.tuner.model.precision.steps import (
    Grid,
    dequantised,
    drop_fp8_zero_points,
    drop_pairs,
    grid_of,
    make_signed,
    quantise_step,
    spell_out_zeros,
)
from tilewright.tuner.model.session import check_default

FEED = {"x": normal(0, 4, 8)}
THREE = np.int8(3)


def pair(*between: Any, last: str = "d", zero: Any = THREE, opset: int = 21, **more: np.ndarray) -> ir.Model:
    """x → two steps of scale 1/32 (`q`, `d`) → what is between → Neg → y."""
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="dequantise"),
        *between,
        node("Neg", [last], ["y"], name="neg"),
    ]
    constants = {"scale": np.array(1 / 32, np.float32), "zero": np.asarray(zero), **more}
    return model_of(nodes, {"x": (4, 8)}, ["y"], constants, opset=opset)


def step(model: ir.Model, name: str) -> ir.Node:
    return next(each for each in model.graph if each.name == name)


def test_the_grid_of_a_step() -> None:
    model = pair()
    grid = Grid(1 / 32, "int8", 3)
    assert grid_of(step(model, "quantise")) == grid_of(step(model, "dequantise")) == grid
    assert grid_of(step(model, "neg")) is None
    known = dequantised(step(model, "dequantise").outputs[0])
    assert known == (step(model, "quantise").outputs[0], grid)
    assert dequantised(step(model, "quantise").outputs[0]) is None


def test_a_scale_for_each_channel_is_no_grid() -> None:
    model = pair(zero=np.zeros(8, np.int8), scale=np.full(8, 1 / 32, np.float32))
    assert grid_of(step(model, "quantise")) is None


@pytest.mark.parametrize("opset", [19, 21])
@pytest.mark.parametrize("zero", [0, -128, 7])
def test_a_new_step_says_its_type(opset: int, zero: int) -> None:
    model = model_of([node("Neg", ["x"], ["y"], name="neg")], {"x": (4, 8)}, ["y"], {}, opset=opset)
    made = quantise_step(Editor(model), model.graph.inputs[0], Grid(1 / 32, "int8", zero), opset)
    model.graph.append(ir.node("DequantizeLinear", [made.outputs[0], *made.inputs[1:]], name="dequantise"))
    back = model.graph[-1].outputs[0]
    back.name, back.type, back.shape = "back", ir.TensorType(ir.DataType.FLOAT), ir.Shape([4, 8])
    model.graph.outputs[0] = back
    assert grid_of(made) == Grid(1 / 32, "int8", zero)
    wanted = np.clip(np.rint(FEED["x"] * 32), -128 - zero, 127 - zero) / 32
    np.testing.assert_array_equal(output(model, FEED), wanted.astype(np.float32))


def test_unsigned_integers_become_signed_ones() -> None:
    model = pair(zero=np.uint8(100))
    wanted = output(model, FEED)
    make_signed(model)
    assert dtypes(model)["q"] == "int8"
    assert grid_of(step(model, "dequantise")) == Grid(1 / 32, "int8", -28)
    np.testing.assert_array_equal(output(model, FEED), wanted)


def test_a_step_without_a_zero_point_is_to_unsigned_integers() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "scale"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "scale"], ["y"], name="dequantise"),
    ]
    model = model_of(nodes, {"x": (4, 8)}, ["y"], {"scale": np.array(1 / 32, np.float32)})
    wanted = output(model, FEED)
    make_signed(model)
    assert grid_of(step(model, "quantise")) == Grid(1 / 32, "int8", -128)
    np.testing.assert_array_equal(output(model, FEED), wanted)


def test_unsigned_integers_that_something_else_reads_stay() -> None:
    counted = node("Cast", ["q"], ["c"], to=1, name="count")
    both = node("Add", ["c", "d"], ["s"], name="both")
    other = node("DequantizeLinear", ["q", "half", "zero"], ["e"], name="otherwise")
    third = node("Add", ["d", "e"], ["t"], name="sum")
    half = np.array(0.5, np.float32)
    for model in (
        pair(counted, both, last="s", zero=np.uint8(100)),
        pair(other, third, last="t", zero=np.uint8(100), half=half),
    ):
        wanted = output(model, FEED)
        make_signed(model)
        assert dtypes(model)["q"] == "uint8"
        np.testing.assert_array_equal(output(model, FEED), wanted)


def again(scale: str) -> list[Any]:
    return [
        node("QuantizeLinear", ["d", scale, "zero"], ["r"], name="again"),
        node("DequantizeLinear", ["r", scale, "zero"], ["e"], name="back"),
    ]


def test_steps_that_undo_each_other_are_dropped() -> None:
    same, other = pair(*again("scale"), last="e"), pair(*again("wide"), last="e", wide=np.array(1 / 16, np.float32))
    for model, left in ((same, 1), (other, 2)):
        wanted = output(model, FEED)
        drop_pairs(model)
        assert operators(model).count("QuantizeLinear") == left
        np.testing.assert_array_equal(output(model, FEED), wanted)


@pytest.mark.parametrize("opset", [19, 21])
def test_zero_points_are_spelled_out(opset: int) -> None:
    model = pair(zero=np.int8(-100), opset=opset)
    wanted = output(model, FEED)
    names = spell_out_zeros(model)
    assert operators(model) == ["Sub", "QuantizeLinear", "DequantizeLinear", "Sub", "Neg"]
    assert set(names) == {each.name for each in model.graph if each.op_type == "Sub"}
    assert grid_of(step(model, "quantise")) == grid_of(step(model, "dequantise")) == Grid(1 / 32, "int8")
    assert dtypes(model)["q"] == "int8"
    assert relative_error(output(model, FEED), wanted) < 1e-6
    assert spell_out_zeros(model) == []


def test_an_output_keeps_its_name() -> None:
    nodes = [
        node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="quantise"),
        node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="dequantise"),
    ]
    model = model_of(
        nodes, {"x": (4, 8)}, ["y"], {"scale": np.array(1 / 32, np.float32), "zero": np.array(-100, np.int8)}
    )
    wanted = output(model, FEED)
    spell_out_zeros(model)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert relative_error(output(model, FEED), wanted) < 1e-6


@pytest.mark.parametrize("zero", [np.uint8(100), np.int16(-100), np.int8(0)])
def test_other_zero_points_stay(zero: Any) -> None:
    model = pair(zero=zero)
    assert spell_out_zeros(model) == []
    assert operators(model) == ["QuantizeLinear", "DequantizeLinear", "Neg"]


def test_nodes_without_inputs_and_steps_that_make_nan_are_passed_by() -> None:
    alone = node("Constant", [], ["k"], value=onnx.numpy_helper.from_array(np.float32(2), "k"), name="number")
    model = pair(alone, node("Mul", ["d", "k"], ["m"], name="times"), last="m")
    drop_pairs(model)
    assert "Constant" in operators(model)
    wide = model_of(
        [
            node("QuantizeLinear", ["x", "scale", "zero"], ["q"], saturate=0, name="quantise"),
            node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="dequantise"),
        ],
        {"x": (4, 8)},
        ["y"],
        {"scale": np.array(1, np.float32), "zero": np.array(0, ml_dtypes.float8_e4m3fn)},
    )
    assert grid_of(step(wide, "quantise")) is None
    assert grid_of(step(pair(zero=ml_dtypes.float8_e4m3fn(np.nan)), "quantise")) is None


def test_unsigned_integers_stay_where_onnx_runtime_would_break_signed_ones() -> None:
    pooled = node("MaxPool", ["r"], ["m"], kernel_shape=[1], name="pool"), node("Sigmoid", ["m"], ["t"], name="act")
    for opset, kind in ((20, "int8"), (21, "uint8")):
        raised = node("Unsqueeze", ["d", "axis"], ["r"], name="raise")
        model = pair(raised, *pooled, last="t", zero=np.uint8(128), opset=opset, axis=np.array([0]))
        wanted = output(model, FEED)
        make_signed(model)
        assert dtypes(model)["q"] == kind
        check_default(model, "signed", FEED)
        np.testing.assert_array_equal(output(model, FEED), wanted)


def test_steps_of_fp8_say_their_type_where_they_can() -> None:
    for opset, inputs in ((19, 3), (21, 2)):
        model = pair(zero=ml_dtypes.float8_e4m3fn(0), opset=opset)
        wanted = output(model, FEED)
        drop_fp8_zero_points(model)
        assert [len(each.inputs) for each in list(model.graph)[:2]] == [inputs] * 2
        np.testing.assert_array_equal(output(model, FEED), wanted)

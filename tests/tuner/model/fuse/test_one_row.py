"""Convolutions in one dimension, as those of images of one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.folding.fold import fold
from tilewright.tuner.model.fuse import FusionReport, fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_settings
from tilewright.tuner.model.precision.given import given_layers
from tilewright.tuner.model.precision.quantise import apply_precision

make = helper.make_node
FILTERS, OTHERS = normal(1, 16, 16, 3) / 8, normal(2, 16, 16, 1) / 4
STEPS = ("QuantizeLinear", "DequantizeLinear")
CONSTANTS = {"f": FILTERS, "g": OTHERS, "b": normal(3, 16, 1)}


def conv(x: str, out: str, filters: str = "f", **settings: Any) -> Any:
    return make(
        "Conv", [x, filters], [out], name=f"conv_{out}", **({"pads": [1, 1]} if filters == "f" else {}), **settings
    )


def fused(
    nodes: list[Any], constants: dict[str, np.ndarray] = CONSTANTS, outputs: tuple[str, ...] = ("y",)
) -> tuple[FusionReport, ir.Model]:
    """Fails unless a model computes what it did once it is fused."""
    used = {name for node in nodes for name in node.input}
    shapes = {"x": (1, 16, 21), "r": (1, 16, 21), "e": (1, 16, 1)}
    inputs = {name: shape for name, shape in shapes.items() if name in used}
    model = model_of(nodes, inputs, outputs, {name: array for name, array in constants.items() if name in used})
    feeds = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(inputs.items())}
    wanted = results(model, feeds)
    report = fuse(model)
    for got, each in zip(results(model, feeds), wanted, strict=True):
        assert relative_error(got, each) < 1e-5
    return report, model


def kinds(model: ir.Model) -> list[str]:
    """What is there but reshapes."""
    return [node.op_type for node in model.graph if node.op_type != "Reshape"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strides": [2], "pads": [1, 2]},
        {"dilations": [3], "pads": [4, 0]},
        {"auto_pad": "SAME_UPPER", "strides": [2]},
        {"auto_pad": "SAME_LOWER"},
        {"auto_pad": "VALID"},
        {"group": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("computed", [True, False], ids=["filters are computed", "filters are constant"])
def test_a_convolution_in_one_dimension_is_that_of_one_row(settings, computed):
    """Of a convolution and a GELU, twice, as Whisper begins."""
    make = helper.make_node
    channels = 16 // settings.get("group", 1)
    nodes = [
        make("Conv", ["x", "v" if computed else "f", "b"], ["c"], name="first", **settings),
        make("Gelu", ["c"], ["d"]),
        make("Conv", ["d", "g"], ["e"], name="second", pads=[1, 1]),
        make("Relu", ["e"], ["y"]),
    ]
    filters = normal(1, 16, channels, 3) / 8
    constants = {"b": normal(2, 16), "g": normal(3, 8, 16, 3) / 8} | ({} if computed else {"f": filters})
    inputs = {"x": (2, 16, 21)} | ({"v": filters.shape} if computed else {})
    model = model_of(nodes, inputs, ["y"], constants)
    feeds = {"x": normal(0, 2, 16, 21), "v": filters}
    feeds = {name: array for name, array in feeds.items() if name in inputs}
    (wanted,) = results(model, feeds)
    fuse(model)
    assert [plugin_settings(node)["activation"] for node in fused_nodes(model)] == ["gelu_erf", "relu"]
    assert {node.op_type for node in model.graph} == {"Reshape", "FusedConv2dBias", "FusedConv2d"}
    (got,) = results(model, feeds)
    assert relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        ([make("Add", ["c", "r"], ["y"])], "FusedConv2dResidual"),
        ([make("Add", ["r", "c"], ["y"])], "FusedConv2dResidual"),
        ([make("Relu", ["c"], ["a"]), make("Add", ["a", "r"], ["y"])], "FusedConv2dResidual"),
        ([make("Add", ["c", "x"], ["s"]), make("Relu", ["s"], ["y"])], "FusedConv2dResidual"),
        ([make("Add", ["c", "e"], ["s"]), make("Add", ["s", "r"], ["y"])], "FusedConv2dBiasResidual"),
        ([make("Add", ["b", "c"], ["s"]), make("Relu", ["s"], ["y"])], "FusedConv2dBias"),
    ],
    ids=["a residual", "first", "behind an activation", "the input", "a computed bias and a residual", "a constant"],
)
def test_what_is_added_behind_is_taken_in(after: list[Any], kind: str) -> None:
    report, model = fused([conv("x", "c"), *after])
    assert kinds(model) == [kind]
    assert not report.misses
    assert report.ends == {"conv_c": "its result is an output of the model"}


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ([make("Add", ["c", "c"], ["y"], name="sum")], "the result is added to itself"),
        (
            [make("Add", ["c", "l"], ["y"], name="sum")],
            "what is added, 'l', has the shape (1, 1, 21), and the result (1,",
        ),
    ],
    ids=["itself", "a vector along the row"],
)
def test_why_a_sum_is_left_is_told(after: list[Any], reason: str) -> None:
    report, model = fused([conv("x", "c"), *after], CONSTANTS | {"l": normal(4, 1, 21)})
    assert kinds(model) == ["FusedConv2d", "Add"]
    assert reason in {miss.pattern: miss.reason for miss in report.misses}["conv2d + residual"]


def test_where_a_chain_ends_is_told_by_nodes_of_the_model() -> None:
    """A node of its own has the name that the reshape would have."""
    nodes = [conv("x", "c"), make("Tanh", ["c"], ["t"]), make("Sin", ["t"], ["y"], name="conv_c_Reshape")]
    report, model = fused(nodes)
    assert report.ends == {"conv_c": "its result goes to Sin 'conv_c_Reshape'"}
    names = [node.name for node in model.graph]
    assert len(names) == len(set(names))
    report, _ = fused([conv("x", "c"), make("Relu", ["c"], ["a"]), make("Tanh", ["a"], ["y"], name="act")])
    assert report.ends == {"conv_c": "its result goes to Tanh 'act'"}


def test_a_gate_of_halves_is_one_of_a_convolution() -> None:
    nodes = [conv("x", "c"), make("Split", ["c"], ["p", "q"], axis=1, num_outputs=2)]
    report, _ = fused([*nodes, make("Sigmoid", ["q"], ["s"]), make("Mul", ["p", "s"], ["y"], name="glu")])
    assert [(miss.node, miss.reason) for miss in report.misses] == [("conv_c", "convolutions have no gate")]


def test_filters_that_several_layers_share_are_written_once() -> None:
    _, model = fused([conv("x", "c"), conv("c", "d"), make("Tanh", ["d"], ["t"]), conv("t", "y")])
    filters = [value for value in model.graph.initializers.values() if len(value.shape or ()) in (3, 4)]
    assert [value.shape for value in filters] == [(16, 16, 1, 3)]


def test_a_value_gets_one_form_of_one_row() -> None:
    nodes = [
        conv("x", "c"),
        make("Relu", ["c"], ["a"]),
        conv("a", "d"),
        conv("a", "h", "g"),
        make("Add", ["d", "a"], ["z"]),
    ]
    _, model = fused([*nodes, make("Sub", ["z", "h"], ["y"])])
    (shared,) = [node for node in model.graph for value in node.inputs if value is not None and value.name == "a"]
    assert {user.op_type for user, _ in shared.outputs[0].uses()} == {"FusedConv2d", "FusedConv2dResidual"}


def test_a_result_of_unknown_shape_is_left() -> None:
    model = model_of([conv("x", "c"), make("Relu", ["c"], ["y"])], {"x": (1, 16, 21)}, ["y"], CONSTANTS)
    model.graph[0].outputs[0].shape = None
    report = fuse(model)
    assert model.graph[0].op_type == "Conv"
    assert [miss.reason for miss in report.misses] == ["the shape of its result is not known"]


def quantised(kind: str, zero: int, opset: int, *, residual: bool = True) -> ir.Model:
    """Two convolutions that read steps, the second with what the first reads as a residual."""
    rng = np.random.default_rng(0)
    constants: dict[str, np.ndarray] = {
        "s": np.float32(0.05),
        "z": np.asarray(zero, kind),
        "zero": np.zeros(16, np.int8),
    }
    nodes = []
    for layer, x in (("1", "x"), ("2", "a")):
        constants[f"q{layer}"] = rng.integers(-127, 128, (16, 16, 3)).astype(np.int8)
        constants[f"t{layer}"] = np.float32(0.001 + rng.random(16) / 1000)
        nodes += [
            make("QuantizeLinear", [x, "s", "z"], [f"{x}_q"], name=f"quantise{layer}"),
            make("DequantizeLinear", [f"{x}_q", "s", "z"], [f"{x}_dq"], name=f"dequantise{layer}"),
            make("DequantizeLinear", [f"q{layer}", f"t{layer}", "zero"], [f"w{layer}"], axis=0),
            make("Conv", [f"{x}_dq", f"w{layer}"], [f"c{layer}"], name=f"layer{layer}", pads=[1, 1]),
        ]
        nodes += [make("Relu", ["c1"], ["a"], name="relu")] if layer == "1" else []
    nodes.append(make("Add", ["c2", "x_dq"], ["y"], name="sum") if residual else make("Neg", ["c2"], ["y"], name="neg"))
    return model_of(nodes, {"x": (2, 16, 21)}, ["y"], constants, opset=opset)


@pytest.mark.parametrize("opset", [20, 21])
@pytest.mark.parametrize(("kind", "zero"), [("int8", 0), ("int8", 3), ("uint8", 128), ("uint8", 100)])
def test_steps_stand_right_in_front_of_the_layer(kind: str, zero: int, opset: int) -> None:
    """Where ONNX Runtime's optimisations leave them whole, and the layer can read their integers."""
    model, feeds = quantised(kind, zero, opset), {"x": normal(0, 2, 16, 21)}
    (wanted,) = results(model, feeds)
    fold(model)
    fuse(model)
    assert kinds(model) == [*STEPS, "FusedConv2d", *STEPS, "FusedConv2dResidual"]
    for node in model.graph:
        if node.op_type == "DequantizeLinear":
            assert {user.op_type for user, _ in node.outputs[0].uses()} <= {"FusedConv2d", "FusedConv2dResidual"}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    assert relative_error(session.run(None, feeds)[0], wanted) < 2e-2  # a number between two integers may become either


@pytest.mark.parametrize("on", ["filters", "input"])
def test_steps_whose_one_scale_is_that_of_a_block_stay(on: str) -> None:
    """The scale has three axes, as what it is for; of a tensor with four, no runtime takes it."""
    shapes = {"x": (1, 1, 16), "f": (1, 1, 4)}
    constants: dict[str, np.ndarray] = {"s": np.float32([[[0.02]]]), "z": np.zeros((1, 1, 1), np.int8)}
    if on == "filters":
        constants["q"] = np.int8([[[-100, 3, 50, 127]]])
        nodes = [make("DequantizeLinear", ["q", "s", "z"], ["w"], axis=2, block_size=4)]
        nodes.append(make("Conv", ["x", "w"], ["y"], name="layer"))
    else:
        constants["f"] = normal(1, *shapes["f"])
        nodes = [
            make("QuantizeLinear", ["x", "s", "z"], ["x_q"], axis=2, block_size=16),
            make("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], axis=2, block_size=16),
            make("Conv", ["x_dq", "f"], ["y"], name="layer"),
        ]
    model, feeds = model_of(nodes, {"x": shapes["x"]}, ["y"], constants, opset=21), {"x": normal(0, *shapes["x"])}
    (wanted,) = results(model, feeds)
    fuse(model)
    assert [node.op_type for node in fused_nodes(model)] == ["FusedConv2d"]
    assert relative_error(results(model, feeds)[0], wanted) < 1e-5


@pytest.mark.parametrize(("kind", "zero"), [("int8", 0), ("uint8", 128)])
def test_layers_that_came_quantised_read_integers(kind: str, zero: int) -> None:
    """In opset 21 too, where steps of uint8 in front of what moves numbers would have to stay."""
    model, feeds, device = (
        quantised(kind, zero, 21, residual=False),
        {"x": normal(0, 2, 16, 21)},
        resolve_device("sm_86"),
    )
    (wanted,) = results(model, feeds)
    fold(model)
    report = fuse(model)
    assert report.ends["layer1"] == "its result goes to QuantizeLinear 'quantise2'"
    names = [node.name for node in model.graph if node.op_type in STEPS]
    assert names == ["quantise1", "dequantise1", "quantise2", "dequantise2"]
    given = given_layers(model, device)
    assert list(given.plan) == ["layer1", "layer2"]
    half = apply_precision(model, given.plan, base="fp16", device=device, weights=given.weights)
    assert kinds(half)[:3] == ["QuantizeLinear", "FusedConv2dXScaleWScaleOutScale", "FusedConv2dXScaleWScale"]
    assert relative_error(results(half, feeds)[0], wanted) < 1e-2


def test_a_scale_that_is_computed_is_there_before_the_step() -> None:
    nodes = [
        make("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        make("Abs", ["s"], ["t"]),
        make("DequantizeLinear", ["q", "t", "z"], ["d"]),
        conv("d", "y"),
    ]
    _, model = fused(nodes)
    assert kinds(model) == ["DynamicQuantizeLinear", "Abs", "DequantizeLinear", "FusedConv2d"]

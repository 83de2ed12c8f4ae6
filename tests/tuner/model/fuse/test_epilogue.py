"""Chains that become one node compute what they did; those that can't say why."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, relative_error, results
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes, plugin_inputs, plugin_settings

make = helper.make_node
X = {"x": (6, 16)}
W, V = normal(1, 16, 24) / 4, normal(2, 16, 24) / 4
B, C = normal(3, 24), normal(4, 24)
IMAGE = {"x": (2, 8, 9, 9)}
FILTERS = normal(5, 16, 8, 3, 3) / 8
CHANNEL = normal(6, 1, 16, 1, 1)


def fused(nodes, inputs, constants, outputs=("y",)):
    """Fuses a model; what it gives before and after is near. Returns the report and the fused nodes."""
    model = model_of(nodes, inputs, outputs, constants)
    feeds = {name: normal(7 + index, *shape) for index, (name, shape) in enumerate(inputs.items())}
    before = results(model, feeds)
    report = fuse(model)
    for got, wanted in zip(results(model, feeds), before, strict=True):
        assert relative_error(got, wanted) <= 1e-5
    assert [value.name for value in model.graph.outputs] == list(outputs)
    assert set(report.layers) == {node.name for node in fused_nodes(model)}
    return report, fused_nodes(model), model


def product(out="p", w="w", x="x"):
    return make("MatMul", [x, w], [out], name=f"product_{out}")


@pytest.mark.parametrize(
    ("nodes", "plugin", "settings"),
    [
        ([product("y")], "FusedGemm", {}),
        ([product(), make("Add", ["p", "b"], ["y"])], "FusedGemmBias", {}),
        ([product(), make("Add", ["b", "p"], ["y"])], "FusedGemmBias", {}),
        ([product(), make("Add", ["p", "b"], ["q"]), make("Add", ["c", "q"], ["y"])], "FusedGemmBias", {}),
        ([product(), make("Add", ["p", "r"], ["y"])], "FusedGemmResidual", {}),
        (
            [product(), make("Add", ["p", "b"], ["q"]), make("Add", ["r", "q"], ["s"]), make("Relu", ["s"], ["y"])],
            "FusedGemmBiasResidual",
            {"activation": "relu"},
        ),
        (
            [product(), make("Add", ["r", "p"], ["q"]), make("Add", ["q", "b"], ["s"]), make("Tanh", ["s"], ["y"])],
            "FusedGemmBiasResidual",
            {"activation": "tanh"},
        ),
        ([product(), make("Add", ["p", "one"], ["q"]), make("Relu", ["q"], ["y"])], "FusedGemmBias", {}),
        (
            [make("Gemm", ["x", "wt", "b"], ["p"], transB=1, name="g"), make("Softplus", ["p"], ["y"])],
            "FusedGemmBias",
            {"trans_b": 1, "activation": "softplus"},
        ),
        ([make("Gemm", ["x", "w", "b"], ["y"], alpha=0.5, beta=2.0, name="g")], "FusedGemmBias", {}),
        ([make("Gemm", ["x", "w", "r"], ["y"], name="g")], "FusedGemmResidual", {}),
        ([make("Gemm", ["x", "w", "one"], ["y"], name="g")], "FusedGemmBias", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_chains_of_a_matrix_product(nodes, plugin, settings):
    constants = {"w": W, "wt": np.ascontiguousarray(W.T), "b": B, "c": C, "one": np.array([0.25], np.float32)}
    used = {name for node in nodes for name in node.input}
    inputs = {**X, **({"r": (6, 24)} if "r" in used else {})}
    report, found, _ = fused(nodes, inputs, {name: array for name, array in constants.items() if name in used})
    assert [node.op_type for node in found] == [plugin]
    for name, wanted in settings.items():
        assert plugin_settings(found[0])[name] == wanted
    assert found[0].name == nodes[0].name
    assert report.nodes_after == 1


@pytest.mark.parametrize(
    "nodes",
    [
        [product(), make("Add", ["p", "r"], ["y"])],
        [product(), make("Add", ["r", "p"], ["q"]), make("Add", ["q", "b"], ["y"])],
        [product(), product("q", "v"), make("Add", ["p", "q"], ["y"])],
        [product(), product("q", "v"), make("Tanh", ["q"], ["t"]), make("Mul", ["p", "t"], ["y"])],
        [product(), product("q", "v"), make("Tanh", ["q"], ["t"]), make("Mul", ["t", "p"], ["y"])],
    ],
    ids=["residual", "residual and bias", "two products", "gate that is second", "gate that is first"],
)
def test_what_is_fused_after_all_is_no_miss(nodes):
    """A residual is seen to be no bias, a gate not to be what it gates, before the rule that is right comes by."""
    used = {name for node in nodes for name in node.input}
    constants = {name: array for name, array in {"w": W, "v": V, "b": B}.items() if name in used}
    report, _, model = fused(nodes, {**X, **({"r": (6, 24)} if "r" in used else {})}, constants)
    assert all(node.op_type.startswith("FusedGemm") for node in model.graph)
    assert report.to_dict()["left"] == []


def test_what_is_no_bias_and_no_residual_is_left_with_both_reasons():
    report, _, _ = fused([product(), make("Add", ["p", "r"], ["y"])], {**X, "r": (6, 1)}, {"w": W})
    assert {miss.pattern for miss in report.misses} == {"gemm + bias", "gemm + residual"}


def test_an_activation_comes_last():
    nodes = [product(), make("Relu", ["p"], ["q"]), make("Add", ["q", "b"], ["y"])]
    report, found, model = fused(nodes, X, {"w": W, "b": B})
    assert plugin_settings(found[0])["activation"] == "relu"
    assert [node.op_type for node in model.graph] == ["FusedGemm", "Add"]
    assert "after the activation" in {miss.pattern: miss.reason for miss in report.misses}["gemm + bias"]


def test_a_result_that_is_used_twice_ends_the_chain():
    nodes = [product(), make("Relu", ["p"], ["q"]), make("Add", ["p", "q"], ["y"])]
    report, found, model = fused(nodes, X, {"w": W})
    assert [node.op_type for node in model.graph] == ["FusedGemm", "Relu", "Add"]
    assert report.ends["product_p"] == "its result is used 2 times"
    nodes = [product(), make("Relu", ["p"], ["y"])]
    _, found, model = fused(nodes, X, {"w": W}, outputs=("y", "p"))
    assert plugin_settings(found[0])["activation"] == "none"


def test_a_model_that_ends_with_a_product():
    report, _, _ = fused([product("y")], X, {"w": W})
    assert report.ends == {"product_y": "its result is an output of the model"}


def gate(order, *, split=False, activation="Sigmoid"):
    """silu(x·Wg + b) · (x·Wu)."""
    if split:
        nodes = [make("MatMul", ["x", "both"], ["p"], name="product_p")]
        nodes.append(make("Split", ["p"], ["g", "u"], axis=-1, num_outputs=2))
    else:
        nodes = [product("gp", "w"), make("Add", ["gp", "b"], ["g"]), product("u", "v")]
    nodes += [make(activation, ["g"], ["s"]), make("Mul", ["g", "s"], ["a"])]
    return [*nodes, make("Mul", ["a", "u"] if order else ["u", "a"], ["y"])]


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_gate_and_its_product_are_one(order, residual, split):
    nodes, inputs = gate(order, split=split), dict(X)
    constants = {"both": np.concatenate([W, V], 1)} if split else {"w": W, "v": V, "b": B}
    if residual:
        nodes[-1].output[0] = "m"
        nodes.append(make("Add", ["m", "r"], ["y"]))
        inputs["r"] = (6, 24)
    report, found, model = fused(nodes, inputs, constants)
    (node,) = found
    assert plugin_settings(node)["gated"] == "halves"
    assert plugin_settings(node)["activation"] == "silu"
    assert ("residual" in plugin_inputs(node)) == residual
    assert ("bias" in plugin_inputs(node)) == (not split)
    assert len(model.graph) == 1
    assert report.counts()["gemm + gate"] == 1


def halved(*names, activated=1):
    """gelu of one half of the columns, times the other."""
    nodes = [make("Split", ["p"], list(names), axis=-1, num_outputs=2), make("Gelu", [names[activated]], ["s"])]
    return [*nodes, make("Mul", [names[1 - activated], "s"], ["y"])]


@pytest.mark.parametrize("activated", [0, 1])
@pytest.mark.parametrize("form", ["plain", "turned", "of a batch"])
@pytest.mark.parametrize("bias", [False, True])
def test_either_half_may_be_the_gate(activated, form, bias):
    """diffusers' GEGLU, x·gelu(g), and torch's glu, a·sigmoid(b), have the second: kernels the first."""
    both, inputs = np.concatenate([W, V], 1), dict(X)
    nodes = [make("MatMul", ["x", "both"], ["m"], name="product"), make("Add", ["m", "bs"], ["p"])]
    if form == "turned":
        both = np.ascontiguousarray(both.T)
        nodes = [make("Gemm", ["x", "both", *["bs"] * bias], ["p"], name="product", transB=1)]
    elif form == "of a batch":
        both, inputs = np.stack([both, both[::-1] / 2]), {"x": (2, 6, 16)}
    if not bias and form != "turned":
        nodes = [make("MatMul", ["x", "both"], ["p"], name="product")]
    constants = {"both": both, **({"bs": np.concatenate([B, C])} if bias else {})}
    _, (node,), model = fused([*nodes, *halved("l", "r", activated=activated)], inputs, constants)
    assert len(model.graph) == 1
    assert plugin_settings(node)["gated"] == "halves"
    assert plugin_settings(node)["activation"] == "gelu_erf"
    assert ("bias" in plugin_inputs(node)) == bias


@pytest.mark.parametrize("open_ends", [{"both": (16, 48)}, {"bs": (48,)}], ids=str)
def test_only_constants_can_be_turned_for_a_gate_that_is_second(open_ends):
    nodes = [make("MatMul", ["x", "both"], ["m"], name="product"), make("Add", ["m", "bs"], ["p"])]
    constants = {"both": np.concatenate([W, V], 1), "bs": np.concatenate([B, C])}
    constants = {name: array for name, array in constants.items() if name not in open_ends}
    report, (node,), _ = fused([*nodes, *halved("l", "r")], {**X, **open_ends}, constants)
    assert plugin_settings(node)["gated"] == "none"
    (miss,) = [miss for miss in report.misses if miss.pattern == "gemm + gate"]
    assert miss.node == "product"
    assert "no constants" in miss.reason
    _, (node,), _ = fused([*nodes, *halved("l", "r", activated=0)], {**X, **open_ends}, constants)
    assert plugin_settings(node)["gated"] == "halves"


@pytest.mark.parametrize("sizes", [(12, 12, 24), (16, 16, 16), (24, 24)])
def test_two_parts_of_more_are_no_halves(sizes):
    names = ["g", "u", "rest"][: len(sizes)]
    nodes = [make("MatMul", ["x", "both"], ["p"]), make("Split", ["p", "sizes"], names, axis=-1)]
    nodes += [make("Sigmoid", ["g"], ["s"]), make("Mul", ["g", "s"], ["a"]), make("Mul", ["a", "u"], ["y"])]
    constants = {"both": np.concatenate([W, V], 1), "sizes": np.array(sizes)}
    report, found, _ = fused(nodes, X, constants)
    assert (plugin_settings(found[0])["gated"] == "halves") == (len(sizes) == 2)
    if len(sizes) > 2:
        assert "not into halves" in next(miss.reason for miss in report.misses if miss.pattern == "gemm + gate")


def test_halves_of_the_rows_are_no_halves():
    nodes = [make("MatMul", ["x", "both"], ["p"]), make("Split", ["p"], ["g", "u"], axis=0, num_outputs=2)]
    nodes += [make("Sigmoid", ["g"], ["s"]), make("Mul", ["g", "s"], ["a"]), make("Mul", ["a", "u"], ["y"])]
    report, found, _ = fused(nodes, X, {"both": np.concatenate([W, V], 1)})
    assert plugin_settings(found[0])["gated"] != "halves"
    assert "not into halves" in next(miss.reason for miss in report.misses if miss.pattern == "gemm + gate")


def conv(**attributes):
    return make("Conv", ["x", "f"], ["p"], name="conv", **attributes)


GATE = [
    make("Split", ["p"], ["g", "u"], axis=1, num_outputs=2),
    make("Gelu", ["g"], ["s"]),
    make("Mul", ["s", "u"], ["y"]),
]
BOTH = [make("MatMul", ["x", "both"], ["p"], name="product")]


@pytest.mark.parametrize(
    ("nodes", "outputs", "inputs", "pattern", "node", "reason"),
    [
        ([conv(), *GATE], "y", IMAGE, "conv2d + gate", "conv", "convolutions have no gate"),
        ([*BOTH, *GATE], "yp", X, "gemm + gate", "product", "is used elsewhere, too: 'p'"),
        ([*BOTH, *GATE], "yu", X, "gemm + gate", "product", "is used elsewhere, too: 'u'"),
        ([*BOTH, *GATE, make("Neg", ["s"], ["n"])], "yn", X, "gemm + gate", "product", "is used elsewhere, too: 's'"),
        (
            [*BOTH, *GATE[:2], make("Tanh", ["u"], ["t"]), make("Mul", ["t", "s"], ["y"])],
            "y",
            X,
            "gemm + gate",
            "product",
            "both of the gate's factors have an activation",
        ),
        (
            [*BOTH, make("Split", ["p"], ["g", "u", "n"], axis=1, num_outputs=3), *GATE[1:]],
            "yn",
            X,
            "gemm + gate",
            "product",
            "not into halves",
        ),
        ([make("Neg", ["x"], ["p"]), *GATE], "y", X, "gemm + gate", "Mul_y", "what is split, 'p', is not the result"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_gate_that_is_left_has_a_reason(nodes, outputs, inputs, pattern, node, reason):
    arrays = {"f": FILTERS, "both": np.concatenate([W, V], 1)}
    constants = {name: array for name, array in arrays.items() if name in [*nodes[0].input]}
    report, _, model = fused(nodes, inputs, constants, outputs=tuple(outputs))
    (miss,) = [miss for miss in report.misses if "gate" in miss.pattern]
    assert (miss.pattern, miss.node) == (pattern, node)
    assert reason in miss.reason
    assert "Split" in [each.op_type for each in model.graph]


def test_products_of_different_inputs_are_no_gate():
    nodes = [product("g"), product("u", "v", "z"), make("Sigmoid", ["g"], ["s"]), make("Mul", ["s", "u"], ["y"])]
    report, found, _ = fused(nodes, {**X, "z": (6, 16)}, {"w": W, "v": V})
    assert [node.op_type for node in found] == ["FusedGemm", "FusedGemm"]
    assert "not of one input" in next(miss.reason for miss in report.misses if miss.pattern == "gemm + gate")


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({}, (7, 7)),
        ({"pads": [1, 0, 2, 1], "strides": [2, 1]}, (5, 8)),
        ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, (5, 5)),
        ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, (5, 5)),
        ({"auto_pad": "VALID", "dilations": [2, 2]}, (5, 5)),
    ],
    ids=str,
)
def test_chains_of_a_convolution(attributes, size):
    nodes = [
        conv(**attributes),
        make("Add", ["p", "c"], ["q"]),
        make("Add", ["r", "q"], ["s"]),
        make("Clip", ["s", "low", "high"], ["y"]),
    ]
    bounds = {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    inputs = {**IMAGE, "r": (2, 16, *size)}
    _, found, model = fused(nodes, inputs, {"f": FILTERS, "c": CHANNEL, **bounds})
    assert [node.op_type for node in model.graph] == ["FusedConv2dBiasResidual"]
    assert plugin_settings(found[0])["activation"] == "clamp:0:6"


@pytest.mark.parametrize("order", [("q", "t"), ("t", "q")])
@pytest.mark.parametrize("constant", [False, True])
def test_a_computed_vector_is_a_bias(order, constant):
    """A time embedding, in a batch of one; with the convolution's own bias it is added to that first."""
    nodes = [
        make("Conv", ["x", "f", *(["b"] if constant else [])], ["q"], name="conv"),
        make("Sin", ["e"], ["s"]),
        make("Unsqueeze", ["s", "two"], ["u"]),
        make("Unsqueeze", ["u", "three"], ["t"]),
        make("Add", order, ["p"]),
        make("Relu", ["p"], ["y"]),
    ]
    constants = {"f": FILTERS, "two": np.array([2]), "three": np.array([3])}
    _, found, model = fused(
        nodes, {"x": (1, 8, 9, 9), "e": (1, 16)}, {**constants, **({"b": normal(8, 16)} if constant else {})}
    )
    assert [node.op_type for node in found] == ["FusedConv2dBias"]
    assert plugin_settings(found[0])["activation"] == "relu"
    left = ["FusedConv2dBias", "Reshape", "Sin", *(["Add"] if constant else [])]
    assert sorted(node.op_type for node in model.graph) == sorted(left)


def test_a_result_that_is_added_to_itself_is_said_to_be():
    report, found, _ = fused([conv(), make("Add", ["p", "p"], ["y"])], IMAGE, {"f": FILTERS})
    assert [node.op_type for node in found] == ["FusedConv2d"]
    assert {miss.reason for miss in report.misses} == {"the result is added to itself"}


def test_a_vector_for_each_image_is_no_bias():
    nodes = [conv(), make("Add", ["p", "t"], ["y"])]
    report, found, _ = fused(nodes, {**IMAGE, "t": (2, 16, 1, 1)}, {"f": FILTERS})
    assert [node.op_type for node in found] == ["FusedConv2d"]
    assert "of shape (2, 16, 1, 1), is no vector along the 16 channels of (2, 16, " in report.misses[0].reason


@pytest.mark.parametrize("shape", [(24,), (1, 24), (1, 1, 24)])
def test_a_computed_vector_is_added_to_the_columns(shape):
    nodes = [product(), make("Add", ["p", "b"], ["q"]), make("Add", ["q", "t"], ["y"])]
    _, found, model = fused(nodes, {"x": (1, 6, 16), "t": shape}, {"w": W, "b": B})
    assert [node.op_type for node in found] == ["FusedGemmBias"]
    assert sorted(node.op_type for node in model.graph)[:2] == ["Add", "FusedGemmBias"]


def test_a_row_added_to_a_row_is_a_residual():
    nodes = [product(), make("Add", ["p", "b"], ["q"]), make("Add", ["q", "r"], ["y"])]
    _, _, model = fused(nodes, {"x": (1, 16), "r": (1, 24)}, {"w": W, "b": B})
    assert [node.op_type for node in model.graph] == ["FusedGemmBiasResidual"]


def test_a_column_is_no_bias_of_columns():
    nodes = [product(), make("Add", ["p", "t"], ["y"])]
    _, _, model = fused(nodes, {"x": (24, 16), "t": (24, 1)}, {"w": W})
    assert [node.op_type for node in model.graph] == ["FusedGemm", "Add"]


def test_two_convolutions_that_meet_are_one_with_the_others_result():
    nodes = [
        conv(),
        make("Conv", ["x", "g"], ["q"], name="other"),
        make("Add", ["p", "q"], ["s"]),
        make("Relu", ["s"], ["y"]),
    ]
    _, found, _ = fused(nodes, IMAGE, {"f": FILTERS, "g": FILTERS[::-1].copy()})
    assert sorted(node.op_type for node in found) == ["FusedConv2d", "FusedConv2dResidual"]


@pytest.mark.parametrize(
    ("nodes", "inputs", "constants", "reason"),
    [
        ([make("MatMul", ["x", "w"], ["y"], name="n")], {"x": (16,)}, {"w": W}, "a vector is no matrix"),
        (
            [make("Conv", ["x", "f"], ["y"], name="n")],
            {"x": (1, 8, 5, 5, 5)},
            {"f": normal(0, 4, 8, 3, 3, 3)},
            "3 spatial dimensions; the plugin takes 1 and 2",
        ),
        (
            [make("MatMul", ["x", "z"], ["y"], name="n")],
            {"x": (2, 1, 4, 8), "z": (1, 3, 8, 4)},
            {},
            "leading dimensions",
        ),
    ],
)
def test_what_no_plugin_takes_is_left_with_the_reason(nodes, inputs, constants, reason):
    report, found, model = fused(nodes, inputs, constants)
    assert not found
    assert [node.op_type for node in model.graph] == [nodes[0].op_type]
    (miss,) = report.misses
    assert miss.node == "n"
    assert reason in miss.reason


def test_products_of_doubles_are_left():
    model = model_of([make("MatMul", ["x", "w"], ["y"], name="n")], X, ["y"], {"w": W.astype(np.float64)}, dtype="fp64")
    report = fuse(model)
    assert not fused_nodes(model)
    assert "kernels take fp32, fp16, bf16" in report.misses[0].reason


def test_the_report_is_plain():
    nodes = [product(), make("Relu", ["p"], ["y"])]
    report, _, _ = fused(nodes, X, {"w": W})
    assert report.to_dict() == {
        "nodes_before": 2,
        "nodes_after": 1,
        "patterns": {"gemm + activation": 1},
        "layers": {"product_p": "FusedGemm"},
        "ends": {"product_p": "its result is an output of the model"},
        "left": [],
    }


def test_a_residual_behind_the_activation_stays_behind_it():
    inputs = {**X, "r": (6, 24)}
    sums = (make("Add", ["q", "r"], ["y"]), make("Add", ["r", "q"], ["y"]))
    for added in sums:
        report, (node,), _ = fused([product(), make("Relu", ["p"], ["q"]), added], inputs, {"w": W})
        assert node.op_type == "FusedGemmResidual"
        assert (plugin_settings(node)["activation"], plugin_settings(node)["residual_last"]) == ("relu", 1)
        assert not report.misses
    # A second one finds no place, and an activation behind it none either.
    report, nodes, _ = fused(
        [product(), make("Add", ["p", "r"], ["s"]), make("Relu", ["s"], ["q"]), make("Add", ["q", "r"], ["y"])],
        inputs,
        {"w": W},
    )
    assert [miss.reason for miss in report.misses] == ["there is a residual already"]
    assert plugin_settings(nodes[0])["residual_last"] == 0
    _, nodes, model = fused(
        [product(), make("Relu", ["p"], ["q"]), make("Add", ["q", "r"], ["s"]), make("Relu", ["s"], ["y"])],
        inputs,
        {"w": W},
    )
    assert plugin_settings(nodes[0])["residual_last"] == 1
    assert [node.op_type for node in model.graph] == ["FusedGemmResidual", "Relu"]


def test_what_is_a_residual_is_not_called_a_bias_that_does_not_fit():
    report, _, _ = fused(
        [product(), make("Add", ["p", "r"], ["q"]), make("Add", ["q", "r"], ["y"])], {**X, "r": (6, 24)}, {"w": W}
    )
    assert [miss.reason for miss in report.misses] == ["there is a residual already"]


def test_weights_of_gates_that_layers_share_lie_side_by_side_once():
    """And those of a split whose second half is activated are turned once."""
    nodes = []
    for x, y in (("x", "a"), ("z", "b")):
        nodes += [product(f"g{y}", "w", x), product(f"u{y}", "v", x), make("Relu", [f"g{y}"], [f"r{y}"])]
        nodes += [make("Mul", [f"r{y}", f"u{y}"], [y])]
    _, both, model = fused(nodes, X | {"z": (6, 16)}, {"w": W, "v": V}, ("a", "b"))
    assert plugin_inputs(both[0])["b"] is plugin_inputs(both[1])["b"]
    assert len(model.graph.initializers) == 1
    nodes = []
    for x, y in (("x", "a"), ("z", "b")):
        nodes += [product(f"p{y}", "w", x), make("Split", [f"p{y}"], [f"u{y}", f"g{y}"], axis=-1, num_outputs=2)]
        nodes += [make("Relu", [f"g{y}"], [f"r{y}"]), make("Mul", [f"r{y}", f"u{y}"], [y])]
    _, both, model = fused(nodes, X | {"z": (6, 16)}, {"w": W}, ("a", "b"))
    assert plugin_inputs(both[0])["b"] is plugin_inputs(both[1])["b"]
    assert len(model.graph.initializers) == 1

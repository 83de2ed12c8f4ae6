from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal
from tilewright.kernels import Conv2dProblem, GemmProblem
from tilewright.tuner.model.fuse import fuse
from tilewright.tuner.model.graph import fused_nodes
from tilewright.tuner.model.workloads import ModelWorkloads, flops_of, ops, workloads

make = helper.make_node


def two_layers() -> ir.Model:
    """Two equal products, one another, and a product of vectors that no plugin takes."""
    nodes = [
        make("MatMul", ["x", "w"], ["p"], name="first"),
        make("Relu", ["p"], ["q"]),
        make("MatMul", ["q", "v"], ["r"], name="second"),
        make("Relu", ["r"], ["s"]),
        make("MatMul", ["s", "u"], ["t"], name="third"),
        make("MatMul", ["t", "z"], ["y"], name="fourth"),
    ]
    weights = {"w": normal(0, 32, 32), "v": normal(1, 32, 32), "u": normal(2, 32, 8), "z": normal(3, 8)}
    return model_of(nodes, {"x": (4, 32)}, ["y"], weights)


def test_layers_are_counted_by_problem():
    model = two_layers()
    report = fuse(model)
    found = workloads(model, {miss.node: miss.reason for miss in report.misses})
    same = GemmProblem(M=4, N=32, K=32, dtype="fp32", activation="relu")
    assert [(each.name, each.problem, each.count) for each in found.distinct()] == [
        ("first", same, 2),
        ("third", GemmProblem(M=4, N=8, K=32, dtype="fp32"), 1),
    ]
    (left,) = found.unsupported
    assert (left.node, left.operator, left.flops) == ("fourth", "MatMul", 2 * 4 * 8)
    assert "a vector is no matrix" in left.reason
    total = 2 * (2 * 4 * 32 * 32) + 2 * 4 * 8 * 32 + 2 * 4 * 8
    assert found.flops == total
    assert found.coverage == pytest.approx(1 - 2 * 4 * 8 / total)
    assert found.rows()[0]["flops_share"] == pytest.approx(2 * 2 * 4 * 32 * 32 / total)
    assert sum(row["bytes_share"] for row in found.rows()) == pytest.approx(1)
    assert ops(model) == {"gemm": 3}


@pytest.mark.parametrize(("channels", "layout"), [(8, "nhwc"), (3, "nhwc")])
def test_a_convolution_is_asked_for_in_the_format_that_its_plugin_offers(channels, layout):
    node = make("Conv", ["x", "w"], ["y"], name="conv")
    model = model_of([node], {"x": (1, channels, 8, 8)}, ["y"], {"w": normal(0, 16, channels, 3, 3)})
    fuse(model)
    (layer,) = workloads(model).layers
    assert layer.problem == Conv2dProblem(
        N=1, H=8, W=8, C=channels, K=16, R=3, S=3, dtype="fp32", layout=layout, w_layout="kcrs"
    )
    assert layer.flops == 2 * 6 * 6 * 16 * 9 * channels


def test_products_inside_control_flow_are_listed():
    inner = helper.make_graph(
        [make("MatMul", ["x", "w"], ["inside"], name="inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("inside", 1, [4, 4])],
    )
    node = make("If", ["which"], ["y"], then_branch=inner, else_branch=inner, name="if")
    constants = {"w": normal(0, 4, 4), "which": np.array(True)}
    model = model_of([node], {"x": (4, 4)}, ["y"], constants)
    fuse(model)
    found = workloads(model)
    assert not fused_nodes(model)
    assert {each.reason for each in found.unsupported} == {"it is inside a control-flow node"}
    assert found.coverage == 0


@pytest.mark.parametrize("operator", ["DecoderMaskedMultiHeadAttention", "QOrderedMatMul", "SparseAttention"])
def test_products_of_onnx_runtime_are_listed(operator):
    model = model_of([make("MatMul", ["x", "w"], ["y"])], {"x": (4, 4)}, ["y"], {"w": normal(0, 4, 4)})
    fuse(model)
    model.graph.append(ir.Node("com.microsoft", operator, [model.graph.outputs[0]], name="own"))
    (left,) = workloads(model).unsupported
    assert (left.node, left.operator, left.flops) == ("own", operator, None)


def test_a_model_without_products_is_covered():
    model = model_of([make("Relu", ["x"], ["y"])], {"x": (4,)}, ["y"], {})
    fuse(model)
    assert workloads(model) == ModelWorkloads((), ())
    assert workloads(model).to_dict() == {"workloads": [], "unsupported": [], "flops": 0, "coverage": 1.0}


@pytest.mark.parametrize(
    ("node", "inputs", "wanted"),
    [
        (make("MatMul", ["a", "b"], ["y"]), {"a": (2, 3, 4), "b": (4, 5)}, 2 * 2 * 3 * 4 * 5),
        (make("Gemm", ["a", "b"], ["y"], transA=1), {"a": (4, 3), "b": (4, 5)}, 2 * 3 * 4 * 5),
        (make("Conv", ["a", "b"], ["y"], group=2), {"a": (1, 4, 8), "b": (6, 2, 3)}, 2 * 6 * 6 * 2 * 3),
        (make("ConvTranspose", ["a", "b"], ["y"]), {"a": (1, 4, 8), "b": (4, 6, 3)}, 2 * 4 * 8 * 6 * 3),
        (make("Einsum", ["a", "b"], ["y"], equation="ij,jk->ik"), {"a": (2, 3), "b": (3, 4)}, None),
    ],
    ids=lambda value: getattr(value, "op_type", ""),
)
def test_operations_of_what_is_left(node, inputs, wanted):
    model = model_of([node], inputs, ["y"], {})
    assert flops_of(next(iter(model.graph))) == wanted


def test_operations_of_an_attention_with_a_cache():
    node = make("Attention", ["q", "k", "v", "", "pk", "pv"], ["y", "nk", "nv"])
    shapes = {"q": (1, 4, 2, 16), "k": (1, 4, 2, 16), "v": (1, 4, 2, 8), "pk": (1, 4, 5, 16), "pv": (1, 4, 5, 8)}
    model = model_of([node], shapes, ["y", "nk", "nv"], {}, opset=23)
    assert flops_of(next(iter(model.graph))) == 2 * 4 * 2 * 7 * (16 + 8)


def test_a_node_without_outputs_has_no_flops():
    assert flops_of(ir.Node("com.microsoft", "Attention", [], num_outputs=0)) is None

"""The problem that a node is: what ONNX's operators and fused nodes become."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from tests.tuner.model.graphs import model_of, normal, value
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.ops.rmsnorm.problem import RmsNormProblem
from tilewright.kernels.problem import Problem
from tilewright.tuner.model.graph import make_fused
from tilewright.tuner.model.report.node_problem import problem_of


def problem(
    op: str, inputs: dict[str, tuple[int, ...]], *, dtype: str = "fp32", opset: int = 21, **attributes: Any
) -> Problem | None:
    node = helper.make_node(op, list(inputs), ["y"], "node", **attributes)
    model = model_of(
        [node], {name: shape for name, shape in inputs.items() if name}, ["y"], {}, dtype=dtype, opset=opset
    )
    return problem_of(model.graph.node(0))


def test_matmul() -> None:
    assert problem("MatMul", {"a": (2, 7, 16), "b": (16, 24)}) == GemmProblem(M=14, N=24, K=16, dtype="fp32")
    assert problem("MatMul", {"a": (3, 7, 16), "b": (3, 16, 24)}, dtype="fp16") == GemmProblem(
        M=7, N=24, K=16, batch=3, dtype="fp16"
    )


@pytest.mark.parametrize(
    ("c", "options"),
    [
        ((24,), {"bias": "fp32"}),
        ((1, 24), {"bias": "fp32"}),
        ((7, 24), {"residual": "fp32"}),
        ((7, 1), {}),  # neither: the product alone
    ],
)
def test_gemm(c: tuple[int, ...], options: dict[str, str]) -> None:
    found = problem("Gemm", {"a": (16, 7), "b": (24, 16), "c": c}, transA=1, transB=1, alpha=0.5)
    assert found == GemmProblem(M=7, N=24, K=16, dtype="fp32", a_layout="col", b_layout="col", **options)  # type: ignore[arg-type]


def test_rms_norm() -> None:
    def found(shape: tuple[int, ...], **attributes: Any) -> Problem | None:
        return problem("RMSNormalization", {"x": (2, 7, 16), "w": shape}, dtype="fp16", opset=23, **attributes)

    assert found((16,)) == RmsNormProblem(M=14, N=16, dtype="fp16", weight="fp16")
    assert found((16,), axis=2) == found((16,))
    assert found((7, 16), axis=1) is None
    assert found((1,)) is None


def test_conv() -> None:
    found = problem(
        *("Conv", {"x": (1, 8, 14, 14), "w": (16, 4, 3, 3), "b": (16,)}),
        dtype="fp16",
        group=2,
        strides=[2, 1],
        pads=[1, 2, 1, 2],
        dilations=[1, 2],
    )
    sizes = {"N": 1, "H": 14, "W": 14, "C": 8, "K": 16, "R": 3, "S": 3, "groups": 2, "stride_h": 2, "dilation_w": 2}
    pads = {"pad_top": 1, "pad_left": 2, "pad_bottom": 1, "pad_right": 2}
    # The channels are a multiple of 8: NHWC memory, as an engine may have it.
    assert found == Conv2dProblem(**sizes, **pads, dtype="fp16", w_layout="kcrs", bias="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize("pad", ["SAME_UPPER", "SAME_LOWER"])
def test_conv_with_padding_by_name(pad: str) -> None:
    found = problem("Conv", {"x": (1, 3, 15, 14), "w": (16, 3, 3, 3)}, auto_pad=pad, strides=[2, 2])
    assert isinstance(found, Conv2dProblem)
    assert (found.P, found.Q) == (8, 7)
    assert found.pad_top + found.pad_bottom == 2
    assert found.pad_left + found.pad_right == 1


def test_attention_of_four_dimensions() -> None:
    shapes = {"q": (2, 8, 10, 64), "k": (2, 4, 20, 64), "v": (2, 4, 20, 64), "mask": (10, 20)}
    found = problem("Attention", shapes, dtype="fp16", opset=23, is_causal=1)
    assert found == AttentionProblem(
        B=2, H=8, Sq=10, Skv=20, D=64, Hkv=4, causal=True, bias="fp16", bias_batch=False, bias_heads=False
    )


def test_attention_of_three_dimensions_and_a_past() -> None:
    shapes = {"q": (1, 1, 512), "k": (1, 1, 512), "v": (1, 1, 512), "": (), "pk": (1, 8, 31, 64), "pv": (1, 8, 31, 64)}
    found = problem("Attention", shapes, opset=23, q_num_heads=8, kv_num_heads=8)
    assert found == AttentionProblem(B=1, H=8, Sq=1, Skv=32, D=64, dtype="fp32")


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("MatMul", {"a": (16,), "b": (16, 24)}, {}),  # a vector
        ("MatMul", {"a": (2, 1, 7, 16), "b": (1, 3, 16, 24)}, {}),  # broadcast both ways
        ("Conv", {"x": (1, 3, 14), "w": (16, 3, 3)}, {}),  # one dimension
        ("ConvTranspose", {"x": (1, 3, 14, 14), "w": (3, 16, 3, 3)}, {}),
        ("Relu", {"x": (3, 4)}, {}),
    ],
)
def test_what_no_kernel_takes(op: str, inputs: dict[str, tuple[int, ...]], attributes: dict[str, Any]) -> None:
    assert problem(op, inputs, **attributes) is None


def test_types_that_no_kernel_takes() -> None:
    assert problem("MatMul", {"a": (7, 16), "b": (16, 24)}, dtype="fp64") is None


def test_operators_of_other_domains_are_not_taken_for_onnx_s() -> None:
    a, b = value("a", (7, 16)), value("b", (16, 24))
    assert problem_of(ir.Node("elsewhere", "MatMul", [a, b], name="n")) is None


def test_a_fused_node_is_its_plugin_s_problem() -> None:
    inputs = {"a": value("a", (7, 16)), "b": value("b", (16, 24)), "bias": value("c", (24,))}
    node = make_fused("gemm", inputs, {"activation": "relu"}, name="n")
    assert problem_of(node) == GemmProblem(M=7, N=24, K=16, dtype="fp32", bias="fp32", activation="relu")


def test_fused_and_not_are_the_same_problem() -> None:
    """What differs before and after fusing is what was fused, not how the layer is seen."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], "conv", pads=[1, 1, 1, 1])
    model = model_of([node], {"x": (1, 16, 8, 8)}, ["y"], {"w": normal(0, 16, 16, 3, 3)})
    given = {"x": model.graph.inputs[0], "w": model.graph.initializers["w"]}
    pads = {f"pad_{side}": 1 for side in ("top", "left", "bottom", "right")}
    fused = make_fused("conv2d", given, pads, name="fused")
    assert problem_of(fused) == problem_of(model.graph.node(0))
    assert isinstance(problem_of(fused), Conv2dProblem)
    assert np.prod(model.graph.node(0).outputs[0].shape.numpy()) == 1024  # type: ignore[union-attr]

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.tuner.suites.totals import multiply_adds, weights
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuner.suites import SUITES
from tilewright.tuner.suites.resnet import resnet50

pytestmark = pytest.mark.smoke


def convolutions_of(path: Path) -> Counter[tuple[Any, ...]]:
    """What each Conv of an ONNX file computes, by pixels, channels, filters, taps, strides and pads, and how often."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    shapes = {
        value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
    } | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found: Counter[tuple[Any, ...]] = Counter()
    for node in graph.node:
        if node.op_type == "Conv":
            _, channels, height, width = shapes[node.input[0]]
            filters, _, r, s = shapes[node.input[1]]
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            strides, pads = tuple(attributes["strides"]), tuple(attributes.get("pads", (0, 0, 0, 0)))
            if (r, s, strides, pads) == (1, 1, (1, 1), (0, 0, 0, 0)):
                found[height * width, channels, filters] += 1
            else:
                found[height, width, channels, filters, r, s, strides, pads] += 1
    return found


def test_its_convolutions_are_those_of_the_model() -> None:
    """Against a ResNet-50 that others exported, of which the onnx wheel has the graph: it has v1.5's strides."""
    suite: Counter[tuple[Any, ...]] = Counter()
    for workload in resnet50(1):
        p = workload.problem
        if isinstance(p, Conv2dProblem):
            pads = (p.pad_top, p.pad_left, p.pad_bottom, p.pad_right)
            suite[p.H, p.W, p.C, p.K, p.R, p.S, (p.stride_h, p.stride_w), pads] += workload.count
        elif isinstance(p, GemmProblem) and p.N != 1000:
            suite[p.M, p.K, p.N] += workload.count
    model = convolutions_of(Path(onnx.__file__).parent / "backend/test/data/light/light_resnet50.onnx")
    assert model.total() == 53
    assert suite == model


def test_it_adds_up() -> None:
    # torchvision's ResNet50_Weights: 4.09 G multiply-adds, 25557032 parameters, of which 53120 belong to BatchNorm and
    # 1000 are the classifier's bias.
    assert multiply_adds(resnet50(1)) == pytest.approx(4.09e9, rel=0.002)
    assert weights(resnet50(1)) == 25557032 - 53120 - 1000
    assert multiply_adds(resnet50(32)) == 32 * multiply_adds(resnet50(1))


def test_every_block_ends_with_a_residual_and_relu() -> None:
    fields = [(workload.problem.to_dict(), workload.count) for workload in resnet50(32)]
    assert sum(count for problem, count in fields if problem["residual"]) == 3 + 4 + 6 + 3
    # All but the four projections and the classifier.
    assert sum(count for problem, count in fields if problem["activation"] == "none") == 5
    assert all(problem["bias"] == "fp16" for problem, _ in fields)


def test_the_suite_has_batch_1_and_32() -> None:
    assert SUITES["resnet50"] == (*resnet50(1), *resnet50(32))

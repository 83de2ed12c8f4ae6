from __future__ import annotations

import pytest

from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuner.suites.workload import attention, conv, linear

pytestmark = pytest.mark.smoke


def test_weights_of_a_linear_layer_are_stored_as_pytorch_does() -> None:
    problem = linear("x", 128, 768, 3072, bias="fp16").problem
    assert problem == GemmProblem(M=128, K=768, N=3072, b_layout="col", bias="fp16")


@pytest.mark.parametrize(
    ("size", "taps", "options", "expected"),
    [
        # Odd kernels keep the pixels, strides apart; even ones cut patches.
        (56, 3, {}, (56, 56)),
        (56, 3, {"stride": 2}, (28, 28)),
        (224, 7, {"stride": 2}, (112, 112)),
        (14, 1, {"stride": 2}, (7, 7)),
        (224, 16, {"stride": 16}, (14, 14)),
        (128, 3, {"stride": 2, "padding": (0, 0, 1, 1)}, (64, 64)),
        ((1, 3000), (1, 3), {"stride": 2}, (1, 1500)),
    ],
)
def test_pixels_of_a_convolution(size, taps, options, expected) -> None:
    problem = conv("x", 2, size, 16, 32, taps, **options).problem
    assert isinstance(problem, Conv2dProblem)
    assert expected == (problem.P, problem.Q)
    assert (problem.N, problem.C, problem.K, problem.layout, problem.bias) == (2, 16, 32, "nhwc", "fp16")


def test_names_of_convolutions_tell_their_shape() -> None:
    assert conv("m layer", 8, 56, 64, 128, 3, stride=2).name == "m layer 3x3/2 64-128 56x56, batch 8"
    assert conv("m layer", 1, (1, 9), 4, 5, (1, 3)).name == "m layer 1x3 4-5 1x9, batch 1"


def test_a_convolution_of_single_pixels_is_the_gemm_that_runs() -> None:
    workload = conv("x", 2, 14, 256, 1024, 1, residual="fp16", activation="relu", count=3)
    assert workload.op == "gemm"
    assert workload.count == 3
    assert workload.problem == GemmProblem(
        M=2 * 14 * 14, N=1024, K=256, b_layout="col", bias="fp16", residual="fp16", activation="relu"
    )
    assert conv("x", 2, 14, 256, 1024, 1, stride=2).op == "conv2d"


def test_attention_has_strides_as_models_have_them() -> None:
    problem = attention("x", 2, 8, 16, 32, 64, Hkv=2, causal=True).problem.to_dict()
    assert (problem["B"], problem["H"], problem["Sq"], problem["Skv"], problem["D"], problem["Hkv"]) == (
        2,
        8,
        16,
        32,
        64,
        2,
    )
    assert problem["strided"]
    assert problem["causal"]

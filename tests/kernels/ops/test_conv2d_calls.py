"""`conv2d` and `conv1d` as people call them: arrays in any memory layout, outputs, GEMMs, and every misuse."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from tests.kernels.conformance import Guarded, assert_close
from tests.kernels.ops.conv2d_cases import run
from tilewright.kernels import GemmConfig
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.conv2d import api
from tilewright.kernels.ops.conv2d.api import conv1d, conv2d
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem, as_gemm, tolerance
from tilewright.kernels.ops.conv2d.space import Conv2dConfig
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.tuning_db.errors import (
    IllegalConfigError,
    ProblemError,
    UnsupportedError,
    UnsupportedProblemError,
    UsageError,
)


@pytest.fixture
def problems(monkeypatch):
    """The problems that calls come down to, as they are prepared."""
    seen = []
    original = api.plan_for

    def plan_for(kernel, problem, ordinal, **named):
        seen.append(problem)
        return original(kernel, problem, ordinal, **named)

    forget_plans()
    monkeypatch.setattr(api, "plan_for", plan_for)
    yield seen
    forget_plans()


def random_array(shape, seed=0, kind=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(kind)


def near(result, expected):
    assert_close(result, np.asarray(expected, np.float64), Tolerance(1e-5, 1e-5))


# Memory


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("w_layout", [None, "krsc", "kcrs"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_arrays_of_a_problem_are_recognised_as_that_problem(layout, w_layout, groups, aligned, problems):
    problem = Conv2dProblem(
        N=2, H=3, W=4, C=16, K=32, R=2, S=3, groups=groups, layout=layout, w_layout=w_layout, aligned=aligned,
        pad_left=1, pad_bottom=2, stride_w=2, dilation_h=2, dtype="fp32", bias="fp32", residual="fp16",
        activation="leaky_relu:0.2", w_scale="channel", x_scale=True, alpha=True,
    )  # fmt: skip
    out = Guarded.of(problem, offset=0 if aligned else 1)["out"]
    run(problem, problem.inputs(0), out.array)
    assert problems == [problem]


def channels_last(array):
    """The same values in the same order of dimensions, N C H W, in NHWC memory."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("memory_of_w", ["channels_last", "contiguous"])
@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("window", [(3, 3), (1, 1)], ids=str)
def test_channels_last_needs_no_copy_and_stays_channels_last(window, with_out, memory_of_w, problems):
    x, w, residual = random_array((2, 8, 5, 6)), random_array((7, 8, *window)), random_array((2, 7, 5, 6))
    padding = window[0] // 2
    expected = conv2d(x, w, residual=residual, activation="silu", padding=padding, layout="nchw")
    assert expected.flags.c_contiguous
    out = channels_last(np.zeros((2, 7, 5, 6), np.float32)) if with_out else None
    weights = channels_last(w) if memory_of_w == "channels_last" else w
    result = conv2d(
        channels_last(x), weights, residual=channels_last(residual), activation="silu", padding=padding, layout="nchw",
        out=out,
    )  # fmt: skip
    near(result, expected)
    assert result.strides == channels_last(expected).strides
    if with_out:
        assert result is out
    if window == (3, 3):
        layouts = [(problem.layout, problem.w_layout) for problem in problems]
        assert layouts == [("nchw", "kcrs"), ("nhwc", "krsc" if memory_of_w == "channels_last" else "kcrs")]


def test_channels_first_memory_in_channels_last_order(problems):
    x, w = random_array((2, 5, 6, 8)), random_array((7, 3, 3, 8))
    first = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    result = conv2d(first, w)
    near(result, conv2d(x, w))
    assert [(problem.layout, problem.w_layout) for problem in problems] == [("nchw", "krsc"), ("nhwc", "krsc")]
    assert result.transpose(0, 3, 1, 2).flags.c_contiguous


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 8), (2, 5, 6, 1), (1, 1, 6, 1), (1, 1, 1, 1)], ids=str)
def test_arrays_that_lie_alike_in_both_layouts_follow_the_others(shape, layout):
    x, weights = random_array(shape), random_array((3, 1, 2, shape[3]))
    expected = conv2d(x, weights, padding=(0, 1))
    order = (0, 1, 2, 3) if layout == "nhwc" else (0, 3, 1, 2)
    operands = [np.ascontiguousarray(array.transpose(order)) for array in (x, weights)]
    for memory in ("nhwc", "nchw"):
        out = np.zeros(expected.shape, np.float32)
        if memory == "nchw":
            out = np.zeros([expected.shape[axis] for axis in (0, 3, 1, 2)], np.float32).transpose(0, 2, 3, 1)
        conv2d(*operands, padding=(0, 1), layout=layout, out=out.transpose(order))
        near(out, expected)


VIEWS = {
    "every other image": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every other column": lambda x: np.repeat(x, 2, axis=2)[:, :, ::2],
    "some channels": lambda x: np.concatenate([x, x], axis=3)[..., : x.shape[3]],
    "upside down": lambda x: x[:, ::-1],
    "one image for all": lambda x: np.broadcast_to(x[:1], x.shape),
    "height and width swapped": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("name", ["x", "w", "residual", "out"])
def test_arrays_with_gaps_are_refused(name, view):
    arrays = {"x": random_array((2, 6, 7, 8)), "w": random_array((4, 2, 3, 8)), "residual": random_array((2, 5, 5, 4))}
    arrays["out"] = np.zeros((2, 5, 5, 4), np.float32)
    arrays[name] = view(arrays[name])
    with pytest.raises(UnsupportedError) as raised:
        conv2d(**arrays)
    assert str(raised.value).startswith(f"{name} of shape {arrays[name].shape} must lie in ")
    assert "\n" not in str(raised.value)


def test_residual_and_out_lie_as_x_does():
    x, w = random_array((2, 8, 5, 6)), random_array((7, 8, 1, 1))
    residual = random_array((2, 7, 5, 6))
    with pytest.raises(
        UnsupportedError, match=r"^residual of shape \(2, 7, 5, 6\) must lie in NHWC memory, as x does, without"
    ):
        conv2d(channels_last(x), w, residual=residual, layout="nchw")
    with pytest.raises(
        UnsupportedError, match=r"^out of shape \(2, 7, 5, 6\) must lie in NCHW memory, as x does, without"
    ):
        conv2d(x, w, out=channels_last(residual), layout="nchw")


@pytest.mark.parametrize(("name", "value"), [("stride", 1.0), ("padding", False), ("dilation", True)])
def test_what_equals_an_option_is_none_for_that(name, value):
    """1, 1.0 and True would be one key of a call that is remembered."""
    x, w = random_array((1, 4, 4, 16)), random_array((16, 1, 1, 16))
    for call, arrays in ((conv2d, (x, w)), (conv1d, (x[:, 0], w[:, 0]))):
        call(*arrays, **{name: int(value)})
        with pytest.raises(UsageError, match=rf"^{name}={value} must be an integer"):
            call(*arrays, **{name: value})


# out


def test_out_may_be_the_residual():
    x, w, accumulated = random_array((2, 5, 6, 17)), random_array((19, 3, 3, 17)), random_array((2, 5, 6, 19))
    expected = conv2d(x, w, padding=1, residual=accumulated)
    assert conv2d(x, w, padding=1, residual=accumulated, out=accumulated) is accumulated
    np.testing.assert_array_equal(accumulated, expected)


@pytest.mark.parametrize("name", ["x", "w", "bias"])
def test_out_may_not_share_memory_with_what_is_read(name):
    whole = random_array((400,))
    arrays = {"x": whole[:64].reshape(1, 2, 2, 16), "w": whole[64:320].reshape(16, 1, 1, 16), "bias": whole[320:336]}
    start = {"x": 0, "w": 64, "bias": 320}[name]
    with pytest.raises(ProblemError, match=f"^out may not share memory with {name}$"):
        conv2d(**arrays, out=whole[start : start + 64].reshape(1, 2, 2, 16))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_nothing_beside_out_is_written_and_two_calls_agree(layout):
    problem = Conv2dProblem(N=2, H=5, W=6, C=37, K=19, R=3, S=3, pad_top=1, layout=layout, bias="fp32")
    arrays, config = problem.inputs(0), Conv2dConfig(16, 16, 32, SPLIT_K=2)
    out = Guarded.of(problem)["out"]
    assert run(problem, arrays, out.array, config) is out.array
    out.assert_intact()
    np.testing.assert_array_equal(run(problem, arrays, None, config), out.array)


# One tap is a GEMM

POINTWISE = {"N": 2, "H": 3, "W": 5, "C": 33, "K": 17, "R": 1, "S": 1}
EPILOGUES = (
    {},
    {"bias": "fp32", "residual": "fp32", "activation": "hardswish", "alpha": True},
    {"bias": "fp16", "w_scale": "channel", "x_scale": True, "out_dtype": "fp16"},
    {"w_scale": "tensor", "residual": "fp16", "out_dtype": "int8", "out_scale": True},
)


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=str)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("images", [1, 2])
def test_one_tap_runs_as_a_gemm_with_the_same_epilogue(images, layout, kind, epilogue, problems):
    if kind == "int8" and "bias" in epilogue:
        epilogue = epilogue | {"x_scale": True}
    problem = Conv2dProblem(**{**POINTWISE, "N": images}, layout=layout, dtype=kind, **epilogue)
    arrays = problem.inputs(3)
    result = run(problem, arrays)
    assert problems == [as_gemm(problem)]
    expected = CONV2D.reference(problem, arrays)["out"]
    assert_close(result, expected, tolerance(problem)["out"])
    # Its own kernel is there too, for those who ask for it.
    own = run(problem, arrays, None, Conv2dConfig(16, 16, 32))
    assert_close(own, expected, tolerance(problem)["out"])
    assert problems[1:] == [problem]


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("images", [1, 3])
def test_the_gemm_of_a_pointwise_problem_is_as_much_work(images, layout):
    problem = Conv2dProblem(
        **{**POINTWISE, "N": images}, layout=layout, dtype="int8", x_scale=True, w_scale="channel", bias="fp32"
    )
    gemm = as_gemm(problem)
    assert gemm.flops() == problem.flops()
    assert gemm.outputs()["out"].dtype == problem.output_dtype
    # The GEMM also counts the scale of x.
    assert 0 <= gemm.bytes_moved() - problem.bytes_moved() <= 4
    assert GEMM.problem is type(gemm)


@pytest.mark.parametrize(
    "change",
    [{"stride_h": 2}, {"stride_w": 2}, {"pad_right": 1}, {"S": 2}, {"R": 2}, {"groups": 11, "K": 11}],
    ids=str,
)
def test_anything_else_is_no_gemm(change, problems):
    problem = Conv2dProblem(**(POINTWISE | change), dtype="fp32")
    assert not problem.pointwise
    with pytest.raises(ProblemError, match="is no GEMM"):
        as_gemm(problem)
    run(problem, problem.inputs(0))
    assert problems == [problem]


def test_a_gemm_takes_a_gemm_config_and_a_convolution_its_own():
    x, w = random_array((1, 3, 4, 16)), random_array((16, 1, 1, 16))
    near(conv2d(x, w, config=GemmConfig(16, 16, 32)), conv2d(x, w))
    with pytest.raises(IllegalConfigError, match="BLOCK_M=24 must be a power of two"):
        conv2d(x, w, config=GemmConfig(24, 16, 32))
    with pytest.raises(UsageError, match=r"^config must be a Conv2dConfig, or a GemmConfig for what .* not 'fast'"):
        conv2d(x, w, config="fast")
    with pytest.raises(UsageError, match=r"is for what runs as a GEMM, and N=1,.* does not: pass a Conv2dConfig"):
        conv2d(x, w, padding=1, config=GemmConfig(16, 16, 32))


# conv1d


@pytest.mark.parametrize("layout", ["nlc", "ncl"])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("padding", [0, 2, (0, 3)], ids=str)
def test_conv1d_is_conv2d_of_one_row(padding, groups, layout, problems):
    x, w, residual = random_array((2, 9, 6)), random_array((12, 3, 6 // groups)), None
    begin, end = (padding, padding) if isinstance(padding, int) else padding
    wide = conv2d(
        x[:, None], w[:, None], bias=np.arange(12, dtype=np.float32), padding=(0, begin, 0, end), stride=(1, 2),
        dilation=(1, 2), groups=groups, activation="relu",
    )  # fmt: skip
    residual = random_array(wide[:, 0].shape)
    if layout == "ncl":
        x, w, residual = (np.ascontiguousarray(array.swapaxes(1, 2)) for array in (x, w, residual))
    options = {"padding": padding, "stride": 2, "dilation": 2, "groups": groups, "activation": "relu", "layout": layout}
    result = conv1d(x, w, bias=np.arange(12, dtype=np.float32), **options)
    assert result.flags.c_contiguous
    near(result if layout == "nlc" else result.swapaxes(1, 2), wide[:, 0])
    assert problems[1].H == problems[1].R == 1
    out = np.zeros_like(result)
    assert conv1d(x, w, residual=residual, out=out, **options) is out
    assert out.any()


def test_conv1d_keeps_the_memory_of_its_input():
    x, w = random_array((2, 9, 6)), random_array((12, 3, 6))
    turned = conv1d(x.swapaxes(1, 2), w.swapaxes(1, 2), layout="ncl")
    near(turned.swapaxes(1, 2), conv1d(x, w))
    assert turned.swapaxes(1, 2).flags.c_contiguous


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stride": 0}, "stride=0 must be from 1 to 2147483647"),
        ({"dilation": -1}, "dilation=-1 must be from 1 to 2147483647"),
        ({"padding": (0, -2)}, "padding=(0, -2) must be from 0 to 2147483647"),
        ({"padding": 2**31 - 1}, "L=9 with padding=(2147483647, 2147483647) passes 32 bits"),
        ({"padding": (1, 2), "dilation": 9}, "L=9 with padding=(1, 2) is less than the 19 that 3 taps with"),
        ({"layout": "nhwc"}, "layout='nhwc' must be nlc or ncl"),
        ({"w": np.zeros((12, 6), np.float32)}, "w is (12, 6) and must have 3 dimensions: KSC"),
        ({"w": np.zeros((12, 6), np.float32), "layout": "ncl"}, "w is (12, 6) and must have 3 dimensions: KCS"),
        ({"x": np.zeros((2, 9, 12), np.float32)[:, :, ::2]}, "x of shape (2, 9, 6) must lie in NLC or NCL"),
        ({"w": np.zeros((12, 3, 12), np.float32)[:, :, ::2]}, "w of shape (12, 3, 6) must lie in KSC or KCS memory"),
        ({"residual": np.zeros((2, 7, 24), np.float32)[:, :, ::2]}, "residual of shape (2, 7, 12) must lie in NLC"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_conv1d_speaks_of_one_dimension(options, said):
    arrays = {"x": random_array((2, 9, 6)), "w": random_array((12, 3, 6))}
    with pytest.raises((ProblemError, UnsupportedError), match=f"^{re.escape(said)}"):
        conv1d(**{**arrays, **options})


def test_one_tap_of_one_dimension_is_a_gemm_too(problems):
    x, w = random_array((2, 9, 6)), random_array((12, 1, 6))
    near(conv1d(x, w), x.astype(float) @ w[:, 0].T.astype(float))
    assert type(problems[0]) is GEMM.problem


# Options


@pytest.mark.parametrize(
    ("padding", "four"),
    [(0, (0, 0, 0, 0)), (2, (2, 2, 2, 2)), ((1, 2), (1, 2, 1, 2)), ((1, 2, 0, 3), (1, 2, 0, 3))],
    ids=str,
)
def test_paddings_in_every_form(padding, four, problems):
    conv2d(random_array((1, 4, 4, 3)), random_array((2, 3, 3, 3)), padding=padding)
    (problem,) = problems
    assert (problem.pad_top, problem.pad_left, problem.pad_bottom, problem.pad_right) == four


def test_strides_and_dilations_of_both_dimensions_or_each(problems):
    x, w = random_array((1, 9, 9, 3)), random_array((2, 3, 3, 3))
    for option in (2, [2, 2], (2, np.int64(3))):
        conv2d(x, w, stride=option, dilation=option)
    assert [(each.stride_h, each.stride_w, each.dilation_h, each.dilation_w) for each in problems] == [
        (2, 2, 2, 2),
        (2, 2, 2, 2),
        (2, 3, 2, 3),
    ]


def test_alpha_of_one_costs_no_argument_and_any_other_is_read(problems):
    x, w = random_array((1, 4, 4, 3)), random_array((2, 3, 3, 3))
    plain = conv2d(x, w)
    for alpha in (1, 1.0, 2, -0.3, np.float32(0.5), np.full(1, 0.25, np.float32)):
        near(conv2d(x, w, alpha=alpha), np.float64(alpha) * plain)
    assert {problem.alpha for problem in problems} == {False, True}


X, W = np.ones((1, 5, 6, 8), np.float16), np.ones((4, 3, 3, 8), np.float16)


class Fake:
    """An array of a library that isn't there."""

    __cuda_array_interface__ = {}  # noqa: RUF012 - never read


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ProblemError, "x is (5, 6, 8) and must have 4 dimensions: NHWC", {"x": X[0]}),
        (ProblemError, "w is (4, 3, 8) and must have 4 dimensions: KRSC", {"w": W[:, 0]}),
        (ProblemError, "out is (4,) and must have 4 dimensions", {"out": np.ones(4, np.float16)}),
        (ProblemError, "8 channels of x must be groups=1 times 4 of w", {"w": W[..., :4]}),
        (ProblemError, "8 channels of x must be groups=2 times 8 of w", {"groups": 2}),
        (ProblemError, "groups=0 must be at least 1", {"groups": 0}),
        (ProblemError, "groups=-1 must be at least 1", {"groups": -1}),
        (ProblemError, "K=4 must be divisible by groups=8", {"w": W[..., :1].copy(), "groups": 8}),
        (ProblemError, "no dimension may be 0", {"x": X[:0]}),
        (ProblemError, "no dimension may be 0", {"w": W[:, :, :0]}),
        (ProblemError, "x is fp16 and w is fp32: they must have one dtype", {"w": W.astype(np.float32)}),
        (UnsupportedProblemError, "x is int64 and must be fp16", {"x": X.astype(np.int64)}),
        (ProblemError, "x is int32 and must be one of fp16", {"x": X.astype(np.int32), "w": W.astype(np.int32)}),
        (ProblemError, "x is uint8 and must be one of fp16", {"x": X.astype(np.uint8), "w": W.astype(np.uint8)}),
        (ProblemError, "W=2 with padding 0 and 0 is less than the 3 that 3 taps", {"x": X[:, :, :2].copy()}),
        (ProblemError, "bias is (5,) and must be (4,)", {"bias": np.ones(5, np.float16)}),
        (ProblemError, "bias is (1,) and must be (4,)", {"bias": np.ones(1, np.float16)}),
        (UnsupportedError, "bias must be contiguous; its stride is 2", {"bias": np.ones(8, np.float16)[::2]}),
        (ProblemError, "w_scale is (3,) and must be (4,) or one element", {"w_scale": np.ones(3, np.float32)}),
        (ProblemError, "w_scale is fp16 and must be fp32", {"w_scale": np.ones(4, np.float16)}),
        (UnsupportedError, "w_scale must be contiguous", {"w_scale": np.ones(8, np.float32)[::2]}),
        (ProblemError, "x_scale is (4,) of fp32: a number, or one", {"x_scale": np.ones(4, np.float32)}),
        (UsageError, "alpha='2' must be a real number", {"alpha": "2"}),
        (ProblemError, "residual is (1, 3, 4, 5) and must be (1, 3, 4, 4)", {"residual": np.ones((1, 3, 4, 5), "f2")}),
        (ProblemError, "out is (1, 4, 3, 4) and must be (1, 3, 4, 4)", {"out": np.ones((1, 4, 3, 4), np.float16)}),
        (
            ProblemError,
            "out is (1, 3, 4, 4) and must be (1, 4, 5, 5)",
            {"layout": "nchw", "w": np.ones((4, 5, 2, 4), "f2"), "out": np.ones((1, 3, 4, 4), np.float16)},
        ),
        (ProblemError, "out is fp32 and out_dtype='fp16'", {"out": np.ones((1, 3, 4, 4), "f4"), "out_dtype": "fp16"}),
        (UsageError, "padding=(1, 2, 3) must be an integer or 2 or 4 of them", {"padding": (1, 2, 3)}),
        (UsageError, "padding='same' must be an integer or 2 or 4 of them", {"padding": "same"}),
        (ProblemError, "pad_top=-1 must be from 0", {"padding": -1}),
        (UsageError, "stride=(1, 1, 1) must be an integer or 2 of them", {"stride": (1, 1, 1)}),
        (UsageError, "stride=1.5 must be an integer or 2 of them", {"stride": 1.5}),
        (ProblemError, "stride_h=0 must be from 1", {"stride": 0}),
        (UsageError, "dilation=True must be an integer or 2 of them", {"dilation": True}),
        (UsageError, "groups='two' must be an integer", {"groups": "two"}),
        (UsageError, "stride={1: 2} must be an integer or 2 of them", {"stride": {1: 2}}),
        (UsageError, "padding=None must be an integer", {"padding": None}),
        (ProblemError, "layout='hwc' must be nhwc or nchw", {"layout": "hwc"}),
        (UsageError, "unknown activation 'swosh'", {"activation": "swosh"}),
        (ProblemError, "unknown out_dtype='float16': conv2d takes fp16", {"out_dtype": "float16"}),
        (ProblemError, "out_dtype='int8' needs out_scale", {"out_dtype": "int8"}),
        (ProblemError, "out_scale is for a result of int8", {"out_scale": 0.5}),
        (ProblemError, "precision='tf32' is for dtype=fp32", {"precision": "tf32"}),
        (ProblemError, "x is a numpy.ndarray and w a ", {"w": Fake()}),
        (UnsupportedError, "a list is no array", {"w": [[1.0]]}),
        (ProblemError, "x is missing", {"x": None}),
        (IllegalConfigError, "BLOCK_N=48 must be a power of two", {"config": Conv2dConfig(16, 48, 16)}),
        (IllegalConfigError, "the smallest tile of a fp16 dot is 16×16×16", {"config": Conv2dConfig(8, 16, 16)}),
        (UsageError, "config must be a Conv2dConfig, or a GemmConfig for", {"config": {"BLOCK_M": 16}}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_misuse_is_one_line_with_the_values(error, message, call, monkeypatch):
    from tilewright.kernels import call as calls

    original = calls.kind_of
    monkeypatch.setattr(calls, "kind_of", lambda array: "another" if isinstance(array, Fake) else original(array))
    with pytest.raises(error) as raised:
        conv2d(**({"x": X, "w": W} | call))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x is (1, 5, 6, 8) and must have 3 dimensions: NLC", {"x": X}),
        ("layout='nhwc' must be nlc or ncl", {"layout": "nhwc"}),
        ("padding=(1, 2, 3, 4) must be an integer or 2 of them", {"padding": (1, 2, 3, 4)}),
        ("stride=(1, 1) must be an integer or 1 of them", {"stride": (1, 1)}),
        ("residual is (1, 4, 5) and must be (1, 4, 4)", {"residual": np.ones((1, 4, 5), np.float16)}),
    ],
    ids=str,
)
def test_misuse_of_conv1d(message, call):
    with pytest.raises((ProblemError, UsageError)) as raised:
        conv1d(**({"x": X[:, 0], "w": W[:, 0]} | call))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_refused_call_leaves_nothing_behind():
    out = np.full((1, 3, 4, 4), 7, np.float16)
    for wrong in ({"activation": "swosh"}, {"bias": np.ones(5, np.float16)}):
        with pytest.raises((ProblemError, UsageError)):
            conv2d(X, W, out=out, **wrong)
    assert (out == 7).all()


def test_every_pair_of_memory_layouts_of_x_and_w():
    x, w = random_array((2, 5, 6, 8)), random_array((6, 2, 3, 4))
    expected = conv2d(x, w, groups=2)
    for of_x, of_w in itertools.product((np.ascontiguousarray, channels_first), repeat=2):
        near(conv2d(of_x(x), of_w(w), groups=2), expected)


def channels_first(array):
    """The same values in the order N H W C, in NCHW memory."""
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)

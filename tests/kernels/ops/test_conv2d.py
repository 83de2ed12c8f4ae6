"""The fused convolution in the interpreter against float64: numbers, memory, every kernel it has."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.kernels.conformance import ACTIVATION_NAMES, SIZES, assert_close, assert_every_pair, pairwise
from tests.kernels.ops.conv2d_cases import A100, conforms, run
from tests.kernels.splits import check_splits
from tilewright.kernels import resolve_device
from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.kernel import Tolerance
from tilewright.kernels.ops.conv2d import depthwise, jit
from tilewright.kernels.ops.conv2d.api import conv2d
from tilewright.kernels.ops.conv2d.launch import CONV2D
from tilewright.kernels.ops.conv2d.problem import INPUT_DTYPES, Conv2dProblem, tolerance, touched
from tilewright.kernels.ops.conv2d.space import Conv2dConfig
from tilewright.kernels.ops.conv2d.work import inside
from tilewright.tuning_db.errors import ProblemError

SMALL = Conv2dConfig(16, 16, 32)


# Every dtype, epilogue, layout, window, group and size, in pairs

WINDOWS = {
    "1x1": {"R": 1, "S": 1},
    "1x1 s2": {"R": 1, "S": 1, "stride_h": 2, "stride_w": 2},
    "3x3": {"R": 3, "S": 3},
    "3x3 s2": {"R": 3, "S": 3, "stride_h": 2, "stride_w": 2},
    "2x3 d2x1": {"R": 2, "S": 3, "dilation_h": 2},
    "3x2 s1x3": {"R": 3, "S": 2, "stride_w": 3},
    "2x2 s3x4": {"R": 2, "S": 2, "stride_h": 3, "stride_w": 4},
    "1x5 d1x2": {"R": 1, "S": 5, "dilation_w": 2},
    "5x5": {"R": 5, "S": 5},
}
PADDINGS = {"none": (0, 0, 0, 0), "one": (1, 1, 1, 1), "uneven": (0, 2, 1, 0), "end": (0, 0, 2, 1), "far": (3, 5, 4, 3)}
IMAGES = ((1, 5, 6), (2, 4, 5), (1, 9, 3), (3, 1, 7), (1, 8, 8))
GROUPS = ("one", "two", "five", "depthwise", "two filters a channel")
KINDS = (*INPUT_DTYPES, "tf32")
OUT_DTYPES = (None, "fp16", "bf16", "fp32", "fp8e5m2", "int8", "fp8e4m3")

CONFIGS = (
    None,
    SMALL,
    Conv2dConfig(32, 16, 64, GROUP_M=8, FOLD=True),
    Conv2dConfig(16, 32, 32, SPLIT_K=2, num_warps=8),
    Conv2dConfig(16, 16, 32, FOLD=True, SPLIT_K=3),
    Conv2dConfig(64, 64, 32, GROUP_M=8, num_stages=1),
)

AXES = {
    "kind": KINDS,
    "layout": ("nhwc", "nchw"),
    "w_layout": (None, "krsc", "kcrs"),
    "window": tuple(WINDOWS),
    "padding": tuple(PADDINGS),
    "image": IMAGES,
    "groups": GROUPS,
    "channels": (1, 3, 8, 16, 17, 33),  # of a group
    "filters": (1, 15, 16, 17),
    "activation": ACTIVATION_NAMES,
    "scales": ("none", "x", "tensor", "channel", "x channel"),
    "bias": (None, "same", "fp32", "bf16"),
    "residual": (None, "same", "fp32", "fp8e5m2"),
    "residual_last": (False, True),
    "alpha": (False, True),
    "out_dtype": OUT_DTYPES,
    "aligned": (True, False),
    "config": CONFIGS,
    "rows": (1, 2, 4),
}


def problem_of(row):
    """The problem that a row of AXES describes."""
    kind, precision = ("fp32", "tf32") if row["kind"] == "tf32" else (row["kind"], None)
    images, height, width = row["image"]
    window, pads = WINDOWS[row["window"]], PADDINGS[row["padding"]]
    fields = dict(zip(("pad_top", "pad_left", "pad_bottom", "pad_right"), pads, strict=True)) | window
    fields["H"] = max(height, window.get("dilation_h", 1) * (window["R"] - 1) + 1 - pads[0] - pads[2], 1)
    fields["W"] = max(width, window.get("dilation_w", 1) * (window["S"] - 1) + 1 - pads[1] - pads[3], 1)
    channels, filters = row["channels"], row["filters"]
    if row["groups"] in ("depthwise", "two filters a channel"):
        groups, channels, filters = channels + 1, 1, 1 if row["groups"] == "depthwise" else 2
    else:
        groups = {"one": 1, "two": 2, "five": 5}[row["groups"]]
    fields |= {"N": images, "C": channels * groups, "K": filters * groups, "groups": groups}
    scales = row["scales"]
    if kind == "int8" and scales == "none":
        # The bare sums.
        return Conv2dProblem(
            **fields, dtype=kind, layout=row["layout"], w_layout=row["w_layout"], aligned=row["aligned"]
        )
    floats = "fp32" if kind == "int8" else kind
    return Conv2dProblem(
        **fields,
        dtype=kind,
        precision=precision,
        layout=row["layout"],
        w_layout=row["w_layout"],
        x_scale="x" in scales.split(),
        w_scale=scales.split()[-1] if scales not in ("none", "x") else None,
        bias=floats if row["bias"] == "same" else row["bias"],
        residual=floats if row["residual"] == "same" else row["residual"],
        residual_last=row["residual"] is not None and row["residual_last"],
        activation=row["activation"],
        alpha=row["alpha"],
        out_dtype=row["out_dtype"],
        out_scale=row["out_dtype"] in ("int8", "fp8e4m3"),
        aligned=row["aligned"],
    )


def config_of(row):
    """The configuration of a row, with rows for a depthwise problem."""
    config = row["config"]
    return replace(config, ROWS=row["rows"]) if config is not None and problem_of(row).depthwise else config


def described(row):
    config = config_of(row)
    tile = "default" if config is None else "/".join(str(value) for value in config.to_dict().values())
    return f"{problem_of(row)} on {tile}"


ROWS = list(pairwise(AXES))


def test_rows_cover_every_pair():
    assert_every_pair(ROWS, AXES)
    problems = [problem_of(row) for row in ROWS]
    assert {problem.depthwise for problem in problems} == {problem.padded for problem in problems} == {True, False}


@pytest.mark.parametrize("row", ROWS, ids=described)
def test_equals_the_reference(row):
    conforms(problem_of(row), config_of(row))


@pytest.mark.smoke
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference_with_all_that_can_be_fused(kind, layout):
    kind, precision = ("fp32", "tf32") if kind == "tf32" else (kind, None)
    fused = {"bias": "fp32", "residual": "bf16", "alpha": True, "activation": "silu", "w_scale": "channel"}
    shape = {"N": 2, "H": 4, "W": 5, "R": 3, "S": 3, "pad_top": 1, "pad_left": 1, "layout": layout, "dtype": kind}
    conforms(Conv2dProblem(C=33, K=17, precision=precision, **shape, **fused))
    conforms(Conv2dProblem(C=6, K=34, groups=2, precision=precision, **shape, **fused), CONFIGS[4])
    conforms(Conv2dProblem(C=17, K=17, groups=17, precision=precision, **shape, **fused))
    conforms(Conv2dProblem(C=17, K=17, groups=17, precision=precision, **shape, **fused), Conv2dConfig(16, 16, ROWS=4))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("size", SIZES)
def test_one_size_at_a_time(size, layout):
    shape = {"R": 1, "S": 3, "H": 1, "dtype": "fp32", "bias": "fp32", "layout": layout}
    for pixels, channels, filters in ((size, 5, 9), (5, size, 9), (5, 9, size)):
        conforms(Conv2dProblem(N=1, W=pixels, C=channels, K=filters, pad_left=1, pad_right=1, **shape))
    conforms(Conv2dProblem(N=1, W=7, C=size + 1, K=size + 1, groups=size + 1, pad_left=1, **shape))


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("taps", [16, 17, 43])
def test_long_rows_of_taps_go_through_a_loop(taps, layout):
    shape = {"N": 2, "H": 2, "C": 17, "K": 17, "groups": 17, "R": 1, "dtype": "fp32", "layout": layout}
    problem, config = Conv2dProblem(W=50, S=taps, pad_left=taps - 1, dilation_w=2, **shape), Conv2dConfig(16, 16)
    (launch,) = CONV2D.launches(problem, config)
    assert dict(launch.constexprs)["UNROLL"] == (16 if taps == 16 else 8)
    conforms(problem, config)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("rest", [*itertools.product((0, 1), repeat=3)], ids=str)
def test_exact_multiples_need_no_mask_and_others_do(rest, layout, fold):
    pixels, filters, channels = rest
    problem = Conv2dProblem(
        N=1, H=1, W=33 + pixels, C=32 + channels, K=16 + filters, R=1, S=2, dtype="fp32", layout=layout
    )
    config = Conv2dConfig(16, 16, 32, FOLD=fold)
    flags = dict(CONV2D.launches(problem, config)[0].constexprs)
    assert [flags[name] for name in ("EVEN_M", "EVEN_N", "EVEN_K")] == [not extra for extra in rest]
    assert not flags["PADDED"]
    conforms(problem, config)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("groups", [1, 4])
def test_every_padding_of_every_window(window, groups):
    for padding in PADDINGS.values():
        row = dict(zip(("pad_top", "pad_left", "pad_bottom", "pad_right"), padding, strict=True)) | WINDOWS[window]
        problem = Conv2dProblem(N=1, H=6, W=9, C=4, K=4, groups=groups, dtype="fp32", **row)
        conforms(problem, Conv2dConfig(16, 16, 32, FOLD=sum(padding) % 2 == 0))


def by_hand(problem):
    """Of every tap of every output pixel, where it is in x: rows and columns."""
    for p, q, r, s in np.ndindex(problem.P, problem.Q, problem.R, problem.S):
        yield (
            p * problem.stride_h + r * problem.dilation_h - problem.pad_top,
            q * problem.stride_w + s * problem.dilation_w - problem.pad_left,
        )


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_a_window_sees_is_counted_right(data):
    draw = data.draw
    window = {name: draw(st.integers(1, 3)) for name in ("R", "S", "stride_h", "stride_w", "dilation_h", "dilation_w")}
    pads = {f"pad_{side}": draw(st.integers(0, 4)) for side in ("top", "left", "bottom", "right")}
    try:
        problem = Conv2dProblem(N=2, H=draw(st.integers(1, 9)), W=draw(st.integers(1, 9)), C=1, K=1, **window, **pads)
    except ProblemError:
        return
    taps = list(by_hand(problem))
    read = {(h, w) for h, w in taps if 0 <= h < problem.H and 0 <= w < problem.W}
    assert problem.padded == (len(read) < len(set(taps)))
    assert problem.pixels_read() == 2 * len(read)
    seen = sum(0 <= h < problem.H and 0 <= w < problem.W for h, w in taps)
    assert inside(problem) == pytest.approx(seen / len(taps))
    assert touched(problem.H, problem.P, problem.R, problem.stride_h, problem.dilation_h, problem.pad_top) == len(
        {h for h, _ in taps if 0 <= h < problem.H}
    )


def drawn(data):
    """Any small problem, and a configuration for it."""
    draw = data.draw
    kind = draw(st.sampled_from(KINDS))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 7]))
    channels = draw(st.sampled_from([1, 1, 2, 3, 5, 8, 16, 20, 33]))
    filters = draw(st.sampled_from([1, 1, 2, 3, 16, 19]))
    window = {name: draw(st.integers(1, 4)) for name in ("R", "S")}
    window |= {name: draw(st.integers(1, 3)) for name in ("stride_h", "stride_w", "dilation_h", "dilation_w")}
    pads = {f"pad_{side}": draw(st.sampled_from([0, 0, 1, 2, 5])) for side in ("top", "left", "bottom", "right")}
    reach = {
        "H": window["dilation_h"] * (window["R"] - 1) + 1 - pads["pad_top"] - pads["pad_bottom"],
        "W": window["dilation_w"] * (window["S"] - 1) + 1 - pads["pad_left"] - pads["pad_right"],
    }
    fields = {name: max(1, least) + draw(st.integers(0, 5)) for name, least in reach.items()} | window | pads
    fields |= {"N": draw(st.integers(1, 3)), "C": channels * groups, "K": filters * groups, "groups": groups}
    fields |= {"layout": draw(st.sampled_from(["nhwc", "nchw"])), "w_layout": draw(st.sampled_from([None, "kcrs"]))}
    fields |= {"dtype": "fp32" if kind == "tf32" else kind, "precision": "tf32" if kind == "tf32" else None}
    floats = st.sampled_from([None, "fp32", "fp16", "bf16"])
    if kind != "int8" or draw(st.booleans()):
        out_dtype = draw(st.sampled_from([None, "fp32", "fp16", "int8", "fp8e4m3"]))
        fields |= {
            "x_scale": kind == "int8" or draw(st.booleans()),
            "w_scale": draw(st.sampled_from([None, "tensor", "channel"])),
            "bias": draw(floats),
            "residual": (residual := draw(floats)),
            "residual_last": residual is not None and draw(st.booleans()),
            "activation": draw(st.sampled_from(ACTIVATION_NAMES)),
            "alpha": draw(st.booleans()),
            "out_dtype": out_dtype,
            "out_scale": out_dtype in ("int8", "fp8e4m3"),
        }
    problem = Conv2dProblem(aligned=draw(st.booleans()), **fields)
    powers = st.sampled_from([16, 32, 64])
    config = Conv2dConfig(
        draw(powers),
        draw(powers),
        max(draw(powers), 32),
        GROUP_M=draw(st.integers(1, 4)),
        SPLIT_K=draw(st.integers(1, 4)),
        FOLD=draw(st.booleans()),
        ROWS=draw(st.sampled_from([1, 2, 3, 4, 8])) if problem.depthwise else 1,
    )
    assume(CONV2D.space.fits(problem, config, A100) is None)
    return problem, config


fuzzed = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@settings(fuzzed, max_examples=40)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_any_small_problem_with_any_configuration(data, seed):
    conforms(*drawn(data), seed=seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(fuzzed, max_examples=1500)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_any_small_problem_with_any_configuration_for_longer(data, seed):
    conforms(*drawn(data), seed=seed)


# Layers of real networks, made small

LAYERS = {
    "stem 7x7/2 of 3 channels": {"H": 15, "W": 14, "C": 3, "K": 17, "R": 7, "S": 7, "stride": 2, "pad": 3},
    "patches of 4x4": {"H": 12, "W": 8, "C": 3, "K": 24, "R": 4, "S": 4, "stride": 4, "pad": 0},
    "MobileNet 3x3/2": {"H": 9, "W": 10, "C": 24, "K": 24, "groups": 24, "R": 3, "S": 3, "stride": 2, "pad": 1},
    "ConvNeXt 7x7": {"H": 8, "W": 7, "C": 18, "K": 18, "groups": 18, "R": 7, "S": 7, "stride": 1, "pad": 3},
    "ResNeXt, 4 channels each": {"H": 5, "W": 6, "C": 16, "K": 16, "groups": 4, "R": 3, "S": 3, "stride": 1, "pad": 1},
    "dilated": {"H": 9, "W": 9, "C": 17, "K": 8, "R": 3, "S": 3, "stride": 1, "pad": 2, "dilation": 2},
    "3x3 of one channel": {"H": 7, "W": 7, "C": 1, "K": 33, "R": 3, "S": 3, "stride": 1, "pad": 1},
}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_real_networks(name, layout):
    fields = dict(LAYERS[name])
    stride, pad, dilation = fields.pop("stride"), fields.pop("pad"), fields.pop("dilation", 1)
    fields |= {f"pad_{side}": pad for side in ("top", "left", "bottom", "right")}
    fields |= {"stride_h": stride, "stride_w": stride, "dilation_h": dilation, "dilation_w": dilation}
    problem = Conv2dProblem(N=2, layout=layout, bias="fp16", activation="relu", **fields)
    (launch,) = CONV2D.launches(problem, CONV2D.default(problem, A100))
    wanted = depthwise.depthwise_kernel if problem.depthwise else jit.conv2d_kernel
    assert launch.fn is wanted
    if problem.C < 8:
        # No tap's channels are padded to a block: the depth is, once.
        assert dict(launch.constexprs)["FOLD"] == problem.C
    conforms(problem)


def test_values_that_stand_far_apart_are_added_in_fp32():
    # In fp16 every 1 after the 2048 would be lost.
    x, w = np.ones((1, 3, 3, 114), np.float16), np.ones((16, 3, 3, 114), np.float16)
    x[..., 0, 0, 0] = 2048
    for groups in (1, 114):
        weights = w if groups == 1 else np.ones((114, 3, 3, 1), np.float16)
        result = conv2d(x, weights, groups=groups, out_dtype="fp32")
        assert result[0, 0, 0, 0] == 2047 + 9 * (114 // groups)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("groups", [1, 5])
def test_nan_stays_with_the_pixels_that_see_it(groups, layout):
    problem = Conv2dProblem(
        N=2, H=6, W=7, C=5, K=5, R=3, S=2, groups=groups, pad_top=1, pad_left=1, dtype="fp32", layout=layout
    )
    arrays = problem.inputs(0)
    x = arrays["x"] if layout == "nhwc" else arrays["x"].transpose(0, 2, 3, 1)
    x[1, 3, 2, 4] = np.nan
    result = run(problem, arrays, config=CONV2D.default(problem, A100))
    result = result if layout == "nhwc" else result.transpose(0, 2, 3, 1)
    expected = np.zeros(result.shape, bool)
    expected[1, 2:5, 2:4, slice(None) if groups == 1 else 4] = True
    np.testing.assert_array_equal(np.isnan(result), expected)


BIG = {"nhwc": (1, 2**26 + 1, 1, 33), "nchw": (1, 33, 2**26 + 1, 1)}


@pytest.mark.skipif(sys.platform != "linux", reason="relies on memory that is only there once written to")
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("groups", [1, 33])
def test_offsets_past_31_bits(groups, layout):
    # 2.2 GB of zeros, of which two pages are written: two output pixels, a whole array apart.
    x = np.zeros(BIG[layout], np.int8)
    x[(0, -1, 0) if layout == "nhwc" else (0, slice(None), -1, 0)] = np.arange(33)
    shape = (33, 1, 1, 33 // groups) if layout == "nhwc" else (33, 33 // groups, 1, 1)
    w = np.zeros(shape, np.int8)
    w.reshape(33, -1)[np.arange(33), np.arange(33) % (33 // groups)] = 2
    result = conv2d(x, w, stride=(2**26, 1), groups=groups, layout=layout)
    rows = result[0, :, 0] if layout == "nhwc" else result[0, :, :, 0].T
    np.testing.assert_array_equal(rows, [np.zeros(33), 2 * np.arange(33)])


# int8


def integers(shape, seed):
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


INTEGER_SHAPES = (
    ((2, 5, 6, 37), (19, 3, 3, 37), 1),
    ((1, 5, 6, 3), (19, 3, 3, 3), 1),
    ((1, 4, 5, 24), (24, 3, 3, 1), 24),
    ((1, 4, 5, 12), (6, 3, 3, 6), 2),
)


def integer_sums(x, w, groups):
    """Exact sums of 3×3 windows with padding 1, in int64."""
    n, h, width, c = x.shape
    padded = np.pad(x.astype(np.int64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # n, h, w, c, r, s
    windows = windows.reshape(n, h, width, groups, c // groups, 3, 3)
    filters = w.astype(np.int64).reshape(groups, -1, *w.shape[1:])
    return np.einsum("nhwgcrs,gkrsc->nhwgk", windows, filters).reshape(n, h, width, -1)


@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize(("x_shape", "w_shape", "groups"), INTEGER_SHAPES, ids=str)
def test_int8_sums_are_exact(x_shape, w_shape, groups, layout, split):
    x, w = integers(x_shape, 1), integers(w_shape, 2)
    sums = integer_sums(x, w, groups)
    config = Conv2dConfig(16, 16, 32, SPLIT_K=split)
    if layout == "nchw":
        x, w, sums = (np.ascontiguousarray(each.transpose(0, 3, 1, 2)) for each in (x, w, sums))
    result = conv2d(x, w, padding=1, groups=groups, layout=layout, config=config)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, sums)


@pytest.mark.parametrize(("x_shape", "w_shape", "groups"), INTEGER_SHAPES, ids=str)
def test_requantised_results_are_the_nearest_integers(x_shape, w_shape, groups):
    x, w = integers(x_shape, 1), integers(w_shape, 2)
    scales = np.random.default_rng(3).uniform(0.001, 0.01, w_shape[0]).astype(np.float32)
    bias = np.random.default_rng(4).normal(size=w_shape[0]).astype(np.float32)
    y = integer_sums(x, w, groups).astype(np.float32) * np.float32(0.02) * scales + bias
    expected = np.clip(np.rint(np.maximum(y, 0) / np.float32(0.25)), -128, 127)
    result = conv2d(
        x, w, x_scale=0.02, w_scale=scales, bias=bias, activation="relu", out_scale=0.25, out_dtype="int8",
        padding=1, groups=groups,
    )  # fmt: skip
    assert result.dtype == np.int8
    np.testing.assert_array_equal(result, expected)
    assert 0 < np.mean(expected == 127) < 0.5 or expected.max() < 127


def test_scales_apply_to_every_dtype():
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 5)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(6, 3, 3, 5)).astype(np.float32)
    scales = np.arange(1, 7, dtype=np.float32)
    plain = conv2d(x, w)
    near = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(conv2d(x, w, w_scale=scales, x_scale=0.5), 0.5 * plain * scales, **near)
    np.testing.assert_allclose(conv2d(x, w, w_scale=3, alpha=2), 6 * plain, **near)
    np.testing.assert_allclose(conv2d(x, w, w_scale=np.float32([3]), x_scale=np.float32([2])), 6 * plain, **near)


# Split-K


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("layout", "kind", "order"),
    [
        ("nhwc", "fp32", "forwards"),
        ("nhwc", "int8", "backwards"),
        ("nchw", "fp32", "backwards"),
        ("nchw", "int8", "forwards"),
    ],
)
@pytest.mark.parametrize(("split", "fold"), [(2, False), (4, True), (8, False)])
def test_split_k_is_deterministic_and_leaves_its_counters_zero(split, fold, kind, layout, order, monkeypatch):
    fused = {"bias": "fp32", "activation": "silu", "x_scale": True} if kind == "int8" else {}
    problem = Conv2dProblem(
        N=1, H=5, W=4, C=70, K=34, R=3, S=2, groups=2, pad_top=1, dtype=kind, out_dtype="fp32", layout=layout,
        **(fused or {"bias": "fp32"}),
    )  # fmt: skip
    config = Conv2dConfig(16, 16, 32, SPLIT_K=split, FOLD=fold)
    check_splits(CONV2D, problem, config, monkeypatch, garbage=-7, backwards=order == "backwards")


@pytest.mark.parametrize("channels", [1, 31, 33, 64])
def test_splits_that_get_no_work_add_nothing(channels):
    problem = Conv2dProblem(N=1, H=3, W=5, C=channels, K=17, R=1, S=2, dtype="fp32", residual="fp32")
    conforms(problem, Conv2dConfig(16, 16, 32, SPLIT_K=8))
    conforms(problem, Conv2dConfig(16, 16, 32, SPLIT_K=8, FOLD=True))


# Problems


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"C": 0}, "C=0 must be from 1"),
        ({"pad_left": -1}, "pad_left=-1 must be from 0"),
        ({"stride_h": 0}, "stride_h=0 must be from 1"),
        ({"groups": 3}, "C=16 must be divisible by groups=3"),
        ({"groups": 4, "K": 6}, "K=6 must be divisible by groups=4"),
        ({"H": 2}, "H=2 with padding 0 and 0 is less than the 3 that 3 taps with dilation 1 reach"),
        ({"W": 6, "dilation_w": 3}, "W=6 with padding 0 and 0 is less than the 7 that 3 taps"),
        ({"dtype": "float16"}, "unknown dtype='float16': conv2d takes fp16"),
        ({"dtype": "int32"}, "dtype='int32': conv2d takes fp16"),
        ({"layout": "hwcn"}, "layout='hwcn' must be nhwc or nchw"),
        ({"w_layout": "rsck"}, "w_layout='rsck' must be krsc or kcrs"),
        ({"w_scale": "row"}, "w_scale='row' must be tensor, channel or none"),
        ({"precision": "tf32"}, "precision='tf32' is for dtype=fp32"),
        ({"precision": "fast"}, "precision='fast' must be ieee or tf32"),
        ({"out_dtype": "int32"}, "out_dtype='int32' is the bare sum of dtype='int8'"),
        ({"dtype": "int8", "bias": "fp32", "out_dtype": "int32"}, "out_dtype='int32' is the bare sum"),
        (
            {"dtype": "int8", "out_dtype": "fp32"},
            "dtype='int8' with neither x_scale nor w_scale gives the bare sums, in int32",
        ),
        ({"out_dtype": "int8"}, "out_dtype='int8' needs out_scale"),
        ({"out_scale": True}, "out_scale is for a result of int8"),
        ({"bias": "int8"}, "bias='int8': conv2d takes fp16"),
    ],
    ids=str,
)
def test_what_can_not_be_computed_is_refused_in_one_line(fields, message):
    with pytest.raises(ProblemError) as raised:
        Conv2dProblem(**({"N": 1, "H": 8, "W": 8, "C": 16, "K": 16, "R": 3, "S": 3} | fields))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@given(st.data())
@settings(fuzzed, max_examples=100)
def test_a_problem_is_its_text(data):
    problem, config = drawn(data)
    assert Conv2dProblem.parse(str(problem)) == problem
    assert Conv2dProblem.from_json(problem.to_json()) == problem
    assert Conv2dConfig.from_json(config.to_json()) == config


def test_layouts_of_weights_that_are_the_same_have_one_name():
    shape = {"N": 1, "H": 8, "W": 8, "C": 16, "K": 16}
    for layout, usual in (("nhwc", "krsc"), ("nchw", "kcrs")):
        for other in (None, "krsc", "kcrs"):
            assert Conv2dProblem(**shape, R=1, S=1, layout=layout, w_layout=other).w_layout == usual
            assert Conv2dProblem(**shape, R=3, S=1, groups=16, layout=layout, w_layout=other).w_layout == usual
        assert Conv2dProblem(**shape, R=3, S=1, layout=layout, w_layout="kcrs").w_layout == "kcrs"


def test_default_result_dtypes():
    shape = {"N": 1, "H": 8, "W": 8, "C": 16, "K": 16, "R": 3, "S": 3}
    kinds = {"fp16": "fp16", "bf16": "bf16", "fp32": "fp32", "int8": "int32", "fp8e4m3": "bf16", "fp8e5m2": "bf16"}
    for kind, wanted in kinds.items():
        assert Conv2dProblem(**shape, dtype=kind).output_dtype == wanted
    assert Conv2dProblem(**shape, dtype="int8", x_scale=True, activation="relu").output_dtype == "bf16"


def test_operations_and_bytes_by_hand():
    problem = Conv2dProblem(
        N=2, H=8, W=8, C=16, K=24, R=3, S=3, groups=2, pad_top=1, pad_left=1, pad_bottom=1, pad_right=1,
        stride_h=2, stride_w=2, bias="fp32", residual="fp16", w_scale="channel", out_dtype="fp32",
    )  # fmt: skip
    assert (problem.P, problem.Q, problem.depth) == (4, 4, 72)
    assert problem.flops() == 2 * (2 * 4 * 4) * 24 * 72
    x, w, out = 2 * 8 * 8 * 16 * 2, 24 * 72 * 2, 2 * 4 * 4 * 24 * 4
    assert problem.bytes_moved() == x + w + out + 24 * 4 + out // 2 + 24 * 4
    # Of a 1×1 with stride 2, a quarter of x is never read.
    assert Conv2dProblem(N=1, H=8, W=8, C=16, K=16, R=1, S=1, stride_h=2, stride_w=2).pixels_read() == 16


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_a_part_of_the_problem_has_that_part_of_the_result(layout, groups, seed):
    problem = Conv2dProblem(
        N=6, H=40, W=37, C=12, K=24, R=3, S=2, groups=groups, stride_w=2, dilation_h=2, pad_top=2, pad_right=3,
        dtype="int8", x_scale=True, w_scale="channel", bias="fp32", residual="fp32", layout=layout, out_dtype="fp32",
    )  # fmt: skip
    arrays = problem.inputs(seed)
    part, chosen, index = problem.part(arrays, np.random.default_rng(seed))
    whole = CONV2D.reference(problem, arrays)["out"]
    assert part.pixels < problem.pixels
    np.testing.assert_allclose(CONV2D.reference(part, chosen)["out"], whole[np.ix_(*index["out"])], rtol=1e-12)
    assert tolerance(part) == tolerance(problem)


def test_inputs_are_near_one_however_deep_the_sum():
    for kind, scales in (("fp32", {}), ("int8", {"x_scale": True}), ("fp16", {"w_scale": "tensor"})):
        for channels in (3, 300):
            problem = Conv2dProblem(N=1, H=9, W=9, C=channels, K=20, R=3, S=3, dtype=kind, out_dtype="fp32", **scales)
            assert 0.8 < CONV2D.reference(problem, problem.inputs(0))["out"].std() < 1.25
    one, same, other = (Conv2dProblem(N=1, H=9, W=9, C=3, K=2, R=3, S=3).inputs(seed) for seed in (3, 3, 4))
    assert np.array_equal(one["x"], same["x"])
    assert not np.array_equal(one["x"], other["x"])


def test_a_wrong_operand_is_far_outside_the_tolerance():
    # It is off by about 1/√depth, for the deepest sums and the coarsest operands.
    for kind, precision in (("bf16", None), ("fp8e5m2", None), ("fp32", "tf32"), ("int8", None)):
        scale = {"x_scale": True} if kind == "int8" else {}
        problem = Conv2dProblem(
            N=1, H=8, W=8, C=2048, K=16, R=3, S=3, dtype=kind, precision=precision, out_dtype="fp32", **scale
        )
        assert tolerance(problem)["out"].absolute < 8 / math.sqrt(problem.depth)


def test_neighbours_differ_in_size_alone():
    one = Conv2dProblem(N=1, H=56, W=56, C=64, K=64, R=3, S=3)
    near = {"N": 2, "H": 28, "W": 112}
    assert CONV2D.distance(one, one) == 0
    assert CONV2D.distance(one, Conv2dProblem(**{**one.to_dict(), **near})) == pytest.approx(3)
    for other in ({"R": 1}, {"stride_w": 2}, {"dtype": "bf16", "out_dtype": "bf16"}, {"C": 72}, {"N": 64}):
        assert CONV2D.distance(one, Conv2dProblem(**{**one.to_dict(), **other})) is None
    slim = Conv2dProblem(N=1, H=56, W=56, C=64, K=64, R=3, S=3, groups=64)
    wide = Conv2dProblem(N=1, H=56, W=56, C=128, K=128, R=3, S=3, groups=128)
    assert CONV2D.distance(slim, wide) == 2
    assert CONV2D.distance(one, slim) is None


@pytest.mark.parametrize(
    ("device", "fields", "reason"),
    [
        ("sm_86", {"dtype": "fp8e4m3"}, "fp8e4m3 needs sm_89 or newer, and rtx3090 is sm_86"),
        ("sm_75", {"dtype": "bf16"}, "bf16 needs sm_80 or newer, and t4 is sm_75"),
        ("sm_75", {"dtype": "int8"}, "int8 needs sm_80 or newer, and t4 is sm_75"),
        ("sm_75", {"dtype": "fp8e5m2"}, "fp8e5m2 needs sm_80 or newer, and t4 is sm_75"),  # and so does its bf16 result
        ("sm_75", {"dtype": "fp32", "precision": "tf32"}, "precision=tf32 needs sm_80 or newer, and t4 is sm_75"),
    ],
)
def test_dtypes_that_a_device_lacks(device, fields, reason):
    problem = Conv2dProblem(N=1, H=8, W=8, C=16, K=16, R=3, S=3, **fields)
    assert reason in CONV2D.supported(problem, resolve_device(device))


@pytest.mark.parametrize("device", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_dtypes_that_a_device_has(device):
    resolved = resolve_device(device)
    for kind in INPUT_DTYPES:
        problem = Conv2dProblem(N=1, H=8, W=8, C=16, K=16, R=3, S=3, dtype=kind, out_dtype=None)
        assert (CONV2D.supported(problem, resolved) is None) == (resolved.arch >= DTYPES[kind].min_arch)


def test_a_result_two_tolerances_off_fails():
    expected = np.linspace(-3, 3, 7)
    bound = Tolerance(relative=1e-3, absolute=1e-4)
    off = bound.absolute + bound.relative * np.abs(expected)
    assert_close(expected + 0.5 * off, expected, bound)
    with pytest.raises(AssertionError, match="7 of 7 elements are wrong"):
        assert_close(expected + 2 * off, expected, bound)

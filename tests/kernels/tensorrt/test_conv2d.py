"""The convolution's plugins: which problem tensors make, and that launches for all sizes are right for each."""

from __future__ import annotations

import pytest

from tests.kernels.tensorrt.cases import case, check_launches, check_results
from tilewright.kernels import Conv2dConfig, Conv2dProblem
from tilewright.tuning_db.errors import ProblemError, UsageError

N = [1, 8, 64]
SIDE = [8, 56, 224]
NCHW = {"layout": "nchw", "w_layout": "kcrs"}
PADS = {f"pad_{side}": 1 for side in ("top", "left", "bottom", "right")}


def test_any_batch():
    found = case("FusedConv2d", [((N, 32, 28, 28), "fp16"), ((64, 32, 3, 3), "fp16")], stride_h=2, stride_w=2, **PADS)
    fields = {"H": 28, "W": 28, "C": 32, "K": 64, "R": 3, "S": 3, "stride_h": 2, "stride_w": 2, **PADS, **NCHW}
    assert check_launches(found, lambda n: Conv2dProblem(N=n, **fields), [(1,), (2,), (7,), (64,)]) >= 20


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
def test_any_image(last):
    formats = ("HWC8", "LINEAR", "LINEAR", "HWC8", "HWC8") if last else ()
    inputs = [
        ((N, 16, SIDE, SIDE), "bf16"),
        ((24, 16, 3, 3), "bf16"),
        ((24,), "fp32"),
        ((N, 24, SIDE, SIDE), "bf16"),
    ]
    found = case("FusedConv2dBiasResidual", inputs, formats=formats, activation="relu", **PADS)
    fields = {"C": 16, "K": 24, "R": 3, "S": 3, "dtype": "bf16", "bias": "fp32", "residual": "bf16", **PADS}
    fields |= {"layout": "nhwc" if last else "nchw", "w_layout": "kcrs", "activation": "relu"}
    sizes = [(n, h, w, n, h, w) for n, h, w in ((1, 8, 8), (8, 56, 56), (3, 57, 63), (2, 224, 48))]
    assert check_launches(found, lambda n, h, w, *_: Conv2dProblem(N=n, H=h, W=w, **fields), sizes) >= 10


def test_the_residual_of_any_image_is_as_large_as_the_image_makes_it():
    """Sizes of the odd size that stands for all others, half as large, are even."""
    sides = [63, 223, 447], [32, 112, 224]
    inputs = [((N, 16, sides[0], sides[0]), "fp16"), ((16, 16, 3, 3), "fp16"), ((N, 16, sides[1], sides[1]), "fp16")]
    found = case("FusedConv2dResidual", inputs, stride_h=2, stride_w=2, **PADS)
    fields = {"C": 16, "K": 16, "R": 3, "S": 3, "stride_h": 2, "stride_w": 2, "residual": "fp16", **PADS, **NCHW}
    sizes = [(n, h, w, n, (h + 1) // 2, (w + 1) // 2) for n, h, w in ((1, 63, 63), (8, 224, 223), (3, 447, 64))]
    assert check_launches(found, lambda n, h, w, *_: Conv2dProblem(N=n, H=h, W=w, **fields), sizes) >= 10


def test_uneven_padding_and_dilation_of_any_image():
    found = case(
        "FusedConv2d", [((1, 8, SIDE, SIDE), "fp32"), ((8, 8, 2, 3), "fp32")], pad_bottom=1, dilation_w=2, stride_h=3
    )
    fields = {"N": 1, "C": 8, "K": 8, "R": 2, "S": 3, "pad_bottom": 1, "dilation_w": 2, "stride_h": 3, "dtype": "fp32"}
    sizes = [(8, 8), (9, 10), (10, 9), (11, 11), (224, 224)]
    assert check_launches(found, lambda h, w: Conv2dProblem(H=h, W=w, **fields, **NCHW), sizes) >= 5


def test_rows_that_only_some_images_have_even():
    """Images of the odd size that stands for all others have rows of 224 pixels here, and others don't."""
    found = case("FusedConv2d", [((1, 16, SIDE, SIDE), "fp16"), ((16, 16, 2, 2), "fp16")])
    fields = {"N": 1, "C": 16, "K": 16, "R": 2, "S": 2, **NCHW}
    assert check_launches(found, lambda h, w: Conv2dProblem(H=h, W=w, **fields), [(8, 8), (9, 10), (224, 225)]) >= 10


@pytest.mark.parametrize(
    ("groups", "filters"), [(4, 64), (32, 32), (32, 64)], ids=["groups", "depthwise", "multiplier"]
)
def test_groups(groups, filters):
    inputs = [((N, 32, 14, 14), "fp16"), ((filters, 32 // groups, 3, 3), "fp16")]
    fields = {"H": 14, "W": 14, "C": 32, "K": filters, "R": 3, "S": 3, "groups": groups, **PADS, **NCHW}
    found = case("FusedConv2d", inputs, groups=groups, **PADS)
    assert check_launches(found, lambda n: Conv2dProblem(N=n, **fields), [(1,), (9,)]) >= 5


def test_scales_and_a_quantised_result():
    inputs = [((N, 32, 14, 14), "int8"), ((64, 32, 1, 1), "int8"), ((1,), "fp32"), ((64,), "fp32"), ((), "fp32")]
    found = case("FusedConv2dXScaleWScaleOutScale", inputs, out_dtype="int8")
    fields = {"x_scale": True, "w_scale": "channel", "out_scale": True, "out_dtype": "int8", "dtype": "int8"}
    fields |= {"H": 14, "W": 14, "C": 32, "K": 64, "R": 1, "S": 1, **NCHW}
    assert check_launches(found, lambda n: Conv2dProblem(N=n, **fields), [(1,), (64,)]) >= 5


def formats(plugin, inputs, **attributes):
    found = case(plugin, inputs, **attributes)
    return found.variant.operation.formats(found.tensors, found.outputs, found.attributes)


def test_formats_are_channels_last_where_nothing_is_padded():
    linear = ("LINEAR",) * 3
    assert formats("FusedConv2d", [((1, 16, 8, 8), "fp16"), ((24, 16, 1, 1), "fp16")]) == [
        linear,
        ("HWC8", "LINEAR", "HWC8"),
    ]
    assert formats("FusedConv2d", [((1, 3, 8, 8), "fp32"), ((5, 3, 1, 1), "fp32")]) == [
        linear,
        ("HWC", "LINEAR", "HWC"),
    ]
    for channels, filters in ((12, 16), (16, 12)):
        assert formats("FusedConv2d", [((1, channels, 8, 8), "fp16"), ((filters, channels, 1, 1), "fp16")]) == [linear]
    # int32 sums have no format of channels last.
    assert formats("FusedConv2d", [((1, 16, 8, 8), "int8"), ((16, 16, 1, 1), "int8")]) == [linear]
    inputs = [((1, 16, 8, 8), "int8"), ((16, 16, 1, 1), "int8"), ((1, 16, 8, 8), "fp32"), ((1,), "fp32")]
    mixed = ("HWC16", "LINEAR", "HWC", "LINEAR", "HWC8")
    assert formats("FusedConv2dResidualXScale", inputs, out_dtype="fp16")[1] == mixed


@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("groups", [1, 16], ids=["dense", "depthwise"])
def test_code_for_all_sizes_is_right_for_each(last, groups):
    side, formats = [4, 8, 12], ("HWC8", "LINEAR", "HWC8") if last else ()
    inputs = [(([1, 2, 2], 16, side, side), "fp16"), ((16, 16 // groups, 2, 2), "fp16")]
    attributes = {"stride_w": 2, "pad_top": 1, "groups": groups}
    found = case("FusedConv2d", inputs, formats=formats, **attributes)
    fields = {"C": 16, "K": 16, "R": 2, "S": 2, "layout": "nhwc" if last else "nchw", "w_layout": "kcrs", **attributes}
    check_results(
        found,
        lambda n, h, w: Conv2dProblem(N=n, H=h, W=w, **fields),
        [(1, 4, 4), (2, 8, 7), (1, 5, 12), (2, 12, 12)],
        Conv2dConfig(32, 16, 16),
    )


@pytest.mark.parametrize(
    ("plugin", "inputs", "attributes", "message"),
    [
        (
            "FusedConv2d",
            [((8, 8, 8), "fp16"), ((8, 8, 1, 1), "fp16")],
            {},
            "x has 3 dimensions and must be (N, C, H, W)",
        ),
        ("FusedConv2d", [((1, 8, 8, 8), "fp16"), ((8, 4, 1, 1), "fp16")], {}, "x has 8 channels and w 4"),
        ("FusedConv2d", [((1, 8, 8, 8), "fp16"), ((8, 8, 1, 1), "fp16")], {"activation": ""}, "activation=''"),
        ("FusedConv2d", [((1, 8, 8, 8), "fp16"), ((8, 8, 1, 1), "bf16")], {}, "x is fp16 and w is bf16"),
        (
            "FusedConv2d",
            [((1, 8, 2, 2), "fp16"), ((8, 8, 3, 3), "fp16")],
            {},
            "H=2 with padding 0 and 0 is less than",
        ),
        (
            "FusedConv2d",
            [((1, 8, 8, 8), "fp16"), ((8, 8, 1, 1), "fp16")],
            {"stride_h": 0},
            "stride_h=0 must be at least 1",
        ),
        ("FusedConv2d", [((1, 8, 8, 8), "fp16"), ((8, 8, 1, 1), "fp16")], {"groups": 3}, "groups=3"),
        ("FusedConv2d", [((1, N, 8, 8), "fp16"), ((8, 8, 1, 1), "fp16")], {}, "C, dimension 1 of x, must be static"),
        ("FusedConv2d", [((1, 8, 8, 8), "fp16"), ((N, 8, 1, 1), "fp16")], {}, "K, dimension 0 of w, must be static"),
        ("FusedConv2dBias", [((1, 8, 8, 8), "fp16"), ((4, 8, 1, 1), "fp16"), ((8,), "fp16")], {}, "bias is (8,)"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(plugin, inputs, attributes, message):
    with pytest.raises((ProblemError, UsageError)) as caught:
        case(plugin, inputs, **attributes).check()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

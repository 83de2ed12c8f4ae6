"""The tests of the fused convolution, put to the test: seeded defects, each of which some problem must show."""

from __future__ import annotations

import pytest

from tests.kernels.defects import exposed, seeded
from tests.kernels.ops.conv2d_cases import conforms
from tilewright.kernels import partials
from tilewright.kernels.ops.conv2d import depthwise, jit
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import Conv2dConfig

DEFECTS = {
    "folded tail dropped": ("blocks = tl.cdiv(R * S * FOLD, BLOCK_K)", "blocks = R * S * FOLD // BLOCK_K"),
    "channel tail dropped": (
        "channel_blocks = tl.cdiv(C, BLOCK_K)",
        "channel_blocks = tl.maximum(C // BLOCK_K, 1)",
    ),
    "x read past C": ("beside(c + steps < C, NHWC)", "beside(c + steps < C + 1, NHWC)"),
    "w read past C": ("across(c + steps < C, NHWC)", "across(c + steps < C + 1, NHWC)"),
    "folded x read past its depth": ("beside(depth < R * S * FOLD, NHWC)", "beside(depth < R * S * FOLD + 1, NHWC)"),
    "folded w read past its depth": ("across(depth < R * S * FOLD, NHWC)", "across(depth < R * S * FOLD + 1, NHWC)"),
    "top padding skipped": ("    top = row * STRIDE_H - pad_top\n    left = column * STRIDE_W - pad_left\n    # Folded",
                            "    top = row * STRIDE_H\n    left = column * STRIDE_W - pad_left\n    # Folded"),
    "left edge not masked": (
        "inside = both(mask_m, (y >= 0) & (y < H) & (z >= 0) & (z < W))",
        "inside = both(mask_m, (y >= 0) & (y < H) & (z < W))",
    ),
    "lower edge not masked": (
        "inside = both(mask_m, (y >= 0) & (y < H) & (z >= 0) & (z < W))",
        "inside = both(mask_m, (y >= 0) & (z >= 0) & (z < W))",
    ),
    "right edge of folded taps one too far": (
        "mask_x = both(mask_x, (y >= 0) & (y < H) & (z >= 0) & (z < W))",
        "mask_x = both(mask_x, (y >= 0) & (y < H) & (z >= 0) & (z <= W))",
    ),
    "dilation of rows ignored": ("y = top + r * DILATION_H\n                    z",
                                 "y = top + r\n                    z"),
    "dilation of columns ignored": ("(s * DILATION_W).to(tl.int64)", "s.to(tl.int64)"),
    "folded dilation ignored": ("right = tap % S * DILATION_W", "right = tap % S"),
    "folded taps by columns first": ("down = tap // S * DILATION_H", "down = tap % R * DILATION_H"),
    "filters of the first group": ("w_ptr + (group * K + filters)", "w_ptr + filters"),
    "channels of the first group": ("x_base = x_ptr + group * channels\n", "x_base = x_ptr\n"),
    "channels of the first group in NCHW": ("x_ptr + group * channels * x_channel", "x_ptr"),
    "first image for all": ("x_base + image.to(tl.int64) * x_image", "x_base"),
    "tap left one block late": ("done = c >= C", "done = c > C"),
    "row of taps left one tap late": ("done = s == S", "done = s > S"),
    "taps of w in the wrong order": ("w_step += (r * S + s) * channels", "w_step += (s * R + r) * channels"),
    "KCRS read as KRSC": ("w_steps = steps * (R * S)", "w_steps = steps"),
    "last filter not written": ("tl.store(out_ptr + offsets, y, mask=mask)",
                                "tl.store(out_ptr + offsets, y, mask=mask & (offsets % 17 != 16))"),
    "written past the pixels": ("mask = both(across(mask_m, NHWC), mask_n)", "mask = mask_n"),
    "activation skipped": ("finish(x, residual, ACTIVATION,", 'finish(x, residual, "none",'),
    "residual skipped": ("finish(x, residual, ACTIVATION,", "finish(x, None, ACTIVATION,"),
    "residual before the activation": ("ACTIVATION, RESIDUAL_LAST, out_scale_ptr", "ACTIVATION, False, out_scale_ptr"),
    "out_scale skipped": ("RESIDUAL_LAST, out_scale_ptr, out_ptr.dtype", "RESIDUAL_LAST, None, out_ptr.dtype"),
    "bias skipped": ("x += beside(tl.load(bias_ptr", "x += 0 * beside(tl.load(bias_ptr"),
    "bias of the first group": ("tl.load(bias_ptr + channels", "tl.load(bias_ptr + channels % 17"),
    "alpha skipped": ("x *= tl.load(alpha_ptr)", "x *= 1.0"),
    "x_scale skipped": ("x *= tl.load(x_scale_ptr)", "x *= 1.0"),
    "one scale for all channels": ('if W_SCALE == "channel":', 'if W_SCALE == "row":'),
    "tiles repeated": ("tile_of(tile % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)",
                       "tile_of(tile % tiles_m, tiles_m, tiles_n, GROUP_M)"),
    "one split lost": ("for split in range(SPLITS):", "for split in range(SPLITS - 1):"),
    "first split twice": ("place + split * STEP", "place + split // 2 * STEP"),
    "split overlaps the next": (
        "last = tl.minimum(first + blocks_per_split, blocks)",
        "last = tl.minimum(first + blocks_per_split + 1, blocks)",
    ),
    "operands in tf32": ("input_precision=PRECISION", 'input_precision="tf32"'),
    "rows of out swapped with columns": ("image.to(tl.int64) * P + row) * Q + column",
                                         "image.to(tl.int64) * Q + column) * P + row"),
    "pixels of the next row": ("return rows // P, rows % P,", "return rows // P, rows % P + rows // P,"),
}  # fmt: skip

DEPTHWISE_DEFECTS = {
    "upper edge not masked": ("both(mask_m, (y >= 0) & (y < H))", "both(mask_m, y < H)"),
    "lower edge not masked": ("both(mask_m, (y >= 0) & (y < H))", "both(mask_m, y >= 0)"),
    "left edge not masked": ("both(mask_m, (z >= 0) & (z < W))", "both(mask_m, z < W)"),
    "dilation of columns ignored": ("row * x_row + s * DILATION_W * x_column", "row * x_row + s * x_column"),
    "dilation of columns ignored by one row": ("(r * DILATION_H * x_row + s * DILATION_W *",
                                               "(r * DILATION_H * x_row + s *"),
    "last row of taps dropped by one row": ("for r in range(R):", "for r in range(R - 1):"),
    "product in fp16 of one row": ("return x.to(SUM) * w.to(SUM)",
                                   "return (x.to(tl.float16) * w.to(tl.float16)).to(SUM)"),
    "dilation of rows ignored": ("row % DILATION_H == 0 and row // DILATION_H < R", "row < R"),
    "last row of taps dropped": ("row // DILATION_H < R:", "row // DILATION_H < R - 1:"),
    "stride of rows ignored": ("row - out_row * STRIDE_H,", "row - out_row,"),
    "taps of w in the wrong order": ("weights += (load(w_tile + (r * S + s)", "weights += (load(w_tile + (s * R + r)"),
    "filters of a channel taken for channels": ("channels = filters // MULTIPLIER", "channels = filters % C"),
    "product in fp16": ("total += x * weights[row // DILATION_H]",
                        "total += (x.to(tl.float16) * weights[row // DILATION_H].to(tl.float16)).to(total.dtype)"),
    "last row of a band not written": ("for out_row in tl.static_range(ROWS):\n        out_pixels",
                                       "for out_row in tl.static_range(max(1, ROWS - 1)):\n        out_pixels"),
    "written past the last row": ("both(mask_m, first + out_row < P)", "mask_m"),
    "bands of the first rows": ("first = band * ROWS", "first = band"),
}  # fmt: skip

FUSED = {"bias": "fp32", "residual": "fp32", "alpha": True, "activation": "relu", "w_scale": "channel", "x_scale": True}
SHAPE = {"N": 2, "H": 5, "W": 4, "R": 3, "S": 2, "dtype": "fp32"}
PADDED = {"pad_top": 1, "pad_left": 1, "pad_bottom": 2, "pad_right": 1, "dilation_h": 2, "dilation_w": 2}

# In the order in which defects are seen soonest: most of them need but one or two of these.
EXPOSING = (
    (Conv2dProblem(N=1, H=3, W=2, C=7, K=17, R=3, S=2, dtype="fp32"), Conv2dConfig(16, 16, 16, FOLD=True)),
    (Conv2dProblem(**SHAPE, C=17, K=16, out_dtype="int8", out_scale=True), Conv2dConfig(16, 16, 32)),
    (
        Conv2dProblem(**SHAPE, C=32, K=16, residual="fp32", residual_last=True, activation="silu"),
        Conv2dConfig(16, 16, 16),
    ),
    (Conv2dProblem(**SHAPE, C=7, K=17, **PADDED), Conv2dConfig(16, 16, 16, FOLD=True)),
    (Conv2dProblem(**SHAPE, C=66, K=34, groups=2, **PADDED, **FUSED), Conv2dConfig(16, 16, 32)),
    (Conv2dProblem(**SHAPE, C=66, K=34, groups=2, layout="nchw", **PADDED), Conv2dConfig(16, 16, 16, SPLIT_K=4)),
    (Conv2dProblem(**SHAPE, C=17, K=34, groups=17, layout="nchw"), Conv2dConfig(16, 16)),
    (Conv2dProblem(**SHAPE, C=34, K=34, groups=34, **PADDED, **FUSED), Conv2dConfig(16, 16)),
    (Conv2dProblem(**{**SHAPE, "H": 11}, C=34, K=34, groups=34, stride_h=2, **PADDED), Conv2dConfig(16, 16, ROWS=2)),
)


def test_the_kernels_themselves_show_no_defect():
    assert not exposed(conforms, EXPOSING)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_would_be_seen(defect):
    with seeded((partials, jit), *DEFECTS[defect]):
        assert exposed(conforms, EXPOSING)


@pytest.mark.parametrize("defect", DEPTHWISE_DEFECTS)
def test_a_defect_of_the_depthwise_kernel_would_be_seen(defect):
    with seeded((depthwise,), *DEPTHWISE_DEFECTS[defect]):
        assert exposed(conforms, ((problem, config) for problem, config in EXPOSING if problem.depthwise))

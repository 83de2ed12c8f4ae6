"""The default configuration of the convolution: what runs when nothing is known of a problem."""

from __future__ import annotations

import math
from dataclasses import replace

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.conv2d.space import (
    LEAST_FOR_TAPS,
    Conv2dConfig,
    depth_blocks,
    fits,
    taps_at_once,
    vector_bytes,
)

_DEPTHWISE = Conv2dConfig(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_stages=1)


def default(problem: Conv2dProblem, device: Device) -> Conv2dConfig:
    """What runs when nothing is known: fits every problem whose grid can be launched, and does not spill.

    4 warps: a loop over flattened taps was reported to be miscompiled at 8 (pytorch/pytorch#173068). The kernel's loop
    has another form, but what runs unchecked should not depend on that.
    """
    if problem.depthwise:
        if problem.layout == "nhwc":
            # Measured on an H200 alone: rows below each other take 0.30 to 0.82 of the time of the default without them
            # with stride 1, and with stride 2, where they share less, 0.87 to 1.34. Weights of longer columns spill.
            shared = problem.stride_h == 1 and problem.dilation_h == 1 and 3 <= problem.R <= 9 and problem.P >= 3
            if shared and vector_bytes(problem, _DEPTHWISE)[0] == 16 and dtype(problem.dtype).bytes == 2:
                return replace(_DEPTHWISE, BLOCK_M=32, BLOCK_N=32, ROWS=4)
            # Narrow loads have an address each: half as many of them to a thread.
            # The taps of a step are all loaded before the first is used: of more than 9 as many would spill, of single
            # elements of 16 bits of more than 8, and of single bytes, which are widened one by one, of more than 5.
            vector = vector_bytes(problem, _DEPTHWISE)[0]
            long = {1: 5, 2: 8}.get(vector, 9) < taps_at_once(problem, _DEPTHWISE)
            rows = 32 if vector == 16 and not long else 16
            return replace(_DEPTHWISE, BLOCK_M=rows, BLOCK_N=32 if problem.K <= 32 or long else 64)
        return replace(_DEPTHWISE, BLOCK_M=64)
    channels = problem.group_channels
    fold = channels < 16 or (channels % 16 != 0 and channels < LEAST_FOR_TAPS)
    depth = problem.depth if fold else channels
    small = 32 if problem.group_filters <= 32 else 64
    config = Conv2dConfig(BLOCK_M=64, BLOCK_N=small, BLOCK_K=32, FOLD=fold)
    # Where Triton 3.6 sees no run of pixels in NCHW (see `pixel_of`), a thread has as many pixels as half a tile; and
    # single bytes take a register each. Of 64 rows that spills; so do words of folded taps in NCHW.
    scattered = problem.layout == "nchw" and (
        problem.Q % 2 == 1 or problem.stride_w > 1 or (fold and problem.dtype == "fp32")
    )
    if scattered or (dtype(problem.dtype).bytes == 1 and min(vector_bytes(problem, config)) < 4):
        config = replace(config, BLOCK_M=32)
    copies = max(vector_bytes(problem, config)) >= 4 and device.arch >= 80
    wide = min(vector_bytes(problem, config)) == 16
    if problem.unit == "fp32" or not device.tensor_tflops:
        # CUDA cores hold their operands in registers: larger tiles spill, and so do as many single elements.
        depth_of_step = 32 if wide or dtype(problem.dtype).bytes == 1 else 16
        config = replace(config, BLOCK_M=32, BLOCK_N=32, BLOCK_K=depth_of_step, num_stages=2 if copies else 1)
    elif not copies:
        # Folded single elements have an address and a mask each: of 64 rows and 32 deep some spill. Dots of a warp
        # group need the rows.
        config = replace(config, num_stages=1)
        if fold and device.has_group_dots and dtype(problem.dtype).bytes > 1:
            config = replace(config, BLOCK_K=16)
        elif fold:
            config = replace(config, BLOCK_M=32)
    elif max(vector_bytes(problem, config)) == 4 and problem.dtype == "fp32" and not device.has_group_dots:
        config = replace(config, BLOCK_M=32)  # an address for every element that is copied: of 64 rows some spill
    elif wide and problem.pixels <= 32:
        config = replace(config, BLOCK_M=16 if problem.pixels <= 16 else 32, num_stages=4)
    elif wide and depth % 64 == 0 and problem.dtype != "fp32":
        config = replace(config, BLOCK_K=64)
    split = _split(problem, config, device)
    single = not copies or max(vector_bytes(problem, config)) < 16
    if split > 1 and single and config.BLOCK_M == 64 and config.BLOCK_K > 16:
        # Sums of other blocks beside single elements, or the addresses they are copied from: of 64 columns some spill.
        # Twice as many tiles share the work out as half as many splits do.
        config = replace(config, BLOCK_N=32)
        split = _split(problem, config, device)
    config = replace(config, SPLIT_K=split)
    while fits(problem, config, device) is not None and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def _split(problem: Conv2dProblem, config: Conv2dConfig, device: Device) -> int:
    """A late layer of one image has less than one tile for every SM, and a depth to share."""
    tiles = math.ceil(problem.pixels / config.BLOCK_M) * math.ceil(problem.group_filters / config.BLOCK_N)
    tiles *= problem.groups
    split = 1
    while tiles * split * 2 <= device.sms and depth_blocks(problem, config) >= 8 * split and split < 16:
        split *= 2
    return split

"""The convolutions of ConvNeXt-T on images of 224×224, batch 32: patches, and 7×7 depthwise.

Liu et al. 2022 (arXiv:2201.03545), section 3.2. Its 1×1 convolutions are linear layers here, the layer's scale folded
into weights and bias.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.tuner.suites.workload import Workload, conv, distinct, linear

STAGES = ((96, 3), (192, 3), (384, 9), (768, 3))
"""Channels and blocks of each stage."""


def convnext_t(images: int) -> tuple[Workload, ...]:
    """Every layer that multiplies, each distinct one once."""
    return distinct(_layers(images))


def _layers(images: int) -> Iterator[Workload]:
    channels, size = 3, 224
    for stage, (width, blocks) in enumerate(STAGES):
        patch = 4 if stage == 0 else 2
        name = f"convnext-t {'stem' if stage == 0 else f'downsample {stage}'}"
        yield conv(name, images, size, channels, width, patch, stride=patch)
        channels, size = width, size // patch
        name = f"convnext-t stage {stage}"
        # LayerNorm stands between the depthwise convolution and what follows.
        yield conv(f"{name} depthwise", images, size, width, width, 7, groups=width, count=blocks)
        tokens, batch = images * size * size, f"batch {images}"
        yield linear(f"{name} up, {batch}", tokens, width, 4 * width, count=blocks, bias="fp16", activation="gelu_erf")
        yield linear(f"{name} down, {batch}", tokens, 4 * width, width, count=blocks, bias="fp16", residual="fp16")
    yield linear(f"convnext-t head, batch {images}", images, channels, 1000, bias="fp16")


CONVNEXT_T = tuple(workload for workload in convnext_t(32) if workload.op == "conv2d")

"""ResNet-50 on images of 224×224.

He et al. 2015 (arXiv:1512.03385), table 1; the stride of a stage is that of its first 3×3 convolution, as torchvision
has it ("v1.5"), and layers have torchvision's names. BatchNorm is folded into weights and bias.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.tuner.suites.workload import Workload, conv, distinct, linear

STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""Channels of the 3×3 convolution and blocks of each stage; a block's result has four times as many channels."""


def resnet50(images: int) -> tuple[Workload, ...]:
    """Every layer that multiplies, each distinct one once."""
    return distinct(_layers(images))


def _layers(images: int) -> Iterator[Workload]:
    yield conv("resnet50 conv1", images, 224, 3, 64, 7, stride=2, activation="relu")
    channels, size = 64, 56  # behind the pooling
    for stage, (width, blocks) in enumerate(STAGES, start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            name = f"resnet50 layer{stage}.{block}"
            yield conv(f"{name}.conv1", images, size, channels, width, 1, activation="relu")
            yield conv(f"{name}.conv2", images, size, width, width, 3, stride=stride, activation="relu")
            if block == 0:
                yield conv(f"{name}.downsample", images, size, channels, 4 * width, 1, stride=stride)
            size, channels = size // stride, 4 * width
            yield conv(f"{name}.conv3", images, size, width, channels, 1, residual="fp16", activation="relu")
    yield linear(f"resnet50 fc, batch {images}", images, channels, 1000, bias="fp16")


RESNET50 = (*resnet50(1), *resnet50(32))

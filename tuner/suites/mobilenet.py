"""The depthwise convolutions of MobileNetV2 on images of 224×224, batch 32.

Sandler et al. 2018 (arXiv:1801.04381), table 2. BatchNorm is folded into weights and bias.
"""

from __future__ import annotations

from collections.abc import Iterator

from tilewright.tuner.suites.workload import Workload, conv, distinct, linear

BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, output channels, repetitions, and stride of the first: the table's t, c, n, s."""


def mobilenet_v2(images: int) -> tuple[Workload, ...]:
    """Every layer that multiplies, each distinct one once."""
    return distinct(_layers(images))


def _layers(images: int) -> Iterator[Workload]:
    yield conv("mobilenet-v2 features.0", images, 224, 3, 32, 3, stride=2, activation="relu6")
    channels, size, index = 32, 112, 1
    for expansion, filters, repetitions, first_stride in BLOCKS:
        for repetition in range(repetitions):
            stride = first_stride if repetition == 0 else 1
            name, wide = f"mobilenet-v2 features.{index}", expansion * channels
            if expansion > 1:
                yield conv(f"{name} expand", images, size, channels, wide, 1, activation="relu6")
            yield conv(f"{name} depthwise", images, size, wide, wide, 3, stride=stride, groups=wide, activation="relu6")
            size //= stride
            residual = "fp16" if stride == 1 and channels == filters else None
            yield conv(f"{name} project", images, size, wide, filters, 1, residual=residual)
            channels, index = filters, index + 1
    yield conv(f"mobilenet-v2 features.{index}", images, size, channels, 1280, 1, activation="relu6")
    yield linear(f"mobilenet-v2 classifier, batch {images}", images, 1280, 1000, bias="fp16")


MOBILENET_V2 = tuple(workload for workload in mobilenet_v2(32) if " depthwise " in workload.name)

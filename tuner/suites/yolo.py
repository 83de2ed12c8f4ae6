"""YOLOv8s on one image of 640×640.

Ultralytics' configuration file yolov8.yaml and its blocks C2f, SPPF and Detect (github.com/ultralytics/ultralytics,
`ultralytics/cfg/models/v8`, `nn/modules`): layers have its numbers. BatchNorm is folded into weights and bias; every
convolution but the last ones of the head has SiLU. What skips a bottleneck is added behind its activation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tilewright.tuner.suites.workload import Workload, conv, distinct

IMAGE, CLASSES, BINS = 640, 80, 16
"""Pixels along a side, COCO's classes, and bins of each of a box's four distances."""

WIDTHS = (32, 64, 128, 256, 512)
"""Channels at 1/2, 1/4, 1/8, 1/16 and 1/32 of the image's size: half of what the file has, scale s."""

BLOCKS = (1, 2, 2, 1)
"""Bottlenecks of each C2f of the backbone: a third of what the file has. Those of the head have one."""


def yolov8s(images: int) -> tuple[Workload, ...]:
    """Every layer that multiplies, each distinct one once."""
    return distinct(_layers(images))


def _layers(images: int) -> Iterator[Workload]:
    size = IMAGE // 2
    yield conv("yolov8s 0", images, IMAGE, 3, WIDTHS[0], 3, stride=2, activation="silu")
    for level, blocks in enumerate(BLOCKS, start=1):
        name, width = f"yolov8s {2 * level}", WIDTHS[level]
        down = f"yolov8s {2 * level - 1}"
        yield conv(down, images, size, WIDTHS[level - 1], width, 3, stride=2, activation="silu")
        size //= 2
        yield from _c2f(name, images, size, width, width, blocks, shortcut=True)
    deepest = WIDTHS[-1]
    yield conv("yolov8s 9.cv1", images, size, deepest, deepest // 2, 1, activation="silu")
    yield conv("yolov8s 9.cv2", images, size, 4 * (deepest // 2), deepest, 1, activation="silu")
    # Up to 1/16 and 1/8, and down again, beside what was there at that size.
    _, _, fine, middle, coarse = WIDTHS
    yield from _c2f("yolov8s 12", images, 2 * size, coarse + middle, middle, 1)
    yield from _c2f("yolov8s 15", images, 4 * size, middle + fine, fine, 1)
    yield conv("yolov8s 16", images, 4 * size, fine, fine, 3, stride=2, activation="silu")
    yield from _c2f("yolov8s 18", images, 2 * size, fine + middle, middle, 1)
    yield conv("yolov8s 19", images, 2 * size, middle, middle, 3, stride=2, activation="silu")
    yield from _c2f("yolov8s 21", images, size, middle + coarse, coarse, 1)
    for level, (width, pixels) in enumerate(zip((fine, middle, coarse), (4 * size, 2 * size, size), strict=True)):
        for branch, hidden, results in (
            ("cv2", max(16, fine // 4, 4 * BINS), 4 * BINS),
            ("cv3", max(fine, min(CLASSES, 100)), CLASSES),
        ):
            name = f"yolov8s 22.{branch}.{level}"
            yield conv(f"{name}.0", images, pixels, width, hidden, 3, activation="silu")
            yield conv(f"{name}.1", images, pixels, hidden, hidden, 3, activation="silu")
            yield conv(f"{name}.2", images, pixels, hidden, results, 1)


def _c2f(
    name: str, images: int, size: int, channels: int, filters: int, blocks: int, *, shortcut: bool = False
) -> Iterator[Workload]:
    """Half of a 1×1 convolution's channels go through bottlenecks, and all of what these make into another."""
    half = filters // 2
    skipped: dict[str, Any] = {"residual": "fp16", "residual_last": True} if shortcut else {}
    yield conv(f"{name}.cv1", images, size, channels, filters, 1, activation="silu")
    for block in range(blocks):
        yield conv(f"{name}.m.{block}.cv1", images, size, half, half, 3, activation="silu")
        yield conv(f"{name}.m.{block}.cv2", images, size, half, half, 3, activation="silu", **skipped)
    yield conv(f"{name}.cv2", images, size, (2 + blocks) * half, filters, 1, activation="silu")


YOLOV8S = yolov8s(1)

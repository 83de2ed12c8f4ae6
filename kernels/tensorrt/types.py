"""Data types and formats: what TensorRT calls them, and what kernels do."""

from __future__ import annotations

from typing import Any

from tilewright.tuning_db.errors import UnsupportedError

TENSORRT_NAMES = {
    "fp32": "FP32",
    "fp16": "FP16",
    "bf16": "BF16",
    "int8": "INT8",
    "int32": "INT32",
    "uint8": "UINT8",
    "fp8e4m3": "FP8",
}
"""Canonical name of each data type that tensors of TensorRT have, and its name in `AutoTuneCombination`."""

_MEMBERS = {"FP32": "FLOAT", "FP16": "HALF"}

LINEAR = "LINEAR"

CHANNELS_LAST = {
    "fp32": ("HWC", 1),
    "fp16": ("HWC8", 8),
    "bf16": ("HWC8", 8),
    "int8": ("HWC16", 16),
    "fp8e4m3": ("HWC16", 16),
}
"""The NHWC format of each data type, and what its channels are padded to a multiple of (TensorRT's `TensorFormat`)."""


def channels_last(dtype: str, channels: int) -> str | None:
    """TensorRT's format that is plain NHWC memory for so many channels, or None where it would pad them."""
    name, multiple = CHANNELS_LAST.get(dtype, ("", 1))
    return name if name and channels % multiple == 0 else None


def canonical(kind: Any, name: str) -> str:
    """The canonical name of a `tensorrt.DataType`, that of the tensor `name`.

    Raises:
        UnsupportedError: kernels have no such data type.
    """
    for known, text in TENSORRT_NAMES.items():
        if kind.name == _MEMBERS.get(text, text):
            return known
    raise UnsupportedError(
        f"{name} is {kind.name}, which is not supported; use one of {', '.join(TENSORRT_NAMES.values())}"
    )


def member(tensorrt: Any, name: str) -> Any:
    """The `tensorrt.DataType` of a canonical name.

    Raises:
        UnsupportedError: TensorRT has no such data type.
    """
    text = TENSORRT_NAMES.get(name)
    if text is None:
        raise UnsupportedError(f"TensorRT has no data type {name}; use one of {', '.join(TENSORRT_NAMES)}")
    return getattr(tensorrt.DataType, _MEMBERS.get(text, text))

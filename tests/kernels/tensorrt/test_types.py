"""Data types and formats between TensorRT and this package."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace

import pytest

from tilewright.kernels.dtypes import DTYPES
from tilewright.kernels.tensorrt.types import TENSORRT_NAMES, canonical, channels_last, member
from tilewright.tuning_db.errors import UnsupportedError

DataType = Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8 INT4 FP4 E8M0")
TENSORRT = SimpleNamespace(DataType=DataType)


def test_there_and_back():
    assert set(TENSORRT_NAMES) <= set(DTYPES)
    for name in TENSORRT_NAMES:
        assert canonical(member(TENSORRT, name), "x") == name
    assert member(TENSORRT, "fp32") is DataType.FLOAT
    assert member(TENSORRT, "fp8e4m3") is DataType.FP8


def test_others_are_refused():
    with pytest.raises(UnsupportedError, match="kv_lens is FP4, which is not supported; use one of FP32, FP16, BF16"):
        canonical(DataType.FP4, "kv_lens")
    with pytest.raises(UnsupportedError, match="TensorRT has no data type fp8e5m2"):
        member(TENSORRT, "fp8e5m2")


def test_channels_last_pads_nothing():
    assert [channels_last("fp16", channels) for channels in (7, 8, 12, 16)] == [None, "HWC8", None, "HWC8"]
    assert [channels_last("int8", channels) for channels in (8, 16)] == [None, "HWC16"]
    assert channels_last("fp32", 3) == "HWC"
    assert channels_last("int32", 16) is None

"""Options of a model that don't go together, or don't go with the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.request import Request
from tilewright.tuning_db.errors import UnsupportedError, UsageError


def request(model: Path, output: Path | None, device: str = "sm_86", **options: object) -> Request:
    return Request.parse(model, output, resolve_device(device), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "auto"}, "auto needs --max-error"),
        ({"max_error": "nonsense=1"}, "no measure 'nonsense'"),
        ({"shapes": ["image"]}, "image"),
    ],
)
def test_wrong_options_are_told(tmp_path, options, words):
    with pytest.raises(UsageError, match=words):
        request(tmp_path / "model.onnx", None, **options)


def test_a_precision_that_the_device_lacks_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match=r"--precision fp8 needs sm_89 or newer: rtx3090 is sm_86"):
        request(tmp_path / "model.onnx", None, precision="fp8")
    assert request(tmp_path / "model.onnx", None, "sm_89", precision="fp8").precision == "fp8"
    with pytest.raises(UnsupportedError, match=r"--precision w4a16 needs sm_80 or newer: t4 is sm_75"):
        request(tmp_path / "model.onnx", None, "t4", precision="w4a16")
    assert request(tmp_path / "model.onnx", None, precision="w4a16").files[1] == "model.w4a16.onnx"


def test_an_output_that_is_a_file_or_can_not_be_made_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UsageError, match="is a file: name a folder"):
        request(tmp_path / "model.onnx", file)

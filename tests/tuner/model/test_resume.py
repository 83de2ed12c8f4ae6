"""The key of what a run goes on from: another one for whatever scales and errors depend on."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.tuner.model.request import Request
from tilewright.tuner.model.resume import resume_key

SOURCE, DATA = SimpleNamespace(digest="model"), SimpleNamespace(digest="data")


def key(tmp_path, *, device="sm_86", source=SOURCE, data=DATA, **options):
    return resume_key(Request.parse(tmp_path / "model.onnx", None, resolve_device(device), **options), source, data)


def test_the_same_run_has_the_same_key(tmp_path):
    assert key(tmp_path) == key(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"source": SimpleNamespace(digest="another model")},
        {"data": SimpleNamespace(digest="other data")},
        {"device": "sm_80"},
        {"precision": "int8"},
        {"max_error": "max=0.01", "precision": "int8"},
    ],
    ids=str,
)
def test_what_scales_and_errors_depend_on_is_in_the_key(tmp_path, change):
    assert key(tmp_path, **change) != key(tmp_path)

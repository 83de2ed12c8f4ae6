"""Under which key a run of a model keeps what the next one goes on from."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path

from tilewright.tuner.model.calibration.data import Samples
from tilewright.tuner.model.reading.source import Source
from tilewright.tuner.model.request import Request


def resume_key(request: Request, source: Source, data: Samples) -> str:
    """A hash of what scales and errors depend on, besides the plan."""
    digest = hashlib.sha256(source.digest.encode())
    settings = [data.digest, request.precision, request.device.key, str(request.budget), _code()]
    digest.update(json.dumps([settings, dict(request.shapes), dict(request.dims)], sort_keys=True).encode())
    return digest.hexdigest()


@cache
def _code() -> list[str]:
    """What computes scales and errors: a hash of this package's files, and the versions of the libraries."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *(version(name) for name in ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy"))]

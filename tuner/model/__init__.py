"""Whole models: ONNX in; workloads tuned, chains fused, precision lowered inside a budget, the result checked.

`flow.py` is the way through; every step is a file or a folder here. It needs the extra `onnx`.
"""

from __future__ import annotations

from tilewright.tuning_db.errors import MissingDependencyError

try:
    from tilewright.tuner.model.flow import Made, optimise, plan
    from tilewright.tuner.model.request import Request
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library not in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        raise
    raise MissingDependencyError(
        f"whole models need {library}, which is not installed: pip install onnx onnxscript onnx_ir onnxruntime"
    ) from None

__all__ = ["optimise", "plan", "Request", "Made"]

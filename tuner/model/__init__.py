"""Whole models: ONNX in; workloads tuned, chains fused, precision lowered inside a budget, the result checked.

`flow.py` is the way through; every step is a file or a folder here. It needs `pip install "tilewright[onnx]"`.
"""

from __future__ import annotations

from tilewright.tuner.model.flow import Made, Request, optimise, plan

__all__ = ["optimise", "plan", "Request", "Made"]

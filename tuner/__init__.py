"""Searching for the best configuration: on the GPU at hand, or for one that is not.

from tilewright.tuner import autotune
results = autotune(device="sm_86", problems=["M=4096,N=4096,K=4096,dtype=fp16"])
"""

from __future__ import annotations

from tilewright.tuner.suites import SUITES, Workload, find_suite
from tilewright.tuner.tune import Progress, Result, Results, autotune

__all__ = ["autotune", "Results", "Result", "Progress", "Workload", "SUITES", "find_suite"]

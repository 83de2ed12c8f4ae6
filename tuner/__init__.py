"""Searching for the best configuration: on the GPU at hand, or for one that is not.

    from tilewright.tuner import autotune
    results = autotune(device="sm_86", problems=["M=4096,N=4096,K=4096,dtype=fp16"])

The names are imported when they are asked for: the command line answers `--help`, and Ctrl-C, before Triton is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.tuner.packing import Packed, build_pack
    from tilewright.tuner.results import Progress, Result, Results
    from tilewright.tuner.sampler import EnumeratedSampler
    from tilewright.tuner.suites import SUITES, Workload, find_suite, read_calls
    from tilewright.tuner.tune import autotune
    from tilewright.tuning_db.errors import (
        DatabaseError,
        MachineError,
        MissingDependencyError,
        RunError,
        StorageError,
        TilewrightError,
        UnknownSuiteError,
        UsageError,
        WorkerError,
    )

__all__ = [
    "autotune",
    "build_pack",
    "Packed",
    "Results",
    "Result",
    "Progress",
    "Workload",
    "SUITES",
    "find_suite",
    "read_calls",
    "EnumeratedSampler",
    "TilewrightError",
    "UsageError",
    "UnknownSuiteError",
    "DatabaseError",
    "StorageError",
    "MissingDependencyError",
    "RunError",
    "WorkerError",
    "MachineError",
]

_HOMES = {
    "autotune": "tilewright.tuner.tune",
    **dict.fromkeys(("Results", "Result", "Progress"), "tilewright.tuner.results"),
    **dict.fromkeys(("build_pack", "Packed"), "tilewright.tuner.packing"),
    **dict.fromkeys(("Workload", "SUITES", "find_suite", "read_calls"), "tilewright.tuner.suites"),
    "EnumeratedSampler": "tilewright.tuner.sampler",
    **{name: "tilewright.tuning_db.errors" for name in __all__ if name.endswith("Error")},
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])

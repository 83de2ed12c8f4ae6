"""A worker whose GPU dies of an illegal address; run as a script by `test_measure`."""

from __future__ import annotations

import os
from typing import Any

from tilewright.kernels.devices import resolve_device
from tilewright.tuner import measure
from tilewright.tuner.worker import serve


class CudaError(Exception):
    """Stands for CuPy's."""


class DyingGpu:
    """Every allocation fails, and so does everything after it."""

    errors = (CudaError,)

    def __init__(self) -> None:
        self.device = resolve_device("h200")

    def allocate(self, nbytes: int) -> Any:
        raise CudaError("cudaErrorIllegalAddress: an illegal memory access was encountered")

    def alive(self) -> bool:
        return False


if __name__ == "__main__":
    measure._gpus[0] = DyingGpu()  # type: ignore[assignment]
    serve({"measure": measure.measure, "echo": lambda request: {"status": "ok", "pid": os.getpid()}})

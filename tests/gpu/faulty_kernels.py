"""A worker whose kernels go wrong in the way a request asks for; run as a script by `test_measure`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from tilewright.kernels.kernel import Argument, Launch
from tilewright.kernels.runtime import Plan
from tilewright.tuner import measure
from tilewright.tuner.gpu import Gpu
from tilewright.tuner.worker import TASKS, Reply, Request, serve


@triton.jit
def wild_store_kernel(out_ptr):
    tl.store((out_ptr.to(tl.int64) * 0 + 64).to(tl.pointer_type(tl.float16)), 1.0)


@triton.jit
def endless_kernel(out_ptr):
    # Its own poison, which nobody changes; the atomic keeps the loop from being taken for one without effect.
    while tl.atomic_add(out_ptr.to(tl.pointer_type(tl.int32)), 0) != 123456789:
        pass


def constants(launch: Launch, **changes: Any) -> Launch:
    return replace(launch, constexprs=tuple((name, changes.get(name, value)) for name, value in launch.constexprs))


def other_kernel(fn: Any) -> Callable[[Launch], Launch]:
    def swap(launch: Launch) -> Launch:
        out = next(each for each in launch.arguments if each.name == "out_ptr")
        return Launch(fn, (1, 1, 1), (Argument("out_ptr", out.type, aligned=True),), (), num_warps=1, num_stages=1)

    return swap


FAULTS: dict[str, Callable[[Launch], Launch]] = {
    "activation skipped": lambda launch: constants(launch, ACTIVATION="none"),
    # Its mask gone, the last tile of rows is written beyond the end of the array, and read beyond that of A.
    "out of bounds": lambda launch: constants(launch, EVEN_M=True),
    "last tile missing": lambda launch: replace(launch, grid=(launch.grid[0] - 1, *launch.grid[1:])),
    "illegal address": other_kernel(wild_store_kernel),
    "endless": other_kernel(endless_kernel),
}


class FaultyGpu(Gpu):
    """Loads something else than it was given."""

    fault = ""

    def load(self, launches: tuple[Launch, ...]) -> Plan:
        spoil = FAULTS.get(self.fault, lambda launch: launch)
        # The flush, which is not the kernel under test, is left as it is.
        return super().load(tuple(spoil(each) if each.fn.__name__ == "gemm_kernel" else each for each in launches))

    def allocate(self, nbytes: int) -> Any:
        return super().allocate(nbytes if self.fault != "out of memory" else 1 << 50)


def measure_with_fault(request: Request) -> Reply:
    gpu = measure._gpus.setdefault(0, FaultyGpu(0))
    assert isinstance(gpu, FaultyGpu)
    gpu.fault = request.get("fault", "")
    if gpu.fault == "out of memory":
        measure.forget()
    return measure.measure(request)


if __name__ == "__main__":
    serve({**TASKS, "measure": measure_with_fault})

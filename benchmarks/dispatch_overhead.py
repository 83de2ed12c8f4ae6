"""What a warm call of a kernel costs the processor, up to the driver call.

    python -m benchmarks.dispatch_overhead [--device sm_86] [--json FILE]

The driver's own launch is left out: on every machine, with a GPU or without, it is replaced by a function that returns
at once, and arrays and their allocation by stand-ins of CuPy's. The kernel is really compiled for the device.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

import click

from benchmarks.measuring import finish, median_us
from benchmarks.simulated_gpu import SimulatedArray, simulated_gpu
from tilewright.kernels import gemm
from tilewright.kernels.arrays import kind_of
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.dispatch import plan_for
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuning_db import env

REPEATS = 5000


@click.command()
@click.option("--device", "device_name", default="sm_86", show_default=True, help="What to compile for.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write figures.")
def main(device_name: str, json_file: Path | None) -> None:
    """Measures the processor's share of a kernel call."""
    device = resolve_device(device_name)
    with (
        tempfile.TemporaryDirectory(prefix="dispatch-") as empty,
        mock.patch.dict(os.environ, {env.DB_DIR: empty}),
        simulated_gpu(device) as driver,
    ):
        a, b, out = (SimulatedArray((1024, 1024), address=(place + 1) << 24) for place in range(3))
        bias, residual = SimulatedArray((1024,)), SimulatedArray((1024, 1024), address=1 << 30)
        plan, _ = plan_for(GEMM, GemmProblem(M=1024, N=1024, K=1024), 0)
        run, pointers = plan.bind(("a_ptr", "b_ptr", "out_ptr"), {}), (1 << 24, 2 << 24, 3 << 24)
        kind = kind_of(a)
        calls = [
            ("gemm(a, b, out=out)", lambda: gemm(a, b, out=out)),
            ("gemm(a, b)", lambda: gemm(a, b)),
            (
                "gemm(a, b, bias=, residual=, activation=, alpha=, out=)",
                lambda: gemm(a, b, bias=bias, residual=residual, activation="gelu", alpha=0.5, out=out),
            ),
            ("of which: the plan alone", lambda: run(pointers, 0)),
            ("of which: a look at the arrays", lambda: kind.look((a, b, out))),
        ]
        rows = [(label, median_us(call, REPEATS)) for label, call in calls]
        launches = driver.launches
    finish(f"warm call for {device.sm}, driver replaced by a no-op", "µs", rows, json_file, launches=launches)


if __name__ == "__main__":
    main()

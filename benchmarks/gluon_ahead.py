"""Compiles the benchmarks' kernels in Gluon ahead of their launches, in parallel, into Triton's on-disk cache.

    python -m benchmarks.gluon_ahead JOBS

A process compiles its jobs, a list as JSON, one after the other, and prints a line for each. It goes the way of a
launch, but for the GPU: Triton binds the arguments of one, by which it specialises a kernel, and compiles. So the
launch finds the kernel under the same key.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from tilewright.kernels.activations import activation_name
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuning_db.env import compiling_environment

KINDS = {"fp16": "float16", "bf16": "bfloat16"}
"""Data types as torch calls them."""

COMMAND = (sys.executable, "-m", "benchmarks.gluon_ahead")


@dataclass(frozen=True)
class Shape:
    """What of an array a launch is specialised by: its data type, and that it begins at a multiple of 16 bytes, as all
    that torch allocates do."""

    shape: tuple[int, ...]
    kind: str  # as torch calls it

    @property
    def dtype(self) -> str:
        """As `torch.dtype` is written."""
        return f"torch.{self.kind}"

    def stride(self) -> tuple[int, ...]:
        """Of a dense array."""
        return tuple(math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape)))

    def data_ptr(self) -> int:
        """Any multiple of 16."""
        return 0

    def reshape(self, *shape: int) -> Shape:
        """As torch's, with one size of -1."""
        rest = -math.prod(self.shape) // math.prod(shape)
        return Shape(tuple(rest if size == -1 else size for size in shape), self.kind)

    def __len__(self) -> int:
        return self.shape[0]


class TargetDriver:
    """Of Triton's drivers what compiling asks for: a GPU that is not looked for, of a compute capability."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        """What is compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


def jobs_of(chosen: Iterable[tuple[Case, Sequence[Any]]], arch: int) -> list[dict[str, Any]]:
    """What to compile for cases with their configurations: each kernel once."""
    found: dict[Any, dict[str, Any]] = {}
    for case, configs in chosen:
        problem: Any = case.problem
        job: dict[str, Any] = {"arch": arch, "kind": KINDS[problem.dtype]}
        sizes: tuple[int, ...]
        if isinstance(problem, AttentionProblem):
            q = (problem.B, problem.H, problem.Sq, problem.D)
            job |= {"q": q, "k": (problem.B, problem.kv_heads, problem.Skv, problem.D), "causal": problem.causal}
            sizes = (problem.B * problem.H, problem.H // problem.kv_heads, problem.Sq, problem.Skv)
            kernel = (problem.dtype, problem.D, problem.causal)
        else:
            assert isinstance(problem, GemmProblem)
            sizes = (problem.M, problem.N, problem.K)
            job |= {"sizes": sizes, "bias": problem.bias is not None, "act": activation_name(problem.activation)}
            kernel = (problem.dtype, job["bias"], job["act"])
        # Integers are specialised by whether they are 1 or a multiple of 16.
        kinds = tuple((size == 1, size % 16 == 0) for size in sizes)
        for config in configs:
            found.setdefault((case.op, kernel, kinds, config), {**job, "config": asdict(config)})
    return list(found.values())


def compile_job(job: dict[str, Any]) -> None:
    """Compiles a kernel as its launch would."""
    from triton.runtime import driver

    from benchmarks import gluon_attention, gluon_gemm

    driver.set_active(TargetDriver(job["arch"]))
    kind = job["kind"]
    kernel: Any
    if "q" in job:
        q, k = (Shape(tuple(job[name]), kind) for name in "qk")
        wanted = gluon_attention.GluonAttentionConfig(**job["config"])
        kernel = gluon_attention.gluon_attention_kernel
        arguments, options = gluon_attention.launch_arguments(q, k, k, q, job["causal"], wanted)
    else:
        m, n, k_size = job["sizes"]
        a, b, out = (Shape(shape, kind) for shape in ((m, k_size), (n, k_size), (m, n)))
        bias = Shape((n,), kind) if job["bias"] else None
        config = gluon_gemm.GluonGemmConfig(**job["config"])
        kernel = gluon_gemm.gluon_gemm_kernel
        arguments, options = gluon_gemm.launch_arguments(a, b, out, bias, job["act"], config)
    kernel.warmup(*arguments, grid=(1,), **options)


def compile_ahead(jobs: Sequence[dict[str, Any]], seconds: float) -> int:
    """Compiles on every processor, for so many seconds at the most; how many kernels were compiled. One that can't be
    fails where it is launched."""
    end, processors = time.monotonic() + seconds, len(os.sched_getaffinity(0))
    shares = [jobs[first::processors] for first in range(processors)]
    running = [
        subprocess.Popen(
            [*COMMAND, json.dumps(share)],
            cwd=Path(__file__).parent.parent, env=compiling_environment(), stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )
        for share in shares
        if share
    ]  # fmt: skip
    count = 0
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        process.kill()
        count += len(process.communicate()[0].splitlines())
    return count


def main() -> None:
    """Compiles the jobs of the command line."""
    for job in json.loads(sys.argv[1]):
        with contextlib.suppress(Exception):  # it is the launch that tells of it
            compile_job(job)
            print("compiled", flush=True)


if __name__ == "__main__":
    main()

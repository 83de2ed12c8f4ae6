"""What a list of workloads adds up to over one pass of a model."""

from __future__ import annotations

from collections.abc import Iterable

from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuner.suites import Workload


def weights(workloads: Iterable[Workload]) -> int:
    """Weights of all layers, without biases."""
    total = 0
    for workload in workloads:
        problem = workload.problem
        if isinstance(problem, GemmProblem):
            total += workload.count * problem.N * problem.K
        elif isinstance(problem, Conv2dProblem):
            total += workload.count * problem.K * problem.R * problem.S * problem.C // problem.groups
    return total


def multiply_adds(workloads: Iterable[Workload]) -> int:
    return sum(workload.count * workload.problem.flops() for workload in workloads) // 2

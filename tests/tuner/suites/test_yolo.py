from __future__ import annotations

import pytest

from tests.tuner.suites.totals import multiply_adds, weights
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.tuner.suites import SUITES
from tilewright.tuner.suites.yolo import yolov8s

pytestmark = pytest.mark.smoke


def test_it_adds_up() -> None:
    # Ultralytics' YOLOv8s: 28.6 GFLOP, two a multiply-add, and with BatchNorm folded 11156544 parameters, of which 16
    # are the numbers 0 to 15 of its bins; and a bias for each filter.
    workloads = yolov8s(1)
    biases = sum(
        workload.count * (problem.K if isinstance(problem, Conv2dProblem) else problem.to_dict()["N"])
        for workload in workloads
        for problem in [workload.problem]
    )
    assert weights(workloads) + biases + 16 == 11156544
    assert 2 * multiply_adds(workloads) == pytest.approx(28.6e9, rel=0.005)
    assert multiply_adds(yolov8s(8)) == 8 * multiply_adds(workloads)


def test_what_skips_a_bottleneck_is_added_behind_its_activation() -> None:
    problems = [(workload, workload.problem) for workload in SUITES["yolov8s"]]
    skipped = [(w.count, p) for w, p in problems if isinstance(p, Conv2dProblem) and p.residual is not None]
    assert sum(count for count, _ in skipped) == 6  # of the backbone: 1, 2, 2 and 1
    assert all(problem.residual_last and problem.activation == "silu" for _, problem in skipped)

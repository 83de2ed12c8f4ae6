from __future__ import annotations

import pytest

from tests.tuner.suites.totals import multiply_adds, weights
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.tuner.suites import SUITES
from tilewright.tuner.suites.convnext import convnext_t

pytestmark = pytest.mark.smoke


def test_it_adds_up() -> None:
    # Table 1 of the paper: 4.5 G multiply-adds, 28.6 M parameters.
    assert multiply_adds(convnext_t(1)) == pytest.approx(4.46e9, rel=0.01)
    assert weights(convnext_t(1)) == pytest.approx(28.6e6, rel=0.005)


def test_the_suite_is_its_convolutions() -> None:
    problems = [workload.problem for workload in SUITES["convnext-t"]]
    assert all(isinstance(problem, Conv2dProblem) for problem in problems)
    depthwise = [problem for problem in problems if isinstance(problem, Conv2dProblem) and problem.depthwise]
    assert [(problem.C, problem.H, problem.R, problem.S) for problem in depthwise] == [
        (96, 56, 7, 7),
        (192, 28, 7, 7),
        (384, 14, 7, 7),
        (768, 7, 7, 7),
    ]
    assert sum(workload.count for workload in SUITES["convnext-t"]) == 18 + 4  # one a block, one in front of each stage

from __future__ import annotations

import pytest

from tests.tuner.suites.totals import multiply_adds, weights
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.tuner.suites import SUITES
from tilewright.tuner.suites.mobilenet import mobilenet_v2

pytestmark = pytest.mark.smoke


def test_it_adds_up() -> None:
    # Table 4 of the paper: 300 M multiply-adds, 3.4 M parameters. torchvision counts 3504872, of which 34112 belong to
    # BatchNorm and 1000 are the classifier's bias.
    assert multiply_adds(mobilenet_v2(1)) == pytest.approx(300e6, rel=0.01)
    assert weights(mobilenet_v2(1)) == 3504872 - 34112 - 1000


def test_the_suite_is_its_depthwise_convolutions() -> None:
    problems = [workload.problem for workload in SUITES["mobilenet-v2"]]
    assert all(isinstance(problem, Conv2dProblem) and problem.depthwise and problem.N == 32 for problem in problems)
    assert sum(workload.count for workload in SUITES["mobilenet-v2"]) == 17  # one a block
    assert {problem.to_dict()["activation"] for problem in problems} == {"clamp:0:6"}
    assert {problem.to_dict()["stride_h"] for problem in problems} == {1, 2}

"""How the fused convolution is called on a problem's arrays, and held to its reference: what its tests share."""

from __future__ import annotations

from tests.kernels.calls import run_conv2d as run
from tests.kernels.conformance import Guarded, check
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.conv2d.launch import CONV2D

A100 = resolve_device("a100")


def conforms(problem, config=None, seed=0):
    """Holds this op's own kernels to the reference: without a configuration, a pointwise problem is a GEMM's."""
    config = config or CONV2D.default(problem, A100)
    outs = Guarded.of(problem, offset=0 if problem.aligned else 1)
    check(CONV2D, problem, lambda arrays, outs: run(problem, arrays, outs["out"], config), outs, seed=seed)

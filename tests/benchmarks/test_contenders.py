"""The library's ways compute what ours do: each against the kernel's own reference, small, on a processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.cases import Case, cases, computes_all, smaller
from benchmarks.contenders import arrays_of, libraries
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel

CASES = list({str(each.problem): each for each in map(smaller, cases())}.values())
ON_GPU_ONLY = ("fp8e4m3", "int8")
"""Data types whose products torch has on a GPU, or of these sizes, alone."""


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", exc_type=ImportError)


def as_inputs(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays under the names and in the shapes of the problem's inputs, in float64."""
    named = {name: array.double().numpy() for name, array in arrays.items()}
    if isinstance(case.problem, GemmProblem):
        named["a"], named["b"] = named["a"][None], named.pop("w").T[None]
        if "residual" in named:
            named["residual"] = named["residual"][None]
    elif isinstance(case.problem, Conv2dProblem):
        named |= {name: named[name].transpose(0, 2, 3, 1) for name in ("x", "w", "residual") if name in named}
    return named


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.problem}")
def test_every_way_is_right(torch: Any, case: Case) -> None:
    if case.problem.dtype in ON_GPU_ONLY or getattr(case.problem, "b_dtype", None):  # type: ignore[attr-defined]
        pytest.skip(f"torch multiplies {case.problem} on a GPU alone")  # type: ignore[attr-defined]
    torch.manual_seed(0)
    arrays = arrays_of(torch, case, "cpu")
    kernel = find_kernel(case.op)
    wanted = kernel.reference(case.problem, as_inputs(case, arrays))["out"]
    # Between product and epilogue the library rounds to the result's type, of 8 or 11 bits.
    near = np.abs(wanted).max() * (0.02 if case.problem.dtype == "bf16" else 0.003)  # type: ignore[attr-defined]
    ran = 0
    for contender in libraries(torch, case):
        elsewhere = contender.name in ("cuBLASLt", "torch, cuDNN attention", "torch, efficient attention")
        if elsewhere or not computes_all(case, contender.role):
            continue
        result = contender.call(arrays)
        if result.dim() == 4 and case.op != "attention":
            result = result.permute(0, 2, 3, 1)
        found = result.double().numpy().reshape(wanted.shape)
        assert np.abs(found - wanted).max() <= near, contender.name
        ran += 1
    assert ran

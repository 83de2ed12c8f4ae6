"""What every kernel is held to whose blocks share one tile's sums (split-K)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.conformance import assert_close
from tilewright.kernels import interpreter
from tilewright.kernels.interpreter import interpret
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.problem import Config, Problem


def check_splits(
    kernel: Kernel[Any, Any],
    problem: Problem,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    *,
    garbage: float,
    backwards: bool,
) -> None:
    """Fails unless a fp32 result is right, the same to the last bit when the workspace holds garbage and, if asked,
    blocks finish in the opposite order, and the counters are zero after each launch."""
    (launch,) = kernel.launches(problem, config)
    scratch = {f"{each.name}_ptr": np.zeros(each.elements, each.numpy) for each in launch.scratch}
    arrays = problem.inputs(1)
    expected = kernel.reference(problem, arrays)["out"]

    def once() -> np.ndarray[Any, Any]:
        out = np.full(expected.shape, np.nan, np.float32)
        call = {f"{name}_ptr": array for name, array in arrays.items()} | {"out_ptr": out} | scratch
        call = {argument.name: call.get(argument.name, argument.value) for argument in launch.arguments}
        interpret(launch.fn, launch.grid, call | dict(launch.constexprs))
        return out

    first = once()
    assert_close(first, expected, kernel.tolerance(problem)["out"])
    assert not scratch["counters_ptr"].any()
    # The workspace may hold anything by then; blocks may finish in any order, and another one comes last.
    scratch["workspace_ptr"][:] = garbage
    if backwards:
        programs = np.ndindex
        monkeypatch.setattr(interpreter.np, "ndindex", lambda *grid: reversed(list(programs(*grid))))
    np.testing.assert_array_equal(once().view(np.uint32), first.view(np.uint32))
    assert not scratch["counters_ptr"].any()

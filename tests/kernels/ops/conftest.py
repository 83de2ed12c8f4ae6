"""What holds of every call that the ops' tests make, and what several of them look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tilewright.kernels import call as calling
from tilewright.kernels.arrays import NOWHERE, View, kind_of
from tilewright.kernels.call import Arrays, New, Operation, Options
from tilewright.kernels.dispatch import forget_plans
from tilewright.kernels.dtypes import dtype
from tilewright.kernels.problem import Problem


@pytest.fixture(autouse=True, scope="package")
def results_are_as_foretold() -> Iterator[None]:
    """New arrays have the shapes, dtypes and strides that `Operation.results` says without a plan: torch's compiler
    goes by that."""
    run = Operation.run_now

    def checked(self: Operation, arrays: Arrays, outs: Arrays, options: Options) -> Arrays:
        results = run(self, arrays, outs, options)
        if all(isinstance(array, np.ndarray | float | int | None) for array in (*arrays, *outs)):
            foretold = self.results(views_of(self, arrays, outs), options)
            for name, new, out, result in zip(self.outputs, foretold, outs, results, strict=True):
                if out is None:
                    assert (result is not None) == self.has(name, options), (self.name, name)
                if out is None and result is not None:
                    assert_is(new, result)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Operation, "run_now", checked)
        yield


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Problem]]:
    """The problems that calls come down to, as they are prepared."""
    seen = []
    original = calling.plan_for

    def plan_for(kernel: Any, problem: Problem, ordinal: int, **options: Any) -> Any:
        seen.append(problem)
        return original(kernel, problem, ordinal, **options)

    forget_plans()
    monkeypatch.setattr(calling, "plan_for", plan_for)
    yield seen
    forget_plans()


def views_of(operation: Operation, arrays: Arrays, outs: Arrays) -> dict[str, View]:
    names = (*operation.inputs, *operation.outputs)
    return {
        name: kind_of(array).view(array) if isinstance(array, np.ndarray) else View(NOWHERE, (1,), (1,), "fp32", -1)
        for name, array in zip(names, (*arrays, *outs), strict=True)
        if array is not None
    }


def assert_is(new: New, result: np.ndarray[Any, Any]) -> None:
    assert (result.shape, result.dtype) == (new.shape, np.dtype(dtype(new.dtype).numpy))
    stored = result.transpose(new.memory or range(result.ndim))
    assert stored.flags.c_contiguous, (new, result.strides)

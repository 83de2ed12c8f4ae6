"""Rankings worked out ahead: the same as when asked for, of the next problem alone, and none once it is closed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import predictions
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner import outlook as outlook_module
from tilewright.tuner.outlook import Outlook

DEVICE = resolve_device("a10")
PROBLEMS = [GemmProblem(16, size, 64) for size in (32, 64, 96)]


def in_order(problem: GemmProblem) -> list[Any]:
    return sorted(predictions(find_kernel("gemm"), problem, DEVICE), key=lambda pair: pair[0].time_us)


def test_each_is_ranked_as_if_it_were_the_only_one() -> None:
    with Outlook(DEVICE, PROBLEMS) as outlook:
        # In any order, some not at all, one twice.
        for problem in (*PROBLEMS, PROBLEMS[2], PROBLEMS[0]):
            assert outlook.of(problem) == in_order(problem)


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[GemmProblem, bool]]:
    """Each problem that is ranked, and whether by the asking thread."""
    found = []

    def noting(kernel: Any, problem: Any, device: Any) -> Any:
        found.append((problem, threading.current_thread() is threading.main_thread()))
        return predictions(kernel, problem, device)

    monkeypatch.setattr(outlook_module, "predictions", noting)
    return found


def test_the_next_is_ranked_by_another_thread(noted: list[Any]) -> None:
    with Outlook(DEVICE, PROBLEMS) as outlook:
        for problem in PROBLEMS:
            outlook.of(problem)
    assert noted == [(PROBLEMS[0], True), (PROBLEMS[1], False), (PROBLEMS[2], False)]


def test_nothing_is_ranked_before_anything_is_asked_for(noted: list[Any]) -> None:
    Outlook(DEVICE, PROBLEMS).close()
    assert noted == []


def test_an_error_comes_to_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(kernel: Any, problem: Any, device: Any) -> Any:
        if problem == PROBLEMS[1]:
            raise ZeroDivisionError
        return iter(())

    monkeypatch.setattr(outlook_module, "predictions", failing)
    with Outlook(DEVICE, PROBLEMS) as outlook:
        assert outlook.of(PROBLEMS[0]) == []
        with pytest.raises(ZeroDivisionError):
            outlook.of(PROBLEMS[1])


def test_closing_ends_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, taken = threading.Event(), []

    def endless(kernel: Any, problem: Any, device: Any) -> Any:
        if problem == PROBLEMS[0]:
            return
        while True:
            begun.set()
            taken.append(1)
            yield (None, None)

    monkeypatch.setattr(outlook_module, "predictions", endless)
    outlook = Outlook(DEVICE, PROBLEMS)
    outlook.of(PROBLEMS[0])
    assert begun.wait(30)
    ahead = outlook._ahead[PROBLEMS[1]]
    outlook.close()
    with pytest.raises(AttributeError):  # the sort of what was taken until then, which nobody asks for
        ahead.result(30)

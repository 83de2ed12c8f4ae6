from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.kernels.devices import resolve_device
from tilewright.tuner.results import Progress, Reporter, Result, Results
from tilewright.tuner.runner import Outcome
from tilewright.tuning_db.record import Status, Times

pytestmark = pytest.mark.smoke


def test_results_are_gone_through_and_counted() -> None:
    results = Results(resolve_device("rtx3090"), Path("db"), [Result("one", "gemm", {}), Result("two", "gemm", {})])
    assert [result.workload for result in results] == ["one", "two"]
    assert len(results) == 2


def test_every_outcome_is_told_with_the_best_so_far() -> None:
    events: list[Progress] = []
    report = Reporter(events.append, "qkv", index=1, workloads=3, trials=9)
    report.started()
    for time_us in (7.0, None, 9.0, 5.0):
        times = None if time_us is None else Times.single(time_us)
        report.outcome(Outcome(Status.TIMEOUT if times is None else Status.OK, times))
    result = Result("qkv", "gemm", {}, time_us=5.5)  # measured again
    report.finished(result)
    assert [event.done for event in events] == [0, 1, 2, 3, 4, 4]
    assert [event.best_us for event in events] == [None, 7.0, 7.0, 7.0, 5.0, 5.5]
    assert {(event.workload, event.index, event.workloads, event.trials) for event in events} == {("qkv", 1, 3, 9)}
    assert [event.result for event in events] == [None] * 5 + [result]

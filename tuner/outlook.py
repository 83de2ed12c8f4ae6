"""What is predicted of a run's workloads, each worked out while the one before it is tried.

Ranking some thousands of configurations takes a second or two, in which a GPU would wait.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from tilewright.kernels.device import Device
from tilewright.kernels.lookup import predictions
from tilewright.kernels.prediction import Prediction
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import find_kernel

Ranked = list[tuple[Prediction, Config]]


class Outlook:
    """The configurations worth trying for each of some problems, the best predicted first.

    For one thread; another works ahead for it. Close it, or use it as a context manager.
    """

    def __init__(self, device: Device, problems: Sequence[Problem]) -> None:
        self._device = device
        self._next = dict(itertools.pairwise(problems))
        self._thread = ThreadPoolExecutor(1, "outlook")
        self._stopped = threading.Event()
        self._ahead: dict[Problem, Future[Ranked]] = {}

    def __enter__(self) -> Outlook:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def of(self, problem: Problem) -> Ranked:
        """The ranking of a problem; that of the next one is begun."""
        ahead = self._ahead.pop(problem, None)
        ranked = self._rank(problem) if ahead is None else ahead.result()
        following = self._next.get(problem)
        if following is not None and following not in self._ahead:
            self._ahead[following] = self._thread.submit(self._rank, following)
        return ranked

    def close(self) -> None:
        """Ends what is under way, and doesn't wait for it."""
        self._stopped.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _rank(self, problem: Problem) -> Ranked:
        return sorted(self._until_stopped(problem), key=lambda pair: pair[0].order)

    def _until_stopped(self, problem: Problem) -> Iterator[tuple[Prediction, Config]]:
        for pair in predictions(find_kernel(problem.op), problem, self._device):
            if self._stopped.is_set():
                return
            yield pair

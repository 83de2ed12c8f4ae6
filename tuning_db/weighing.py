"""Which of several keys' outcomes of one problem on one board goes first, where revision, toolchain or protocol differ.

The keys come closest first, each with its configurations in order and their times. Three rules:

- A configuration is judged by the closest key that has it: a newer time of it replaces an older one, faster or slower.
- Times of another key are brought to the scale of the closest by the configurations that both have: times the median of
  their ratios. A protocol that keeps the cache warm then doesn't win by that. Without any, they are taken as they are.
- What the closer key has goes first unless the other is faster by more than `MARGIN`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

MARGIN = 0.05
"""By which share less time a less close key must have it. Of pairs of times that one configuration took under two keys,
nine in ten differ by less: `docs/tuning-database.md` has them."""

Times = Mapping[str, float]
"""Of one key: microseconds by configuration, in the order in which they answer."""


def scales(keys: Sequence[Times]) -> list[float]:
    """By what the times of each key are to be multiplied, to compare with those of the first."""
    found: list[float] = []
    for place, times in enumerate(keys):
        scale = 1.0
        for closer, known in zip(found, keys[:place], strict=True):
            ratios = [known[config] * closer / time for config, time in times.items() if config in known]
            if ratios:
                scale = median(ratios)
                break
        found.append(scale)
    return found


def merged(keys: Sequence[Times]) -> Iterator[tuple[int, str]]:
    """Every configuration once, best first, with the place of the key that it is taken from."""
    scale = scales(keys)
    queues: list[deque[str]] = []
    seen: set[str] = set()
    for times in keys:
        queues.append(deque(config for config in times if config not in seen))
        seen.update(times)
    while any(queues):
        first, least = -1, 0.0
        for place, queue in enumerate(queues):
            if queue:
                time = keys[place][queue[0]] * scale[place]
                if first < 0 or time * (1 + MARGIN) < least:
                    first, least = place, time
        yield first, queues[first].popleft()

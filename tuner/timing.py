"""How times are measured on a GPU: the protocol `cold-l2-2`, whose name is part of every measured record's key.

What is timed is one launch whose inputs are not in L2, as in a model, where the weights of the other layers have passed
through the cache since the last time. The device's clock alone is read, between two events on one stream; times are in
microseconds.

Warm-up
    Samples are taken and thrown away for `WARM_UP_S`, so that clocks have risen and code is loaded.
Settling
    A board that reaches its power limit goes on at full clocks until the limiter acts, some tens of milliseconds into
    the load: an H200 (700 W) ran an 8192³ GEMM of fp16 in 2030 µs and from then on in 2330. So after the warm-up
    windows of `WINDOW_S` are sampled until two in a row agree to `STEADY` and the load has lasted `SETTLE_S`; the last
    one counts, those before it don't. Times taken apart can still differ by as much as the limiter does, which is why
    finalists are compared in turns alone, after a load of `ROUNDS_SETTLE_S`.
Long problems (at their roofline no shorter than `REPLAY_BELOW_US`)
    One sample is: flush L2, event, launch, event. The flush keeps the GPU busy while the host queues the rest, so the
    host is never what is timed. An event pair costs 1 to 3 µs by itself, under 3 % here.
Short problems
    An event pair would be a third of a decode GEMM. A CUDA graph of many launches is replayed between two events, and a
    sample is its time divided by the launches. No flush fits in there; instead launches rotate over copies of all
    arrays, so many that `COLD_FACTOR` times the L2 passes before a copy is used again. That is what a model in a CUDA
    graph does, and the gaps between dependent kernels are in the time as they are there. Another replay goes ahead,
    uncounted, so that the host is never waited for. A sample is a mean over one replay: p10 and p90 are of replays, not
    of launches.
Tiny problems
    Where over `MOST_COPIES` copies would be needed, as long problems: their times hold the event pair.
Ops that overwrite an input
    As long problems too: what is overwritten is restored before every flush, which a graph of many launches could not.

Which way is taken depends on problem and device and never on the configuration, so all configurations of a problem
compare. The flush *reads* a buffer: one that writes leaves L2 full of modified lines, which the timed kernel would have
to write back (60 MB on an H200, 14 µs of its bandwidth).

Sampling ends when the median is known to `PRECISION`, at `MAX_SAMPLES`, or when the time budget is spent. A
configuration whose fastest of `GIVE_UP_SAMPLES` samples after the warm-up is above `give_up_above_us` can't win any
more: it is given up, with its times as they are. Finalists are timed in rounds, so that clocks which drift with
temperature drift for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tilewright.tuning_db.record import Times

WARM_UP_S = 0.025
"""A GPU that waited runs at a fraction of its clocks; they rise within some ten milliseconds of load."""

WINDOW_S = 0.04
"""20 launches of an 8192³ GEMM, 40 replays: enough for a median."""

STEADY = 0.01
"""By how much the medians of two windows may differ, relative to them: a step of the limiter is of 5 % or more."""

SETTLE_S = 0.1
"""Load before a configuration's samples may end, warm-up included. The limiter of an H200 was seen to act after 31 ms,
and not yet after 46."""

ROUNDS_SETTLE_S = 0.15
"""The same before finalists': once a problem it may take longer."""

MOST_SETTLE_S = 0.5
"""Then samples count whether steady or not; a launch of 0.2 s has taken that long in its warm-up."""

COLD_FACTOR = 4
"""L2 contents are replaced by reading this many times its size. Caches that replace at random keep e^-4 = 2 %."""

MIN_FLUSH_BYTES = 64 << 20
"""For boards with a few MB of L2: reading it takes 20 to 200 µs, and the host needs some 15 to queue a sample."""

REPLAY_BELOW_US = 100.0

REPLAY_SPAN_US = 1000.0
"""Length of one replay: its own start, of 5 to 10 µs, is then within 1 %."""

MOST_COPIES = 1024

MIN_SAMPLES = 10
MAX_SAMPLES = 200
CHUNK = 5
"""Samples queued at once, between two waits for the GPU."""

PRECISION = 0.003
"""Standard error of the median, relative to it, at which sampling ends: configurations nearer than that are equal."""

BUDGET_S = 0.3
"""For the samples of one configuration, after warm-up."""

GIVE_UP_SAMPLES = 3

CLEARLY_SLOWER = 1.5
"""A configuration this many times slower than the incumbent's median is worth no more samples."""

Sampler = Callable[[int], Sequence[float]]
"""Takes that many samples and returns them, in µs."""

Clock = Callable[[], float]
"""The host's time in seconds, for budgets."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured of one configuration."""

    times: Times
    gave_up: bool = False  # clearly slower than the incumbent: stopped early
    settled: bool = False  # the median is known to `PRECISION`


def flush_bytes(l2_bytes: int) -> int:
    """Size of the buffer whose reading empties L2."""
    return max(MIN_FLUSH_BYTES, COLD_FACTOR * l2_bytes)


def replay_copies(floor_us: float, footprint_bytes: int, l2_bytes: int) -> int | None:
    """Copies of a problem's arrays that replays rotate over, or None for a problem that is timed launch by launch.

    `floor_us` is the problem's roofline on the device, `footprint_bytes` what one launch touches.
    """
    if floor_us >= REPLAY_BELOW_US:
        return None
    copies = 1 + math.ceil(COLD_FACTOR * l2_bytes / footprint_bytes)
    return copies if copies <= MOST_COPIES else None


def replay_launches(estimate_us: float, copies: int) -> int:
    """Launches in one graph: enough for `REPLAY_SPAN_US`, each copy equally often."""
    rounds = math.ceil(REPLAY_SPAN_US / max(estimate_us, 0.1) / copies)
    return copies * max(1, min(rounds, math.ceil(MOST_COPIES / copies)))


def statistics(samples: Sequence[float]) -> Times:
    """Median and deciles, interpolated between order statistics."""
    p10, median, p90 = (float(value) for value in np.quantile(np.asarray(samples, float), (0.1, 0.5, 0.9)))
    return Times(median, p10, p90, len(samples))


def uncertainty(times: Times) -> float:
    """Standard error of the median relative to it."""
    return times.standard_error_us / times.median_us


def time_one(
    sample: Sampler,
    *,
    give_up_above_us: float | None = None,
    budget_s: float = BUDGET_S,
    now: Clock = time.perf_counter,
) -> Timing:
    """Times one configuration.

    Args:
        sample: takes samples.
        give_up_above_us: no time above this is of interest; `CLEARLY_SLOWER` times the incumbent's median.
        budget_s: seconds for the samples; `GIVE_UP_SAMPLES` are taken whatever they cost.
        now: the host's clock.
    """
    begun = now()
    warm_up([sample], now)
    start = now()
    samples = [*sample(GIVE_UP_SAMPLES)]
    if give_up_above_us is not None and min(samples) > give_up_above_us:
        return Timing(statistics(samples), gave_up=True)
    chunk = max(1, min(CHUNK, int(WINDOW_S * GIVE_UP_SAMPLES / max(now() - start, 1e-6))))
    settled_load = _settle(lambda: [sample(chunk)], begun, SETTLE_S, now)
    if settled_load is not None:
        start, (samples,) = settled_load
    while True:
        times = statistics(samples)
        settled = len(samples) >= MIN_SAMPLES and uncertainty(times) <= PRECISION
        if settled or len(samples) >= MAX_SAMPLES or now() - start >= budget_s:
            return Timing(times, settled=settled)
        samples += sample(_chunk(len(samples), start, budget_s, now))


def time_rounds(samplers: Sequence[Sampler], *, now: Clock = time.perf_counter) -> list[Timing]:
    """Times several configurations in turns, one sample each a round; all get the same number of samples.

    Every second round runs backwards, A B C C B A: a steady drift then falls on all of them alike. The budget is
    `BUDGET_S` for each configuration, for all together.
    """
    if not samplers:
        return []
    budget = BUDGET_S * len(samplers)
    begun = now()
    warm_up(samplers, now)
    order = list(range(len(samplers)))

    def take_turns() -> list[Sequence[float]]:
        taken = {index: samplers[index](1) for index in order}
        order.reverse()
        return [taken[index] for index in range(len(samplers))]

    start, samples = _settle(take_turns, begun, ROUNDS_SETTLE_S, now) or (now(), [[] for _ in samplers])
    while True:
        if len(samples[0]) >= GIVE_UP_SAMPLES:
            all_times = [statistics(each) for each in samples]
            enough = len(samples[0]) >= MIN_SAMPLES
            settled = [enough and uncertainty(times) <= PRECISION for times in all_times]
            if all(settled) or len(samples[0]) >= MAX_SAMPLES or now() - start >= budget:
                return [Timing(times, settled=one) for times, one in zip(all_times, settled, strict=True)]
        for each, more in zip(samples, take_turns(), strict=True):
            each += more


def _settle(
    take: Callable[[], Sequence[Sequence[float]]], begun: float, least_s: float, now: Clock
) -> tuple[float, list[list[float]]] | None:
    """Loads the GPU until it is steady: when the last window began, and its samples. None if the load that `begun` has
    lasted so long already that nothing is gained."""
    if now() - begun >= MOST_SETTLE_S:
        return None
    before: list[float] | None = None
    while True:
        start = now()
        window = [[*each] for each in take()]
        while now() - start < WINDOW_S and len(window[0]) < MAX_SAMPLES:
            for each, more in zip(window, take(), strict=True):
                each += more
        medians = [statistics(each).median_us for each in window]
        agree = before is not None and all(
            abs(one - other) <= STEADY * other for one, other in zip(medians, before, strict=True)
        )
        load_s = now() - begun
        if (agree and load_s >= least_s) or load_s >= MOST_SETTLE_S:
            return start, window
        before = medians


def warm_up(samplers: Sequence[Sampler], now: Clock = time.perf_counter) -> None:
    """Takes samples and drops them until the GPU has been busy for `WARM_UP_S`, and each sampler ran once."""
    start, count = now(), 1
    while True:
        for sample in samplers:
            sample(count)
        if now() - start >= WARM_UP_S:
            return
        count = min(2 * count, CHUNK)


def _chunk(taken: int, start: float, budget_s: float, now: Clock) -> int:
    """How many samples to take next: never so many that the budget is overrun by more than one."""
    spent = now() - start
    affordable = int((budget_s - spent) / (spent / taken)) if spent > 0 else CHUNK
    next_look = MIN_SAMPLES if taken < MIN_SAMPLES else MAX_SAMPLES
    return max(1, min(CHUNK, next_look - taken, affordable))

"""The timing protocol on a simulated GPU: kernels whose times have noise, drift and outliers, and a clock that they
move."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from tilewright.kernels.lookup import TIMING_PROTOCOL
from tilewright.tuner import timing
from tilewright.tuner.timing import (
    BUDGET_S,
    CHUNK,
    COLD_FACTOR,
    GIVE_UP_SAMPLES,
    MAX_SAMPLES,
    MIN_SAMPLES,
    MOST_COPIES,
    PRECISION,
    Sampler,
    flush_bytes,
    replay_copies,
    replay_launches,
    statistics,
    time_one,
    time_rounds,
    uncertainty,
)
from tilewright.tuning_db.record import Times

MIB = 1 << 20


class Simulation:
    """A GPU whose kernels take the time that a function says, `overhead_us` more for the host's clock (the flush)."""

    def __init__(self, seed: int = 0, overhead_us: float = 50.0) -> None:
        self.seconds = 0.0
        self.random = np.random.default_rng(seed)
        self.order: list[str] = []
        self.overhead_us = overhead_us

    def now(self) -> float:
        return self.seconds

    def kernel(self, time_us: float | Callable[[float], float], noise: float = 0.0, name: str = "") -> Sampler:
        """A kernel of that time, constant or by the clock, with relative normal noise."""

        def sample(count: int) -> list[float]:
            taken = []
            for _ in range(count):
                base = time_us(self.seconds) if callable(time_us) else time_us
                taken.append(base * (1 + noise * float(self.random.standard_normal())))
                self.seconds += (taken[-1] + self.overhead_us) * 1e-6
                self.order.append(name)
            return taken

        return sample


def test_the_protocol_is_the_one_that_records_are_kept_under() -> None:
    assert timing.__doc__ is not None
    assert f"protocol `{TIMING_PROTOCOL}`" in timing.__doc__


# Statistics


def test_statistics_of_known_samples() -> None:
    assert statistics([float(value) for value in range(101)]) == Times(50.0, 10.0, 90.0, 101)
    assert statistics([7.0]) == Times(7.0, 7.0, 7.0, 1)
    assert statistics([1.0, 2.0]).median_us == 1.5


def test_outliers_move_neither_median_nor_deciles() -> None:
    random = np.random.default_rng(0)
    samples = list(100 + random.standard_normal(100))
    spoiled = [*samples[:95], *(10_000.0,) * 5]
    clean, dirty = statistics(samples), statistics(spoiled)
    assert dirty.median_us == pytest.approx(clean.median_us, rel=0.003)
    assert dirty.p90_us == pytest.approx(clean.p90_us, rel=0.01)


@pytest.mark.parametrize("count", [3, 4, 6, 10, 40, 160])
def test_uncertainty_is_the_scatter_of_medians(count: int) -> None:
    random = np.random.default_rng(1)
    trials = [statistics(list(50 * (1 + 0.02 * random.standard_normal(count)))) for _ in range(2000)]
    scatter = float(np.std([times.median_us for times in trials])) / 50
    stated = float(np.mean([uncertainty(times) for times in trials]))
    assert stated == pytest.approx(scatter, rel=0.15)


# One configuration


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.01, 0.03])
@pytest.mark.parametrize("time_us", [3.0, 80.0, 5000.0])
def test_the_median_is_right_within_its_stated_spread(time_us: float, noise: float) -> None:
    for seed in range(10):
        gpu = Simulation(seed)
        found = time_one(gpu.kernel(time_us, noise), now=gpu.now)
        assert found.times.median_us == pytest.approx(time_us, rel=max(1e-12, 5 * uncertainty(found.times) + 1e-9))
        assert found.times.p10_us <= found.times.median_us <= found.times.p90_us
        assert not found.gave_up


def test_a_quiet_kernel_takes_the_fewest_samples_and_a_noisy_one_more() -> None:
    quiet, noisy = Simulation(), Simulation()
    one, other = time_one(quiet.kernel(4000, 0.001), now=quiet.now), time_one(noisy.kernel(4000, 0.012), now=noisy.now)
    assert one.settled
    assert one.times.samples == MIN_SAMPLES
    assert other.settled
    assert MIN_SAMPLES < other.times.samples < MAX_SAMPLES
    assert uncertainty(other.times) <= PRECISION


def test_what_never_settles_ends_at_the_most_samples_and_says_so() -> None:
    gpu = Simulation()
    found = time_one(gpu.kernel(40, 0.3), now=gpu.now, budget_s=10)
    assert found.times.samples == MAX_SAMPLES
    assert not found.settled


def test_the_first_samples_of_an_idle_gpu_are_not_counted() -> None:
    gpu = Simulation()
    found = time_one(gpu.kernel(lambda now: 500.0 if now < 0.02 else 100.0), now=gpu.now)
    assert (found.times.p10_us, found.times.median_us, found.times.p90_us) == (100.0, 100.0, 100.0)


def limited(after_s: float, busy_us: float = 2330.0) -> Callable[[float], float]:
    """An 8192³ GEMM on an H200 whose power limiter acts so long after the beginning of the load."""
    return lambda now: 2030.0 if now < after_s else busy_us


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03, 0.045, 0.06, 0.08])
def test_times_are_those_under_a_load_that_lasts_whenever_the_limiter_acts(after_s: float) -> None:
    gpu, turns = Simulation(), Simulation()
    found = time_one(gpu.kernel(limited(after_s), 0.002), now=gpu.now)
    both = time_rounds([turns.kernel(limited(after_s + 0.05), 0.002) for _ in range(2)], now=turns.now)
    for each in (found, *both):
        assert each.settled
        assert each.times.median_us == pytest.approx(2330, rel=0.005)
        assert each.times.p90_us - each.times.p10_us < 30


def test_settling_costs_two_windows_and_no_more_than_its_most() -> None:
    steady, restless = Simulation(), Simulation()
    time_one(steady.kernel(1000, 0.001), now=steady.now)
    assert timing.SETTLE_S <= steady.seconds <= timing.SETTLE_S + 0.02
    drifting = time_one(restless.kernel(lambda now: 1000 * (1 + 2 * now), 0.001), now=restless.now)
    assert timing.MOST_SETTLE_S <= restless.seconds <= timing.MOST_SETTLE_S + timing.WINDOW_S + BUDGET_S + 0.02
    assert drifting.times.samples >= MIN_SAMPLES


def test_what_is_given_up_does_not_settle_first() -> None:
    gpu = Simulation()
    assert time_one(gpu.kernel(4000, 0.001), now=gpu.now, give_up_above_us=3000).gave_up
    assert gpu.seconds < timing.WARM_UP_S + 8 * 4.1e-3


@pytest.mark.parametrize("time_us", [50.0, 20_000.0, 400_000.0])
def test_the_budget_is_respected(time_us: float) -> None:
    gpu = Simulation()
    warm = Simulation()
    timing.warm_up([warm.kernel(time_us, 0.3)], warm.now)
    found = time_one(gpu.kernel(time_us, 0.3), now=gpu.now)
    # What is taken whatever it costs, or the budget and one chunk's misjudgement of it.
    allowed = max(GIVE_UP_SAMPLES * time_us * 2e-6, BUDGET_S + CHUNK * time_us * 1e-6)
    assert gpu.seconds - warm.seconds <= timing.MOST_SETTLE_S + timing.WINDOW_S + allowed
    assert found.times.samples >= GIVE_UP_SAMPLES


# Early stop


def test_a_clearly_slower_configuration_is_given_up_with_its_real_times() -> None:
    gpu = Simulation()
    found = time_one(gpu.kernel(160, 0.01), now=gpu.now, give_up_above_us=150)
    assert found.gave_up
    assert found.times.samples == GIVE_UP_SAMPLES
    assert found.times.median_us == pytest.approx(160, rel=0.03)


@pytest.mark.parametrize("time_us", [100.0, 149.0])
def test_what_may_still_win_is_not_given_up(time_us: float) -> None:
    gpu = Simulation()
    found = time_one(gpu.kernel(time_us, 0.001), now=gpu.now, give_up_above_us=150)
    assert not found.gave_up
    assert found.times.samples >= MIN_SAMPLES


def test_a_few_slow_samples_do_not_give_up_a_fast_configuration() -> None:
    gpu = Simulation()
    slow = itertools.cycle([1.0, 8.0, 8.0])
    found = time_one(gpu.kernel(lambda _: 100 * next(slow)), now=gpu.now, give_up_above_us=150, budget_s=0.05)
    assert not found.gave_up


# In turns


def test_rounds_visit_everyone_and_turn_back() -> None:
    gpu = Simulation(overhead_us=30_000)  # warm-up is over after one visit
    time_rounds([gpu.kernel(10, name=name) for name in "ABC"], now=gpu.now)
    assert "".join(gpu.order).startswith("ABC" + "ABCCBAABCCBA")
    # In the load's 0.15 s one round of warm-up, one that doesn't count, and one that agrees with it, and counts.
    assert len(gpu.order) == 3 + 3 + 3 * MIN_SAMPLES


def test_a_drift_falls_on_all_alike_in_rounds_and_not_one_after_the_other() -> None:
    def drifting(factor: float) -> Callable[[float], float]:
        return lambda now: factor * 100 * (1 + 0.5 * now)  # 5 % in 100 ms

    gpu = Simulation(overhead_us=1000)
    rounds = time_rounds([gpu.kernel(drifting(factor), 0.001) for factor in (1.0, 1.01, 1.0)], now=gpu.now)
    first, second, third = (found.times.median_us for found in rounds)
    assert second / first == pytest.approx(1.01, abs=0.003)
    assert third / first == pytest.approx(1.0, abs=0.003)
    gpu = Simulation(overhead_us=1000)
    apart = [time_one(gpu.kernel(drifting(factor), 0.001), now=gpu.now) for factor in (1.0, 1.0)]
    assert apart[1].times.median_us / apart[0].times.median_us > 1.01


def test_rounds_take_equally_many_samples_and_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.05)
    gpu = Simulation()
    found = time_rounds([gpu.kernel(2000, 0.2), gpu.kernel(2000, 0.0)], now=gpu.now)
    assert found[0].times.samples == found[1].times.samples
    assert not found[0].settled
    assert found[1].settled
    assert gpu.seconds < timing.MOST_SETTLE_S + timing.WINDOW_S + 0.1 + 8 * CHUNK * 2.1e-3
    assert time_rounds([]) == []


@pytest.mark.parametrize(("time_us", "noise", "samples"), [(100_000, 0.01, 3), (50_000, 0.01, 6), (1000, 0.004, 10)])
def test_the_best_of_four_rarely_beats_a_default_that_is_as_fast(time_us: float, noise: float, samples: int) -> None:
    """In at most about 5 % of all comparisons, whatever ends the sampling: a budget that is spent, or the precision."""
    gpu = Simulation()
    beaten, runs, counts = 0, 300, []
    for _ in range(runs):
        default, *others = (
            found.times for found in time_rounds([gpu.kernel(time_us, noise) for _ in range(5)], now=gpu.now)
        )
        beaten += min(others, key=lambda times: times.median_us).beats(default)
        counts.append(default.samples)
    assert np.median(counts) == samples
    assert beaten / runs < 0.08


def test_one_seed_gives_one_result() -> None:
    def run() -> list[timing.Timing]:
        gpu = Simulation(7)
        samplers = [gpu.kernel(90, 0.02), gpu.kernel(95, 0.02)]
        return [time_one(samplers[0], now=gpu.now), *time_rounds(samplers, now=gpu.now)]

    assert run() == run()


# Cold caches


@pytest.mark.parametrize(("l2_mib", "wanted_mib"), [(4, 64), (6, 64), (40, 160), (60, 240), (96, 384)])
def test_the_flush_is_four_times_l2_and_never_too_short_for_the_host(l2_mib: int, wanted_mib: int) -> None:
    assert flush_bytes(l2_mib * MIB) == wanted_mib * MIB


@pytest.mark.parametrize("footprint_mib", [0.3, 1, 33, 59, 240, 400])
def test_four_times_l2_passes_between_two_uses_of_a_copy(footprint_mib: float) -> None:
    footprint, l2 = int(footprint_mib * MIB), 60 * MIB
    copies = replay_copies(20.0, footprint, l2)
    assert copies is not None
    assert (copies - 1) * footprint >= COLD_FACTOR * l2 > (copies - 2) * footprint
    for estimate in (2.0, 30.0, 3000.0):
        launches = replay_launches(estimate, copies)
        assert launches % copies == 0
        assert launches * estimate >= timing.REPLAY_SPAN_US or launches >= MOST_COPIES
        assert launches <= 2 * MOST_COPIES


def test_long_and_tiny_problems_are_timed_launch_by_launch() -> None:
    assert replay_copies(timing.REPLAY_BELOW_US, 500 * MIB, 60 * MIB) is None
    assert replay_copies(1.0, 1024, 60 * MIB) is None

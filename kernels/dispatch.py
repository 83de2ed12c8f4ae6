"""From a problem to a plan that runs it: lookup, compile, load, each once per problem and device."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import replace
from typing import Any

from tilewright.kernels.call_log import note
from tilewright.kernels.compile import Binary
from tilewright.kernels.device import Device
from tilewright.kernels.devices import catalogue_device
from tilewright.kernels.kernel import Kernel, Launch
from tilewright.kernels.live import live_devices
from tilewright.kernels.lookup import LIGHTER, Choice, candidates, default_config, pack_for
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.runtime import GpuPlan, InterpretedPlan, Plan
from tilewright.tuning_db import env
from tilewright.tuning_db.errors import (
    CompileError,
    LaunchError,
    MissingDependencyError,
    NotPackedError,
    UnsupportedError,
)

INTERPRETED_BOARD = "a100"
"""Whose limits hold in the interpreter, which has none: the oldest arch with every kernel's data types but fp8e4m3."""

MOST_PLANS = 65536
"""Plans that are kept; a program with more (every shape new) makes them again rather than grow for ever. Their code is
kept whatever happens: it is that of few specialisations."""

# Guards the first preparation of each plan; a warm call never takes it.
_lock = threading.Lock()
_plans: dict[tuple[Any, ...], tuple[Plan, Choice]] = {}
_call_caches: list[dict[tuple[Any, ...], Any]] = []


def _begin_anew() -> None:
    """In a child that was forked: a thread that prepares a plan is not there, and would hold the lock for ever."""
    global _lock
    _lock = threading.Lock()


# The locks of `runtime` are of a GPU, which no forked child can use once its parent has.
os.register_at_fork(after_in_child=_begin_anew)


Constants = tuple[tuple[str, float], ...]
"""Constexprs by name that a caller chooses and no problem holds: see `Launch.with_constants`."""


def plan_for(
    kernel: Kernel[Any, Any],
    problem: Problem,
    ordinal: int,
    *,
    config: Config | None = None,
    constants: Constants = (),
) -> tuple[Plan, Choice]:
    """A plan ready to run on GPU `ordinal` (-1: in the interpreter), and the choice behind it.

    Raises:
        UnsupportedError, IllegalConfigError: nothing can run the problem there, or not this configuration.
        CompileError, LaunchError: the compiler or the driver refused the caller's configuration, or the default.
        PackError: the pack of this process can't be used, or lacks the problem where all must come from it.
    """
    key = (kernel.name, problem, ordinal, config, constants)
    ready = _plans.get(key)
    if ready is None:
        with _lock:
            ready = _plans.get(key)
            if ready is None:
                if len(_plans) >= MOST_PLANS:
                    _plans.clear()
                ready = _plans[key] = _prepare(kernel, problem, ordinal, config, constants)
                note(problem, ordinal, ready[1], named=config is not None)
    return ready


def forget_plans() -> None:
    """Drop every plan, so that the next call of each problem asks the database again: when another process has tuned.
    Captured CUDA graphs keep what they have."""
    with _lock:
        _plans.clear()
        for cache in _call_caches:
            cache.clear()


def call_cache() -> dict[tuple[Any, ...], Any]:
    """An empty dict for an op's prepared calls, which hold plans: `forget_plans` empties it too."""
    _call_caches.append({})
    return _call_caches[-1]


def _prepare(
    kernel: Kernel[Any, Any], problem: Problem, ordinal: int, config: Config | None, constants: Constants
) -> tuple[Plan, Choice]:
    if ordinal < 0:
        return _interpreted(kernel, problem, config, constants)
    device = _device(ordinal)
    refused: Exception | None = None
    for choice in candidates(kernel, problem, device, config=config):
        try:
            launches = _with(kernel.launches(problem, choice.config), constants)
            binaries = _packed(kernel, problem, device, choice, launches, constants)
            return GpuPlan(launches, device, ordinal, binaries, lasting=True), choice
        except (UnsupportedError, CompileError, LaunchError) as error:
            # A guess whose real code spills, doesn't compile or doesn't load: the next one. Of what is lighter than the
            # default nobody needs to hear.
            refused = refused if refused is not None and choice.reason == LIGHTER else error
    assert refused is not None
    raise refused


def _packed(
    kernel: Kernel[Any, Any],
    problem: Problem,
    device: Device,
    choice: Choice,
    launches: tuple[Launch, ...],
    constants: Constants,
) -> tuple[Binary, ...] | None:
    """The compiled kernels of the launches, if this process has a pack that has them all."""
    pack = pack_for(kernel, device)
    if pack is None:
        return None
    binaries = pack.binaries(launches)
    if binaries is None and env.frozen():
        numbers = "".join(f", {name.lower()}={value!r}" for name, value in constants)
        raise NotPackedError(
            f'{pack.path} lacks the kernel of {kernel.name} "{problem}" with {choice.config}{numbers}, and '
            f"{env.FROZEN} is set: make the pack again, with --constant for numbers other than the defaults, or call "
            "without `config`"
        )
    return binaries


def _interpreted(
    kernel: Kernel[Any, Any], problem: Problem, config: Config | None, constants: Constants
) -> tuple[Plan, Choice]:
    board = catalogue_device(INTERPRETED_BOARD)
    device = replace(board, board=f"{board.board}, whose limits the interpreter has")  # in messages
    if config is None:
        config = default_config(kernel, problem, device)
    else:
        kernel.space.check(problem, config, device)
    return InterpretedPlan(_with(kernel.launches(problem, config), constants)), Choice(config, None, "interpreted")


def _with(launches: tuple[Launch, ...], constants: Constants) -> tuple[Launch, ...]:
    return tuple(launch.with_constants(constants) for launch in launches) if constants else launches


@functools.cache
def _device(ordinal: int) -> Device:
    for device in live_devices():
        if device.live == f"cuda:{ordinal}":
            return device
    raise MissingDependencyError(f"cuda:{ordinal} is not among the GPUs found: {live_devices() or 'none'}")

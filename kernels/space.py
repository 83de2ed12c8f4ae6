"""`Space`: the axes of a configuration, and what fits."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tilewright.kernels.device import (
    MAX_GRID_X,
    MAX_GRID_Y,
    MAX_WARPS_PER_BLOCK,
    Device,
    registers_allowed,
)
from tilewright.kernels.problem import Config, Problem, field_types
from tilewright.tuning_db.errors import IllegalConfigError

P = TypeVar("P", bound=Problem)
C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Space(Generic[P, C]):
    """The axes of a `Config`, and the rules that cut the Cartesian product down.

    `fits` names the limit of problem or device that a configuration breaks, or gives None: what it refuses can't run.
    `useful` names why a configuration that could run isn't worth trying (it repeats another one, or computes mostly
    padding), or gives None: a configuration the caller names is never held to it.
    """

    config: type[C]
    axes: Mapping[str, tuple[Any, ...]]
    fits: Callable[[P, C, Device], str | None]
    useful: Callable[[P, C, Device], str | None]
    # Fewer values of some axes, for a program that waits for its first call: a tenth of the combinations, or less.
    coarse: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    # The axes on which a problem and a device leave values useless whatever the others are: it saves most of the
    # combinations a look, and never a useful one.
    narrow: Callable[[P, Device, Mapping[str, tuple[Any, ...]]], Mapping[str, tuple[Any, ...]]] | None = None

    def product(self, *, coarse: bool = False) -> Iterator[C]:
        """Every combination of the axes, in a fixed order."""
        yield from self._combinations({**self.axes, **self.coarse} if coarse else self.axes)

    def _combinations(self, axes: Mapping[str, tuple[Any, ...]]) -> Iterator[C]:
        for values in itertools.product(*axes.values()):
            yield self.config(**dict(zip(axes, values, strict=True)))

    def configs(self, problem: P, device: Device, *, coarse: bool = False) -> list[C]:
        """The configurations worth trying for a problem on a device, in a fixed order."""
        axes = {**self.axes, **self.coarse} if coarse else dict(self.axes)
        if self.narrow is not None:
            axes.update(self.narrow(problem, device, axes))
        return [
            config
            for config in self._combinations(axes)
            if self.useful(problem, config, device) is None and self.fits(problem, config, device) is None
        ]

    def check(self, problem: P, config: C, device: Device) -> None:
        """Does nothing for a configuration that fits.

        Raises:
            IllegalConfigError: it doesn't; the message names the limit.
        """
        if not isinstance(config, self.config):
            raise IllegalConfigError(f"{config!r} is no {self.config.__name__}")
        limit = self.fits(problem, config, device)
        if limit is not None:
            raise IllegalConfigError(f"{config} does not fit {problem} on {device.board}: {limit}")


# What `fits` of every op looks at, beside the op's own limits.


def malformed(config: Config, powers_of_two: Collection[str]) -> str | None:
    """None, or which field is no flag, no integer of at least 1, or none of the powers of two that it has to be."""
    for name, is_flag in _flags(type(config)):  # type: ignore[arg-type]  # a class is hashable
        value = getattr(config, name)
        if is_flag:
            if value is not True and value is not False:
                return f"{name}={value!r} must be true or false"
        elif value.__class__ is not int or value < 1:
            return f"{name}={value!r} must be an integer of at least 1"
    for name in powers_of_two:
        value = getattr(config, name)
        if value & (value - 1):
            return f"{name}={value} must be a power of two"
    if config.num_warps > MAX_WARPS_PER_BLOCK:
        return f"num_warps={config.num_warps} is over the {MAX_WARPS_PER_BLOCK} of a block"
    return None


@functools.cache
def _flags(cls: type[Config]) -> tuple[tuple[str, bool], ...]:
    """Every field, and whether it is a flag."""
    return tuple((name, bool in kinds) for name, kinds in field_types(cls).items())  # type: ignore[arg-type]


def over_block(config: Config, device: Device, *, held: float, shared_bytes: int) -> str | None:
    """None, or which limit of a block is broken by the sums (of a kernel without dots: elements) that each of its
    threads holds, or by its shared memory."""
    allowed = registers_allowed(config.num_warps)
    if held > allowed:
        return f"{held:.0f} registers a thread for its part of the tile are over the {allowed} it can have"
    most = device.shared_per_block
    if shared_bytes > most:
        return f"{shared_bytes} B of shared memory are over the {most} B a block of {device.sm} can have"
    return None


def over_grid(blocks: int, **splits: int) -> str | None:
    """None, or which limit of a grid so many blocks break, or the splits that each of them is of, given by name."""
    for name, count in splits.items():
        if count > MAX_GRID_Y:
            return f"{name}={count} is over the grid's {MAX_GRID_Y}"
    if blocks > MAX_GRID_X:
        return f"{blocks} tiles are over the grid's {MAX_GRID_X}"
    return None


# What `useful` of several ops looks at.

NOTHING_COPIED = "without cp.async (sm_80, 4-byte loads) more than 1 stage changes nothing: the code is the same"


def widest_block(size: int, smallest: int = 1) -> int:
    """The widest block over a size that is not mostly padding: the least power of two that is no smaller."""
    return max(smallest, 1 << (size - 1).bit_length())


def mostly_padding(*blocks: tuple[int, int, int]) -> str | None:
    """None, or which of some blocks, each given with the size it goes over and the smallest block there is, is too
    wide."""
    for block, size, smallest in blocks:
        if block > widest_block(size, smallest):
            return f"a block of {block} over a size of {size} is mostly padding"
    return None


def repeated_group(name: str, group: int, groups: Collection[int], count: int, what: str) -> str | None:
    """None, or that a group of an axis is as good as a smaller one, for both have room for all `count` there are."""
    if any(count <= smaller < group for smaller in groups):
        return f"{name}={group} repeats a smaller one with {count} {what}"
    return None


def needless_split(name: str, split: int, tiles: int, device: Device, waves: int) -> str | None:
    """None, or that half as many splits keep the device busy for as many waves of tiles: they leave half the partial
    results to write and read."""
    if split > 1 and tiles * (split // 2) >= waves * device.sms:
        return f"{tiles} tiles fill {device.sms} SMs with half of {name}={split}"
    return None

"""`Space`: the axes of a configuration, and what fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tilewright.kernels.device import Device
from tilewright.kernels.problem import Config, Problem
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
        limit = self.fits(problem, config, device)
        if limit is not None:
            raise IllegalConfigError(f"{config} does not fit {problem} on {device.board}: {limit}")

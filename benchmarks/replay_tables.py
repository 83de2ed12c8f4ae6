"""Replayed search spaces: measured tables in the format of `benchmarks/replay/README.md`."""

from __future__ import annotations

import json
from dataclasses import dataclass, make_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.tuning_db.errors import UsageError

SHIPPED = Path(__file__).with_name("replay")

CHIPS = {"RTX_2080_Ti": "TU102", "RTX_Titan": "TU102"}
"""Chips of GPUs that share one: what was learned on one of them is no test of learning from another."""


@dataclass(frozen=True)
class Table:
    """One kernel's exhaustive measurement on one GPU."""

    name: str
    axes: dict[str, tuple[Any, ...]]
    indices: np.ndarray[Any, Any]  # of (configurations, axes)
    times: np.ndarray[Any, Any]  # ms, of (configurations); NaN where one failed
    repeats: np.ndarray[Any, Any]  # ms, of (configurations, repeats), padded with NaN

    @property
    def kernel(self) -> str:
        """What was measured: tables of one kernel have the same axes."""
        return self.name.rpartition("__")[0] or self.name

    @property
    def gpu(self) -> str:
        """Where it was measured."""
        return self.name.rpartition("__")[2]

    @property
    def chip(self) -> str:
        """The GPU's chip, where another GPU has it too."""
        return CHIPS.get(self.gpu, self.gpu)

    @property
    def best(self) -> float:
        """The least time, in ms."""
        return float(np.nanmin(self.times))

    @cached_property
    def configs(self) -> list[Any]:
        """Every configuration as a frozen object with a field for each axis."""
        kind = make_dataclass("ReplayedConfig", list(self.axes), frozen=True, slots=True)
        values = list(self.axes.values())
        return [kind(*(values[axis][place] for axis, place in enumerate(row))) for row in self.indices.tolist()]

    def fraction(self, row: int) -> float:
        """Of the optimum that a configuration reaches: least time over its own, 0 for a failure."""
        return float(np.nan_to_num(self.best / self.times[row]))


def load(path: Path) -> Table:
    """The table of a file.

    Raises:
        UsageError: it can't be read, or is no such table; the message says what is wrong.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("X", "names", "dom", "time", "times")}
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is no replayed space: {error}") from None
    names = [str(name) for name in arrays["names"]]
    try:
        values = json.loads(str(arrays["dom"]))
        domains = [tuple(values[name]) for name in names] if isinstance(values, dict) else [tuple(v) for v in values]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: the values of its parameters can't be read: {error}") from None
    indices, times = np.asarray(arrays["X"], dtype=int), np.asarray(arrays["time"], dtype=float)
    sizes = np.array([len(domain) for domain in domains])
    if (
        indices.shape != (len(times), len(names))
        or len(domains) != len(names)
        or (indices < 0).any()
        or (indices >= sizes).any()
    ):
        raise UsageError(f"{path}: X of shape {indices.shape} doesn't go with {len(names)} parameters of sizes {sizes}")
    if len(np.unique(indices, axis=0)) != len(indices):
        raise UsageError(f"{path} has a configuration twice")
    if not (times > 0).any():
        raise UsageError(f"{path} has no configuration that worked")
    repeats = np.asarray(arrays["times"], dtype=float)
    return Table(path.stem, dict(zip(names, domains, strict=True)), indices, times, repeats)


def shipped() -> list[Path]:
    """The files that come with the project."""
    return sorted(SHIPPED.glob("*.npz"))

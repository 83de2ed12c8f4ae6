"""Replayed search spaces: measured tables in the format of `benchmarks/replay/README.md`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from functools import cached_property
from keyword import iskeyword
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np

from tilewright.tuning_db.errors import UsageError

SHIPPED = Path(__file__).with_name("replay")

ARRAYS = ("X", "names", "dom", "time", "times")

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
    arrays = read_arrays(path, ARRAYS)
    names = [str(name) for name in arrays["names"].ravel()]
    domains = _domains(path, names, str(arrays["dom"]))
    indices, times, repeats = arrays["X"], arrays["time"], arrays["times"]
    sizes = [len(domain) for domain in domains]
    if indices.dtype.kind not in "iu":
        raise UsageError(f"{path}: X must hold indices; it holds {indices.dtype}")
    if indices.shape != (len(times.ravel()), len(names)) or (indices < 0).any() or (indices >= np.array(sizes)).any():
        raise UsageError(
            f"{path}: X of shape {indices.shape} doesn't go with {times.size} times and parameters of {sizes} values"
        )
    if len(np.unique(indices, axis=0)) != len(indices):
        raise UsageError(f"{path} has a configuration twice")
    try:
        times, repeats = times.astype(float), repeats.astype(float)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: times must be numbers: {error}") from None
    if times.ndim != 1 or repeats.ndim != 2 or len(repeats) != len(times):
        raise UsageError(f"{path}: times of shape {repeats.shape} doesn't go with time of shape {times.shape}")
    for name, values in (("time", times), ("times", repeats)):
        wrong = values[~(np.isnan(values) | ((values > 0) & np.isfinite(values)))]
        if len(wrong):
            raise UsageError(f"{path}: {name} must be above 0, or NaN for a failure; it has {wrong[0]}")
    if np.isnan(times).all():
        raise UsageError(f"{path} has no configuration that worked")
    return Table(path.stem, dict(zip(names, domains, strict=True)), indices.astype(int), times, repeats)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of these names in a file; it may have more.

    Raises:
        UsageError: it can't be read, or lacks one.
    """
    try:
        with path.open("rb") as stream:
            if not is_zipfile(stream):
                raise UsageError(f"{path} is no replayed space: it is no .npz archive, or a truncated one")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                if missing := [name for name in names if name not in file]:
                    raise UsageError(f"{path} is no replayed space: it lacks {', '.join(missing)}")
                return {name: file[name] for name in names}
    except UsageError:
        raise
    except (OSError, EOFError, ValueError, BadZipFile, zlib.error) as error:  # most of them of damaged files
        raise UsageError(f"{path} is no replayed space: {error}") from None


def _domains(path: Path, names: list[str], text: str) -> list[tuple[Any, ...]]:
    """The values of each parameter, which have to be the fields of a configuration."""
    for name in names:
        if not name.isidentifier() or iskeyword(name) or names.count(name) > 1:
            raise UsageError(f"{path}: parameter {name!r} must be an identifier of its own among {', '.join(names)}")
    try:
        found = json.loads(text)
        values = [found[name] for name in names] if isinstance(found, dict) else list(found)
        repeated = [each for each in values if not isinstance(each, list) or len(set(each)) != len(each)]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: the values of its parameters can't be read: {error!r}") from None
    if repeated or len(values) != len(names):
        raise UsageError(f"{path}: dom must list different values for each of {', '.join(names)}; it is {text:.200}")
    return [tuple(each) for each in values]


def shipped() -> list[Path]:
    """The files that come with the project."""
    return sorted(SHIPPED.glob("*.npz"))

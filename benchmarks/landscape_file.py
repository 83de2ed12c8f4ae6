"""Files of measured landscapes: what `benchmarks.landscape` writes, as `docs/landscapes.md` describes it.

A landscape is a replayed space (`benchmarks.replay_tables` reads it as one) with what is needed besides to go on
measuring, and to predict its times again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay_tables import ARRAYS, read_arrays
from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.gpu_runner import Effort
from tilewright.tuner.runner import Outcome
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import ProblemError, UnknownKernelError, UsageError
from tilewright.tuning_db.record import Key, Resources, Status, Times, canonical_json

SHIPPED = Path(__file__).with_name("landscapes")

VERSION = 1
MESSAGE_LENGTH = 200
US_PER_MS = 1000.0

RESOURCES = tuple(each.name for each in fields(Resources))
TEXTS = ("workload", "key", "board", "space", "effort", "environments")
NUMBERS = ("version", "seed", "size")
COLUMNS = ("status", "message", "samples", *RESOURCES, "predicted_us", "compiled_us", "place", "first")


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one configuration."""

    outcome: Outcome
    predicted_us: float  # from estimated resources, before it was compiled; NaN of one that the space doesn't list
    place: int  # in the random order of the whole list; behind all of it for one that isn't listed
    first: bool  # ahead of its turn: it is the default, was named, or is among the best predicted


@dataclass
class Landscape:
    """Configurations of one problem, measured on one GPU.

    `key` says of what code, problem, board and toolchain the times are; `space` which revision of the kernel's space
    and prediction listed the configurations, `size` how many there are. They are tried in the order of `seed`.
    """

    workload: str
    key: Key
    device: Device
    space: str
    effort: Effort
    seed: int
    size: int
    environments: list[dict[str, Any]]  # one of each run
    rows: dict[Config, Row] = field(default_factory=dict)

    @property
    def kernel(self) -> Kernel[Any, Any]:
        """The op."""
        return find_kernel(self.key.op)

    @property
    def problem(self) -> Problem:
        """What was computed."""
        problem: Problem = self.kernel.problem.from_json(self.key.problem)
        return problem

    @property
    def times_us(self) -> dict[Config, float]:
        """The configurations that worked, with their medians."""
        return {config: row.outcome.times.median_us for config, row in self.rows.items() if row.outcome.times}

    @property
    def best_us(self) -> float | None:
        """The least median; None as long as nothing worked."""
        return min(self.times_us.values(), default=None)

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The values of each field: the space's, and those that a default off the space's axes has."""
        return {
            name: tuple(dict.fromkeys((*values, *(getattr(config, name) for config in self.rows))))
            for name, values in self.kernel.space.axes.items()
        }

    def objection(self, other: Landscape) -> str | None:
        """None, or why what was measured for the other does not belong here."""
        for name in ("op", "problem", "device", "kernel_hash", "triton", "ptxas", "protocol"):
            mine, its = getattr(self.key, name), getattr(other.key, name)
            if mine != its:
                return f"its {name} is {its:.200}, and {mine:.200} is to be measured"
        for name in ("space", "effort", "seed"):
            mine, its = getattr(self, name), getattr(other, name)
            if mine != its:
                return f"its {name} is {its}, and {mine} is to be measured"
        return None

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all.

        Raises:
            UsageError: it can't be written.
        """
        axes = self.axes()
        places = {name: {value: at for at, value in enumerate(values)} for name, values in axes.items()}
        rows = list(self.rows.values())
        outcomes = [row.outcome for row in rows]
        deciles = [
            (each.times.p10_us, each.times.median_us, each.times.p90_us) if each.times else (np.nan,) * 3
            for each in outcomes
        ]
        times = np.array(deciles, float).reshape(len(rows), 3) / US_PER_MS
        arrays: dict[str, Any] = {
            "X": np.array(
                [[places[name][getattr(config, name)] for name in axes] for config in self.rows], np.int16
            ).reshape(len(rows), len(axes)),
            "names": list(axes),
            "dom": json.dumps(axes),
            "time": times[:, 1],
            "times": times,
            "device": self.key.device,
            "src": "benchmarks.landscape",
            "cart": np.prod([len(values) for values in axes.values()]),
            "version": VERSION,
            "workload": self.workload,
            "key": canonical_json(asdict(self.key)),
            "board": json.dumps(asdict(self.device)),
            "space": self.space,
            "effort": json.dumps(asdict(self.effort)),
            "environments": json.dumps(self.environments),
            "seed": self.seed,
            "size": self.size,
            "status": np.array([each.status.value for each in outcomes], np.str_),
            "message": np.array([each.message[:MESSAGE_LENGTH] for each in outcomes], np.str_),
            "samples": np.array([each.times.samples if each.times else 0 for each in outcomes], np.int32),
            "predicted_us": np.array([row.predicted_us for row in rows], float),
            "compiled_us": np.array([np.nan if each.predicted_us is None else each.predicted_us for each in outcomes]),
            "place": np.array([row.place for row in rows], np.int32),
            "first": np.array([row.first for row in rows], bool),
        }
        for name in RESOURCES:
            arrays[name] = np.array(
                [-1 if each.resources is None else getattr(each.resources, name) for each in outcomes], np.int32
            )
        with whole_file(path) as stream:
            np.savez_compressed(stream, **arrays)


def is_landscape(path: Path) -> bool:
    """Whether a replayed space is a landscape of a kernel of ours."""
    try:
        read_arrays(path, (*ARRAYS, *TEXTS))
    except UsageError:
        return False
    return True


def load(path: Path) -> Landscape:
    """The landscape of a file.

    Raises:
        UsageError: it can't be read, is no landscape, or of a kernel, problem or configurations that there no longer
            are.
    """
    arrays = read_arrays(path, (*ARRAYS, *TEXTS, *NUMBERS, *COLUMNS))
    try:
        if int(arrays["version"]) != VERSION:
            raise UsageError(f"{path} is of version {arrays['version']} of the format; this is version {VERSION}")
        key = Key(**json.loads(str(arrays["key"])))
        board = json.loads(str(arrays["board"]))
        landscape = Landscape(
            workload=str(arrays["workload"]),
            key=key,
            device=replace(Device(**board), aliases=tuple(board["aliases"])),
            space=str(arrays["space"]),
            effort=Effort(**json.loads(str(arrays["effort"]))),
            seed=int(arrays["seed"]),
            size=int(arrays["size"]),
            environments=json.loads(str(arrays["environments"])),
        )
        assert landscape.problem is not None  # of fields that there are
        configs = _configs(landscape.kernel, arrays)
        for number, config in enumerate(configs):
            landscape.rows[config] = _row({name: arrays[name][number] for name in ("times", *COLUMNS)})
    except (UnknownKernelError, ProblemError) as error:
        raise UsageError(f"{path} is of another revision of the kernels: {error}") from None
    except UsageError:
        raise
    except (ValueError, TypeError, LookupError) as error:
        raise UsageError(f"{path} is no landscape: {error!r}") from None
    if len(landscape.rows) != len(configs):
        raise UsageError(f"{path} has a configuration twice")
    return landscape


def _configs(kernel: Kernel[Any, Any], arrays: Mapping[str, Any]) -> list[Config]:
    axes = json.loads(str(arrays["dom"]))
    names = [str(name) for name in arrays["names"]]
    return [
        kernel.space.config.from_dict({name: axes[name][at] for name, at in zip(names, row, strict=True)})
        for row in arrays["X"].tolist()
    ]


def _row(cells: Mapping[str, Any]) -> Row:
    status = Status(str(cells["status"]))
    p10, median, p90 = (float(each) * US_PER_MS for each in cells["times"])
    compiled_us = float(cells["compiled_us"])
    resources = Resources(**{name: int(cells[name]) for name in RESOURCES})
    outcome = Outcome(
        status,
        times=Times(median, p10, p90, int(cells["samples"])) if status is Status.OK else None,
        resources=None if resources.registers < 0 else resources,
        message=str(cells["message"]),
        predicted_us=None if np.isnan(compiled_us) else compiled_us,
    )
    return Row(outcome, float(cells["predicted_us"]), int(cells["place"]), bool(cells["first"]))

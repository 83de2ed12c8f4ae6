"""`LaunchPlan`: all that TensorRT is given of one kernel, and a file of it.

A plan says how a kernel is launched without TensorRT, Triton or this package's kernels: on a machine that has none of
them, `parameters` and `grid_at` are what the driver needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.kernels.tensorrt.expressions import Number, Sizes, evaluate, from_plain, to_plain
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.record import read_json

FORMAT = "tilewright launch plan 1"


@dataclass(frozen=True)
class LaunchPlan:
    """One kernel: `name` in `ptx`, launched on `grid` blocks of `threads` threads with `shared_bytes` of dynamic shared
    memory. Its parameters are the addresses of `inputs`, the int32 `scalars`, and the addresses of `outputs`."""

    name: str
    ptx: str
    grid: tuple[Number, Number, Number]
    threads: int
    shared_bytes: int
    inputs: tuple[str, ...]
    scalars: tuple[tuple[str, Number], ...]
    outputs: tuple[str, ...]
    # What it is a plan of: op, configuration, arch; for people and tests.
    origin: Mapping[str, Any]

    def grid_at(self, sizes: Sizes) -> tuple[int, int, int]:
        """The grid for given sizes of the dynamic dimensions."""
        x, y, z = (evaluate(number, sizes) for number in self.grid)
        return x, y, z

    def scalars_at(self, sizes: Sizes) -> tuple[int, ...]:
        """The scalars likewise."""
        return tuple(evaluate(number, sizes) for _, number in self.scalars)

    def to_json(self) -> str:
        """As a file holds it."""
        return json.dumps(
            {
                "format": FORMAT,
                "name": self.name,
                "ptx": self.ptx,
                "grid": [to_plain(number) for number in self.grid],
                "threads": self.threads,
                "shared_bytes": self.shared_bytes,
                "inputs": self.inputs,
                "scalars": [[name, to_plain(number)] for name, number in self.scalars],
                "outputs": self.outputs,
                "origin": self.origin,
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str) -> LaunchPlan:
        """The plan of a text that `to_json` made.

        Raises:
            UsageError: it is no such text.
        """
        try:
            values = read_json(text)
            if values["format"] != FORMAT:
                raise UsageError(f"this launch plan is of format {values['format']!r}, not {FORMAT!r}: make it again")
            x, y, z = (from_plain(number) for number in values["grid"])
            return cls(
                values["name"],
                values["ptx"],
                (x, y, z),
                values["threads"],
                values["shared_bytes"],
                tuple(values["inputs"]),
                tuple((name, from_plain(number)) for name, number in values["scalars"]),
                tuple(values["outputs"]),
                values["origin"],
            )
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"this is no launch plan: {type(error).__name__}: {error}") from None

"""What is asked for of a model: the options of the command, checked as far as they can be without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tilewright.kernels.device import Device
from tilewright.kernels.dtypes import dtype
from tilewright.tuner.model.calibration.data import RANDOM
from tilewright.tuner.model.reading.shapes import parse_shapes
from tilewright.tuner.model.verify.error_budget import Budget
from tilewright.tuner.tune import TuningOptions
from tilewright.tuning_db.errors import UnsupportedError, UsageError
from tilewright.tuning_db.text import shown

SAMPLES = 32
"""Calibration inputs by default: ranges of activations change little with more (measured in docs/models.md)."""


REPORTS = ("report.json", "report.html", "README.md")
"""What of a run is for its reader, beside the models."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    model: Path
    output: Path | None
    device: Device
    shapes: Mapping[str, tuple[int, ...]]
    dims: Mapping[str, int]
    precision: str
    calibration: str
    samples: int
    budget: Budget | None
    tuning: TuningOptions

    @property
    def files(self) -> list[str]:
        """The files of the output folder."""
        lowered = [] if self.precision == "fp32" else [f"model.{self.precision}.onnx"]
        return ["model.fused.onnx", *lowered, *REPORTS]

    @property
    def engine_files(self) -> list[str]:
        """Those of an engine, if one may be built."""
        name = "fused" if self.precision == "fp32" else self.precision
        return [f"model.{name}.engine", f"model.{name}.engine.json"] if self.device.live else []

    @classmethod
    def parse(
        cls,
        model: Path,
        output: Path | None,
        device: Device,
        *,
        shapes: Sequence[str] = (),
        precision: str | None = None,
        calibration: str | None = None,
        samples: int | None = None,
        max_error: str | None = None,
        tuning: TuningOptions | None = None,
    ) -> Self:
        """From the texts of the command line; `tuning` as `autotune` has it by default.

        Raises:
            UsageError: a text that can't be read, or options that don't go together.
        """
        bound, dims = parse_shapes(shapes)
        budget = None if max_error is None else Budget.parse(max_error)
        if precision == "auto" and budget is None:
            raise UsageError("--precision auto needs --max-error, the bound inside which it looks for the fastest")
        chosen = precision or "fp16"
        kind = {"fp8": "fp8e4m3", "auto": "fp16", "w8a16": "int8", "w4a16": "int4"}.get(chosen, chosen)
        if device.arch < dtype(kind).min_arch:
            raise UnsupportedError(
                f"--precision {chosen} needs sm_{dtype(kind).min_arch} or newer: {device.board} is {device.sm}"
            )
        try:
            taken = output is not None and output.exists() and not output.is_dir()
        except OSError as error:  # as of a name that is too long
            raise UsageError(f"--output {shown(str(output))} can't be looked at: {error.strerror}") from None
        if taken:
            raise UsageError(f"--output {output} is a file: name a folder")
        return cls(
            model=model,
            output=output,
            device=device,
            shapes=bound,
            dims=dims,
            precision=chosen,
            calibration=calibration or RANDOM,
            samples=samples or SAMPLES,
            budget=budget,
            tuning=tuning or TuningOptions(),
        )

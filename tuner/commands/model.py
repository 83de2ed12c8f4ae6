"""`autotune --model FILE`: a whole ONNX model, from the file to files that run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tilewright.tuner.commands.db import warn_of_no_shipped_folder
from tilewright.tuner.commands.ending import EXIT_FAILED
from tilewright.tuner.commands.options import WholeNumber
from tilewright.tuner.commands.output import new_table, print_table
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.text import printable, shown

if TYPE_CHECKING:
    from tilewright.tuner.model.request import Request
    from tilewright.tuner.tune import TuningOptions

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "w8a16", "w4a16", "auto")
MOST_SAMPLES = 65536
"""All are read once at the start, which of more would take hours. (A judgement.)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What the command line says of a model: the values of `model_options`."""

    model: Path | None
    output: Path | None
    shapes: tuple[str, ...]
    precision: str | None
    calibration: str | None
    samples: int | None
    max_error: str | None
    dry_run: bool

    def check(self, of_kernels: Mapping[str, object]) -> None:
        """Does nothing if the options go together, with each other and with those of a run over kernels.

        Args:
            of_kernels: of each flag that a model has no use for, as its workloads are its own, the value.

        Raises:
            click.UsageError: some don't.
        """
        if self.model is None:
            for field in dataclasses.fields(self):
                if getattr(self, field.name):
                    flag = {"shapes": "shape"}.get(field.name, field.name.replace("_", "-"))
                    raise click.UsageError(f"--{flag} goes with --model FILE")
            return
        for flag, value in of_kernels.items():
            if value:
                raise click.UsageError(f"{flag} does not go with --model: its workloads are the model's")
        if self.output is None and not self.dry_run:
            raise click.UsageError("--model needs --output DIR, a folder for the files that are made, or --dry-run")


def run_model(
    context: click.Context, device: str, options: ModelOptions, tuning: TuningOptions, *, as_json: bool, quiet: bool
) -> None:
    """Does what the options say with their model, and ends with 1 if it is not inside its error budget."""
    from tilewright.kernels.devices import resolve_device
    from tilewright.tuner.commands import report
    from tilewright.tuner.gpu_runner import equal_gpus
    from tilewright.tuner.model.flow import optimise, plan
    from tilewright.tuner.model.request import Request

    assert options.model is not None
    target = resolve_device(device)
    equal_gpus(target, tuning.workers)  # as tuning will, long after
    request = Request.parse(
        options.model,
        options.output,
        target,
        shapes=options.shapes,
        precision=options.precision,
        calibration=options.calibration,
        samples=options.samples,
        max_error=options.max_error,
        tuning=tuning,
    )
    _check_paths(request)
    warn_of_no_shipped_folder()
    from rich.console import Console

    errors = Console(stderr=True)

    def tell(line: str) -> None:
        if not quiet:
            errors.print(printable(line), markup=False, highlight=False, soft_wrap=True)

    def warn(line: str) -> None:
        line = printable(f"warning: {line}")
        errors.print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)

    if options.dry_run:
        planned = plan(request, tell)
        if as_json:
            from tilewright.tuner.commands.output import print_json

            print_json(planned.to_dict())
        else:
            print_workloads(planned.workloads.rows())
            for line in planned.lines():
                click.echo(printable(line))
        return
    with report.ProgressView(errors, quiet, report.describe_device(target)) as progress:
        made = optimise(request, tell, warn, progress)
    if as_json:
        click.echo(made.document, nl=False)
    else:
        print_layers(made.rows)
        for line in made.lines:
            click.echo(printable(line))
    if not made.met:
        context.exit(EXIT_FAILED)


def _check_paths(request: Request) -> None:
    """Does nothing unless the folder to write to, that of the databases or the data can't be what they must: reading a
    model and fusing it may take minutes, and a dry run would say what the run it stands for refuses.

    Raises:
        UsageError: one can't.
    """
    from tilewright.tuner.model.calibration.data import RANDOM
    from tilewright.tuner.model.output_folder import check_output
    from tilewright.tuning_db.env import database_dir

    databases = database_dir(request.tuning.db)
    if _is_there(databases, "--db") and not databases.is_dir():
        raise UsageError(f"{databases} is a file: name the folder it is in (--db)")
    if request.output is not None:
        above = (request.output, *request.output.absolute().parents)
        there = next(each for each in above if _is_there(each, "--output"))
        if not there.is_dir() or not os.access(there, os.W_OK):
            why = "may not be written to" if there.is_dir() else "is a file" if there.exists() else "leads nowhere"
            raise UsageError(f"--output {request.output} can't be written ({there} {why}): name a folder that can")
        check_output(request.output, [*request.files, *request.engine_files], request.model)
    if request.calibration != RANDOM and not _is_there(Path(request.calibration), "--calibration"):
        raise UsageError(
            f"--calibration {request.calibration} isn't there: give an .npz file, a folder of them, or {RANDOM}"
        )


def _is_there(path: Path, option: str) -> bool:
    """Whether something has that name, be it a link that leads nowhere.

    Raises:
        UsageError: nobody can say, as of a name that is too long.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"{option} {shown(str(path))} can't be looked at: {error.strerror}") from None
    return True


def print_workloads(rows: Sequence[dict[str, Any]]) -> None:
    """The distinct workloads of a model: how often each comes, and its share."""
    from tilewright.tuner.model.messages import legible

    table = new_table(["workload", "op"], ["count", "GFLOP", "FLOPs", "bytes"], ["problem"])
    for row in rows:
        table.add_row(
            legible(row["first"]),
            row["op"],
            str(row["count"]),
            f"{row['flops'] / 1e9:.3g}",
            f"{row['flops_share']:.1%}",
            f"{row['bytes_share']:.1%}",
            row["text"],
        )
    print_table(table)


def print_layers(rows: Sequence[Any]) -> None:
    """Times before and after, each with what it is based on."""
    from tilewright.tuner.model.messages import legible

    table = new_table(["layer", "op"], ["before µs", "after µs"], ["based on"])
    for row in rows:
        fields = dataclasses.asdict(row)
        times = ["" if fields[name] is None else f"{fields[name]:.1f}" for name in ("before_us", "after_us")]
        names = [legible(fields[name]) for name in ("node", "op")]
        table.add_row(*names, *times, fields["after_provenance"] or fields["before_provenance"])
    print_table(table)


class NamedPath(click.Path):
    """A path that is not empty, as one from a variable that isn't set would be."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.Path` does."""
        if value == "":
            self.fail("the name is empty: name one, or leave the option out", param, ctx)
        return super().convert(value, param, ctx)


def model_options(command: Any) -> Any:
    """The options of a whole model, for the command that tunes."""
    for option in reversed(
        (
            click.option("--model", type=NamedPath(path_type=Path), metavar="FILE", help="An ONNX model to optimise."),
            click.option(
                "--output", type=NamedPath(path_type=Path), metavar="DIR", help="Folder for what is made of it."
            ),
            click.option(
                "--shape",
                "shapes",
                multiple=True,
                metavar="NAME:DIMS|DIM=SIZE",
                help='Shapes that the model leaves open: "input:1x3x224x224" or "batch=8"; repeatable.',
            ),
            click.option(
                "--precision",
                type=click.Choice(PRECISIONS),
                help="What layers may be lowered to; fp16 by default. auto: whatever is fastest inside --max-error.",
            ),
            click.option(
                "--calibration",
                type=NamedPath(),
                metavar="FILE.npz|DIR|random",
                help="Inputs of the model, for scales and for errors; random by default.",
            ),
            click.option(
                "--samples",
                type=WholeNumber(min=2, max=MOST_SAMPLES),
                metavar="N",
                help="Calibration inputs to use at the most; 32 by default.",
            ),
            click.option(
                "--max-error",
                metavar="LIMITS",
                help='Bound on the error of the outputs: "0.01" or "cosine=0.999,top1=0.99,sqnr=20".',
            ),
            click.option("--dry-run", is_flag=True, help="Say what would be done with the model, and do nothing."),
        )
    ):
        command = option(command)
    return command

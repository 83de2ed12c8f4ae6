"""`autotune --device D` itself: workloads are tuned, and what was found is shown."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from tilewright.tuner.commands.db import warn_of_no_shipped_folder
from tilewright.tuner.commands.ending import EXIT_FAILED
from tilewright.tuner.commands.output import print_table
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from tilewright.tuner.commands.options import Asked
    from tilewright.tuner.results import Results
    from tilewright.tuner.tune import TuningOptions


def run_tuning(
    context: click.Context, device: str, asked: Asked, options: TuningOptions, *, as_json: bool, quiet: bool
) -> None:
    """Tunes what is asked for, and ends with 1 if no workload has a configuration."""
    from rich.console import Console

    from tilewright.kernels.devices import resolve_device
    from tilewright.tuner.commands import report
    from tilewright.tuner.suites.workload import distinct
    from tilewright.tuner.tune import planned, tune

    target = resolve_device(device)
    # Before the first line is printed: a mistake is then the only line.
    plan = planned(target, options, asked.kernels, asked.workloads())
    plan = replace(plan, workloads=distinct(plan.workloads))  # suites overlap
    warn_of_no_shipped_folder()
    errors = Console(stderr=True)
    with report.ProgressView(errors, quiet, report.describe_device(target)) as progress:
        results = tune(plan, progress)
    _show(results, errors, as_json=as_json, quiet=quiet)
    if all(result.config is None for result in results.results):
        context.exit(EXIT_FAILED)


def _show(results: Results, errors: Console, *, as_json: bool, quiet: bool) -> None:
    from tilewright.tuner.commands import report
    from tilewright.tuning_db.env import database_dir

    if results.set_aside is not None:
        errors.print(f"a damaged database was set aside as {results.set_aside}", markup=False, soft_wrap=True)
    for reason in results.lost_workers:
        errors.print(f"the other workers did the work of one: {reason}", markup=False, soft_wrap=True)
    if as_json:
        click.echo(report.to_json(results))
        return
    print_table(report.results_table(results))
    for line in report.failure_lines(results):
        click.echo(printable(line))
    if not quiet:
        default = None
        with contextlib.suppress(UsageError):  # no home, or a folder in one that there is not
            default = database_dir()
        for line in report.closing_lines(results, default):
            errors.print(line, markup=False, highlight=False, soft_wrap=True)

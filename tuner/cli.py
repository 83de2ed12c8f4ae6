"""The command `autotune`.

Exit status: 0 done; 1 the run failed; 2 the command was called wrongly or the database can't be used; 130 Ctrl-C;
143 terminated.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from importlib.metadata import version as package_version
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from tilewright.tuning_db.errors import DatabaseError, TilewrightError, UsageError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM: as Ctrl-C, it ends the run through every `finally`, so that no worker stays behind."""


def _terminate(number: int, frame: object) -> None:
    raise _TerminatedError


def main() -> None:
    """Entry point: every error of ours is one line on stderr; `--debug` adds the traceback."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        # A terminal that knows no × or µ shows a ? and goes on.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        signal.signal(signal.SIGTERM, _terminate)
        # Click's own handling is used for its mistakes in arguments; ours are below.
        status = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        _end("interrupted: finished trials are kept, the same command goes on from there", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _end("interrupted: finished trials are kept, the same command goes on from there", EXIT_INTERRUPTED)
    except _TerminatedError:
        _end("terminated: finished trials are kept, the same command goes on from there", EXIT_TERMINATED)
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _end(f"error: {error.format_message()}{hint}", EXIT_USAGE)
    except BrokenPipeError:
        # The reader went away (`| head`): not an error of ours, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if debug:
            raise
        _end(f"error: {error}", EXIT_FAILED)
    except TilewrightError as error:
        if debug:
            raise
        _end(f"error: {error}", EXIT_USAGE if isinstance(error, UsageError | DatabaseError) else EXIT_FAILED)
    except Exception as error:
        if debug:
            raise
        _end(f"error: {type(error).__name__}: {error} (a defect of Tilewright: --debug shows where)", EXIT_FAILED)
    sys.exit(status if isinstance(status, int) else 0)


def _end(line: str, status: int) -> None:
    print("autotune: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(status)


def _print_table(table: Table) -> None:
    """Prints every cell whole: a terminal that is too narrow for a row breaks it, and nothing is cut."""
    console = Console()
    unbounded = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(table, crop=False)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--device", metavar="NAME", help="Architecture (sm_86), board (rtx3090, a10, h200, …) or live GPU (cuda:0)."
)
@click.option("--kernel", "kernels", multiple=True, metavar="OP", help="Tune only this op; repeatable.")
@click.option(
    "--problem",
    "problems",
    multiple=True,
    metavar="KEY=VALUE,…",
    help='A problem to tune, as "M=4096,N=4096,K=4096,dtype=fp16,activation=gelu"; repeatable.',
)
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="A suite of named workloads; repeatable.")
@click.option("--trials", type=click.IntRange(min=1), metavar="N", help="Configurations to try per workload.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Time for the whole run."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Compiling processes; by default one per processor."
)
@click.option("--db", metavar="DIR", help="Folder of the tuning databases.")
@click.option("--retune", is_flag=True, help="Try again what is on record.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, all else on stderr.")
@click.option("--quiet", is_flag=True, help="No progress; only the result.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_version("tilewright"), prog_name="autotune")
@click.pass_context
def cli(
    context: click.Context,
    device: str | None,
    kernels: tuple[str, ...],
    problems: tuple[str, ...],
    suites: tuple[str, ...],
    trials: int | None,
    timeout: float | None,
    jobs: int | None,
    db: str | None,
    retune: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Find the fastest configuration of each kernel for a GPU, here or absent, and remember it.

    On a live GPU configurations are measured; for an absent one they are compiled for it and predicted, and the output
    says so. Without --suite or --problem, the default suite of real models' workloads is tuned.
    """
    if context.invoked_subcommand is not None:
        for parameter in cli.params:
            if context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE:
                option = parameter.opts[0]
                raise click.UsageError(f"{option} is no option of {context.invoked_subcommand}, or goes after it")
        return
    if device is None:
        raise click.UsageError("--device is missing: name an arch (sm_86), a board (rtx3090) or a live GPU (cuda:0)")
    from tilewright.kernels.devices import resolve_device
    from tilewright.tuner import report
    from tilewright.tuner.suites import find_suite
    from tilewright.tuner.tune import autotune, resolve_workloads
    from tilewright.tuning_db.env import database_dir

    errors = Console(stderr=True)
    target = resolve_device(device)
    chosen: list[Any] | None = None
    if suites or problems:
        chosen = [w for suite in suites for w in find_suite(suite) if not kernels or w.op in kernels]
        chosen += problems
    # Before the first line is printed: a mistake is then the only line.
    workloads = resolve_workloads(target, kernels, chosen)
    with report.ProgressView(errors, quiet, report.describe_device(target)) as progress:
        results = autotune(
            target,
            problems=workloads,
            trials=trials,
            timeout=timeout,
            jobs=jobs,
            db=db,
            retune=retune,
            progress=progress,
        )
    if results.set_aside is not None:
        errors.print(f"a damaged database was set aside as {results.set_aside}", markup=False, soft_wrap=True)
    if as_json:
        click.echo(report.to_json(results))
    else:
        _print_table(report.results_table(results))
        if not quiet:
            for line in report.closing_lines(results, database_dir()):
                errors.print(line, markup=False, highlight=False, soft_wrap=True)
    if all(result.config is None for result in results.results):
        context.exit(EXIT_FAILED)


@cli.command()
def devices() -> None:
    """List the boards that can be named, and the GPUs that are here."""
    from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS
    from tilewright.kernels.devices import live_devices

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("board", "arch", "name"):
        table.add_column(name, no_wrap=True)
    for name in ("SMs", "boost MHz", "GB/s", "L2 MiB", "shared/block KiB", "fp16 TFLOP/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    notes: dict[str, list[str]] = {}
    for device in (*live_devices(), *CATALOGUE):
        remarks = [device.live] if device.live else []
        if not device.live and REFERENCE_BOARDS.get(device.arch) == device.board:
            remarks.append(f"what {device.sm} means")
        if device.note:
            notes.setdefault(device.note, []).append(device.board)
        table.add_row(
            device.board,
            device.sm,
            device.name,
            str(device.sms),
            str(device.boost_mhz),
            f"{device.bandwidth_gbs:.0f}",
            f"{device.l2_bytes / 2**20:g}",
            f"{device.shared_per_block / 2**10:g}",
            f"{device.tflops('fp16'):g}",
            "; ".join(remarks),
        )
    _print_table(table)
    for note, boards in notes.items():
        click.echo(f"{', '.join(boards)}: {note}")


@cli.command()
def suites() -> None:
    """List the suites that can be named, and how many workloads of each op they have."""
    from tilewright.tuner.suites import SUITES

    ops = list(dict.fromkeys(workload.op for workload in SUITES["all"]))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("suite", no_wrap=True)
    for name in ("workloads", *ops):
        table.add_column(name, justify="right", no_wrap=True)
    for name, workloads in SUITES.items():
        counts = [sum(workload.op == op for workload in workloads) for op in ops]
        table.add_row(name, str(len(workloads)), *(str(count or "") for count in counts))
    _print_table(table)


@cli.command()
@click.option("--device", required=True, metavar="NAME", help="As for autotune itself.")
@click.option("--db", metavar="DIR", help="Folder of the tuning databases.")
def show(device: str, db: str | None) -> None:
    """Show what is on record for a device: the best result of every problem and toolchain."""

    from tilewright.kernels.devices import resolve_device
    from tilewright.tuner.report import short_config
    from tilewright.tuning_db.env import database_dir
    from tilewright.tuning_db.store import TuningDB

    target = resolve_device(device)
    with TuningDB.open(target.key, database_dir(db), read_only=True) as database:
        records = list(database.best_of_each())
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("op", "problem", "configuration"):
            table.add_column(name, no_wrap=True)
        table.add_column("time µs", justify="right", no_wrap=True)
        for name in ("provenance", "triton", "when"):
            table.add_column(name, no_wrap=True)
        for record in records:
            assert record.times is not None
            table.add_row(
                record.key.op,
                _problem_text(record.key.op, record.key.problem),
                short_config(_fields(record.key.op, record.config)),
                f"{record.times.median_us:.1f}",
                str(record.provenance),
                record.key.triton,
                record.created_at[:19],
            )
        if records:
            _print_table(table)
        Console(stderr=True).print(
            f"{len(records)} results on record in {database.path}", markup=False, highlight=False, soft_wrap=True
        )


def _problem_text(op: str, problem: str) -> str:
    from tilewright.kernels.registry import find_kernel

    try:
        return str(find_kernel(op).problem.from_json(problem))
    except UsageError:
        return problem  # of a revision with other fields


def _fields(op: str, config: str) -> dict[str, Any]:
    from tilewright.kernels.registry import find_kernel

    try:
        fields: dict[str, Any] = find_kernel(op).space.config.from_json(config).to_dict()
    except UsageError:
        fields = json.loads(config)
    return fields

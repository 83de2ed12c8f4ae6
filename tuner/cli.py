"""The command `autotune`.

Exit status: 0 done; 1 the run failed; 2 the command was called wrongly, or the database or stdout can't be used;
130 Ctrl-C; 141 nobody reads stdout any more; 143 terminated.
Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from tilewright.tuner.commands import db, exchange, listing, pack
from tilewright.tuner.commands.ending import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_UNREAD,
    EXIT_USAGE,
    TerminatedError,
    exit_with,
    heed_sigterm,
    status_of,
)
from tilewright.tuner.commands.model import ModelOptions, model_options, run_model
from tilewright.tuner.commands.options import (
    Asked,
    Group,
    WholeNumber,
    calls_option,
    db_option,
    jobs_option,
    json_option,
)
from tilewright.tuner.commands.output import (
    ClosedPipeError,
    StdoutError,
    let_go_of_stdout,
    settle_streams,
)
from tilewright.tuner.commands.tune import run_tuning
from tilewright.tuning_db.errors import TilewrightError


@dataclass
class _Invocation:
    """What the command line says, from the moment that it is parsed."""

    debug: bool = False
    subcommand: str | None = None


def main() -> None:
    """Entry point: every error of ours is one line on stderr; `--debug` shows the traceback before it."""
    invocation = _Invocation()
    try:
        heed_sigterm()
        settle_streams()
        # Click's own handling is used for its mistakes in arguments; ours are below.
        status = cli.main(standalone_mode=False, obj=invocation)
    except (click.exceptions.Abort, KeyboardInterrupt):
        _end(f"interrupted: {_kept(invocation)}", EXIT_INTERRUPTED)
    except TerminatedError:
        _end(f"terminated: {_kept(invocation)}", EXIT_TERMINATED)
    except click.ClickException as error:
        hint = f" (see {error.ctx.command_path} --help)" if isinstance(error, click.UsageError) and error.ctx else ""
        _end(f"error: {error.format_message()}{hint}", EXIT_USAGE)
    except ClosedPipeError:
        # The reader went away (`| head`): not an error of ours, and nothing more can be said.
        let_go_of_stdout()
        sys.exit(EXIT_UNREAD)
    except StdoutError as error:
        let_go_of_stdout()
        _fail(
            invocation, f"stdout can't be written ({error.strerror}): free some space, or send it elsewhere", EXIT_USAGE
        )
    except OSError as error:
        _fail(invocation, str(error), EXIT_FAILED)
    except TilewrightError as error:
        _fail(invocation, str(error), status_of(error))
    except Exception as error:  # noqa: BLE001 - it ends the command, with its name
        hint = "(a defect of Tilewright: `autotune --debug …` shows where)"
        _fail(invocation, f"{type(error).__name__}: {error} {hint}", EXIT_FAILED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(invocation: _Invocation, line: str, status: int) -> NoReturn:
    """In an `except`."""
    if invocation.debug:
        traceback.print_exc()
    _end(f"error: {line}", status)


def _kept(invocation: _Invocation) -> str:
    """What an end before its time leaves. Subcommands write whole files and whole transactions."""
    if invocation.subcommand is not None:
        return "what was being written is as it was before"
    return "finished trials are kept, the same command goes on from there"


def _end(line: str, status: int) -> NoReturn:
    exit_with(f"autotune: {line}", status)


def _say_version(context: click.Context, parameter: click.Parameter, asked: bool) -> None:
    """As `click.version_option`, but for a checkout, which no metadata tell the version of."""
    if not asked or context.resilient_parsing:
        return
    from tilewright.tuning_db.version import installed_version

    click.echo(f"autotune, version {installed_version()}")
    context.exit()


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--device", metavar="NAME", help="Architecture (sm_86), board (rtx3090, a10, h200, …) or live GPU (cuda:0)."
)
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="OP",
    help="Tune only this op; repeatable. With --problem: the op that it is of, gemm by default.",
)
@click.option(
    "--problem",
    "problems",
    multiple=True,
    metavar="KEY=VALUE,…",
    help='A problem to tune, as "M=4096,N=4096,K=4096,dtype=fp16,activation=gelu"; repeatable.',
)
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="A suite of named workloads; repeatable.")
@calls_option
@click.option(
    "--trials",
    type=WholeNumber(min=1),
    metavar="N",
    help="Configurations to try per workload, those of earlier runs included; 12 by default, 48 on a live GPU.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Time for the whole run; by default there is no limit.",
)
@jobs_option
@click.option(
    "--workers",
    type=WholeNumber(min=1),
    default=1,
    metavar="N",
    help="Measuring processes, each with a GPU of the same board to itself; 1 by default.",
)
@db_option
@click.option(
    "--storage",
    metavar="URL",
    help="Database in which runs on several hosts share the searches, as postgresql+psycopg://user@host/database.",
)
@click.option("--retune", is_flag=True, help="Try again what is on record.")
@model_options
@json_option
@click.option("--quiet", is_flag=True, help="No progress; only the result.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error; also of a subcommand that follows.")
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_say_version,
    help="Show the version and exit.",
)
@click.pass_context
def cli(
    context: click.Context,
    /,
    device: str | None,
    kernels: tuple[str, ...],
    problems: tuple[str, ...],
    suites: tuple[str, ...],
    calls: tuple[str, ...],
    trials: int | None,
    timeout: float | None,
    jobs: int | None,
    workers: int,
    db: str | None,
    storage: str | None,
    retune: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **values_of_model: Any,
) -> None:
    """Find the fastest configuration of each kernel for a GPU, here or absent, and remember it.

    On a live GPU configurations are measured; for an absent one they are compiled for it and predicted, and the output
    says so. Without --suite, --problem or --calls, the default suite of real models' workloads is tuned; with --model
    FILE, those of an ONNX model, whose chains are fused and whose precision is lowered.
    """
    invocation = context.ensure_object(_Invocation)
    invocation.debug, invocation.subcommand = debug, context.invoked_subcommand
    if context.invoked_subcommand is not None:
        for parameter in cli.params:
            if (
                parameter.name != "debug"
                and context.get_parameter_source(parameter.name or "") is click.core.ParameterSource.COMMANDLINE
            ):
                raise click.UsageError(_misplaced(parameter.opts[0], context.invoked_subcommand))
        return
    if device is None:
        raise click.UsageError("--device is missing: name an arch (sm_86), a board (rtx3090) or a live GPU (cuda:0)")
    of_model = ModelOptions(**values_of_model)
    of_model.check(
        {"--kernel": kernels, "--problem": problems, "--suite": suites, "--calls": calls, "--storage": storage}
    )
    from tilewright.tuner.tune import TuningOptions

    options = TuningOptions(
        trials=trials, timeout=timeout, jobs=jobs, workers=workers, db=db, storage=storage, retune=retune
    )
    if of_model.model is not None:
        run_model(context, device, of_model, options, as_json=as_json, quiet=quiet)
    else:
        asked = Asked(kernels, problems, suites, calls)
        run_tuning(context, device, asked, options, as_json=as_json, quiet=quiet)


def _misplaced(option: str, name: str) -> str:
    """What to say of an option of `autotune` before the name of a subcommand."""
    command = cli.commands[name]
    group = isinstance(command, click.Group)
    commands = list(command.commands.values()) if isinstance(command, click.Group) else [command]
    if any(option in parameter.opts for each in commands for parameter in each.params):
        return f"{option} goes after {'the subcommand of ' if group else ''}{name}"
    return f"{option} is no option of {name}"


for command in (
    listing.devices,
    listing.suites,
    listing.show,
    exchange.export,
    exchange.import_,
    exchange.merge,
    db.db,
    pack.pack,
):
    cli.add_command(command)

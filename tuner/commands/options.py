"""Options that several commands have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from tilewright.tuner.pool import MOST_JOBS
from tilewright.tuning_db.env import DB_DIR
from tilewright.tuning_db.text import shown

if TYPE_CHECKING:
    from tilewright.tuner.suites import Workload


class _Once(click.Command):
    """A command that refuses an option twice unless it is repeatable: Click takes the last without a word."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As `click.Command` does."""
        try:
            *_, given = self.make_parser(ctx).parse_args(args=list(args))
        except click.NoSuchOption as error:
            if error.option_name != "--debug":
                raise
            name = ctx.command_path.removeprefix(ctx.find_root().command_path)
            raise click.UsageError(f"--debug goes before the subcommand: autotune --debug{name} …", ctx) from None
        for option in given:
            once = isinstance(option, click.Option) and not (option.multiple or option.is_flag)
            if once and given.count(option) > 1 and not ctx.resilient_parsing:
                raise click.UsageError(f"{option.opts[0]} is given {given.count(option)} times: give it once", ctx)
        return super().parse_args(ctx, args)


class Command(_Once):
    """What `autotune` does under a name."""


class Group(_Once, click.Group):
    """Several of these."""

    command_class = Command


class WholeNumber(click.IntRange):
    """As `click.IntRange`, in words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.IntRange` does."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            limits = f"at least {self.min}" if self.max is None else f"from {self.min} to {self.max}"
            self.fail(f"{shown(str(value))} must be a whole number, {limits}", param, ctx)


class Jobs(WholeNumber):
    """A number of compiling processes."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `WholeNumber` does."""
        jobs = super().convert(value, param, ctx)
        if jobs > MOST_JOBS:
            why = f"each is a process with a compiler in it, and there may be {MOST_JOBS} of them"
            self.fail(
                f"{jobs} compiling processes are too many: {why}; by default there is one per processor", param, ctx
            )
        return jobs


jobs_option = click.option(
    "--jobs",
    type=Jobs(),
    metavar="N",
    help=f"Compiling processes, {MOST_JOBS} at the most; by default one per processor.",
)

calls_option = click.option(
    "--calls",
    "calls",
    multiple=True,
    metavar="FILE",
    help="What a program called with TILEWRIGHT_CALLS=FILE; repeatable.",
)

db_option = click.option(
    "--db",
    metavar="DIR",
    help=f"Folder of the tuning databases; by default ${DB_DIR}, else the user's data folder.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, all else on stderr.")


@dataclass(frozen=True, slots=True)
class Asked:
    """Which workloads a command line asks for: the values of `--kernel`, `--problem`, `--suite` and `--calls`."""

    kernels: tuple[str, ...]
    problems: tuple[str, ...]
    suites: tuple[str, ...]
    calls: tuple[str, ...]

    def workloads(self) -> list[Workload | str] | None:
        """Those of the suites and files of calls that are of these kernels, and the problems as they were written; None
        if none is named.

        Raises:
            UsageError: there is no such kernel or suite, or a file is not one of calls.
        """
        from tilewright.kernels.registry import find_kernel
        from tilewright.tuner.suites import find_suite, read_calls

        if not (self.suites or self.problems or self.calls):
            return None
        ops = [find_kernel(name).name for name in self.kernels]
        found = [*map(find_suite, self.suites), *map(read_calls, self.calls)]
        of_ops = [workload for workloads in found for workload in workloads if not ops or workload.op in ops]
        return [*of_ops, *self.problems]

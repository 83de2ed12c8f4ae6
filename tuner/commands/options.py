"""Options that several commands have."""

from __future__ import annotations

from typing import Any

import click

from tilewright.tuner.pool import MOST_JOBS


class Jobs(click.IntRange):
    """A number of compiling processes."""

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As `click.IntRange` does."""
        jobs = super().convert(value, param, ctx)
        if jobs > MOST_JOBS:
            why = f"each is a process with a compiler in it, and there may be {MOST_JOBS} of them"
            self.fail(
                f"{jobs} compiling processes are too many: {why}; by default there is one per processor", param, ctx
            )
        return jobs


jobs_option = click.option(
    "--jobs", type=Jobs(), metavar="N", help="Compiling processes; by default one per processor."
)

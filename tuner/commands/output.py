"""What the commands print with: tables that are never cut, plain lines, and JSON documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def new_table(columns: Sequence[str], numbers: Sequence[str] = (), more: Sequence[str] = ()) -> Table:
    """An empty table: columns of text, then of numbers, then of text again."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in more:
        table.add_column(name, no_wrap=True)
    return table


def print_table(table: Table) -> None:
    """Prints every cell whole: a terminal that is too narrow for a row breaks it, and nothing is cut."""
    console = Console()
    unbounded = console.options.update(max_width=10_000)
    console.width = max(console.width, Measurement.get(console, unbounded, table).maximum)
    console.print(table, crop=False)


def say(line: str) -> None:
    """One line on stderr, as it is."""
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """A document on stdout, for a program."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))

"""What the commands print with: tables that are never cut, plain lines, and JSON documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console, ConsoleDimensions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


def printable(line: str) -> str:
    """A line for a terminal, which takes what isn't printable for commands: a blank or a ? instead."""
    return "".join(sign if sign.isprintable() else " " if sign.isspace() else "?" for sign in line)


class PlainTable(Table):
    """A table whose cells are shown as they are: what is on record may come from anywhere, and is no markup."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As `Table.add_row`, of texts."""
        super().add_row(*(Text(printable(str(cell))) for cell in cells), **options)


def new_table(columns: Sequence[str], numbers: Sequence[str] = (), more: Sequence[str] = ()) -> PlainTable:
    """An empty table: columns of text, then of numbers, then of text again."""
    table = PlainTable(box=None, pad_edge=False, header_style="bold")
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
    width, height = console.size
    # Both: with one of them alone, a terminal that calls itself dumb has 80 columns whatever is asked for.
    console.size = ConsoleDimensions(max(width, Measurement.get(console, unbounded, table).maximum), height)
    console.print(table, crop=False)


def say(line: str) -> None:
    """One line on stderr, as it is."""
    Console(stderr=True).print(printable(line), markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """A document on stdout, for a program."""
    click.echo(json.dumps(document, indent=2, allow_nan=False))

"""What the commands print with: tables that are never cut, plain lines, JSON documents; and the streams for them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console, ConsoleDimensions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from tilewright.tuning_db.text import printable


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


def export_command(variable: str, path: Path) -> str:
    """A command for any shell, in any folder, that sets a variable to a path."""
    return f"export {variable}={shlex.quote(str(path.absolute()))}"


def settle_streams() -> None:
    """Makes the standard streams fit to be written to, whatever the command was started with.

    A terminal that knows no × or µ shows a ? and goes on. A run goes on, too, where what it says on stderr can't be
    written, since nobody reads it any more or a disk is full. Where results can't be, on stdout, that is an
    `ClosedPipeError` or a `StdoutError`, whoever writes them. Streams that were closed (`>&-`) have no number that a
    database could get, to have the words of a library in it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(number)
    if sys.stdout is not None and _number_of(sys.stdout) == _STDOUT:
        sys.stdout.flush()
        lines, at_once = (bool(getattr(sys.stdout, name, False)) for name in ("line_buffering", "write_through"))
        results = io.BufferedWriter(_Telling(_STDOUT, "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(
            results, sys.stdout.encoding, errors="replace", line_buffering=lines, write_through=at_once
        )
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if sys.stderr is None or _number_of(sys.stderr) == _STDERR:
        if sys.stderr is not None:
            sys.stderr.flush()
        encoding = getattr(sys.stderr, "encoding", "utf-8")
        writer = io.BufferedWriter(_Unfailing(_STDERR, "wb", closefd=False))
        sys.stderr = io.TextIOWrapper(writer, encoding, errors="replace", line_buffering=True)


_STDOUT, _STDERR = 1, 2


class StdoutError(OSError):
    """stdout can't be written: its disk is full, say."""


class ClosedPipeError(BaseException):
    """Nobody reads stdout any more: as Ctrl-C, it ends the command, and is no error. Of a `BrokenPipeError` Click and
    Rich would each make an end of their own."""


class _Telling(io.FileIO):
    """A file whose errors say that they are of stdout."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise ClosedPipeError from None
        except OSError as error:
            raise StdoutError(error.errno, error.strerror) from None


def let_go_of_stdout() -> None:
    """What could not be written there is not tried again as Python ends, which would be another error."""
    if (number := _number_of(sys.stdout)) is not None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)


class _Unfailing(io.FileIO):
    """A file that takes what it can't write for written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def _number_of(stream: Any) -> int | None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return int(stream.fileno())
    return None

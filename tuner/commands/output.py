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
from typing import TYPE_CHECKING, Any, Literal

import click

from tilewright.tuning_db.text import printable

if TYPE_CHECKING:
    from rich.table import Table

NARROWEST = 24
"""Of a column of text that a terminal folds, unless all its cells are shorter."""

_GAP = 2  # between columns


class PlainTable:
    """A table whose cells are shown as they are: what is on record may come from anywhere, and is no markup."""

    def __init__(self, columns: Sequence[str], numbers: Sequence[str], more: Sequence[str]) -> None:
        self._rows: list[tuple[str, ...]] = [(*columns, *numbers, *more)]
        self._texts = [index for index, name in enumerate(self._rows[0]) if name not in numbers]

    @property
    def row_count(self) -> int:
        """Without the heading."""
        return len(self._rows) - 1

    def add_row(self, *cells: Any) -> None:
        """A row of texts."""
        self._rows.append(tuple(printable(str(cell)) for cell in cells))

    def __rich__(self) -> Table:
        return self.fitted(None)[0]

    def fitted(self, room: int | None) -> tuple[Table, int]:
        """The table, and its width: as it is, or folded to fit in `room`, if it can."""
        from rich.cells import cell_len
        from rich.table import Table
        from rich.text import Text

        widths = [max(map(cell_len, column)) for column in zip(*self._rows, strict=True)]
        gaps = _GAP * (len(widths) - 1)
        while room is not None and sum(widths) + gaps > room:
            widest = max(self._texts, key=lambda index: widths[index])
            if widths[widest] <= NARROWEST:
                break
            widths[widest] -= 1
        names, *rows = self._rows
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, (name, width) in enumerate(zip(names, widths, strict=True)):
            justify: Literal["left", "right"] = "left" if index in self._texts else "right"
            table.add_column(name, justify=justify, width=width, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        return table, sum(widths) + gaps


def new_table(columns: Sequence[str], numbers: Sequence[str] = (), more: Sequence[str] = ()) -> PlainTable:
    """An empty table: columns of text, then of numbers, then of text again."""
    return PlainTable(columns, numbers, more)


def print_table(table: PlainTable) -> None:
    """Prints every cell whole: a terminal that is too narrow for a row has its texts folded, a file has whole rows."""
    from rich.console import Console, ConsoleDimensions

    console = Console()
    width, height = console.size
    # A console that is told to have colours takes itself for a terminal.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    shown, wanted = table.fitted(width if terminal else None)
    # Both: with one of them alone, a terminal that calls itself dumb has 80 columns whatever is asked for.
    console.size = ConsoleDimensions(max(width, wanted), height)
    if terminal:
        console.print(shown, crop=False)
        return
    with console.capture() as captured:
        console.print(shown, crop=False)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


def say(line: str) -> None:
    """One line on stderr, as it is."""
    click.echo(printable(line), err=True)


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

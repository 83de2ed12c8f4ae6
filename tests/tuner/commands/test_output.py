from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tilewright.tuner.commands.output import (
    NARROWEST,
    PlainTable,
    export_command,
    new_table,
    print_json,
    print_table,
    say,
    settle_streams,
)


def a_table() -> PlainTable:
    table = new_table(("first",), ("number",), ("last",))
    table.add_row("a-long-name-of-something " * 4, "12345", "and more")
    table.add_row("short", "1", "")
    return table


def test_what_is_no_terminal_gets_whole_rows_without_blanks_at_their_ends(
    monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    print_table(a_table())
    header, row, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["first", "number", "last"]
    assert row == "a-long-name-of-something " * 4 + "   12345  and more"
    assert last == f"{'short':<100}       1"


@pytest.mark.parametrize(("kind", "columns", "lines"), [("xterm", 60, 6), ("dumb", 80, 4), ("xterm", 10, 6)])
def test_a_terminal_folds_long_texts_and_cuts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys, kind: str, columns: int, lines: int
) -> None:
    for name, value in {"TERM": kind, "FORCE_COLOR": "1", "NO_COLOR": "1", "COLUMNS": str(columns)}.items():
        monkeypatch.setenv(name, value)
    print_table(a_table())
    assert len(capsys.readouterr().out.splitlines()) == 3  # colours make no terminal of a pipe
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(a_table())
    printed = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == lines
    assert max(map(len, printed)) <= max(columns, NARROWEST + len("  number  and more"))
    assert sum(line.count("a-long-name-of-something") for line in printed) == 4
    assert "12345  and more" in printed[1]


def test_a_cell_is_neither_markup_nor_a_command_of_a_terminal(capsys) -> None:
    table = new_table(("first",), ("number",), ("last",))
    table.add_row("[/b]", "[red]1[/red]", "3.9\x1b[2JX\nand\u202e more")
    print_table(table)
    _, row = capsys.readouterr().out.splitlines()
    assert row.split(maxsplit=2) == ["[/b]", "[red]1[/red]", "3.9?[2JX and? more"]


def test_a_line_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    say("[red]a line[/red] that is longer than the terminal, with 3 numbers")
    assert capsys.readouterr() == ("", "[red]a line[/red] that is longer than the terminal, with 3 numbers\n")
    say("a\x1b[2Jb")
    assert capsys.readouterr() == ("", "a?[2Jb\n")


def test_a_command_to_copy_holds_in_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert export_command("A", Path("it's here")) == f"""export A='{tmp_path}/it'"'"'s here'"""


def test_a_document_is_json(capsys) -> None:
    print_json({"µ": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"µ": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json(float("nan"))


def test_the_streams_of_a_test_stay_as_they_are() -> None:
    before = sys.stdout, sys.stderr
    settle_streams()
    assert (sys.stdout, sys.stderr) == before

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tilewright.tuner.commands.output import export_command, new_table, print_json, print_table, say, settle_streams


def test_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    table = new_table(("first",), ("number",), ("last",))
    table.add_row("a long name of something", "12345", "and more")
    print_table(table)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["first", "number", "last"]
    assert row.split("  ")[0] == "a long name of something"
    assert row.rstrip().endswith("12345  and more")


def test_a_dumb_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, whatever it is
    table = new_table(("first",), ("number",))
    table.add_row("x" * 300, "12345")
    print_table(table)
    assert "x" * 300 in capsys.readouterr().out


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

from __future__ import annotations

import json

import pytest

from tilewright.tuner.commands.output import new_table, print_json, print_table, say


def test_a_narrow_terminal_cuts_nothing(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    table = new_table(("first",), ("number",), ("last",))
    table.add_row("a long name of something", "12345", "and more")
    print_table(table)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["first", "number", "last"]
    assert row.split("  ")[0] == "a long name of something"
    assert row.rstrip().endswith("12345  and more")


def test_a_line_is_said_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "10")
    say("[red]a line[/red] that is longer than the terminal, with 3 numbers")
    assert capsys.readouterr() == ("", "[red]a line[/red] that is longer than the terminal, with 3 numbers\n")


def test_a_document_is_json(capsys) -> None:
    print_json({"µ": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"µ": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json(float("nan"))

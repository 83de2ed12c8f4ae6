from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from tilewright.tuning_db import env


def test_an_argument_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.DB_DIR, "/from/variable")
    assert env.database_dir() == Path("/from/variable")
    assert env.database_dir("/from/argument") == Path("/from/argument")


@pytest.mark.parametrize("value", [None, ""])
def test_without_either_it_is_the_users_data(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv(env.DB_DIR, raising=False)
    if value is not None:
        monkeypatch.setenv(env.DB_DIR, value)
    assert env.database_dir() == Path(platformdirs.user_data_dir("tilewright", appauthor=False))


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert env.database_dir("~/tuned") == Path("/home/ada/tuned")


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("True", True), ("on", True), ("0", False), ("", False)])
def test_interpreting_reads_the_variable_as_triton_does(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv(env.INTERPRET, value)
    assert env.interpreting() is expected


def test_a_compiling_environment_has_no_interpreter_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.INTERPRET, "1")
    monkeypatch.setenv("OTHER", "kept")
    environment = env.compiling_environment()
    assert env.INTERPRET not in environment
    assert environment["OTHER"] == "kept"

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from tilewright.tuning_db import UsageError, env


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
    monkeypatch.setenv(env.PACK, "~/a.pack")
    assert env.pack_file() == Path("/home/ada/a.pack")
    monkeypatch.setenv(env.SHIPPED, "~/records")
    assert env.shipped_dir() == Path("/home/ada/records")


@pytest.mark.parametrize("name", [env.DB_DIR, env.PACK, env.SHIPPED])
def test_a_home_that_there_is_not_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    named = {env.DB_DIR: env.database_dir, env.PACK: env.pack_file, env.SHIPPED: env.shipped_dir}[name]
    monkeypatch.setenv(name, "~nobody-at-all/x")
    with pytest.raises(UsageError, match=rf"^{name} '~nobody-at-all/x' can't be found: "):
        named()


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a container's user without an entry among the system's."""
    for name in (env.DB_DIR, "HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)


def test_a_user_without_a_home_is_told_to_name_a_folder(homeless, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"no folder of databases is named, with --db or {env.DB_DIR}, and .*home"):
        env.database_dir()
    assert env.database_dir(tmp_path) == tmp_path


class OfBytes:
    def __fspath__(self) -> bytes:
        return b"db"


@pytest.mark.parametrize("override", [b"db", "a\0b", 7, OfBytes()])
def test_what_is_no_path_is_told(override: Any) -> None:
    with pytest.raises(UsageError, match=r"^the folder of the databases \(--db\) must be a path, as a text; got "):
        env.database_dir(override)


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("True", True), ("on", True), ("0", False), ("", False)])
def test_interpreting_reads_the_variable_as_triton_does(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: bool
) -> None:
    monkeypatch.setenv(env.INTERPRET, value)
    assert env.interpreting() is expected


@pytest.mark.parametrize("name", ["DISABLE_PTXAS_OPT", "PTXAS_OPTIONS", "TRITON_OVERRIDE_ARCH"])
def test_switches_of_the_compiler_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for off in ("", "0", "false"):
        monkeypatch.setenv(name, off)
        env.refuse_compiler_switches("nothing is tuned")
    monkeypatch.setenv(name, "-O0")
    with pytest.raises(UsageError, match=f"^{name}=-O0 makes Triton compile other .*: nothing is tuned; unset it"):
        env.refuse_compiler_switches("nothing is tuned")


def test_a_compiling_environment_has_no_interpreter_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.INTERPRET, "1")
    monkeypatch.setenv("OTHER", "kept")
    environment = env.compiling_environment()
    assert env.INTERPRET not in environment
    assert environment["OTHER"] == "kept"


def test_shipped_records_are_the_packages_another_folders_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(env.__file__).parent / "shipped"
    monkeypatch.delenv(env.SHIPPED)
    assert env.shipped_dir() == own
    expected = {
        "": own,
        "1": own,
        "on": own,
        "0": None,
        "off": None,
        "No": None,
        "/site/records": Path("/site/records"),
    }
    for value, folder in expected.items():
        monkeypatch.setenv(env.SHIPPED, value)
        assert env.shipped_dir() == folder, value


def test_a_folder_that_is_none_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file, absent = tmp_path / "file", tmp_path / "absent"
    file.touch()
    for folder in (file, absent):
        monkeypatch.setenv(env.SHIPPED, str(folder))
        told = f"TILEWRIGHT_SHIPPED={folder} is no folder: nothing that was shipped is found (0 leaves it out)"
        assert env.no_shipped_folder() == told
    for fine in ("", "0", str(tmp_path)):
        monkeypatch.setenv(env.SHIPPED, fine)
        assert env.no_shipped_folder() is None
    assert env.no_database_folder(tmp_path) is env.no_database_folder(absent) is None
    told = f"{file} is a file, where the folder of databases should be (TILEWRIGHT_DB_DIR): nothing that was tuned"
    assert env.no_database_folder(file) == f"{told} is found"


def test_the_pack_is_what_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(env.PACK, raising=False)
    assert env.pack_file() is None
    monkeypatch.setenv(env.PACK, "")
    assert env.pack_file() is None
    monkeypatch.setenv(env.PACK, "/models/a.pack")
    assert env.pack_file() == Path("/models/a.pack")


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("off", False), ("1", True), (" True ", True)]
)
def test_frozen_is_on_or_off(monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.delenv(env.FROZEN, raising=False)
    if value is not None:
        monkeypatch.setenv(env.FROZEN, value)
    assert env.frozen() is expected
    if expected:
        with pytest.raises(UsageError, match=r"^TILEWRIGHT_FROZEN is set: nothing is done; unset it to do so$"):
            env.refuse_if_frozen("nothing is done")
    else:
        env.refuse_if_frozen("nothing is done")


def test_a_misspelt_lock_is_no_open_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.FROZEN, "ture")
    with pytest.raises(UsageError, match="TILEWRIGHT_FROZEN='ture' is neither on nor off: set it to 1, or to 0"):
        env.frozen()


def test_a_home_that_there_is_not_is_told_without_a_variable_too() -> None:
    with pytest.raises(UsageError, match=r"^the folder of the databases '~nobody-at-all/x' can't be found: "):
        env.database_dir("~nobody-at-all/x")

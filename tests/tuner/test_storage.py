"""Opening a shared storage, and what is said when that fails; on a server what only a server can do."""

from __future__ import annotations

import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.tuner.postgres import PASSWORD, postgres
from tilewright.tuner import storage as storage_module
from tilewright.tuner.storage import Storage
from tilewright.tuning_db.errors import StorageError
from tilewright.tuning_db.store import TuningDB

SECRET = "hunter2"
NOWHERE = "127.0.0.1:1"  # a port that nobody listens at


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


def message_of(url: str) -> str:
    with pytest.raises(StorageError) as caught:
        Storage(url)
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    assert caught.value.__cause__ is None
    return message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "the storage's URL can't be read"),
        (f"tuner:{SECRET}@host/studies", "the storage's URL can't be read"),
        (f"postgresql+psycopg://tuner:{SECRET}@host:{SECRET}/studies", "the storage's URL can't be read"),
        (f"redis://:{SECRET}@host/0", "redis://host/0 is of no kind that SQLAlchemy knows"),
        (f"mssql+pymssql://me:{SECRET}@host/studies", "mssql+pymssql://host/studies needs a Python driver (No module"),
        ("sqlite://", "is in memory, which no other process sees: name a file"),
        ("sqlite:///:memory:", "is in memory"),
        ("sqlite:////nowhere/studies.sqlite", "can't be opened: unable to open database file"),
    ],
)
def test_a_url_that_cannot_be_opened_is_one_line_without_its_password(url: str, message: str) -> None:
    assert message in message_of(url)


def test_a_server_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("psycopg")
    found = message_of(f"postgresql+psycopg://tuner:{SECRET}@{NOWHERE}/studies?application_name={SECRET}")
    assert found.startswith(f"the storage postgresql+psycopg://{NOWHERE}/studies can't be opened: connection")


def test_a_driver_that_is_absent_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    found = message_of(f"postgresql+psycopg://tuner:{SECRET}@host/studies")
    assert "needs a Python driver" in found
    assert "pip install 'psycopg[binary]'" in found


def test_a_wrong_password_is_not_shown(server: str) -> None:
    found = message_of(server.replace(PASSWORD, SECRET))
    assert "password authentication failed" in found


def test_a_password_with_braces_and_percent_signs_opens(tmp_path: Path) -> None:
    path = tmp_path / "a{b}%c.sqlite"
    with Storage(f"sqlite:///{str(path).replace('%', '%25')}"):
        pass
    assert any(tmp_path.iterdir())


def schema_of(path: Path) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


@pytest.mark.parametrize(
    ("revision", "advice"),
    [("v3.0.0.a", "`optuna storage upgrade --storage URL`"), ("v99.0.0.a", "pip install -U optuna")],
)
def test_tables_of_another_optuna_are_left_as_they_are(tmp_path: Path, revision: str, advice: str) -> None:
    path = tmp_path / "studies.sqlite"
    with Storage(f"sqlite:///{path}"):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        connection.execute("DROP TABLE trial_heartbeats")  # as one that an older Optuna did not know
    before = schema_of(path)
    found = message_of(f"sqlite:///{path}")
    assert "has tables of another Optuna" in found
    assert revision in found
    assert advice in found
    assert schema_of(path) == before


def test_an_empty_database_may_be_opened_by_many_at_once(server: str) -> None:
    opened, failed = [], []
    barrier = threading.Barrier(6)

    def open_one() -> None:
        barrier.wait()
        try:
            with Storage(server) as storage:
                opened.append(storage.rdb.get_current_version())
        except StorageError as error:
            failed.append(str(error))

    threads = [threading.Thread(target=open_one) for _ in range(barrier.parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert len(opened) == barrier.parties
    assert len(set(opened)) == 1


def test_heartbeats_survive_a_storage_that_fails_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_module, "HEARTBEAT_S", 0.01)
    beats, calls = threading.Event(), []
    with Storage(f"sqlite:///{tmp_path / 'studies.sqlite'}") as storage:

        def sometimes(trial: int) -> None:
            calls.append(trial)
            if len(calls) in (2, 3):
                raise sqlite_error()
            if len(calls) > 4:
                beats.set()

        monkeypatch.setattr(storage.rdb, "record_heartbeat", sometimes)
        storage.beat(7)
        assert beats.wait(30)
        assert set(calls) == {7}


def test_a_heartbeat_that_hangs_does_not_keep_a_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "HEARTBEAT_S", 0.01)
    monkeypatch.setattr(storage_module, "CLOSE_S", 0.1)
    storage = Storage(f"sqlite:///{tmp_path / 'studies.sqlite'}")
    hangs, answer, calls = threading.Event(), threading.Event(), []

    def hang(trial: int) -> None:
        calls.append(trial)
        if threading.current_thread() is not threading.main_thread():
            hangs.set()
            answer.wait(20)

    monkeypatch.setattr(storage.rdb, "record_heartbeat", hang)
    storage.beat(7)
    storage.beat(8)
    assert hangs.wait(30)
    (thread,) = (each for each in threading.enumerate() if each.name == "heartbeats")
    storage.close()
    assert thread.is_alive()
    answer.set()
    thread.join(30)
    assert sorted(calls) == [7, 7, 8]  # after its end, none is begun


def test_a_tuning_database_is_no_storage_and_stays_as_it_is(tmp_path: Path) -> None:
    with TuningDB.open("a10-72sm", tmp_path) as database:
        path = database.path
    before = path.read_bytes()
    with pytest.raises(StorageError, match=r"a10-72sm.sqlite is a tuning database: name a file of its own"):
        Storage(f"sqlite:///{path}")
    assert path.read_bytes() == before


def sqlite_error() -> Exception:
    from sqlalchemy.exc import OperationalError

    return OperationalError("UPDATE", {}, sqlite3.OperationalError("database is locked"))


def test_errors_of_a_storage_that_fails_later_are_explained(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "studies.sqlite"
    with Storage(f"sqlite:///{path}") as storage:
        storage.rdb.engine.dispose()
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DROP TABLE studies")
        with pytest.raises(
            StorageError, match=r"the storage sqlite:///.*studies.sqlite failed: no such table: studies"
        ):
            storage.study("any", optuna.samplers.RandomSampler())

"""A server that gives no answer, as one that is frozen: what is asked of it ends, and what comes after goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.tuner.postgres import postgres
from tilewright.tuner import patience
from tilewright.tuner.patience import KEEPALIVE
from tilewright.tuner.storage import Storage
from tilewright.tuning_db.errors import StorageError


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with postgres() as url:
        yield url


def ask(storage: Storage, query: str) -> object:
    from sqlalchemy import text

    with storage.explained(), storage.rdb.engine.connect() as connection:
        return connection.execute(text(query)).scalar()


def test_what_a_server_does_not_answer_is_an_error_and_the_next_call_is_answered(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Storage(server) as storage:
        monkeypatch.setattr(patience, "ANSWER_S", 0.5)
        start = time.monotonic()
        with pytest.raises(StorageError, match=r"/postgres failed: the server gave no answer in 0.5 s$"):
            ask(storage, "SELECT pg_sleep(20)")
        assert time.monotonic() - start >= 0.5
        monkeypatch.undo()
        assert ask(storage, "SELECT 7") == 7


def test_what_takes_its_time_is_waited_for(server: str) -> None:
    with Storage(server) as storage:
        assert ask(storage, "SELECT 7 FROM pg_sleep(0.5)") == 7


def test_an_answer_that_comes_in_pieces_is_waited_for(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    notices = "DO $$ BEGIN FOR i IN 1..5 LOOP RAISE NOTICE 'x'; PERFORM pg_sleep(0.6); END LOOP; END $$"
    with Storage(server) as storage, storage.rdb.engine.connect() as connection:
        monkeypatch.setattr(patience, "ANSWER_S", 2.0)
        connection.exec_driver_sql(notices)  # for 3 s in all
        assert connection.exec_driver_sql("SELECT 7").scalar() == 7


def test_a_server_that_is_cut_off_is_noticed_unless_the_url_says_otherwise(server: str) -> None:
    def options(url: str) -> dict[str, str]:
        with Storage(url) as storage, storage.rdb.engine.connect() as connection:
            driver = connection.connection.driver_connection
            assert driver is not None
            found: dict[str, str] = driver.info.get_parameters()
            return found

    wanted = {name: str(value) for name, value in KEEPALIVE.items()}
    assert wanted.items() <= options(server).items()
    changed = {**wanted, "keepalives_idle": "99"}
    assert changed.items() <= options(f"{server}?keepalives_idle=99").items()

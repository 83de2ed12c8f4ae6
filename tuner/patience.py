"""Connections to a PostgreSQL server that wait for its answers for a while, and not for good.

A server that is cut off is noticed by the system (`KEEPALIVE`), a host that is frozen but whose system still confirms
every packet is not, and psycopg itself waits without end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.engine import URL, Engine

ANSWER_S = 30.0
"""For a server to answer one call, or to go on with its answer: as long as a process waits for another's transaction in
a SQLite file."""

KEEPALIVE = {
    "keepalives": 1,
    "keepalives_idle": 10,  # seconds without a packet until the system asks whether the other side is there
    "keepalives_interval": 5,  # seconds to the next question
    "keepalives_count": 4,  # questions without an answer until the connection is lost
    "tcp_user_timeout": 30_000,  # milliseconds until it is where what was sent is not confirmed
}
"""Options of libpq, by which a server that is cut off is noticed within 30 s."""


def patient_connect(engine: Engine, url: URL, options: Mapping[str, Any]) -> Callable[[], psycopg.Connection[Any]]:
    """Makes connections as `engine` would, of SQLAlchemy's dialect `postgresql+psycopg`, with `options` besides.

    What the server doesn't answer in `ANSWER_S` raises `psycopg.OperationalError`, and its connection is closed.
    """
    import psycopg

    class Patient(psycopg.Connection[Any]):
        def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
            """As psycopg's, which all that goes over the connection passes through."""
            return super().wait(self._within(gen), *args, **kwargs)

        def _within(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
            deadline = time.monotonic() + ANSWER_S
            try:
                state = next(gen)
                while True:
                    # Nothing is ready ten times a second: psycopg asks so that Ctrl-C is heard.
                    ready = yield state
                    if ready:  # a long answer comes in pieces
                        deadline = time.monotonic() + ANSWER_S
                    elif time.monotonic() >= deadline:
                        self.close()  # what is still to come would be taken for the answer to the next call
                        raise psycopg.OperationalError(f"the server gave no answer in {ANSWER_S:g} s")
                    state = gen.send(ready)
            except StopIteration as end:
                return end.value

    positional, named = engine.dialect.create_connect_args(url)
    return lambda: Patient.connect(*positional, **{**named, **options})

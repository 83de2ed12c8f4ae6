"""The storage of a study that runs on several hosts share: a database server, or a file, through Optuna's RDB storage.

`Storage` opens it, turns its errors into one line without the password, and keeps the heartbeats: as long as a process
lives, its trials are known to be under way, and those of one that died are given up after `GRACE_S`.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tilewright.tuner.patience import KEEPALIVE, patient_connect
from tilewright.tuning_db.errors import StorageError
from tilewright.tuning_db.text import one_line

if TYPE_CHECKING:
    import optuna
    from sqlalchemy.engine import URL

HEARTBEAT_S = 10
"""Between two signs of life of a trial under way."""

GRACE_S = 60
"""Without one, until the process is taken for dead and its trials are retried: a server that restarts, or a host that
swaps, takes less."""

ATTEMPTS = 8
"""At making the tables, where several processes meet at an empty database: all but one of them fail at first."""

CONNECT_S = 10
"""To reach a server, where the URL doesn't say."""

CLOSE_S = 5.0
"""For the heartbeat under way to end, as a run does: one that hangs is left behind."""

DRIVERS = "install the one for it (for postgresql+psycopg:// it is pip install 'psycopg[binary]')"


class Storage:
    """An open storage, and the heartbeats of this process's trials.

    Safe to use from one thread; heartbeats have a thread of their own. Usable as a context manager.

    Args:
        url: as SQLAlchemy takes it: `postgresql+psycopg://user@host/database`, `sqlite:////path/to/file`.

    Attributes:
        name: the URL without user, password and options.
        rdb: Optuna's storage.
        answers: whether the last error, if there was one, was an answer: not that of a server that gives none.

    Raises:
        StorageError: it can't be opened: a malformed URL, no driver, no server, no access, or another Optuna's tables.
    """

    def __init__(self, url: str) -> None:
        import optuna

        self._optuna = optuna
        self._secrets: list[str] = []
        parsed = self._parsed(url)
        self.name = _without_secrets(parsed)
        self._errors = _error_types()
        self.answers = True
        with self.explained("can't be opened"):
            self.rdb = self._opened(parsed)
        self._beating: set[int] = set()
        self._changed = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def explained(self, what: str = "failed") -> Iterator[None]:
        """Errors of the storage inside are raised as one line that names it."""
        try:
            yield
        except self._errors as error:
            # Optuna's own error says only that there was one; its cause has the reason.
            cause = error.__cause__ or error
            self.answers = not isinstance(cause, _no_answer())
            reason = str(getattr(cause, "orig", None) or cause)
            if isinstance(error, KeyError):  # whose text is in quotes
                reason = f"{reason.strip(chr(39))} (was the study deleted? the same command begins another)"
            raise StorageError(f"the storage {self.name} {what}: {self._shown(reason)}") from None

    def study(self, name: str, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        """The study of a name, made if it is not there yet; its objective is to be small.

        Raises:
            StorageError: the storage failed.
        """
        with self.explained():
            return self._optuna.create_study(
                storage=self.rdb, study_name=name, sampler=sampler, direction="minimize", load_if_exists=True
            )

    def beat(self, trial: int) -> None:
        """The trial (its id in the storage) is under way in this process, until `rest`."""
        self.rdb.record_heartbeat(trial)
        with self._changed:
            self._beating.add(trial)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
            self._thread.start()

    def rest(self, trial: int) -> None:
        """The trial is no longer under way in this process."""
        with self._changed:
            self._beating.discard(trial)

    def give_up_the_dead(self, study: optuna.Study) -> None:
        """Fails the trials of processes that have given no sign of life for `GRACE_S`."""
        with _quiet():
            self._optuna.storages.fail_stale_trials(study)

    def close(self) -> None:
        """Ends the heartbeats and closes the connections; a second call does nothing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self.rdb.remove_session()
        self.rdb.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with self._changed:
                trials = sorted(self._beating)
            for trial in trials:
                if self._ended.is_set():
                    break
                # The next beat may find a server that is back; if not, the search's own calls fail and say so.
                with contextlib.suppress(*self._errors):
                    self.rdb.record_heartbeat(trial)
        self.rdb.remove_session()

    def _parsed(self, url: str) -> URL:
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError

        try:
            parsed = make_url(url)
        except (ArgumentError, ValueError):
            raise StorageError(
                "the storage's URL can't be read: it must be as postgresql+psycopg://user@host/database"
            ) from None
        self._secrets = [str(each) for each in (parsed.password, parsed.query.get("password")) if each]
        return parsed

    def _opened(self, url: URL) -> optuna.storages.RDBStorage:
        from sqlalchemy import create_engine, inspect
        from sqlalchemy.exc import NoSuchModuleError
        from sqlalchemy.pool import NullPool

        sqlite = url.get_backend_name() == "sqlite"
        if sqlite and url.database in (None, "", ":memory:"):
            raise StorageError(f"the storage {self.name} is in memory, which no other process sees: name a file")
        options: dict[str, Any] = {}
        driver = url.get_driver_name() if url.get_backend_name() == "postgresql" else ""
        if sqlite:
            options["timeout"] = 30  # seconds to wait for another process's transaction
        elif driver in ("psycopg", "psycopg2"):
            # Heartbeats are kept without a time zone: the same one for every host, whatever its own is. From a database
            # without an encoding (SQL_ASCII) texts would come as bytes.
            wanted = {
                "options": "-c timezone=utc",
                "client_encoding": "utf8",
                "connect_timeout": CONNECT_S,
                **KEEPALIVE,
            }
            options |= {option: value for option, value in wanted.items() if option not in url.query}
        arguments: dict[str, Any] = {"connect_args": options}
        try:
            engine = create_engine(url, poolclass=NullPool, **arguments)
        except NoSuchModuleError:
            raise StorageError(f"the storage {self.name} is of no kind that SQLAlchemy knows") from None
        except ImportError as error:
            raise StorageError(f"the storage {self.name} needs a Python driver ({error}): {DRIVERS}") from None
        if driver == "psycopg":
            arguments = {"creator": patient_connect(engine, url, options)}
            engine = create_engine(url, poolclass=NullPool, **arguments)
        # Optuna's storage leaves connections open where it can't be made: until the tables are right, without a pool.
        unpooled = {"poolclass": NullPool, **arguments}
        with engine.connect():
            pass
        # AssertionError: Optuna's, of a version that another process is about to write.
        early: tuple[type[Exception], ...] = (*self._errors, AssertionError)
        for attempt in range(ATTEMPTS):
            try:
                # Tables that are there may be another Optuna's: none is added to them before that is known.
                tables = inspect(engine)
                made = tables.has_table("alembic_version")
                if sqlite and not made and tables.has_table("_sqlite_migrations"):
                    raise StorageError(f"the storage {self.name} is a tuning database: name a file of its own")
                self._check_version(self._storage(url, unpooled, made))
                break
            except early:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0.02, 0.1) * 2**attempt)
        return self._storage(url, {"pool_pre_ping": True, **arguments}, made=True)

    def _storage(self, url: URL, arguments: dict[str, Any], made: bool) -> optuna.storages.RDBStorage:
        # Optuna formats the URL as a template.
        text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
        with _quiet():
            return self._optuna.storages.RDBStorage(
                text,
                engine_kwargs=dict(arguments),
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                skip_table_creation=made,
                skip_compatibility_check=True,
            )

    def _check_version(self, storage: optuna.storages.RDBStorage) -> None:
        found, wanted = storage.get_current_version(), storage.get_head_version()
        if found != wanted:
            known = found in storage.get_all_versions()
            advice = (
                "`optuna storage upgrade --storage URL` brings it up to date, once no run with another Optuna uses it"
                if known
                else "a newer Optuna made it: pip install -U optuna"
            )
            raise StorageError(
                f"the storage {self.name} has tables of another Optuna ({found}, and not {wanted}): {advice}"
            )

    def _shown(self, reason: str) -> str:
        for secret in self._secrets:
            reason = reason.replace(secret, "***")
        return one_line(reason)


def _without_secrets(url: URL) -> str:
    port = f":{url.port}" if url.port else ""
    return f"{url.drivername}://{url.host or ''}{port}/{url.database or ''}"


def _error_types() -> tuple[type[Exception], ...]:
    """What Optuna's storage raises when the database fails, or no longer has the study."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return (SQLAlchemyError, StorageInternalError, KeyError)


def _no_answer() -> tuple[type[Exception], ...]:
    """What SQLAlchemy raises when a connection is lost, can't be made or waits in vain, as for a lock."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return (OperationalError, InterfaceError)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's warnings that heartbeats are experimental."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield

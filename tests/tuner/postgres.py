"""A PostgreSQL server of the tests' own, on a free port of this machine; gone when the test is over."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PASSWORD = "not-to-be-shown"
STARTS_WITHIN_S = 30.0


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a fresh server's database; skips the test where there is no PostgreSQL, or no driver for it."""
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'psycopg[binary]'")
    binaries = find_binaries()
    # As root, by another user: initdb and postgres refuse root. pytest's own folders are closed to that one.
    user: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="tilewright-postgres-"))
    try:
        if user:
            shutil.chown(folder, user["user"], user["group"])
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        data = folder / "data"
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "tuner", "-A", "scram-sha-256", f"--pwfile={folder / 'password'}"],
            check=True,
            capture_output=True,
            cwd=folder,
            timeout=120,
            env={"LC_ALL": "C"},
            **user,
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = ["fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", f"port={port}"]
        log = folder / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, *[part for each in settings for part in ("-c", each)]],
                stdout=output,
                stderr=output,
                cwd=folder,
                **user,
            )
        try:
            wait_until_ready(binaries, port, server, log)
            yield f"postgresql+psycopg://tuner:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGQUIT)  # at once: its data are thrown away
            server.wait(30)
    finally:
        shutil.rmtree(folder)


def find_binaries() -> Path:
    """The folder of the server's programs, of the newest version."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    # Where Debian has them, not on the PATH.
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if not versions:
        pytest.skip("no PostgreSQL server: there is no initdb on the PATH or in /usr/lib/postgresql")
    return versions[-1].parent


def wait_until_ready(binaries: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_WITHIN_S
    ask = [binaries / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ask, check=False).returncode:
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"PostgreSQL did not start: {log.read_text()}")
        time.sleep(0.05)

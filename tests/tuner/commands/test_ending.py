"""What of a command's end no run of one shows: `test_cli` has the rest."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tilewright.tuner.commands.ending import (
    EXIT_FAILED,
    EXIT_USAGE,
    TerminatedError,
    exit_with,
    heed_sigterm,
    status_of,
)
from tilewright.tuning_db import errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ModelError("no"), EXIT_USAGE),
        (errors.StorageError("no"), EXIT_USAGE),
        (errors.NotPackedError("no"), EXIT_USAGE),
        (errors.WorkerError("no"), EXIT_FAILED),
        (errors.MachineError("no"), EXIT_FAILED),
        (errors.MissingDependencyError("no"), EXIT_USAGE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mistake_is_told_from_a_failure(error: errors.TilewrightError, status: int) -> None:
    assert status_of(error) == status


def test_an_end_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        exit_with("error: one\n  and\x1b[2J two", 7)
    assert ended.value.code == 7
    assert capsys.readouterr() == ("", "error: one and?[2J two\n")


@pytest.fixture
def handlers() -> Iterator[None]:
    """Those of this process are as before afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_that_is_closed_ends_a_run_as_sigterm_does(number: signal.Signals) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    heed_sigterm()
    with pytest.raises(TerminatedError):
        signal.raise_signal(number)


@pytest.mark.usefixtures("handlers")
def test_under_nohup_a_run_goes_on() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heed_sigterm()
    os.kill(os.getpid(), signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_end_that_nobody_can_be_told_of_has_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", buffering=1) as nowhere:
        monkeypatch.setattr(sys, "stderr", nowhere)
        with pytest.raises(SystemExit) as ended:
            exit_with("terminated", 143)
        assert ended.value.code == 143
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space left"):
            nowhere.close()

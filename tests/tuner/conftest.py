"""The command, run in the tests' own process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.tuner.counting import CountingRunner
from tilewright.tuner import cli, tuning_run


@pytest.fixture
def autotune(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: (exit status, stdout, stderr)."""

    def run(*arguments: str | os.PathLike[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["autotune", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def model_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of databases that tests of whole models share: what one has tuned the others find."""
    return tmp_path_factory.mktemp("model_db")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[CountingRunner]:
    """Runs predict without compiling from now on; what they try is in `asked`."""
    monkeypatch.setattr(CountingRunner, "asked", [])
    monkeypatch.setattr(CountingRunner, "fail", False)
    monkeypatch.setattr(tuning_run, "_make_runner", lambda compiler, device, gpus: CountingRunner(compiler, device))
    return CountingRunner

"""The command, run in the tests' own process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tilewright.tuner import cli


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

"""What of a command's end no run of one shows: `test_cli` has the rest."""

from __future__ import annotations

import pytest

from tilewright.tuner.commands.ending import EXIT_FAILED, EXIT_USAGE, exit_with, status_of
from tilewright.tuning_db import errors


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ModelError("no"), EXIT_USAGE),
        (errors.StorageError("no"), EXIT_USAGE),
        (errors.NotPackedError("no"), EXIT_USAGE),
        (errors.WorkerError("no"), EXIT_FAILED),
        (errors.MissingDependencyError("no"), EXIT_FAILED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_mistake_is_told_from_a_failure(error: errors.TilewrightError, status: int) -> None:
    assert status_of(error) == status


def test_an_end_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        exit_with("error: one\n  and two", 7)
    assert ended.value.code == 7
    assert capsys.readouterr() == ("", "error: one and two\n")

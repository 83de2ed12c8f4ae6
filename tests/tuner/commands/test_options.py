from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.tuner.commands.options import Jobs
from tilewright.tuner.pool import MOST_JOBS


@pytest.mark.parametrize("jobs", ["1025", "100000", "99999999999999999999"])
@pytest.mark.parametrize("command", [("--device", "sm_86"), ("pack", "--device", "sm_86", "--output", "p")])
def test_too_many_jobs_are_one_line_that_says_why(
    autotune, tmp_path: Path, command: tuple[str, ...], jobs: str
) -> None:
    status, out, err = autotune(*command, "--problem", "M=16,N=16,K=16", "--jobs", jobs, "--db", tmp_path / "db")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"'--jobs': {jobs} compiling processes are too many: each is a process with a compiler in it" in err
    assert not (tmp_path / "db").exists()


def test_as_many_jobs_as_there_may_be() -> None:
    assert Jobs()(str(MOST_JOBS)) == MOST_JOBS

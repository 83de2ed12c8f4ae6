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


def test_the_help_has_the_defaults(autotune) -> None:
    from tilewright.tuner.model.request import SAMPLES
    from tilewright.tuner.tune import MEASURED_TRIALS, PREDICTED_TRIALS

    status, out, _ = autotune("--help")
    assert status == 0
    words = " ".join(out.split())
    for said in (
        f"{PREDICTED_TRIALS} by default, {MEASURED_TRIALS} on a live GPU",
        f"Calibration inputs to use at the most; {SAMPLES} by default. [2<=x<=65536]",
        f"Compiling processes, {MOST_JOBS} at the most; by default one per processor",
        "by default there is no limit",
        "by default $TILEWRIGHT_DB_DIR, else the user's data folder",
        "With --problem: the op that it is of, gemm by default",
    ):
        assert said in words


def test_as_many_jobs_as_there_may_be() -> None:
    assert Jobs()(str(MOST_JOBS)) == MOST_JOBS

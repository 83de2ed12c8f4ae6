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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "sm_86", "--device", "sm_90"), "--device is given 2 times: give it once"),
        (("show", "--device", "a10", "--db", "a", "--db=b", "--db", "c"), "--db is given 3 times"),
        (("db", "stats", "--device", "a10", "--device", "a10"), "--device is given 2 times"),
        (("export", "--device", "a10", "--output", "a", "--output", "b"), "--output is given 2 times"),
        (("pack", "--device", "a10", "--output", "a", "--output", "b"), "--output is given 2 times"),
        (("merge", "a", "b", "--db", "a", "--db", "b"), "--db is given 2 times"),
    ],
)
def test_of_two_values_none_is_dropped(autotune, arguments: tuple[str, ...], said: str) -> None:
    status, out, err = autotune(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err


def test_what_is_repeatable_and_what_is_a_flag_may_be_repeated(autotune, tmp_path: Path) -> None:
    status, out, _ = autotune("db", "stats", "--db", tmp_path, "--json", "--json")
    assert (status, out.count("databases")) == (0, 1)
    status, _, err = autotune("--device", "a10", "--kernel", "gemm", "--kernel", "gem", "--quiet", "--quiet")
    assert (status, "unknown op 'gem'" in err) == (2, True)


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

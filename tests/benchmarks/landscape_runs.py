"""`benchmarks.landscape` on a GPU that is not there: the real command, runner and pool, over simulated workers.

    python -m tests.benchmarks.landscape_runs FOLDER KILL_AT [ARGUMENT …]

`KILL_AT` is JSON: null, or what `Scenario.kill_at` takes for measurements; that gets this process killed. Arguments are
the command's. Files are saved after every outcome. The journal of measurements is `FOLDER/journal`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from benchmarks import landscape
from tests.tuner.simulated_worker import Scenario
from tests.tuner.simulation import BOARD, simulated
from tilewright.tuner import tuning_run


@contextmanager
def simulated_landscapes(compiling: Scenario, measuring: Scenario, folder: Path) -> Iterator[None]:
    """`benchmarks.landscape` of this process compiles and measures as the scenarios say."""
    with (
        simulated(compiling, measuring, folder),
        mock.patch.object(landscape, "Pool", tuning_run.Pool),
        mock.patch.object(landscape, "resolve_device", return_value=BOARD),
    ):
        yield


def main(folder: str, kill_at: str, *arguments: str) -> None:
    journal = str(Path(folder) / "journal")
    measuring = Scenario(journal, kill_at=json.loads(kill_at))
    sys.argv = ["landscape", *arguments]
    with (
        simulated_landscapes(Scenario(f"{journal}-compiling"), measuring, Path(folder)),
        mock.patch.object(landscape, "SAVE_S", 0.0),
    ):
        landscape.main()


if __name__ == "__main__":
    main(*sys.argv[1:])

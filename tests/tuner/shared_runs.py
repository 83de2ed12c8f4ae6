"""One of several processes that share a search in a storage; on a simulated GPU.

    python -m tests.tuner.shared_runs tune URL FOLDER HOST PROCESSES [KILL_AT]
    python -m tests.tuner.shared_runs claim URL FOLDER HOST PROCESSES

`tune` is a run of `autotune` on a host of that name, with its database under FOLDER/HOST. All note what they measure in
FOLDER/journal, and the first measurements of PROCESSES of them wait for each other; the one that begins measurement
KILL_AT is killed there. `claim` claims as fast as it can what there is, and prints what it got as JSON. Both wait until
PROCESSES have come to the storage.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests.tuner.simulated_worker import PATIENCE_S, Scenario
from tilewright.kernels.problem import Config
from tilewright.tuner import storage as storage_module
from tilewright.tuner.search import Candidates
from tilewright.tuner.shared import SharedSearch, _holds
from tilewright.tuner.storage import Storage
from tilewright.tuning_db.record import Key

TRIALS = 25
"""All configurations of the problem: then the winner is no choice of the search."""


@dataclass(frozen=True, slots=True)
class Pair(Config):
    x: int
    y: int


AXES = {"x": (1, 2, 4, 8, 16), "y": (1, 2, 3, 4, 5, 6)}
CONFIGS = [Pair(x, y) for x in AXES["x"] for y in AXES["y"]]
RACED = CONFIGS[:12]
"""Those that processes race for: a transaction takes several milliseconds."""

KEY = Key("gemm", "rev", '{"M":1}', "a100-108sm", 80, "3.9.0", "13.0", "graph-1")


def entry(config: Pair, time_us: float | None = 1.0) -> dict[str, Any]:
    """As much of an outcome as the search itself looks at."""
    return {"record": {"config": config.to_dict(), "times": time_us and {"median_us": time_us}}, "run": {}}


def opened(storage: Storage, key: Key = KEY, configs: list[Pair] = CONFIGS) -> SharedSearch:
    return SharedSearch(storage, key, Candidates(AXES, configs, CONFIGS[7]))


def tune(url: str, folder: Path, host: str, processes: int, kill_at: int | None) -> None:
    # What compiles takes seconds to import; `claim` does without.
    from tests.tuner.simulation import BOARD, PROBLEM, simulated
    from tilewright.tuner.tune import autotune

    mine = folder / host
    compiling = Scenario(str(mine / "compiling"))
    point = None if kill_at is None else ("measure", "begin", kill_at)
    measuring = Scenario(str(folder / "journal"), together=processes, kill_at=point)
    with simulated(compiling, measuring, mine), mock.patch("socket.gethostname", return_value=host):
        results = autotune(BOARD, problems=[PROBLEM], trials=TRIALS, jobs=1, db=mine / "db", storage=url)
    print(json.dumps(results.results[0].config))


def claim(url: str, folder: Path, host: str, processes: int) -> None:
    with Storage(url) as storage, opened(storage, configs=RACED) as search:

        def first_that_nobody_has(study: Any) -> int | None:
            """All propose the same, as fast as they can read the study: a race for every configuration."""
            held = {search._sampler.row_of(trial.params) for trial in study.get_trials() if _holds(trial)}
            return next((row for row in range(len(RACED)) if row not in held), None)

        search._sampler.propose = first_that_nobody_has
        arrive(folder, host, processes)
        claimed = []
        while claims := search.ask(1, len(RACED)):
            for each in claims:
                claimed.append([each.config.x, each.config.y])
                search.tell(each, entry(each.config))
    print(json.dumps(claimed))


def arrive(folder: Path, host: str, processes: int) -> None:
    (folder / f"{host}.arrived").touch()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(folder.glob("*.arrived"))) < processes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"there are no {processes} processes")
        time.sleep(0.002)


def main(what: str, url: str, folder: str, host: str, processes: str, kill_at: str = "") -> None:
    (Path(folder) / host).mkdir()
    # A process that is killed is to be missed soon.
    storage_module.HEARTBEAT_S, storage_module.GRACE_S = 1, 3
    if what == "tune":
        tune(url, Path(folder), host, int(processes), int(kill_at) if kill_at else None)
    else:
        claim(url, Path(folder), host, int(processes))


if __name__ == "__main__":
    main(*sys.argv[1:])

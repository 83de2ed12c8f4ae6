"""A small made table, and files of it, for the tests of the replay benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

AXES = {"width": [1, 2, 4, 8, 16, 32], "depth": [1, 2, 3, 4, 5], "layout": ["row", "column"]}
BEST = (8, 2, "column")


def arrays(seed: int = 0) -> dict[str, Any]:
    """What a good file holds: 50 of 60 configurations, those of width 32 and depth 5 failed. `BEST` takes 10 ms."""
    rows, times = [], []
    for x, width in enumerate(AXES["width"]):
        for y, depth in enumerate(AXES["depth"]):
            for z, layout in enumerate(AXES["layout"]):
                if width in (1, 16) and layout == "row":
                    continue
                rows.append((x, y, z))
                failed = width == 32 and depth == 5
                times.append(np.nan if failed else 10.0 + 2 * abs(x - 3) + abs(y - 1) + 3 * (layout == "row"))
    time = np.array(times)
    spread = np.random.default_rng(seed).normal(1, 0.01, (len(rows), 8))
    repeats = time[:, None] * spread
    repeats[::2, 6:] = np.nan  # as files have it whose configurations were not all repeated as often
    return {
        "X": np.array(rows, dtype=np.int16),
        "names": np.array(list(AXES)),
        "dom": np.array(json.dumps(AXES)),
        "time": time,
        "times": repeats,
    }


def save(path: Path, **changes: Any) -> Path:
    """Writes the file, with arrays replaced, or left out where a change is None."""
    content = {name: array for name, array in {**arrays(), **changes}.items() if array is not None}
    np.savez(path, **content)
    return path

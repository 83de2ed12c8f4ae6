from __future__ import annotations

import subprocess
import sys

import tilewright.tuning_db


def test_every_exported_name_is_there() -> None:
    assert [name for name in tilewright.tuning_db.__all__ if not hasattr(tilewright.tuning_db, name)] == []


def test_reading_imports_nothing_heavy(tmp_path) -> None:
    # A program that calls a tuned kernel pays for what is imported here at its first call.
    script = f"""
import sys
from pathlib import Path
from tilewright.tuning_db import Key, TuningDB
key = Key("gemm", "hash", "{{}}", "a10-72sm", 86, "3.9", "13.0", "graph-1")
with TuningDB.open("a10-72sm", Path({str(tmp_path)!r}), read_only=True) as db:
    assert db.best(key) is None
heavy = {{"sqlite_utils", "numpy", "triton", "filelock", "tilewright.kernels", "tilewright.tuner"}}
print(sorted(heavy & set(sys.modules)))
"""
    with tilewright.tuning_db.TuningDB.open("a10-72sm", tmp_path):
        pass
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_lists_its_public_names() -> None:
    listed = dir(tilewright.tuning_db)
    assert [name for name in listed if not name.startswith("__")] == sorted(tilewright.tuning_db.__all__)
    assert {"__doc__", "__file__", "__all__"} <= set(listed)

from __future__ import annotations

import subprocess
import sys

import tilewright.tuner


def test_every_exported_name_is_there() -> None:
    assert [name for name in tilewright.tuner.__all__ if not hasattr(tilewright.tuner, name)] == []
    assert not hasattr(tilewright.tuner, "nothing")


def test_importing_it_imports_nothing_heavy() -> None:
    script = """
import sys
import tilewright.tuner
heavy = {"optuna", "numpy", "triton", "sqlite_utils", "tilewright.kernels"}
print(sorted(heavy & set(sys.modules)))
from tilewright.tuner import EnumeratedSampler
print("optuna" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "True"]

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


def test_importing_the_command_imports_nothing_that_only_a_subcommand_needs() -> None:
    script = """
import sys
import tilewright.tuner.cli
print(sorted({"rich", "importlib.metadata", "tilewright.tuning_db.lookup"} & set(sys.modules)))
"""
    # Without the finder of an editable install, which imports more.
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]"]


def test_it_lists_its_public_names() -> None:
    listed = dir(tilewright.tuner)
    assert [name for name in listed if not name.startswith("__")] == sorted(tilewright.tuner.__all__)
    assert {"__doc__", "__file__", "__all__"} <= set(listed)

"""Tests, put to the test: a defect is seeded into device code, and some problem must show it.

An op's launches take their kernel from its module each time they are made, so that one of a copy can stand in for it.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tilewright.kernels.dispatch import forget_plans
from tilewright.tuning_db.errors import RunError


def exposed(check: Callable[..., object], cases: Iterable[tuple[Any, ...]]) -> bool:
    """Whether a check fails, or can't even run, with the arguments of any of the cases."""

    def fails(case: tuple[Any, ...]) -> bool:
        try:
            check(*case)
        except (AssertionError, RunError):
            return True
        return False

    return any(map(fails, cases))


@contextmanager
def seeded(modules: Sequence[ModuleType], right: str, wrong: str) -> Iterator[None]:
    """Has the kernels of `modules`, in the order of their imports, run with `wrong` where their source says `right`.

    There is no plan of the right kernels, nor afterwards of the wrong ones.
    """
    sources = {module.__name__: inspect.getsource(module) for module in modules}
    count = sum(source.count(right) for source in sources.values())
    assert count == 1, f"the device code has {right!r} {count} times, not once: put the defect where it is now"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        copies = _copies({name: source.replace(right, wrong) for name, source in sources.items()}, Path(folder))
        for module, copy in zip(modules, copies, strict=True):
            for name in vars(module):
                if name.endswith("_kernel"):
                    monkeypatch.setattr(module, name, getattr(copy, name))
        forget_plans()
        try:
            yield
        finally:
            forget_plans()


def _copies(sources: dict[str, str], folder: Path) -> list[ModuleType]:
    """Modules of these sources, by name, each of which imports the copies before it in place of the real ones."""
    copies = []
    with pytest.MonkeyPatch.context() as while_loading:
        for name, source in sources.items():
            path = folder / f"{name}.py"
            path.write_text(source)
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            copy = importlib.util.module_from_spec(spec)
            while_loading.setitem(sys.modules, name, copy)
            spec.loader.exec_module(copy)
            copies.append(copy)
    return copies

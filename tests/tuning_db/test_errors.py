from __future__ import annotations

import re

from tilewright.tuning_db import errors


def drawn() -> dict[str, tuple[str | None, str | None]]:
    """Each class of the docstring's tree: its parent, and the builtin it also is."""
    tree: dict[str, tuple[str | None, str | None]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ │]*(?:[├└]── )?)([A-Z]\w+Error)(?: \(also (\w+)\))?", line)
        if not match:
            continue
        depth = len(match[1])
        path = [(at, name) for at, name in path if at < depth]
        tree[match[2]] = (path[-1][1] if path else None, match[3])
        path.append((depth, match[2]))
    return tree


def test_the_tree_in_the_docstring_is_the_real_one() -> None:
    real: dict[str, tuple[str | None, str | None]] = {}
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, errors.TilewrightError):
            parents = [base.__name__ for base in value.__bases__ if issubclass(base, errors.TilewrightError)]
            others = [base.__name__ for base in value.__bases__ if base.__name__ not in parents]
            also = others[0] if others and others != ["Exception"] else None
            real[name] = (parents[0] if parents else None, also)
    assert drawn() == real
    assert len(real) > 10


def test_every_error_says_when_it_is_raised() -> None:
    assert all(getattr(errors, name).__doc__ for name in drawn())

"""What a call says beside its arrays, as ops take it: factors, integers, and what is true or false."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from tilewright.kernels.constants import is_symbolic
from tilewright.tuning_db.errors import UsageError


def factor(value: Any) -> Any:
    """A factor, or None where it is 1 or None: nothing is multiplied then."""
    if value.__class__ is float:  # what it mostly is; asking the abstract class takes half a microsecond
        return None if value == 1.0 else value
    if is_symbolic(value):
        return float(value)
    return None if not isinstance(value, bool) and isinstance(value, numbers.Real) and value == 1.0 else value


def integer(name: str, value: Any) -> int | None:
    """An option that is an integer or None, of Python's or NumPy's; as Python's, for 32 and 32.0 are equal keys.

    Raises:
        UsageError: it is neither.
    """
    if value is None or value.__class__ is int or is_symbolic(value):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name}={value!r} must be an integer")
    return int(value)


def flag(name: str, value: Any) -> bool:
    """An option that is true or false.

    Raises:
        UsageError: it is something else.
    """
    if value is True or value is False:  # what it mostly is
        return value
    if not isinstance(value, np.bool_):
        raise UsageError(f"{name}={value!r} must be True or False")
    return bool(value)

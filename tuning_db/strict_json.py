"""JSON from elsewhere, read with suspicion: what files that people pass around are checked with.

Python's own reader takes the last of two equal names, numbers that are not finite (NaN, 1e999), texts that can't be
stored (half a surrogate pair), integers of thousands of digits and, until the stack is full, any depth. Here each is
refused with a reason that has the value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tilewright.tuning_db.text import shown

LARGEST_INTEGER = 2**63 - 1
"""Of SQLite's and of every C integer that these numbers become."""

MOST_DIGITS = 1000
"""Of an integer that is read at all: Python takes time with the square of their number, and refuses over 4300."""

Check = Callable[[Any], str | None]
"""None for a value that may stand there, else what it must be, as in `a positive number`."""


def read_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a text is.

    Raises:
        ValueError: it is not a JSON object, or holds what this module refuses; the message says what.
    """
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {text[error.start]:#04x} at {error.start} is no UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{shown(text.decode())} is no JSON ({error.msg} at character {error.pos + 1})") from None
    except RecursionError:
        raise ValueError(f"{shown(text.decode())} is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{shown(value)} is no JSON object")
    return value


def check_fields(values: Mapping[str, Any], fields: Mapping[str, Check]) -> None:
    """Does nothing for an object that has just these fields, each with a value that may stand there.

    Raises:
        ValueError: a field is missing, unknown or wrong.
    """
    for name in fields:
        if name not in values:
            raise ValueError(f"{name} is missing")
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{shown(name)} is no field (fields: {', '.join(fields)})")
        if (wanted := fields[name](value)) is not None:
            raise ValueError(f"{name}={shown(value)} must be {wanted}")


def text(value: Any) -> str | None:
    """Any text that can be stored."""
    return None if isinstance(value, str) and _storable(value) else "a text"


def word(value: Any) -> str | None:
    """A text that is not empty."""
    return None if value and text(value) is None else "a text that is not empty"


def line(value: Any) -> str | None:
    """A text that a message can hold as it is: no line ends, and nothing that a terminal obeys."""
    return None if isinstance(value, str) and value.isprintable() else "a text of printable characters"


def name(value: Any) -> str | None:
    """A `line` that is not empty."""
    return None if value and line(value) is None else "a text of printable characters that is not empty"


def one_of(words: Collection[str]) -> Check:
    """One of these."""
    return lambda value: None if isinstance(value, str) and value in words else f"one of {', '.join(words)}"


def integer(least: int = 0, most: int = LARGEST_INTEGER) -> Check:
    """An integer from `least` to `most`."""
    bounds = f"from {least} to {most}" if most < LARGEST_INTEGER else f"of at least {least}, below 2^63"
    return lambda value: None if _is_integer(value) and least <= value <= most else f"an integer {bounds}"


def positive(value: Any) -> str | None:
    """A finite number above 0."""
    fine = (_is_integer(value) or isinstance(value, float)) and math.isfinite(value) and value > 0
    return None if fine else "a finite number above 0"


def optional(check: Check) -> Check:
    """What `check` takes, or null."""

    def check_optional(value: Any) -> str | None:
        wanted = None if value is None else check(value)
        return wanted and f"{wanted}, or null"

    return check_optional


def plain(value: Any) -> str | None:
    """An object of texts, numbers, truth values and nulls: a problem or a configuration."""
    fine = isinstance(value, dict) and all(_storable(name) and _is_plain(each) for name, each in value.items())
    return None if fine else "an object of plain values"


def anything(value: Any) -> str | None:
    """An object of anything that can be stored."""
    return None if isinstance(value, dict) and _storable(json.dumps(value, ensure_ascii=False)) else "an object"


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return _storable(value)
    return value is None or isinstance(value, bool | float) or _is_integer(value)


def _storable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is given twice")
    return values


def _integer(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"{digits[:20]}… is an integer of {len(digits)} digits: at most {MOST_DIGITS}")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is no finite number")
    return value


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")

"""How large the errors of a model may be: the command line's `--max-error "cosine=0.999,max=0.01,top1=0.99"`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Self

from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.text import did_you_mean


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on a model's outputs; None: no limit. `compare.py` defines the measures."""

    max: float | None = None  # of max|e| / max|a|, at most
    centred: float | None = None  # of the same with a minus its mean over inputs, at most
    cosine: float | None = None  # at least
    top1: float | None = None  # share of rows, at least
    sqnr: float | None = None  # dB, at least

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                bounds = f"at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
                raise UsageError(f"the error budget's {name}={repr(value).removesuffix('.0')} must be {bounds}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The budget of a text: measures with their limits, or one number, which is `max`'s.

        Raises:
            UsageError: unknown measure, no number, or out of range; one line.
        """
        known = [field.name for field in fields(cls)]
        found: dict[str, float] = {}
        parts = [part.strip() for part in text.split(",")]
        for part in parts:
            name, equals, word = (piece.strip() for piece in part.partition("="))
            if not equals:
                if len(parts) > 1 or not part:
                    raise UsageError(f"--max-error {text!r}: {part!r} is not MEASURE=LIMIT ({', '.join(known)})")
                name, word = "max", part
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"--max-error {text!r}: no measure {name!r}{hint} (measures: {', '.join(known)})")
            if name in found:
                raise UsageError(f"--max-error {text!r}: {name} is given twice")
            try:
                found[name] = float(word)
            except ValueError:
                raise UsageError(f"--max-error {text!r}: {name}={word!r} is no number{_share(word)}") from None
            if not math.isfinite(found[name]):
                raise UsageError(f"--max-error {text!r}: {name}={word} is no finite number")
        try:
            return cls(**found)
        except UsageError as error:
            raise UsageError(f"--max-error {text!r}: {error}") from None

    def __str__(self) -> str:
        """The text that `parse` reads."""
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ",".join(f"{name}={value!r}" for name, value in given if value is not None)


def _share(word: str) -> str:
    """How a percentage is to be written; nothing of what is not one."""
    try:
        return f": write {float(word.removesuffix('%')) / 100:g}" if word.endswith("%") else ""
    except ValueError:
        return ""


_RANGES = {
    "max": (0.0, math.inf),
    "centred": (0.0, math.inf),
    "cosine": (-1.0, 1.0),
    "top1": (0.0, 1.0),
    "sqnr": (0.0, math.inf),
}

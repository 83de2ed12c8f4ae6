"""Numbers as people read them: times, bytes, operations, shares."""

from __future__ import annotations

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB")
_FLOPS = (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6), ("kFLOP", 1e3), ("FLOP", 1.0))


BASELINE = "every node by itself, in its own type, nothing fused"
"""What the time of a model before is of."""


def time_text(time_us: float) -> str:
    """Microseconds, or milliseconds from 1,000 on: `12.3 µs`, `4.56 ms`."""
    return f"{digits(time_us / 1e3)} ms" if time_us >= 999.5 else f"{digits(time_us)} µs"


def bytes_text(count: float) -> str:
    """A size: `97.5 MiB`."""
    for unit in _BYTES[:-1]:
        if count < 1023.5:
            return f"{count:.0f} B" if unit == "B" else f"{digits(count)} {unit}"
        count /= 1024
    return f"{digits(count)} {_BYTES[-1]}"


def flops_text(count: float) -> str:
    """Operations: `4.09 GFLOP`."""
    for unit, size in _FLOPS:
        if count >= size:
            return f"{digits(count / size)} {unit}"
    return "0"


def factor_text(before: float, after: float) -> str:
    """How much less there is after: `2.3× faster`, `1.1× slower`; `equal` where it is neither, to the digits shown."""
    if before <= 0 or after <= 0:
        return "no factor can be told"
    ratio = before / after
    if f"{max(ratio, 1 / ratio):.2f}" == "1.00":
        return "equal"
    return f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"


def share_text(share: float) -> str:
    """A share in per cent; less than a tenth of one, and not nothing, says so."""
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def digits(number: float) -> str:
    """Three digits that count, and no exponent for what tables have: `0.0123`, `4.56`, `123`."""
    if number == 0:
        return "0"
    size = abs(number)
    if size >= 99.95:
        return f"{number:.0f}"
    if size >= 9.995:
        return f"{number:.1f}"
    if size >= 0.9995:
        return f"{number:.2f}"
    return f"{number:.3g}"

"""What people are told of errors at the end; the report as a whole is in `test_flow`."""

from __future__ import annotations

from tilewright.tuner.model.assemble import _error_lines
from tilewright.tuner.model.verify.error_sums import OutputError


def test_the_worst_errors_are_told() -> None:
    def row(name: str, relative: float | None, bad: int = 0, before: int = 0) -> OutputError:
        most = 0.0 if before else 1.0
        return OutputError(name, name, False, False, relative, None, most, None, None, None, before, bad)

    assert _error_lines([row("y", 0.00123456)]) == ["error of y: 1.2e-03 of its largest value"]
    rows = [row("small", 1e-6), row("large", 0.5), row("none", None), row("broken", 0.01, bad=2), row("middle", 0.1)]
    assert _error_lines(rows) == [
        "error of broken: 1.0e-02 of its largest value, and 2 NaN or infinite otherwise than before",
        "error of none: zeros before, no more",
        "error of large: 5.0e-01 of its largest value",
        "error of other outputs (2): at most 1.0e-01",
    ]
    assert _error_lines([row("none", None)]) == ["error of none: zeros before, no more"]
    assert _error_lines([row("y", None, before=9)]) == ["error of y: nothing but NaN and infinities to compare"]
    masked = OutputError("y", "y", False, False, None, None, 0.0, None, None, None, 0, 0)
    assert _error_lines([masked]) == ["error of y: nothing but rows that see no key to compare"]
    ids = OutputError("ids", "ids", False, False, None, None, 700.0, None, None, 0.75, 0, 0, discrete=True)
    assert _error_lines([ids]) == ["error of ids: 25.0% of its elements differ"]

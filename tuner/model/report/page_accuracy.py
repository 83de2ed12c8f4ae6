"""The parts of `html`'s page about what a model loses: its errors, and the precision that was chosen."""

from __future__ import annotations

from collections.abc import Sequence

from tilewright.tuner.model.report.document import ROUNDING, ErrorPart, PrecisionPart
from tilewright.tuner.model.report.page_parts import Cell, digits_of, folded, name, number, table, text, timed
from tilewright.tuner.model.report.svg import Point, scatter
from tilewright.tuner.model.report.svg import escaped as esc
from tilewright.tuner.model.report.units import digits, share_text, time_text
from tilewright.tuner.model.verify.error_sums import OutputError


def precision_section(part: PrecisionPart | None) -> str:
    """The precision of each layer, what scales were taken from, and the plans that were weighed."""
    if part is None:
        return ""
    kinds: dict[str, int] = {}
    for layer in part.layers:
        kinds[layer.kind] = kinds.get(layer.kind, 0) + 1
    counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(kinds.items())) or "none"
    words = [f"<h2>Precision</h2><p>Asked for: {esc(part.requested)}. Layers: {esc(counts)}; "]
    words.append(f"everything else {esc(part.base)}.</p>")
    if part.calibration is not None:
        given = part.calibration
        samples, methods = f"{given.samples} samples ({esc(given.origin)})", ", ".join(given.methods)
        if methods == ROUNDING:
            words.append(f"<p>Weights rounded by what {samples} multiply them by.</p>")
        else:
            words.append(f"<p>Scales from {samples}, by {esc(methods)}.</p>")
        if given.origin == "random":
            words.append(
                '<p class="note-box failed"><b>Calibrated on random numbers.</b> Ranges of real data differ: give '
                "<code>--calibration</code> a file or a folder before this model is used.</p>"
            )
    if part.pareto:
        points = [
            Point(
                *(each.time_us, each.error, "chosen" if each.chosen else "other", not each.chosen),
                f"{time_text(each.time_us)} {each.provenance}, {part.measure} {digits(each.error)}, "
                f"{each.higher} layers higher",
            )
            for each in part.pareto
            if each.error is not None
        ]
        words.append("<h3>Time against error</h3>")
        if points:
            words.append(scatter(points, "time, µs", part.measure, "Plans that no other beats in both"))
        rows = (
            [
                timed(each.time_us, each.provenance),
                number(digits_of(each.error)),
                number(str(each.higher)),
                Cell('<span class="good">chosen</span>' if each.chosen else ""),
            ]
            for each in part.pareto
        )
        words.append(table(("time", part.measure, "layers kept higher", ""), rows))
    rows_of_layers = ([name(each.node), text(each.kind), text(each.reason)] for each in part.layers)
    words.append(folded("Every layer's precision, and why", table(("layer", "precision", "reason"), rows_of_layers)))
    return "".join(words)


def errors_section(errors: Sequence[ErrorPart]) -> str:
    """Each model that was written, against the original."""
    if not errors:
        return ""
    parts = [
        "<h2>Errors against the original</h2><p>In ONNX Runtime, its optimisations off. Relative: max|e| / max|a|. "
        "Centred: the same with a minus its mean over the inputs, so that what does not depend on the input can hide "
        "nothing; the signal-to-noise ratio (SQNR) of outputs is centred too.</p>"
    ]
    for part in errors:
        parts.append(f"<h3>{esc(part.model)}, {part.comparison.inputs} inputs from {esc(part.data)}</h3>")
        if part.data == "random":
            parts.append('<p class="note-box">Random inputs: real ones may give other errors, and larger ones.</p>')
        for line in part.breaches:
            parts.append(f'<p class="note-box failed">{esc(line)}</p>')
        if part.budget and not part.breaches:
            judged = [row.value for row in part.comparison.classes] if "top1=" in part.budget else []
            of = f"; top-1 is judged of {', '.join(judged)}" if judged else ""
            parts.append(f'<p class="good">Within {esc(part.budget + of)}.</p>')
        head = ("output", "", "relative", "centred", "max |e|", "cosine", "SQNR dB", "top-1", "NaN, Inf")
        rows = (
            [
                name(row.value),
                text(_kind(row)),
                number(digits_of(row.relative)),
                number(digits_of(row.centred_relative)),
                number(digits(row.max_abs)),
                number("–" if row.cosine is None else f"{row.cosine:.7f}"),
                number("–" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"),
                number("–" if row.top1 is None else share_text(row.top1)),
                _bad(row.bad_original, row.bad_changed),
            ]
            for row in part.comparison.outputs
        )
        parts.append(table(head, rows))
        layers = (
            [
                name(row.value),
                number("0" if row.exact else digits_of(row.relative)),
                number("–" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"),
                _bad(row.bad_original, row.bad_changed),
            ]
            for row in part.comparison.layers
        )
        parts.append(folded("Layer by layer", table(("value", "relative", "SQNR dB", "NaN, Inf"), layers)))
    return "".join(parts)


def _kind(row: OutputError) -> str:
    """What is to be known of a row of outputs."""
    if row.logits:
        return f"logits of {row.output}"
    kinds = {"exact": row.exact, "integers": row.discrete, "the same for every input": row.constant}
    return ", ".join(kind for kind, so in kinds.items() if so)


def _bad(original: int, changed: int) -> Cell:
    """How many the original has, rightly as masked logits do, and how many there are that it has not."""
    if changed:
        return Cell(f'<span class="bad">{original} / {changed}</span>', "n")
    return number(f"{original} / 0" if original else "0")

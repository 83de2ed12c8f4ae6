"""`report.html`: the document of `document.py` for people, in one file that needs no other and runs nothing.

Names of nodes and tensors are those of a file that is not trusted. Every text goes through `svg.escaped`, and the
page's own policy forbids scripts and anything from elsewhere.
"""

from __future__ import annotations

from pathlib import Path

from tilewright.tuner.model.report.document import LayerTimes, ModelReport, layer_times
from tilewright.tuner.model.report.estimate import Estimate, NodeTime
from tilewright.tuner.model.report.page_accuracy import errors_section, precision_section
from tilewright.tuner.model.report.page_parts import (
    Cell,
    badge,
    badges,
    code_lines,
    digits_of,
    folded,
    name,
    number,
    percent,
    table,
    text,
    timed,
    titled,
)
from tilewright.tuner.model.report.page_style import STYLE
from tilewright.tuner.model.report.readme import onnxruntime_lines, tensorrt_lines
from tilewright.tuner.model.report.svg import Point, bar, roofline
from tilewright.tuner.model.report.svg import escaped as esc
from tilewright.tuner.model.report.units import (
    BASELINE,
    bytes_text,
    digits,
    factor_text,
    flops_text,
    share_text,
    time_text,
)
from tilewright.tuning_db.atomic import whole_file

MOST_BARS = 40
"""Layers with a bar: the longest of them."""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""Of the page, to browsers: no scripts, no pictures, fonts or forms, no connections."""


def render(report: ModelReport) -> str:
    """The page."""
    sections = [
        _head(report),
        _tiles(report),
        _times(report),
        _roofline(report),
        errors_section(report.errors),
        _memory(report),
        _fusion(report),
        _workloads(report),
        precision_section(report.precision),
        _files(report),
    ]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{esc(report.model.name)} on {esc(report.device.name)}</title>",
            f"<style>{STYLE}</style></head>",
            "<body><main>",
            *(section for section in sections if section),
            "</main></body></html>",
            "",
        ]
    )


def write_page(report: ModelReport, path: Path) -> None:
    """Writes the page, whole or not at all.

    Raises:
        UsageError: the file can't be written.
    """
    with whole_file(path) as stream:
        stream.write(render(report).encode())


def _head(report: ModelReport) -> str:
    model, device = report.model, report.device
    inputs = ", ".join(
        f"{each.name}: {each.dtype} {'×'.join(map(str, each.shape)) or 'number'}" for each in model.inputs
    )
    read_as = "" if model.read_opset == model.opset else f" (read as {model.read_opset})"
    there = "at hand" if device.present else "not at hand: nothing here was run on it"
    return (
        f"<h1>{esc(model.name)}</h1>"
        f'<p class="lead">for {esc(device.name)} ({esc(device.key)}, {esc(device.arch)}), {esc(there)}. '
        f"Opset {model.opset}{read_as}, {model.nodes} nodes; input {esc(inputs)}. "
        f"Tilewright {esc(report.tilewright)}.</p>"
        + "".join(f'<p class="note-box failed">{esc(line)}</p>' for line in report.warnings)
    )


def _tiles(report: ModelReport) -> str:
    before, after, memory = report.estimate.before, report.estimate.after, report.memory
    tiles = [
        (
            "time of one run",
            f"{esc(time_text(before.time_us))} → {esc(time_text(after.time_us))}",
            f"{esc(factor_text(before.time_us, after.time_us))} {badges(before.provenance, after.provenance)}"
            f"<br>before: {esc(BASELINE)}",
        ),
        (
            "weights",
            f"{esc(bytes_text(memory.before.weight_bytes))} → {esc(bytes_text(memory.after.weight_bytes))}",
            esc(percent(memory.before.weight_bytes, memory.after.weight_bytes)),
        ),
        (
            "peak activations",
            f"{esc(bytes_text(memory.before.peak_bytes))} → {esc(bytes_text(memory.after.peak_bytes))}",
            esc(percent(memory.before.peak_bytes, memory.after.peak_bytes)),
        ),
        (
            "nodes",
            f"{report.fusion.nodes_before} → {report.fusion.nodes_after}",
            f"{len(report.fusion.layers)} of them fused; {esc(share_text(report.workloads.coverage))} of the FLOPs",
        ),
    ]
    if report.errors:
        last = report.errors[-1]
        sized = [row for row in last.comparison.outputs if not row.discrete and not row.untold]
        worst = max((row.error for row in sized), default=None)
        spoiled = any(row.relative is None for row in sized)
        words = "met" if not last.breaches else "not met"
        kind = "good" if not last.breaches else "bad"
        budget = f'budget {esc(last.budget)}: <span class="{kind}">{words}</span>' if last.budget else "no budget given"
        shown = "none to tell" if worst is None else "no zeros any more" if spoiled else digits(worst)
        tiles.append((f"largest relative error, {last.model}", esc(shown), budget))
    boxes = (
        f'<div class="tile"><div class="name">{esc(title)}</div><div class="value">{value}</div>'
        f'<div class="more">{more}</div></div>'
        for title, value, more in tiles
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def _times(report: ModelReport) -> str:
    before, after = report.estimate.before, report.estimate.after
    rows = layer_times(report.estimate)
    longest = max((time for row in rows for time in (row.before_us, row.after_us) if time), default=1.0)
    ranked = sorted(rows, key=lambda row: -max(row.before_us or 0.0, row.after_us or 0.0))
    head = ("layer", "operator", "before", "after", "")
    parts = ["<h2>Time, layer by layer</h2>", _caution(before, after)]
    parts.append(
        '<div class="key"><span><i class="before"></i>before: the nodes that the layer stands for, marked with the '
        "weakest of what their times are based on</span>"
        '<span><i class="after"></i>after</span></div>'
    )
    parts.append(table(head, (_layer_row(row, longest) for row in ranked[:MOST_BARS])))
    if len(ranked) > MOST_BARS:
        shown = sum(max(row.after_us or 0.0, 0.0) for row in ranked[:MOST_BARS])
        share = share_text(shown / after.time_us if after.time_us else 0.0)
        parts.append(f'<p class="soft">The {MOST_BARS} longest of {len(ranked)}: {esc(share)} of the time after.</p>')
    total = [
        [text(title), timed(each.time_us, each.provenance), *(_part(each, kind) for kind in _KINDS)]
        for title, each in (("before", before), ("after", after))
    ]
    parts.append("<h3>What the sums are made of</h3>")
    parts.append(table(("", "whole model", *_KINDS), total))
    listed = (_node_row(row) for row in after.nodes if row.time_us)
    columns = ("node", "operator", "time", "share", "FLOP", "bytes", "TFLOP/s")
    parts.append(folded("Every node after, in the model's order", table(columns, listed)))
    return "".join(parts)


_KINDS = ("measured", "transferred", "predicted", "roofline")


def _caution(before: Estimate, after: Estimate) -> str:
    if before.provenance == after.provenance == "measured":
        return ""
    return (
        '<p class="note-box">Times of the whole model are <b>predicted</b>: sums over nodes, each as good as what it '
        f"is based on. {badge('measured')} this problem on this board; {badge('transferred')} measured on another "
        f"shape, board or revision; {badge('predicted')} by the model of docs/prediction.md, never run; "
        f"{badge('roofline')} bytes over the bandwidth, or FLOPs over the peak, and a launch.</p>"
    )


def _layer_row(row: LayerTimes, longest: float) -> list[Cell]:
    bars = bar((row.before_us or 0.0) / longest, "before") + bar((row.after_us or 0.0) / longest, "after")
    return [
        name(row.node),
        text(row.op),
        timed(row.before_us, row.before_provenance),
        timed(row.after_us, row.after_provenance),
        Cell(bars, "bars"),
    ]


def _node_row(row: NodeTime) -> list[Cell]:
    return [
        name(row.node),
        text(row.op),
        timed(row.time_us, row.provenance),
        number(share_text(row.share)),
        number(flops_text(row.flops) if row.flops else "–"),
        number(bytes_text(row.bytes)),
        number(digits(row.tflops) if row.flops else "–"),
    ]


def _part(estimate: Estimate, kind: str) -> Cell:
    time = estimate.by_provenance().get(kind)
    return number("–" if time is None else time_text(time))


def _roofline(report: ModelReport) -> str:
    part = report.estimate
    points = [
        Point(row.intensity, row.tflops, row.kernel or "other", hollow, _tip(row, when))
        for estimate, hollow, when in ((part.before, True, "before"), (part.after, False, "after"))
        for row in estimate.nodes
        if row.flops and row.bytes and row.time_us
    ]
    if not points:
        return ""
    kinds = sorted({point.kind for point in points})
    key = "".join(f'<span><i class="round {esc(kind)}"></i>{esc(kind)}</span>' for kind in kinds)
    key += '<span><i class="round hollow"></i>before</span><span><i class="round full"></i>after</span>'
    return (
        "<h2>Roofline</h2><p>Every node that multiplies, at the rate that its time comes to. Rest the pointer on a "
        f'mark for its name, its time and what that is based on.</p><div class="key">{key}</div>'
        f"{roofline(points, part.roofs.tflops, part.roofs.bandwidth_gbs)}"
    )


def _tip(row: NodeTime, when: str) -> str:
    return f"{row.node} ({row.op}), {when}: {time_text(row.time_us)} {row.provenance}, {digits(row.tflops)} TFLOP/s"


def _memory(report: ModelReport) -> str:
    before, after = report.memory.before, report.memory.after
    rows = [
        ("weights", before.weight_bytes, after.weight_bytes, ""),
        *(
            (f"of them {kind}", before.weights.get(kind, 0), after.weights.get(kind, 0), "")
            for kind in sorted({*before.weights, *after.weights})
        ),
        ("peak activations", before.peak_bytes, after.peak_bytes, f"at {after.peak_node}" if after.peak_node else ""),
        ("of them inputs and outputs", before.interface_bytes, after.interface_bytes, ""),
    ]
    longest = max(max(row[1], row[2]) for row in rows) or 1
    cells = (
        [
            text(title),
            number(bytes_text(old)),
            number(bytes_text(new)),
            Cell(bar(old / longest, "before") + bar(new / longest, "after"), "bars"),
            Cell(f"<code>{esc(note)}</code>" if note else "", "name"),
        ]
        for title, old, new, note in rows
    )
    unknown = (
        f"<p>Values whose size depends on the data, and is counted nowhere: {before.unknown_values} before, "
        f"{after.unknown_values} after.</p>"
        if before.unknown_values or after.unknown_values
        else ""
    )
    return (
        "<h2>Memory</h2><p>Activations by liveness: a value from the node that makes it to the last that reads it; "
        "views share, nothing works in place, workspaces are not counted.</p>"
        '<div class="key"><span><i class="before"></i>before</span><span><i class="after"></i>after</span></div>'
        f"{table(('', 'before', 'after', '', ''), cells)}{unknown}"
    )


def _fusion(report: ModelReport) -> str:
    fusion = report.fusion
    patterns = ([text(pattern), number(str(count))] for pattern, count in sorted(fusion.patterns.items()))
    left = ([name(each.node), text(each.pattern), text(each.reason)] for each in fusion.left)
    layers = (
        [name(each.node), text(each.plugin), name(", ".join(each.stands_for)), text(each.end)] for each in fusion.layers
    )
    unsupported = (
        [
            name(each.node),
            text(each.operator),
            text(each.reason),
            number("–" if each.flops is None else flops_text(each.flops)),
        ]
        for each in report.workloads.unsupported
    )
    return "".join(
        [
            f"<h2>Fusion</h2><p>{fusion.nodes_before} nodes became {fusion.nodes_after}.</p>",
            table(("pattern", "matched"), patterns),
            titled("Left as they were", table(("node", "pattern", "reason"), left)),
            titled("Products that no kernel of ours runs", table(("node", "operator", "reason", "FLOP"), unsupported)),
            folded("Every fused layer", table(("node", "plugin", "stands for", "its chain ends"), layers)),
        ]
    )


def _workloads(report: ModelReport) -> str:
    part = report.workloads
    rows = (
        [
            name(row.problem),
            text(row.op),
            number(str(row.count)),
            number(flops_text(row.flops)),
            number(share_text(row.flops_share)),
            number(share_text(row.bytes_share)),
            name(row.first),
        ]
        for row in part.rows
    )
    head = ("problem", "op", "count", "FLOP", "of FLOPs", "of bytes", "first layer")
    tuned = (
        [
            name(row.problem),
            text(row.op),
            text(row.config or f"{row.status}: {row.message}"),
            timed(row.time_us, row.provenance),
            number(digits_of(row.tflops)),
            number("–" if row.roofline_fraction is None else share_text(row.roofline_fraction)),
            number(str(row.trials)),
        ]
        for row in report.tuning
    )
    tuning_head = ("problem", "op", "configuration", "time", "TFLOP/s", "of roofline", "trials")
    return "".join(
        [
            f"<h2>Workloads</h2><p>Distinct problems: {len(part.rows)}. {esc(flops_text(part.flops))} in all, "
            f"{esc(share_text(part.coverage))} of them run by kernels of ours.</p>",
            table(head, rows),
            titled("Tuning", table(tuning_head, tuned)),
        ]
    )


def _files(report: ModelReport) -> str:
    if not report.artefacts:
        return ""
    rows = (
        [name(each.file), text(each.what), number(bytes_text(each.bytes)), name(each.sha256)]
        for each in report.artefacts
    )
    parts = ["<h2>Files</h2>", table(("file", "", "size", "SHA-256"), rows)]
    for kind, title, lines in (
        ("onnx", "In ONNX Runtime", onnxruntime_lines),
        ("engine", "In TensorRT", tensorrt_lines),
    ):
        last = [each for each in report.artefacts if each.kind == kind][-1:]
        parts += [f"<h3>{title}</h3><pre><code>{code_lines(lines(each.file))}</code></pre>" for each in last]
    return "".join(parts)

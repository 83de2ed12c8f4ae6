"""The result of `benchmarks.gpu` as Markdown: nothing in it is written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.contenders import DEFAULT, OURS

Document = Mapping[str, Any]


def markdown(document: Document) -> str:
    """All tables of one run."""
    device, peaks = document["device"], document["peaks"]
    environment = document["environment"]
    versions = ", ".join(
        f"{name} {environment[name]}"
        for name in ("triton", "torch", "cuda", "cudnn", "driver")
        if environment.get(name)
    )
    lines = []
    if document["simulated"]:
        lines += ["**Rehearsal: nothing here was measured.** Times are made up to try the benchmark without a GPU.", ""]
    lines += [
        f"{device['name']} ({device['key']}), {versions}; {environment.get('started', '')}".rstrip("; "),
        "",
        *([f"Revision {environment['revision']}."] if environment.get("revision") else []),
        *([f"`{document['command']}`"] if document.get("command") else []),
        *([document["tuned"]] if document.get("tuned") else []),
        "",
        f"The board's own peaks in this run: a copy moves {peaks['copy_gbs']:.0f} GB/s (read and written), a bf16 "
        f"product of 8192 x 8192 x 8192 reaches {peaks['matmul_tflops']:.0f} TFLOP/s.",
        "",
        *_families(document["families"]),
        "",
        *_cases(document["cases"]),
    ]
    if document["load"]:
        lines += ["", *_load(document["load"])]
    busy = environment.get("load_before")
    if busy is not None:
        lines += ["", f"Host times, on {environment['cores']} cores under a load of {busy:.0f}:"]
    lines += ["", *table(["host time of a call", "µs"], [[k, f"{v:.1f}"] for k, v in document["dispatch_us"].items()])]
    if document.get("left_out"):
        lines += ["", f"Left out for want of time: {'; '.join(document['left_out'])}."]
    return "\n".join(lines) + "\n"


def _families(families: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for family in families:
        ratio = "-" if family["ratio"] is None else f"{family['ratio']:.3f}"
        bar = "" if family["bar"] is None else f"{family['bar']:.2f}"
        copied = "" if family.get("of_copy") is None else f"{family['of_copy']:.0%} (bar {family['copy_bar']:.0%})"
        met = {True: "yes", False: "no", None: ""}[family["met"]]
        against = {"whole": "best that computes the same", "library": "bare product"}.get(family["against"], "separate")
        best = "-" if family["best_ratio"] is None else f"{family['best_ratio']:.3f}"
        count = f"{family['compared']}/{family['cases']}"
        rows.append([family["family"], against, count, ratio, bar, met, best, copied])
    head = [
        *("family", "against the library's", "cases", "ratio (geometric mean)", "bar", "met"),
        *("against the best that computes the same", "of copy bandwidth"),
    ]
    return table(head, rows)


def _cases(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for family in dict.fromkeys(case["family"] for case in cases):
        for case in cases:
            if case["family"] != family:
                continue
            ours, default = (case["contenders"].get(name, {}) for name in (OURS, DEFAULT))
            error = case.get("error") or ours.get("error")
            if error:
                rows.append([family, case["name"], *[""] * 7, error])
                continue
            rival = case["contenders"].get(case["against"], {})
            chosen = case["chosen"]
            rows.append(
                [
                    family,
                    case["name"],
                    _us(ours),
                    _us(default),
                    f"{case['against'] or ''} {_us(rival)}".strip(),
                    "" if case["ratio"] is None else f"{case['ratio']:.3f}",
                    _best(case),
                    f"{case['tflops']:.0f}",
                    f"{case['gbs']:.0f}",
                    f"{chosen['provenance']}: {_config(chosen['config'])}",
                ]
            )
    head = [
        *("family", "case", "ours, µs", "default", "rival, µs", "ratio", "best that computes the same, if another"),
        *("TFLOP/s", "GB/s", "configuration"),
    ]
    return table(head, rows)


def _load(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for entry in entries:
        for name, figures in entry.get("contenders", {}).items():
            energy = figures.get("joules_per_call")
            rows.append(
                [
                    f"{entry['family']}: {entry['name']}",
                    name,
                    f"{figures['calls_per_s']:.0f}",
                    "" if energy is None else f"{1e3 * energy:.2f}",
                    "" if energy is None else f"{figures['watt']:.0f}",
                ]
            )
    return table(["closed loop over a CUDA graph", "", "calls/s", "mJ per call", "W"], rows)


def _best(case: Mapping[str, Any]) -> str:
    if case["best"] in (None, case["against"]):
        return ""
    return f"{case['best']} {_us(case['contenders'][case['best']])}: {case['best_ratio']:.3f}"


def _us(timed: Mapping[str, Any]) -> str:
    return "" if not timed or timed.get("error") else f"{timed['median_us']:.1f}"


def _config(config: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells)]

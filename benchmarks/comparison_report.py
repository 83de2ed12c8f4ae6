"""The result of `benchmarks.gpu` as Markdown: nothing in it is written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.contenders import DEFAULT, OURS
from tilewright.kernels.registry import find_kernel

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
        *(
            [
                f"The board's own peaks in this run: a copy moves {peaks['copy_gbs']:.0f} GB/s (read and written), a "
                f"bf16 product of 8192 x 8192 x 8192 reaches {peaks['matmul_tflops']:.0f} TFLOP/s.",
                "",
            ]
            if peaks
            else []
        ),
        *([f"Not measured: {'; '.join(document['errors'])}.", ""] if document.get("errors") else []),
        *_families(document["families"], document["cases"]),
        "",
        *_passes(document["cases"], peaks),
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


def _families(families: Sequence[Mapping[str, Any]], cases: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for family in families:
        own = [case for case in cases if case["family"] == family["family"]]
        bar = "" if family["bar"] is None else f"{family['bar']:.2f}"
        met = {True: "yes", False: "no", None: ""}[family["met"]]
        against = {"whole": "best that computes the same", "library": "bare product"}.get(family["against"], "separate")
        count = f"{family['compared']}/{family['cases']}"
        ratio, best, default = _ratio(family["ratio"]), _ratio(family["best_ratio"]), _ratio(_default_ratio(own))
        rows.append([family["family"], against, count, ratio, bar, met, best, default, _copied(family, own)])
    head = [
        *("family", "against the library's", "cases", "ratio (geometric mean)", "bar", "met"),
        *("against the best that computes the same", "of the default", "of copy bandwidth"),
    ]
    return table(head, rows)


def _default_ratio(cases: Sequence[Mapping[str, Any]]) -> float | None:
    """The geometric mean of the rivals' times over those of the default configuration."""
    ratios = []
    for case in cases:
        rival, default = (case["contenders"].get(name or "", {}) for name in (case.get("against"), DEFAULT))
        if rival and default and not rival["error"] and not default["error"]:
            ratios.append(rival["median_us"] / default["median_us"])
    return geometric_mean(ratios)


def _copied(family: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]) -> str:
    """The part of the copy's bandwidth, of the cases that its bar is for; and of all, where those are others."""
    part = family.get("of_copy")
    if part is None:
        return ""
    every = [case["of_copy"] for case in cases if case.get("of_copy") is not None]
    bound = [case["of_copy"] for case in cases if case.get("of_copy") is not None and held_to_copy(case)]
    bar = f"bar {family['copy_bar']:.0%}"
    if len(bound) == len(every):
        return f"{part:.1%} ({bar})"
    return f"{part:.1%} ({bar}) in {len(bound)} of {len(every)} cases; {geometric_mean(every):.1%} in all"


def held_to_copy(case: Mapping[str, Any]) -> bool:
    """Whether a case is one that the bar of the copy's bandwidth is for: of attention those that read a GB or more."""
    return bool(case["op"] != "attention" or case["bytes"] >= LEAST_ATTENTION_BYTES)


LEAST_ATTENTION_BYTES = 1e9


def geometric_mean(values: Sequence[float]) -> float | None:
    """None without values."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


LEAST_PASS_BYTES = 16e6
"""Bytes of a pass below which its time says little of bandwidth."""


def _passes(cases: Sequence[Mapping[str, Any]], peaks: Mapping[str, float]) -> list[str]:
    """How good the separate passes were that a family's rival has: of the copy's bandwidth, what they must move at the
    least over the time that they add to the library's product."""
    rows = []
    for family in dict.fromkeys(case["family"] for case in cases):
        own = [case for case in cases if case["family"] == family]
        held = [case for case in own if "elementwise" in (case.get("against") or "")]
        if not held or not peaks:
            continue
        shares = [share for case in own if (share := _pass_share(case, peaks))]
        means = [
            _ratio(
                geometric_mean([case["ratio"] for case in own if case["ratio"] is not None and (case in held) is ours])
            )
            for ours in (True, False)
        ]
        spread = (
            [f"{share:.0%}" for share in (geometric_mean(shares) or 0, min(shares), max(shares))]
            if shares
            else [""] * 3
        )
        rows.append([family, f"{len(held)} of {len(own)}", *means, str(len(shares)), *spread])
    if not rows:
        return []
    head = [
        *("family", "held against separate passes", "their ratio", "the others' ratio"),
        *("measured passes", "of copy bandwidth, mean", "least", "most"),
    ]
    return [
        "Where the library's best way, or the one a family is held against, is a product and separate passes (bias, "
        "activation, residual): the ratio of those cases and of the family's others, and the bandwidth of the passes "
        "as a part of the copy's: what they must read and write, over the time they add to the product. A ratio "
        "against passes at a third of the bandwidth is smaller against good ones. Measured are all passes of 16 MB or "
        "more of the family, whether a case is held against them or not; a part above 100 % is no bandwidth: what the "
        "pass reads was in the cache, or the product alone took another way.",
        "",
        *table(head, rows),
        "",
    ]


def _pass_share(case: Mapping[str, Any], peaks: Mapping[str, float]) -> float | None:
    """The share of one case; None where it has no product and passes of one library, or next to nothing to move."""
    timed = {name: each for name, each in case["contenders"].items() if not each["error"]}
    added = [
        each["median_us"] - timed[bare]["median_us"]
        for name, each in timed.items()
        if each["role"] == "separate" and (bare := name.partition(" + ")[0]) in timed
    ]
    if not peaks or not added or min(added) <= 0:
        return None
    problem = find_kernel(case["op"]).problem.from_dict(case["problem"])
    result = problem.outputs()["out"]
    elements = math.prod(result.shape)
    product = 4 if case["problem"].get("dtype") == "int8" else 2  # bytes of an element
    read = product * elements * (2 if case["problem"].get("gated") else 1)
    read += 2 * elements if case["problem"].get("residual") else 0
    moved = read + 2 * elements
    return moved / min(added) / 1e3 / peaks["copy_gbs"] if moved >= LEAST_PASS_BYTES else None


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

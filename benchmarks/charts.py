"""Plots of a comparison, as PNG: ratios by family, and the roofline. Without matplotlib there are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plots(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Draws what there is; the files written."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = "made-up times" if document["simulated"] else "measured"
    title = f"{document['device']['name']}, {made}"
    drawn = [_ratios(pyplot, document, out / "ratios.png", title)]
    if document["peaks"]:
        drawn.append(_roofline(pyplot, document, out / "roofline.png", title))
    return drawn


def _ratios(pyplot: Any, document: Mapping[str, Any], path: Path, title: str) -> Path:
    families = [family for family in document["families"] if family["ratio"] is not None]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(families) + 1.6), layout="constrained")
    for place, family in enumerate(families):
        ratios = [row["ratio"] for row in document["cases"] if row["family"] == family["family"] and row["ratio"]]
        axes.plot(ratios, [place] * len(ratios), "o", color="tab:blue", alpha=0.35, markersize=4)
        axes.plot([family["ratio"]], [place], "D", color="tab:blue", markersize=7)
        if family["bar"] is not None:
            axes.plot([family["bar"]] * 2, [place - 0.35, place + 0.35], color="tab:red")
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yticks(range(len(families)), [family["family"] for family in families], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("library's time / ours (diamond: geometric mean, red: bar)")
    axes.set_title(title)
    return _saved(pyplot, figure, path)


def _roofline(pyplot: Any, document: Mapping[str, Any], path: Path, title: str) -> Path:
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    by_op: dict[str, list[tuple[float, float]]] = {}
    for row in document["cases"]:
        if row.get("tflops"):
            by_op.setdefault(row["op"], []).append((row["flops"] / row["bytes"], row["tflops"]))
    for op, points in by_op.items():
        axes.plot(*zip(*points, strict=True), "o", markersize=4, label=op)
    peaks = document["peaks"]
    ridge = 1e3 * peaks["matmul_tflops"] / peaks["copy_gbs"]
    every = [intensity for points in by_op.values() for intensity, _ in points] or [ridge]
    low, high = min(*every, ridge) / 2, max(*every, ridge) * 2
    reach = [(x, min(peaks["matmul_tflops"], x * peaks["copy_gbs"] / 1e3)) for x in (low, ridge, high)]
    axes.plot(*zip(*reach, strict=True), color="gray", label="copy bandwidth, bf16 product")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(title)
    axes.legend()
    return _saved(pyplot, figure, path)


def _saved(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path

"""Writes docs/performance.md from the result files: what was measured on GPUs, where, and with which command.

    python -m benchmarks.performance

Nothing in the page's tables is written by hand, and a test holds the page to the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.comparison_report import markdown
from benchmarks.profiling import markdown as profile_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

HEAD = """# Performance

Written by `python -m benchmarks.performance` from the files under `benchmarks/results/`; don't edit it.

Each figure is of one run of `python -m benchmarks.gpu` on the board named. Our kernel and the library's ways are timed
in turns, by the tuner's own protocol: L2 cold, one launch between two events or, where that would be too short, a CUDA
graph over copies of all arrays; medians. A ratio is the library's time over ours, so above 1 we are faster, and each is
taken against what its family's column says:

- *best that computes the same*: the fastest of the library's ways to the very result, its own fused forms included;
- *separate*: the library's product, and the epilogue by elementwise kernels of its own;
- *bare product*: the library's product alone, of bf16 weights.

Where a family is held against another, the best that computes the same has a column too.

"ours" is what a program gets from the tuning database of the run; `measured`, `transferred` and `predicted` say on what
evidence. "default" is the kernel's default configuration, which a program gets where neither a record nor a prediction
is of use. Bars are the project's own goals; "no" is a goal not reached yet. The kernels may have changed since the
revision named: the tables say what was measured, never what is expected.

"The library" is what torch exposes of cuBLAS, cuDNN and its own attentions. Its ways are not all as good as they could
be written:

- torch adds a convolution's bias in a pass of its own, and has cuDNN's fused form for ReLU alone. Where there is none,
  "cuDNN + elementwise" is two passes over the result, and "one elementwise" one.
- int8 products are finished by two elementwise kernels, one of which casts.
- Elementwise kernels of torch on strided halves, on int32 and on a bias along channels reach a tenth to a half of the
  copy's bandwidth: a table of each run says how much. Ratios against them say what torch's user gains, not what a user
  of good elementwise kernels would.
- fp8: "fast accumulation" leaves sums in the tensor cores' 14 bits, ours go to fp32 every 128 products.

Energy is NVML's counter over closed loops of a second. Up to revision 5e77d54 each contender had one, ours first, from
any moment to any other: such figures may be a tenth off, as powers above the board's limit show.

To make such a run: `python -m benchmarks.gpu --trials 16 --minutes 8 --out DIR` tunes in half of the time, compares in
the rest, and ends then. `benchmarks/results/*/records-*.jsonl.gz` has every configuration that was tried, as `autotune
export` has it.

## Not measured

Any other board; a TensorRT engine; whole models; whole spaces (`python -m benchmarks.landscape` had time for samples);
other libraries than torch (FlashAttention-3, cuDNN's graphs, cuBLAS by other ways); torch.compile: its elementwise
kernels, which are among the rivals of later runs than that of revision 5e77d54, and its own products in Triton; what
`nvidia-matmul-heuristics` suggests; a GEMM and an attention in Gluon for sm_90, which are compiled and simulated
(`python -m benchmarks.gluon` measures them); tuning of one problem in 60 s to within 3 % of a whole landscape's best.
"""


def page() -> str:
    """The page as the result files have it."""
    parts = [HEAD]
    for path in sorted(RESULTS.glob("*/gpu.json")):
        document: Mapping[str, Any] = json.loads(path.read_text())
        if document["simulated"]:
            raise ValueError(f"{path} is of a rehearsal: nothing in it was measured")
        plots = "\n".join(
            f"![{title}](../{(path.parent / name).relative_to(ROOT)})"
            for title, name in (("Ratios by family", "ratios.png"), ("Roofline", "roofline.png"))
            if (path.parent / name).exists()
        )
        name = document["device"]["name"]
        parts.append(f"## {name}\n\n`{path.relative_to(ROOT)}`\n\n{plots}\n\n{markdown(document).rstrip()}\n")
        if (path.parent / "profile.json").exists():
            parts.append(_profiled(name, path.parent))
    return "\n".join(parts)


def _profiled(name: str, folder: Path) -> str:
    """What a profile of a board's worst cases showed, and what is thought to follow from it."""
    document: Mapping[str, Any] = json.loads((folder / "profile.json").read_text())
    reasons = folder / "causes.json"
    causes: Mapping[str, str] = json.loads(reasons.read_text()) if reasons.exists() else {}
    where = document["environment"]
    lines = [
        f"## {name}: why what was below its bar was",
        "",
        f"`{(folder / 'profile.json').relative_to(ROOT)}`, by `python -m benchmarks.profiling gpu.json --out DIR`: the "
        f"worst case of each family that was below its bar in the run of {document['of']['started'][:10]}, revision "
        f"{document['of']['revision']}, ours and the way it was held against, one launch each with a cold cache under "
        f"NVIDIA Nsight Compute. Revision {document['revision']}, triton {where['triton']}, driver "
        f"{where['driver']}. Percentages are of the hardware's peaks; SM is the busiest of its parts, issue slots "
        "included; occupancy is of the warps that an SM could hold.",
        "",
        *([document["note"], ""] if "note" in document else []),
        *(f"- *{family}*: {cause}" for family, cause in causes.items()),
        "",
        profile_table(document["cases"]),
    ]
    return "\n".join(lines)


@click.command()
def main() -> None:
    """Writes docs/performance.md from the files under benchmarks/results."""
    PAGE.write_text(page())
    click.echo(f"written to {PAGE}")


if __name__ == "__main__":
    main()

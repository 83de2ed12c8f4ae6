"""What works where: every feature of every op, with the archs it works on, as `docs/kernels.md` shows it.

    python -m tilewright.kernels.support > docs/kernels.md

An op names its features in `Kernel.features`, each with a small problem that has it. The tests run these problems in
the interpreter and compile them for every arch that the table claims.
"""

from __future__ import annotations

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.registry import KERNELS

ARCHS = (75, 80, 86, 89, 90, 100, 120)

HEAD = """\
# What the kernels can do

A mark says that the feature compiles for that arch within its limits, without spills in the default configuration, and
equals its float64 reference in Triton's interpreter; the last column is a problem that has it, as `--problem` takes it.
What is missing raises `UnsupportedError`, which is also a `NotImplementedError`. Written by
`python -m tilewright.kernels.support`; a test holds it to the code.

sm_75 has no tensor-core path in Triton: what is marked there runs on CUDA cores.
"""


def table() -> str:
    """`docs/kernels.md`, in Markdown."""
    lines = [HEAD]
    for kernel in KERNELS:
        lines += [f"## [{kernel.name}]({kernel.name}.md)", ""]
        lines += ["| feature | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " | problem |"]
        lines += ["|---|" + "---|" * (len(ARCHS) + 1)]
        for name, problem in kernel.features.items():
            works = (kernel.supported(problem, resolve_device(f"sm_{arch}")) is None for arch in ARCHS)
            lines.append(f"| {name} | " + " | ".join("✓" if mark else "" for mark in works) + f" | `{problem}` |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), end="")

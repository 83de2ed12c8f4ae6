"""What works where: every feature of every op, with the archs it works on, as `docs/kernels.md` shows it.

    python -m tilewright.kernels.support > docs/kernels.md

An op names its features in `Kernel.features`, each with a small problem that has it, and the configuration if it hangs
on one. The tests run these in the interpreter and compile them for every arch that the table claims.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import KERNELS

ARCHS = (75, 80, 86, 89, 90, 100, 120)

HEAD = """\
# What the kernels can do

A mark says that the feature compiles for that arch within its limits, without spills in the default configuration, and
equals its float64 reference in Triton's interpreter; the last column is a problem that has it, as `--problem` takes it.
What is missing raises `UnsupportedError`, which is also a `NotImplementedError`. Written by
`python -m tilewright.kernels.support`; a test holds it to the code.

A mark in brackets says that it compiles and is right there too, but `autotune` doesn't try it, and some of its tiles
spill: it has no effect on that arch (warp groups are Hopper's), or isn't known to be of use.

sm_75 has no tensor-core path in Triton: what is marked there runs on CUDA cores.
"""


def works(kernel: Kernel[Any, Any], problem: Problem, config: Config | None, device_name: str) -> bool:
    """Whether a device can run the problem, with that configuration if one is named."""
    device = resolve_device(device_name)
    if kernel.supported(problem, device) is not None:
        return False
    return config is None or kernel.space.fits(problem, config, device) is None


def tried(kernel: Kernel[Any, Any], problem: Problem, config: Config | None, device_name: str) -> bool:
    """Whether the space of such a device has every variant that the configuration is: its fields that are true."""
    if config is None or kernel.space.narrow is None:
        return True
    # Of a board with one SM, for which no problem is too small.
    device = replace(resolve_device(device_name), sms=1)
    kept = kernel.space.narrow(problem, device, kernel.space.axes)
    return all(True in kept[name] for name, value in config.to_dict().items() if value is True)


def mark(kernel: Kernel[Any, Any], problem: Problem, config: Config | None, device_name: str) -> str:
    """A cell of the table."""
    if not works(kernel, problem, config, device_name):
        return ""
    # What no space has at all is no matter of the arch.
    somewhere = any(tried(kernel, problem, config, f"sm_{arch}") for arch in ARCHS)
    return "(✓)" if somewhere and not tried(kernel, problem, config, device_name) else "✓"


def table() -> str:
    """`docs/kernels.md`, in Markdown."""
    lines = [HEAD]
    for kernel in KERNELS:
        lines += [f"## [{kernel.name}]({kernel.name}.md)", ""]
        lines += ["| feature | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " | problem |"]
        lines += ["|---|" + "---|" * (len(ARCHS) + 1)]
        for name, problem, config in kernel.feature_cases:
            marks = " | ".join(mark(kernel, problem, config, f"sm_{arch}") for arch in ARCHS)
            lines.append(f"| {name} | {marks} | `{problem}` |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), end="")

"""Builds the models and says what they are like.

    python -m benchmarks.models [--small] [--inputs 24] [NAME ...]

Each is built in a process of its own, so that time and peak memory are its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.models import ARCHITECTURES, architecture, build_ir, samples
from benchmarks.models.figures import figures

COLUMNS = (
    *("model", "nodes", "MB", "built in s", "peak MB", "share", "cosine", "top-1", "least std", "greatest std"),
    *("fp16 max", "fp16 rms"),
)


def measured(name: str, inputs: int, small: bool) -> dict[str, Any]:
    """The figures of one model, in this process. Memory is the process's peak while it was built."""
    known = architecture(name)
    start = time.perf_counter()
    model = build_ir(name, small=small)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    found = figures(model, known.logits, samples(name, inputs, 1, small=small))
    return {"nodes": model.graph.num_nodes(), "size": size / 1e6, "seconds": seconds, "peak": peak} | asdict(found)


def row(name: str, found: dict[str, Any], inputs: int) -> list[str]:
    """A line of the table."""
    return [
        *(name, str(found["nodes"]), f"{found['size']:.1f}", f"{found['seconds']:.1f}", f"{found['peak']:.0f}"),
        *(f"{found['share']:.2f}", f"{found['cosine']:.2f}", f"{found['classes']}/{inputs}"),
        *(f"{found[key][0]:.2f} {found[key][1].split()[0]}" for key in ("quietest", "loudest")),
        *(f"{found[key]:.1e}" for key in ("half", "half_noise")),
    ]


@click.command(help=__doc__)
@click.argument("names", nargs=-1)
@click.option("--small", is_flag=True, help="the small ones, for tests")
@click.option("--inputs", default=24, show_default=True, help="inputs that the figures are of")
@click.option("--raw", is_flag=True, help="of the one model named: JSON, measured in this process")
def main(names: tuple[str, ...], small: bool, inputs: int, raw: bool) -> None:
    """Prints the table."""
    if raw:
        print(json.dumps(measured(names[0], inputs, small)))
        return
    table = Table(*COLUMNS)
    for name in names or [known.name for known in ARCHITECTURES]:
        command = [sys.executable, "-m", "benchmarks.models", name, "--raw", f"--inputs={inputs}"]
        done = subprocess.run(
            [*command, *(["--small"] if small else [])], check=True, stdout=subprocess.PIPE, text=True
        )
        table.add_row(*row(name, json.loads(done.stdout), inputs))
        print(name, done.stdout.strip(), file=sys.stderr)
    Console().print(table)


if __name__ == "__main__":
    main()

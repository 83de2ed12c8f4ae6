"""What the benchmarks share: medians of short calls, the environment, one table and one JSON layout."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.version import installed_version

Row = tuple[str, float]


class Mistake(click.ClickException):
    """Ends a command with one line and status 2, where Click's own error would show the usage too."""

    exit_code = 2


def median_us(call: Callable[[], Any], repeats: int, rounds: int = 9) -> float:
    """Median over rounds of the mean time of a call, in microseconds, after one round that does not count."""
    return statistics.median(rounds_us(call, repeats, rounds))


def rounds_us(call: Callable[[], Any], repeats: int, rounds: int) -> list[float]:
    """The mean time of a call in each round, in microseconds, after one round that does not count."""
    means = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        means.append((time.perf_counter() - start) / repeats * 1e6)
    return means[1:]


def environment() -> dict[str, Any]:
    """Where figures are made: processor, load and versions."""
    models = [line.partition(":")[2].strip() for line in lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "tilewright": installed_version(),
        **{name: version(name) for name in ("triton", "numpy")},
    }


def board_environment(ordinal: int) -> dict[str, Any]:
    """Driver and power limit (W) of a GPU of this machine, by NVML; nothing without it."""
    found: dict[str, Any] = {}
    with contextlib.suppress(ImportError):
        import cupy
        import pynvml

        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            found["driver"] = pynvml.nvmlSystemGetDriverVersion()
            # By the address: NVML's own numbers know nothing of `CUDA_VISIBLE_DEVICES`.
            address = cupy.cuda.runtime.deviceGetPCIBusId(ordinal)
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(address.encode())
            found["power_limit_w"] = pynvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000
    return found


def revision() -> str:
    """The commit of this working tree, with a + where files differ from it; nothing where it is no repository."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=7", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip()


def finish(
    title: str,
    unit: str,
    rows: Sequence[Row],
    json_file: Path | None,
    beside: Mapping[str, Mapping[str, float]] | None = None,
    **more: Any,
) -> None:
    """Prints the table; writes the figures with their environment, and `more`, to `json_file` if there is one. `beside`
    are further columns by their names, of what rows have there."""
    where = environment()
    table = Table(title=title)
    table.add_column("")
    table.add_column(unit, justify="right")
    columns = beside or {}
    for name in columns:
        table.add_column(name, justify="right")
    for label, value in rows:
        more_cells = [f"{of[label]:.2f}" if label in of else "" for of in columns.values()]
        table.add_row(label, f"{value:.2f}", *more_cells)
    console = Console()
    console.print(table)
    console.print(f"{where['cpu']}, {where['cores']} cores; Python {where['python']}, Triton {where['triton']}")
    if json_file is not None:
        columns_too = {name: dict(of) for name, of in columns.items()}
        document = {"environment": where, "unit": unit, "results": dict(rows), **columns_too, **more}
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"written to {json_file}")


def kept(
    names: Sequence[str], key: str, file: Path | None, measure: Callable[[str, Callable[[str], None]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What is measured of each name, which a file keeps under a key from one run to the next.

    Args:
        names: of what is measured, one after the other.
        key: what figures depend on, in words.
        file: JSON, written after each; what it has is not measured again. None: nothing is kept.
        measure: gives the figures of a name, and may tell what it is doing.
    """
    stored: dict[str, dict[str, dict[str, Any]]] = {}
    if file is not None and file.exists():
        stored = json.loads(file.read_text())
    results = stored.setdefault(key, {})
    for name in names:
        if name in results:
            continue
        with Console().status(name) as status:
            results[name] = measure(name, lambda line, name=name: status.update(f"{name}: {line}"))  # type: ignore[misc]
        if file is not None:
            with whole_file(file) as stream:
                stream.write(json.dumps(stored, indent=1).encode() + b"\n")
    return {name: results[name] for name in names}


def lines(path: str) -> list[str]:
    """Lines of a file; none where there is no such file."""
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

"""Why a case is slower than the library: hardware counters of both, by NVIDIA Nsight Compute.

    python -m benchmarks.profiling benchmarks/results/h200/gpu.json --out DIR [--most 2] [--family TEXT]

Of every family of that run which is below its bar (of one without a bar: below 1), the `--most` worst cases are run
once more under `ncu`, ours in the configuration that the run had and the way it was held against, with clocks left
alone and caches flushed before each kernel. `DIR/profile.json` has each kernel's counters, `DIR/profile.md` the table
of them, `DIR/ncu.csv` what ncu wrote.

A kernel's time there is that of one cold launch under a profiler: it says where time goes, not who is faster.

Exit status: 0 done; 1 the profiler failed; 2 called wrongly, no GPU, or no `ncu`.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.cases import FAMILIES, Case, cases
from benchmarks.comparison_report import table
from benchmarks.contenders import OURS, arrays_of, libraries, ours
from benchmarks.measuring import board_environment, environment, revision
from benchmarks.torch_board import TorchBoard
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.registry import find_kernel
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import MissingDependencyError, RunError, TilewrightError, UsageError

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
)
"""What ncu collects: https://docs.nvidia.com/nsight-compute/ProfilingGuide/index.html#sets-and-sections."""

COUNTERS = {
    "dram": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "sm": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "waves": "launch__waves_per_multiprocessor",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
}
"""Our short names of ncu's metrics, in %, but for the counts."""

TIME = "gpu__time_duration.sum"
IN_US = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
STALLED, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
PIPES = "sm__inst_executed_pipe_"

MARK = "spin_kernel"
"""In the name of the kernel that `torch.cuda._sleep` launches: it stands before each contender's kernels."""


class Short(NamedTuple):
    """What a run has below its bar."""

    case: Case
    against: str  # the contender that the ratio is of
    config: Mapping[str, Any]  # that ours ran with


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--device", "device_name", default="cuda:0", show_default=True, help="The GPU.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where results go.")
@click.option("--most", type=click.IntRange(min=1), default=1, show_default=True, help="Cases of a family.")
@click.option("--family", "families", multiple=True, help="Only families whose name holds this text; repeatable.")
@click.option("--child", is_flag=True, hidden=True, help="Run the calls, under the profiler.")
def main(results: Path, device_name: str, out: Path, most: int, families: tuple[str, ...], child: bool) -> None:
    """Profiles what falls short."""
    try:
        run = read_run(results)
        chosen = short_of(run, most, families)
        if child:
            run_calls(device_name, chosen, out / "db")
            return
        device = resolve_device(device_name)
        if not device.live:
            raise UsageError(f"{device_name} is not a GPU of this machine: nothing can be profiled")
        if not chosen:
            raise UsageError(f"{results} has no case below its bar to profile")
        ncu = shutil.which("ncu")
        if ncu is None:
            raise MissingDependencyError("ncu, the profiler, is not on the path: install NVIDIA Nsight Compute")
        out.mkdir(parents=True, exist_ok=True)
        profile(command(ncu, results, device_name, out, most, families), out)
        cases = attributed(chosen, kernels_of(out / "ncu.csv"))
        document = {
            "of": {name: run.get("environment", {}).get(name) for name in ("revision", "started")},
            "device": device.key,
            "environment": environment() | board_environment(int(device.live.rpartition(":")[2])),
            "revision": revision(),
            "cases": cases,
        }
    except TilewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, RunError) else 2)
    with whole_file(out / "profile.json") as stream:
        stream.write((json.dumps(document, indent=1) + "\n").encode())
    text = markdown(cases)
    with whole_file(out / "profile.md") as stream:
        stream.write(text.encode())
    print(text)


def read_run(path: Path) -> dict[str, Any]:
    """A result file of `benchmarks.gpu`.

    Raises:
        UsageError: it is not one.
    """
    try:
        run = json.loads(path.read_text())
        short_of(run, 1)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no result file of `python -m benchmarks.gpu`: {error!r}") from None
    return dict(run)


def short_of(document: Mapping[str, Any], most: int, families: Sequence[str] = ()) -> list[Short]:
    """The worst cases of each family that is below its bar."""
    known = {(case.family.name, case.name): case for case in cases()}
    bars = {family.name: family.bar or 1.0 for family in FAMILIES}
    means = {entry["family"]: entry["ratio"] for entry in document["families"]}
    found = []
    for family, bar in bars.items():
        if (families and not any(text in family for text in families)) or (means.get(family) or bar) >= bar:
            continue
        rows = [
            row
            for row in document["cases"]
            if row["family"] == family and row["ratio"] is not None and (family, row["name"]) in known
        ]
        for row in sorted(rows, key=lambda row: row["ratio"])[:most]:
            found.append(Short(known[family, row["name"]], row["against"], row["chosen"]["config"]))
    return found


def run_calls(device_name: str, chosen: Sequence[Short], db: Path) -> None:
    """Ours and the rival's call of each case between the profiler's start and stop, each behind a `MARK`."""
    device = resolve_device(device_name)
    board = TorchBoard(int(device.live.rpartition(":")[2]), db)
    torch = board.torch
    with torch.cuda.stream(board.gpu.torch_stream), torch.no_grad():
        for case, against, config in chosen:
            theirs = {each.name: each.call for each in libraries(torch, case)}[against]
            own = ours(torch, case, find_kernel(case.op).space.config.from_dict(config)).call
            arrays = arrays_of(torch, case)
            for call in (own, theirs):
                call(arrays)  # compiled, loaded and chosen before the profiler looks
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStart()
                torch.cuda._sleep(1)
                call(arrays)
                torch.cuda.synchronize()
                torch.cuda.cudart().cudaProfilerStop()
            del arrays
            torch.cuda.empty_cache()


def command(
    ncu: str,
    results: Path,
    device_name: str,
    out: Path,
    most: int,
    families: Sequence[str] = (),
) -> list[str]:
    """The profiler's command line. Clocks are left as they are."""
    sections = [word for section in SECTIONS for word in ("--section", section)]
    options = [word for text in families for word in ("--family", text)]
    return [
        *(ncu, "--csv", "--page", "raw", "--log-file", str(out / "ncu.csv"), "--profile-from-start", "off"),
        *("--clock-control", "none", "--cache-control", "all", *sections),
        *(sys.executable, "-m", "benchmarks.profiling", str(results), "--child", "--device", device_name),
        *("--out", str(out), "--most", str(most), *options),
    ]


def profile(words: Sequence[str], out: Path) -> None:
    """Runs the profiler, which writes `ncu.csv`.

    Raises:
        RunError: it failed; with the last line that it or the calls printed.
    """
    (out / "ncu.csv").unlink(missing_ok=True)  # an earlier one's is no result of this
    run = subprocess.run(words, capture_output=True, text=True, check=False)
    printed = out / "ncu.csv"
    said = [*(printed.read_text().splitlines() if printed.exists() else []), *run.stderr.splitlines()]
    if run.returncode or not printed.exists():
        reasons = [line for line in said if "ERROR" in line or "rror:" in line] or said or ["it said nothing"]
        raise RunError(f"ncu failed with exit status {run.returncode}: {reasons[-1].strip()[:300]}")


def kernels_of(path: Path) -> list[dict[str, Any]]:
    """Each profiled kernel's name, µs, counters, busiest pipe and stalls, in the order of their launches.

    Raises:
        RunError: the file has no table of ncu's raw page.
    """
    with path.open(newline="") as stream:
        rows = list(csv.reader(line for line in stream if not line.startswith("==")))
    heads = [at for at, row in enumerate(rows) if row[:1] == ["ID"]]
    if not heads or len(rows) < heads[0] + 2:
        raise RunError(f"{path} has no table of ncu's raw page")
    head, units = rows[heads[0]], rows[heads[0] + 1]
    return [
        _kernel(dict(zip(head, row, strict=True)), dict(zip(head, units, strict=True)))
        for row in rows[heads[0] + 2 :]
        if len(row) == len(head)
    ]


def _kernel(row: Mapping[str, str], units: Mapping[str, str]) -> dict[str, Any]:
    values = {name: value for name in row if (value := _number(row[name])) is not None}
    stalls = {
        name.removeprefix(STALLED).removesuffix(PER_ISSUE): values[name]
        for name in values
        if name.startswith(STALLED) and name.endswith(PER_ISSUE)
    }
    pipes = {
        name.removeprefix(PIPES).partition(".")[0]: values[name]
        for name in values
        if name.startswith(PIPES) and ".pct_of_peak_sustained_active" in name
    }
    return {
        "kernel": row["Kernel Name"],
        "us": values[TIME] * IN_US[units[TIME]] if TIME in values else None,
        **{short: values[name] for short, name in COUNTERS.items() if name in values},
        "pipes": dict(sorted(pipes.items(), key=lambda item: -item[1])[:3]),
        "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])[:3]),
    }


def _number(text: str) -> float | None:
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def attributed(chosen: Sequence[Short], kernels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The cases' kernels, by contender: those between two marks are one call's.

    Raises:
        RunError: there are more or fewer marks than calls.
    """
    calls: list[list[Mapping[str, Any]]] = []
    for kernel in kernels:
        if MARK in kernel["kernel"]:
            calls.append([])
        elif calls:
            calls[-1].append(kernel)
    if len(calls) != 2 * len(chosen):
        raise RunError(f"ncu saw {len(calls)} of {2 * len(chosen)} calls: see ncu.csv")
    pairs = zip(chosen, calls[::2], calls[1::2], strict=True)
    return [
        {
            "family": case.family.name,
            "name": case.name,
            "config": dict(config),
            "contenders": {OURS: list(own), against: list(theirs)},
        }
        for (case, against, config), own, theirs in pairs
    ]


def markdown(profiled: Sequence[Mapping[str, Any]]) -> str:
    """The table of counters."""
    head = [
        "case",
        "of",
        "kernel",
        "µs",
        "DRAM %",
        "L2 %",
        "SM %",
        "tensor cores %",
        "busiest pipes, %",
        "issue %",
        "occupancy %",
    ]
    head += ["registers", "waves", "warps stalled for, per issue"]
    return "\n".join(table(head, _rows(profiled))) + "\n"


def _rows(profiled: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for case in profiled:
        for name, kernels in case["contenders"].items():
            for kernel in kernels:
                counters = [_percent(kernel.get(short)) for short in ("dram", "l2", "sm", "tensor")]
                more = [_percent(kernel.get(short)) for short in ("issue", "occupancy", "registers")]
                waves = kernel.get("waves")
                yield [
                    f"{case['family']}: {case['name']}",
                    name,
                    kernel["kernel"].partition("(")[0][:60],
                    "" if kernel["us"] is None else f"{kernel['us']:.1f}",
                    *counters,
                    ", ".join(f"{pipe} {value:.0f}" for pipe, value in kernel["pipes"].items()),
                    *more,
                    "" if waves is None else f"{waves:.2f}",
                    ", ".join(f"{reason} {value:.1f}" for reason, value in kernel["stalls"].items()),
                ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


if __name__ == "__main__":
    main()

"""Our kernels against the best library at hand, on the GPU at hand, in one run.

    python -m benchmarks.gpu --minutes 8 --out DIR [--device cuda:0] [--family TEXT] [--trials N] [--db DIR]
                              [--note TEXT]

Tunes the cases' problems first if `--trials` is given, in half of the time; then compares, in turns and with a cold L2,
each case's contenders: our kernel as the database knows it, in its default configuration, and the library's ways
(cuBLAS, cuDNN and the attentions of torch). What is reached of the board's own peaks, the host's part of a call, energy
and calls a second are measured in the same run.

`DIR/gpu.json` is written as it goes, and again at the end with `gpu.md` and, where matplotlib is installed, two plots.
A case that has no end in three minutes ends the run, with exit status 1: what there is by then is in both files.
`--rehearse` goes through all of it without a GPU, on times that are made up from the roofline: it says so in every
file, and nothing in them is a measurement.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
from rich.console import Console

from benchmarks.cases import FAMILIES, Case, cases, computes_all, held_against_all
from benchmarks.charts import plots
from benchmarks.comparison_report import geometric_mean, held_to_copy, markdown
from benchmarks.contenders import CHECK, DEFAULT, OURS, Contender
from benchmarks.limits import LIMIT_S, limited
from benchmarks.rehearsal import RehearsalBoard
from benchmarks.torch_board import Timed, TorchBoard
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.tuner import Workload, autotune
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import TilewrightError, UsageError

LOADED = (
    "gemm, large",
    "gemm, M up to 64",
    "gemm + swiglu, 4096 x 14336 x 4096",
    "conv2d, ResNet-50, batch 32",
    "attention, prefill, d128, causal",
    "attention, decode",
)
"""Families whose first case runs in a closed loop, for energy and calls a second."""

DIFFERENT = 0.05
"""Part of the largest result by which two of bf16 or fp8 may be apart: what differs by more competes with nothing."""


class Board(Protocol):
    """What a run is made on: a GPU, or a rehearsal of one."""

    @property
    def device(self) -> Device:
        """The GPU."""

    @property
    def simulated(self) -> bool:
        """Whether its times are made up."""

    def environment(self) -> dict[str, Any]:
        """Where figures are made."""

    def peaks(self) -> dict[str, float]:
        """`copy_gbs` and `matmul_tflops`."""

    def prepare(self, chosen: Sequence[Case], seconds: float) -> int:
        """Compiles what the cases will run, for so long at the most; how many kernels."""

    def chosen(self, case: Case) -> dict[str, Any]:
        """The configuration that our function runs a case with, its provenance and the reason."""

    def contenders(self, case: Case) -> list[Contender]:
        """Who competes."""

    def compare(self, case: Case, contenders: Sequence[Contender]) -> tuple[dict[str, Timed], str]:
        """What came of each, and how they were timed."""

    def dispatch(self) -> list[tuple[str, float]]:
        """Host µs of one call."""

    def load(self, case: Case, contenders: Sequence[Contender]) -> dict[str, dict[str, float]]:
        """Calls a second and energy of each in a closed loop."""

    def clocks(self) -> dict[str, Any]:
        """As `Gpu.clocks`."""


@click.command()
@click.option("--device", "device_name", default="cuda:0", show_default=True, help="The GPU.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=8.0,
    show_default=True,
    help="For the whole run.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where results go.")
@click.option("--family", "families", multiple=True, help="Only families whose name holds this text; repeatable.")
@click.option("--trials", type=click.IntRange(min=0), default=0, help="Tune each problem first, with so many trials.")
@click.option("--db", type=click.Path(file_okay=False, path_type=Path), help="Folder of the tuning databases.")
@click.option("--note", default="", help="What to know of the run, such as how the database was filled: for the page.")
@click.option("--rehearse", is_flag=True, help="Without a GPU, on made-up times of the device that --device names.")
def main(
    device_name: str,
    minutes: float,
    out: Path,
    families: tuple[str, ...],
    trials: int,
    db: Path | None,
    note: str,
    rehearse: bool,
) -> None:
    """Compares our kernels with the library's."""
    start = time.monotonic()
    db = db or out / "db"
    chosen = [case for case in cases() if not families or any(text in case.family.name for text in families)]
    try:
        refuse_another_run(out / "gpu.json")
        if not math.isfinite(minutes):
            raise UsageError(f"--minutes {minutes} must be a finite number")
        if not chosen:
            names = "; ".join(family.name for family in FAMILIES)
            raise UsageError(f"no family has {' or '.join(map(repr, families))} in its name: {names}")
        if trials and not rehearse:
            _tune(device_name, chosen, trials, 30 * minutes, db)
        board: Board = RehearsalBoard(device_name) if rehearse else _board(device_name, db)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{out} can't be made ({error.strerror}): name another folder") from None
    except TilewrightError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run(board, chosen, start + 60 * minutes, out, note)


def refuse_another_run(result: Path) -> None:
    """Does nothing where there is no measured result."""
    try:
        simulated = json.loads(result.read_text())["simulated"]
    except (OSError, ValueError, TypeError, KeyError):
        return
    if not simulated:
        raise UsageError(f"{result.parent} has the results of another run: name another folder, or remove {result}")


def _board(device_name: str, db: Path) -> TorchBoard:
    device = resolve_device(device_name)
    if not device.live:
        raise UsageError(
            f"{device_name} is not a GPU of this machine: nothing can be measured (--rehearse only rehearses)"
        )
    try:
        return TorchBoard(int(device.live.rpartition(":")[2]), db)
    except ImportError as error:
        raise UsageError(f"the libraries to compare with are called through torch: {error}") from None


def _tune(device_name: str, chosen: Sequence[Case], trials: int, timeout_s: float, db: Path) -> None:
    workloads = [Workload(f"{case.family.name}: {case.name}", case.problem) for case in chosen]
    results = autotune(device_name, problems=workloads, trials=trials, timeout=timeout_s, db=db)
    measured = sum(result.time_us is not None for result in results)
    print(f"tuned {measured} of {len(workloads)} problems in {results.elapsed_s:.0f} s", flush=True)


def run(board: Board, chosen: Sequence[Case], deadline: float, out: Path, note: str = "") -> dict[str, Any]:
    """Measures what there is time for; the document that is written, with a note on how our kernels were tuned."""
    console = Console(width=160)
    if board.simulated:
        console.print("[bold]rehearsal:[/bold] no GPU is used and nothing is measured; times are made up")
    device = board.device
    document: dict[str, Any] = {
        "simulated": board.simulated,
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "environment": board.environment(),
        "device": {"key": device.key, "name": device.name, "arch": device.sm, "bandwidth_gbs": device.bandwidth_gbs},
        **({"tuned": note} if note else {}),
        "peaks": {},
        "clocks_before": board.clocks(),
        "dispatch_us": {},
        "cases": [],
        "load": [],
        "errors": [],
    }

    def hung(line: str) -> None:
        document["errors"].append(line)
        _write(document, chosen, out)
        _write_page(document, out)

    # A board too small for the one, or a library without the other, is no reason to measure nothing.
    for name, measure in (("peaks", board.peaks), ("dispatch_us", lambda: dict(board.dispatch()))):
        try:
            with limited(name, LIMIT_S, hung):
                document[name] = measure()
        except Exception as error:  # noqa: BLE001 - as in _compared
            document["errors"].append(f"{name}: {_one_line(error)}")
            console.print(f"no {document['errors'][-1]}")
    began = time.monotonic()
    seconds = max(0.0, deadline - began) / 4
    try:
        with limited("compiling ahead", seconds + LIMIT_S, hung):
            count = board.prepare(chosen, seconds)
    except TilewrightError as error:  # each is compiled in its turn, then
        console.print(f"nothing was compiled ahead: {error}")
    else:
        console.print(f"{count} kernels compiled ahead in {time.monotonic() - began:.0f} s")
    loaded: set[str] = set()
    for case in chosen:
        if time.monotonic() > deadline:
            break
        with limited(f"{case.family.name}: {case.name}", LIMIT_S, hung):
            row = _compared(board, case, document["peaks"])
            document["cases"].append(row)
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3f}"
            best = row["contenders"].get(OURS, {}).get("median_us")
            console.print(f"{case.family.name}: {case.name}: {_us(best)}, {ratio} of {row['against'] or 'nothing'}")
            if case.family.name in LOADED and case.family.name not in loaded and row["ratio"] is not None:
                loaded.add(case.family.name)
                document["load"].append(_loaded(board, case, row))
        _write(document, chosen, out)
    document["clocks_after"] = board.clocks()
    _write(document, chosen, out)
    print(_write_page(document, out))
    for path in plots(document, out):
        console.print(f"written to {path}")
    return document


def _compared(board: Board, case: Case, peaks: Mapping[str, float]) -> dict[str, Any]:
    """One case's row."""
    problem = case.problem
    row: dict[str, Any] = {
        "family": case.family.name,
        "name": case.name,
        "op": case.op,
        "problem": problem.to_dict(),
        "flops": problem.flops(),
        "bytes": problem.bytes_moved(),
        "ratio": None,
        "against": None,
        "best_ratio": None,
        "best": None,
        "contenders": {},
    }
    try:
        row["chosen"] = board.chosen(case)
        contenders = board.contenders(case)
        found, row["method"] = board.compare(case, contenders)
    except Exception as error:  # noqa: BLE001 - one case's failure is a line of the result, never the end of a run
        row["error"] = _one_line(error)
        return row
    roles = {contender.name: contender.role for contender in contenders}
    row["contenders"] = {name: {"role": roles[name], **timed._asdict()} for name, timed in found.items()}
    row["clocks"] = board.clocks()
    ours = found[OURS]
    rate(row, case, roles, found)
    if not ours.error:
        row["tflops"] = problem.flops() / ours.median_us / 1e6
        row["gbs"] = problem.bytes_moved() / ours.median_us / 1e3
        if peaks:
            row["of_copy"] = row["gbs"] / peaks["copy_gbs"]
            row["of_matmul"] = row["tflops"] / peaks["matmul_tflops"]
        default = found.get(DEFAULT)
        if default is not None and not default.error and "error" not in row:
            row["default_ratio"] = ours.median_us / default.median_us
    return row


def rate(row: dict[str, Any], case: Case, roles: Mapping[str, str], found: Mapping[str, Timed]) -> None:
    """Adds to a case's row what ours is held against, and the best of the library's ways to the very result; and an
    error where ours is apart from all that compute it, or from its own default configuration's."""
    ours = found[OURS]
    apart = [
        timed.difference
        for name, timed in found.items()
        if roles[name] != "ours" and not timed.error and timed.difference is not None
    ]
    if not ours.error and apart and not any(difference <= DIFFERENT for difference in apart):
        row["error"] = f"the result differs from every way of the library's, by {min(apart):.2g} of the largest element"
        return
    default = found.get(DEFAULT, Timed(error="none"))
    if not (ours.error or default.error or default.difference is None or default.difference <= DIFFERENT):
        row["error"] = (
            f"the results of two configurations, the chosen and the default, differ by {default.difference:.2g} of the "
            "largest element"
        )
        return
    for name, rated in (("against", case), ("best", held_against_all(case))):
        row[name] = None if ours.error else best_rival(rated, roles, found)
    for name, rival in (("ratio", row["against"]), ("best_ratio", row["best"])):
        row[name] = None if rival is None else found[rival].median_us / ours.median_us


def best_rival(case: Case, roles: Mapping[str, str], found: Mapping[str, Timed]) -> str | None:
    """The fastest contender of the family's role; of `whole`, of those that compute the very function."""
    against = case.family.against
    rivals = [
        name
        for name, timed in found.items()
        if roles[name] not in ("ours", CHECK)
        and not timed.error
        and (timed.difference is None or timed.difference <= DIFFERENT)  # NaN is neither
        and (computes_all(case, roles[name]) if against == "whole" else roles[name] == against)
    ]
    return min(rivals, key=lambda name: found[name].median_us, default=None)


def summary(rows: Sequence[Mapping[str, Any]], left_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Each family's geometric mean, and whether its bars hold: None where a case of it was left out, or could not be
    compared; a case that failed, or whose result of ours is wrong, makes them not hold."""
    found = []
    for family in FAMILIES:
        own = [row for row in rows if row["family"] == family.name]
        ratios = [row["ratio"] for row in own if row["ratio"] is not None]
        if not own:
            continue
        mean = geometric_mean(ratios)
        count = len(own) + sum(label.startswith(f"{family.name}: ") for label in left_out)
        entry: dict[str, Any] = {
            "family": family.name,
            "against": family.against,
            "cases": count,
            "compared": len(ratios),
            "ratio": mean,
            "best_ratio": geometric_mean([row["best_ratio"] for row in own if row["best_ratio"] is not None]),
            "bar": family.bar,
            "met": None,
        }
        held = [] if family.bar is None or mean is None else [mean >= family.bar]
        if family.copy_bar is not None:
            entry["of_copy"] = part = _of_copy(own)
            entry["copy_bar"] = family.copy_bar
            held += [] if part is None else [part >= family.copy_bar]
        failed = any(row.get("error") or row["contenders"].get(OURS, {}).get("error") for row in own)
        if family.bar is not None and failed:
            entry["met"] = False
        elif held and len(ratios) == count:
            entry["met"] = all(held)
        found.append(entry)
    return found


def _of_copy(own: Sequence[Mapping[str, Any]]) -> float | None:
    """The geometric mean of the part of the copy bandwidth, of the cases that are held to it."""
    return geometric_mean([row["of_copy"] for row in own if row.get("of_copy") is not None and held_to_copy(row)])


def _loaded(board: Board, case: Case, row: Mapping[str, Any]) -> dict[str, Any]:
    contenders = {each.name: each for each in board.contenders(case)}
    chosen = [contenders[name] for name in (OURS, row["against"])]
    entry: dict[str, Any] = {"family": case.family.name, "name": case.name}
    try:
        return {**entry, "contenders": board.load(case, chosen)}
    except Exception as error:  # noqa: BLE001 - as in _compared
        return {**entry, "error": _one_line(error)}


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _us(time_us: float | None) -> str:
    return "no time" if not time_us else f"{time_us:.1f} µs"


def _write(document: dict[str, Any], chosen: Sequence[Case], out: Path) -> None:
    """Writes all there is so far: a run that is killed leaves a whole document of the cases that it came to."""
    document["left_out"] = [f"{case.family.name}: {case.name}" for case in chosen[len(document["cases"]) :]]
    document["families"] = summary(document["cases"], document["left_out"])
    with whole_file(out / "gpu.json") as stream:
        stream.write((json.dumps(document, indent=1) + "\n").encode())


def _write_page(document: dict[str, Any], out: Path) -> str:
    """Writes what the document comes to; the text."""
    text = markdown(document)
    with whole_file(out / "gpu.md") as stream:
        stream.write(text.encode())
    return text


if __name__ == "__main__":
    main()

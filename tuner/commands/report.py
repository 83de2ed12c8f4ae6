"""What a run shows: progress while it goes, a table and the next step at its end, or one JSON document."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBars

from tilewright.kernels.device import Device
from tilewright.tuner.commands.output import PlainTable, export_command, new_table
from tilewright.tuner.config_text import short_config
from tilewright.tuner.results import Progress, Result, Results
from tilewright.tuning_db.env import DB_DIR
from tilewright.tuning_db.record import Provenance
from tilewright.tuning_db.text import counted, printable


class ProgressView:
    """Bars on a terminal; elsewhere one plain line for each workload. Writes to `console` alone."""

    def __init__(self, console: Console, quiet: bool, heading: str = "") -> None:
        self._console = console
        self._quiet = quiet
        self._heading = heading  # printed with the first event: a mistake is told before there is one
        self._bars: ProgressBars | None = None

    def __enter__(self) -> Self:
        if not self._quiet and self._console.is_terminal:
            self._bars = ProgressBars(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[best]}"),
                TimeElapsedColumn(),
                console=self._console,
            )
            try:
                self._bars.start()
                self._total = self._bars.add_task("workloads", total=None, best="")
                self._current = self._bars.add_task("", total=None, best="")
            except BaseException:  # Ctrl-C, which no `__exit__` would meet: the cursor is hidden already
                with contextlib.suppress(Exception):  # of bars that were not yet all there
                    self._stop()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bars is not None:
            try:
                self._bars.stop()
            finally:
                self._console.show_cursor(True)  # of a terminal, whatever became of the bars

    def __call__(self, event: Progress) -> None:
        """Show an event of the run."""
        if self._quiet:
            return
        if self._heading:
            self._console.print(self._heading, markup=False, highlight=False, soft_wrap=True)
            self._heading = ""
        if event.waits:
            # Above the bars, where there are some.
            self._console.print(f"{event.workload} waits: {event.waits}", markup=False, highlight=False, soft_wrap=True)
        if self._bars is not None:
            done = event.index + (event.result is not None)
            self._bars.update(self._total, total=event.workloads, completed=done)
            best = f"{event.best_us:.1f} µs" if event.best_us is not None else ""
            self._bars.update(
                self._current,
                description=printable(event.workload),
                total=event.trials,
                completed=min(event.done, event.trials),
                best=best,
            )
        elif event.result is not None:
            position = f"[{event.index + 1}/{event.workloads}]"
            line = f"{position} {event.workload}: {one_line(event.result)}"
            self._console.print(printable(line), markup=False, highlight=False, soft_wrap=True)


def one_line(result: Result) -> str:
    """A result in a line of a log."""
    if result.time_us is None:
        return _failure(result)
    where = "from the cache" if result.cached else counted(result.trials, "trial")
    return f"{result.time_us:.1f} µs {result.provenance}, {short_config(result.config)} ({where})"


def _failure(result: Result) -> str:
    """Why there is no time, and whether that is news."""
    known = " (on record; --retune tries again)" if result.cached else ""
    return f"{result.status}: {result.message}{known}"


def results_table(results: Results) -> PlainTable:
    """The final table of a run; why a workload has no time is in `failure_lines`, for it may be long."""
    numbers = ("time µs", "TFLOP/s", "% of roofline", "registers", "spills", "shared B")
    table = new_table(("workload", "configuration"), numbers, ("provenance",))
    for result in results.results:
        table.add_row(
            result.workload,
            short_config(result.config),
            _number(result.time_us, 1),
            _number(result.tflops, 1),
            _number(None if result.roofline_fraction is None else 100 * result.roofline_fraction, 0),
            _number(result.registers, 0),
            _number(result.spills, 0),
            _number(result.shared_bytes, 0),
            str(result.provenance or result.status),
        )
    return table


def failure_lines(results: Results) -> list[str]:
    """A line beneath the table for each workload without a time: the whole reason."""
    return [f"{result.workload}: {_failure(result)}" for result in results.results if result.time_us is None]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def describe_device(device: Device) -> str:
    """The device of a run, how its numbers will be obtained, and what its owner should know."""
    how = f"live as {device.live}: configurations are measured" if device.live else "not here: times are predicted"
    line = f"{device.name} ({device.board}, {device.sm}, {device.sms} SMs), {how}"
    return f"{line}\nnote: {device.note}" if device.note else line


def closing_lines(results: Results, default_folder: Path | None) -> list[str]:
    """What was done and where it was saved, and what to do next. Programs look in `default_folder` unless told; None
    for nowhere."""
    done = f"{counted(results.compiled, 'kernel')} compiled or found compiled in {results.elapsed_s:.1f} s"
    if results.compiled:
        done += f" ({results.compiled / results.elapsed_s:.1f}/s)"
    if not any(result.trials or result.config for result in results.results):
        return [done]  # the time was up before anything was tried
    lines = [f"{done}; saved in {results.db}"]
    if any(result.provenance is Provenance.PREDICTED for result in results.results):
        lines.append("These times are predicted, not measured: run the same command on the GPU itself to measure.")
    found = [result.op for result in results.results if result.config is not None]
    if found:
        folder = results.db.parent
        told = "" if folder == default_folder else f", once you `{export_command(DB_DIR, folder)}`"
        lines.append(f"Programs find them there{told}: from tilewright.kernels import {found[0]}")
    return lines


def to_json(results: Results) -> str:
    """The `--json` document."""
    device = asdict(results.device)
    device.pop("aliases")
    device["arch"] = results.device.sm
    document = {
        "device": device,
        "db": str(results.db),
        "elapsed_s": results.elapsed_s,
        "compiled": results.compiled,
        "results": [asdict(result) for result in results.results],
    }
    return json.dumps(document, indent=2, allow_nan=False)

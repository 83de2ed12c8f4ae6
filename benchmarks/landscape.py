"""How long every configuration of a problem takes, or a large sample of them, on the GPU at hand.

    python -m benchmarks.landscape --op gemm --problem M=4096,N=4096,K=4096,dtype=bf16 --minutes 8 --out FILE.npz
    python -m benchmarks.landscape --preset hopper --minutes 8 --out DIR
    python -m benchmarks.landscape --workload "bert-base up" --op conv2d --problem N=…,… --minutes 8 --out DIR

Several problems, each with a file of its own, share the time: all are compiled for in parallel on all processors, and
the GPU turns to that problem which has had least of it, for `TURN_S` at a time, for changing over costs a second or
two. The default configuration comes first, then what `--first` names and the best predicted, and then the others in a
random order of `--seed`: when the time is up each file holds a random sample, as large as was reached.

Configurations are compiled, checked and timed by what `autotune` does it with. Less is spent on each, though: the
samples of one take `BUDGET_S`, the correctness gate sees the problem alone and not a ragged one besides, and only what
takes over `HOPELESS` times the least so far is given up after a few samples (`timing.GIVE_UP_SAMPLES`).

Files are saved every `SAVE_S`, at the end, and at Ctrl-C; the same command goes on from there. `docs/landscapes.md`
describes them; `benchmarks.search_quality --space FILE` and `benchmarks.prediction FILE` replay them.

Exit status: 0 done; 1 the run failed; 2 called wrongly, or no GPU; 130 Ctrl-C; 143 terminated.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import platform
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.landscape_file import Landscape, Row, load
from benchmarks.measuring import board_environment, environment
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.lookup import check_supported, prediction_protocol, predictions, record_key
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import find_kernel
from tilewright.tuner.commands.ending import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    EXIT_USAGE,
    TerminatedError,
    exit_with,
    heed_sigterm,
    status_of,
)
from tilewright.tuner.gpu_runner import Effort, GpuRunner
from tilewright.tuner.pool import Pool
from tilewright.tuner.requests import CompileReply
from tilewright.tuner.runner import Compiler, Outcome, is_past
from tilewright.tuner.suites import SUITES, Workload
from tilewright.tuning_db.errors import MissingDependencyError, TilewrightError, UsageError

BUDGET_S = 0.05
"""For the samples of one configuration. A landscape wants many configurations, each to a percent; a tuning run spends
six times as much, to tell the best few apart."""

HOPELESS = 20.0
"""Times the least so far. What is slower is timed by a few samples: nobody asks how slow exactly."""

FIRST = 16
"""Best predicted configurations that are measured before all others."""

TURN_S = 15.0
"""Of the GPU for one problem. Changing over takes 0.3 to 2.4 s for inputs and reference of the preset's problems (one
core of a Xeon), and the copies to the GPU."""

WINDOW = 128
"""Configurations of each problem that are compiled ahead: about a turn's worth. More would be compiled in vain when the
time is up."""

LEAST_READY = 8
"""Compiled configurations that are worth changing over for."""

SAVE_S = 20.0

POLL_S = 1.0
"""Between two looks at the clock while the compilers are waited for."""

OF_SUITES = {workload.name: workload for workload in SUITES["all"]}

PRESETS: dict[str, tuple[Workload, ...]] = {
    # Of each kind of bottleneck one: large, skinny and fused GEMM, wide and narrow convolution, prefill and decode.
    "hopper": (
        Workload("gemm bf16 4096", GemmProblem(M=4096, N=4096, K=4096, dtype="bf16", b_layout="col")),
        Workload("gemm bf16 skinny 8192", GemmProblem(M=8, N=8192, K=8192, dtype="bf16", b_layout="col")),
        OF_SUITES["bert-base up"],
        OF_SUITES["resnet50 layer1.0.conv2 3x3 64-64 56x56, batch 32"],
        OF_SUITES["resnet50 layer3.1.conv2 3x3 256-256 14x14, batch 32"],
        OF_SUITES["llama3-8b attention, prefill 2048"],
        OF_SUITES["llama3-8b attention, decode, 16384 keys"],
    ),
}


class Survey:
    """One problem on its way: which configurations are still to come, which are being compiled, and the landscape."""

    def __init__(self, landscape: Landscape, path: Path, sample: int | None, named: Sequence[Config] = ()) -> None:
        self.landscape = landscape
        self.path = path
        self.spent_s = 0.0  # of the GPU
        self.unsaved = False
        kernel, problem, device = landscape.kernel, landscape.problem, landscape.device
        self._predicted = {config: each for each, config in predictions(kernel, problem, device)}
        default = kernel.default(problem, device)
        every = list(dict.fromkeys((*self._predicted, default)))
        landscape.size = len(every)
        best = sorted(self._predicted, key=lambda config: self._predicted[config].order)[:FIRST]
        self._first = dict.fromkeys((default, *named, *best))
        drawn = [every[at] for at in np.random.default_rng(landscape.seed).permutation(len(every))]
        # What is named need not be listed, as long as it can run; it is behind all that may be drawn.
        others = [config for config in named if config not in self._predicted and config != default]
        for config in others:
            kernel.space.check(problem, config, device)
        self._places = {config: place for place, config in enumerate((*drawn, *others))}
        order = list(dict.fromkeys((*self._first, *drawn)))[:sample]
        self._queue = deque(config for config in order if config not in landscape.rows)
        self._window: dict[Config, Future[CompileReply]] = {}

    @property
    def wanted(self) -> int:
        """Configurations that are measured in the end, those of earlier runs included."""
        return len(self.landscape.rows) + self.left

    @property
    def left(self) -> int:
        """Configurations to come."""
        return len(self._queue) + len(self._window)

    @property
    def compiling(self) -> list[Future[CompileReply]]:
        """What has been asked of the compilers and not answered."""
        return [future for future in self._window.values() if not future.done()]

    @property
    def ready(self) -> list[Config]:
        """What the compilers have answered, in the order of the queue."""
        return [config for config, future in self._window.items() if future.done()]

    def fill(self, compiler: Compiler, most: int = WINDOW) -> None:
        """Has configurations compiled ahead."""
        while self._queue and len(self._window) < most:
            config = self._queue.popleft()
            self._window[config] = compiler.submit(self.landscape.kernel, self.landscape.problem, config)

    def take(self, runner: GpuRunner, until: float) -> Iterator[Outcome]:
        """Measures what is compiled, up to a time of `time.monotonic`, and puts it into the landscape."""
        landscape = self.landscape
        for config, outcome in runner.run(landscape.kernel, landscape.problem, self.ready, until):
            del self._window[config]
            predicted_us = self._predicted[config].time_us if config in self._predicted else float("nan")
            landscape.rows[config] = Row(outcome, predicted_us, self._places[config], config in self._first)
            self.unsaved = True
            yield outcome

    def save(self) -> None:
        """Writes the file, unless it is as it should be."""
        if self.unsaved:
            self.landscape.save(self.path)
            self.unsaved = False


def measure(
    surveys: Sequence[Survey], compiler: Compiler, runner: GpuRunner, deadline: float | None, tick: Callable[[], None]
) -> None:
    """Measures until all is done or the time is up, and calls `tick` after each outcome and while it waits."""
    for most in (FIRST, WINDOW):  # of every problem the first, before many of any
        for survey in surveys:
            survey.fill(compiler, most)
    while not is_past(deadline):
        unfinished = [survey for survey in surveys if survey.left]
        if not unfinished:
            return
        able = [survey for survey in unfinished if len(survey.ready) >= min(LEAST_READY, survey.left)]
        if not able:
            wait([future for survey in unfinished for future in survey.compiling], POLL_S, FIRST_COMPLETED)
            tick()
            continue
        survey = min(able, key=lambda each: each.spent_s)
        start = time.monotonic()
        turn = start + TURN_S if deadline is None else min(start + TURN_S, deadline)
        while survey.ready and not is_past(turn):
            for _ in survey.take(runner, turn):
                tick()
            survey.fill(compiler)
        survey.spent_s += time.monotonic() - start


class Saver:
    """Saves the files from time to time, and says on stdout how far the run is."""

    def __init__(self, surveys: Sequence[Survey], minutes: float | None, start: float) -> None:
        self._surveys = surveys
        self._limit = "" if minutes is None else f" of {60 * minutes:.0f}"
        self._start = self._latest = start
        self._before = sum(len(survey.landscape.rows) for survey in surveys)

    def __call__(self) -> None:
        """To be called often."""
        now = time.monotonic()
        if now - self._latest < SAVE_S:
            return
        self._latest = now
        self.save()
        done = sum(len(survey.landscape.rows) for survey in self._surveys) - self._before
        spent = now - self._start
        each = "; ".join(map(_reached, self._surveys))
        print(f"{spent:4.0f}{self._limit} s: {done} measured, {done / spent:.1f}/s: {each}", flush=True)

    def save(self) -> None:
        """Saves now."""
        for survey in self._surveys:
            survey.save()


def _reached(survey: Survey) -> str:
    best = survey.landscape.best_us
    return f"{len(survey.landscape.rows)}/{survey.wanted}" + ("" if best is None else f" {best:.1f} µs")


def prepare(
    workload: Workload,
    device: Device,
    path: Path,
    effort: Effort,
    seed: int,
    sample: int | None,
    where: dict[str, Any],
    named: Sequence[Config] = (),
) -> Survey:
    """The survey of one problem, which goes on from the file if there is one. What is `named` is measured first.

    Raises:
        UsageError: the device can't run the problem or what is named, or the file is another landscape's.
    """
    kernel = find_kernel(workload.op)
    check_supported(kernel, workload.problem, device)
    landscape = Landscape(
        workload=workload.name,
        key=record_key(kernel, workload.problem, device),
        device=device,
        space=prediction_protocol(kernel),
        effort=effort,
        seed=seed,
        size=0,
        environments=[where],
    )
    if path.exists():
        there = load(path)
        objection = landscape.objection(there)
        if objection is not None:
            raise UsageError(f"{path} is another landscape: {objection}; name another file, or move this one away")
        landscape.rows = there.rows
        landscape.environments = [*there.environments, where]
    return Survey(landscape, path, sample, named)


def chosen_workloads(
    ops: Sequence[str], problems: Sequence[str], names: Sequence[str], presets: Sequence[str]
) -> list[Workload]:
    """What the options ask for, each problem once.

    Raises:
        UsageError: ops and problems don't pair up, nothing is chosen, or there is no such name.
    """
    if len(ops) > 1 and len(ops) != len(problems):
        raise UsageError(f"{len(problems)} problems need one --op for all, or one each, not {len(ops)}")
    if ops and not problems:
        raise UsageError(f"--op {ops[0]} needs a --problem")
    chosen = [workload for preset in presets for workload in PRESETS[preset]]
    for name in names:
        if name not in OF_SUITES:
            near = difflib.get_close_matches(name, OF_SUITES, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"no workload is named {name!r}{hint} (`autotune suites` lists them)")
        chosen.append(OF_SUITES[name])
    of_problems = list(ops) * len(problems) if len(ops) == 1 else list(ops) or ["gemm"] * len(problems)
    for op, text in zip(of_problems, problems, strict=True):
        problem = find_kernel(op).problem.parse(text)
        chosen.append(Workload(f"{op} {problem}", problem))
    if not chosen:
        raise UsageError("nothing to measure: name --problem, --workload or --preset")
    return list({workload.problem: workload for workload in reversed(chosen)}.values())[::-1]


def named_configs(path: Path | None) -> dict[Problem, list[Config]]:
    """The configurations of a file that is a list of `{"op": …, "problem": {…}, "configs": [{…}, …]}`, by problem.

    Raises:
        UsageError: it is no such file.
    """
    if path is None:
        return {}
    found: dict[Problem, list[Config]] = {}
    try:
        for entry in json.loads(path.read_bytes()):
            kernel = find_kernel(entry["op"])
            configs = [kernel.space.config.from_dict(each) for each in entry["configs"]]
            found[kernel.problem.from_dict(entry["problem"])] = configs
    except TilewrightError as error:
        raise UsageError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UsageError(f"{path} is no list of configurations: {error!r}") from None
    return found


def files(workloads: Sequence[Workload], device: Device, out: Path) -> list[Path]:
    """The file of each workload: `out` itself, if that is one, for a single workload; else in the folder `out`.

    Raises:
        UsageError: there is no such folder to write to.
    """
    if out.suffix == ".npz":
        if len(workloads) > 1:
            raise UsageError(f"{len(workloads)} problems have a file each: --out {out} must be a folder")
        if not out.parent.is_dir():
            raise UsageError(f"{out} can't be written: there is no folder {out.parent}")
        return [out]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {out} can't be made: {error.strerror}") from None
    slugs = [re.sub(r"[^a-z0-9.]+", "-", workload.name.lower()).strip("-") for workload in workloads]
    return [out / f"{slug}__{device.key}.npz" for slug in slugs]


def run(surveys: Sequence[Survey], device: Device, jobs: int, effort: Effort, saver: Saver, end: float | None) -> None:
    """Starts the processes, measures, and saves whatever happens.

    Raises:
        RunError: no process can be started, or none that has the GPU.
    """
    try:
        with Pool(jobs) as pool:
            compiler = Compiler(pool, device)
            with contextlib.closing(GpuRunner(compiler, device, effort=effort)) as runner:
                measure(surveys, compiler, runner, end, saver)
    finally:
        # A second signal must not cut the saving short.
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        saver.save()
        for number, handler in before.items():
            signal.signal(number, handler)


def summary(surveys: Sequence[Survey]) -> tuple[Table, dict[str, Any]]:
    """What the files hold."""
    table = Table(title="landscapes")
    for heading in ("workload", "of all", "measured", "worked", "best µs", "default / best", "GPU s", "file"):
        table.add_column(heading, justify="left" if heading in ("workload", "file") else "right", overflow="fold")
    results: dict[str, Any] = {}
    for survey in surveys:
        landscape = survey.landscape
        times_us, best_us = landscape.times_us, landscape.best_us
        default_us = times_us.get(landscape.kernel.default(landscape.problem, landscape.device))
        one = {
            "size": landscape.size,
            "measured": len(landscape.rows),
            "worked": len(times_us),
            "best_us": best_us,
            "default_us": default_us,
            "gpu_s": survey.spent_s,
            "file": survey.path.name,
        }
        results[landscape.workload] = one
        ratio = f"{default_us / best_us:.2f}" if default_us is not None and best_us is not None else "-"
        counts = [str(one[name]) for name in ("size", "measured", "worked")]
        best = "-" if best_us is None else f"{best_us:.2f}"
        table.add_row(landscape.workload, *counts, best, ratio, f"{survey.spent_s:.0f}", survey.path.name)
    return table, results


@click.command()
@click.option("--op", "ops", multiple=True, help="Of the problems: one for all, or one each; gemm if left out.")
@click.option("--problem", "problems", multiple=True, help="As M=4096,N=4096,K=4096,dtype=bf16; repeatable.")
@click.option("--workload", "names", multiple=True, help="A workload of the suites by its name; repeatable.")
@click.option("--preset", "presets", multiple=True, type=click.Choice(list(PRESETS)), help="A list of workloads.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A file *.npz, or a folder for several.")
@click.option("--device", "device_name", default="cuda:0", show_default=True, help="The GPU.")
@click.option("--sample", type=click.IntRange(min=1), help="At most so many configurations of each problem.")
@click.option(
    "--first",
    "first_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Configurations to measure before the others, as benchmarks.heuristics writes them.",
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="For all together; no limit if left out.")
@click.option("--jobs", type=click.IntRange(min=1), help="Compiling processes; by default one per processor but one.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the random order.")
@click.option("--check/--no-check", default=True, show_default=True, help="Whether results are checked.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the summary."
)
def command(
    ops: tuple[str, ...],
    problems: tuple[str, ...],
    names: tuple[str, ...],
    presets: tuple[str, ...],
    out: Path,
    device_name: str,
    sample: int | None,
    first_file: Path | None,
    minutes: float | None,
    jobs: int | None,
    seed: int,
    check: bool,
    json_file: Path | None,
) -> None:
    """Measures landscapes on the GPU at hand."""
    start = time.monotonic()
    device = resolve_device(device_name)
    if not device.live:
        raise MissingDependencyError(f"landscapes are measured, and {device.board} is not here: no GPU, nothing to do")
    if json_file is not None and not json_file.parent.is_dir():
        raise UsageError(f"{json_file} can't be written: there is no folder {json_file.parent}")
    workloads = chosen_workloads(ops, problems, names, presets)
    named = named_configs(first_file)
    effort = Effort(check=check, ragged=False, clearly_slower=HOPELESS, budget_s=BUDGET_S)
    where = {
        **environment(),
        **board_environment(int(device.live.rpartition(":")[2])),
        "gpu": device.name,
        "source": device.source,
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    surveys = [
        prepare(workload, device, path, effort, seed, sample, where, named.get(workload.problem, ()))
        for workload, path in zip(workloads, files(workloads, device, out), strict=True)
    ]
    # The process with the GPU needs a processor to itself: what queues samples must not wait.
    jobs = jobs or max(1, len(os.sched_getaffinity(0)) - 1)
    for survey in surveys:
        landscape = survey.landscape
        size = f"{landscape.size} configurations, {len(landscape.rows)} on file"
        print(f"{landscape.workload}: {size}, {survey.left} to come, {survey.path}", flush=True)
    end = None if minutes is None else start + 60 * minutes
    run(surveys, device, jobs, effort, Saver(surveys, minutes, start), end)
    table, results = summary(surveys)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps({"environment": where, "results": results}, indent=2) + "\n")
        console.print(f"written to {json_file}", markup=False)


def main() -> None:
    """Entry point: every error of ours is one line on stderr."""
    heed_sigterm()
    try:
        command.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        exit_with(
            "interrupted: what was measured is in the files, the same command goes on from there", EXIT_INTERRUPTED
        )
    except TerminatedError:
        exit_with("terminated: what was measured is in the files, the same command goes on from there", EXIT_TERMINATED)
    except click.ClickException as error:
        exit_with(f"error: {error.format_message()}", EXIT_USAGE)
    except MissingDependencyError as error:
        exit_with(f"error: {error}", EXIT_USAGE)  # a GPU, for all that is measured
    except TilewrightError as error:
        exit_with(f"error: {error}", status_of(error))


if __name__ == "__main__":
    main()

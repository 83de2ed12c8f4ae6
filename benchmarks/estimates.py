"""How near a kernel's `estimate` comes to the compiler: registers, spills and shared memory of random configurations.

    python -m benchmarks.estimates [--device sm_86 …] [--kernel OP …] [--suite NAME …] [--configs 30] [--seed 0]
                                   [--jobs N] [--list] [--json FILE]

The estimate decides which configurations are ranked high enough to be compiled, and `docs/prediction.md` has what this
printed. Of each kernel on each device, `--configs` configurations are drawn from the whole space and as many from the
best tenth of its ranking, where a search looks; the workload of each draw is drawn from the suites. Then they are
compiled, as the tuner does:

- registers: the median of the estimate over the compiler's, and how many estimates are within a quarter of it. What
  spills is left out: its registers say nothing.
- spills: of configurations that spill, how many were foreseen; and of those foreseen, how many don't.
- shared memory: how many estimates are the very number of bytes, and how many are below it. One that is below lets a
  configuration through that may not fit.

`--list` names every configuration whose spill or shared memory was not foreseen, and every one that failed.
"""

from __future__ import annotations

import json
import os
import random
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.measuring import Mistake, environment, revision
from tilewright.kernels.compile import ptxas_version
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.kernel import Kernel
from tilewright.kernels.lookup import check_supported, predictions
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.registry import KERNELS, find_kernel
from tilewright.tuner.pool import Pool
from tilewright.tuner.runner import Compiler
from tilewright.tuner.suites import find_suite
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import TilewrightError, UnsupportedError
from tilewright.tuning_db.record import Resources, Status

POPULATIONS = ("whole space", "best tenth")
BEST = 0.1
NEAR = 0.25
WIDTH = 125


@dataclass(frozen=True, slots=True)
class Draw:
    """A configuration of a problem on a device, and the part of its space that it was drawn from."""

    device: Device
    kernel: Kernel[Any, Any]
    population: str
    problem: Problem
    config: Config

    def is_of(self, kernel: Kernel[Any, Any], population: str, device: Device | None = None) -> bool:
        """Whether it is one of a row of the table, or of that kernel on any device."""
        return (
            self.kernel is kernel
            and self.population == population
            and (device is None or self.device.key == device.key)
        )


@dataclass(frozen=True, slots=True)
class Compared:
    """What was estimated of a configuration, and what the compiler reported."""

    estimated: Resources
    compiled: Resources

    @property
    def registers(self) -> float | None:
        """The estimate over the compiler's; None of what spills."""
        return None if self.spills else self.estimated.registers / self.compiled.registers

    @property
    def spills(self) -> bool:
        """Whether it spills."""
        return bool(self.compiled.spill_bytes)

    @property
    def foreseen(self) -> bool:
        """Whether it was estimated to spill."""
        return bool(self.estimated.spill_bytes)

    @property
    def too_little_shared(self) -> bool:
        """Whether it takes more shared memory than was estimated."""
        return self.estimated.shared_bytes < self.compiled.shared_bytes


@dataclass(frozen=True, slots=True)
class Summary:
    """Of some configurations that compiled: counts, and the median of registers estimated over compiled."""

    compiled: int
    registers: float | None
    registers_counted: int
    registers_near: int
    spills: int
    spills_foreseen: int
    foreseen: int
    shared_equal: int
    shared_below: int

    @classmethod
    def of(cls, compared: Iterable[Compared]) -> Summary:
        """The figures of these."""
        found = list(compared)
        ratios = [ratio for each in found if (ratio := each.registers) is not None]
        equal = sum(each.estimated.shared_bytes == each.compiled.shared_bytes for each in found)
        return cls(
            compiled=len(found),
            registers=statistics.median(ratios) if ratios else None,
            registers_counted=len(ratios),
            registers_near=sum(1 - NEAR <= ratio <= 1 + NEAR for ratio in ratios),
            spills=sum(each.spills for each in found),
            spills_foreseen=sum(each.spills and each.foreseen for each in found),
            foreseen=sum(each.foreseen for each in found),
            shared_equal=equal,
            shared_below=sum(each.too_little_shared for each in found),
        )

    def cells(self) -> list[str]:
        """What tables show."""
        return [
            str(self.compiled),
            "-" if self.registers is None else f"{self.registers:.2f}",
            f"{self.registers_near} of {self.registers_counted}",
            f"{self.spills_foreseen} of {self.spills}",
            f"{self.foreseen - self.spills_foreseen} of {self.foreseen}",
            str(self.shared_equal),
            str(self.shared_below),
        ]


HEADINGS = ("compiled", "registers", "within 25 %", "spills foreseen", "none after all", "shared equal", "below")


def draws(
    kernel: Kernel[Any, Any], device: Device, problems: Sequence[Problem], count: int, seed: int
) -> Iterator[Draw]:
    """`count` draws from each population, the same for the same seed; of a problem again only if there are fewer."""
    chance = random.Random(f"{kernel.name} {device.key} {seed}")
    order = chance.sample(list(problems), len(problems))
    for place, problem in enumerate(order[:count]):
        # Each problem's space is ranked once: that takes seconds where there are thousands of configurations.
        times = len(range(place, count, len(order)))
        ranked = [config for _, config in sorted(predictions(kernel, problem, device), key=lambda pair: pair[0].order)]
        best = ranked[: max(times, round(BEST * len(ranked)))]
        for population, configs in zip(POPULATIONS, (ranked, best), strict=True):
            for config in chance.sample(configs, min(times, len(configs))):
                yield Draw(device, kernel, population, problem, config)


def problems_of(kernel: Kernel[Any, Any], device: Device, suites: Sequence[str]) -> list[Problem]:
    """The problems of a kernel in the suites, each once, that the device can run."""
    found: dict[Problem, None] = {}
    for workload in (workload for name in suites for workload in find_suite(name)):
        if workload.op != kernel.name:
            continue
        try:
            check_supported(kernel, workload.problem, device)
        except UnsupportedError:
            continue
        found[workload.problem] = None
    return list(found)


def compare(drawn: Sequence[Draw], jobs: int) -> Iterator[tuple[Draw, Compared | str]]:
    """What became of each, in order: figures, or why there are none."""
    with Pool(jobs) as pool:
        compilers = {draw.device.key: Compiler(pool, draw.device) for draw in drawn}
        futures = [compilers[draw.device.key].submit(draw.kernel, draw.problem, draw.config) for draw in drawn]
        for draw, future in zip(drawn, futures, strict=True):
            reply = future.result()
            if reply["status"] == Status.OK:
                estimated = draw.kernel.estimate(draw.problem, draw.config, draw.device)
                yield draw, Compared(estimated, Resources(**reply["resources"]))
            else:
                yield draw, f"{reply['status']}: {reply.get('message', '')}"


def markdown(document: Mapping[str, Any]) -> str:
    """The table of `docs/prediction.md`, of what `--json` wrote."""
    lines = [f"| kernel | drawn from | {' | '.join(HEADINGS)} |", f"|{'---|' * (2 + len(HEADINGS))}"]
    for result in document["together"]:
        cells = Summary(**result["summary"]).cells()
        lines.append(f"| {result['kernel']} | {result['population']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(of_row: Sequence[Compared | str]) -> dict[str, Any]:
    compared = [each for each in of_row if isinstance(each, Compared)]
    return {"failed": len(of_row) - len(compared), "summary": asdict(Summary.of(compared))}


def _remark(each: Compared | str) -> str:
    """What is wrong with an estimate, for `--list`; "" if nothing is."""
    if isinstance(each, str):
        return each
    remarks = []
    if each.spills and not each.foreseen:
        remarks.append(f"spills {each.compiled.spill_bytes} B, {each.estimated.registers} registers estimated")
    if each.too_little_shared:
        remarks.append(f"shared {each.compiled.shared_bytes} B, {each.estimated.shared_bytes} B estimated")
    return "; ".join(remarks)


@click.command()
@click.option("--device", "devices", multiple=True, default=("sm_80", "sm_86", "sm_90"), help="Repeatable.")
@click.option("--kernel", "kernels", multiple=True, help="Repeatable; all by default.")
@click.option("--suite", "suites", multiple=True, default=("all",), help="What problems are drawn from; repeatable.")
@click.option("--configs", default=30, show_default=True, type=click.IntRange(1), help="Draws from each population.")
@click.option("--seed", default=0, show_default=True, help="Of the draws.")
@click.option("--jobs", type=click.IntRange(1), help="Compiling processes; by default one per processor.")
@click.option("--list", "listed", is_flag=True, help="Name what was not foreseen.")
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures.")
def main(
    devices: tuple[str, ...],
    kernels: tuple[str, ...],
    suites: tuple[str, ...],
    configs: int,
    seed: int,
    jobs: int | None,
    listed: bool,
    file: Path | None,
) -> None:
    """Compares estimates with what compilers report."""
    try:
        targets = [resolve_device(name) for name in devices]
        chosen = [find_kernel(name) for name in kernels] or list(KERNELS)
        spaces = [(kernel, target, problems_of(kernel, target, suites)) for target in targets for kernel in chosen]
    except TilewrightError as error:
        raise Mistake(str(error)) from None
    console = Console()
    if console.width < WIDTH:  # a table that is cut says nothing
        console = Console(width=WIDTH)
    where = {**environment(), "ptxas": {target.sm: ptxas_version(target.arch) for target in targets}}
    drawn = [
        draw
        for kernel, target, problems in track(spaces, "ranking", console=Console(stderr=True), transient=True)
        for draw in draws(kernel, target, problems, configs, seed)
    ]
    found: list[tuple[Draw, Compared | str]] = []
    of_jobs = compare(drawn, jobs or len(os.sched_getaffinity(0)))
    for each in track(of_jobs, "compiling", total=len(drawn), console=Console(stderr=True), transient=True):
        found.append(each)

    results = [
        {"kernel": kernel.name, "device": target.board, "population": population, **_row(of_row)}
        for kernel in chosen
        for population in POPULATIONS
        for target in targets
        if (of_row := [what for draw, what in found if draw.is_of(kernel, population, target)])
    ]
    together = [
        {"kernel": kernel.name, "population": population, **_row(of_row)}
        for kernel in chosen
        for population in POPULATIONS
        if (of_row := [what for draw, what in found if draw.is_of(kernel, population)])
    ]
    table = Table(title="estimates beside the compiler")
    for heading in ("kernel", "device", "drawn from"):
        table.add_column(heading)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in results:
        table.add_row(row["kernel"], row["device"], row["population"], *Summary(**row["summary"]).cells())
    console.print(table)
    console.print(f"Triton {where['triton']}, ptxas {', '.join(sorted(set(where['ptxas'].values())))}")
    failed = sum(row["failed"] for row in results)
    if failed:
        console.print(f"{failed} of {len(found)} have no figures, as they didn't compile in time or at all (--list)")
    if listed:
        for draw, what in found:
            if remark := _remark(what):
                line = f"{draw.device.sm} {draw.kernel.name} {draw.problem} {draw.config}: {remark}"
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    if file is not None:
        document = {"environment": where, "revision": revision(), "seed": seed, "suites": list(suites)}
        document |= {"results": results, "together": together}
        with whole_file(file) as stream:
            stream.write((json.dumps(document, indent=1) + "\n").encode())
        console.print(f"written to {file}")


if __name__ == "__main__":
    main()

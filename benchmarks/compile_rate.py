"""How many configurations a second are compiled, with one worker, with two, and with one per core.

    python -m benchmarks.compile_rate [--configs 24] [--device sm_86] [--rounds 3] [--json FILE]

Every round compiles the same list of distinct GEMM configurations with a Triton cache folder of its own, so nothing
is compiled already; its workers are started, and have compiled one kernel, before its clock runs. Rounds of the
different numbers of jobs take turns, so that what else the machine does falls on all alike, and the ratio is the
median of the ratios within a turn.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import tempfile
import time
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import environment, lines
from tilewright.kernels.compile import ptxas_version
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.gemm.launch import GEMM
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.tuner.pool import Pool
from tilewright.tuner.requests import CompileRequest
from tilewright.tuning_db.env import compiling_environment
from tilewright.tuning_db.errors import UnknownDeviceError

PROBLEM = GemmProblem(M=2048, N=4096, K=4096, bias="fp16", activation="gelu_tanh")
WARM_UP = GemmProblem(M=16, N=16, K=16)
TIMEOUT = 120.0  # of one compilation, in seconds


def compile_requests(device: Device, count: int) -> list[CompileRequest]:
    """`count` distinct configurations of PROBLEM on the device, drawn at random with a fixed seed."""
    # GROUP_M changes the order of the tiles and next to nothing in the code: one of each other choice. What is sure to
    # spill takes ten times as long, and no search would come to it.
    promising = dict.fromkeys(
        replace(config, GROUP_M=8)
        for config in GEMM.space.configs(PROBLEM, device)
        if not GEMM.estimate(PROBLEM, config, device).spill_bytes
    )
    chosen = random.Random(0).sample(list(promising), min(count, len(promising)))
    return [compile_request(PROBLEM, config.to_dict(), device) for config in chosen]


def compile_request(problem: GemmProblem, config: dict[str, Any], device: Device) -> CompileRequest:
    """What a worker is asked."""
    return {"do": "compile", "op": GEMM.name, "problem": problem.to_dict(), "config": config, "arch": device.arch}


def run_round(jobs: int, requests: list[CompileRequest], warm_up: CompileRequest) -> dict[str, Any]:
    """Compiles all requests with `jobs` workers.

    `busy_seconds` sums what the workers took for each; `others` is how many cores the rest of the machine kept busy
    meanwhile, without which a ratio can't be judged.
    """
    began, cpu = time.perf_counter(), others_cpu_seconds()
    with tempfile.TemporaryDirectory(prefix="compile-rate-") as cache:
        environment = {**compiling_environment(), "TRITON_CACHE_DIR": cache}
        with Pool(jobs, environment=environment) as pool:
            pool.start()
            # One each, and not the same: it would be in the cache.
            stages = [{**warm_up["config"], "num_stages": 1 + index} for index in range(jobs)]
            for future in [pool.submit({**warm_up, "config": config}, TIMEOUT) for config in stages]:
                future.result()
            start = time.perf_counter()
            replies = [future.result() for future in as_completed([pool.submit(each, TIMEOUT) for each in requests])]
            seconds = time.perf_counter() - start
            if pool.starts != jobs:
                raise click.ClickException(f"{pool.starts} processes were started for {jobs} jobs")
    others = (others_cpu_seconds() - cpu) / (time.perf_counter() - began)
    failed = [reply for reply in replies if reply["status"] != "ok"]
    if failed:
        raise click.ClickException(f"{len(failed)} configurations failed, such as: {failed[0]}")
    busy = sum(reply["seconds"] for reply in replies)
    rate = len(replies) / seconds
    return {"jobs": jobs, "seconds": seconds, "busy_seconds": busy, "per_second": rate, "others": others}


def others_cpu_seconds() -> float:
    """CPU time since boot of all processes but this one and its ended children; 0 where /proc doesn't tell."""
    ticks = next((list(map(int, line.split()[1:9])) for line in lines("/proc/stat") if line.startswith("cpu ")), [])
    if not ticks:
        return 0.0
    idle = ticks[3] + ticks[4]
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - own


@click.command()
@click.option("--configs", default=24, show_default=True, help="Distinct configurations to compile in a round.")
@click.option("--device", "device_name", default="sm_86", show_default=True, help="What to compile for.")
@click.option("--rounds", default=3, show_default=True, help="Rounds of each number of jobs.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the figures."
)
def main(configs: int, device_name: str, rounds: int, json_file: Path | None) -> None:
    """Measures the compile rate by number of worker processes."""
    try:
        device = resolve_device(device_name)
    except UnknownDeviceError as error:
        raise click.UsageError(str(error)) from None
    requests = compile_requests(device, configs)
    warm_up = compile_request(WARM_UP, GEMM.default(WARM_UP, device).to_dict(), device)
    where = {**environment(), "ptxas": ptxas_version(device.arch)}
    jobs = sorted({1, 2, where["cores"]})
    turns = [[run_round(each, requests, warm_up) for each in jobs] for _ in range(rounds)]

    rows = []
    for index, each in enumerate(jobs):
        mine = [turn[index] for turn in turns]
        rows.append(
            {
                "jobs": each,
                "per_second": statistics.median(one["per_second"] for one in mine),
                "seconds": statistics.median(one["seconds"] for one in mine),
                "ratio": statistics.median(turn[index]["per_second"] / turn[0]["per_second"] for turn in turns),
                "others": statistics.median(one["others"] for one in mine),
            }
        )
    console = Console()
    table = Table(title=f"{len(requests)} configurations of gemm for {device.sm}, median of {rounds} rounds")
    for heading in ("jobs", "configurations/s", "seconds", "ratio", "cores busy otherwise"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = (row[name] for name in ("per_second", "seconds", "ratio", "others"))
        table.add_row(str(row["jobs"]), *(f"{number:.2f}" for number in numbers))
    console.print(table)
    console.print(f"{where['cpu']}, {where['cores']} cores; Triton {where['triton']}, ptxas {where['ptxas']}")
    if json_file is not None:
        document = {
            "environment": where,
            "device": device.board,
            "configs": len(requests),
            "results": rows,
            "turns": turns,
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n")
        console.print(f"written to {json_file}")


if __name__ == "__main__":
    main()

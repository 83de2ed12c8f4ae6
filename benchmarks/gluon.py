"""Kernels in Gluon beside our portable ones and the library's, on the sm_90 GPU at hand: is Gluon worth a kernel there?

    python -m benchmarks.gluon --out DIR [--op gemm|attention] [--device cuda:0] [--minutes 4] [--db DIR]

Goes through the cases of `benchmarks.gpu` that `benchmarks.gluon_gemm` and `benchmarks.gluon_attention` compute, by
each of their configurations here, and times all in turns, once the kernels have been compiled in parallel, for half of
the time at the most. `DIR/gluon.json` and `DIR/gluon.md` are written after every
case. One that has no end in three minutes, as of kernels that wait at barriers for ever, ends the run with exit status
1: what there is by then is in both files. `--rehearse` makes times up.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.cases import FEW, GELU, LARGE, PREFILL, PREFILL_OTHER, UP, Case, cases, held_against_all
from benchmarks.comparison_report import geometric_mean, table
from benchmarks.contenders import OURS, Call, Contender
from benchmarks.gluon_ahead import compile_ahead, jobs_of
from benchmarks.gluon_attention import GluonAttentionConfig, gluon_attention
from benchmarks.gluon_gemm import GluonGemmConfig, gluon_gemm
from benchmarks.gpu import Board, best_rival, refuse_another_run
from benchmarks.limits import LIMIT_S, limited
from benchmarks.rehearsal import RehearsalBoard
from benchmarks.torch_board import Timed, TorchBoard
from tilewright.kernels.activations import activation_name
from tilewright.kernels.device import Device
from tilewright.kernels.devices import resolve_device
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Problem
from tilewright.tuning_db import env
from tilewright.tuning_db.atomic import whole_file
from tilewright.tuning_db.errors import TilewrightError, UsageError

ARCH = 90

GEMM_CONFIGS = (
    GluonGemmConfig(),
    GluonGemmConfig(STAGES=6, PIECES=2),
    GluonGemmConfig(BLOCK_M=64, BLOCK_N=256, STAGES=4, PIECES=2),
    GluonGemmConfig(BLOCK_M=64, STAGES=7),
    GluonGemmConfig(STAGES=4, PIECES=2, COOPERATIVE=True),
    GluonGemmConfig(BLOCK_M=64, BLOCK_N=256, STAGES=4, PIECES=2, COOPERATIVE=True),
)
"""What is tried of every product: both ways of sharing the work out, with tiles that leave room for stages."""

ATTENTION_CONFIGS = (
    GluonAttentionConfig(),
    GluonAttentionConfig(GROUP_H=1),
    GluonAttentionConfig(GROUP_H=32),
    GluonAttentionConfig(STAGES=4),
    GluonAttentionConfig(BLOCK_N=64, STAGES=4),
)
"""What is tried of every attention whose heads leave room for it."""

APART = 0.01
"""Part of our largest result by which another may be apart: of bf16 five roundings."""


@click.command()
@click.option("--device", "device_name", default="cuda:0", show_default=True, help="The GPU, of sm_90.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=4.0, show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where results go.")
@click.option("--db", type=click.Path(file_okay=False, path_type=Path), help="Folder of the tuning databases.")
@click.option("--op", type=click.Choice(["gemm", "attention"]), help="Only the cases of this op.")
@click.option("--rehearse", is_flag=True, help="Without a GPU, on made-up times of the device that --device names.")
def main(device_name: str, minutes: float, out: Path, db: Path | None, op: str | None, rehearse: bool) -> None:
    """Compares a GEMM and an attention in Gluon with the portable ones and the library's."""
    deadline = time.monotonic() + 60 * minutes
    try:
        if not math.isfinite(minutes):
            raise UsageError(f"--minutes {minutes} must be a finite number")
        refuse_another_run(out / "gluon.json")
        board: Board = RehearsalBoard(device_name) if rehearse else _board(device_name, db or env.database_dir())
        if board.device.arch != ARCH:
            raise UsageError(f"{device_name} is {board.device.sm}, and the kernel is of sm_{ARCH}: name such a GPU")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"{out} can't be made ({error.strerror}): name another folder") from None
    except (TilewrightError, ImportError) as error:
        raise click.UsageError(str(error)) from None
    run(board, deadline, out, chosen_cases(op))


def _board(device_name: str, db: Path) -> TorchBoard:
    device = resolve_device(device_name)
    if not device.live:
        raise UsageError(f"{device_name} is not a GPU of this machine: nothing can be measured (--rehearse rehearses)")
    return TorchBoard(int(device.live.rpartition(":")[2]), db)


def chosen_cases(op: str | None = None) -> list[Case]:
    """The cases that the kernels compute, of all ops or one."""
    families = (LARGE, FEW, GELU, UP, PREFILL, PREFILL_OTHER)
    return [case for case in cases() if case.family in families and op in (None, case.op)]


def run(board: Board, deadline: float, out: Path, chosen: Sequence[Case]) -> dict[str, Any]:
    """Measures what there is time for; the document that is written."""
    document: dict[str, Any] = {
        "simulated": board.simulated,
        "command": shlex.join(["python", "-m", "benchmarks.gluon", *sys.argv[1:]]),
        "environment": board.environment(),
        "device": {"key": board.device.key, "name": board.device.name, "arch": board.device.sm},
        "clocks_before": board.clocks(),
        "cases": [],
        "left_out": [],
        "errors": [],
    }

    def hung(line: str) -> None:
        document["errors"].append(line)
        document["left_out"] += [f"{case.family.name}: {case.name}" for case in chosen[len(document["cases"]) :]]
        _write(document, out)

    seconds = max(0.0, deadline - time.monotonic()) / 4
    with limited("compiling ahead", 2 * seconds + LIMIT_S, hung):
        _compile_ahead(board, chosen, seconds)
    for case in chosen:
        if time.monotonic() > deadline:
            document["left_out"].append(f"{case.family.name}: {case.name}")
            continue
        with limited(f"{case.family.name}: {case.name}", LIMIT_S, hung):
            ours, *library = (each for each in board.contenders(case) if each.name == OURS or each.role != "ours")
            found, method = board.compare(case, [ours, *contenders(case, board.device), *library])
            document["cases"].append(rated(case, library, found) | {"method": method, "clocks": board.clocks()})
        _write(document, out)
    _write(document, out)
    print(markdown(document))
    return document


def _compile_ahead(board: Board, chosen: Sequence[Case], seconds: float) -> None:
    """Ours, and then those in Gluon, each for so many seconds at the most: what isn't is compiled in its turn."""
    with contextlib.suppress(TilewrightError):
        print(f"{board.prepare(chosen, seconds)} kernels of ours compiled ahead", flush=True)
    if not board.simulated:
        jobs = jobs_of([(case, configs(case, board.device)) for case in chosen], board.device.arch)
        print(f"{compile_ahead(jobs, seconds)} of {len(jobs)} kernels in Gluon compiled ahead", flush=True)


def configs(case: Case, device: Device) -> Sequence[GluonGemmConfig | GluonAttentionConfig]:
    """What is tried of a case: all that the device has the shared memory for."""
    problem = case.problem
    if isinstance(problem, AttentionProblem):
        return [each for each in ATTENTION_CONFIGS if each.shared_bytes(problem.D) <= device.shared_per_block]
    return GEMM_CONFIGS


def contenders(case: Case, device: Device) -> list[Contender]:
    """The kernel in Gluon by each of its configurations."""
    return [Contender(label(each), "ours", _call(case.problem, each, device.sms)) for each in configs(case, device)]


def _call(problem: Problem, config: GluonGemmConfig | GluonAttentionConfig, sms: int) -> Call:
    if isinstance(config, GluonAttentionConfig):
        assert isinstance(problem, AttentionProblem)
        return _attention(problem, config, sms)
    assert isinstance(problem, GemmProblem)
    return _gemm(problem, config, sms)


def _gemm(problem: GemmProblem, config: GluonGemmConfig, sms: int) -> Call:
    name = activation_name(problem.activation)
    return lambda arrays: gluon_gemm(arrays["a"], arrays["w"], arrays.get("bias"), name, config, sms)


def _attention(problem: AttentionProblem, config: GluonAttentionConfig, sms: int) -> Call:
    return lambda arrays: gluon_attention(arrays["q"], arrays["k"], arrays["v"], problem.causal, config, sms)


def label(config: GluonGemmConfig | GluonAttentionConfig) -> str:
    """A configuration in the table."""
    if isinstance(config, GluonAttentionConfig):
        return f"Gluon, {config.BLOCK_N} keys, {config.STAGES} stages, {config.GROUP_H} heads in turns"
    way = "cooperative" if config.COOPERATIVE else "ping-pong"
    size = f"{config.rows}x{config.BLOCK_N}x{config.BLOCK_K}"
    return f"Gluon, {way}, {size}, {config.STAGES} stages, {config.PIECES} pieces"


def rated(case: Case, library: Sequence[Contender], found: Mapping[str, Timed]) -> dict[str, Any]:
    """A case's row: the best of Gluon's that computes what ours does, beside ours and the library's best."""
    roles = {each.name: each.role for each in library}
    ours, rivals = found[OURS], {name: found[name] for name in roles}
    gluon = {name: _checked(timed, ours) for name, timed in found.items() if name != OURS and name not in roles}
    right = {name: timed.median_us for name, timed in gluon.items() if not timed.error}
    best = min(right, key=lambda name: right[name], default=None)
    rival = best_rival(held_against_all(case), roles, rivals)
    return {
        "family": case.family.name,
        "name": case.name,
        "problem": case.problem.to_dict(),
        "best": best,
        "library": rival,
        "of_library": None if best is None or rival is None else found[rival].median_us / right[best],
        "of_ours": None if best is None or ours.error else ours.median_us / right[best],
        "contenders": {name: timed._asdict() for name, timed in {OURS: ours, **gluon, **rivals}.items()},
    }


def _checked(timed: Timed, ours: Timed) -> Timed:
    """As it is where its result is ours; else without times."""
    if timed.error or (timed.difference is not None and timed.difference <= APART):  # NaN is neither
        return timed
    if ours.error:
        return Timed(error="there is no result of ours to hold it against")
    return Timed(error=f"the result differs from ours by {timed.difference} of the largest element")


def markdown(document: Mapping[str, Any]) -> str:
    """The rows, and what failed."""
    rows = document["cases"]
    lines = []
    if document["simulated"]:
        lines += ["**Rehearsal: nothing here was measured.** Times are made up to try the benchmark without a GPU.", ""]
    lines += [f"{document['device']['name']} ({document['device']['key']}); `{document['command']}`", ""]
    head = ["family", "case", "ours, µs", "Gluon, µs", "of ours", "library, µs", "of the library's", "configuration"]
    lines += table(head, map(_cells, rows))
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        means = [geometric_mean([row[key] for row in own if row[key]]) for key in ("of_ours", "of_library")]
        said = [f"{mean:.3f} of {whose}" for mean, whose in zip(means, ("ours", "the library's"), strict=True) if mean]
        lines += [
            "",
            f"{family}: {', '.join(said) or 'nothing compared'} (geometric mean of their times over Gluon's).",
        ]
    failures = {
        f"{name}: {timed['error']}": None for row in rows for name, timed in row["contenders"].items() if timed["error"]
    }
    lines += ["", *(f"- {failure}" for failure in failures)]
    if document.get("errors"):
        lines += ["", f"Not measured: {'; '.join(document['errors'])}."]
    if document["left_out"]:
        lines += ["", f"Left out for want of time: {'; '.join(document['left_out'])}."]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    def us(name: str | None) -> str:
        timed = row["contenders"].get(name, {"error": "nothing"})
        return "-" if timed["error"] else f"{timed['median_us']:.1f}"

    ratios = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("of_ours", "of_library")]
    library = f"{row['library']} {us(row['library'])}" if row["library"] else "-"
    return [row["family"], row["name"], us(OURS), us(row["best"]), ratios[0], library, ratios[1], row["best"] or "-"]


def _write(document: Mapping[str, Any], out: Path) -> None:
    for name, text in (("gluon.json", json.dumps(document, indent=1) + "\n"), ("gluon.md", markdown(document))):
        with whole_file(out / name) as stream:
            stream.write(text.encode())


if __name__ == "__main__":
    main()

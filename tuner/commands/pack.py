"""`autotune pack`: the best configurations of a device and their compiled kernels in one file."""

from __future__ import annotations

import os
from pathlib import Path

import click

from tilewright.tuner.commands.db import folder_to_read
from tilewright.tuner.commands.options import (
    Asked,
    Command,
    calls_option,
    db_option,
    jobs_option,
    json_option,
)
from tilewright.tuner.commands.output import export_command, print_json, say
from tilewright.tuning_db.errors import UsageError
from tilewright.tuning_db.text import counted


@click.command(cls=Command, short_help="Compile what programs run into one file.")
@click.option("--device", required=True, metavar="NAME", help="As for autotune itself.")
@click.option("--output", required=True, metavar="FILE", help="The pack to write.")
@click.option("--kernel", "kernels", multiple=True, metavar="OP", help="Only problems of this op; repeatable.")
@click.option(
    "--problem",
    "problems",
    multiple=True,
    metavar="KEY=VALUE,…",
    help="A problem to pack; repeatable. By default, all that was tuned here for the device.",
)
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="A suite to pack; repeatable.")
@calls_option
@click.option(
    "--constant",
    "constants",
    multiple=True,
    metavar="NAME=NUMBER",
    help="A number compiled in that is not the default, as eps=1e-5; repeatable.",
)
@jobs_option
@db_option
@json_option
def pack(
    device: str,
    output: str,
    kernels: tuple[str, ...],
    problems: tuple[str, ...],
    suites: tuple[str, ...],
    calls: tuple[str, ...],
    constants: tuple[str, ...],
    jobs: int | None,
    db: str | None,
    as_json: bool,
) -> None:
    """Compile what programs on a device will run, and write it with its configurations to one file.

    A program uses it where TILEWRIGHT_PACK names it; with TILEWRIGHT_FROZEN=1 it uses nothing else.
    """
    from tilewright.kernels.devices import resolve_device
    from tilewright.tuner.packing import build_pack
    from tilewright.tuning_db.env import FROZEN, PACK
    from tilewright.tuning_db.shipping import refuse_database

    if output == "-" or _is_stdout(Path(output)):
        raise UsageError(f"a pack is a file that programs open by its name: --output can't be stdout ({output})")
    refuse_database(Path(output))
    target, folder = resolve_device(device), folder_to_read(db)
    values = _constants(constants)
    chosen = Asked(kernels, problems, suites, calls).workloads()
    packed = build_pack(target, output, kernels=kernels, problems=chosen, constants=values, jobs=jobs, db=folder)
    if as_json:
        print_json(
            {
                "path": str(packed.path),
                "device": packed.device,
                "sha256": packed.sha256,
                "bytes": packed.bytes,
                "kernels": packed.kernels,
                "problems": [
                    {"op": entry.op, "problem": entry.problem, "config": entry.config}
                    | {"provenance": entry.provenance, "reason": entry.reason, "time_us": entry.time_us}
                    for entry in packed.entries
                ],
            }
        )
        return
    counts = ", ".join(f"{count} {provenance}" for provenance, count in packed.counts().items() if count)
    size = f"{packed.bytes / 2**20:.1f} MiB"
    problems_of, kernels_of = counted(len(packed.entries), "problem"), counted(packed.kernels, "kernel")
    click.echo(f"{output}: {problems_of} of {packed.device} ({counts}), {kernels_of}, {size}")
    click.echo(f"SHA-256 {packed.sha256}")
    say(f"Programs use it once you `{export_command(PACK, Path(output))}`, and nothing else with {FROZEN}=1")


def _is_stdout(path: Path) -> bool:
    """Whether a path is what this process prints to, as /dev/stdout is: what it says of the pack would be lost."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False  # one of them isn't there


def _constants(texts: tuple[str, ...]) -> dict[str, list[float]]:
    values: dict[str, list[float]] = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            values.setdefault(name.strip().upper(), []).append(float(number))
        except ValueError:
            raise UsageError(f"--constant {text!r} is not NAME=NUMBER, as in eps=1e-5") from None
    return values

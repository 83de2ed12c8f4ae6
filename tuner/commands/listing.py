"""Commands that list: `autotune devices`, `autotune suites`, `autotune show`."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from tilewright.tuner.commands.db import folder_to_read, warn_of_no_shipped_folder
from tilewright.tuner.commands.options import Command, db_option, json_option
from tilewright.tuner.commands.output import new_table, print_json, print_table, say
from tilewright.tuning_db.errors import UsageError

if TYPE_CHECKING:
    from tilewright.kernels.device import Device
    from tilewright.tuning_db.record import Key, Record


@click.command(cls=Command, short_help="List the boards, and the GPUs here.")
@json_option
def devices(as_json: bool) -> None:
    """List the boards that can be named, and the GPUs that are here."""
    from tilewright.kernels.catalogue import CATALOGUE, REFERENCE_BOARDS
    from tilewright.kernels.live import live_devices

    if as_json:
        listed = (*live_devices(), *CATALOGUE)
        reference = {device.key for device in CATALOGUE if REFERENCE_BOARDS.get(device.arch) == device.board}
        print_json({"devices": [_device_fields(device) | {"reference": device.key in reference} for device in listed]})
        return
    numbers = ("SMs", "boost MHz", "GB/s", "L2 MiB", "shared/block KiB", "fp16 TFLOP/s")
    table = new_table(("board", "arch", "name"), numbers, ("note",))
    notes: dict[str, list[str]] = {}
    for device in (*live_devices(), *CATALOGUE):
        remarks = [device.live] if device.live else []
        if not device.live and REFERENCE_BOARDS.get(device.arch) == device.board:
            remarks.append(f"reference board of {device.sm}")
        if device.note:
            notes.setdefault(device.note, []).append(device.board)
        table.add_row(
            device.board,
            device.sm,
            device.name,
            str(device.sms),
            str(device.boost_mhz),
            f"{device.bandwidth_gbs:.0f}",
            f"{device.l2_bytes / 2**20:g}",
            f"{device.shared_per_block / 2**10:g}",
            f"{device.tflops('fp16'):g}",
            "; ".join(remarks),
        )
    print_table(table)
    for note, boards in notes.items():
        click.echo(f"{', '.join(boards)}: {note}")


def _device_fields(device: Device) -> dict[str, Any]:
    fields = asdict(device)
    fields.pop("aliases")
    return {**fields, "arch": device.sm, "key": device.key}


@click.command(cls=Command, short_help="List the suites of workloads.")
@json_option
def suites(as_json: bool) -> None:
    """List the suites that can be named, and how many workloads of each op they have."""
    from tilewright.tuner.suites import SUITES

    if as_json:
        print_json(
            {
                "suites": [
                    {"suite": name, "workloads": len(workloads), "ops": Counter(each.op for each in workloads)}
                    for name, workloads in SUITES.items()
                ]
            }
        )
        return
    ops = list(dict.fromkeys(workload.op for workload in SUITES["all"]))
    table = new_table(("suite",), ("workloads", *ops))
    for name, workloads in SUITES.items():
        counts = [sum(workload.op == op for workload in workloads) for op in ops]
        table.add_row(name, str(len(workloads)), *(str(count or "") for count in counts))
    print_table(table)


@click.command(cls=Command, short_help="Show the best results of a device.")
@click.option("--device", required=True, metavar="NAME", help="As for autotune itself.")
@db_option
@json_option
def show(device: str, db: str | None, as_json: bool) -> None:
    """Show what is on record for a device, tuned here or shipped: the best result of every problem by each kernel
    revision, toolchain and protocol. Revisions are hashes of the kernel's code, `this` is the one that runs here."""

    from tilewright.kernels.devices import resolve_device
    from tilewright.tuning_db.store import TuningDB

    target = resolve_device(device)
    folder = folder_to_read(db)
    warn_of_no_shipped_folder()
    table = new_table(
        ("op", "problem", "configuration"), ("time µs",), ("provenance", "revision", "triton", "from", "when")
    )
    counts = []
    document: list[dict[str, Any]] = []
    with ExitStack() as stack:
        databases = [("here", stack.enter_context(TuningDB.open(target.key, folder, read_only=True)))]
        shipped = TuningDB.open_shipped(target.key)
        if shipped is not None:
            databases.append(("shipped", stack.enter_context(shipped)))
        for place, database in databases:
            database.refuse_other_devices()
            records = database.best_of_each()
            document.append(
                {
                    "path": str(database.path),
                    "shipped": place == "shipped",
                    "results": [_record_fields(record) for record in records],
                }
            )
            for record in records:
                assert record.times is not None
                table.add_row(
                    record.key.op,
                    _problem_text(record.key.op, record.key.problem),
                    _config_text(record.key.op, record.config),
                    f"{record.times.median_us:.1f}",
                    str(record.provenance),
                    _revision_text(record.key),
                    record.key.triton,
                    place,
                    record.created_at[:19],
                )
            counts.append(f"{len(records)} {'results on record' if place == 'here' else 'shipped'} in {database.path}")
    if as_json:
        print_json({"device": target.key, "databases": document})
        return
    if table.row_count:
        print_table(table)
    say(", ".join(counts))


def _record_fields(record: Record) -> dict[str, Any]:
    key, times = record.key, record.times
    assert times is not None
    return {
        "op": key.op,
        "problem": key.problem,
        "config": record.config,
        "time_us": times.median_us,
        "provenance": str(record.provenance),
        "kernel_hash": key.kernel_hash,
        "current": _is_of_this_code(key),
        "triton": key.triton,
        "ptxas": key.ptxas,
        "protocol": key.protocol,
        "created_at": record.created_at,
    }


def _revision_text(key: Key) -> str:
    return "this" if _is_of_this_code(key) else key.kernel_hash[:8]


def _is_of_this_code(key: Key) -> bool:
    from tilewright.kernels.lookup import code_hash
    from tilewright.kernels.registry import find_kernel

    try:
        return key.kernel_hash == code_hash(find_kernel(key.op))
    except UsageError:
        return False  # of an op that is gone


def _problem_text(op: str, problem: str) -> str:
    from tilewright.kernels.registry import find_kernel

    try:
        return str(find_kernel(op).problem.from_json(problem))
    except UsageError:
        return problem  # of a revision with other fields


def _config_text(op: str, config: str) -> str:
    from tilewright.kernels.registry import find_kernel
    from tilewright.tuner.config_text import short_config
    from tilewright.tuning_db.record import read_json

    try:
        return short_config(find_kernel(op).space.config.from_json(config).to_dict())
    except UsageError:  # of a revision with other fields
        pass
    try:
        fields: Any = read_json(config)
    except ValueError:
        fields = None
    return short_config(fields) if isinstance(fields, dict) else config  # which `db check` finds

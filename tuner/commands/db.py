"""Commands that look after the database files: `autotune db path`, `stats`, `check`, `prune`."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click

from tilewright.tuner.commands.ending import EXIT_FAILED, EXIT_USAGE
from tilewright.tuner.commands.options import Group, WholeNumber, db_option, json_option
from tilewright.tuner.commands.output import new_table, print_json, print_table, say
from tilewright.tuning_db.errors import DatabaseAccessError, DatabaseError, UsageError
from tilewright.tuning_db.file import open_file, path_for
from tilewright.tuning_db.snapshot import open_snapshot
from tilewright.tuning_db.upkeep import Overview

_device = click.option("--device", metavar="NAME", help="As for autotune itself; by default every database there is.")


@click.group(cls=Group, invoke_without_command=True, short_help="Look after the tuning databases.")
@click.pass_context
def db(context: click.Context) -> None:
    """Look after the tuning databases."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(EXIT_USAGE)


def folder_to_read(named: str | None) -> Path:
    """The folder of the databases, for a command that makes none: one that was named is there.

    Raises:
        UsageError: it is not, or is no folder; or as `database_dir`.
    """
    from tilewright.tuning_db.env import database_dir

    where = database_dir(named)
    if where.exists() and not where.is_dir():
        raise UsageError(f"{where} is a file: name the folder it is in (--db)")
    if named is not None and not where.exists():
        raise UsageError(f"--db {named} is not there: name the folder of the databases")
    return where


def _paths(device: str | None, folder: str | None) -> list[Path]:
    """The file of a device, or every file there is, in `folder_to_read`."""
    where = folder_to_read(folder)
    if device is None:
        return sorted(where.glob("*.sqlite"))
    from tilewright.kernels.devices import resolve_device

    return [path_for(resolve_device(device).key, where)]


def warn_of_no_shipped_folder() -> None:
    """Says that there are no shipped records where what was named for them is not a folder."""
    from tilewright.tuning_db.env import no_shipped_folder

    if (reason := no_shipped_folder()) is not None:
        say(f"autotune: warning: {reason}")


def _own_and_shipped(device: str | None, folder: str | None) -> tuple[list[Path], list[Path]]:
    """The user's file of a device, and the shipped one, where they are there; or every one. None twice, should `folder`
    be that of the shipped ones.

    Raises:
        DatabaseAccessError: the device has neither.
        UsageError: as `folder_to_read`.
    """
    from tilewright.tuning_db.shipped_records import shipped_paths

    warn_of_no_shipped_folder()
    own = _paths(device, folder)
    names, resolved = {path.name for path in own}, {path.resolve() for path in own}
    shipped = [p for p in shipped_paths() if p.resolve() not in resolved and (device is None or p.name in names)]
    there = [path for path in own if path.exists() or path.is_symlink()]  # one that leads nowhere is told of
    if device is not None and not there and not shipped:
        raise DatabaseAccessError(f"there is no {own[0]}: tune that device first, or name its folder (--db)")
    return there, shipped


@db.command(short_help="Print the folder, or the file of a device.")
@_device
@db_option
def path(device: str | None, db: str | None) -> None:
    """Print the folder of the databases, or the file of a device, whether or not it is there."""
    from tilewright.kernels.devices import resolve_device
    from tilewright.tuning_db.env import database_dir

    folder = database_dir(db)
    found = folder if device is None else path_for(resolve_device(device).key, folder)
    click.echo(os.fsencode(found))  # its very bytes, of which some may be no text


@db.command(short_help="Show what the databases hold.")
@_device
@db_option
@json_option
@click.pass_context
def stats(context: click.Context, device: str | None, db: str | None, as_json: bool) -> None:
    """Show what the databases hold, shipped ones too: records by status and provenance, revisions of kernels and
    toolchain, size."""
    from tilewright.tuning_db.env import database_dir
    from tilewright.tuning_db.upkeep import overview

    own, shipped = _own_and_shipped(device, db)
    views, unreadable = [], 0
    for path in (*own, *shipped):
        try:
            views.append(overview(path))
        except DatabaseError as error:
            say(f"autotune: error: {error}")
            unreadable += 1
    if as_json:
        databases = [{**_fields(view), "shipped": view.path in shipped} for view in views]
        print_json({"folder": str(database_dir(db)), "databases": databases})
    elif views:
        numbers = ("records", "ok", "measured", "predicted", "problems", "revisions", "runs", "MiB")
        table = new_table(("database",), numbers, ("newest",))
        for view in views:
            counts = (
                sum(view.counts.values()),
                sum(count for (status, _), count in view.counts.items() if status == "ok"),
                sum(count for (_, provenance), count in view.counts.items() if provenance == "measured"),
                sum(count for (_, provenance), count in view.counts.items() if provenance == "predicted"),
                view.problems,
                len(view.revisions),
                view.runs,
            )
            size = f"{view.bytes / 2**20:.1f}"
            name = view.path.name + (" (shipped)" if view.path in shipped else "")
            table.add_row(name, *map(str, counts), size, (view.newest or "-")[:19])
        print_table(table)
    if not as_json:
        count = sum(view.path in shipped for view in views)
        more = f", and {count} shipped in {shipped[0].parent}" if count else ""
        say(f"databases in {database_dir(db)}: {len(views) - count}{more}")
    if unreadable:
        context.exit(EXIT_USAGE)


def _fields(view: Overview) -> dict[str, Any]:
    return {
        "path": str(view.path),
        "devices": view.devices,
        "bytes": view.bytes,
        "records": view.records,
        "problems": view.problems,
        "runs": view.runs,
        "oldest": view.oldest,
        "newest": view.newest,
        "counts": [
            {"status": status, "provenance": provenance, "records": count}
            for (status, provenance), count in view.counts.items()
        ],
        "revisions": [{**asdict(revision), "records": count} for revision, count in view.revisions.items()],
    }


@db.command(short_help="Check every page and record.")
@_device
@db_option
@json_option
@click.pass_context
def check(context: click.Context, device: str | None, db: str | None, as_json: bool) -> None:
    """Check database files, shipped ones too, page by page and record by record, without changing them; exit status 1
    for a finding."""
    from tilewright.tuner.installation import objection
    from tilewright.tuning_db import upkeep
    from tilewright.tuning_db.env import database_dir

    document = []
    own, shipped = _own_and_shipped(device, db)
    for path in (*own, *shipped):
        try:
            findings = upkeep.check(path, objection)
        except DatabaseError as error:
            findings = [str(error)]
        document.append({"path": str(path), "ok": not findings, "findings": findings})
        if not as_json:
            for line in findings or ["ok"]:
                click.echo(f"{path}: {line.removeprefix(f'{path}: ')}")
    if as_json:
        print_json({"databases": document})
    elif not own:
        say(f"there is no database in {database_dir(db)}" + (": only what was shipped was checked" if document else ""))
    if any(not each["ok"] for each in document):
        context.exit(EXIT_FAILED)


@db.command(short_help="Remove what nothing asks for any more.")
@click.option("--device", required=True, metavar="NAME", help="As for autotune itself.")
@db_option
@click.option(
    "--older-than",
    type=WholeNumber(min=0, max=36_500),
    metavar="DAYS",
    help="Measured results of other revisions that are older go too.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def prune(device: str, db: str | None, older_than: int | None, dry_run: bool, as_json: bool) -> None:
    """Remove what nothing will ask for any more: predictions and failures of other kernel revisions and toolchains."""
    from tilewright.kernels.devices import resolve_device
    from tilewright.tuner.installation import is_current
    from tilewright.tuning_db import upkeep

    target = resolve_device(device)
    (path,) = _paths(device, db)
    if not path.exists():
        raise DatabaseAccessError(f"there is no {path}: nothing to prune")
    before = None
    if older_than is not None:
        before = (datetime.now(UTC) - timedelta(days=older_than)).isoformat(timespec="microseconds")
    with open_snapshot(path) if dry_run else closing(open_file(path)) as file:
        if file.set_aside is not None:
            say(f"a damaged database was set aside as {file.set_aside}")
        upkeep.refuse_other_devices(file, path, target.key)
        pruned = upkeep.prune(file, lambda revision: is_current(revision, target.arch), before=before, dry_run=dry_run)
    if as_json:
        print_json({"path": str(path), "dry_run": dry_run, **asdict(pruned)})
    else:
        would = "would be removed" if dry_run else "removed"
        freed = "" if dry_run else f", {pruned.bytes / 2**20:.1f} MiB given back"
        click.echo(f"{path}: {pruned.records} records and {pruned.runs} runs {would}{freed}")
